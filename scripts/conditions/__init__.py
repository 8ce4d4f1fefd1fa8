# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the model is conditioned on: names, units, ranges, their normalisation to 0..1 and learned ranges.

Imports `core` and `compute`.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
