# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which warnings of other packages a command shows."""

from __future__ import annotations

import sys
import warnings

from scripts.core.errors import is_bundle_command

OF_NO_USE = (
    ("parsing config_file", UserWarning),  # MONAI, at every start: whoever writes a configuration may run code
    ("This DataLoader will create", UserWarning),  # PyTorch, where --num_workers exceeds the cores
    (r"(?!scripts\b)", FutureWarning),  # of the developers of packages among each other
)
"""Beginning of the message as a pattern, and category."""


def hide_foreign_warnings() -> None:
    """In a process of the command line, hide what no user can act on.

    Python's `-W` and PYTHONWARNINGS win over it, but for MONAI's first: with `-W error` no command would start.
    """
    if is_bundle_command():
        for message, category in OF_NO_USE[:1] if sys.warnoptions else OF_NO_USE:
            warnings.filterwarnings("ignore", message, category)
