# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The one door for volumes: every stage reads NIfTI and MGH files through it.

What a file is, is told by its content and not by its name. It is read to its end, so that its checksum is compared, and
its size is compared with its header's before memory is taken for it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from scripts.core.errors import BundleError
from scripts.core.files import check_content
from scripts.volumes.headers import HEADER_BYTES, Header, ScanError, parse_header

NIFTI = (".nii", ".nii.gz")
MGH = (".mgh", ".mgz")
SUFFIXES = (*NIFTI, *MGH)
"""Of the files that are taken for volumes, in small or capital letters."""
OTHER_SUFFIXES = (".hdr", ".img", ".img.gz", ".nii.bz2", ".nii.zst", ".nii.xz", ".nrrd", ".nhdr", ".mha", ".mhd")
OTHERS = (*OTHER_SUFFIXES, ".mnc", ".dcm", ".ima", ".npy", ".npz", ".gipl", ".par", ".rec", ".v", ".head", ".brik")
"""Of files that hold a volume in another format."""
GZIP = b"\x1f\x8b"
DEFLATE = 1040  # deflate packs at most so many bytes into one
BLOCK, START = 1 << 22, 1 << 16  # bytes; a compressed header is in the first of these
FEW = 0.05  # of a head's voxels: so many lie deep in the furrows of a brain whose outside is not a number
DARK = 0.1  # share of the way from the darkest to the brightest tissue below which a voxel is air


@dataclass(frozen=True)
class Scan:
    """One 3D image.

    Attributes:
        data: intensities as stored after the file's scaling, float32, shape (x, y, z).
        affine: 4 x 4 matrix from voxel indices to world millimetres (RAS+).
        findings: what in the file is doubtful, one short sentence each.
    """

    data: np.ndarray
    affine: np.ndarray
    findings: tuple[str, ...] = ()

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres from one voxel to the next along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def has_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a file's name ends in one of some endings, in small or capital letters."""
    return path.name.lower().endswith(suffixes)


def read_header(path: str | os.PathLike) -> Header:
    """The header of a volume, after a comparison of its size with the file's; no voxel is read.

    Raises:
        ScanError: naming the file, if it is not there or its header cannot be used.
    """
    with _opened(Path(path)) as file:
        packed = _is_packed(file)
        header = parse_header(_unpacked(file.read(START), packed, HEADER_BYTES))
        _check_size(header, os.fstat(file.fileno()).st_size, packed)
        return header


def read_stored(path: str | os.PathLike) -> tuple[np.ndarray, Header, tuple[str, ...]]:
    """The voxels of a volume (x, y, z) in the type that its file and its scaling give, its header, and findings.

    Raises:
        ScanError: naming the file, if it is not there, cut short, damaged, or its header cannot be used.
    """
    with _opened(Path(path)) as file:
        content, header, findings = _read_content(file, Path(path))
        voxels = np.asanyarray(ArrayProxy(BytesIO(content), header.stored))
    return voxels.reshape(header.shape), header, (*header.findings, *findings)


def read_image(path: str | os.PathLike) -> Scan:
    """The intensities of a volume as float32; what is not a number in the air around the head is the darkest value.

    Raises:
        ScanError: as `read_stored`, and if it holds NaN or infinity in the head.
    """
    stored, header, findings = read_stored(path)
    with np.errstate(over="ignore"):
        data = stored.astype(np.float32)
    bad = ~np.isfinite(data)
    if bad.any():
        try:
            data = _with_air(data, bad)
        except ScanError as error:
            raise ScanError(error.reason, f"{path} cannot be used: it {error}") from error
        findings = (*findings, f"holds NaN or infinity in {int(bad.sum())} voxels of air: taken as the darkest value")
    return Scan(data, header.affine, findings)


