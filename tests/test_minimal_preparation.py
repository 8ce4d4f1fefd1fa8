# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The minimal preparation: voxels are copied where they can be, and the head, or the brain, is in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY
from preparing import head, preparation, save, space
from released import configuration

from scripts.core.tables import read_table
from scripts.preparation.minimal_steps import CentreHead, ScalePercentiles
from scripts.preparation.skull_stripping import Stripper
from scripts.preparation.steps import Record, Reorient, Resample, TargetSpace
from scripts.volumes.grid import Grid
from scripts.volumes.scans import Scan, ScanError

SOURCE = Grid((30, 36, 28), (8.0, 8.0, 8.0), (-110.0, -160.0, -90.0))


@pytest.fixture
def target(tmp_path: Path) -> TargetSpace:
    return space(tmp_path / "template")


def moved(angle: float = 0.0) -> Scan:
    """A head in a larger field of view, its voxels' axes turned about z, in degrees, off the world's."""
    turn = np.eye(4)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn[:2, :2] = [[c, -s], [s, c]]
    return Scan(head(SOURCE)[0], turn @ SOURCE.affine)


def prepared(scan: Scan, target: TargetSpace, **options: Any) -> Record:
    record = CentreHead(target, options.get("stripper"), options.get("strippers", {}))(Record("x", scan, scan))
    return Resample(target, order=3)(record)


@pytest.mark.parametrize("angle", [0.0, 7.0])
def test_voxels_as_long_as_the_grids_are_copied(angle: float, target: TargetSpace) -> None:
    volume = prepared(moved(angle), target).on_grid()
    turned = volume[::-1]  # the grid's x runs from right to left
    original = moved(angle).data
    places = [
        (x, y, z)
        for x in range(original.shape[0] - turned.shape[0] + 1)
        for y in range(original.shape[1] - turned.shape[1] + 1)
        for z in range(original.shape[2] - turned.shape[2] + 1)
        if np.abs(original[x : x + 20, y : y + 28, z : z + 20] - turned).max() < 1e-3
    ]
    assert len(places) == 1, "a crop, of voxels as they are"
    middle = np.argwhere(volume > 0.3).mean(axis=0)
    assert np.abs(middle - (np.array(volume.shape) - 1) / 2).max() < 3


def test_other_voxels_are_resampled(target: TargetSpace) -> None:
    coarse, affine = head(SOURCE)[0][::2], SOURCE.affine @ np.diag([2.0, 1.0, 1.0, 1.0])
    volume = prepared(Scan(coarse, affine), target).on_grid()
    assert volume.shape == target.grid.shape
    assert np.corrcoef(volume.ravel(), prepared(moved(), target).on_grid().ravel())[0, 1] > 0.8


class Off(Stripper):
    """Says that the brain is a cube away from the middle of the grid, with a speck at its edge."""

    def mask(self, volume: np.ndarray, grid: Grid, scale: float = 1.0) -> np.ndarray:
        brain = np.zeros(grid.shape, bool)
        brain[2:9, 10:15, 12:17] = True
        brain[19, 27, 0] = True
        return brain


def test_a_brain_that_is_found_is_in_the_middle(target: TargetSpace) -> None:
    by_head = prepared(moved(), target)
    by_brain = prepared(moved(), target, stripper="off", strippers={"off": Off})
    voxels = np.linalg.inv(target.grid.affine) @ np.linalg.inv(by_head.registered().rigid)
    shift = voxels @ by_brain.registered().rigid @ target.grid.affine
    wanted = np.array([5.0, 12.0, 14.0]) - (np.array(target.grid.shape) - 1) / 2
    assert np.abs(shift[:3, 3] - wanted).max() <= 1.0, "to a whole voxel"


def test_percentiles_become_the_ends() -> None:
    data = np.linspace(-50, 1000, 10**4, dtype=np.float32).reshape(10, 10, 100)
    scan = Scan(data, np.eye(4))
    found = ScalePercentiles(1.0, 90.0)(Record("x", scan, scan)).scan.data
    assert (found == 0).mean() == pytest.approx(0.01, abs=1e-3) and (found == 1).mean() == pytest.approx(0.1, abs=1e-3)
    flat = Scan(np.ones((4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(ScanError, match="same intensity"):
        ScalePercentiles()(Record("x", flat, flat))


def test_overlay_prepares_a_dataset(target: TargetSpace, tmp_path: Path) -> None:
    config = configuration(["configs/prepare.yaml", "configs/pixel.yaml", "configs/minimal.yaml", TINY])
    names = ["reorient", "super_resolve", "bias_field", "scale", "centre", "resample", "strip"]
    assert list(config["steps"]) == names
    raw = tmp_path / "raw"
    save(raw / "sub-00" / "anat" / "sub-00_T1w.nii.gz", 1000 * moved().data, SOURCE.affine)
    (raw / "participants.tsv").write_text("participant_id\nsub-00\n")
    chain = {"reorient": Reorient(), "scale": ScalePercentiles(), "centre": CentreHead(target, None, {})}
    flags = {"input_dir": raw, "columns": {}, "plausible": {}}
    preparation(target, tmp_path / "dataset", steps={**chain, "resample": Resample(target)}, **flags).run()
    (row,) = read_table(tmp_path / "dataset" / "participants.tsv")
    volume = np.asarray(nib.load(tmp_path / "dataset" / row["path"]).dataobj)  # type: ignore[attr-defined]
    assert volume.shape == target.grid.shape and 0.9 < volume.max() <= 1.0
