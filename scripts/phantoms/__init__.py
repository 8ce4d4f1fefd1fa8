# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms: heads of known age, sex and volumes, made by deforming real ones.

Imports the rooms from `core` to `measuring`.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
