# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes where no table states them: by given label maps, by a program, by the own network."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from preparing import CONDITIONS, GRID, head, preparation, save, space, steps, write_bids
from stand_ins import KnownPose

from scripts.conditions.ranges import carry_over, check_learned_ranges
from scripts.core.errors import BundleError
from scripts.core.tables import read_table
from scripts.measuring.segmenter import CODES, INTRACRANIAL, shipped_segmenter, summarised
from scripts.measuring.tools import Samseg
from scripts.preparation.covariate_volumes import ByTool, GivenVolumes, LabelsBeside, MeasureVolumes, OwnSegmenter
from scripts.preparation.steps import TargetSpace
from scripts.volumes.grid import Grid
from scripts.volumes.head_size import TEMPLATE, normalised_brain
from scripts.volumes.labels import counted_structures

VENTRICLE, WHITE, CORTEX, FLUID = 4, 41, 3, 24
SCALE = 0.9
VOXEL = 512.0
SIDES = ("left lateral", "left inferior lateral", "right lateral", "right inferior lateral")
COLUMNS = ["subject", *(f"{side} ventricle" for side in SIDES), "left cerebral cortex", "csf"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetSpace:
    return space(tmp_path_factory.mktemp("space"))


def label_map() -> np.ndarray:
    image, brain = head()
    labels = np.where(brain > 0, np.where(image < 0.3, VENTRICLE, WHITE), 0)
    labels[: len(labels) // 2][labels[: len(labels) // 2] == WHITE] = CORTEX
    labels[(labels == 0) & (image > 0) & (image < 0.3)] = FLUID
    return labels.astype(np.int16)


def counted(labels: np.ndarray) -> tuple[float, float]:
    """Volumes in mm3 of the ventricles, and of the brain normalised for the head's size."""
    brain = VOXEL * np.isin(labels, (WHITE, CORTEX)).sum()
    return VOXEL * (labels == VENTRICLE).sum(), normalised_brain(brain, VOXEL * (labels > 0).sum())


Rows = Callable[..., list[dict[str, str]]]


@pytest.fixture
def rows(target: TargetSpace, tmp_path: Path) -> Rows:
    """Prepares with one way to measure; returns the dataset's table."""

    def run(
        raw: Path, way: str | None, segmentations: Any = None, plausible: Any = None, **ways: Any
    ) -> list[dict[str, str]]:
        measure = MeasureVolumes(target, CONDITIONS, way, segmentations, ways, plausible)
        chain = {**steps(target), "register": KnownPose(SCALE), "volumes": measure}
        preparation(target, tmp_path / "dataset", input_dir=raw, steps=chain).run()
        return [*read_table(tmp_path / "dataset" / "participants.tsv")]

    return run


def test_label_maps_beside_the_scan(rows: Rows, tmp_path: Path) -> None:
    raw, labels = write_bids(tmp_path / "raw", 2, {"brain_vol_mm3": ["n/a", 1234567]}), label_map()
    for name in ("sub-00", "sub-01"):
        save(raw / name / "anat" / f"{name}_dseg.nii.gz", labels)
    ventricles, brain = counted(labels)
    found = rows(raw, "labels", labels=LabelsBeside())
    assert [float(row["ventricular_vol_mm3"]) for row in found] == pytest.approx([ventricles] * 2, abs=0.1)
    assert [float(row["brain_vol_mm3"]) for row in found] == pytest.approx([brain, 1234567], abs=0.1)
    assert found[0]["measured_volumes"] == "ventricular_vol_mm3 brain_vol_mm3"
    smaller = labels.copy()
    smaller[tuple(np.argwhere(labels == VENTRICLE)[0])] = 0
    save(raw / "sub-00/anat/sub-00_dseg.nii.gz", smaller)
    changed = rows(raw, "labels", labels=LabelsBeside())
    assert float(changed[0]["ventricular_vol_mm3"]) == ventricles - VOXEL and changed[1] == found[1]
    (raw / "sub-01/anat/sub-01_dseg.nii.gz").unlink()
    assert rows(raw, None)[0] == changed[0], "what was measured stays where nothing is to be measured"
    with pytest.raises(BundleError, match=r"1 of 2 scans failed: 1 no label map \(sub-01\)"):
        rows(raw, "labels", labels=LabelsBeside())


def test_a_folder_of_label_maps_or_a_table_of_synthseg(rows: Rows, tmp_path: Path) -> None:
    raw, labels = write_bids(tmp_path / "raw", 1), label_map()
    nib.save(nib.MGHImage(labels.astype(np.int32), GRID.affine), _folder(tmp_path / "maps") / "sub-00_aseg.mgz")
    assert float(rows(raw, None, tmp_path / "maps")[0]["ventricular_vol_mm3"]) == pytest.approx(counted(labels)[0])
    smaller = labels.copy()
    smaller[tuple(np.argwhere(labels == VENTRICLE)[0])] = 0
    nib.save(nib.MGHImage(smaller.astype(np.int32), GRID.affine), tmp_path / "maps/00_aseg.mgz")
    (tmp_path / "maps/sub-00_aseg.mgz").unlink()  # the name of a table's participant 00
    changed = rows(raw, None, tmp_path / "maps")[0]["ventricular_vol_mm3"]
    assert float(changed) == pytest.approx(counted(smaller)[0])
    (tmp_path / "volumes.csv").write_text(f"{','.join(COLUMNS)}\nsub-00_T1w.nii.gz,9000,100,8000,200,900000,300000\n")
    row = rows(raw, None, tmp_path / "volumes.csv")[0]
    assert float(row["ventricular_vol_mm3"]) == 17300
    assert float(row["brain_vol_mm3"]) == pytest.approx(normalised_brain(900000, 1217300), abs=0.1)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_program_segments_what_was_prepared(rows: Rows, tmp_path: Path, target: TargetSpace) -> None:
    """A program that stands in for samseg: dark voxels inside the brain are ventricles."""
    program = tmp_path / "run_samseg"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys, nibabel as nib, numpy as np\n"
        "image = nib.load(sys.argv[sys.argv.index('--input') + 1])\n"
        f"labels = np.where(np.asarray(image.dataobj) > 0.2, {WHITE}, {FLUID}).astype(np.int32)\n"
        f"labels[10, 14, 10] = {VENTRICLE}\n"
        "nib.save(nib.MGHImage(labels, image.affine), sys.argv[sys.argv.index('--output') + 1] + '/seg.mgz')\n"
    )
    program.chmod(0o755)
    raw = write_bids(tmp_path / "raw", 1)
    row = rows(raw, "samseg", samseg=ByTool(Samseg(str(program))))[0]
    kept = nib.load(tmp_path / "dataset/sub-00/anat/sub-00_space-MNI152_dseg.nii.gz")
    assert np.allclose(kept.affine, GRID.affine) and VENTRICLE in np.asarray(kept.dataobj)
    assert float(row["ventricular_vol_mm3"]) == VOXEL
    sidecar = json.loads((tmp_path / "dataset" / row["path"].replace(".nii.gz", ".json")).read_text())
    assert sidecar["steps"]["volumes"]["segmenter"] == "samseg"
    assert set(sidecar["covariates"]) == {"ventricular_vol_mm3", "brain_vol_mm3"} == set(sidecar["lacking"])


LIMITS = {"ventricular_vol_mm3": [1000, 500000], "brain_vol_mm3": [300000, 2500000]}


@pytest.mark.parametrize("cells", ["0,0,0,0,900000,300000", "9000,100,8000,200,0,300000", "4e5,0,4e5,0,9e5,3e5"])
def test_a_measured_volume_of_no_person_fails_its_scan(cells: str, rows: Rows, tmp_path: Path) -> None:
    """As one that a table states does."""
    (tmp_path / "volumes.csv").write_text(f"{','.join(COLUMNS)}\nsub-00,{cells}\n")
    with pytest.raises(BundleError, match=r"1 impossible (ventricular|brain)_vol_mm3 \(sub-00\)"):
        rows(write_bids(tmp_path / "raw", 1), None, tmp_path / "volumes.csv", LIMITS)


def test_the_skull_must_hold_the_brain(rows: Rows, tmp_path: Path) -> None:
    cells = "sub-00,9000,100,8000,200,900000,300000,917300"
    (tmp_path / "volumes.csv").write_text(f"{','.join([*COLUMNS, 'total intracranial'])}\n{cells}\n")
    with pytest.raises(BundleError, match="1 of 1 scans failed"):
        rows(write_bids(tmp_path / "raw", 1), None, tmp_path / "volumes.csv")
    assert "impossible intracranial volume" in (tmp_path / "dataset/logs/sub-00.json").read_text()


def test_one_head_is_measured_on_one_scale() -> None:
    """The segmenter's volumes, and those of the label map that it draws, as `segment` writes it."""
    image = nib.load(TEMPLATE / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz")
    step = image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    volume = np.asarray(image.dataobj, np.float32)[::2, ::2, ::2] / np.asarray(image.dataobj).max()
    grid = Grid(volume.shape, np.diag(step)[:3].tolist(), step[:3, 3].tolist())
    segmenter = shipped_segmenter()
    shares = segmenter.shares(volume, grid)
    own = summarised(segmenter.volumes(shares, grid))
    codes = segmenter.labels(shares, grid)
    counts = {name: 8.0 * np.isin(codes, CODES[name]).sum() for name in INTRACRANIAL}
    found = counted_structures(codes, 8.0).conditions("the template")
    assert found["brain_vol"] == pytest.approx(own["brain_vol_mm3"], rel=0.04)
    assert found["brain_vol"] == pytest.approx(summarised(counts)["brain_vol_mm3"], rel=1e-6)


def test_the_own_network_is_asked(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("scripts.measuring.segmenter")
    module.brain_volumes = lambda volume, grid: {  # type: ignore[attr-defined]
        "ventricular_vol_mm3": 1000.0 * (volume.shape == grid.shape),
        "brain_vol_mm3": 1.3e6,
    }
    module.SHIPPED = tmp_path / "weights"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scripts.measuring.segmenter", module)
    row = rows(write_bids(tmp_path / "raw", 1), "own", own=OwnSegmenter())[0]
    assert (float(row["ventricular_vol_mm3"]), float(row["brain_vol_mm3"])) == (1000.0, 1.3e6)


def test_ways_that_are_none_are_refused(target: TargetSpace, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no 'synth'; there are labels"):
        MeasureVolumes(target, CONDITIONS, "synth", None, {"labels": LabelsBeside()})
    with pytest.raises(BundleError, match="give one of them"):
        MeasureVolumes(target, CONDITIONS, "labels", tmp_path, {"labels": LabelsBeside()})
    with pytest.raises(BundleError, match="no folder of label maps"):
        GivenVolumes(tmp_path / "nowhere")


def test_learned_ranges_go_along_with_latents(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/conditions.json").write_text('{"conditions::age::minimum": 50.5}')
    carry_over(tmp_path / "dataset", tmp_path / "latents")
    with pytest.raises(BundleError, match="the minimum of age_years in this dataset is 50.5, and 44"):
        check_learned_ranges(tmp_path / "latents", CONDITIONS)
    (tmp_path / "dataset/conditions.json").write_text("[1]")
    with pytest.raises(BundleError, match="prepare the dataset again"):
        carry_over(tmp_path / "dataset", tmp_path / "latents")
    (tmp_path / "dataset/conditions.json").unlink()
    carry_over(tmp_path / "dataset", tmp_path / "latents")
    check_learned_ranges(tmp_path / "latents", CONDITIONS)
