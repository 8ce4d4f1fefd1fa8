# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Tab-separated tables, as in BIDS: a header line, then one row a line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError
from scripts.core.files import replacing

MISSING = "n/a"
_COMMAS: dict[str, Any] = {"delimiter": ",", "strict": True}
_TABS: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}  # a quote is a character


def read_table(path: str | os.PathLike, required: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a `.tsv` or `.csv` table as dictionaries from column name to text.

    Args:
        path: the table; tabs separate the columns, or commas where the name ends in `.csv`.
        required: columns that must be there.

    Raises:
        BundleError: if the table is missing, unreadable, empty or ragged, or lacks a required column.
    """
    path = Path(str(path))
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, **(_COMMAS if path.suffix.lower() == ".csv" else _TABS)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BundleError(f"cannot read the table {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if len(lines) < 2:
        raise BundleError(f"the table {path} has no rows: it needs a header line and at least one row")
    header = [cell.strip() for cell in lines[0]]
    _check_columns(path, header, required)
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise BundleError(f"row {number} of {path} has {len(line)} cells where the header has {len(header)}")
    return [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]


def _check_columns(path: Path, header: Sequence[str], required: Iterable[str]) -> None:
    for name in header:
        if header.count(name) > 1:
            raise BundleError(f"the table {path} has the column '{name}' twice")
    for name in required:
        if name not in header:
            raise BundleError(f"the table {path} has no column '{name}': its columns are {', '.join(header)}")


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
