# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""FID and KID: against scipy and plain sums, closed forms and invariants, and the measures built on them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.linalg
import torch

from scripts.core.errors import BundleError
from scripts.evaluation.measures import Result
from scripts.evaluation.metrics.features import FeatureNetworks, FeatureSet
from scripts.evaluation.metrics.fid import FrechetDistance, frechet_distance, frechet_distance_of_samples
from scripts.evaluation.metrics.kid import KernelDistance, polynomial_mmd
from scripts.volumes.folders import VolumeFolder

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


def features(seed: int, count: int, dimension: int, shift: float = 0.0) -> np.ndarray:
    """Correlated features of different scales."""
    mixing = np.random.default_rng(99).normal(size=(dimension, dimension)) * np.linspace(0.1, 3.0, dimension)
    return np.random.default_rng(seed).normal(size=(count, dimension)) @ mixing + shift


def by_sqrtm(first: np.ndarray, second: np.ndarray) -> float:
    """The FID as it is usually computed."""
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    assert np.abs(np.imag(root)).max() < 1e-3
    step = first.mean(axis=0) - second.mean(axis=0)
    return float(step @ step + np.trace(a + b - 2 * np.real(root)))


@pytest.mark.parametrize(("sizes", "dimension"), [((300, 200), 12), ((60, 80), 40)])
def test_fid_is_scipy_s(sizes: tuple[int, int], dimension: int) -> None:
    first, second = features(1, sizes[0], dimension), features(2, sizes[1], dimension, 0.5)
    expected = by_sqrtm(first, second)
    assert expected > 0.1
    assert frechet_distance_of_samples(first, second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sizes", [(10, 14), (40, 14), (14, 40)])
def test_fid_of_fewer_volumes_than_features_is_that_of_their_covariances(sizes: tuple[int, int]) -> None:
    first, second = features(3, sizes[0], 30), features(4, sizes[1], 30, 1.0)
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (first, second)]
    expected = frechet_distance(*moments[0], *moments[1])
    assert frechet_distance_of_samples(first, second) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "dimension"), [(50, 8), (8, 50)])
def test_fid_of_a_set_with_itself_is_zero_and_it_is_symmetric(count: int, dimension: int) -> None:
    first, second = features(5, count, dimension), features(6, count, dimension)
    scale = np.trace(np.cov(first, rowvar=False))
    assert frechet_distance_of_samples(first, first) < 1e-10 * scale
    forth, back = frechet_distance_of_samples(first, second), frechet_distance_of_samples(second, first)
    assert forth == pytest.approx(back, rel=1e-9) and forth > 0.0


@pytest.mark.parametrize(("count", "dimension"), [(50, 8), (8, 50)])
def test_fid_of_a_shift_and_a_scale_are_the_closed_forms(count: int, dimension: int) -> None:
    first = features(7, count, dimension)
    shift = np.linspace(-1.0, 2.0, dimension)
    assert frechet_distance_of_samples(first, first + shift) == pytest.approx(shift @ shift, rel=1e-6)
    mean = first.mean(axis=0)
    scaled = mean + 3.0 * (first - mean)
    expected = (3.0 - 1.0) ** 2 * np.trace(np.cov(first, rowvar=False))
    assert frechet_distance_of_samples(first, scaled) == pytest.approx(expected, rel=1e-9)


def test_fid_between_gaussians_with_a_common_basis_is_the_closed_form() -> None:
    basis = np.linalg.qr(np.random.default_rng(8).normal(size=(6, 6)))[0]
    a, b = np.array([4.0, 1.0, 0.0, 9.0, 2.0, 0.0]), np.array([1.0, 1.0, 3.0, 4.0, 0.0, 0.0])
    mean, other = np.zeros(6), np.full(6, 0.5)
    found = frechet_distance(mean, basis * a @ basis.T, other, basis * b @ basis.T)
    assert found == pytest.approx(6 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-6)


def test_what_is_no_covariance_is_refused() -> None:
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))


