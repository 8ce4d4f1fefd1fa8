# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""From folders of samples to a report: measures, segmentations, tables, the page.

Imports the rooms from `core` to `sampling`; the single metrics are in `metrics`.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
