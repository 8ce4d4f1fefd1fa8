# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures, the quality page with its list of exclusions, and results carried back to native space."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from PIL import Image
from scipy.spatial.transform import Rotation

from scripts.core.errors import BundleError
from scripts.preparation.exclusions import Exclusions
from scripts.preparation.native_space import carry_back, read_transform, to_native
from scripts.preparation.quality_page import flags, scan_name, write_page
from scripts.preparation.quality_pictures import BRAIN_COLOUR, QualityPictures
from scripts.preparation.registration import Template, resample
from scripts.volumes.grid import Grid
from scripts.volumes.scans import Scan

GRID = Grid((40, 56, 40), (-4.0, 4.0, 4.0), (78.0, -126.0, -60.0))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def template() -> Template:
    """Two balls: a head and the brain in it."""
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-80, -128, -64)
    world = apply_affine(affine, np.indices((41, 56, 42)).reshape(3, -1).T)
    radius = np.linalg.norm(world - (0, -18, 10), axis=1).reshape(41, 56, 42)
    return Template(*(Scan((radius < r).astype(np.float32), affine) for r in (72.0, 56.0)))


def volume_of(template: Template) -> np.ndarray:
    return resample(template.brain, np.eye(4), GRID.shape, GRID.affine, order=1)


def test_outlines_lie_on_the_surfaces(template: Template) -> None:
    """Drawn at the head's size: red on the rim of a brain of that size, in each of the three planes."""
    pictures = QualityPictures(template, height=160)
    volume = volume_of(template)
    for scale, fits in ((1.0, True), (0.8, False)):
        pixels = pictures.picture(volume, GRID, scale)
        red = (pixels == BRAIN_COLOUR).all(axis=2)
        assert all(part.sum() > 100 for part in np.array_split(red, 3, axis=1))
        grey = QualityPictures(template, height=160).picture(volume, GRID, 3.0)[..., 0]  # outlines out of the frame
        rim = (grey > 40) & (grey < 215)
        assert bool((red & rim).sum() > 0.7 * red.sum()) is fits


def test_pictures_and_thumbnails_are_written(template: Template, tmp_path: Path) -> None:
    QualityPictures(template).write(tmp_path / "figures", "sub-01_ses-2", volume_of(template), GRID, 0.9)
    sizes = [Image.open(tmp_path / "figures" / part / "sub-01_ses-2.jpg").size for part in (".", "thumbnails")]
    assert sizes[0][1] == 320 and sizes[1][1] == 96
    assert (tmp_path / "figures/thumbnails/sub-01_ses-2.jpg").stat().st_size < 12000


ROWS = [
    {
        "participant_id": f"sub-{n:02d}",
        "path": f"sub-{n:02d}/anat/sub-{n:02d}_space-MNI152_T1w.nii.gz",
        "similarity": str(0.3 + n / 20),
        "field_of_view": "cut" if n == 3 else "whole",
        "site": "</script><b>A&B",
    }
    for n in range(1, 6)
]
FAILURES = [
    {
        "participant_id": "sub-06",
        "path": "/raw/six.nii.gz",
        "reason": "/raw/six.nii.gz: holds NaN or infinity in 5 voxels",
    },
    {
        "participant_id": "sub-07",
        "path": "/raw/7.nii.gz",
        "reason": "/raw/7.nii.gz: holds NaN or infinity in 81 voxels",
    },
    {"participant_id": "sub-08", "path": "gone.nii.gz", "reason": "gone.nii.gz: no such file"},
]


def test_the_page_holds_every_scan_and_reason(tmp_path: Path) -> None:
    (tmp_path / "excluded.txt").write_text("sub-02  # moved\n")
    page = write_page(tmp_path, ROWS, FAILURES, excluded=Exclusions(tmp_path / "excluded.txt")).read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [scan["name"] for scan in data["scans"]] == [f"sub-{n:02d}" for n in range(1, 6)]
    assert data["columns"] == ["similarity", "field_of_view", "site"]
    assert data["scans"][0]["flags"] == ["low similarity"] and data["scans"][2]["flags"] == ["field of view: cut"]
    assert data["scans"][1]["excluded"] == "moved" and data["scans"][0]["values"][2] == "</script><b>A&B"
    assert "<td>2</td><td>holds NaN or infinity in 5 voxels, and the like</td>" in page and "no such file" in page
    assert "{{" not in page and not re.search(r"https?://", page)


def test_flags_are_words() -> None:
    fine = {"similarity": "0.5", "field_of_view": "whole", "orientation": "upright", "header": "none", "sides": "n/a"}
    assert flags(fine) == []
    assert flags({**fine, "orientation": "turned", "similarity": 0.2}) == ["orientation: turned", "low similarity"]
    sizes = {"0.82": True, "0.9": False, "1.16": True, "n/a": False}
    assert {scale: bool(flags({**fine, "head_scale": scale})) for scale in sizes} == sizes
    odd = {"skull": "stripped", "air": "bright", "contrast": "inverted", "largest_voxel_mm": 5.0}
    assert len(flags({**fine, **odd})) == 4 and flags({**fine, "largest_voxel_mm": 1.2, "skull": "on"}) == []
    assert scan_name("a/sub-1_ses-2_space-MNI152_T1w.nii.gz") == "sub-1_ses-2"


