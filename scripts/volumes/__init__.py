# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes on disk and in memory: the grid, NIfTI, scans, folders, data sets, label maps, pictures.

Imports `core`, `compute` and `conditions`.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
