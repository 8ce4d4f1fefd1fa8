# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the header of a NIfTI or MGH file says: its shape, type and place, and what in it is doubtful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from scripts.core.errors import BundleError

HEADER_BYTES = 1024
SHEAR = 0.01  # largest cosine between two axes that counts as a right angle
FORM_DEGREES, FORM_MM = 3.0, 3.0
SAME_MM = 1e-2
SIZES = 0.01  # share by which a voxel size may differ from the affine's
PAIR = b"ni1\0"
MGH_GOOD_RAS, MGH_DELTA = 28, 30  # bytes before these fields of the header


class ScanError(BundleError):
    """A scan or volume that cannot be used.

    Args:
        reason: two or three words, alike for all files of the same fault, to count them by.
        message: what is wrong with this one.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """A header that can be used.

    Attributes:
        shape: voxels along x, y, z; axes of length 1 after these are left out.
        affine: 4 x 4 matrix from voxel indices to world millimetres (RAS+), float64.
        findings: what makes left and right, or the position, doubtful; one short sentence each.
        stored: nibabel's header, as it stands in the file.
        forms: the affines that a NIfTI header holds, by the names `sform` and `qform`; each only where its code is set
            and it is usable.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    findings: tuple[str, ...]
    stored: Any = field(repr=False)
    forms: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres from one voxel to the next along each axis, by the affine."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def says_one_place(self) -> bool:
        """Whether all that a NIfTI header says of the place is the same, so that every tool reads the same."""
        sizes = np.asarray(self.stored["pixdim"][1:4]) if self.forms else self.spacing
        alike = [np.allclose(form, self.affine, atol=SAME_MM) for form in self.forms.values()]
        return all(alike) and np.allclose(sizes, self.spacing, rtol=1e-3)

    @property
    def end(self) -> int:
        """Where the last voxel ends, in bytes from the start of the uncompressed file."""
        return int(self.stored.get_data_offset()) + self.voxel_bytes

    @property
    def voxel_bytes(self) -> int:
        """Size of all voxels in the file."""
        return int(np.prod([int(n) for n in self.shape], dtype=object)) * self.stored.get_data_dtype().itemsize


