# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a scan, and refusing one that cannot be a T1-weighted head."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener

from scripts.core.errors import BundleError
from scripts.volumes.nifti import UNREADABLE

SPACING_RANGE = (0.2, 8.0)
EXTENT_RANGE = (80.0, 600.0)
NIFTI = (".nii", ".nii.gz")
MGH = (".mgh", ".mgz")
SUFFIXES = (*NIFTI, *MGH)
COMPRESSED = (".gz", ".mgz")
READ_BYTES = 1 << 24
MGH_GOOD_RAS, MGH_DELTA = 28, 30  # bytes before these fields of the header


class ScanError(BundleError):
    """A scan that cannot be prepared.

    Args:
        reason: two or three words, alike for all scans of the same fault, to count them by.
        message: what is wrong with this one.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Scan:
    """One 3D image.

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
    """Read a NIfTI or MGH file as `read_scan` does, its axes in closest canonical (RAS+) order.

    Raises:
        ScanError: naming the file and what is wrong with it.
    """
    return canonical(read_scan(path))


def read_scan(path: str | os.PathLike) -> Scan:
    """Read a NIfTI or MGH file and check that it can be a head: 3D, whole, finite, not empty, with a usable affine.

    A fourth axis of length 1 is dropped.

    Raises:
        ScanError: naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        image = _open(path)
        _check_shape(image.shape)
        affine = _checked_affine(image, path)
        data = _read(image, path)
        _check_values(data)
    except ScanError as error:
        raise ScanError(error.reason, f"{path}: {error}") from error
    return Scan(data, affine)


def canonical(scan: Scan) -> Scan:
    """The same scan with its axes permuted and flipped so that they run nearest to right, front and up."""
    ordered = nib.as_closest_canonical(nib.Nifti1Image(scan.data, scan.affine))
    return Scan(np.ascontiguousarray(ordered.dataobj), ordered.affine)


def without_suffix(name: str) -> str:
    """The name of a scan's file without `.nii`, `.nii.gz`, `.mgh` or `.mgz`."""
    return next((name.removesuffix(suffix) for suffix in reversed(sorted(SUFFIXES)) if name.endswith(suffix)), name)


def _open(path: Path) -> nib.Nifti1Image | nib.MGHImage:
    if not path.name.endswith(SUFFIXES):
        raise ScanError("unreadable", f"neither NIfTI nor MGH: its name must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ScanError("missing file", "no such file")
    try:
        image = nib.load(path)
    except (EOFError, zlib.error) as error:
        raise ScanError("truncated", f"is truncated or damaged: {_first_line(error)}") from error
    except UNREADABLE as error:
        raise ScanError("unreadable", f"cannot be read as NIfTI or MGH: {_first_line(error)}") from error
    if not isinstance(image, (nib.Nifti1Image, nib.MGHImage)):
        raise ScanError("unreadable", f"not a NIfTI or MGH file but {type(image).__name__}: convert it to NIfTI")
    return image


def _check_shape(shape: tuple[int, ...]) -> None:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        raise ScanError("not 3D", f"has shape {_by(shape)}: a T1w scan has three axes of at least 2 voxels")


def _checked_affine(image: nib.Nifti1Image | nib.MGHImage, path: Path) -> np.ndarray:
    _check_header(image, path)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise ScanError("impossible affine", "its affine holds NaN or infinity")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() == 0.0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise ScanError("impossible affine", "its affine is singular: the axes do not span space")
    _check_geometry(affine, spacing, np.asarray(image.shape[:3]))
    return affine


def _check_header(image: nib.Nifti1Image | nib.MGHImage, path: Path) -> None:
    """That the file says where its axes point, and holds voxel sizes above 0, which nibabel would mend in silence."""
    stated, sizes = _mgh_header(path) if isinstance(image, nib.MGHImage) else _nifti_header(image, path)
    if not stated:
        fields = "goodRASFlag is" if isinstance(image, nib.MGHImage) else "sform and qform codes are"
        raise ScanError("missing affine", f"has no orientation ({fields} 0), so left and right are unknown")
    if not (sizes > 0).all():
        raise ScanError("impossible spacing", f"its header states a voxel size of {_by(sizes)} mm")


def _nifti_header(image: nib.Nifti1Image, path: Path) -> tuple[bool, np.ndarray]:
    """Whether the orientation is stated, and the voxel sizes, as they stand in the file."""
    with ImageOpener(path) as file:
        header = type(image.header).from_fileobj(file, check=False)
    stated = int(header["sform_code"]) != 0 or int(header["qform_code"]) != 0
    return stated, np.asarray(header["pixdim"][1:4], dtype=np.float64)


def _mgh_header(path: Path) -> tuple[bool, np.ndarray]:
    with ImageOpener(path) as file:
        start = file.read(MGH_DELTA + 12)
    sizes = np.frombuffer(start, ">f4", 3, MGH_DELTA).astype(np.float64)
    return int(np.frombuffer(start, ">i2", 1, MGH_GOOD_RAS)[0]) > 0, sizes


def _check_geometry(affine: np.ndarray, spacing: np.ndarray, shape: np.ndarray) -> None:
    axes = affine[:3, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.01:
        raise ScanError("impossible affine", "its affine shears the axes: use the scan as it came from the scanner")
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        low, high = SPACING_RANGE
        reason = f"has a voxel size of {_by(spacing)} mm: each side must be {low:g} to {high:g} mm"
        raise ScanError("impossible spacing", reason)
    extent = spacing * shape
    if extent.min() < EXTENT_RANGE[0] or extent.max() > EXTENT_RANGE[1]:
        low, high = EXTENT_RANGE
        reason = f"covers {_by(extent)} mm: a head needs {low:g} to {high:g} mm along each axis"
        raise ScanError("impossible extent", reason)


def _read(image: nib.Nifti1Image | nib.MGHImage, path: Path) -> np.ndarray:
    try:
        stored = np.asanyarray(image.dataobj)
        _read_to_the_end(path)
        data = stored.astype(np.float32, casting="same_kind")
    except TypeError as error:
        kind = image.get_data_dtype()
        raise ScanError("no single number a voxel", f"holds {kind}, not one number a voxel") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ScanError("truncated", f"is truncated or damaged: {_first_line(error)}") from error
    return data.reshape(data.shape[:3])


def _read_to_the_end(path: Path) -> None:
    """Where a compressed file keeps its checksum: nibabel stops at the last voxel, and would take damaged ones."""
    if path.name.endswith(COMPRESSED):
        with ImageOpener(path) as file:
            while file.read(READ_BYTES):
                pass


def _check_values(data: np.ndarray) -> None:
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise ScanError("NaN or infinity", f"holds NaN or infinity in {bad} voxels")
    if not data.any():
        raise ScanError("constant", "is all zero")
    if data.min() == data.max():
        raise ScanError("constant", f"is constant: every voxel is {data.min():g}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _by(numbers: tuple[int, ...] | np.ndarray) -> str:
    return " x ".join(f"{n:g}" for n in numbers)


def write_scan(path: Path, scan: Scan) -> Path:
    """Write a scan as NIfTI of float32, sform and qform its affine with the code of a scanner's frame; the path."""
    image = nib.Nifti1Image(scan.data, scan.affine)
    image.set_sform(scan.affine, 1)
    image.set_qform(scan.affine, 1)
    nib.save(image, path)
    return path
