# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a scan, and refusing one that cannot be a T1-weighted head."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from scripts.volumes.headers import ScanError, by
from scripts.volumes.reading import MGH, NIFTI, Scan, read_header, read_image

__all__ = ["MGH", "NIFTI", "Scan", "ScanError", "canonical", "load_scan", "read_scan", "without_suffix", "write_scan"]

SPACING_RANGE = (0.2, 8.0)
EXTENT_RANGE = (80.0, 600.0)


def load_scan(path: str | os.PathLike) -> Scan:
    """Read a NIfTI or MGH file as `read_scan` does, its axes in closest canonical (RAS+) order.

    Raises:
        ScanError: naming the file and what is wrong with it.
    """
    return canonical(read_scan(path))


def read_scan(path: str | os.PathLike) -> Scan:
    """Read a NIfTI or MGH file and check that it can be a head: of its size, whole, finite in the head, not empty.

    A fourth axis of length 1 is dropped.

    Raises:
        ScanError: naming the file and what is wrong with it.
    """
    header = read_header(path)
    try:
        _check_geometry(header.spacing, header.shape)
        scan = read_image(path)
        _check_values(scan.data)
    except ScanError as error:
        said = str(error)
        raise ScanError(error.reason, said if str(path) in said else f"{path} cannot be used: it {said}") from error
    return scan


def canonical(scan: Scan) -> Scan:
    """The same scan with its axes permuted and flipped so that they run nearest to right, front and up."""
    ordered = nib.as_closest_canonical(nib.Nifti1Image(scan.data, scan.affine))
    return Scan(np.ascontiguousarray(ordered.dataobj), ordered.affine, scan.findings)


def without_suffix(name: str) -> str:
    """The name of a scan's file without `.nii`, `.nii.gz`, `.mgh` or `.mgz`."""
    return re.sub(r"\.(nii|nii\.gz|mgh|mgz)$", "", name, flags=re.IGNORECASE)


def _check_geometry(spacing: np.ndarray, shape: Sequence[int]) -> None:
    if min(shape) < 2:
        raise ScanError("not 3D", f"has shape {by(shape)}: a T1w scan has three axes of at least 2 voxels")
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        low, high = SPACING_RANGE
        reason = f"has a voxel size of {by(spacing)} mm: each side must be {low:g} to {high:g} mm"
        raise ScanError("impossible spacing", reason)
    extent = spacing * shape
    if extent.min() < EXTENT_RANGE[0] or extent.max() > EXTENT_RANGE[1]:
        low, high = EXTENT_RANGE
        reason = f"covers {by(extent)} mm: a head needs {low:g} to {high:g} mm along each axis"
        raise ScanError("impossible extent", reason)


def _check_values(data: np.ndarray) -> None:
    if not data.any():
        raise ScanError("constant", "is all zero")
    if data.min() == data.max():
        raise ScanError("constant", f"is constant: every voxel is {data.min():g}")


def write_scan(path: Path, scan: Scan) -> Path:
    """Write a scan as NIfTI of float32, sform and qform its affine with the code of a scanner's frame; the path."""
    image = nib.Nifti1Image(scan.data, scan.affine)
    image.set_sform(scan.affine, 1)
    image.set_qform(scan.affine, 1)
    nib.save(image, path)
    return path
