# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Laws of a collection's conditions: what they give, and what cannot be one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASE, RunHere
from scipy.stats import kstest, spearmanr, truncnorm

from scripts.collection.copula import FileLaw
from scripts.collection.drawing import Drawing, row_seeds, seed_of_try
from scripts.collection.folder import Collection
from scripts.collection.laws import NEAREST, ConditionLaw, PeopleLaw, UniformLaw
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.tables import read_table, write_table

DRAW = [BASE, "configs/collection_draw.yaml"]
LAW = """
sex: {female: 0.53, male: 0.47}
age_years: {mean: 64, sd: 8, range: [50, 80]}
ventricular_vol_mm3: {median: 34600, log_sd: 0.34}
brain_vol_mm3: {mean: 1469000, sd: 66000}
correlations:
  age_years: {ventricular_vol_mm3: 0.6, brain_vol_mm3: -0.5}
"""


def drawing(law: ConditionLaw, conditions: Conditions, num_rows: int = 4000, **more: Any) -> Drawing:
    return Drawing(Collection("nowhere"), conditions, law, num_rows=num_rows, **more)


def write_people(path: Path, count: int = 200, **changed: Any) -> Path:
    """People whose ventricles grow with age, larger in men."""
    random = np.random.default_rng(1)
    age, male = random.normal(60, 8, count), random.random(count) < 0.4
    ventricles = 30000 + 900 * (age - 60) + 5000 * male + random.normal(0, 4000, count)
    rows = [
        {"participant_id": f"p{i}", "sex": "male" if male[i] else "female", "age_years": round(age[i], 1)}
        | {
            "ventricular_vol_mm3": round(ventricles[i]),
            "brain_vol_mm3": round(1.45e6 + 1e4 * random.normal()),
            **changed,
        }
        for i in range(count)
    ]
    write_table(path, rows)
    return path


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return write_people(tmp_path / "people.tsv")


@pytest.fixture
def law_file(tmp_path: Path) -> Path:
    path = tmp_path / "law.yaml"
    path.write_text(LAW)
    return path


def test_uniform_law_fills_the_training_ranges(conditions: Conditions) -> None:
    values = drawing(UniformLaw(conditions), conditions).values()
    assert 0.45 < values[:, 0].mean() < 0.55 and set(values[:, 0]) == {0.0, 1.0}
    for condition, column in list(zip(conditions, values.T))[1:]:
        assert kstest(column, "uniform", (condition.minimum, condition.maximum - condition.minimum)).pvalue > 1e-3
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.06


def test_a_longer_table_begins_with_the_shorter_one(conditions: Conditions, people: Path, law_file: Path) -> None:
    strata = {"age_years": [50, 60, 70]}
    for law in (UniformLaw(conditions), PeopleLaw(conditions, people), FileLaw(conditions, law_file)):
        short, long = (drawing(law, conditions, n, strata=strata, seed=3).values() for n in (7, 50))
        assert np.array_equal(short, long[:7])
    assert row_seeds(3, 7) == row_seeds(3, 50)[:7]


def test_law_of_people_keeps_their_joint_law_and_copies_nobody(conditions: Conditions, people: Path) -> None:
    law = PeopleLaw(conditions, people, 0.3)
    values = drawing(law, conditions).values()
    assert values.mean(axis=0) == pytest.approx(law.people.mean(axis=0), rel=0.05)
    assert values.std(axis=0) == pytest.approx(law.people.std(axis=0), rel=0.08)
    assert np.corrcoef(values.T) == pytest.approx(np.corrcoef(law.people.T), abs=0.08)
    assert law.distances(values).min() > NEAREST
    assert (law.distances(law.people) == 0).all() and not law.admits(law.people).any()


def test_law_of_a_file_has_its_margins_and_correlations(conditions: Conditions, law_file: Path) -> None:
    values = drawing(FileLaw(conditions, law_file), conditions).values()
    assert kstest(values[:, 1], truncnorm(-14 / 8, 2, 64, 8).cdf).pvalue > 1e-3
    assert np.median(values[:, 2]) == pytest.approx(34600, rel=0.02)
    assert np.log(values[:, 2]).std() == pytest.approx(0.34, rel=0.05)
    assert values[:, 0].mean() == pytest.approx(0.47, abs=0.03)
    assert spearmanr(values[:, 1], values[:, 2])[0] == pytest.approx(6 / np.pi * np.arcsin(0.3), abs=0.03)
    assert spearmanr(values[:, 2], values[:, 3])[0] == pytest.approx(0.0, abs=0.05)


NO_LAWS = [
    ({"range: [50, 80]": "range: [80, 50]"}, "age_years in .*upside down"),
    ({"range: [50, 80]": "range: [500, 800]"}, "age_years in .*nothing within the range"),
    ({"sd: 8": "sd: 0"}, "age_years in .*: sd must be at least"),
    ({"mean: 64": "mean: old"}, "age_years in .*: mean must be a finite number"),
    ({"-0.5}": "-0.9}\n  brain_vol_mm3: {ventricular_vol_mm3: 0.9}"}, "correlations of .*eigenvalue"),
    ({"-0.5}": "-1.5}"}, "age_years with brain_vol_mm3 must be at least -1"),
    ({"-0.5}": "-0.5}\n  brain_vol_mm3: {age_years: 0.5}"}, "stated twice"),
    ({"-0.5}": "-0.5}\n  height: {age_years: 0.5}"}, "'height' must be one of"),
    ({"sex: {female: 0.53, male: 0.47}": ""}, "has no law of sex"),
    ({"female: 0.53, ": ""}, "sex in .*share of each of female, male"),
    ({"\nsex": "\nheight: {mean: 1, sd: 1}\nsex"}, "states height, but the conditions are"),
    ({LAW: "- 1"}, "must be a map"),
    ({LAW: "{"}, "is no YAML"),
]


