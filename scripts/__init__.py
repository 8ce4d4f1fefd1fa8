# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle's Python package: everything that the configurations in `configs/` build."""

from scripts.core import old_names
from scripts.core.errors import report_errors_in_one_line
from scripts.core.quiet import hide_foreign_warnings, name_user

name_user()
report_errors_in_one_line()
hide_foreign_warnings()
old_names.install()
