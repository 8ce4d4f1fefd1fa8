# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The one door for volumes: where a file says it lies, whether it is whole, and what is refused by name."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.spatial.transform import Rotation

from scripts.core.errors import BundleError
from scripts.volumes.datasets import LoadVolumed, check_headers
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid
from scripts.volumes.headers import Header
from scripts.volumes.labels import LABELS, label_volumes
from scripts.volumes.nifti import write_volume
from scripts.volumes.placing import read_on_grid
from scripts.volumes.reading import read_header, read_image

GRID = Grid((10, 12, 8), (-4.0, 4.0, 4.0), (18.0, -22.0, -14.0))
CODES = ("sform", "qform")


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """Something bright in dark air, 0 to 1, without any symmetry."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.shape), indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.8) ** 2 + (z / 0.75) ** 2 < 1
    return np.where(inside, 0.6 + 0.1 * x + 0.15 * y + 0.1 * z, 0.01).astype(np.float32)


def save(path: Path, data: np.ndarray, sform: np.ndarray = GRID.affine, qform: np.ndarray | None = None) -> Path:
    """A NIfTI file with these forms, under the codes 2 and 1."""
    image = nib.Nifti1Image(data, sform)
    image.set_sform(sform, 2)
    image.set_qform(sform if qform is None else qform, 1)
    nib.save(image, path)
    return path


def patched(path: Path, **fields: object) -> Path:
    """The header's fields as they are given, which nibabel would mend when it saves."""
    packed = path.name.endswith(".gz")
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    raw = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        raw[name] = value
    content = raw.tobytes() + content[348:]
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def refused(path: Path, act: Callable[[Path], object] = read_image) -> str:
    with pytest.raises(BundleError) as caught:
        act(path)
    told = str(caught.value)
    assert str(path) in told and "\n" not in told and len(told) < 600
    return told


@pytest.mark.parametrize("axes", ["RAS", "LAS", "SPL", "AIR"])
def test_a_permutation_or_flip_of_axes_is_undone_by_every_stage(axes: str, head: np.ndarray, tmp_path: Path) -> None:
    order = nib.orientations.ornt_transform(nib.io_orientation(GRID.affine), nib.orientations.axcodes2ornt(axes))
    turned = nib.orientations.apply_orientation(head, order)
    affine = GRID.affine @ nib.orientations.inv_ornt_aff(order, head.shape)
    path = save(tmp_path / "a.nii.gz", turned, affine)
    check_headers([{"image": str(path)}], GRID)
    assert np.array_equal(LoadVolumed("image", GRID)({"image": str(path)})["image"][0], head)
    folder = VolumeFolder(tmp_path, "real_dir")
    assert np.array_equal(folder[0][0, 0], head) and np.allclose(folder.grid_of(0).affine, GRID.affine)
    assert bool(folder.warnings) == (axes != "LAS") == bool(folder.summary()["turned_or_resampled_volumes"])
    plain = save(tmp_path / "b.nii.gz", head)
    both = VolumeFolder(tmp_path, "real_dir")
    assert np.array_equal(both[0], both[1])
    assert (both.hashes[0] == nib_hash(path)) == (axes == "LAS") and both.hashes[1] == nib_hash(plain)


