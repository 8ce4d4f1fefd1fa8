# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What all trainings have in common: the engine, checkpoints, optimisation, EMA, validation, tracking.

Imports the rooms from `core` to `networks`; what one training has alone is in the room of its model.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
