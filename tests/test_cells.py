# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the cells of tables mean, the same everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest

from scripts.conditions.conditions import Conditions
from scripts.conditions.ranges import learned_ranges
from scripts.core.cells import SEX_WORDS, is_missing, printable, read_number, shown
from scripts.measuring.brain_age import age_condition, age_of
from scripts.phantoms.population import as_raw

CONDITIONS = Conditions(
    gender={"raw": "sex", "unit": "", "minimum": 0, "maximum": 1, "codes": {"female": 0, "male": 1}},
    age={"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82},
)
MISSING = ["NA", "N/A", "n/a", "nan", "NaN", "None", "null", "", "  ", "#N/A", "-", "unknown", None, math.nan]


@pytest.mark.parametrize("cell", MISSING)
def test_what_is_missing_is_missing_for_every_reader(cell: Any) -> None:
    row = {"sex": cell, "age_years": cell, "intracranial_mm3": cell}
    assert is_missing(cell) and read_number(cell) == (None, "")
    assert CONDITIONS.from_row(row, "row 1", "default").tolist() == [0.5, 0.5]
    assert CONDITIONS.from_row(row, "row 1", "random").isnan().all()
    assert age_of(row, age_condition(CONDITIONS), "") is None and as_raw(CONDITIONS, row) == {}
    assert learned_ranges([row, {"age_years": "50"}, {"age_years": "60,5"}], CONDITIONS) == {
        "conditions::age::minimum": 50.0,
        "conditions::age::maximum": 60.5,
    }


@pytest.mark.parametrize(
    ("cell", "value", "remark"),
    [
        ("65,5", 65.5, ""),
        (" 65.5 ", 65.5, ""),
        ("1,234,567.5", 1234567.5, ""),
        ("65 years", 65.0, ""),
        ("065Y", 65.0, ""),
        ("89+", 89.0, "bound"),
        (">= 89", 89.0, "bound"),
        ("18-38", None, "--words"),
        ("[18, 38]", None, "--words"),
        ("18 to 38", None, "--words"),
        ("1,234", None, "thousands"),
        ("old", None, "not a number"),
        ("1_000", None, "not a number"),
        ("inf", None, "not finite"),
    ],
)
def test_numbers_as_people_write_them(cell: str, value: float | None, remark: str) -> None:
    found = read_number(cell)
    assert found.value == value and remark in found.remark and bool(found.remark) == bool(remark)


@pytest.mark.parametrize(("cell", "code"), [("F ", 0), ("W", 0), ("weiblich", 0), ("M", 1), ("Homme", 1), ("1", 1)])
def test_words_for_sex(cell: str, code: int) -> None:
    assert CONDITIONS.from_row({"sex": cell, "age_years": "60"}, "row 1")[0] == code


def test_no_word_stands_for_both_sexes() -> None:
    assert not set(SEX_WORDS["female"]) & set(SEX_WORDS["male"])


def test_bounds_and_ranges_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert CONDITIONS.from_row({"sex": "f", "age_years": "82+"}, "row 1").tolist() == [0.0, 1.0]
    assert CONDITIONS.from_row({"sex": "f", "age_years": "18-38"}, "row 2", "default")[1] == 0.5
    bound, span = (record.getMessage() for record in caplog.records)
    assert "'82+'" in bound and "row 1" in bound and "'18-38'" in span and "--words" in span


def test_cells_in_messages_are_short_and_steer_no_terminal() -> None:
    assert printable("a\x1b[2Jb\u202e") == "a\\x1b[2Jb\\u202e"
    assert len(shown("x" * 10**6)) <= 60