def nib_hash(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_volume_from_elsewhere_is_refused_by_name_or_resampled(head: np.ndarray, tmp_path: Path) -> None:
    moved = GRID.affine.copy()
    moved[2, 3] += 40.0
    (tmp_path / "a").mkdir()
    save(tmp_path / "a" / "x.nii.gz", head)
    far = save(tmp_path / "far.nii.gz", head, moved)
    for act in (lambda p: check_headers([{"image": str(p)}], GRID), lambda p: read_on_grid(p, GRID, resample=False)):
        assert "does not lie on the grid" in refused(far, act) and "--resample_to_grid" in refused(far, act)
    (tmp_path / "b").mkdir()
    far.rename(tmp_path / "b" / "far.nii.gz")
    near, away = (VolumeFolder(tmp_path / name, "real_dir") for name in "ab")
    with pytest.raises(BundleError, match="far.nii.gz lies elsewhere than .*x.nii.gz.*40"):
        near.check_same_grid(away)
    brought = VolumeFolder(tmp_path / "b", "real_dir", grid=GRID, resample=True)
    VolumeFolder(tmp_path / "a", "real_dir", grid=GRID, resample=True).check_same_grid(brought)
    assert brought.hashes != away.hashes and np.allclose(brought[0][0, 0, :, :, :-10], 0)


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("act", [read_image, label_volumes, lambda p: VolumeFolder(p.parent, "synthetic_dir")[0]])
def test_one_wrong_byte_in_the_middle_is_damage(act: Callable[[Path], object], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(1, 6, (20, 20, 20)).astype(np.uint8)
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti1Image(noise, np.diag([-1.0, 1, 1, 1])).to_bytes(), compresslevel=0))
    damaged(path)
    assert "damaged" in refused(path, act)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("x.nii.gz", lambda c: c + b"further bytes", "13 bytes after its end"),
        ("x.nii.gz", gzip.decompress, "not compressed, unlike its name"),
        ("x.nii", lambda c: c, "compressed, unlike its name"),
        ("X.NII.GZ", lambda c: c, ""),
        ("x.nii.gz", lambda c: gzip.compress(gzip.decompress(c)[:900]) + gzip.compress(gzip.decompress(c)[900:]), ""),
    ],
)
def test_bytes_decide_and_not_the_name(
    name: str, change: Callable[[bytes], bytes], said: str, head: np.ndarray, tmp_path: Path
) -> None:
    content = save(tmp_path / "first.nii.gz", head).read_bytes()
    (tmp_path / "first.nii.gz").unlink()
    (tmp_path / name).write_bytes(change(content))
    scan = read_image(tmp_path / name)
    assert np.array_equal(scan.data, head) and [bool(said)] * len(scan.findings) == [said in f for f in scan.findings]
    assert len(scan.findings) == bool(said)
    assert np.array_equal(VolumeFolder(tmp_path, "real_dir")[0][0, 0], head)


