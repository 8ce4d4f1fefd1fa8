# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, and how the command line shows them."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path
from types import TracebackType

from scripts.core.cells import printable
from scripts.core.paths import COMMAND, as_called

FROM_A_WORKER = re.compile(r"in DataLoader worker process[\s\S]*^(?:\w+\.)*(?:Bundle|Scan)Error: (.*)", re.MULTILINE)
OF_MPS = re.compile(
    r"operator '?([\w:.]+)'? is not currently implemented for the MPS device|(MPS framework doesn't support \w+)"
    r"|(\w+ ?\w*D is not supported on MPS)"
)
LOST_PEER = re.compile(r"Connection (closed|reset) by peer|ncclRemoteError|NCCL communicator was aborted")
NO_MEMORY = re.compile(
    r"\w+ out of memory[^.]*\.( Tried to allocate [\d.]+ \w+)?|can't allocate memory|Unable to allocate.*"
)
MISSING_ID = re.compile(
    r"query key: ([\w:]+)|the referring item `@([\w:]+)` is not defined|run ID '(.*?)' doesn't exist"
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_FILES = (
    *NO_ROOM,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
)
working_in: list[Path] = []
"""The folders that this process fills: an error of the system need not say where it was."""
MONAI_COMMAND, OWN_COMMANDS = "monai/bundle/__main__.py", ("scripts/__main__.py", "brain_ldm/__main__.py")


class BundleError(Exception):
    """Something that the user can put right: says what is wrong, where, and what to do, in one line."""

    def __str__(self) -> str:
        return printable(re.sub(r"\s*\n\s*", " ", as_called(super().__str__().strip())))


def find_bundle_error(error: BaseException | None) -> BundleError | None:
    """The first `BundleError` among an exception and its causes: MONAI wraps what its expressions raise.

    What a data loader's process raises comes without its causes: there it is found in the text.
    """
    while error is not None:
        in_text = FROM_A_WORKER.search(error.args[0]) if error.args and isinstance(error.args[0], str) else None
        if in_text:
            return BundleError(in_text[1])
        if isinstance(error, BundleError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _failed_component(error: BaseException | None) -> str | None:
    """What to say where MONAI could not build a component from the values that it was given: the innermost one."""
    said = None
    while error is not None:
        if str(error).startswith("Failed to instantiate component") and error.__cause__ is not None:
            name = str(error).split("'")[1].rsplit(".", 1)[-1]
            root = error.__cause__
            while root.__cause__ is not None:
                root = root.__cause__
            reason = str(root).strip().splitlines() or [type(root).__name__]
            said = f"cannot build {name} with these options: {reason[0]}"
        if str(error).startswith("Cannot locate class or function path"):
            return f"a _target_ of the configuration cannot be found: {str(error).split(': ', 1)[-1].rstrip('.')}"
        error = error.__cause__ or error.__context__
    return said


def _missing_id(error: BaseException | None) -> str | None:
    """What to say where a flag or a file names an id that the configuration does not have."""
    while error is not None:
        if found := MISSING_ID.search(str(error)):
            name = next(filter(None, found.groups()))
            hint = " (what trains is in train and validate, for each training)" * name.startswith("train")
            return f"the configuration has no {name}{hint}: see docs/configuration.md"
        error = error.__cause__ or error.__context__
    return None


def _out_of_memory(error: BaseException | None) -> str | None:
    """What to do where PyTorch or NumPy found no room for an array."""
    while error is not None:
        if found := NO_MEMORY.search(str(error)):
            return (
                f"not enough memory ({found[0].rstrip('.')}): give a smaller --batch_size or --amp bf16; in a training "
                "--gradient_checkpointing 1, --accumulate or --patch_shape (docs/training.md), in sampling "
                "--streaming 2 (docs/performance.md). What was finished is kept"
            )
        error = error.__cause__ or error.__context__
    return None


def _not_on_mps(error: BaseException | None) -> str | None:
    """What Apple's GPU cannot compute."""
    while error is not None:
        if found := OF_MPS.search(str(error)):
            what = next(filter(None, found.groups()))
            return (
                f"--device mps: this Mac's GPU cannot compute this ({what}): use --device cpu, or set "
                "PYTORCH_ENABLE_MPS_FALLBACK=1, with which the CPU does what the GPU cannot"
            )
        error = error.__cause__ or error.__context__
    return None


def _system_error(error: BaseException | None) -> str | None:
    """What the operating system had against a file or folder, such as a full disk, and where."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in OF_FILES:
            where = str(error.filename or " or ".join(map(str, working_in)) or "the output")
            room = ": make room" if error.errno in NO_ROOM else ""
            return f"cannot write {where}: {error.strerror}{room}. What was finished is kept"
        error = error.__cause__ or error.__context__
    return None


REASONS = (_out_of_memory, _not_on_mps, _system_error, _failed_component, _missing_id)


def explain(error: BaseException) -> str | None:
    """One line on an error that a user can act on; None for one that needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: what was finished is kept, and the same command goes on from there"
    if found := find_bundle_error(error):
        return str(found)
    known = next(filter(None, (find(error) for find in REASONS)), None)
    if known is None and LOST_PEER.search(str(error.__cause__ or error)):
        return "another process of this command has stopped: its own error says why"
    return known


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    known = explain(error)
    if known is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {known}", file=sys.stderr)


def is_monai_command() -> bool:
    """Whether this process is `python -m monai.bundle`."""
    return _program().endswith(MONAI_COMMAND)


def is_bundle_command() -> bool:
    """Whether this process is `python -m monai.bundle`, `python -m scripts` or `brain-ldm`."""
    return is_monai_command() or _program().endswith(OWN_COMMANDS) or Path(_program()).stem == COMMAND


def _program() -> str:
    return sys.argv[0].replace("\\", "/") if sys.argv else ""


def report_errors_in_one_line() -> None:
    """In a process of the command line, print an uncaught `BundleError` as one line instead of a traceback.

    Only the command line is changed: a program that imports this package keeps its own hook. The exit
    code stays 1, and any other exception keeps its traceback.
    """
    if is_bundle_command():
        sys.excepthook = _show
