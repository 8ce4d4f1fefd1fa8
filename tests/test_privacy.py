# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Nearest training volumes: plain distances, a model that copies, and one that does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from synthetic_head import synthetic_image, synthetic_labels

from scripts.compute.kept import Values
from scripts.core.bootstrap import bootstrapped
from scripts.core.errors import BundleError
from scripts.evaluation.measures import Result
from scripts.evaluation.metrics import copies
from scripts.evaluation.metrics.alignment import Alignment, Motion
from scripts.evaluation.metrics.copies import nearest
from scripts.evaluation.metrics.features import FeatureNetworks, FeatureSet
from scripts.evaluation.metrics.privacy import Privacy, quantiles
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


def test_nearest_is_the_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    features, training = generator.normal(size=(23, 5)), generator.normal(size=(31, 5))
    table = np.sqrt(((features[:, None] - training[None]) ** 2).sum(axis=2))
    monkeypatch.setattr(copies, "BLOCK", 7)
    positions, distances = nearest(features, training)
    assert (positions[:, 0] == table.argmin(axis=1)).all() and np.allclose(distances[:, 0], table.min(axis=1))
    assert nearest(training[[4]], training)[1] == 0.0
    positions, distances = nearest(features, training, 3)
    assert (positions == table.argsort(axis=1)[:, :3]).all() and np.allclose(distances, np.sort(table, axis=1)[:, :3])
    assert nearest(features, training, 40)[0].shape == (23, 31)


def test_quantiles_count_the_distances_that_are_not_larger() -> None:
    assert quantiles(np.array([0.5, 2.0, 3.0, 9.0]), np.array([3.0, 1.0, 2.0, 4.0])).tolist() == [0, 0.5, 0.75, 1]


class Voxels:
    """Stands in for a feature network: all voxels."""

    given = False
    dimension = 27

    def facts(self) -> dict[str, Any]:
        return {"network": "voxels"}

    def load(self, device: torch.device) -> Any:
        return torch.flatten


def features(folder: Path, flag: str, seeds: range, noise: float = 0.0) -> FeatureSet:
    """Volumes of random voxels; with noise, near those of the same seeds."""
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        array = np.random.default_rng(seed).normal(size=(3, 3, 3))
        array += noise * np.random.default_rng(seed + 10_000).normal(size=(3, 3, 3))
        nib.save(nib.Nifti1Image(array.astype(np.float32), LAS), folder / f"{seed:04d}.nii.gz")
    networks = FeatureNetworks("voxels", {"voxels": Voxels()})
    return FeatureSet(VolumeFolder(folder, flag), networks, str(folder.parent / "features"))


GRID = Grid((40, 56, 40), (-4.0, 4.0, 4.0), (78.0, -110.0, -78.0))


def person(seed: int) -> np.ndarray:
    """A head of its own size and texture, 0..1."""
    labels = synthetic_labels(GRID, swell=1.0 - 0.02 * (seed % 4))
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=GRID.shape), 1.5)
    return np.clip(synthetic_image(labels) * (1 + 0.3 * texture / texture.std()), 0, 1)


def turned(head: np.ndarray) -> np.ndarray:
    """The mirror image, turned by 8 degrees and shifted by 6 mm (6.5 where it has the most)."""
    matrix = Rotation.from_rotvec([5.0, -4.0, 4.8], degrees=True).as_matrix()
    centre = (np.array(head.shape) - 1) / 2
    offset = centre - matrix @ (centre + np.array([4.0, -2.0, 4.0]) / 4.0)
    return np.clip(ndimage.affine_transform(head[::-1], matrix, offset, order=3), 0, 1)


def test_turned_copies_are_found_and_kept(tmp_path: Path) -> None:
    """Training volumes that were mirrored, turned and shifted are found again; features do not see that."""
    folders = {}
    for flag, seeds in (("synthetic_dir", range(3)), ("training_dir", range(4)), ("real_dir", range(10, 13))):
        folders[flag] = tmp_path / flag
        folders[flag].mkdir()
        for seed in seeds:
            head = turned(person(seed)) if flag == "synthetic_dir" and seed else person(seed)
            write_volume(folders[flag] / f"{seed}.nii.gz", head, GRID)

    def measured() -> Result:
        networks = FeatureNetworks("mean", {"mean": Mean()})
        values = Values(tmp_path / "values")
        sets = [FeatureSet(VolumeFolder(f, flag), networks, str(tmp_path / "f")) for flag, f in folders.items()]
        return Privacy(sets[0], sets[1], sets[2], alignment=Alignment(4.0), candidates=4, values=values).compute()

    result = measured()
    found = by_kind(result)
    assert found["ssim", "close"].value == 1.0
    rows = {row["volume"]: row for row in result.table}
    assert all(row["likest"] == name and row["ssim_held_out_quantile"] == 0.0 for name, row in rows.items())
    assert rows["0.nii.gz"]["ssim"] == pytest.approx(1.0, abs=1e-6), "a plain copy"
    for name in ("1.nii.gz", "2.nii.gz"):
        assert rows[name]["ssim"] > 0.95 and rows[name]["mirrored"] == 1
        assert rows[name]["rotation_degrees"] == pytest.approx(8.0, abs=0.3)
        assert np.allclose(np.array(rows[name]["shift_mm"].split(), float), [4.0, -2.0, 4.0], atol=0.3)
    assert found["ssim", "held_out"].value < found["ssim", "synthetic"].value - 0.2
    assert result.picture is not None and len(result.picture.axes) == 6
    before = (tmp_path / "values" / "rank-0.tsv").read_text()
    assert measured().table == result.table and (tmp_path / "values" / "rank-0.tsv").read_text() == before


