# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the cells of tables mean: what is missing, what is a number, and which words there are for sex."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MISSING = "n/a"
"""How this package writes what is missing."""
MISSING_WORDS = frozenset(
    ["", "n/a", "na", "n.a.", "n.a", "nan", "none", "null", "nil", "nd", "missing", "unknown", "undefined"]
    + ["not available", "not applicable", "#n/a", "#na", "<na>", "#value!", "#null!", "-", "--", "---", ".", "?", "nat"]
)
"""What stands for no value, in small letters."""
SEX_WORDS: Mapping[str, tuple[str, ...]] = {
    "female": ("female", "f", "fem", "woman", "w", "weiblich", "frau", "femme", "féminin", "feminin", "femenino")
    + ("femenina", "mujer", "femminile", "donna", "vrouw", "kvinna", "girl"),
    "male": ("male", "m", "man", "mann", "männlich", "maennlich", "homme", "masculin", "masculino", "hombre")
    + ("maschile", "uomo", "mannelijk", "boy"),
}
"""Words for the two sexes, in small letters. `w` is the German and Dutch initial."""

_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?")
_BOUND = re.compile(r"(?:[<>≥≤]\s*=?\s*)?(\d+(?:[.,]\d+)?)\s*\+?")
_RANGE = re.compile(r"[\[(]?\s*(\d+(?:[.,]\d+)?)\s*(?:-|–|—|to|bis|\.\.|,\s)\s*(\d+(?:[.,]\d+)?)\s*[\])]?")
_YEARS = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:y|yr|yrs|yo|y\.o\.|years?|years? old)\.?", re.IGNORECASE)
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]")
SHOWN = 60


class Number(NamedTuple):
    """What a cell says of a number.

    Attributes:
        value: the number; None where there is none.
        remark: what to warn of; empty if it is a plain number, or missing.
    """

    value: float | None
    remark: str = ""

    @property
    def unreadable(self) -> bool:
        """Whether there is something that is neither a number nor one of the words for nothing."""
        return self.value is None and bool(self.remark)


def is_missing(value: Any) -> bool:
    """Whether a cell, or a value of a sidecar, says nothing."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING_WORDS)


def present(row: Mapping[str, Any], column: str) -> str:
    """The text of a cell; empty where the column or its value is missing."""
    value = row.get(column)
    return "" if is_missing(value) else str(value).strip()


def read_number(cell: Any) -> Number:
    """The number of a cell.

    `65,5` is 65.5, `1,234,567` is 1234567, `65 y` is 65; a bound such as `89+` is its number, with a remark. A range
    such as `18-38` is missing, with a remark, and so is what could be read in two ways, such as `1,234`.

    Args:
        cell: of a table, or a value of a sidecar.
    """
    if is_missing(cell):
        return Number(None)
    text = str(cell).strip()
    plain = _float(text)
    if plain is not None:
        return Number(plain) if math.isfinite(plain) else Number(None, "is not finite")
    if _THOUSANDS.fullmatch(text):
        if text.count(",") == 1 and "." not in text:
            return Number(None, "could be thousands or a decimal comma: write it with a point, or without")
        return Number(float(text.replace(",", "")))
    if _DECIMAL_COMMA.fullmatch(text):
        return Number(float(text.replace(",", ".")))
    if found := _YEARS.fullmatch(text):
        return Number(float(found[1].replace(",", ".")))
    if found := _BOUND.fullmatch(text):
        return Number(float(found[1].replace(",", ".")), "is a bound: its number is taken")
    if _RANGE.fullmatch(text):
        return Number(None, "is a range: missing, unless --words says what it stands for")
    return Number(None, "is not a number")


def _float(text: str) -> float | None:
    if "_" in text:  # which Python takes between digits
        return None
    try:
        return float(text)
    except ValueError:
        return None


def shown(value: Any) -> str:
    """A cell for messages: without what would steer a terminal, and no longer than 60 characters."""
    text = printable(str(value))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def printable(text: str) -> str:
    """Text whose control characters, but line ends and tabs, are written out, as `\\x1b`."""
    return _UNSHOWN.sub(lambda found: found[0] if found[0] in "\n\t\r" else ascii(found[0])[1:-1], text)
