# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of volumes that are compared with each other."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch

from scripts.compute.kept import Values
from scripts.compute.ownership import only_results
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.inputs import Input
from scripts.core.tables import read_table
from scripts.volumes.nifti import UNREADABLE, read_volume

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
TOLERANCE = 1e-3
RANGE = "range"


class VolumeFolder(Input):
    """The volumes of a folder, all of one shape and spacing; each is read when it is asked for and not kept.

    They are those that a prepared dataset's `participants.tsv` lists in its column `path`, else every
    `.nii` and `.nii.gz` file in the folder and below it, in the order of their names.

    Args:
        path: the folder; None if none was given.
        flag: the command-line flag that gives it, for messages.
        values: where the intensity ranges of volumes that were read are kept; None to keep none.

    Attributes:
        shape: voxels along x, y, z of every volume; empty if no folder was given.
        spacing: sides of a voxel in mm; empty if no folder was given.
        axes: where the first volume's axes run, such as `LAS`; empty if no folder was given.
        warnings: what was warned of when the folder was looked at.

    Raises:
        BundleError: if the folder is missing or has no volumes, or if a volume is missing, unreadable, not
            3D or of another shape or spacing than the first. Only headers are looked at here.
    """

    def __init__(self, path: Any, flag: str, values: Values | None = None) -> None:
        self.flag = flag
        self.values = values
        if path is not None and not str(path).strip():
            raise BundleError(f"--{flag} is empty: give a folder, or leave it out")
        self.folder = None if path is None else Path(str(path))
        self.warnings: list[str] = []
        self.paths = [] if self.folder is None else find_volumes(self.folder, flag, self._warn)
        self.shape, self.spacing, self.axes = _common_grid(self.paths, self._warn)
        self._ranges: dict[int, tuple[float, float]] = {}
        self._hashes: list[str] = []
        self._warned: set[str] = set()

    @property
    def requested(self) -> bool:
        """Whether a folder was given."""
        return self.folder is not None

    @property
    def grid(self) -> VolumeGrid:
        """Shape, spacing and axes of the volumes."""
        return VolumeGrid(self.shape, self.spacing, self.axes)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            logger.warning(text)

    def part(self, paths: Sequence[Path]) -> VolumeFolder:
        """The same folder with some of its volumes alone."""
        some = copy.copy(self)
        some.paths, some._ranges, some._hashes = list(paths), {}, []
        return some

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of each volume's file."""
        if not self._hashes:
            self._hashes = [file_hash(path) for path in self.paths]
        return self._hashes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Volume number `index` as float32 of shape (1, 1, X, Y, Z), intensities as they are on disk.

        Raises:
            BundleError: if it is cut short or holds NaN.
        """
        volume = torch.from_numpy(read_volume(self.paths[index]))
        self._note_range(index, float(volume.min()), float(volume.max()))
        if self.values is not None and self.values.get(RANGE, self.hashes[index]) is None:
            self.values.add(RANGE, [self.hashes[index]], self._ranges[index])
        return volume[None, None]

    def _note_range(self, index: int, low: float, high: float) -> None:
        self._ranges[index] = low, high
        if _outside(low, high):
            self._warn_once(
                "outside",
                f"{self.paths[index]} ranges from {low:g} to {high:g}: the measures are meant for intensities of 0 to "
                "1, and take these as they are",
            )
        if low == high:
            self._warn_once(
                "constant",
                f"{self.paths[index]} is {low:g} everywhere, so it shows no head: similarities to it say nothing "
                "(4-G-R-SSIM is 1 with any volume); remove such volumes, or find out why they are empty",
            )

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned = {*self._warned, kind}
            logger.warning(text)

    def _recall_ranges(self) -> None:
        if self.values is not None:
            for index, digest in enumerate(self.hashes):
                kept = self.values.get(RANGE, digest)
                if index not in self._ranges and kept is not None:
                    self._note_range(index, *kept)

    def check_same_grid(self, other: VolumeFolder) -> None:
        """Raise a `BundleError` unless another folder's volumes have the shape and spacing of these; warn of axes."""
        pair = other.paths[0], other.grid, self.paths[0], self.grid
        _check_grid(*pair)
        if other.axes != self.axes:
            self._warn(_other_axes(*pair))

    def name(self, index: int) -> str:
        """The path of volume number `index` within the folder."""
        return os.path.relpath(self.paths[index], self.folder)

    def summary(self) -> dict[str, Any]:
        """Where the volumes are, how many, their shape, and the intensity range of those read, now or earlier."""
        self._recall_ranges()
        lows, highs = zip(*self._ranges.values()) if self._ranges else ((), ())
        return {
            "folder": str(self.folder),
            "volumes": len(self),
            "shape": list(self.shape),
            "intensities_read": [min(lows), max(highs)] if lows else None,
            "volumes_outside_0_to_1": sum(_outside(low, high) for low, high in self._ranges.values()),
            "constant_volumes": sum(low == high for low, high in self._ranges.values()),
        }


