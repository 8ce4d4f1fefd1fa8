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
"""Reading a scan, and refusing one that cannot be a T1-weighted head."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.errors import BundleError
from scripts.volumes import UNREADABLE

SPACING_RANGE = (0.2, 8.0)
EXTENT_RANGE = (80.0, 600.0)
SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Scan:
    """One 3D image in closest canonical (RAS+) order.

    Attributes:
        data: intensities as stored after the file's scaling, float32, shape (x, y, z).
        affine: 4 x 4 matrix from voxel indices to the scanner's world millimetres (RAS+).
    """

    data: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres from one voxel to the next along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def load_scan(path: str | os.PathLike) -> Scan:
    """Read a NIfTI file and check that it can be a head: 3D, whole, finite, not empty, with a usable affine.

    A fourth axis of length 1 is dropped.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    path = Path(path)
    image = _open(path)
    try:
        _check_shape(image.shape)
        affine = _checked_affine(image)
        data = _read(image)
        _check_values(data)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    ordered = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    return Scan(np.ascontiguousarray(ordered.dataobj), ordered.affine)


def _open(path: Path) -> nib.Nifti1Image:
    if not path.name.endswith(SUFFIXES):
        raise BundleError(f"{path}: not a NIfTI file: its name must end in .nii or .nii.gz")
    if not path.is_file():
        raise BundleError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except UNREADABLE as error:
        raise BundleError(f"{path}: cannot be read as NIfTI: {_first_line(error)}") from error
    if not isinstance(image, nib.Nifti1Image):
        raise BundleError(f"{path}: not a NIfTI file but {type(image).__name__}: convert it to NIfTI")
    return image


def _check_shape(shape: tuple[int, ...]) -> None:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        raise BundleError(f"has shape {_by(shape)}: a T1w scan has three axes of at least 2 voxels")


def _checked_affine(image: nib.Nifti1Image) -> np.ndarray:
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise BundleError("has no orientation (sform and qform codes are 0), so left and right are unknown")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise BundleError("its affine holds NaN or infinity")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() == 0.0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise BundleError("its affine is singular: the axes do not span space")
    _check_geometry(affine, spacing, np.asarray(image.shape[:3]))
    return affine


def _check_geometry(affine: np.ndarray, spacing: np.ndarray, shape: np.ndarray) -> None:
    axes = affine[:3, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.01:
        raise BundleError("its affine shears the axes: use the scan as it came from the scanner")
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        raise BundleError(
            f"has a voxel size of {_by(spacing)} mm: each side must be {SPACING_RANGE[0]:g} to {SPACING_RANGE[1]:g} mm"
        )
    extent = spacing * shape
    if extent.min() < EXTENT_RANGE[0] or extent.max() > EXTENT_RANGE[1]:
        raise BundleError(
            f"covers {_by(extent)} mm: a head needs {EXTENT_RANGE[0]:g} to {EXTENT_RANGE[1]:g} mm along each axis"
        )


def _read(image: nib.Nifti1Image) -> np.ndarray:
    try:
        data = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BundleError(f"is truncated or damaged: {_first_line(error)}") from error
    except TypeError as error:
        raise BundleError(f"holds {image.get_data_dtype()}, not one number a voxel") from error
    return data.reshape(data.shape[:3])


def _check_values(data: np.ndarray) -> None:
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise BundleError(f"holds NaN or infinity in {bad} voxels")
    if not data.any():
        raise BundleError("is all zero")
    if data.min() == data.max():
        raise BundleError(f"is constant: every voxel is {data.min():g}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _by(numbers: tuple[int, ...] | np.ndarray) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