def test_the_search_keeps_its_limits() -> None:
    """What lies beyond them is not found; a volume without any contrast is compared as it is."""
    head = person(1).astype(np.float32)
    copy = turned(head).astype(np.float32)
    shapes = (4.0, 4.0, 4.0)
    for limits in ({"largest_rotation": 5.0}, {"largest_shift": 2.0}, {"largest_rotation": 0.0, "largest_shift": 0.0}):
        alignment = Alignment(4.0, **limits)
        found = alignment.compare(copy, head, shapes)
        assert found.motion.angle <= alignment.largest_rotation
        assert max(map(abs, found.motion.shift)) <= alignment.largest_shift
        assert found.ssim < Alignment(4.0).compare(copy, head, shapes).ssim - 0.1
    flat = np.zeros_like(head)
    assert Alignment(4.0).compare(flat, flat, shapes) == (1.0, Motion())
    assert np.isfinite(Alignment(4.0).compare(head, flat, shapes).ssim)


class Mean(Voxels):
    """Stands in for a feature network: the mean of a volume."""

    dimension = 1

    def load(self, device: torch.device) -> Any:
        return lambda volume: volume.mean()[None]


def test_interval_of_a_ratio_of_two_sets_is_scipy_s(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, second = generator.gamma(3.0, size=60), generator.gamma(4.0, size=50)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return np.median(a, axis) / np.median(b, axis)

    theirs = scipy.stats.bootstrap(
        (first, second), ratio, vectorized=True, method="percentile", n_resamples=2000, random_state=1
    ).confidence_interval
    assert bootstrapped([first, second], ratio, 0) == pytest.approx(tuple(theirs), abs=0.05)
    assert bootstrapped([first, second[:2]], ratio, 0) is None


def test_repeats_that_are_not_defined_are_left_out() -> None:
    second = np.array([0.0, 0.0, 1.0, 2.0, 3.0])

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        middle = np.median(b, axis)
        return np.median(a, axis) / np.where(middle > 0, middle, np.nan)

    low, high = bootstrapped([np.ones(5), second], ratio, 0) or (0.0, 0.0)
    assert low == pytest.approx(1 / 3) and high == 1.0


def by_kind(result: Result) -> dict[tuple[str, str], Any]:
    """The figures by metric and kind."""
    return {(row.metric, row.kind): row.found for row in result.rows}


def privacy_of(tmp_path: Path, synthetic: range, noise: float) -> Any:
    return Privacy(
        features(tmp_path / "synthetic", "synthetic_dir", synthetic, noise),
        features(tmp_path / "training", "training_dir", range(100, 160)),
        features(tmp_path / "real", "real_dir", range(200, 260)),
    ).compute()


def test_a_model_that_copies_is_found_out(tmp_path: Path) -> None:
    result = privacy_of(tmp_path, range(100, 120), 0.1)
    found = by_kind(result)
    assert found["distance", "ratio"].value < 0.3 and found["distance", "close"].value == 1.0
    assert found["distance", "synthetic"].value < found["distance", "held_out"].value
    assert len(result.table) == 20 and all(row["volume"] == row["nearest"] for row in result.table)
    assert [row["held_out_quantile"] for row in result.table] == [0.0] * 20
    distances = [row["distance"] for row in result.table]
    assert distances == sorted(distances) and result.facts["held_out_volumes"] == 60


def test_a_model_that_does_not_copy_is_like_new_people(tmp_path: Path) -> None:
    found = by_kind(privacy_of(tmp_path, range(300, 360), 0.0))
    assert found["distance", "ratio"].value == pytest.approx(1.0, abs=0.1)
    assert found["distance", "close"].value <= 0.15 and found["distance", "close"].interval[0] <= 0.05


def test_training_volumes_that_were_stored_again_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets = [
        features(tmp_path / "synthetic", "synthetic_dir", range(1, 4)),
        features(tmp_path / "training", "training_dir", range(100, 106)),
        features(tmp_path / "real", "real_dir", range(200, 204)),
    ]
    nib.save(nib.load(tmp_path / "training" / "0100.nii.gz"), tmp_path / "real" / "plain.nii")  # type: ignore
    Privacy(sets[0], sets[1], features(tmp_path / "real", "real_dir", range(0))).compute()
    assert "1 volumes of" in caplog.text and "the very features (voxels) of a training volume" in caplog.text


def test_training_volumes_among_the_held_out_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets = [
        features(tmp_path / "synthetic", "synthetic_dir", range(1, 4)),
        features(tmp_path / "training", "training_dir", range(100, 106)),
        features(tmp_path / "real", "real_dir", range(200, 204)),
    ]
    for path in (tmp_path / "training").glob("*.nii.gz"):
        shutil.copy(path, tmp_path / "real" / f"copy_{path.name}")
    sets[2] = features(tmp_path / "real", "real_dir", range(0))
    result = Privacy(sets[0], sets[1], sets[2]).compute()
    assert result.facts["held_out_volumes"] == 4 and "6 volumes of" in caplog.text
    found = by_kind(result)["distance", "held_out"]
    assert found.count == 4 and found.value > 0.0
    with pytest.raises(BundleError, match="--training_dir: .* has 0 volumes that were not trained on"):
        Privacy(sets[0], sets[1], sets[1]).update()
