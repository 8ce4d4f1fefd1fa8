# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes on disk and their pictures: header, scale, orientation, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from released import configuration

from scripts.core.errors import BundleError
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import mid_planes, read_volume, write_picture, write_volume


@pytest.fixture(scope="module")
def grid() -> Grid:
    """A small grid that runs as the base's does."""
    base = configuration([]).get_parsed_content("grid")
    return Grid((16, 24, 20), base.spacing, base.origin)


@pytest.fixture
def volume(grid: Grid) -> np.ndarray:
    """Intensities from exactly 0 to exactly 1."""
    return np.linspace(0.0, 1.0, int(np.prod(grid.shape)), dtype=np.float32).reshape(grid.shape)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path, shape: Any = None) -> str:
    with pytest.raises(BundleError) as caught:
        read_volume(path, shape)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_header_states_the_grid_in_mni_space(grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nii.gz", volume, grid)
    image: Any = nib.load(tmp_path / "x.nii.gz")
    assert np.allclose(image.affine, grid.affine, atol=1e-4)
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 4
        assert np.allclose(affine, grid.affine, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert nib.orientations.aff2axcodes(image.affine) == ("L", "A", "S")


@pytest.mark.parametrize(("dtype", "step"), [("uint8", 1 / 255), ("uint16", 1 / 65535), ("int16", 1 / 32767)])
def test_integers_read_back_in_0_to_1(dtype: str, step: float, grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nii.gz", volume, grid, dtype)
    image: Any = nib.load(tmp_path / "x.nii.gz")
    assert image.get_data_dtype() == dtype
    read = image.get_fdata()
    assert read.min() == 0.0 and 1.0 - 1e-6 < read.max() <= 1.0
    assert np.abs(read - volume).max() <= 0.5 * step + 1e-6


def test_scale_does_not_depend_on_the_volume(grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nii.gz", volume * 0.3, grid)
    write_volume(tmp_path / "y.nii.gz", volume * 0.3 - 0.2, grid)
    write_volume(tmp_path / "z.nii.gz", volume * 3.0, grid)
    assert read_volume(tmp_path / "x.nii.gz").max() == pytest.approx(0.3, abs=0.002)
    assert read_volume(tmp_path / "y.nii.gz").min() == 0.0
    assert np.allclose(read_volume(tmp_path / "z.nii.gz"), np.clip(volume * 3.0, 0, 1), atol=0.002)


def test_float32_is_clipped_to_0_and_1(grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nii", volume * 3.0 - 1.0, grid, "float32")
    assert np.array_equal(read_volume(tmp_path / "x.nii", grid.shape), np.clip(volume * 3.0 - 1.0, 0.0, 1.0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_volume_that_is_not_finite_is_not_written(value: float, grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    volume[3, 4, 5] = value
    for dtype in ("uint8", "float32"):
        with pytest.raises(BundleError, match="holds NaN or infinite"):
            write_volume(tmp_path / "x.nii.gz", volume, grid, dtype)
    assert names(tmp_path) == []


def test_what_is_not_written(grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the volume is \(16, 24, 19\), the grid \(16, 24, 20\)"):
        write_volume(tmp_path / "x.nii.gz", volume[..., 1:], grid)
    with pytest.raises(BundleError, match="uint8, uint16, int16, float32, got 'float64'"):
        write_volume(tmp_path / "x.nii.gz", volume, grid, "float64")
    with pytest.raises(BundleError, match="cannot write"):
        write_volume(tmp_path / "missing" / "x.nii.gz", volume, grid)
    assert names(tmp_path) == []


def test_volume_that_is_not_there(tmp_path: Path) -> None:
    assert "is not there" in refused(tmp_path / "x.nii.gz")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_volume(share: float, suffix: str, grid: Grid, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_volume(path, np.random.default_rng(0).random(grid.shape), grid)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert any(words in refused(path) for words in ("truncated or damaged", "cut short"))


@pytest.mark.parametrize(("start", "content"), [(40, bytes(8)), (70, b"\x07\x00"), (108, b"\x00\x00\x00\x43")])
def test_damaged_header(start: int, content: bytes, grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    write_volume(path, volume, grid)
    changed = bytearray(path.read_bytes())
    changed[start : start + len(content)] = content
    path.write_bytes(bytes(changed))
    refused(path, grid.shape)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(bytes(changed)))
    refused(tmp_path / "x.nii.gz", grid.shape)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.txt", "x.mgz"])
def test_file_that_is_no_volume(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("no volume\n" * 100)
    refused(tmp_path / name)


def test_other_shapes_and_kinds(grid: Grid, tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    for data in (np.zeros((4, 5, 6, 2)), np.zeros((4, 5))):
        nib.save(nib.Nifti1Image(data, np.eye(4)), path)
        assert "not 3D" in refused(path)
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6)), np.eye(4)), path)
    assert read_volume(path).shape == (4, 5, 6)
    assert "has shape (4, 5, 6), not (16, 24, 20)" in refused(path, grid.shape)
    nib.save(nib.Nifti1Image(np.zeros(grid.shape, np.complex64), np.eye(4)), path)
    refused(path)
    nib.save(nib.Nifti1Image(np.zeros(grid.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)), path)
    refused(path)


def test_stored_nan_is_named(grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    volume[8, 12, 10] = np.nan
    nib.save(nib.Nifti1Image(volume, grid.affine), tmp_path / "x.nii.gz")
    assert "holds NaN" in refused(tmp_path / "x.nii.gz")


def marked(grid: Grid, world: tuple[float, float, float]) -> np.ndarray:
    """A dark volume with a bright block around a position in world millimetres."""
    volume = np.zeros(grid.shape, np.float32)
    i, j, k = np.rint(np.linalg.inv(grid.affine) @ [*world, 1.0])[:3].astype(int)
    volume[i - 2 : i + 3, j - 2 : j + 3, k - 2 : k + 3] = 1.0
    return volume


@pytest.mark.parametrize(
    ("plane", "step"), [(0, (0, 1, 1)), (1, (1, 0, 1)), (2, (1, 1, 0))], ids=["sagittal", "coronal", "axial"]
)
def test_picture_shows_planes_as_radiologists_look_at_them(plane: int, step: tuple[int, int, int], grid: Grid) -> None:
    """Front at the left of the sagittal plane, else right at the left; top, or front, up."""
    centre = grid.affine @ [*(n / 2 for n in grid.shape), 1.0]
    towards_ras = marked(grid, tuple(centre[:3] + 5.0 * np.array(step)))
    towards_lpi = marked(grid, tuple(centre[:3] - 5.0 * np.array(step)))
    x, y, z = grid.shape
    widths = [round(60 * width / max(y, z)) for width in (y, x, x)]
    for volume, corner in ((towards_ras, "top left"), (towards_lpi, "bottom right")):
        panel = np.split(mid_planes(volume, height=60), np.cumsum(widths)[:2], axis=1)[plane]
        rows, columns = np.nonzero(panel > 128)
        assert ("top" if rows.mean() < 30 else "bottom") == corner.split()[0]
        assert ("left" if columns.mean() < widths[plane] / 2 else "right") == corner.split()[1]


def test_picture_is_written_as_it_is(grid: Grid, volume: np.ndarray, tmp_path: Path) -> None:
    pixels = mid_planes(volume * 2.0 - 0.5)
    assert pixels.dtype == np.uint8 and pixels.shape[0] == 256
    assert pixels.min() == 0 and pixels.max() == 255
    write_picture(tmp_path / "x.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels)
    assert names(tmp_path) == ["x.png"]
