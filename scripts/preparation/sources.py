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

from scripts.core.cells import is_missing, present
from scripts.core.errors import BundleError
from scripts.core.files import looks_there
from scripts.core.tables import TableRow, read_table
from scripts.preparation.selection import Selection
from scripts.volumes.reading import NIFTI, OTHERS, has_suffix
from scripts.volumes.scans import without_suffix

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
SESSION_COLUMNS = ("session_id", "session", "ses")
PLACES = ("sub-*/anat/*_T1w.*", "sub-*/ses-*/anat/*_T1w.*")
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


def find_sources(
    input_dir: str | os.PathLike | None, input_table: str | os.PathLike | None, selection: Selection | None = None
) -> list[Source]:
    """The scans of a table's column `path`, or those that a BIDS dataset has of the people in its table.

    A participant `01` of a table is `sub-01`, as BIDS has it. A row with a session, in a column `session_id`, `session`
    or `ses`, is of that session alone. Names that cannot be those of files, or that two scans share, are faults of
    these scans alone.

    Args:
        input_dir: a BIDS dataset; without `participants.tsv`, all its subjects.
        input_table: a table that stands for `participants.tsv`; paths in it are relative to it.
        selection: which of the people, sessions and images are taken; None for those that it takes by default.

    Raises:
        BundleError: if neither is given, a table cannot be read or its content is not here, ancpbids is not installed
            for a BIDS dataset, or there is no scan at all.
    """
    if not input_dir and not input_table:
        raise BundleError("nothing to prepare: give --input_dir (a BIDS dataset) or --input_table")
    if input_dir and not Path(str(input_dir)).is_dir():
        raise BundleError(f"--input_dir: there is no folder {input_dir}")
    table, chosen = Path(str(input_table)) if input_table else Path(str(input_dir)) / TABLE, selection or Selection()
    rows = read_table(table, ["participant_id"]) if input_table or looks_there(table) else []
    rows = [row.updated({"participant_id": f"sub-{row['participant_id'].removeprefix('sub-')}"}) for row in rows]
    if not (rows and all(present(row, "path") for row in rows)):
        return _checked(_in_bids(Path(str(input_dir or table.parent)), rows, table, chosen))
    named = [_named_by(row, table) for row in rows]
    chosen.check([source.subject for source in named], [source.session for source in named])
    return _checked([s for s in named if chosen.takes_participant(s.participant) and chosen.takes_session(s.session)])


def _named_by(row: TableRow, table: Path) -> Source:
    participant, session = row["participant_id"], _session_of(row)
    name = f"{participant}_{session}" if session else participant
    return Source(participant, session, name, table.parent / row["path"], row["path"], row)


def _session_of(row: Mapping[str, str]) -> str:
    """The session that a row is of, such as `ses-1`; empty if it does not say."""
    word = next((word for column in SESSION_COLUMNS if (word := present(row, column))), "")
    return f"ses-{word.removeprefix('ses-')}" if word else ""


def _in_bids(folder: Path, rows: Sequence[TableRow], table: Path, chosen: Selection) -> list[Source]:
    found = _t1w_files(folder)
    if not found:
        raise BundleError(f"{folder} holds no scan sub-*/[ses-*/]anat/*_T1w.nii[.gz]: is it a BIDS dataset?")
    if not rows:
        logger.warning(f"there is no {table}: nothing is known of the {len(found)} people")
        rows = [TableRow({"participant_id": participant}) for participant in sorted(found)]
    of_person: dict[str, list[TableRow]] = {}
    for row in rows:
        of_person.setdefault(row["participant_id"], []).append(row)
    unnamed = set(found) - set(of_person)
    if unnamed:
        logger.warning(f"{len(unnamed)} subjects of {folder} are not in {table} and are left out: {min(unnamed)} ...")
    chosen.check(list(of_person), [_session_in(file) for files in found.values() for file in files])
    people = {person: found.get(person, ()) for person in of_person if chosen.takes_participant(person)}
    taken = _taken(people, chosen)
    sources = [_sources_of(of_person[p], taken[p], bool(files), folder, table) for p, files in people.items()]
    return [source for of_one in sources for source in of_one]


