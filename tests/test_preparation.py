# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Preparation of raw scans: the pose that is recovered, what is refused and said, and what a second run does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from scripts.conditions import Conditions
from scripts.errors import BundleError
from scripts.grid import Grid
from scripts.preparation import Preparation, scale_intensities
from scripts.registration import Scan, load_template, register, resample, seen_fraction
from scripts.scans import load_scan
from scripts.tables import read_table, write_table

ROOT = Path(__file__).resolve().parent.parent
HEAD = ROOT / "models/template/tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
BRAIN = ROOT / "models/template/tpl-MNI152NLin2009cAsym_res-01_desc-brain_mask.nii.gz"
GRID = Grid([40, 56, 40], [-4.0, 4.0, 4.0], [79.0, -124.0, -59.0])
CONDITIONS = Conditions(
    gender={"raw": "sex", "unit": "", "minimum": 0, "maximum": 1, "codes": {"female": 0, "male": 1}},
    age={"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82},
)


def rigid(angles: tuple[float, float, float], shift: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


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


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def save(path: Path, data: np.ndarray, affine: np.ndarray | None, code: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, code)
    image.set_qform(image.affine, code)
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def head() -> Scan:
    return load_scan(HEAD)


@pytest.fixture(scope="module")
def coarse(head: Scan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Template, brain mask and a scan at 4 mm, with which a registration takes seconds."""
    folder = tmp_path_factory.mktemp("coarse")
    shape, affine = (44, 56, 45), np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-88, -128, -78)
    blurred = resample(head, np.eye(4), shape, affine, order=1)
    brain = resample(load_scan(BRAIN), np.eye(4), shape, affine, order=1)
    moved = scanned(head, rigid((8, 3, -5), (4, -6, 9)), (3.0, 3.0, 3.0), "LAS", 220.0)
    return {
        "template": save(folder / "head.nii.gz", blurred, affine, 4),
        "template_brain": save(folder / "brain.nii.gz", brain, affine, 4),
        "scan": save(folder / "scan.nii.gz", (moved.data * 900 + 12).astype(np.int16), moved.affine),
    }


@pytest.fixture
def prepare(coarse: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Runs the preparation at 4 mm; returns the dataset's folder."""

    def run(table: Path | None = None, input_dir: Path | None = None, **options: Any) -> Path:
        arguments: dict[str, Any] = {
            "grid": GRID,
            "conditions": CONDITIONS,
            "input_dir": input_dir,
            "input_table": table,
            "dataset_dir": tmp_path / "dataset",
            "template": coarse["template"],
            "template_brain": coarse["template_brain"],
            "columns": {"age_years": ["age_years", "age"]},
            "settings": {},
        }
        Preparation(**{**arguments, **options}).run()
        return tmp_path / "dataset"

    return run


@pytest.mark.parametrize(
    ("angles", "shift", "spacing", "axes"),
    [
        ((12, -6, 9), (15, -20, 30), (1.0, 1.2, 1.0), "LPI"),
        ((-18, 4, -7), (-8, 25, -40), (2.5, 1.0, 1.0), "SAR"),
        pytest.param((75, 0, 80), (5, 5, 5), (1.0, 1.0, 1.0), "RAS", marks=pytest.mark.slow),
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


def test_left_stays_left(prepare: Callable[..., Path], coarse: dict[str, Path], tmp_path: Path) -> None:
    """A bright spot in the left hemisphere lies at negative x in the prepared volume, whatever the file's axes."""
    scan = nib.load(coarse["scan"])
    pose = rigid((8, 3, -5), (4, -6, 9))
    for axes in ("LAS", "PIR"):
        data = scan.get_fdata().astype(np.float32)
        spot = np.rint(np.linalg.inv(scan.affine) @ pose @ [-40, -20, 20, 1]).astype(int)
        data[tuple(slice(i - 2, i + 3) for i in spot[:3])] = 5000
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(scan.affine), nib.orientations.axcodes2ornt(axes)
        )
        turned = nib.Nifti1Image(data, scan.affine).as_reoriented(turn)
        save(tmp_path / axes / "scan.nii.gz", turned.get_fdata().astype(np.float32), turned.affine)
    rows = [{"participant_id": f"sub-{axes}", "path": f"{axes}/scan.nii.gz"} for axes in ("LAS", "PIR")]
    write_table(tmp_path / "participants.tsv", rows)
    dataset = prepare(tmp_path / "participants.tsv")
    for row in read_table(dataset / "participants.tsv"):
        image = nib.load(dataset / row["path"])
        inside = np.argwhere(image.get_fdata() >= 0.999)
        world = apply_affine(image.affine, inside)
        near = world[np.linalg.norm(world - [-40, -20, 20], axis=1) < 8]
        assert len(near) >= 4
        assert not len(world[np.linalg.norm(world - [40, -20, 20], axis=1) < 8])


def test_dataset_is_as_promised(prepare: Callable[..., Path], coarse: dict[str, Path], tmp_path: Path) -> None:
    raw = tmp_path / "bids"
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz"):
        (raw / name).parent.mkdir(parents=True)
        (raw / name).write_bytes(coarse["scan"].read_bytes())
    (raw / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t63\tF\nsub-02\tn/a\t1\n")
    dataset = prepare(input_dir=raw)
    rows = read_table(dataset / "participants.tsv")
    assert [(row["participant_id"], row["sex"], row["age_years"]) for row in rows] == [
        ("sub-01", "female", "63"),
        ("sub-02", "male", "n/a"),
    ]
    assert rows[1]["path"] == "sub-02/ses-a/anat/sub-02_ses-a_space-MNI152_T1w.nii.gz"
    assert all(float(row["similarity"]) > 0.9 and row["field_of_view"] == "whole" for row in rows)
    image = nib.load(dataset / rows[0]["path"])
    assert image.shape == GRID.shape
    assert np.allclose(image.get_sform(), GRID.affine) and np.allclose(image.get_qform(), GRID.affine, atol=1e-4)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 4
    assert image.get_data_dtype() == np.uint8 and image.get_fdata().min() == 0 and image.get_fdata().max() <= 1
    assert np.array_equal(image.get_fdata(), nib.load(dataset / rows[1]["path"]).get_fdata())
    assert (dataset / "figures/sub-01.png").is_file()
    assert json.loads((dataset / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    sidecar = json.loads((dataset / rows[0]["path"].replace(".nii.gz", ".json")).read_text())
    assert len(sidecar["source_sha256"]) == len(sidecar["template"]["sha256"]) == 64


def test_prepared_head_lies_on_the_template(
    prepare: Callable[..., Path], coarse: dict[str, Path], tmp_path: Path
) -> None:
    write_table(tmp_path / "participants.tsv", [{"participant_id": "sub-1", "path": str(coarse["scan"])}])
    dataset = prepare(tmp_path / "participants.tsv")
    template = load_template(coarse["template"], coarse["template_brain"])
    wanted = resample(template.head, np.eye(4), GRID.shape, GRID.affine, order=1)
    got = nib.load(dataset / "sub-1/anat/sub-1_space-MNI152_T1w.nii.gz").get_fdata()
    brain = template.brain_on(GRID.shape, GRID.affine)
    assert np.corrcoef(wanted[brain], got[brain])[0, 1] > 0.95
    assert np.corrcoef(wanted[::-1][brain], got[brain])[0, 1] < np.corrcoef(wanted[brain], got[brain])[0, 1]


def test_bad_scans_are_listed_and_good_ones_kept(
    prepare: Callable[..., Path], coarse: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "good.nii.gz").write_bytes(coarse["scan"].read_bytes())
    (raw / "cut.nii.gz").write_bytes(coarse["scan"].read_bytes()[:40000])
    noise = np.random.default_rng(0).random((60, 60, 60)).astype(np.float32)
    save(raw / "noise.nii.gz", noise, np.diag([3.0, 3.0, 3.0, 1.0]))
    table = "participant_id\tpath\tage\nsub-1\tgood.nii.gz\t70\nsub-2\tcut.nii.gz\t70\nsub-3\tgone.nii.gz\t70\n"
    table += "sub-4\tnoise.nii.gz\t70\nsub-5\tgood.nii.gz\told\n"
    (raw / "participants.tsv").write_text(table)
    with pytest.raises(BundleError, match=r"4 of 5 scans failed: sub-2, sub-3, sub-4, sub-5; see .*failures\.tsv"):
        prepare(input_dir=raw)
    dataset = tmp_path / "dataset"
    assert [row["participant_id"] for row in read_table(dataset / "participants.tsv")] == ["sub-1"]
    reasons = {row["participant_id"]: row["reason"] for row in read_table(dataset / "failures.tsv")}
    assert "truncated" in reasons["sub-2"] and "No such file" in reasons["sub-3"]
    assert "similarity" in reasons["sub-4"] and "'old'" in reasons["sub-5"]
    assert sorted(path.name for path in dataset.glob("sub-*")) == ["sub-1"]
    shown = capsys.readouterr()
    assert all(f"failed: sub-{n}" in shown.out + shown.err for n in (2, 3, 4, 5))


def test_a_second_run_does_only_what_is_missing(
    prepare: Callable[..., Path], coarse: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / "participants.tsv", [{"participant_id": "sub-1", "path": str(coarse["scan"])}])
    dataset = prepare(tmp_path / "participants.tsv")
    table = (dataset / "participants.tsv").read_text()
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return register(*arguments)

    monkeypatch.setattr("scripts.preparation.register", counted)
    prepare(tmp_path / "participants.tsv")
    assert not calls and (dataset / "participants.tsv").read_text() == table
    volume = dataset / "sub-1/anat/sub-1_space-MNI152_T1w.nii.gz"
    first = volume.read_bytes()
    prepare(tmp_path / "participants.tsv", overwrite=True)
    assert len(calls) == 1 and gzip.decompress(volume.read_bytes()) == gzip.decompress(first)
    prepare(tmp_path / "participants.tsv", settings={"level": 0.7})
    assert len(calls) == 2 and gzip.decompress(volume.read_bytes()) != gzip.decompress(first)


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
        (GOOD[0], THREE, "three axes"),
        (GOOD[:, :, :1], THREE, "at least 2 voxels"),
        (np.zeros_like(GOOD), THREE, "all zero"),
        (np.full_like(GOOD, 7), THREE, "constant"),
        (np.where(GOOD == 5, np.nan, GOOD), THREE, "NaN or infinity in 1 voxels"),
        (np.where(GOOD < 3, np.inf, GOOD), THREE, "NaN or infinity in 3 voxels"),
        (GOOD, np.diag([3.0, 0.0, 3.0, 1.0]), "singular"),
        (GOOD, np.diag([np.nan, 3.0, 3.0, 1.0]), "affine holds NaN"),
        (GOOD, np.diag([0.01, 3.0, 3.0, 1.0]), "voxel size of 0.01 x 3 x 3 mm"),
        (GOOD, np.diag([50.0, 3.0, 3.0, 1.0]), "voxel size"),
        (GOOD, np.diag([1.0, 3.0, 3.0, 1.0]), "covers 60 x 180 x 180 mm"),
        (GOOD, sheared(), "shears"),
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
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "empty.nii").write_bytes(b"")
    save(tmp_path / "lost.nii.gz", GOOD, None, code=0)
    save(tmp_path / "scan.nii", GOOD, THREE)
    (tmp_path / "short.nii").write_bytes((tmp_path / "scan.nii").read_bytes()[:5000])
    for name, message in (
        ("gone.nii", "no such file"),
        ("text.nii.gz", "cannot be read"),
        ("empty.nii", "cannot be read"),
        ("short.nii", "truncated"),
        ("lost.nii.gz", "no orientation"),
        ("scan.mnc", "not a NIfTI file"),
    ):
        with pytest.raises(BundleError, match=message):
            load_scan(tmp_path / name)


def test_a_fourth_axis_of_one_volume_is_dropped(tmp_path: Path) -> None:
    assert load_scan(save(tmp_path / "scan.nii", GOOD[..., None], THREE)).data.shape == (60, 60, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to prepare"),
        ({"settings": {"percentile": 0}}, "percentile"),
        ({"settings": {"levl": 1}}, "levl"),
        ({"columns": {"age_yeers": "age"}}, "age_yeers"),
    ],
)
def test_bad_requests_are_refused(
    prepare: Callable[..., Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_table(tmp_path / "participants.tsv", [{"participant_id": "sub-1", "path": "scan.nii.gz"}])
    with pytest.raises(BundleError, match=message):
        prepare(tmp_path / "participants.tsv" if options else None, **options)


@pytest.mark.parametrize("name", ["../sub-1", "sub 1", "", "sub/1"])
def test_participant_names_cannot_leave_the_dataset(
    prepare: Callable[..., Path], tmp_path: Path, name: str, coarse: dict[str, Path]
) -> None:
    (tmp_path / "participants.tsv").write_text(f"participant_id\tpath\n{name}\t{coarse['scan']}\n")
    with pytest.raises(BundleError, match="1 of 1 scans failed"):
        prepare(tmp_path / "participants.tsv")
    assert "letters and digits" in read_table(tmp_path / "dataset" / "failures.tsv")[0]["reason"]


def test_two_scans_of_one_name_are_refused(
    prepare: Callable[..., Path], tmp_path: Path, coarse: dict[str, Path]
) -> None:
    row = {"participant_id": "sub-1", "path": str(coarse["scan"])}
    write_table(tmp_path / "participants.tsv", [row, row])
    with pytest.raises(BundleError, match="sub-1 is there twice"):
        prepare(tmp_path / "participants.tsv")
