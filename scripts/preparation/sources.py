# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The raw scans to prepare: found in a BIDS dataset or named by a table, each with what is known of the person."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError
from scripts.core.tables import MISSING, read_table
from scripts.volumes.scans import NIFTI, without_suffix

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
NAME = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Source:
    """One raw scan.

    Attributes:
        participant: its participant_id, such as `sub-01`.
        session: its session, such as `ses-1`; empty if it has none.
        name: what its results are called, such as `sub-01_ses-1`.
        path: the NIfTI or MGH file.
        origin: the path as its table or its dataset has it.
        row: what the tables say of it, by column.
        fault: (reason, message) where it cannot be prepared, as its tables already show.
    """

    participant: str
    session: str
    name: str
    path: Path
    origin: str
    row: Mapping[str, str]
    fault: tuple[str, str] | None = None

    @property
    def subject(self) -> str:
        """The person, where `participant` tells sessions apart, as `sub-01_ses-2` does."""
        return self.participant.split("_ses-")[0]

    @property
    def folder(self) -> Path:
        """Where its results lie in the dataset, such as `sub-01/ses-1/anat`."""
        return Path(self.participant, *([self.session] if self.session else []), "anat")


def find_sources(input_dir: str | os.PathLike | None, input_table: str | os.PathLike | None) -> list[Source]:
    """The scans of a table's column `path`, or those that a BIDS dataset has of the people in its table.

    A participant `01` of a table is `sub-01`, as BIDS has it. Names that cannot be those of files, or that two scans
    share, are faults of these scans alone.

    Args:
        input_dir: a BIDS dataset; without `participants.tsv`, all its subjects.
        input_table: a table that stands for `participants.tsv`; paths in it are relative to it.

    Raises:
        BundleError: if neither is given, a table cannot be read, ancpbids is not installed for a BIDS dataset, or there
            is no scan at all.
    """
    if not input_dir and not input_table:
        raise BundleError("nothing to prepare: give --input_dir (a BIDS dataset) or --input_table")
    if input_dir and not Path(str(input_dir)).is_dir():
        raise BundleError(f"--input_dir: there is no folder {input_dir}")
    table = Path(str(input_table)) if input_table else Path(str(input_dir)) / TABLE
    rows = read_table(table, ["participant_id"]) if input_table or table.is_file() else []
    rows = [{**row, "participant_id": f"sub-{row['participant_id'].removeprefix('sub-')}"} for row in rows]
    if rows and all(_stated(row, "path") for row in rows):
        return _checked([_named_by(row, table) for row in rows])
    return _checked(_in_bids(Path(str(input_dir or table.parent)), rows, table))


def _stated(row: Mapping[str, str], column: str) -> str:
    value = row.get(column, MISSING)
    return "" if value == MISSING else value


def _named_by(row: Mapping[str, str], table: Path) -> Source:
    participant, session = row["participant_id"], _session(_stated(row, "session_id"))
    name = f"{participant}_{session}" if session else participant
    return Source(participant, session, name, table.parent / row["path"], row["path"], row)


def _session(word: str) -> str:
    return f"ses-{word.removeprefix('ses-')}" if word else ""


def _in_bids(folder: Path, rows: Sequence[Mapping[str, str]], table: Path) -> list[Source]:
    found = _t1w_files(folder)
    if not found:
        raise BundleError(f"{folder} holds no scan sub-*/[ses-*/]anat/*_T1w.nii[.gz]: is it a BIDS dataset?")
    if not rows:
        logger.warning(f"there is no {table}: nothing is known of the {len(found)} people")
        rows = [{"participant_id": participant} for participant in sorted(found)]
    unnamed = set(found) - {row["participant_id"] for row in rows}
    if unnamed:
        logger.warning(f"{len(unnamed)} subjects of {folder} are not in {table} and are left out: {min(unnamed)} ...")
    return [source for row in rows for source in _sources_of(row, found, folder, table)]


def _sources_of(row: Mapping[str, str], found: Mapping[str, Sequence[Path]], folder: Path, table: Path) -> list[Source]:
    participant = row["participant_id"]
    if _stated(row, "path"):
        return [_named_by(row, table)]
    files = found.get(participant, ())
    if not files:
        fault = ("missing file", f"{folder} has no T1w scan of it")
        return [Source(participant, "", participant, folder / participant, participant, row, fault)]
    sessions = _sessions(folder / participant / f"{participant}_sessions.tsv")
    return [_of_file(folder, file, row, sessions) for file in files]


def _of_file(folder: Path, file: Path, row: Mapping[str, str], sessions: Mapping[str, Mapping[str, str]]) -> Source:
    session = next((part for part in file.parts if part.startswith("ses-")), "")
    said = {column: value for column, value in sessions.get(session, {}).items() if value not in ("", MISSING)}
    name = without_suffix(file.name).removesuffix("_T1w")
    return Source(row["participant_id"], session, name, folder / file, file.as_posix(), {**row, **said})


def _sessions(table: Path) -> dict[str, dict[str, str]]:
    """Session -> its row of a subject's `sessions.tsv`; none where there is no such table."""
    rows = read_table(table, ["session_id"]) if table.is_file() else []
    return {_session(row["session_id"]): row for row in rows}


def _t1w_files(folder: Path) -> dict[str, list[Path]]:
    """Subject -> its T1w scans, relative to the dataset; not those in derivatives/ and sourcedata/."""
    try:
        from ancpbids import BIDSLayout, DatasetOptions
    except ImportError as error:
        raise BundleError("BIDS datasets are read by the package ancpbids: pip install ancpbids") from error
    layout = BIDSLayout(str(folder), DatasetOptions(ignore=True, ignore_pickle_file=True))
    found: dict[str, list[Path]] = {}
    files: list[Any] = layout.get(suffix="T1w", extension=list(NIFTI))
    for file in files:
        path = Path(file.get_relative_path())
        subject, *between, datatype = path.parts[:-1] if len(path.parts) > 2 else ("", "")
        at_home = len(between) == 0 or (len(between) == 1 and between[0].startswith("ses-"))
        if subject == f"sub-{file.entities.get('sub')}" and datatype == "anat" and at_home:
            found.setdefault(subject, []).append(path)
    return {subject: sorted(paths) for subject, paths in found.items()}


def _checked(sources: Sequence[Source]) -> list[Source]:
    counts = Counter(source.name for source in sources)
    return [_with_fault(source, counts[source.name]) for source in sources]


def _with_fault(source: Source, count: int) -> Source:
    if not (NAME.fullmatch(source.participant) and NAME.fullmatch(source.name)):
        message = f"the name '{source.name}' must be of letters and digits, with - and _ between them"
        return replace(source, fault=("impossible name", message))
    if count > 1:
        message = f"{source.name} is there {count} times: keep one, or tell a person's scans apart by session_id"
        return replace(source, fault=("duplicate subject", message))
    return source
