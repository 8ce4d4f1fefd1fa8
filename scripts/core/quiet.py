# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which warnings of other packages a command shows, and that its lines and its bars stay apart."""

from __future__ import annotations

import getpass
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from scripts.core.errors import is_bundle_command

ABOVE = "writes_above_bars"
OF_NO_USE = (
    ("parsing config_file", UserWarning),  # MONAI, at every start: whoever writes a configuration may run code
    ("This DataLoader will create", UserWarning),  # PyTorch, where --num_workers exceeds the cores
    (r"(?!scripts\b)", FutureWarning),  # of the developers of packages among each other
)
"""Beginning of the message as a pattern, and category."""


def name_user() -> None:
    """Where the user has no name, as in containers: give it one, since MONAI and PyTorch ask for it as they start."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = "nobody"


def log_above_bars() -> None:
    """Have lines of the log written above progress bars, not into them. Call it when the log has its handlers."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and not hasattr(handler, ABOVE):
            setattr(handler, ABOVE, True)
            handler.emit = partial(_emit_above, handler.emit, handler.stream)  # type: ignore[method-assign]


def _emit_above(emit: Callable[[logging.LogRecord], None], stream: Any, record: logging.LogRecord) -> None:
    from tqdm import tqdm  # the command line's help does without

    with tqdm.external_write_mode(file=stream):
        emit(record)


def hide_foreign_warnings() -> None:
    """In a process of the command line, hide what no user can act on.

    Python's `-W` and PYTHONWARNINGS win over it, but for MONAI's first: with `-W error` no command would start.
    """
    if is_bundle_command():
        for message, category in OF_NO_USE[:1] if sys.warnoptions else OF_NO_USE:
            warnings.filterwarnings("ignore", message, category)
