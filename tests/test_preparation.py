# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Preparation of raw scans: the pose that is recovered, what is refused and said, and what a second run does."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from preparing import BRAIN, CONDITIONS, HEAD, coarse_template, save, steps
from scipy.spatial.transform import Rotation
from stand_ins import Holds, KnownPose, LiesAt, Way, pass_on

from scripts.core.errors import BundleError
from scripts.core.tables import read_table, write_table
from scripts.preparation.optional_steps import SuperResolve, UniRes
from scripts.preparation.registration import Registration, Scan, load_template, register, resample, seen_fraction
from scripts.preparation.run import Preparation
from scripts.preparation.steps import (
    FromDarkest,
    Record,
    Register,
    Reorient,
    TargetSpace,
    scale_intensities,
    step_identity,
)
from scripts.volumes.grid import Grid
from scripts.volumes.scans import load_scan

GRID = Grid([40, 56, 40], [-4.0, 4.0, 4.0], [79.0, -124.0, -59.0])


def rigid(angles: tuple[float, float, float], shift: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


MOTION = rigid((8, 3, -5), (4, -6, 9))


def scanned(head: Scan, pose: np.ndarray, spacing: tuple[float, float, float], axes: str, size: float = 250.0) -> Scan:
    """The head as a scanner with voxels of `spacing` in order `axes` would see it, moved by `pose`."""
    shape = np.ceil(size / np.array(spacing)).astype(int)
    codes = nib.orientations.axcodes2ornt(axes)
    affine = np.zeros((4, 4))
    for column, (axis, sign) in enumerate(codes):
        affine[int(axis), column] = sign * spacing[column]
    affine[:, 3] = [0, -15, 20, 1]
    affine[:3, 3] -= affine[:3, :3] @ (shape - 1) / 2
    affine = pose @ affine
    return Scan(resample(head, np.linalg.inv(pose), tuple(shape), affine, order=1), affine)


@pytest.fixture(scope="module")
def head() -> Scan:
    return load_scan(HEAD)


@pytest.fixture(scope="module")
def coarse(head: Scan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Template, brain mask and a scan, moved by `MOTION`, at 4 mm."""
    folder = tmp_path_factory.mktemp("coarse")
    moved = scanned(head, MOTION, (3.0, 3.0, 3.0), "LAS", 220.0)
    scan = save(folder / "scan.nii.gz", (moved.data * 900 + 12).astype(np.int16), moved.affine)
    return {**coarse_template(folder), "scan": scan}


@pytest.fixture
def prepare(coarse: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Runs the preparation at 4 mm, its registration left out; returns the dataset's folder."""

    def run(table: Path | None = None, input_dir: Path | None = None, **options: Any) -> Path:
        space = TargetSpace(GRID, coarse["template"], coarse["template_brain"])
        found = {**steps(space), **options}
        Preparation(space, found, CONDITIONS, input_dir, table, tmp_path / "dataset", {}).run()
        return tmp_path / "dataset"

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("angles", "shift", "spacing", "axes"),
    [
        ((12, -6, 9), (15, -20, 30), (1.0, 1.2, 1.0), "LPI"),
        ((-18, 4, -7), (-8, 25, -40), (2.5, 1.0, 1.0), "SAR"),
        ((75, 0, 80), (5, 5, 5), (1.0, 1.0, 1.0), "RAS"),
    ],
)
def test_pose_is_recovered(
    head: Scan,
    tmp_path: Path,
    angles: tuple[float, float, float],
    shift: tuple[float, float, float],
    spacing: tuple[float, float, float],
    axes: str,
) -> None:
    pose = rigid(angles, shift)
    seen = scanned(head, pose, spacing, axes)
    path = save(tmp_path / "scan.nii.gz", np.rint(seen.data * 1500).astype(np.int16), seen.affine)
    found = register(load_scan(path), load_template(HEAD, BRAIN), seed=1, enough=0.4)
    error = np.linalg.inv(pose) @ found.rigid
    assert np.degrees(Rotation.from_matrix(error[:3, :3]).magnitude()) < 1.0
    assert np.linalg.norm(error @ [0, -18, 10, 1] - [0, -18, 10, 1]) < 1.0
    assert found.similarity > 0.9


def test_a_head_lies_on_the_template_and_its_left_stays_left(
    prepare: Callable[..., Path], coarse: dict[str, Path], tmp_path: Path
) -> None:
    """A bright spot in the left hemisphere lies at negative x in the prepared volume; the file's axes are PIR."""
    scan = nib.load(coarse["scan"])
    data = scan.get_fdata().astype(np.float32)
    spot = np.linalg.inv(scan.affine) @ MOTION @ [-40, -20, 20, 1]
    data[tuple(slice(i - 2, i + 3) for i in np.rint(spot[:3]).astype(int))] = 5000
    axes = nib.orientations.io_orientation(scan.affine), nib.orientations.axcodes2ornt("PIR")
    turned = nib.Nifti1Image(data, scan.affine).as_reoriented(nib.orientations.ornt_transform(*axes))
    save(tmp_path / "scan.nii.gz", turned.get_fdata().astype(np.float32), turned.affine)
    write_table(tmp_path / "participants.tsv", [{"participant_id": "sub-1", "path": "scan.nii.gz"}])
    dataset = prepare(tmp_path / "participants.tsv", register=LiesAt(MOTION.tolist()))
    image = nib.load(dataset / "sub-1/anat/sub-1_space-MNI152_T1w.nii.gz")
    assert image.shape == GRID.shape and image.get_data_dtype() == np.uint8
    assert np.allclose(image.get_sform(), GRID.affine) and np.allclose(image.get_qform(), GRID.affine, atol=1e-4)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 4
    got = image.get_fdata()
    template = load_template(coarse["template"], coarse["template_brain"])
    wanted = resample(template.head, np.eye(4), GRID.shape, GRID.affine, order=1)
    brain = template.brain_on(GRID.shape, GRID.affine)
    world = apply_affine(GRID.affine, np.moveaxis(np.indices(GRID.shape), 0, -1))
    brain &= np.linalg.norm(world - [-40, -20, 20], axis=-1) > 20
    assert got.min() == 0 and got.max() <= 1 and np.corrcoef(wanted[brain], got[brain])[0, 1] > 0.9
    bright = apply_affine(image.affine, np.argwhere(got >= 0.999))
    assert (np.linalg.norm(bright - [-40, -20, 20], axis=1) < 8).sum() >= 4
    assert not (np.linalg.norm(bright - [40, -20, 20], axis=1) < 8).any()


def test_a_cut_field_of_view_is_flagged(
    prepare: Callable[..., Path],
    head: Scan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = scanned(head, np.eye(4), (3.0, 3.0, 3.0), "RAS", 220.0)
    voxel = np.linalg.inv(whole.affine) @ [0, 0, 55, 1]
    save(tmp_path / "scan.nii.gz", whole.data[:, :, : int(voxel[2])] * 100, whole.affine)
    write_table(tmp_path / "participants.tsv", [{"participant_id": "sub-1", "path": "scan.nii.gz"}])
    row = read_table(prepare(tmp_path / "participants.tsv") / "participants.tsv")[0]
    assert row["field_of_view"] == "cut" and 0.7 < float(row["brain_seen"]) < 0.98
    assert "outside its field of view" in capsys.readouterr().out


def test_what_does_not_match_is_refused(coarse: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.preparation.steps.register", lambda *_: Registration(np.eye(4), 0.9, 0.24))
    scan, step = load_scan(coarse["scan"]), Register(TargetSpace(GRID, coarse["template"], coarse["template_brain"]))
    with pytest.raises(BundleError, match="does not match the template"):
        step(Record("noise", scan, scan))
    with pytest.raises(BundleError, match="before the scan is registered|before it is registered"):
        Record("noise", scan, scan).registered()


def test_seen_fraction_counts_voxels() -> None:
    scan = Scan(np.zeros((10, 10, 10), np.float32), np.eye(4))
    mask = np.ones((10, 10, 10), bool)
    shifted = np.eye(4)
    shifted[0, 3] = 5.0
    assert seen_fraction(scan, np.eye(4), mask, np.eye(4)) == 1.0
    assert seen_fraction(scan, shifted, mask, np.eye(4)) == 0.5


def test_intensities_do_not_depend_on_unit_offset_or_fat() -> None:
    generator = np.random.default_rng(0)
    brain = np.zeros((40, 40, 40), bool)
    brain[5:35, 5:35, 5:35] = True
    grid = Grid((40, 40, 40), (1, 1, 1), (0, 0, 0))
    image = np.where(brain, 500 + 100 * generator.random(brain.shape), 0.0)
    fatty = image.copy()
    fatty[0, :, :] = 9000
    first = scale_intensities(image, brain, grid, 99.8, 0.8)
    assert first.min() == 0 and abs(np.percentile(first[brain], 99.8) - 0.8) < 0.01
    assert np.allclose(first, scale_intensities(image * 7 + 30, brain, grid, 99.8, 0.8), atol=1e-6)
    assert np.allclose(first[1:], scale_intensities(fatty, brain, grid, 99.8, 0.8)[1:])
    assert scale_intensities(fatty, brain, grid, 99.8, 0.8).max() == 1
    with pytest.raises(BundleError, match="dark where the template has its brain"):
        scale_intensities(np.where(brain, 0.0, 1.0), brain, grid, 99.8, 0.8)


def sheared() -> np.ndarray:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 1] = 0.5
    return affine


GOOD = np.arange(60**3, dtype=np.float32).reshape(60, 60, 60)
THREE = np.diag([3.0, 3.0, 3.0, 1.0])


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (np.repeat(GOOD[..., None], 2, axis=3), THREE, "shape 60 x 60 x 60 x 2"),
        (GOOD[0], THREE, "not 3D"),
        (GOOD[:, :, :1], THREE, "at least 2 voxels"),
        (np.zeros_like(GOOD), THREE, "all zero"),
        (np.full_like(GOOD, 7), THREE, "constant"),
        (np.where(GOOD == GOOD[30, 30, 30], np.nan, GOOD), THREE, "NaN or infinity in 1 voxels"),
        (np.where(abs(GOOD - GOOD[30, 30, 30]) < 2, np.inf, GOOD), THREE, "NaN or infinity in 3 voxels"),
        (GOOD, np.diag([3.0, 0.0, 3.0, 1.0]), "singular"),
        (GOOD, np.diag([np.nan, 3.0, 3.0, 1.0]), "affine holds NaN"),
        (GOOD, np.diag([0.01, 3.0, 3.0, 1.0]), "voxel size of 0.01 x 3 x 3 mm"),
        (GOOD, np.diag([50.0, 3.0, 3.0, 1.0]), "voxel size"),
        (GOOD, np.diag([1.0, 3.0, 3.0, 1.0]), "covers 60 x 180 x 180 mm"),
        (GOOD, sheared(), "shears"),
        (GOOD + 1j, THREE, "complex"),
    ],
)
def test_bad_scan_is_refused(tmp_path: Path, data: np.ndarray, affine: np.ndarray, message: str) -> None:
    path = tmp_path / "scan.nii"
    image = nib.Nifti1Image(data, THREE)
    for row, name in zip(affine, ("srow_x", "srow_y", "srow_z")):
        image.header[name] = row
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    image.to_filename(path) if np.allclose(affine, THREE) else _save_with_header(image, path)
    with pytest.raises(BundleError, match=message) as caught:
        load_scan(path)
    assert "scan.nii" in str(caught.value)