def read_codes(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """The labels of a label map (x, y, z), in the type of its file, and its affine.

    Raises:
        BundleError: as `read_stored`, and if they are not whole numbers.
    """
    codes, header, _ = read_stored(path)
    if codes.dtype.kind == "f" and not (np.isfinite(codes).all() and np.array_equal(codes, np.rint(codes))):
        raise BundleError(f"{path} is no label map: it holds other values than whole numbers")
    return codes, header.affine


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open; what goes wrong while it is read names it.

    Raises:
        ScanError: if it is not there, or cannot be read.
    """
    try:
        check_content(path)
    except BundleError as error:
        raise ScanError("missing file", str(error)) from error
    try:
        with open(path, "rb") as file:
            yield file
    except ScanError as error:
        raise ScanError(error.reason, f"{path} cannot be read: it {error}") from error
    except OSError as error:
        raise ScanError("unreadable", f"{path} cannot be read: {error.strerror or error}") from error
    except (HeaderDataError, ValueError, TypeError, OverflowError) as error:
        raise ScanError("truncated", f"{path} cannot be read: it is damaged ({_first_line(error)})") from error


def _is_packed(file: BinaryIO) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == GZIP


def _unpacked(start: bytes, packed: bool, length: int) -> bytes:
    """The first bytes of a file's content, whose own first bytes are given."""
    if not packed:
        return start[:length]
    try:
        return zlib.decompressobj(31).decompress(start, length)
    except zlib.error as error:
        raise _damaged(error) from error


def _check_size(header: Header, file_bytes: int, packed: bool) -> None:
    """Before anything is allocated: a header of 100 bytes can ask for any memory."""
    if header.end > file_bytes * (DEFLATE if packed else 1):
        raise ScanError(
            "truncated",
            f"is truncated or damaged: its header asks for {header.end} bytes, and the file has {file_bytes}"
            f"{', compressed' if packed else ''}",
        )


def _read_content(file: BinaryIO, path: Path) -> tuple[bytes, Header, list[str]]:
    packed, size = _is_packed(file), os.fstat(file.fileno()).st_size
    raw = file.read()
    header = parse_header(_unpacked(raw[:START], packed, HEADER_BYTES))
    _check_size(header, size, packed)
    content, trailing = _decompress(raw, header.end) if packed else (raw, 0)
    if len(content) < header.end:
        raise ScanError(
            "truncated", f"is truncated or damaged: it has {len(content)} of {header.end} bytes that its header states"
        )
    findings = [f"has {trailing} bytes after its end, which are left out"] if trailing else []
    if packed != has_suffix(path, (".gz", ".mgz")):
        findings.append("is compressed, unlike its name" if packed else "is not compressed, unlike its name")
    return content, header, findings


def _decompress(raw: bytes, wanted: int) -> tuple[bytes, int]:
    """The content of gzip members, as far as it is wanted, and how many bytes come after them.

    All of it is unpacked, since the checksum comes last; what is not wanted is not kept.
    """
    parts, kept, rest = [], 0, raw
    while rest[:2] == GZIP:
        member = zlib.decompressobj(31)
        left = rest
        while not member.eof:
            try:
                block = member.decompress(left, max(1, wanted - kept) if kept < wanted else BLOCK)
            except zlib.error as error:
                raise _damaged(error) from error
            if not block and not member.unconsumed_tail and not member.eof:
                raise ScanError("truncated", "is truncated or damaged: its compressed content ends before its end")
            if kept < wanted + BLOCK:
                parts.append(block)
                kept += len(block)
            left = member.unconsumed_tail
        rest = member.unused_data
    return b"".join(parts), len(rest.lstrip(b"\0"))


def _damaged(error: Exception) -> ScanError:
    text = _first_line(error)
    what = "CRC check failed" if "incorrect data check" in text or "length check" in text else text
    return ScanError("truncated", f"is truncated or damaged: {what}")


def _with_air(data: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """The intensities with the darkest finite one wherever there is none, if all of these voxels are air.

    Air is what is dark or not a number, and is reached from the border through such voxels. A whole plane without a
    number between planes of the head is a part of the head, and so is what it has on all six sides, if that is much.

    Raises:
        ScanError: if there is NaN in the head.
    """
    if bad.all():
        raise ScanError("NaN or infinity", "holds NaN or infinity in every voxel")
    low, high = np.percentile(data[~bad], [0.1, 98.0])
    bright = ~bad & (np.where(bad, low, data) > low + DARK * (high - low))
    pieces, _ = ndimage.label(~bright)
    outer = {int(n) for axis in range(3) for end in (0, -1) for n in np.unique(pieces.take(end, axis=axis))} - {0}
    in_head = bad & (~np.isin(pieces, list(outer)) | _in_planes(bad, bright) | _enclosed(bad, bright))
    if in_head.any():
        raise ScanError("NaN or infinity", f"holds NaN or infinity in {int(in_head.sum())} voxels of the head")
    return np.where(bad, data[~bad].min(), data)


def _enclosed(bad: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Voxels without a number that have something bright on both sides along each axis; none if these are few."""
    found = bad.copy()
    for axis in range(3):
        for part in (np.s_[:], np.s_[::-1]):
            order = tuple(part if a == axis else np.s_[:] for a in range(3))
            found[order] &= np.maximum.accumulate(bright[order], axis=axis)
    return found if found.sum() > FEW * bright.sum() else np.zeros_like(bad)


def _in_planes(bad: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """The planes without a number that have something bright on both sides."""
    found = np.zeros_like(bad)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        empty, lit = np.asarray(bad.all(axis=others)), np.asarray(bright.any(axis=others))
        between = np.maximum.accumulate(lit) & np.maximum.accumulate(lit[::-1])[::-1]
        shape = [1, 1, 1]
        shape[axis] = -1
        found |= (empty & between).reshape(shape)
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
