# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders that a command fills: they know which command that is, and no two commands meet in one.

A folder that a command has filled holds a mark, `.made_by`: the command, the folders and files that it read, its
settings. While it writes, it holds a lock, `.lock`. Folders of versions before 2.2.0 have no mark; what lies in them
tells whose they are.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scripts.compute.devices import process_rank
from scripts.compute.processes import arrive, arrives
from scripts.core.config import current_config, is_plain
from scripts.core.errors import BundleError, working_in
from scripts.core.files import TEMPORARY, make_folder, read_json, write_json
from scripts.core.options import is_absent
from scripts.core.paths import ROOT

logger = logging.getLogger(__name__)

MARK, LOCK = ".made_by", ".lock"
OF_THE_BUNDLE = ("benchmarks", "configs", "docs", "scripts", "tests")
INNER = ("figures", "logs")
"""Folders that commands make in theirs."""
LOCKS = re.compile(r"\.lock(-(\d+)-of-(\d+))?")
DERIVATIVES = "derivatives"
"""Where BIDS has what was made of a dataset: within it, and yet not a part of it."""
INCIDENTAL = {"device", "num_workers", "write_threads", "assemble", "overwrite", "shard", "bundle_root"}
"""Options that change how a result is computed and not what it is."""


@dataclass(frozen=True)
class Trade:
    """What a command leaves in its folder.

    Attributes:
        traces: patterns of files that it alone writes: by these a folder without a mark is known.
        writes: names that it writes or replaces: in a folder that is not its own, they are somebody else's.
        tells: whether a rerun says which settings differ from those of the last one.
    """

    traces: tuple[str, ...]
    writes: tuple[str, ...] = ()
    tells: bool = False


DATASET = ("participants.tsv", "participants.json", "dataset_description.json", "figures")
SAMPLES = "sample_seed-"
"""How the names of samples begin."""
SEEDED = "sub-seed"
"""How those of a BIDS derivative begin."""
LABEL_MAP = "_dseg.nii.gz"
"""How the names of label maps end."""
SIX_DIGITS = "sub-" + "[0-9]" * 6
TRADES = {
    "prepare": Trade(
        ("sub-*/anat/*_xfm.txt", "sub-*/ses-*/anat/*_xfm.txt", "failures.tsv", "quality.html"),
        (*DATASET, "logs", "conditions.json"),
    ),
    "phantoms": Trade((f"{SIX_DIGITS}/anat/{SIX_DIGITS}_space-MNI152_T1w.json",), DATASET, True),
    "encode_latents": Trade(
        ("encoded.npy", "next-encoded.npy"),
        ("participants.tsv", "encoding.json", "posteriors.npy", "conditions.json"),
        True,
    ),
    "train": Trade(("checkpoint_iteration=*.pt", "losses.jsonl"), ("validation.tsv", "best.pt", "figures")),
    "sample": Trade((f"{SAMPLES}*_*.json", f"{SEEDED}*/anat/{SEEDED}*_T1w.json"), DATASET[:3]),
    "figures": Trade((f"{SAMPLES}*_*.json",)),
    "edit": Trade(("*_edit-*_request.json",), ("participants.tsv",)),
    "inpaint": Trade(("*_inpaint_request.json",), ("participants.tsv",)),
    "interpolate": Trade(("*_to_*_request.json",), ("participants.tsv",)),
    "segment": Trade(("*_dseg.nii.gz",), ("volumes.tsv", "figures"), True),
    "evaluate": Trade(("evaluation.json",), ("evaluation.tsv", "evaluation.html", "table_1.tsv"), True),
    "side_by_side": Trade(("models.png",)),
    "serve": Trade((f"{DERIVATIVES}/*/request.json",)),
    "collection": Trade(("rows.json",), ("rows.tsv", "facts.json", "shards", "work", "claims")),
    "collection_export": Trade(("datasheet.md",), ("bids", "webdataset", "parquet", "huggingface")),
    "export": Trade(("export.json",), ("diffusion.onnx", "decoder.onnx")),
}
"""Command -> what it leaves behind. Those of samples and of figures are alike: either may go on with the other's."""
ALIKE = {"sample", "figures"}

_held: dict[Path, tuple[int, FileLock, bool]] = {}
"""The locks of this process, whose id stands with them, since a fork has them too; and whether it has made the folder.
A command that failed within a longer process may try again."""


