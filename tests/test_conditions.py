# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Conditions: both units, what a request may say, and what it may not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from released import configuration

from scripts.conditions.conditions import Conditions
from scripts.core.cells import shown
from scripts.core.errors import BundleError

AGE: dict[str, Any] = {"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82}


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    """Those of the base."""
    return configuration([]).get_parsed_content("conditions")


def refused(conditions: Conditions, **request: Any) -> str:
    with pytest.raises(BundleError) as caught:
        conditions.from_request(request)
    return str(caught.value)


def test_conditions_of_the_base_are_the_released_models(conditions: Conditions) -> None:
    assert [c.name for c in conditions] == ["gender", "age", "ventricular_vol", "brain_vol"]
    assert [c.raw for c in conditions] == ["sex", "age_years", "ventricular_vol_mm3", "brain_vol_mm3"]
    assert [c.minimum for c in conditions] == [0, 44, 6995.68, 1144240]
    assert [c.maximum for c in conditions] == [1, 82, 171375, 1793910]


def test_the_two_units_of_one_request_agree(conditions: Conditions) -> None:
    raw = {"sex": "male", "age_years": 63, "ventricular_vol_mm3": 171375, "brain_vol_mm3": 1144240}
    normalised = {"gender": 1, "age": 0.5, "ventricular_vol": 1, "brain_vol": 0}
    assert torch.allclose(conditions.from_request(raw), conditions.from_request(normalised))


def test_integers_alone_make_float32(conditions: Conditions) -> None:
    vector = conditions.from_request({"gender": 1, "age": 0, "ventricular_vol": 0, "brain_vol": 1})
    assert vector.dtype == torch.float32 and vector.tolist() == [1, 0, 0, 1]


def test_what_is_not_given_is_the_default(conditions: Conditions) -> None:
    assert conditions.from_request({}).tolist() == [0.5] * 4
    assert conditions.from_request({"age": None, "sex": "n/a", "age_years": " ", "other": "x"}).tolist() == [0.5] * 4
    assert Conditions(age={**AGE, "default": 0.25}).from_request({}).tolist() == [0.25]


@pytest.mark.parametrize("word", ["male", "Male", " MALE ", "m", "M", 1, "1", 1.0])
def test_words_for_codes(word: object, conditions: Conditions) -> None:
    assert conditions.from_request({"sex": word})[0] == 1
    assert conditions.from_request({"sex": "f"})[0] == 0


def test_codes_in_capitals_and_ambiguous_initials() -> None:
    codes = {"Prisma": 0, "Premier": 1, "Skyra": 2}
    scanner = Conditions(scanner={"raw": "model", "unit": "", "minimum": 0, "maximum": 2, "codes": codes})
    assert scanner.from_request({"model": "premier"}).tolist() == [0.5]
    assert scanner.from_request({"model": "s"}).tolist() == [1.0]
    assert "must be one of Prisma, Premier, Skyra, got 'p'" in refused(scanner, model="p")


@pytest.mark.parametrize("number", [0.25, "0.25", " 2.5e-1", np.float32(0.25), np.float64(0.25)])
def test_numbers_as_programs_and_tables_have_them(number: object, conditions: Conditions) -> None:
    assert conditions.from_request({"age": number})[1] == 0.25


@pytest.mark.parametrize(
    "value", ["old", "nan", math.nan, "inf", "-Infinity", math.inf, True, [1], {}, 10**400, 1e300, "0,5", "63 years"]
)
@pytest.mark.parametrize("flag", ["age", "age_years"])
def test_what_is_no_finite_number_is_refused(flag: str, value: object, conditions: Conditions) -> None:
    assert f"--{flag} must be a finite number, got '{shown(value)}'" in refused(conditions, **{flag: value})


@pytest.mark.parametrize("value", ["femal", "x", "nan", "sex", "fm"])
def test_unknown_word_names_those_there_are(value: str, conditions: Conditions) -> None:
    assert f"--sex must be one of female, male, got '{value}'" in refused(conditions, sex=value)


def test_normalised_form_of_a_coded_condition_takes_numbers_alone(conditions: Conditions) -> None:
    assert "--gender must be a finite number" in refused(conditions, gender="female")


def test_both_forms_of_one_condition_are_refused(conditions: Conditions) -> None:
    assert "--age and --age_years state the same condition" in refused(conditions, age=0.5, age_years=63)


EXTRAPOLATED = [("age", 1.5, 1.5), ("age_years", 101, 1.5), ("age_years", 25, -0.5)]


@pytest.mark.parametrize(("flag", "given", "value"), EXTRAPOLATED)
def test_extrapolation_warns_with_the_training_range(
    flag: str, given: float, value: float, conditions: Conditions, caplog: pytest.LogCaptureFixture
) -> None:
    assert conditions.from_request({flag: given})[1] == value
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"--{flag} {given}" in record.message
    assert "44 to 82 years" in record.message


def test_ends_of_the_range_do_not_warn(conditions: Conditions, caplog: pytest.LogCaptureFixture) -> None:
    conditions.from_request({"age_years": 82, "ventricular_vol_mm3": "6995.68", "brain_vol_mm3": 1793910, "gender": 0})
    assert caplog.records == []


def test_training_row_without_a_value(conditions: Conditions) -> None:
    row = {"sex": "male", "age_years": "n/a", "ventricular_vol": "0.2", "brain_vol_mm3": "1500000"}
    with pytest.raises(BundleError, match="participant 7 has no value of 'age_years'") as caught:
        conditions.from_row(row, "participant 7")
    assert "--missing_conditions default takes 63 years" in str(caught.value)
    assert conditions.from_row(row, "participant 7", missing="default")[1] == 0.5
    unknown = conditions.from_row(row, "participant 7", missing="random")
    assert unknown.isnan().tolist() == [False, True, False, False]
    with pytest.raises(BundleError, match="error, default or random, got 'skip'"):
        conditions.from_row(row, "participant 7", missing="skip")


def test_malformed_value_in_a_row_names_the_row(conditions: Conditions) -> None:
    with pytest.raises(BundleError, match="--age_years of participant 7 must be a finite number, got 'old'"):
        conditions.from_row({"age_years": "old"}, "participant 7", missing="default")


@pytest.mark.parametrize(("column", "near"), [("age_year", "age_years"), ("ages", "age")])
def test_table_without_a_column_names_the_near_one(column: str, near: str, conditions: Conditions) -> None:
    header = ["sex", column, "ventricular_vol", "brain_vol"]
    with pytest.raises(BundleError, match=f"no column 'age_years' or 'age'.*did you mean its column '{column}'"):
        conditions.columns_in(header, "x.tsv")
    conditions.columns_in([near if name == column else name for name in header], "x.tsv")


def test_sidecar_states_both_units(conditions: Conditions) -> None:
    stated = conditions.in_both_units(torch.tensor([1.0, 0.7, 0.0, 1.5]))
    assert stated["gender"] == 1 and stated["sex"] == "male"
    assert stated["age"] == 0.7 and stated["age_years"] == pytest.approx(70.6, rel=1e-6)
    assert stated["ventricular_vol_mm3"] == pytest.approx(6995.68, rel=1e-6)
    assert stated["brain_vol_mm3"] == pytest.approx(2118745, rel=1e-6)


def test_one_more_entry_is_one_more_condition_everywhere() -> None:
    thickness = {"raw": "thickness_mm", "unit": "mm", "minimum": 2.0, "maximum": 3.0}
    config = configuration((TINY,), **{"conditions::thickness": thickness})
    assert config.get_parsed_content("conditions").from_request({"thickness_mm": 2.25}).tolist()[-1] == 0.25
    network = config.get_parsed_content("network_def")
    assert network.conv_in.conv.in_channels == 3 + 5
    assert network.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.in_features == 5


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"age": {"raw": "age_years"}}, "'age' is not well described"),
        ({"age": {**AGE, "max": 3}}, "'age' is not well described"),
        ({"age": {**AGE, "maximum": 44}}, "'age' has an empty range"),
        ({"age": AGE, "age_at_scan": AGE}, "'age_years' belongs to two conditions"),
        ({"age": {**AGE, "raw": "age"}}, "'age' belongs to two conditions"),
    ],
)
def test_impossible_maps_are_refused(entries: dict[str, Any], told: str) -> None:
    with pytest.raises(BundleError, match=told):
        Conditions(**entries)


def test_no_conditions_at_all() -> None:
    assert Conditions().from_request({}).shape == (0,)