def _save_with_header(image: nib.Nifti1Image, path: Path) -> None:
    """Write a header as it is: nibabel mends a damaged affine when it saves an image."""
    with open(path, "wb") as file:
        image.header["magic"], image.header["vox_offset"] = b"n+1", 352
        image.header.write_to(file)
        file.write(b"\0" * (352 - file.tell()))
        file.write(np.asarray(image.dataobj, np.float32).tobytes(order="F"))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for name in ("text.nii.gz", "scan.mnc"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty.nii").write_bytes(b"")
    nib.save(nib.Nifti1Image(GOOD, None), tmp_path / "lost.nii.gz")
    unoriented = nib.MGHImage(GOOD, THREE)
    unoriented.header["goodRASFlag"] = 0
    nib.save(unoriented, tmp_path / "lost.mgz")
    save(tmp_path / "scan.nii", GOOD, THREE)
    (tmp_path / "short.nii").write_bytes((tmp_path / "scan.nii").read_bytes()[:5000])
    packed = bytearray(gzip.compress((tmp_path / "scan.nii").read_bytes(), compresslevel=0))
    (tmp_path / "unsigned.nii.gz").write_bytes(packed[:-4])
    packed[len(packed) // 2] ^= 1
    (tmp_path / "flipped.nii.gz").write_bytes(packed)
    nib.save(nib.MGHImage(GOOD, THREE), tmp_path / "whole.mgz")
    (tmp_path / "short.mgz").write_bytes((tmp_path / "whole.mgz").read_bytes()[:5000])
    for name, message in (
        ("gone.nii", "is not there"),
        ("text.nii.gz", "cannot be read"),
        ("empty.nii", "cannot be read"),
        ("short.nii", "truncated"),
        ("short.mgz", "truncated"),
        ("unsigned.nii.gz", "truncated or damaged"),
        ("flipped.nii.gz", "truncated or damaged: CRC"),
        ("lost.nii.gz", "no orientation"),
        ("lost.mgz", "no orientation"),
        ("scan.mnc", "neither NIfTI nor MGH"),
    ):
        with pytest.raises(BundleError, match=message):
            load_scan(tmp_path / name)


@pytest.mark.parametrize("size", [0.0, -3.0, np.nan])
def test_a_voxel_size_that_is_none_is_refused(tmp_path: Path, size: float) -> None:
    """In the header's own words: its affine may look right all the same, and nibabel would mend it in silence."""
    image = nib.Nifti1Image(GOOD, THREE)
    image.set_sform(THREE, 1)
    image.header["pixdim"][2] = size
    _save_with_header(image, tmp_path / "scan.nii")
    with pytest.raises(BundleError, match="voxel size of 3 x .* x 3 mm"):
        load_scan(tmp_path / "scan.nii")


def test_a_fourth_axis_of_one_volume_is_dropped(tmp_path: Path) -> None:
    assert load_scan(save(tmp_path / "scan.nii", GOOD[..., None], THREE)).data.shape == (60, 60, 60)


def test_a_step_is_known_by_its_settings_and_version_and_one_from_outside_by_its_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert step_identity(FromDarkest(0.2)) == {"version": 1, "percentile": 0.2}
    assert step_identity(KnownPose()) == {"version": 1, "step": "stand_ins.KnownPose", "scale": 1.0}
    monkeypatch.setattr(FromDarkest, "version", 2, raising=False)
    assert step_identity(FromDarkest(0.2)) == {"version": 2, "percentile": 0.2}


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ((1, 99), [1, 99]),
        ([[0.5, None], ("a", True)], [[0.5, None], ["a", True]]),
        ({"low": {1: np.int16(2)}, "high": [np.float32(0.5)]}, {"low": {"1": 2}, "high": [0.5]}),
        (np.bool_(True), True),
        (Way(3), {"class": "Way", "version": 1, "step": "stand_ins.Way", "strength": 3}),
    ],
)
def test_all_that_a_step_from_outside_holds_stands_in_its_settings(held: Any, told: Any) -> None:
    as_field, as_keyword = step_identity(Holds(held)), step_identity(functools.partial(pass_on, named=held))
    assert as_field == {"version": 1, "step": "stand_ins.Holds", "held": told}
    assert as_keyword == {"version": 1, "step": "stand_ins.pass_on", "named": told}
    assert step_identity(functools.partial(pass_on, held))["args"] == [told]
    assert step_identity(Holds(held).__call__)["held"] == told
    assert json.loads(json.dumps(as_field)) == as_field