def find_volumes(folder: Path, flag: str, warn: Callable[[str], None] = logger.warning) -> list[Path]:
    """The volumes of a folder, as `VolumeFolder` takes them.

    Args:
        folder: where.
        flag: the command-line flag that gives it, for messages.
        warn: is told of volumes that the table does not name.

    Raises:
        BundleError: if the folder is missing or has none, or one that its table lists is missing.
    """
    if not folder.is_dir():
        raise BundleError(f"--{flag}: there is no folder {folder}")
    searched = _searched(folder)
    found = only_results(folder, searched)
    rows = read_table(folder / TABLE) if (folder / TABLE).is_file() else []
    listed = _listed(folder, rows)
    if not (listed or found):
        raise BundleError(f"--{flag}: the folder {folder} holds no .nii or .nii.gz file and no {TABLE} that lists any")
    if listed:
        named = {folder / cell for row in rows for cell in row.values()}  # label maps have a column of their own
        others = [path for path in found if path not in named]
        if others:
            count, first = len(others), others[0].name
            warn(f"{folder / TABLE} has no row for {count} of the volumes in {folder}, {first} the first: left out")
    elif len(found) < len(searched):
        left = [path for path in searched if path not in set(found)]
        warn(f"{len(left)} volumes below {folder} are other commands' or no samples, {left[0]} the first: left out")
    return listed or found


def _listed(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    paths = [folder / row["path"] for row in rows if "path" in row]
    for number, path in enumerate(paths, start=1):
        if not path.is_file():
            raise BundleError(f"row {number} of {folder / TABLE} names a volume that is not there: {path}")
    twice = next((path for path, rows in Counter(paths).items() if rows > 1), None)
    if twice is not None:
        raise BundleError(f"{folder / TABLE} names the volume {twice} in two rows")
    return paths


def _searched(folder: Path) -> list[Path]:
    found = (path for pattern in ("*.nii", "*.nii.gz") for path in folder.rglob(pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _outside(low: float, high: float) -> bool:
    return low < -TOLERANCE or high > 1 + TOLERANCE


class VolumeGrid(NamedTuple):
    """How the voxels of a volume lie.

    Attributes:
        shape: voxels along x, y, z.
        spacing: sides of a voxel in mm.
        axes: where the axes run, such as `LAS` for left, anterior, superior.
    """

    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    axes: str = ""


def _common_grid(paths: Sequence[Path], warn: Callable[[str], None]) -> VolumeGrid:
    grids = [_grid(path) for path in paths]
    for path, grid in zip(paths, grids):
        _check_grid(path, grid, paths[0], grids[0])
    turned = next((i for i, grid in enumerate(grids) if grid.axes != grids[0].axes), None)
    if turned is not None:
        warn(_other_axes(paths[turned], grids[turned], paths[0], grids[0]))
    return grids[0] if grids else VolumeGrid()


def _check_grid(path: Path, grid: VolumeGrid, first_path: Path, first: VolumeGrid) -> None:
    if grid.shape != first.shape:
        raise BundleError(f"the volume {path} has shape {grid.shape}, but {first_path} has {first.shape}: use one grid")
    if not np.allclose(grid.spacing, first.spacing, rtol=TOLERANCE):
        found, wanted = (" x ".join(f"{side:g}" for side in spacing) for spacing in (grid.spacing, first.spacing))
        raise BundleError(f"the volume {path} has voxels of {found} mm, but {first_path} of {wanted} mm: use one grid")


def _other_axes(path: Path, grid: VolumeGrid, first_path: Path, first: VolumeGrid) -> str:
    return (
        f"the axes of {path} run to {grid.axes}, those of {first_path} to {first.axes}: volumes are compared as they "
        "are stored, so that heads count as mirrored or turned"
    )


def _grid(path: Path) -> VolumeGrid:
    try:
        image: Any = nib.load(path)
        spacing = tuple(float(side) for side in image.header.get_zooms()[:3])
    except UNREADABLE as error:
        raise BundleError(f"cannot read the volume {path}: it is damaged, cut short or no image ({error})") from error
    if len(image.shape) != 3:
        raise BundleError(f"the volume {path} has shape {image.shape}, not 3D")
    return VolumeGrid(image.shape, spacing, "".join(map(str, nib.aff2axcodes(image.affine))))