def slow_mmd(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1.0) ** 3)

    n, m = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    other = sum(kernel(second[i], second[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    return within + other - 2 * sum(kernel(x, y) for x in first for y in second) / (n * m)


def test_kid_is_the_double_loop_s(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(10, 23, 7), features(11, 31, 7, 0.3)
    expected = slow_mmd(first, second)
    assert polynomial_mmd(first, second) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("scripts.evaluation.metrics.kid.BLOCK", 5)
    assert polynomial_mmd(first, second) == pytest.approx(expected, rel=1e-9)


def test_kid_has_no_bias_where_fid_has() -> None:
    pairs = [(features(2 * i, 12, 6), features(2 * i + 1, 12, 6)) for i in range(200)]
    kid = np.array([polynomial_mmd(x, y) for x, y in pairs])
    assert abs(kid.mean()) < 3 * kid.std() / np.sqrt(len(kid)) and kid.min() < 0.0
    small, large = (
        np.mean([frechet_distance_of_samples(features(2 * i, n, 6), features(2 * i + 1, n, 6)) for i in range(20)])
        for n in (12, 200)
    )
    assert small > 3 * large


# The measures


class Projection:
    """Stands in for a feature network: intensities at fixed places."""

    given = False
    dimension = 3
    loads = 0

    def facts(self) -> dict[str, Any]:
        return {"network": "projection"}

    def load(self, device: torch.device) -> Any:
        Projection.loads += 1
        return lambda volume: volume.flatten()[[0, 7, 19]]


def folder_of(path: Path, rows: np.ndarray, flag: str) -> VolumeFolder:
    """Volumes whose features are the rows."""
    path.mkdir(parents=True)
    for number, row in enumerate(rows):
        values = np.zeros(27, np.float32)
        values[[0, 7, 19]] = row
        nib.save(nib.Nifti1Image(values.reshape(3, 3, 3), LAS), path / f"{number:03d}.nii.gz")
    return VolumeFolder(path, flag)


def measure(kind: Any, tmp_path: Path, synthetic: np.ndarray, real: np.ndarray, **options: Any) -> Any:
    networks = FeatureNetworks("projection", {"projection": Projection()})
    sets = [
        FeatureSet(folder_of(tmp_path / name, rows, name), networks, str(tmp_path / "features"))
        for name, rows in (("synthetic_dir", synthetic), ("real_dir", real))
    ]
    return kind(*sets, **options)


def by_kind(result: Result) -> dict[str, Any]:
    """The figures by their kinds."""
    return {row.kind: row.found for row in result.rows}


@pytest.mark.parametrize(
    ("kind", "metric", "function"), [(FrechetDistance, "fid", by_sqrtm), (KernelDistance, "kid", slow_mmd)]
)
def test_measures_come_with_floor_and_facts(tmp_path: Path, kind: Any, metric: str, function: Any) -> None:
    generator = np.random.default_rng(1)
    synthetic, real = (generator.random((n, 3)).astype(np.float32) for n in (30, 24))
    result = measure(kind, tmp_path, synthetic + 1, real, resamplings=30).compute()
    found = by_kind(result)
    assert {row.network for row in result.rows} == {"projection"} and {row.metric for row in result.rows} == {metric}
    assert found["all"].value == pytest.approx(function(synthetic + 1.0, real.astype(float)), rel=1e-4)
    assert found["floor"].count == found["halves"].count == 30
    assert found["floor"].value < 0.2 * found["halves"].value
    assert found["floor"].standard_deviation > 0.0
    assert result.facts["volumes_per_half"] == 12 and result.facts["synthetic_volumes"] == 30
    assert result.facts["networks"] == {"projection": {"network": "projection"}}
    assert result.facts["fewer_volumes_than_features"] == {"projection": False}


def test_a_perfect_model_gets_the_floor(tmp_path: Path) -> None:
    rows = np.random.default_rng(2).random((120, 3)).astype(np.float32)
    found = measure(FrechetDistance, tmp_path, rows[:60], rows[60:], resamplings=40).compute()
    kinds = by_kind(found)
    spread = kinds["floor"].standard_deviation
    assert kinds["halves"].value == pytest.approx(kinds["floor"].value, abs=2 * spread)


def test_resamplings_follow_from_the_seed(tmp_path: Path) -> None:
    rows = np.random.default_rng(3).random((20, 3)).astype(np.float32)
    one, again, other = (
        by_kind(measure(FrechetDistance, tmp_path / str(n), rows[:10], rows[10:], seed=seed).compute())
        for n, seed in enumerate((1, 1, 2))
    )
    assert one == again and one["floor"] != other["floor"]
    assert one["all"] == other["all"]


def test_fewer_volumes_than_features_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = measure(FrechetDistance, tmp_path, np.eye(3)[:2], np.eye(3)[:2]).compute()
    assert "2 synthetic and 2 real volumes for 3 features" in caplog.text
    assert result.facts["fewer_volumes_than_features"] == {"projection": True}
    assert list(by_kind(result)) == ["all"] and "too few for a floor: it needs 4" in caplog.text


def test_volumes_on_two_grids_are_refused(tmp_path: Path) -> None:
    found = measure(FrechetDistance, tmp_path, np.eye(3), np.eye(3))
    (tmp_path / "large").mkdir()
    nib.save(
        nib.Nifti1Image(np.zeros((3, 3, 4), np.float32), LAS),
        tmp_path / "large" / "a.nii.gz",
    )
    found.real.folder = VolumeFolder(tmp_path / "large", "real_dir")
    with pytest.raises(BundleError, match="--real_dir: .* holds one volume"):
        found.check()
    shutil.copy(tmp_path / "large" / "a.nii.gz", tmp_path / "large" / "b.nii.gz")
    found.real.folder = VolumeFolder(tmp_path / "large", "real_dir")
    with pytest.raises(BundleError, match=r"shape \(3, 3, 3\), but .* has \(3, 3, 4\)"):
        found.check()


def test_one_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--real_dir: .* holds one volume"):
        measure(FrechetDistance, tmp_path, np.eye(3), np.eye(3)[:1]).update()