def test_folders_take_mgh_and_say_what_they_leave_out(
    head: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nib.save(nib.MGHImage(head, GRID.affine), tmp_path / "a.mgz")
    for name in ("b.nrrd", "c.nii.bz2", "d.npy", ".e.nii.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert np.array_equal(VolumeFolder(tmp_path, "real_dir")[0][0, 0], head)
    assert "3 files of other formats, b.nrrd the first" in caplog.text
    (tmp_path / "f.nii.gz").symlink_to(".git/annex/objects/gone")
    with pytest.raises(BundleError, match="f.nii.gz is not here.*datalad get"):
        VolumeFolder(tmp_path, "real_dir")
    (tmp_path / "f.nii.gz").unlink()
    os.mkfifo(tmp_path / "g.nii")
    assert "pipe" in refused(tmp_path / "g.nii")


def labels() -> np.ndarray:
    return np.tile(np.arange(len(LABELS), dtype=np.uint8), 125)[: 10**3].reshape(10, 10, 10)


def test_volumes_of_labels_follow_the_affine(tmp_path: Path) -> None:
    codes, affine = labels(), np.diag([-3.0, 3.0, 3.0, 1.0])
    path = patched(save(tmp_path / "x.nii.gz", codes, affine), pixdim=[1, 3.6, 3.6, 3.6, 1, 0, 0, 0])
    assert label_volumes(path).ventricles == pytest.approx(27.0 * (codes == LABELS["lateral_ventricles"]).sum())
    assert any("3.6" in finding for finding in read_header(path).findings)


def turned(degrees: float) -> np.ndarray:
    return from_matvec(Rotation.from_euler("x", degrees, degrees=True).as_matrix() @ GRID.affine[:3, :3], GRID.origin)


def sheared(degrees: float) -> np.ndarray:
    affine = GRID.affine.copy()
    affine[0, 1] = 4.0 * np.sin(np.radians(degrees))
    return affine


def header_of(path: Path, sform: np.ndarray, qform: np.ndarray) -> Header:
    save(path, np.zeros(GRID.shape, np.uint8), GRID.affine, qform)
    return read_header(patched(path, srow_x=sform[0], srow_y=sform[1], srow_z=sform[2]))


def test_a_header_that_contradicts_itself_has_a_finding(tmp_path: Path) -> None:
    alike = header_of(tmp_path / "x.nii", GRID.affine, GRID.affine)
    assert alike.findings == () and alike.says_one_place
    apart = header_of(tmp_path / "x.nii", GRID.affine, turned(20))
    assert "20 degrees" in apart.findings[0] and not apart.says_one_place and np.allclose(apart.affine, GRID.affine)
    for bad in (sheared(2), np.zeros((4, 4)), np.full((4, 4), np.nan)):
        header = header_of(tmp_path / "x.nii", bad, GRID.affine)
        assert "qform is taken" in header.findings[0] and np.allclose(header.affine, GRID.affine, atol=1e-4)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"srow_x": 0, "srow_y": 0, "srow_z": 0, "qform_code": 0}, "singular"),
        ({"sform_code": 0, "qform_code": 0}, "no orientation"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "asks for 27000000000352 bytes"),
        ({"dim": [3, -5, 12, 8, 1, 1, 1, 1]}, ""),
        ({"dim": [9, 10, 12, 8, 1, 1, 1, 1]}, ""),
        ({"pixdim": [1, np.nan, 4, 4, 1, 0, 0, 0]}, "voxel size of nan x 4 x 4"),
        ({"datatype": 32, "bitpix": 64}, "complex64"),
        ({"datatype": 128, "bitpix": 24}, "not one number a voxel"),
        ({"datatype": 999}, ""),
        ({"dim": [4, 10, 12, 4, 2, 1, 1, 1]}, "not 3D"),
        ({"vox_offset": np.nan}, ""),
        ({"vox_offset": 1e30}, ""),
        ({"magic": b"ni1"}, "pair"),
        ({"magic": b""}, "Analyze"),
    ],
)
def test_headers_that_cannot_be_are_refused_in_one_line(
    name: str, fields: dict[str, object], said: str, head: np.ndarray, tmp_path: Path
) -> None:
    path = patched(save(tmp_path / name, np.rint(255 * head).astype(np.uint8)), **fields)
    for act in (read_header, read_image):
        assert said in refused(path, act)


def test_nan_in_the_air_is_the_darkest_value_and_in_the_head_refused(head: np.ndarray, tmp_path: Path) -> None:
    holed = np.where(head > 0.1, head, np.nan)
    scan = read_image(save(tmp_path / "air.nii", holed))
    assert np.array_equal(scan.data, np.where(head > 0.1, head, head[head > 0.1].min()))
    assert "voxels of air" in scan.findings[0]
    lone = head.copy()
    lone[1, 1, 1] = np.inf
    assert read_image(save(tmp_path / "lone.nii", lone)).data[1, 1, 1] == head.min()
    brain = np.where(head > 0.1, head, 0.01)
    brain[4:6, 4:8, 3:5] = np.nan
    brain[5, 6, 5:] = np.nan
    assert "NaN" in refused(save(tmp_path / "leak.nii", brain))
    for index in ((5, 6, 4), (slice(None), 6, slice(None)), (slice(4, 6), slice(5, 8), 4), ...):
        for around in (head, holed):
            inside = around.copy()
            inside[index] = np.nan
            assert "NaN" in refused(save(tmp_path / "x.nii.gz", inside))


def test_a_written_volume_is_read_as_it_was(head: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_volume(path, head, GRID)
    scan = read_image(path)
    assert scan.findings == () and np.array_equal(
        scan.data, nib.load(tmp_path / "x.nii.gz").get_fdata(dtype=np.float32)
    )
