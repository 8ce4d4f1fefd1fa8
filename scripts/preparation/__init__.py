# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""From raw scans to a prepared data set: sources, steps, checks, registration, skull stripping, quality page.

Imports the rooms from `core` to `phantoms`.
"""

from scripts.core.old_names import keep_old_attributes

keep_old_attributes(__name__)
