# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Contrasts of tissue do without gain, bias and gamma; age is told from them, and a wrong slope is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.core.tables import write_table
from scripts.evaluation.measures import Result
from scripts.evaluation.metrics.tissue_age import LEAST_PEOPLE, TissueAge
from scripts.measuring.segmenter import CLASSES
from scripts.measuring.tissue import CONTRASTS, ageing_features, tissue_numbers
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

SHAPE = (24, 24, 24)
GRID = Grid(SHAPE, (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
LEVELS = {"outside": 0.0, "outer_fluid": 0.2, "grey": 0.5, "white": 0.75, "lateral_ventricles": 0.2}
CONDITIONS = Conditions(age={"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82})


def shells() -> torch.Tensor:
    """Shares (classes, x, y, z): ventricles, white, grey matter and fluid around each other, and what is outside."""
    centre = (np.array(SHAPE) - 1) / 2
    radius = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre)))
    edges = {"lateral_ventricles": 3, "white": 6, "grey": 8.5, "outer_fluid": 10.5, "outside": 99}
    shares, inner = torch.zeros(len(CLASSES), *SHAPE), 0.0
    for name, edge in edges.items():
        shares[CLASSES.index(name)] = torch.from_numpy((radius >= inner) & (radius < edge))
        inner = edge
    return shares


SHARES = shells()


def head(contrast: float = 1.0) -> np.ndarray:
    """A head whose grey matter is moved towards white, as `contrast` falls, as scripts.phantoms.looks.aged does it."""
    levels = {**LEVELS, "grey": 0.75 - contrast * 0.25}
    return np.tensordot([levels.get(name, 0.0) for name in CLASSES], SHARES.numpy(), axes=1)


def ratios(image: np.ndarray) -> np.ndarray:
    found = tissue_numbers(image, SHARES.numpy(), 2.0)
    return np.array([found["white_grey"] / found[name] for name in list(CONTRASTS)[1:]])


def test_contrasts_are_those_of_the_levels() -> None:
    found = tissue_numbers(head(), SHARES.numpy(), 2.0)
    assert found["white_grey"] == pytest.approx(np.log(0.75 / 0.5), rel=1e-3)
    assert found["white_ventricle"] == pytest.approx(np.log(0.75 / 0.2), rel=1e-3)


@pytest.mark.parametrize("gain, gamma, tilt", [(1.3, 1.0, 0.0), (1.0, 0.9, 0.0), (1.0, 1.0, 0.1), (0.9, 1.1, 0.1)])
def test_ratios_of_contrasts_bear_gain_gamma_and_bias(gain: float, gamma: float, tilt: float) -> None:
    field = np.exp(tilt * np.linspace(-1, 1, SHAPE[0]))[:, None, None]
    scanned = gain * field * head() ** gamma
    # as much as four years of age change them by (0.0025 a year)
    np.testing.assert_allclose(ratios(scanned), ratios(head()), rtol=0.01)
    assert np.all(ratios(head(0.95)) < ratios(head()) * 0.97)


def test_no_brain_has_no_age() -> None:
    nothing = np.zeros_like(SHARES.numpy())
    nothing[0] = 1.0
    found = tissue_numbers(head(), nothing, 2.0)
    assert set(found.values()) == {0.0}
    assert np.isnan(ageing_features(dict.fromkeys(CLASSES, 0.0), found)).all()


class KnownShares:
    """In the place of the segmenter: every head has the same shares."""

    sha256, amp, spacing = "0" * 64, False, 2.0

    def shares(self, volume: torch.Tensor, grid: Grid) -> torch.Tensor:
        return SHARES

    def volumes(self, shares: torch.Tensor, grid: Grid) -> dict[str, float]:
        return {name: float(shares[i].sum()) * 8 for i, name in enumerate(CLASSES) if i}


class Of:
    def __init__(self, folder: VolumeFolder) -> None:
        self.folder = folder


def people(folder: Path, ages: list[float], years_shown: float = 1.0, seed: int = 0) -> VolumeFolder:
    """Heads whose contrast falls by 0.0025 for each year of age, or for as many years as are shown for one."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    rows = []
    for number, age in enumerate(ages):
        looks = 60 + years_shown * (age - 60)
        gain, gamma = generator.uniform(0.9, 1.1, 2)
        image = np.clip(gain * head(1 - 0.0025 * (looks - 25)) ** gamma, 0, 1).astype(np.float32)
        write_volume(folder / f"{number}.nii.gz", image, GRID, "float32")
        rows.append({"participant_id": f"sub-{number}", "path": f"{number}.nii.gz", "age_years": age})
    write_table(folder / "participants.tsv", rows)
    return VolumeFolder(str(folder), folder.name)


AGES = np.linspace(45, 80, LEAST_PEOPLE + 4).tolist()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> VolumeFolder:
    return people(tmp_path_factory.mktemp("real") / "real_dir", AGES)


def measure(tmp_path: Path, real: VolumeFolder, samples: VolumeFolder) -> TissueAge:
    features: Any = Of(samples)
    segmenter: Any = KnownShares
    training, values = VolumeFolder(None, "training_dir"), Values(tmp_path / "values")
    return TissueAge(features, training, real, segmenter, values, CONDITIONS)


def figures(result: Result) -> dict[str, Any]:
    return {f"{row.kind}_{row.metric}": row for row in result.rows}


@pytest.mark.parametrize("years_shown, found", [(1.0, False), (0.3, True), (-1.0, True)])
def test_a_wrong_slope_of_age_is_found_and_the_right_one_is_not(
    tmp_path: Path, real: VolumeFolder, years_shown: float, found: bool
) -> None:
    samples = people(tmp_path / "synthetic_dir", AGES[::2], years_shown, seed=1)
    one = measure(tmp_path, real, samples)
    assert not one.missing_flags()
    one.check()
    rows = figures(one.compute())
    assert rows["people_pearson"].found.value > 0.9
    low, high = rows["synthetic_slope"].difference.interval
    assert (high < 0) is found
    assert (low <= 0 <= high) is not found


def test_without_enough_ages_it_says_why_and_stands_back(tmp_path: Path, real: VolumeFolder) -> None:
    few = people(tmp_path / "synthetic_dir", AGES[:3])
    one = measure(tmp_path, few, few)
    assert one.missing_flags() == ["synthetic_dir"] and "3 volumes" in one.inputs[1].why_not
    ageless = VolumeFolder(str(tmp_path / "synthetic_dir"), "synthetic_dir").part([])
    assert measure(tmp_path, real, ageless).missing_flags() == ["synthetic_dir"]