class OutputFolder:
    """A folder for what one command makes.

    Args:
        path: the folder; made when it is claimed.
        flag: the option that gives it, for messages.
        command: one of `TRADES`.
        reads: option -> the folder or file that the command reads, or several in a list or a map; None where there is
            none. None of them may lie in the folder, nor the folder in one of them but in its `derivatives`.
        same: those of `reads` that have to be what they were in an earlier run, since files of two would mix.
        part: which part of how many this process works on, where several commands share the folder.
        shared: whether any number of processes may work there, which see to it themselves that they do not meet.

    Raises:
        BundleError: if the path is empty.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        flag: str,
        command: str,
        reads: Mapping[str, Any] | None = None,
        same: Sequence[str] = (),
        part: tuple[int, int] | None = None,
        shared: bool = False,
    ) -> None:
        self.shared = shared
        self.name, self.flag, self.command, self.same = str(path), flag, command, tuple(same)
        if not self.name.strip():
            raise BundleError(f"--{flag} is empty: give a folder")
        self.path = Path(self.name)
        self.reads = {option: list(_paths(given)) for option, given in (reads or {}).items()}
        self.part = part

    def check(self) -> None:
        """Whether the folder may be claimed, before anything is computed for it; nothing is written.

        Raises:
            BundleError: if the folder is another command's, lies in one or around one, or holds files that this command
                would replace and has not written.
        """
        self._check_reads()
        self._check_owner()
        self._check_same(read_json(self.path / MARK))
        for name in INNER:
            if (self.path / name).exists() and not (self.path / name).is_dir():
                raise BundleError(
                    f"{self.path / name} is no folder, and `{self.command}` writes into one: move it away"
                )

    def claim(self) -> Path:
        """Check that the folder is this command's or nobody's, take it, mark it, and clear away what a kill left there.

        Under `torchrun` the first process does so, and the others wait for it.

        Returns:
            The folder.

        Raises:
            BundleError: as `check`, and if another process is at work there, or the folder cannot be written.
        """
        if self.part is None and process_rank()[0] > 0:
            arrive(f"claimed {self.name}")
            return self.path
        self.check()
        known = read_json(self.path / MARK)
        is_new = not self.path.exists()
        make_folder(self.path)
        working_in.append(self.path)
        if self.shared:
            if not known:
                self._mark()
            return self.path
        self._lock(is_new)
        if self.part == (1, 1) or (self.part is None and arrives()):
            clear_leftovers(self.path)
        if TRADES[self.command].tells:
            _tell_what_changed(known.get("settings", {}), _settings())
        self._mark()
        if self.part is None:
            arrive(f"claimed {self.name}")
        return self.path

    def _mark(self) -> None:
        reads = {option: [str(path.resolve()) for path in paths] for option, paths in self.reads.items()}
        content = {"command": self.command, "folder": str(self.path.resolve()), "reads": reads, "settings": _settings()}
        write_json(self.path / MARK, content)

    def release(self) -> None:
        """Let others in; where nothing was made, the mark goes as well, and the folder if it was new."""
        _let_go(self._lock_path())

    def _check_reads(self) -> None:
        own = self.path.resolve()
        for option, paths in self.reads.items():
            for path in paths:
                if _overlap(own, path.resolve(), path.is_dir()):
                    raise BundleError(
                        f"--{self.flag} {self.name} and --{option} {path} lie in one another: what is written would "
                        f"mix with what is read; give another --{self.flag}"
                    )

    def _check_owner(self) -> None:
        own = self.path.resolve()
        if own == ROOT or own in ROOT.parents or any(own.is_relative_to(ROOT / name) for name in OF_THE_BUNDLE):
            raise BundleError(f"--{self.flag} {self.name} is a folder of the bundle itself, or holds it: give another")
        if self.path.exists() and not self.path.is_dir():
            raise BundleError(f"--{self.flag} {self.name} is no folder: give another")
        around = next((parent for parent in own.parents if (parent / MARK).is_file()), None)
        if around is not None and DERIVATIVES not in own.relative_to(around).parts:
            raise BundleError(
                f"--{self.flag} {self.name} lies in {around}, which `{owner_of(around)}` fills: give another"
            )
        owner = owner_of(self.path, self.command)
        if owner == self.command or {owner, self.command} <= ALIKE:
            return
        if owner is not None:
            raise BundleError(
                f"--{self.flag} {self.name} holds what `{owner}` made: nothing is mixed; give another --{self.flag}"
            )
        self._check_foreign()

    def _check_foreign(self) -> None:
        for name in TRADES[self.command].writes:
            if os.path.lexists(self.path / name):
                raise BundleError(
                    f"--{self.flag} {self.name} holds a {name} that `{self.command}` has not written and would "
                    f"replace: give another --{self.flag}"
                )
        within = next((mark.parent for mark in _glob(self.path, (f"*/{MARK}", f"*/*/{MARK}"))), None)
        if within is not None:
            raise BundleError(f"--{self.flag} {self.name} lies around {within}, which `{owner_of(within)}` fills")

    def _check_same(self, mark: Mapping[str, Any]) -> None:
        """A folder that was moved is the same, and one that lies to a copied folder as the other to the first."""
        before, there = mark.get("reads", {}), str(mark.get("folder", ""))
        for option in self.same:
            old = [str(path) for path in before.get(option) or []] if isinstance(before, Mapping) else []
            now = [str(path.resolve()) for path in self.reads.get(option, [])]
            own = str(self.path.resolve())
            alike = old == now or [os.path.relpath(p, there) for p in old] == [os.path.relpath(p, own) for p in now]
            if old and now and not alike and any(os.path.exists(path) for path in old):
                raise BundleError(
                    f"--{self.flag} {self.name} holds what `{self.command}` made of {', '.join(map(str, old))}: give "
                    f"another --{self.flag} for --{option} {', '.join(map(str, now))}"
                )

    def _lock_path(self) -> Path:
        part, parts = self.part or (1, 1)
        return self.path.resolve() / (LOCK if parts == 1 else f"{LOCK}-{part}-of-{parts}")

    def _lock(self, is_new: bool) -> None:
        own = self._lock_path()
        if own in _held:
            return
        parts = (self.part or (1, 1))[1]
        for other in sorted(own.parent.glob(f"{LOCK}*")):
            found = LOCKS.fullmatch(other.name)
            if found and int(found[3] or 1) != parts:
                stale = self._take(other)
                other.unlink(missing_ok=True)
                stale.release()
        _held[own] = os.getpid(), self._take(own), is_new

    def _take(self, path: Path) -> FileLock:
        lock = FileLock(path, thread_local=False)  # of this process, not of those that it forks
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            what = "training" if self.command == "train" else f"`{self.command}`"
            raise BundleError(
                f"another {what} is at work in {self.name}: wait for it, or give this one its own --{self.flag}"
            ) from error
        except NotImplementedError:
            logger.warning(f"{self.name} lies on a file system without locks: let one command at a time write there")
        except OSError as error:
            raise BundleError(
                f"cannot lock --{self.flag} {self.name}: {path}: {error.strerror or error}; give another folder"
            ) from error
        return lock


@atexit.register
def release_all() -> None:
    """Let others into all folders of this process, as it ends."""
    for path in list(_held):
        _let_go(path)


def _let_go(path: Path) -> None:
    owner, lock, is_new = _held.pop(path, (0, None, False))
    if lock is not None and owner == os.getpid():
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it has no name any more
            if os.listdir(path.parent) == [MARK]:
                (path.parent / MARK).unlink()
            if is_new and not os.listdir(path.parent):
                path.parent.rmdir()
        lock.release()


def owner_of(folder: Path, expected: str = "") -> str | None:
    """The command that has filled a folder, by its mark, or else by what lies in it; None if none has.

    Args:
        folder: need not be there.
        expected: a command whose traces count before those of others.
    """
    marked = read_json(folder / MARK).get("command")
    if isinstance(marked, str) and marked in TRADES:
        return marked
    for command in sorted(TRADES, key=lambda one: one != expected):
        if any(_glob(folder, TRADES[command].traces)):
            return command
    return None


def only_results(folder: Path, found: Sequence[Path]) -> list[Path]:
    """Of files below a folder, those that belong to it: not what another command has made in a folder below.

    Of a folder of samples, these are the samples.
    """
    below = {parent for path in found for parent in path.relative_to(folder).parents} - {Path()}
    foreign = {folder / parent for parent in below if (folder / parent / MARK).is_file()}
    kept = [path for path in found if foreign.isdisjoint(path.parents)]
    if owner_of(folder) not in ALIKE:
        return kept
    kept = [path for path in kept if not path.name.endswith(LABEL_MAP)]
    derivative = [path for path in kept if path.name.startswith(SEEDED) and path.parent.name == "anat"]
    return derivative or [path for path in kept if path.parent == folder and path.name.startswith(SAMPLES)]


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder; links are not followed."""
    for where, _, names in os.walk(folder):
        for name in names:
            if TEMPORARY.match(name):
                Path(where, name).unlink(missing_ok=True)


def _paths(given: Any) -> Iterator[Path]:
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _paths(one)
    elif not is_absent(given):
        words = [str(given)] if os.path.lexists(str(given)) else str(given).split(",")
        yield from (Path(word.strip()) for word in words if word.strip())


def _overlap(own: Path, other: Path, is_folder: bool) -> bool:
    if other.is_relative_to(own):
        return DERIVATIVES not in other.relative_to(own).parts or not is_folder
    return is_folder and own.is_relative_to(other) and DERIVATIVES not in own.relative_to(other).parts


def _glob(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from folder.glob(pattern)


def _settings() -> dict[str, Any]:
    try:
        config = current_config()
    except RuntimeError:  # called from Python
        return {}
    return {name: value for name, value in config.items() if is_plain(value) and name not in INCIDENTAL}


def _tell_what_changed(before: Any, now: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() & now.keys()) if isinstance(before, Mapping) else []:
        if json.dumps(before[name]) != json.dumps(now[name]):
            logger.warning(f"going on with --{name} {now[name]}, which was {before[name]}")
