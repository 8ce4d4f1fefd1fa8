# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""From flags or a table to samples on disk: requests, saving, export, the paper's figures.

Imports the rooms from `core` to `preparation`.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