@pytest.mark.parametrize("held", [np.zeros(2), {"inner": [Path("a")]}, {1, 2}, pass_on, Way, 1j, Reorient()])
def test_a_step_from_outside_that_holds_what_cannot_be_told_is_refused(held: Any) -> None:
    with pytest.raises(BundleError, match=r"stand_ins\.Holds: .*`held`.* a method settings\(\)"):
        step_identity(Holds(held))


def test_the_space_of_a_step_is_told_by_the_sidecar_itself(coarse: dict[str, Path]) -> None:
    space = TargetSpace(GRID, coarse["template"], coarse["template_brain"])
    assert step_identity(Holds(space)) == {"version": 1, "step": "stand_ins.Holds"}
    assert step_identity(Register(space)).keys() == {"version", "seed", "enough_similarity", "min_similarity"}


def test_what_a_step_keeps_of_its_work_is_no_setting() -> None:
    class Keeps:
        def __init__(self, size: int) -> None:
            self.size = size

        @functools.cached_property
        def table(self) -> np.ndarray:
            return np.zeros(self.size)

    step = Keeps(2)
    before = step_identity(step)
    assert step.table.size == before["size"] == 2 and step_identity(step) == before


def test_steps_of_the_package_keep_the_settings_that_they_had() -> None:
    settings = {"version": 1, "method": "unires", "command": "unires", "device": "cuda", "voxel": 1.0}
    assert step_identity(SuperResolve("unires", {"unires": UniRes()})) == settings
    further = SuperResolve("unires", {"unires": UniRes(options=["--reg_scl", "10"])})
    assert step_identity(further) == {**settings, "options": ["--reg_scl", "10"]}