def test_exclusions_are_scans_or_participants(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\ufeffsub-01_ses-2 # motion\n\n# a remark\nsub-03\n")
    listed = Exclusions(tmp_path / "list.txt")
    assert listed.reason("sub-01_ses-2", "sub-01") == "motion" and listed.reason("sub-01_ses-1", "sub-01") is None
    assert listed.reason("sub-03_ses-1", "sub-03") == "excluded"
    listed.check(["sub-01_ses-2"], ["sub-03"])
    with pytest.raises(BundleError, match="excludes 'sub-03'"):
        listed.check(["sub-01_ses-2"], ["sub-01"])
    with pytest.raises(BundleError, match="cannot read the list"):
        Exclusions(tmp_path / "gone.txt")
    assert Exclusions(None).reason("sub-1", "sub-1") is None


def shown(page: Path) -> str:
    """The page as a browser has it when its script has run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={page.parent / 'profile'}", f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("begun", "count"), [("sub-02  # moved", 1), ("", 2)])
def test_a_tick_that_was_taken_off_stays_off(tmp_path: Path, begun: str, count: int) -> None:
    """What the browser kept stands in place of the page's list where it began with that list, else beside it."""
    (tmp_path / "excluded.txt").write_text("sub-02  # moved\n")
    page = write_page(tmp_path, ROWS, excluded=Exclusions(tmp_path / "excluded.txt"))
    kept = json.dumps(json.dumps({"begun": begun, "list": "sub-04"}))
    earlier = f"<script>localStorage.setItem('excluded:' + location.pathname, {kept});"
    page.write_text(page.read_text().replace("<script>", earlier, 1))
    assert f"{count} excluded." in shown(page)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_sorts_in_a_browser(template: Template, tmp_path: Path) -> None:
    """Worst first, ticks from the list, 100 of 30,000 rows drawn."""
    many = [{**ROWS[0], "path": f"sub-{n}_T1w.nii.gz", "similarity": str(n / 30000)} for n in range(30000, 0, -1)]
    (tmp_path / "excluded.txt").write_text("sub-2\n")
    write_page(tmp_path, many, excluded=Exclusions(tmp_path / "excluded.txt"))
    dom = shown(tmp_path / "quality.html")
    names = re.findall(r'<td class="name">(.*?)</td>', dom)
    assert len(names) == 100 and names[:3] == ["sub-1", "sub-2", "sub-3"]
    assert "page 1 of 300, 30000 scans" in dom and "1 excluded." in dom


def native() -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """A raw scan's shape and affine, and the rigid motion from the template to it."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", (12, -8, 20), degrees=True).as_matrix()
    motion[:3, 3] = (9, -14, 30)
    affine = motion @ np.array([[0, 0, 3.5, -87], [-3.0, 0, 0, 100], [0, 3.0, 0, -90], [0, 0, 0, 1]])
    return (64, 60, 50), affine, motion


def test_labels_go_to_native_space_and_back() -> None:
    shape, affine, motion = native()
    labels = np.zeros(GRID.shape, np.int16)
    labels[8:32, 10:45, 6:34] = 4
    labels[20:32, 10:45, 6:34] = 43
    there = to_native(labels, GRID.affine, motion, shape, affine, labels=True)
    assert there.shape == shape and set(np.unique(there)) == {0, 4, 43} and there.dtype == np.int16
    again = to_native(there, affine, np.linalg.inv(motion), GRID.shape, GRID.affine, labels=True)
    for code in (4, 43):
        one, other = labels == code, again == code
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.93
        centres = [apply_affine(GRID.affine, np.argwhere(part)).mean(axis=0) for part in (one, other)]
        assert np.linalg.norm(centres[0] - centres[1]) < 0.7


def test_a_smooth_volume_comes_back_as_it_was() -> None:
    shape, affine, motion = native()
    world = apply_affine(GRID.affine, np.indices(GRID.shape).reshape(3, -1).T)
    smooth = np.exp(-((world - (5, -20, 15)) ** 2).sum(axis=1) / (2 * 25.0**2)).reshape(GRID.shape).astype(np.float32)
    there = to_native(smooth, GRID.affine, motion, shape, affine)
    again = to_native(there, affine, np.linalg.inv(motion), GRID.shape, GRID.affine)
    assert np.abs(again - smooth)[8:-8, 8:-8, 8:-8].max() < 0.03


def test_the_command_writes_onto_the_raw_scans_voxels(tmp_path: Path) -> None:
    shape, affine, motion = native()
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), affine), tmp_path / "raw.nii.gz")
    labels = np.zeros(GRID.shape, np.uint8)
    labels[10:30, 20:40, 10:30] = 17
    nib.save(nib.Nifti1Image(labels, GRID.affine), tmp_path / "labels.nii.gz")
    sidecar = tmp_path / "side.json"
    sidecar.write_text(json.dumps({"template_to_scan_mm": motion.tolist()}))
    carry_back(tmp_path / "labels.nii.gz", tmp_path / "raw.nii.gz", sidecar, tmp_path / "out.nii.gz", labels=True)
    got = nib.load(tmp_path / "out.nii.gz")
    assert got.shape == shape and np.allclose(got.affine, affine, atol=1e-4)
    inside = apply_affine(np.linalg.inv(motion) @ got.affine, np.argwhere(got.get_fdata() == 17)).mean(axis=0)
    wanted = apply_affine(GRID.affine, np.argwhere(labels == 17)).mean(axis=0)
    assert np.linalg.norm(inside - wanted) < 0.7
    nib.save(nib.Nifti1Image(np.full(GRID.shape, 0.5, np.float32), GRID.affine), tmp_path / "half.nii.gz")
    with pytest.raises(BundleError, match="holds no labels"):
        carry_back(tmp_path / "half.nii.gz", tmp_path / "raw.nii.gz", sidecar, tmp_path / "out.nii.gz", labels=True)
    sidecar.write_text(json.dumps({"template_to_scan_mm": (2 * np.eye(4)).tolist()}))
    with pytest.raises(BundleError, match="not a rigid"):
        read_transform(sidecar)
    sidecar.write_text("{}")
    with pytest.raises(BundleError, match="no sidecar"):
        read_transform(sidecar)
