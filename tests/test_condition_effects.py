# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Effects of age and sex on regions: statistics against statsmodels', and planted populations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.core.tables import write_table
from scripts.evaluation.condition_effects import ConditionEffects, difference_t, different_effects, least_squares
from scripts.evaluation.metrics.regions import REGIONS
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

CONDITIONS = Conditions(
    gender={"raw": "sex", "unit": "", "minimum": 0, "maximum": 1, "codes": {"female": 0, "male": 1}},
    age={"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82},
)
MEANS = np.log(np.array([3e5, 6e5, 5e5, 3e4, 2e3, 2e3]))
SEX = np.array([0.06, 0.09, 0.09, 0.12, 0.05, 0.05])
AGE = np.array([0.1, -0.08, -0.1, 0.45, 0.3, 0.1])


def population(number: int, seed: int, sex: np.ndarray = SEX, age: np.ndarray = AGE) -> tuple[np.ndarray, np.ndarray]:
    """Conditions (N, 2), sex and age, and logarithms of region volumes with 8 % of spread."""
    generator = np.random.default_rng(seed)
    conditions = np.stack([generator.integers(0, 2, number), generator.uniform(0, 1, number)], axis=1)
    spread = 0.06 * generator.standard_normal((number, 1)) + 0.05 * generator.standard_normal((number, len(MEANS)))
    return conditions, MEANS + conditions @ np.stack([sex, age]) + spread


def test_slopes_and_t_are_statsmodels() -> None:
    api = pytest.importorskip("statsmodels.api")
    (x, y), (u, v) = population(40, 1), population(30, 2)
    theirs = api.OLS(y[:, 3], x).fit()
    for one, other in zip(least_squares(x, y), (theirs.params, theirs.bse)):
        np.testing.assert_allclose(one[:, 3], other)
    group = np.repeat([1.0, 0.0], [40, 30])[:, None]
    both = np.concatenate([x, u])
    model = np.concatenate([np.ones_like(group), group, both, group * both], axis=1)
    volumes = np.concatenate([y, v])
    theirs = api.OLS(volumes[:, 0], model).fit().tvalues[-2:]
    np.testing.assert_allclose(difference_t(model, volumes, 2)[:, 0], theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "planted, found",
    [({}, set()), ({"sex": SEX * 0}, {0}), ({"age": AGE * [1, 1, 1, 0.3, 1, 1]}, {1}), ({"age": -AGE}, {1})],
    ids=["people", "sex ignored", "ventricles grow too little", "growing young"],
)
def test_planted_populations_are_found(planted: dict[str, Any], found: set[int]) -> None:
    p = different_effects(*population(150, 3, **planted), *population(150, 4), permutations=200, seed=0)
    assert set(np.flatnonzero((p < 0.05).any(axis=1))) == found


def test_equal_effects_are_told_apart_as_rarely_as_the_level_says() -> None:
    least = [different_effects(*population(25, s), *population(25, 500 + s), 99, s).min() for s in range(40)]
    assert np.mean(np.array(least) < 0.05) <= 0.15


class Counted:
    """In the place of the segmenter: volumes over 5 * their means are written into the first voxels."""

    sha256, amp = "0" * 64, False

    def shares(self, volume: torch.Tensor, grid: Grid) -> torch.Tensor:
        return volume

    def volumes(self, shares: torch.Tensor, grid: Grid) -> dict[str, float]:
        return dict(zip(REGIONS, (shares[0, 0, 0, : len(REGIONS)].double().numpy() * np.exp(MEANS) * 5).tolist()))


class Of:
    def __init__(self, folder: VolumeFolder) -> None:
        self.folder = folder


def people(folder: Path, conditions: np.ndarray, logs: np.ndarray) -> VolumeFolder:
    folder.mkdir()
    grid, rows = Grid((2, 2, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), []
    for number, (vector, one) in enumerate(zip(conditions, logs)):
        head = np.zeros(grid.shape, np.float32)
        head[:, 0, : len(one)] = np.exp(one - MEANS) / 5
        write_volume(folder / f"{number}.nii.gz", head, grid, "float32")
        told = {"sex": "male" if vector[0] else "female", "age_years": 44 + 38 * vector[1]}
        rows.append({"participant_id": f"sub-{number}", "path": f"{number}.nii.gz", **told})
    write_table(folder / "participants.tsv", rows)
    return VolumeFolder(str(folder), folder.name)


def test_the_measure_finds_a_sex_that_is_ignored(tmp_path: Path) -> None:
    real = people(tmp_path / "real_dir", *population(60, 5))
    samples = people(tmp_path / "synthetic_dir", *population(60, 6, sex=SEX * 0))
    ours: Any = Of(samples)
    theirs: Any = Of(real)
    segmenter: Any = Counted
    one = ConditionEffects(ours, theirs, segmenter, Values(tmp_path / "values"), CONDITIONS, permutations=200)
    assert not one.missing_flags()
    found = one.compute()
    figures = {(row.quantity, row.kind): row.found for row in found.rows if row.metric == "effect"}
    low, high = figures["white", "gender in synthetic"].interval or (1, 1)
    assert low < 0 < high
    assert figures["white", "gender in people"].value == pytest.approx(SEX[2], abs=0.05)
    assert {line["condition"] for line in found.table if line["p_corrected"] < 0.05} == {"gender"}


def test_too_few_say_why(tmp_path: Path) -> None:
    few: Any = Of(people(tmp_path / "real_dir", *population(5, 5)))
    segmenter: Any = Counted
    one = ConditionEffects(few, few, segmenter, Values(tmp_path / "values"), CONDITIONS)
    assert one.missing_flags() and "need 20" in one.inputs[0].why_not
