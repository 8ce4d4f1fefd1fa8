# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts`: see `scripts.core.command_line`."""

import sys

from scripts.core.command_line import main
from scripts.core.errors import report_errors_in_one_line
from scripts.core.quiet import hide_foreign_warnings

if __name__ == "__main__":
    report_errors_in_one_line()
    hide_foreign_warnings()
    sys.exit(main())
