# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Numbers that were computed of files, kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scripts.compute.devices import process_rank
from scripts.compute.processes import wait_for_all_processes
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, make_folder

logger = logging.getLogger(__name__)

Numbers = tuple[float, ...]
T = TypeVar("T")

FORMER_SOURCES = (
    ("FourGRSSIM", "c43772512e0c07fbfe17b3003f6db865905945237b02113f567b0193c2268f3d"),
    ("Alignment", "5b28f3e6dfdb83c37446e75296dcf239eeb6d018f364651c0e3521c36035b6c5"),
    ("Segmenter", "b2b81760b83753fe646cac591aa836df3305da19d302f59fe749d22941934dd6"),
    ("MultiScaleSSIMMetric", "01a2ba67bc440e39c6c5b0252a360cf2887f84098ea1add93e499f2d70636b13"),
    ("SSIMMetric", "01a2ba67bc440e39c6c5b0252a360cf2887f84098ea1add93e499f2d70636b13"),
)
"""Class and SHA-256 of the source by which versions before named metrics that are `version` 1 of this package's now."""


class Values:
    """Numbers by what they are and the hashes of the files they were computed of: nothing is computed twice.

    Every process appends to a file of its own, `<folder>/rank-<number>.tsv`, a line at a time: what, the files'
    hashes, the numbers. All of these files are read, so that an interrupted run goes on where it stopped, with any
    number of processes. A last line that was cut short does not count, and is cut off before more is written.

    Args:
        folder: made when the first number is kept.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(str(folder))
        self._known: dict[tuple[str, ...], Numbers] | None = None
        self._ready = False

    def get(self, what: str, *files: str) -> Numbers | None:
        """The numbers `what` of the files with these hashes, also if a version before kept them; None if not known."""
        if self._known is None:
            self._known = dict(line for path in sorted(self.folder.glob("rank-*.tsv")) for line in _lines(path))
        names = (what, *getattr(what, "formerly", ()))
        return next((self._known[(name, *files)] for name in names if (name, *files) in self._known), None)

    def add(self, what: str, files: Sequence[str], numbers: Sequence[float]) -> None:
        """Keep the numbers `what` of the files with these hashes.

        Raises:
            BundleError: if they cannot be written.
        """
        line = "\t".join([what, "+".join(files), " ".join(repr(float(number)) for number in numbers)])
        path = self.folder / f"rank-{process_rank()[0]}.tsv"
        try:
            self._prepare(path)
            with open(path, "ab", buffering=0) as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise BundleError(f"cannot write {path}: {error.strerror or error}") from error
        if self._known is not None:
            self._known[(what, *files)] = tuple(map(float, numbers))

    def _prepare(self, path: Path) -> None:
        if not self._ready:
            make_folder(self.folder)
            if path.is_file():
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self._ready = True

    def reload(self) -> None:
        """Read the files again when they are next asked: other processes may have written."""
        self._known = None


def _lines(path: Path) -> list[tuple[tuple[str, ...], Numbers]]:
    """What the complete lines of a file say; damaged ones are left out, so that their values are measured again."""
    try:
        complete = path.read_bytes().decode(errors="replace").split("\n")[:-1]
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
    found = [line for line in map(_line, complete) if line is not None]
    if len(found) < len(complete):
        logger.warning(f"{len(complete) - len(found)} lines of {path} are damaged: what they held is measured again")
    return found


def _line(text: str) -> tuple[tuple[str, ...], Numbers] | None:
    try:
        what, files, numbers = text.split("\t")
        values = tuple(map(float, numbers.split()))
    except ValueError:
        return None
    return None if not values or any(map(math.isnan, values)) else ((what, *files.split("+")), values)


class Identity(str):
    """A name for what a metric gives, with the names that versions before had for the same numbers."""

    formerly: tuple[str, ...] = ()


def identity(name: str, function: Any, **facts: Any) -> Identity:
    """A name for what a metric gives: with other settings, or another version of the metric, it differs.

    The version of this package's metrics is an attribute `version` of their class, 1 where there is none: whoever
    changes the numbers counts it up. That of others is a hash of the file that their class is in.

    Args:
        name: of the metric, with which the result begins.
        function: an object.
        facts: plain data on which the numbers depend.
    """
    kind = type(function)
    if kind.__module__.partition(".")[0] != __name__.partition(".")[0]:
        return Identity(_named(name, kind.__qualname__, file_hash(inspect.getfile(kind)), facts))
    version = getattr(kind, "version", 1)
    found = Identity(_named(name, version, facts))
    if version == 1:
        found.formerly = tuple(_named(name, *source, facts) for source in FORMER_SOURCES)
    return found


def _named(name: str, *content: Any) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"


def complete(
    what: str,
    items: Iterable[T],
    known: Callable[[T], bool],
    measure: Callable[[list[T]], None],
    kept: Values | None = None,
    alone: bool = False,
) -> None:
    """Measure what is not known yet; under torchrun, each process a run of items that follow each other.

    Returns when all processes are done. None begins before all have looked at what is known.

    Args:
        what: the items' name in the log, such as `pairs of real_dir`.
        items: of all processes, in one order.
        known: whether an item was measured before.
        measure: is given the items that were not, if there are any, and keeps what it finds.
        kept: where all processes keep it: read again at the end.
        alone: take all items and wait for nobody, as the first process does when it alone reports.
    """
    rank, processes = (0, 1) if alone else process_rank()
    every = list(items)
    missing = [item for item in every if not known(item)]
    if 0 < len(missing) < len(every) and rank == 0:
        logger.info(f"{what}: {len(every) - len(missing)} of {len(every)} are there already")
    if not alone:
        wait_for_all_processes()
    missing = missing[len(missing) * rank // processes : len(missing) * (rank + 1) // processes]
    if missing:
        measure(missing)
    if not alone:
        wait_for_all_processes()
        if kept is not None:
            kept.reload()
