# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Effect sizes of regions: the statistics against SciPy's, and planted differences that must be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from scripts.compute.kept import Values
from scripts.evaluation.metrics.effects import cohens_d, corrected_p, wasserstein
from scripts.evaluation.metrics.regions import REGIONS, Regions
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

MEANS = np.array([3e5, 6e5, 5e5, 3e4, 2e3, 2e3])


def population(number: int, seed: int, changed: int | None = None, factor: float = 0.9) -> np.ndarray:
    """Region volumes of people whose regions go together (r = 0.5), with 8 % of spread; one region changed."""
    generator = np.random.default_rng(seed)
    both = np.sqrt(0.5) * generator.standard_normal((number, 1)) + np.sqrt(0.5) * generator.standard_normal(
        (number, len(MEANS))
    )
    volumes = MEANS * (1 + 0.08 * both)
    if changed is not None:
        volumes[:, changed] *= factor
    return volumes


def test_d_is_student_s_t_without_its_sizes() -> None:
    a, b = population(30, 1), population(20, 2, changed=3)
    t = scipy.stats.ttest_ind(a, b).statistic
    np.testing.assert_allclose(cohens_d(a, b), t * np.sqrt(1 / 30 + 1 / 20))
    assert np.isnan(cohens_d(np.ones((3, 1)), np.ones((4, 1)))).all()


def test_p_of_one_region_is_scipy_s_permutation_test() -> None:
    a, b = population(25, 3)[:, :1], population(25, 4, changed=0, factor=0.96)[:, :1]
    theirs = scipy.stats.permutation_test(
        (a[:, 0], b[:, 0]), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=4000, rng=0
    ).pvalue
    assert 0.005 < theirs < 0.5
    assert corrected_p(a, b, 4000, 0)[0] == pytest.approx(theirs, abs=0.03)


def test_equal_populations_differ_as_rarely_as_the_level_says() -> None:
    found = [corrected_p(population(20, seed), population(20, 1000 + seed), 200, seed).min() for seed in range(60)]
    assert np.mean(np.array(found) < 0.05) <= 0.15  # without the correction about 0.2 and more


def test_a_region_that_is_a_tenth_smaller_is_found_and_no_other() -> None:
    p = corrected_p(population(60, 15, changed=4), population(60, 16), 500, 0)
    assert p[4] < 0.01 and (np.delete(p, 4) > 0.05).all()


@pytest.mark.parametrize("regions", [1, 3])
def test_distance_is_scipy_s_wasserstein_distance(regions: int) -> None:
    a, b = np.random.default_rng(0).random((12, regions)), np.random.default_rng(1).random((12, regions)) + 0.3
    theirs = (
        scipy.stats.wasserstein_distance(a[:, 0], b[:, 0])
        if regions == 1
        else scipy.stats.wasserstein_distance_nd(a, b)
    )
    assert wasserstein(a, b) == pytest.approx(theirs, rel=1e-6)


class Counted:
    """In the place of the segmenter: the volumes that are written into a head's first voxels, in 10 mL."""

    sha256, amp = "0" * 64, False

    def shares(self, volume: torch.Tensor, grid: Grid) -> torch.Tensor:
        return volume

    def volumes(self, shares: torch.Tensor, grid: Grid) -> dict[str, float]:
        return dict(zip(REGIONS, (shares[0, 0, 0, : len(REGIONS)].double().numpy() * MEANS * 2).tolist()))


class Of:
    """What stands for a set of features: its folder."""

    def __init__(self, folder: VolumeFolder) -> None:
        self.folder = folder


def measured(tmp_path: Path, synthetic: np.ndarray, real: np.ndarray) -> Regions:
    folders: list[Any] = []
    grid = Grid((2, 2, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    for flag, people in (("synthetic_dir", synthetic), ("real_dir", real)):
        (tmp_path / flag).mkdir()
        for number, one in enumerate(people / MEANS / 2):
            head = np.zeros(grid.shape, np.float32)
            head[:, 0, : len(one)] = one
            write_volume(tmp_path / flag / f"{number}.nii.gz", head, grid, "float32")
        folders.append(Of(VolumeFolder(str(tmp_path / flag), flag)))
    counted: Any = Counted
    return Regions(folders[0], folders[1], counted, Values(tmp_path / "values"), resamplings=10, permutations=200)


def test_regions_are_told_apart_from_floor_and_share(tmp_path: Path) -> None:
    found = measured(tmp_path, population(24, 1, changed=4, factor=0.8), population(24, 2)).compute()
    rows = {(row.metric, row.quantity or row.kind): row for row in found.rows}
    assert rows["cohens_d", REGIONS[4]].found.value < -1.5
    low, high = rows["cohens_d", REGIONS[4]].found.interval or (0, 0)
    assert low < rows["cohens_d", REGIONS[4]].found.value < high < 0
    assert rows["region_distance", "halves"].found.value > rows["region_distance", "floor"].found.value
    assert [line["region"] for line in found.table if line["p_corrected"] < 0.05] == [REGIONS[4]]
    assert found.picture is not None


def test_heads_of_one_population_are_at_the_floor(tmp_path: Path) -> None:
    found = measured(tmp_path, population(24, 7), population(24, 8)).compute()
    halves, floor = (
        next(row.found for row in found.rows if (row.metric, row.kind) == ("region_distance", kind))
        for kind in ("halves", "floor")
    )
    assert abs(halves.value - floor.value) < 3 * (floor.standard_deviation or 0)
    assert all(line["p_corrected"] > 0.05 for line in found.table)


def test_a_volume_without_a_brain_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    synthetic = population(6, 9)
    synthetic[2] = 0.0
    found = measured(tmp_path, synthetic, population(6, 10)).compute()
    assert (found.facts["synthetic_volumes"], found.facts["real_volumes"]) == (5, 6)
    assert "1 volumes show no brain" in caplog.text and "2.nii.gz" in caplog.text