def _taken(found: Mapping[str, Sequence[Path]], chosen: Selection) -> dict[str, list[Path]]:
    """The images that are chosen, after warnings of how many are not, and of sessions that give several."""
    of_session = {person: [f for f in files if chosen.takes_session(_session_in(f))] for person, files in found.items()}
    taken = {person: [f for f in files if chosen.takes(f.name)] for person, files in of_session.items()}
    left = [file for person, files in of_session.items() for file in files if file not in taken[person]]
    if left:
        logger.warning(
            f"{len(left)} T1w images are left out, {left[0]} the first: by --bids_filter_file, or as parts "
            "(part-phase, -real, -imag), inversions (inv-) and derivatives (space-, desc-), which it can choose"
        )
    counts = Counter((person, _session_in(file)) for person, files in taken.items() for file in files)
    several = [(person, session) for (person, session), count in counts.items() if count > 1]
    if several:
        person, session = several[0]
        names = ", ".join(f.name for f in taken[person] if _session_in(f) == session)
        logger.warning(
            f"{len(several)} sessions have several T1w scans, all of which are taken: {names}; --bids_filter_file "
            "chooses among them"
        )
    return taken


def _sources_of(rows: Sequence[TableRow], files: Sequence[Path], any_: bool, folder: Path, table: Path) -> list[Source]:
    """The scans of one person, each with the row of its session, else with the one that is of no session.

    Args:
        rows: of the person.
        files: the person's images that were chosen.
        any_: whether there are any at all.
        folder, table: of the dataset.
    """
    named, participant = [row for row in rows if present(row, "path")], rows[0]["participant_id"]
    if named:
        return [_named_by(row, table) for row in named]
    if not files:
        return [] if any_ else [_at_fault(rows[0], folder, "missing file", f"{folder} has no T1w scan of it")]
    of_session: dict[str, TableRow] = {}
    for row in rows:
        session = _session_of(row)
        if of_session.setdefault(session, row) != row:
            where = f"{participant} {session}".strip()
            said = f"{table} has {where} in several rows, which differ: keep one, or tell sessions apart by session_id"
            return [_at_fault(row, folder, "duplicate subject", said)]
    sessions = _sessions(folder / participant / f"{participant}_sessions.tsv")
    nothing = TableRow({"participant_id": participant})
    return [_of_file(folder, f, of_session.get(_session_in(f), of_session.get("", nothing)), sessions) for f in files]


def _at_fault(row: TableRow, folder: Path, reason: str, message: str) -> Source:
    participant = row["participant_id"]
    return Source(participant, "", participant, folder / participant, participant, row, (reason, message))


def _of_file(folder: Path, file: Path, row: TableRow, sessions: Mapping[str, Mapping[str, str]]) -> Source:
    session = _session_in(file)
    said = {column: value for column, value in sessions.get(session, {}).items() if not is_missing(value)}
    name = without_suffix(file.name).removesuffix("_T1w")
    return Source(row["participant_id"], session, name, folder / file, file.as_posix(), row.updated(said))


def _session_in(file: Path) -> str:
    return next((part for part in file.parts if part.startswith("ses-")), "")


def _sessions(table: Path) -> dict[str, TableRow]:
    """Session -> its row of a subject's `sessions.tsv`; none where there is no such table."""
    rows = read_table(table) if looks_there(table) else []
    if rows and not any(_session_of(row) for row in rows):
        raise BundleError(f"the table {table} has no column {' or '.join(SESSION_COLUMNS)}")
    return {_session_of(row): row for row in rows if _session_of(row)}


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
    _add_others(folder, found)
    return {subject: sorted(paths) for subject, paths in found.items()}


def _add_others(folder: Path, found: dict[str, list[Path]]) -> None:
    """Add what ancpbids does not list: MGH files, names in capitals, and links without content, to be named as such."""
    known = {path for paths in found.values() for path in paths}
    others = []
    for path in (path.relative_to(folder) for pattern in PLACES for path in folder.glob(pattern)):
        if path not in known and has_suffix(path) and without_suffix(path.name).endswith("_T1w"):
            is_link = not (folder / path).exists()
            if is_link or not path.name.endswith(NIFTI):
                found.setdefault(path.parts[0], []).append(path)
        elif has_suffix(path, OTHERS):
            others.append(path)
    if others:
        logger.warning(
            f"{len(others)} T1w images are of other formats, {others[0]} the first: left out; convert to NIfTI"
        )


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
