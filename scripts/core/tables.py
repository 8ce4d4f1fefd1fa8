# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Tab-separated tables, as in BIDS: a header line, then one row a line."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from scripts.core.cells import MISSING, shown
from scripts.core.errors import BundleError
from scripts.core.files import check_content, replacing

__all__ = ["MISSING", "TableRow", "read_text", "read_table", "write_table"]

logger = logging.getLogger(__name__)

_TABS: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}  # a quote is a character
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class TableRow(dict[str, str]):
    """A row, from column name to text. A column that the table has several times can be asked for in vain alone.

    Args:
        cells: of the columns that are there once.
        table: for messages.
        twice: names of the other columns.
    """

    def __init__(self, cells: Mapping[str, str], table: Path | str = "", twice: frozenset[str] = frozenset()) -> None:
        super().__init__(cells)
        self.table, self.twice = table, twice

    def __missing__(self, column: str) -> str:
        self._check(column)
        raise KeyError(column)

    def __contains__(self, column: object) -> bool:
        self._check(column)
        return super().__contains__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """As of a dictionary.

        Raises:
            BundleError: for a column that the table has several times.
        """
        self._check(column)
        return super().get(column, default)

    def updated(self, cells: Mapping[str, str]) -> TableRow:
        """The row with other cells."""
        return TableRow({**self, **cells}, self.table, self.twice - set(cells))

    def _check(self, column: object) -> None:
        if column in self.twice:
            raise BundleError(f"the table {self.table} has the column '{column}' twice, with other values: keep one")


def read_table(path: str | os.PathLike, required: Iterable[str] = ()) -> list[TableRow]:
    """The rows of a `.tsv` or `.csv` table as dictionaries from column name to text.

    Tabs separate the columns, or commas where the name ends in `.csv`; where the header has none of these, semicolons
    or what it has of the three. UTF-8 and UTF-16 are read, and Windows-1252 with a warning. Cells may be quoted
    throughout, as R writes them. A column that is there twice with the same values counts once.

    Args:
        path: the table.
        required: columns that must be there.

    Raises:
        BundleError: if the table is missing, unreadable, empty or ragged, or lacks a required column or has it twice.
    """
    path = Path(str(path))
    lines = _lines(path, read_text(path, "table"))
    if len(lines) < 2:
        raise BundleError(f"the table {path} has no rows: it needs a header line and at least one row")
    header = [cell.strip() for cell in lines[0]]
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise BundleError(f"row {number} of {path} has {len(line)} cells where the header has {len(header)}")
    columns = [[cell.strip() for cell in column] for column in zip(*lines[1:], strict=True)]
    values: dict[str, list[str]] = {}
    twice: set[str] = set()
    for name, column in zip(header, columns, strict=True):
        if values.setdefault(name, column) != column:
            twice.add(name)
    kept = {name: column for name, column in values.items() if name not in twice}
    cells = [dict(zip(kept, line, strict=True)) for line in zip(*kept.values(), strict=True)] or [{}] * len(lines[1:])
    rows = [TableRow(row, path, frozenset(twice)) for row in cells]
    for name in required:
        if name not in rows[0]:
            raise BundleError(
                f"the table {path} has no column '{name}': its columns are {', '.join(map(shown, header))}"
            )
    return rows


def read_text(path: str | os.PathLike, what: str = "list") -> str:
    """The text of a table or list.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        BundleError: if there is no such file, its content is not here, it is a pipe or a device, or no text.
    """
    path = Path(str(path))
    try:
        check_content(path)
        content = path.read_bytes()
    except (OSError, BundleError) as error:
        raise BundleError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    encoding = "utf-16" if content.startswith(_UTF16) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        logger.warning(f"{path} is not UTF-8: read as Windows-1252; look at names with accents")
    if "\0" in text:
        raise BundleError(f"cannot read the {what} {path}: it is no text")
    return text


def _lines(path: Path, text: str) -> list[list[str]]:
    """The cells of each line that has any."""
    first = text.split("\n", 1)[0]
    usual = "," if path.suffix.lower() == ".csv" else "\t"
    delimiter = next((mark for mark in (usual, ";", "\t", ",") if mark in first), usual)
    ways: list[dict[str, Any]] = [{"delimiter": delimiter, "strict": True}]
    if delimiter == "\t":
        quoted = first.startswith('"') and first.rstrip().endswith('"')
        ways = [*ways, _TABS] if quoted else [_TABS, *ways]
    failed: Exception | None = None
    found: list[list[str]] | None = None
    for way in ways:
        try:
            lines = [line for line in csv.reader(StringIO(text, newline=""), **way) if any(map(str.strip, line))]
        except csv.Error as error:
            failed = failed or error
            continue
        if len({len(line) for line in lines}) <= 1:
            return lines
        found = found or lines
    if found is None:
        raise BundleError(f"cannot read the table {path}: {failed}") from failed
    return found


def write_table(path: str | os.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as a tab-separated table with the columns of all rows, `n/a` where a row lacks one.

    Tabs and line ends within a cell become blanks: the format has no way to keep them.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval=MISSING, lineterminator="\n", **_TABS)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: object) -> str:
    return re.sub(r"[\t\r\n]+", " ", str(value)) if value not in (None, "") else MISSING
