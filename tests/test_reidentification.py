# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Re-identification: copies that are deformed and scanned anew are found, other people are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import mannwhitneyu

from scripts.evaluation.metrics.reidentification import (
    Reidentification,
    Reidentifier,
    area_under_curve,
    descriptor,
    planted_copy,
)
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

SHAPE, SIDE = (40, 48, 40), 4.0
GRID = Grid(SHAPE, (-SIDE, SIDE, SIDE), (0.0, 0.0, 0.0))


def person(seed: int) -> np.ndarray:
    """An ellipsoid with folds of its own."""
    folds = gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 2.0)
    x, y, z = np.indices(SHAPE)
    inside = ((x - 19.5) / 15) ** 2 + ((y - 23.5) / 19) ** 2 + ((z - 20) / 17) ** 2 < 1
    return np.where(inside, np.clip(0.6 + 0.15 * folds / folds.std(), 0.05, 1), 0.0).astype(np.float32)


def folder_of(path: Path, heads: list[np.ndarray]) -> VolumeFolder:
    path.mkdir()
    for number, one in enumerate(heads):
        write_volume(path / f"{number:02d}.nii.gz", one, GRID, "float32")
    return VolumeFolder(str(path), path.name)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Reidentifier:
    folder = tmp_path_factory.mktemp("known")
    training = folder_of(folder / "training_dir", [person(seed) for seed in range(16)])
    return Reidentifier(training, folder_of(folder / "real_dir", [person(seed) for seed in range(100, 116)]), copies=8)


class Of:
    def __init__(self, folder: VolumeFolder) -> None:
        self.folder = folder


def figures(known: Reidentifier, samples: VolumeFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    features: Any = Of(samples)
    one = Reidentification(features, known)
    assert not one.missing_flags()
    one.check()
    found = one.compute()
    return {row.kind: row.found for row in found.rows}, found.table


def test_five_planted_copies_are_found_and_nobody_else(known: Reidentifier, tmp_path: Path) -> None:
    copies = [planted_copy(person(seed), (SIDE,) * 3, 7 + seed) for seed in range(5)]
    samples = folder_of(tmp_path / "synthetic_dir", [*copies[:4], copies[4][::-1], *map(person, range(200, 205))])
    found, table = figures(known, samples)
    close = {line["volume"]: line["likest"] for line in table if line["close"]}
    assert all(close.get(f"{n:02d}.nii.gz") == f"{n:02d}.nii.gz" for n in range(5)), "also the mirrored one"
    assert len(close) <= 6
    assert found["power"].value >= 0.8 and found["auc"].value > 0.9
    assert found["power"].interval is not None and found["power"].interval[0] < 1.0


def test_other_people_are_no_copies(known: Reidentifier, tmp_path: Path) -> None:
    found, _ = figures(known, folder_of(tmp_path / "synthetic_dir", [person(seed) for seed in range(300, 316)]))
    assert found["close"].interval[0] <= 0.05
    assert abs(found["synthetic"].value - found["held_out"].value) < 0.1


def test_size_place_and_look_do_not_count() -> None:
    head = person(1)
    moved = np.roll(head, (1, -2, 1), axis=(0, 1, 2))
    field = np.exp(0.15 * np.linspace(-1, 1, SHAPE[1]))[:, None]
    other, ours = descriptor(person(2), (SIDE,) * 3), descriptor(head, (SIDE,) * 3)
    for changed in (moved, 0.8 * field * head, head**0.9):
        again = descriptor(changed, (SIDE,) * 3)
        assert np.corrcoef(again.ravel(), ours.ravel())[0, 1] > 0.9
        assert np.corrcoef(again.ravel(), other.ravel())[0, 1] < 0.7
    assert not descriptor(np.zeros(SHAPE), (SIDE,) * 3).any()


def test_area_is_scipy_s() -> None:
    a, b = np.array([1.0, 3.0, 2.0, 5.0]), np.array([0.0, 2.0, 4.0])
    assert area_under_curve(a, b, 0).value == pytest.approx(mannwhitneyu(a, b).statistic / 12)


def test_without_other_people_it_stands_back(known: Reidentifier, caplog: pytest.LogCaptureFixture) -> None:
    features: Any = Of(known.training)
    nobody = Reidentification(features, Reidentifier(known.training, known.training))
    assert nobody.compute().rows == [] and "0 volumes were not trained on" in caplog.text
    few = Reidentification(features, Reidentifier(known.training, known.held_out.part(known.held_out.paths[:3])))
    assert few.missing_flags() == ["real_dir"] and "needs 8" in few.inputs[2].why_not
