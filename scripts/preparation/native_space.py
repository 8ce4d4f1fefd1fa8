# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.preparation.native_space`: a result on the bundle grid, such as a segmentation, carried back to
the raw scan.

    python -m scripts.preparation.native_space --volume labels.nii.gz --scan raw/sub-01_T1w.nii.gz \\
        --sidecar dataset/sub-01/anat/sub-01_space-MNI152_T1w.json --output sub-01_labels.nii.gz --labels

The sidecar, written by the preparation, holds the rigid motion between both frames. The result has the raw scan's
voxels, in its order, so that it lies over it in every viewer.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from scripts.core.errors import BundleError
from scripts.core.files import parse_json, replacing
from scripts.core.programs import errors_in_one_line
from scripts.volumes.headers import ScanError
from scripts.volumes.reading import read_codes, read_header, read_image

KEY = "template_to_scan_mm"
PLACE = (
    *("pixdim", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"),
)
"""Fields of a NIfTI header that say where the voxels lie."""


def to_native(
    volume: np.ndarray,
    affine: np.ndarray,
    template_to_scan: np.ndarray,
    shape: tuple[int, ...],
    native_affine: np.ndarray,
    labels: bool = False,
) -> np.ndarray:
    """Resample a volume of the template's frame onto the voxels of the raw scan, in one interpolation.

    Args:
        volume: 3D, on any grid in the template's frame.
        affine: of the volume, to MNI152 mm.
        template_to_scan: 4 x 4 rigid motion from MNI152 mm to the scan's world mm, as the sidecar holds it.
        shape, native_affine: of the raw scan as it is stored.
        labels: take the nearest voxel and keep the type; else interpolate linearly, as float32.

    Returns:
        Array of `shape`; 0 where the volume does not reach.
    """
    to_voxels = np.linalg.inv(template_to_scan @ affine) @ native_affine
    data = volume if labels else volume.astype(np.float32)
    return ndimage.affine_transform(
        data, to_voxels[:3, :3], to_voxels[:3, 3], tuple(shape[:3]), order=0 if labels else 1, output=data.dtype
    )


def read_transform(sidecar: str | os.PathLike) -> np.ndarray:
    """The rigid motion that a prepared scan's sidecar holds.

    Raises:
        BundleError: if the file is unreadable or holds no such matrix.
    """
    try:
        matrix = np.asarray(parse_json(Path(sidecar).read_text(encoding="utf-8"))[KEY], np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{sidecar} is no sidecar of a prepared scan: it has no readable '{KEY}'") from error
    if matrix.shape != (4, 4) or abs(abs(np.linalg.det(matrix[:3, :3])) - 1.0) > 1e-3:
        raise BundleError(f"'{KEY}' of {sidecar} is not a rigid 4 x 4 matrix")
    return matrix


def carry_back(
    volume: str | os.PathLike,
    scan: str | os.PathLike,
    sidecar: str | os.PathLike,
    output: str | os.PathLike,
    labels: bool = False,
) -> None:
    """Write a volume of the template's frame onto the voxels of a raw scan.

    Args:
        volume: what to carry back.
        scan: the raw scan that was prepared.
        sidecar: the JSON file beside the prepared volume.
        output: the file to write, .nii or .nii.gz.
        labels: whether the volume holds labels and not intensities.

    Raises:
        BundleError: if a file cannot be read or written.
    """
    transform = read_transform(sidecar)
    native = read_header(scan)
    if labels:
        stored, affine = _labels(volume)
    else:
        image = read_image(volume)
        stored, affine = image.data, image.affine
    moved = to_native(stored, affine, transform, native.shape, native.affine, labels)
    result = nib.Nifti1Image(moved, native.affine)
    if isinstance(native.stored, nib.Nifti1Header):
        for field in PLACE:  # all that the scan's header says, so that the result lies on it in every tool
            result.header[field] = native.stored[field]
    with replacing(output) as temporary:
        nib.save(result, temporary)


def _labels(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    try:
        codes, affine = read_codes(path)
    except ScanError:
        raise
    except BundleError as error:
        raise BundleError(f"{path} holds no labels: its values are not whole numbers; leave out --labels") from error
    return codes.astype(np.int32 if np.abs(codes).max(initial=0) > 32767 else np.int16), affine


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts native_space", description=__doc__.split("\n")[0])
    parser.add_argument("--volume", required=True, help="volume or label map on the bundle grid")
    parser.add_argument("--scan", required=True, help="the raw scan")
    parser.add_argument("--sidecar", required=True, help="the JSON file beside the prepared scan")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--labels", action="store_true", help="take the nearest voxel: the volume holds labels")
    flags = parser.parse_args()
    carry_back(flags.volume, flags.scan, flags.sidecar, flags.output, flags.labels)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
