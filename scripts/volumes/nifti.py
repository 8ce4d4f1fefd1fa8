# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes on disk and on paper: NIfTI with the bundle grid's affine, and pictures of them."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np
from PIL import Image

from scripts.core.errors import BundleError
from scripts.core.files import replacing
from scripts.volumes.grid import Grid
from scripts.volumes.reading import read_image

SPACE = "MNI152"

MNI152 = 4
INTEGER_DTYPES = ("uint8", "uint16", "int16")
DTYPES = (*INTEGER_DTYPES, "float32")


def write_volume(
    path: str | os.PathLike, volume: np.ndarray, grid: Grid, dtype: str = "uint8", description: str = ""
) -> None:
    """Write intensities 0..1 as NIfTI, its sform and qform the grid's affine with the MNI152 code.

    Args:
        path: ends in `.nii` or `.nii.gz`.
        volume: of the grid's shape. Integer types hold 0..1 on a fixed scale (the header's slope brings it
            back), so that volumes stay comparable. What lies outside of 0..1 is clipped, in float32 as well.
        grid: where the voxels lie.
        dtype: one of `DTYPES`.
        description: for the header's field `descrip`, which holds 79 bytes.

    Raises:
        BundleError: for another dtype or shape, NaN, or a file that cannot be written.
    """
    if dtype not in DTYPES:
        raise BundleError(f"--output_dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    if volume.shape != grid.shape:
        raise BundleError(f"{path} would not be on the grid: the volume is {volume.shape}, the grid {grid.shape}")
    if not np.isfinite(volume).all():
        raise BundleError(f"{path} was not written: the volume holds NaN or infinite values")
    image = (
        _quantised(volume, grid, dtype)
        if dtype in INTEGER_DTYPES
        else _image(volume.clip(0.0, 1.0).astype(dtype), grid)
    )
    image.header["descrip"] = description
    with replacing(path) as temporary:
        nib.save(image, temporary)


def write_map(path: str | os.PathLike, values: np.ndarray, grid: Grid) -> None:
    """Write numbers of any size, such as differences, of the grid's shape as float32 NIfTI.

    Raises:
        BundleError: for NaN, or if the file cannot be written.
    """
    if not np.isfinite(values).all():
        raise BundleError(f"{path} was not written: it would hold NaN or infinite values")
    with replacing(path) as temporary:
        nib.save(_image(values.astype(np.float32), grid), temporary)


def write_labels(path: str | os.PathLike, labels: np.ndarray, grid: Grid) -> None:
    """Write a label map of the grid's shape as uint8 NIfTI.

    Raises:
        BundleError: if the file cannot be written.
    """
    with replacing(path) as temporary:
        nib.save(_image(labels.astype(np.uint8), grid), temporary)


def _image(data: np.ndarray, grid: Grid) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data, grid.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine, MNI152)
    image.set_qform(grid.affine, MNI152)
    return image


def as_stored(volume: np.ndarray) -> np.ndarray:
    """Intensities 0..1 as they are read back from a uint8 file, so that what is measured of both is the same."""
    return np.rint(np.clip(volume, 0.0, 1.0) * 255).astype(np.float32) * _slope(255)


def _quantised(volume: np.ndarray, grid: Grid, dtype: str) -> nib.Nifti1Image:
    top = np.iinfo(dtype).max
    image = _image(np.rint(np.clip(volume, 0.0, 1.0) * top).astype(dtype), grid)
    image.header.set_slope_inter(_slope(top), 0.0)
    return image


def _slope(top: int) -> np.float32:
    # The header holds it as float32; rounded up, `top` would read back as more than 1.
    slope = np.float32(1.0 / top)
    return slope if float(slope) * top <= 1.0 else np.nextafter(slope, np.float32(0.0))


def read_volume(path: str | os.PathLike, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """The intensities of a volume (X, Y, Z) as float32, its axes as they are stored, wherever it lies.

    Args:
        path: a NIfTI or MGH file.
        shape: what its shape must be; None takes any.

    Raises:
        BundleError: as `scripts.volumes.reading.read_image`, or for another shape.
    """
    volume = read_image(path).data
    if shape is not None and volume.shape != tuple(shape):
        raise BundleError(f"the volume {path} has shape {volume.shape}, not {tuple(shape)}: prepare the scan first")
    return volume


def mid_planes(volume: np.ndarray, height: int = 256) -> np.ndarray:
    """The sagittal, coronal and axial planes through the middle of a volume, side by side, on one scale.

    Args:
        volume: on the bundle grid (x right to left, y back to front, z bottom to top), 0..1.
        height: of the picture in pixels.

    Returns:
        (height, width) uint8. Coronal and axial planes are as radiologists look at them: the subject's
        right is on the left of the picture. The planes of fewer voxels are black above and below.
    """
    return np.concatenate(plane_tiles(volume, height), axis=1)


def plane_tiles(volume: np.ndarray, height: int) -> list[np.ndarray]:
    """The three planes of `mid_planes`, each (height, its width) uint8."""
    x, y, z = (n // 2 for n in volume.shape)
    planes = [volume[x, ::-1, ::-1].T, volume[:, y, ::-1].T, volume[:, ::-1, z].T]
    scale = height / max(len(plane) for plane in planes)
    return [_centred(_resized(plane, scale), height) for plane in planes]


def _resized(plane: np.ndarray, scale: float) -> np.ndarray:
    image = Image.fromarray(np.rint(np.clip(plane, 0.0, 1.0) * 255.0).astype(np.uint8))
    rows, columns = (max(1, round(n * scale)) for n in plane.shape)
    return np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC))


def _centred(tile: np.ndarray, height: int) -> np.ndarray:
    above = (height - len(tile)) // 2
    return np.pad(tile, ((above, height - len(tile) - above), (0, 0)))


def write_picture(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write (height, width) or (height, width, 3) uint8 pixels as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