def parse_header(start: bytes) -> Header:
    """The header at the start of a NIfTI or MGH file.

    Of a NIfTI file the sform is taken where its code is set and it is usable, else the qform, as nibabel does; one that
    is singular or sheared beside a good one is passed over, with a finding. Voxel sizes (`pixdim`) decide nothing.

    Args:
        start: the first `HEADER_BYTES` bytes of the uncompressed file, or all of a shorter one.

    Raises:
        ScanError: if it is no such header, or of an image that holds more or less than one number a voxel, is not 3D,
            or does not say where its axes point.
    """
    try:
        stored = _read_stored(start)
        shape, kind, offset = _shape_of(stored), stored.get_data_dtype(), int(stored.get_data_offset())
    except (HeaderDataError, WrapStructError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise ScanError("unreadable", f"has a damaged header: {str(error).strip() or type(error).__name__}") from error
    if offset < getattr(stored, "single_vox_offset", 0):
        raise ScanError("unreadable", f"has a damaged header: its voxels are to begin at byte {offset}")
    if kind.fields is not None or kind.kind not in "biuf":
        raise ScanError("no single number a voxel", f"holds {kind}, not one number a voxel")
    is_mgh = isinstance(stored, nib.MGHImage.header_class)
    affine, forms, findings = _mgh_place(stored, start) if is_mgh else _place(stored)
    return Header(shape, affine, tuple([*findings, *_further_findings(stored, affine, shape)]), stored, forms)


def _read_stored(start: bytes) -> Any:
    if len(start) < 4:
        raise ScanError("truncated", "is cut short: it has no whole header")
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    kind: Any = None
    if 348 in sizes:
        kind = nib.Nifti1Header
        if start[344:348] == PAIR:
            raise ScanError("unreadable", "is one half of a pair of .hdr and .img: convert it to one .nii file")
        if start[344:347] != b"n+1" and len(start) >= 348:
            raise ScanError("unreadable", "is an Analyze file, which does not say which side is left: use NIfTI")
    elif 540 in sizes:
        kind = nib.Nifti2Header
    elif int.from_bytes(start[:4], "big") == 1:
        kind = nib.MGHImage.header_class
    if kind is None:
        raise ScanError("unreadable", "is neither NIfTI nor MGH, by its first bytes")
    if len(start) < (284 if kind is nib.MGHImage.header_class else kind.sizeof_hdr):
        raise ScanError("truncated", "is cut short: it has no whole header")
    return kind.from_fileobj(BytesIO(start), check=False)


def _shape_of(stored: Any) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in stored.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise ScanError("not 3D", f"has shape {by(shape)}, not 3D")
    return shape[0], shape[1], shape[2]


def _mgh_place(stored: Any, start: bytes) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    # By the file's own bytes: nibabel would mend both fields in silence.
    if int(np.frombuffer(start, ">i2", 1, MGH_GOOD_RAS)[0]) <= 0:
        raise _without_orientation("goodRASFlag is 0")
    _check_sizes(np.frombuffer(start, ">f4", 3, MGH_DELTA))
    affine = np.asarray(stored.get_affine(), np.float64)
    if fault := fault_of(affine):
        raise ScanError("impossible affine", f"its affine {fault}")
    return affine, {}, []


def _place(stored: Any) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """The affine that counts, all usable ones by their names, and what is to be said of them."""
    codes = {name: int(stored[f"{name}_code"]) for name in ("sform", "qform")}
    stated = {name: _form(stored, name) for name, code in codes.items() if code}
    if not stated:
        raise _without_orientation("sform and qform codes are 0")
    faults = {name: fault_of(form) for name, form in stated.items()}
    usable = {name: form for name, form in stated.items() if not faults[name]}
    _check_sizes(stored["pixdim"][1:4])
    if not usable:
        name = next(iter(stated))
        ways_out = "use the scan as it came from the scanner, or write its header anew"
        raise ScanError("impossible affine", f"its affine {faults[name]} (its {name}): {ways_out}")
    taken = next(iter(usable))
    findings = [f"has a {n} that {fault}: the {taken} is taken" for n, fault in faults.items() if fault]
    return usable[taken], usable, [*findings, *(_disagreement(usable, codes, _shape_of(stored)))]


def _without_orientation(why: str) -> ScanError:
    return ScanError(
        "missing affine", f"has no orientation ({why}), so left and right are unknown: write its affine into its header"
    )


def _form(stored: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(getattr(stored, f"get_{name}")(), np.float64)
    except (HeaderDataError, ValueError):
        return np.full((4, 4), np.nan)


def fault_of(affine: np.ndarray) -> str:
    """Why an affine cannot be the place of a volume, in words; empty if it can."""
    if not np.isfinite(affine).all():
        return "holds NaN or infinity"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() == 0.0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        return "is singular: the axes do not span space"
    axes = affine[:3, :3] / spacing
    return "shears the axes" if np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR else ""


def _check_sizes(sizes: np.ndarray) -> None:
    if not (np.asarray(sizes, np.float64) > 0).all():
        raise ScanError("impossible spacing", f"its header states a voxel size of {by(sizes)} mm")


def _disagreement(forms: dict[str, np.ndarray], codes: dict[str, int], shape: Sequence[int]) -> list[str]:
    """Disagreement of the header's two affines, where both are usable."""
    if len(forms) < 2:
        return []
    sform, qform = forms["sform"], forms["qform"]
    if np.linalg.det(qform[:3, :3]) * np.linalg.det(sform[:3, :3]) < 0:
        return ["qform and sform are mirror images of each other: one of them has left and right wrong"]
    if nib.aff2axcodes(qform) != nib.aff2axcodes(sform):
        return [f"qform says the axes are {_codes(qform)}, sform {_codes(sform)}"]
    middle = np.append((np.asarray(shape) - 1) / 2, 1.0)
    apart = float(np.linalg.norm((qform - sform) @ middle))
    angle = _angle(qform, sform)
    if angle <= FORM_DEGREES and apart <= FORM_MM:
        return []
    under = "under one code" if codes["qform"] == codes["sform"] else f"codes {codes['qform']} and {codes['sform']}"
    return [
        f"qform and sform differ by {angle:.0f} degrees and {apart:.0f} mm, {under}: the sform is taken; "
        "tools of ITK may take the qform"
    ]


def _angle(one: np.ndarray, other: np.ndarray) -> float:
    """Degrees between the axes of two affines of the same handedness."""
    axes = [matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0) for matrix in (one, other)]
    cosine = (np.trace(axes[0].T @ axes[1]) - 1.0) / 2.0
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _codes(affine: np.ndarray) -> str:
    return "".join(map(str, nib.aff2axcodes(affine)))


def _further_findings(stored: Any, affine: np.ndarray, shape: tuple[int, int, int]) -> list[str]:
    if isinstance(stored, nib.MGHImage.header_class):
        return []
    found, sizes = [], np.asarray(stored["pixdim"][1:4], np.float64)
    if int(stored["qform_code"]) and float(stored["pixdim"][0]) not in (-1.0, 1.0):
        found.append(
            f"pixdim[0] is {float(stored['pixdim'][0]):g}, not 1 or -1: the handedness of its qform is a guess"
        )
    if _came_from_analyze(stored, affine, shape):
        found.append("its axes are the array's, centred, as of a file converted from Analyze: check left and right")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(sizes, spacing, rtol=SIZES):
        found.append(f"states voxels of {by(sizes)} mm and an affine of {by(spacing)} mm: the affine is taken")
    unit = stored.get_xyzt_units()[0]
    return [*found, *([f"says that its lengths are in {unit}s: they are read as mm"] if unit in FOREIGN else [])]


FOREIGN = ("meter", "micron")


def _came_from_analyze(stored: Any, affine: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Whether only an sform of unturned axes is there, whose origin is the middle of the array."""
    unturned = np.count_nonzero(np.abs(affine[:3, :3]) > 1e-6) == 3
    middle = affine @ np.append((np.asarray(shape) - 1) / 2, 1.0)
    centred = bool(np.abs(middle[:3]).max() <= np.linalg.norm(affine[:3, :3], axis=0).max())
    return int(stored["qform_code"]) == 0 and unturned and centred and int(stored["sform_code"]) in (1, 2)


def by(numbers: Sequence[float] | np.ndarray) -> str:
    """Numbers for messages, such as `1 x 1 x 1.2`."""
    return " x ".join(f"{float(n):.4g}" if not float(n).is_integer() else f"{int(n)}" for n in numbers)
