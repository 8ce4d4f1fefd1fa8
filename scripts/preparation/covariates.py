# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the tables say of the people, in the words and units of the conditions."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.conditions.conditions import Condition, Conditions
from scripts.conditions.plausible import why_impossible
from scripts.core.errors import BundleError
from scripts.core.tables import MISSING
from scripts.preparation.sources import Source
from scripts.volumes.scans import ScanError

logger = logging.getLogger(__name__)

Columns = Mapping[str, str | Sequence[str]]


class CovariateReader:
    """Reads the conditions of a scan from the row of its table.

    Args:
        conditions: which, with their units and codes.
        columns: raw name of a condition -> the column that holds it, which must then be there, or several, of which
            the first with a value is read; its raw name, if it is not mentioned.
        words: raw name -> the table's word -> the raw value or its word, such as `{"sex": {"2": "female"}}`.
        plausible: raw name -> lowest and highest value that a person can have.
        sources: the scans; those of a table share its columns.

    Raises:
        BundleError: if a name is of no condition, or a column is not there.
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
        self.columns = {c.raw: _present(c.raw, columns.get(c.raw, [c.raw]), header) for c in conditions}

    def of(self, source: Source) -> dict[str, str]:
        """Raw name -> value of each condition, in raw units or the words of its codes; `n/a` where it is not known.

        Raises:
            ScanError: if a value cannot be read, or no person can have it.
        """
        return {c.raw: self._of(c, source) for c in self.conditions}

    def _of(self, condition: Condition, source: Source) -> str:
        given = {column: source.row.get(column, MISSING).strip() for column in self.columns[condition.raw]}
        column, value = next(((k, v) for k, v in given.items() if v not in ("", MISSING)), ("", MISSING))
        if value == MISSING:
            return MISSING
        return self._parsed(condition, self.words.get(condition.raw, {}).get(value, value), column, source.name)

    def _parsed(self, condition: Condition, value: str, column: str, name: str) -> str:
        where = f"{column} of {name}"
        try:
            raw = condition.denormalise(condition.parse(condition.raw, value))
        except BundleError as error:
            raise ScanError(f"unreadable {condition.raw}", f"{where} is '{value}'{_hint(condition, value)}") from error
        words = {code: word for word, code in condition.codes.items()}
        if words and raw not in words:
            raise ScanError(f"unreadable {condition.raw}", f"{where} is '{value}'{_hint(condition, value)}")
        why = why_impossible(condition.raw, raw, self.plausible)
        if why:
            raise ScanError(f"impossible {condition.raw}", f"{where} is {raw:g} {condition.unit}: {why}")
        return words.get(raw, f"{raw:.10g}")


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


def _hint(condition: Condition, value: str) -> str:
    if not condition.codes:
        return ", not a number"
    near = difflib.get_close_matches(value.lower(), condition.codes, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    spelt = ", ".join(f"{word} or {code:g}" for word, code in condition.codes.items())
    return f"{hint}: it must be {spelt}, or an initial"
