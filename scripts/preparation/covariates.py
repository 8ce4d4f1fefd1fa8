# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the tables say of the people, in the words and units of the conditions."""

from __future__ import annotations

import difflib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.conditions.conditions import Condition, Conditions
from scripts.conditions.plausible import why_impossible
from scripts.core.cells import MISSING, present, read_number, shown
from scripts.core.errors import BundleError
from scripts.preparation.sources import Source

logger = logging.getLogger(__name__)

MOST_SHOWN = 5
Columns = Mapping[str, str | Sequence[str]]


class CovariateReader:
    """Reads the conditions of a scan from the row of its table.

    Args:
        conditions: which, with their units and codes.
        columns: raw name of a condition -> the column that holds it, which must then be there, or several, of which
            the first with a value is read; its raw name, if it is not mentioned.
        words: raw name -> the table's word -> the raw value or its word, such as `{"sex": {"2": "female"}}`.
        plausible: raw name -> lowest and highest value that a person can have; others are missing.
        sources: the scans; those of a table share its columns.

    Raises:
        BundleError: if a name is of no condition, or a column is not there.

    Attributes:
        used: columns of the input that the conditions are read from, or are called by.
    """

    def __init__(
        self,
        conditions: Conditions,
        columns: Columns,
        words: Mapping[str, Mapping[Any, Any]] | None,
        plausible: Mapping[str, Sequence[float]] | None,
        sources: Sequence[Source],
    ) -> None:
        self.conditions = conditions
        self.words = {name: {str(k): str(v) for k, v in m.items()} for name, m in (words or {}).items()}
        self.plausible = dict(plausible or {})
        for flag, given in (("columns", columns), ("words", self.words), ("plausible", self.plausible)):
            _check_names(flag, given, [c.raw for c in conditions])
        header = list(dict.fromkeys(name for source in sources for name in source.row))
        header += sorted({name for source in sources for name in getattr(source.row, "twice", ())} - set(header))
        self.columns = {c.raw: _present(c.raw, columns.get(c.raw, [c.raw]), header) for c in conditions}
        self.used = {*conditions.flags(), *(name for names in self.columns.values() for name in names)}
        self.doubts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._unclear = {c.raw: self._unclear_numbers(c, sources) for c in conditions}

    def of(self, source: Source) -> dict[str, str]:
        """Raw name -> value of each condition, in raw units or the words of its codes; `n/a` where it is not known.

        What cannot be read, or no person can have, is not known: see `warn`.

        Raises:
            BundleError: if the table has a column that is asked for twice, with other values.
        """
        return {c.raw: self._of(c, source) for c in self.conditions}

    def warn(self) -> None:
        """Say, once for all scans, which values were not taken as they stand."""
        for (raw, remark), cells in self.doubts.items():
            first = ", ".join(f"'{shown(cell)}'" for cell in list(cells)[:MOST_SHOWN])
            more = f" and {len(cells) - MOST_SHOWN} other words" if len(cells) > MOST_SHOWN else ""
            logger.warning(f"{raw} of {sum(cells.values())} scans ({first}{more}) {remark}")

    def _of(self, condition: Condition, source: Source) -> str:
        given = ((column, present(source.row, column)) for column in self.columns[condition.raw])
        cell = next((value for _, value in given if value), "")
        return self._read(condition, self.words.get(condition.raw, {}).get(cell, cell)) if cell else MISSING

    def _read(self, condition: Condition, cell: str) -> str:
        value, remark = condition.from_cell(condition.raw, cell)
        if value is None:
            return self._doubt(condition, cell, remark) if remark else MISSING
        if value in self._unclear[condition.raw]:
            return self._doubt(condition, cell, "is missing: --words has to say what such numbers stand for")
        try:
            raw = condition.denormalise(condition.parse(condition.raw, value))
        except BundleError:
            return self._doubt(condition, cell, f"is missing: {_expected(condition, cell)}")
        words = {code: word for word, code in condition.codes.items()}
        if words and raw not in words:
            return self._doubt(condition, cell, f"is missing: {_expected(condition, cell)}")
        if why := why_impossible(condition.raw, raw, self.plausible):
            return self._doubt(condition, cell, f"is missing: {why} {condition.unit}".rstrip())
        if remark:
            self._doubt(condition, cell, remark)
        return words.get(raw, f"{raw:.10g}")

    def _doubt(self, condition: Condition, cell: str, remark: str) -> str:
        self.doubts[condition.raw, remark][cell] += 1
        return MISSING

    def _unclear_numbers(self, condition: Condition, sources: Sequence[Source]) -> set[Any]:
        """Numbers of a coded column that are of no code, and those beside them: 1 and 2 are not 0 and 1."""
        if not condition.codes:
            return set()
        words = self.words.get(condition.raw, {})
        cells = {present(source.row, column) for source in sources for column in self.columns[condition.raw]}
        numbers = {read_number(cell).value for cell in cells if cell not in words} - {None}
        return numbers if numbers - {float(code) for code in condition.codes.values()} else set()


def _check_names(flag: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given if known else ():  # a model without conditions has no use for any column
        if name not in known:
            raise BundleError(f"{flag} names '{name}', but the conditions are {', '.join(known)}")


def _present(raw: str, wanted: str | Sequence[str], header: Sequence[str]) -> list[str]:
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    present = [name for name in names if name in header]
    if present:
        return present
    near = difflib.get_close_matches(names[0], header, 1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    message = f"the input has no column {' or '.join(names)}{hint}"
    if isinstance(wanted, str):
        raise BundleError(f"{message}, which is to be {raw}: its columns are {', '.join(header)}")
    logger.warning(f"{message}: {raw} is not known from it")
    return []


def _expected(condition: Condition, cell: str) -> str:
    if not condition.codes:
        return "it is not a number"
    near = difflib.get_close_matches(cell.lower(), condition.codes, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    spelt = ", ".join(f"{word} or {code:g}" for word, code in condition.codes.items())
    return f"it must be {spelt}, or an initial{hint}; --words says what others stand for"
