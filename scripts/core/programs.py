# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Programs: those installed beside this package, and how one of its own ends in an error."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.core.errors import BundleError

logger = logging.getLogger(__name__)

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that would lead a program with a Python of its own to the modules of this one."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End this program with one line and exit status 1 where a `BundleError` is raised within."""
    try:
        yield
    except BundleError as error:
        sys.exit(f"error: {error}")


def find_program(command: str, source: str) -> str:
    """Path of a program.

    Args:
        command: its name, or its path.
        source: where to get it, for the message.

    Raises:
        BundleError: if it is not installed.
    """
    found = shutil.which(command)
    if found is None:
        raise BundleError(f"there is no program {command}: {source}")
    return found


def run_program(command: Sequence[str], wanted: Path | None = None, log: Path | None = None) -> None:
    """Run a program in silence, and check that it wrote what it should.

    Args:
        command: the program and its arguments.
        wanted: the file that it should write, if that is known.
        log: where its output goes; None keeps the last line alone, for an error.

    Raises:
        BundleError: if the program cannot be started, fails, or ends without the file; with its last line of output.
    """
    name = Path(command[0]).name
    logger.info(f"running {' '.join(command)}{f'; its output goes to {log}' if log else ''}")
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    try:
        with open(log, "w+b") if log else tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    except OSError as error:
        raise BundleError(f"{name} could not be started: {error.strerror or error}") from error
    said = f"{lines[-1].strip()[:200]}{f'. All of it: {log}' if log else ''}"
    if done.returncode:
        raise BundleError(f"{name} failed with exit status {done.returncode}: {said}")
    if wanted is not None and not wanted.is_file():
        raise BundleError(f"{name} ended without its file {wanted.name}: {said}")