@pytest.mark.parametrize(("changes", "says"), NO_LAWS)
def test_what_is_no_law(changes: dict[str, str], says: str, conditions: Conditions, law_file: Path) -> None:
    text = LAW
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    law_file.write_text(text)
    with pytest.raises(BundleError, match=says):
        FileLaw(conditions, law_file)


def test_what_are_no_people(conditions: Conditions, tmp_path: Path) -> None:
    table = tmp_path / "people.tsv"
    with pytest.raises(BundleError, match="--people_table"):
        PeopleLaw(conditions, None)
    write_table(table, [{"sex": "male", "age_years": 50, "ventricular_vol_mm3": 30000}])
    with pytest.raises(BundleError, match="no column 'brain_vol_mm3'"):
        PeopleLaw(conditions, table)
    write_people(table, 9, brain_vol_mm3="n/a")
    with pytest.raises(BundleError, match="nobody in .* has a value of every condition"):
        PeopleLaw(conditions, table)
    write_people(table, 9, age_years=50, ventricular_vol_mm3=30000, brain_vol_mm3=1.4e6)
    with pytest.raises(BundleError, match="would be copies"):
        PeopleLaw(conditions, table)


def test_strata_are_as_frequent_as_asked(conditions: Conditions, law_file: Path) -> None:
    strata = {
        "age_years": [50, 60, 70, 80],
        "ventricular_vol_mm3": {"edges": [0, 40000, 200000], "weights": [1, 3]},
        "sex": {"female": 1, "male": 0},
    }
    values = drawing(FileLaw(conditions, law_file), conditions, 3000, strata=strata).values()
    ages = np.histogram(values[:, 1], [50, 60, 70, 80])[0]
    assert ages / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert (values[:, 2] > 40000).mean() == pytest.approx(0.75, abs=0.04)
    assert (values[:, 0] == 0).all()


NO_STRATA = [
    ({"height": [1, 2]}, "'height' is none of sex, age_years"),
    ({"age_years": [2, 1]}, "do not rise"),
    ({"age_years": [1]}, "must be edges"),
    ({"age_years": {"edges": [1, 2], "weights": [1, 2]}}, "2 edges make 1 parts"),
    ({"age_years": {"edges": [1, 2], "weights": [0]}}, "all weights are 0"),
    ({"sex": [0, 1]}, "a weight of each of female, male"),
    (["age_years"], "must be a map"),
]


@pytest.mark.parametrize(("strata", "says"), NO_STRATA)
def test_what_are_no_strata(strata: Any, says: str, conditions: Conditions) -> None:
    with pytest.raises(BundleError, match=says):
        drawing(UniformLaw(conditions), conditions, strata=strata)


def test_a_stratum_that_the_law_never_gives_is_named(conditions: Conditions) -> None:
    with pytest.raises(BundleError, match="age_years from 90 to 100"):
        drawing(UniformLaw(conditions), conditions, 10, strata={"age_years": [90, 100]}).values()


def test_seeds_are_all_different_and_follow_from_one() -> None:
    seeds = row_seeds(0, 100_000)
    tries = {seed_of_try(seed, tried) for seed in seeds[:100] for tried in range(10)}
    assert len(set(seeds)) == 100_000 and len(tries) == 1000 and max(seeds) < 2**53
    assert seed_of_try(seeds[5], 0) == seeds[5] != row_seeds(1, 6)[5]


def test_a_model_without_conditions_has_a_table_of_seeds(run_here: RunHere, tmp_path: Path) -> None:
    run_here([*DRAW, "configs/unconditional.yaml"], collection_dir=str(tmp_path / "set"), num_rows=3)
    assert [list(row) for row in read_table(tmp_path / "set" / "rows.tsv")] == [["participant_id", "seed"]] * 3


def test_the_verb_writes_the_same_table_and_refuses_another(
    run_here: RunHere, tmp_path: Path, people: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"law": "people", "people_table": str(write_people(people, 30)), "num_rows": 40, "rows_per_shard": 16}
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two", "one"):
            run_here(DRAW, collection_dir=str(tmp_path / name), **flags)
    assert "brain_vol_mm3" not in caplog.text and "rows are outside the training range of age_years" in caplog.text
    one, two = ((tmp_path / name / "rows.tsv").read_bytes() for name in ("one", "two"))
    assert one == two
    rows = read_table(tmp_path / "one" / "rows.tsv")
    assert [row["participant_id"] for row in rows] == [f"sub-{i:06d}" for i in range(40)]
    stated = json.loads((tmp_path / "one" / "rows.json").read_text())
    assert stated["columns"]["age_years"]["Units"] == "years" and stated["law"]["people"] == 30
    for changed, name in (({"seed": 1}, "seed 0"), ({"jitter": 0.5}, "law::jitter 0.2"), ({"num_rows": 41}, "rows 40")):
        with pytest.raises(Exception) as caught:
            run_here(DRAW, collection_dir=str(tmp_path / "one"), **{**flags, **changed})
        assert f"was drawn with {name}" in str(find_bundle_error(caught.value))
    assert (tmp_path / "one" / "rows.tsv").read_bytes() == one
