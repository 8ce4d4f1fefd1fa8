# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Bringing a volume to where it is wanted: turned where its axes are in another order, else refused or resampled."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from scripts.core.errors import BundleError
from scripts.volumes.grid import Grid
from scripts.volumes.reading import Scan, read_header, read_image

logger = logging.getLogger(__name__)

SAME_PLACE = 0.05  # share of a voxel by which a corner may lie off: float32 headers round by less
AXES = np.diag([-1.0, 1.0, 1.0, 1.0])  # to the left, the front and up, as those of the released model
_SAID: set[str] = set()
UNTURNED = np.array([[0, 1], [1, 1], [2, 1]])
OBLIQUE = 1e-3  # largest share of a voxel's side by which an axis of a grid may lean
WAYS_OUT = "prepare it first (configs/prepare.yaml), or give --resample_to_grid 1 to bring it there as it is read"


class Place(NamedTuple):
    """Where the voxels of a volume lie.

    Attributes:
        shape: voxels along x, y, z.
        affine: 4 x 4 matrix from voxel indices to millimetres.
        turned: whether the file has its axes in another order or direction.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    turned: bool = False

    @property
    def spacing(self) -> tuple[float, ...]:
        """Sides of a voxel in mm."""
        return tuple(float(side) for side in np.linalg.norm(self.affine[:3, :3], axis=0))

    def meets(self, other: Place) -> bool:
        """Whether another place has the same shape, and all its corners where this one's are."""
        return self.shape == other.shape and _apart(self.affine, other.affine, self.shape) <= SAME_PLACE

    def lies_on(self, grid: Grid) -> bool:
        """Whether it is the grid's."""
        return self.meets(Place(grid.shape, grid.affine))

    def in_words(self) -> str:
        """For messages: the shape, the voxels, the axes, and the middle of the field of view in mm."""
        middle = (self.affine @ np.append((np.asarray(self.shape) - 1) / 2, 1.0))[:3]
        axes, sides = "".join(map(str, nib.aff2axcodes(self.affine))), " x ".join(f"{s:.4g}" for s in self.spacing)
        at = ", ".join(f"{m:.1f}" for m in middle)
        return f"shape {self.shape}, voxels of {sides} mm, axes to {axes} and its middle at ({at}) mm"


def place_of(path: str | os.PathLike, axes: np.ndarray = AXES) -> Place:
    """Where a volume lies once its axes are turned to run nearest to those of `axes`; its header alone is read.

    Args:
        path: a NIfTI or MGH file.
        axes: an affine.

    Raises:
        BundleError: as `scripts.volumes.reading.read_header`.
    """
    header = read_header(path)
    warn_of(path, header.findings)
    order = _to_axes(header.affine, axes)
    sizes = [0, 0, 0]
    for axis, to in enumerate(order[:, 0].astype(int)):
        sizes[to] = header.shape[axis]
    affine = header.affine @ nib.orientations.inv_ornt_aff(order, header.shape)
    return Place((sizes[0], sizes[1], sizes[2]), affine, not np.array_equal(order, UNTURNED))


def turned_onto(scan: Scan, axes: np.ndarray) -> Scan:
    """The same volume with its axes permuted and flipped so that they run nearest to those of an affine."""
    order = _to_axes(scan.affine, axes)
    if np.array_equal(order, UNTURNED):
        return scan
    data = np.ascontiguousarray(nib.orientations.apply_orientation(scan.data, order))
    return Scan(data, scan.affine @ nib.orientations.inv_ornt_aff(order, scan.data.shape), scan.findings)


def _to_axes(affine: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(axes))


def _apart(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """How far apart the corners of two volumes of one shape lie at most, in voxels of the other."""
    x, y, z = ((0, n - 1) for n in shape)
    corners = np.array([[i, j, k, 1] for i in x for j in y for k in z])
    side = np.linalg.norm(other[:3, :3], axis=0).min()
    return float(np.linalg.norm((affine - other)[:3] @ corners.T, axis=0).max() / side)


def read_on_grid(path: str | os.PathLike, grid: Grid, resample: bool = True, mode: str = "bilinear") -> np.ndarray:
    """A volume (X, Y, Z) on the grid, float32. A permutation or flip of its axes is undone.

    Args:
        path: a NIfTI or MGH file.
        grid: where its voxels shall lie.
        resample: whether to bring a volume that lies elsewhere onto the grid, zeros where it does not reach; otherwise
            it is refused.
        mode: of that interpolation: `bilinear` (trilinear, that is), or `nearest` for labels.

    Raises:
        BundleError: as `scripts.volumes.reading.read_image`, or if the volume lies elsewhere and is not resampled.
    """
    scan = read_image(path)
    warn_of(path, scan.findings)
    turned = turned_onto(scan, grid.affine)
    place = Place(_shape(turned), turned.affine)
    if place.lies_on(grid):
        return turned.data
    if not resample:
        raise _elsewhere(path, place, grid)
    image = MetaTensor(torch.from_numpy(scan.data)[None], affine=scan.affine)
    onto = SpatialResample(mode=mode, padding_mode="zeros")
    return onto(image, dst_affine=grid.affine, spatial_size=grid.shape).as_tensor()[0].numpy()


def _shape(scan: Scan) -> tuple[int, int, int]:
    x, y, z = scan.data.shape
    return x, y, z


def read_at(path: str | os.PathLike, grid: Grid | None) -> np.ndarray:
    """A volume (X, Y, Z) on the grid, as `read_on_grid` gives it; without a grid where it lies, its axes as `AXES`."""
    if grid is not None:
        return read_on_grid(path, grid)
    scan = read_image(path)
    warn_of(path, scan.findings)
    return turned_onto(scan, AXES).data


def check_place(path: str | os.PathLike, grid: Grid, resample: bool = False) -> None:
    """Refuse a volume that `read_on_grid` would refuse, by its header alone.

    Raises:
        BundleError: as there.
    """
    place = place_of(path, grid.affine)
    if not resample and not place.lies_on(grid):
        raise _elsewhere(path, place, grid)


def _elsewhere(path: str | os.PathLike, place: Place, grid: Grid) -> BundleError:
    wanted = Place(grid.shape, grid.affine)
    if place.shape != wanted.shape:
        return BundleError(f"the volume {path} has shape {place.shape}, not {wanted.shape}: {WAYS_OUT}")
    found, there = place.in_words(), wanted.in_words()
    return BundleError(f"the volume {path} does not lie on the grid: it has {found}; the grid has {there}: {WAYS_OUT}")


def world_grid(place: Place, path: str | os.PathLike) -> Grid:
    """The grid of a volume whose axes are those of the world.

    Raises:
        BundleError: if they are not, naming the file.
    """
    steps = np.diag(place.affine)[:3]
    if np.abs(place.affine[:3, :3] - np.diag(steps)).max() > OBLIQUE * np.abs(place.affine[:3, :3]).max():
        raise BundleError(f"the axes of {path} are not left-right, back-front and up-down: prepare the scan first")
    return Grid(place.shape, steps.tolist(), place.affine[:3, 3].tolist())


def warn_of(path: str | os.PathLike, findings: Sequence[str]) -> None:
    """Log what is doubtful of a file; of findings that differ in their numbers alone, the first in each process."""
    for finding in findings:
        kind = re.sub(r"[\d.]+", "#", finding)
        if kind not in _SAID:
            _SAID.add(kind)
            logger.warning(f"the volume {path} {finding} (others of which this holds are not named)")
