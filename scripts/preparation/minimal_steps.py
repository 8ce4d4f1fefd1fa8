# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Steps of the minimal preparation, of configs/minimal.yaml: heads stay as the scanner saw them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from scripts.preparation.optional_steps import StripSkull
from scripts.preparation.registration import Registration, head_centre, resample
from scripts.preparation.skull_stripping import Stripper
from scripts.preparation.steps import Record, TargetSpace
from scripts.volumes.scans import Scan, ScanError

ALIKE_MM = 0.005


@dataclass(frozen=True)
class ScalePercentiles:
    """Scales the scan so that two percentiles of all its voxels become 0 and 1; what lies outside is cut.

    Args:
        low, high: 0..100.
    """

    low: float = 0.1
    high: float = 99.9

    def __call__(self, record: Record) -> Record:
        """The record with its scan from 0 to 1.

        Raises:
            ScanError: if both percentiles are the same intensity.
        """
        scan = record.scan
        low, high = (float(value) for value in np.percentile(scan.data, [self.low, self.high]))
        if high <= low:
            message = f"has the same intensity at the percentiles {self.low:g} and {self.high:g}: is it a head?"
            raise ScanError("no contrast", message)
        scaled = np.clip((scan.data - low) / (high - low), 0.0, 1.0).astype(np.float32)
        return record.updated(scan=Scan(scaled, scan.affine))


class CentreHead:
    """Lays the scan's own axes along the grid's, and the middle of the head into the middle of the grid.

    Nothing is registered: a head that is tilted in the scanner stays so. Along axes whose voxels are as long as the
    grid's, the shift is by whole voxels, so that resampling copies them.

    Args:
        space: the grid.
        stripper: name of one in `strippers`, which finds the brain, whose bounding box is centred then; None takes the
            centroid of the top 180 mm of the head.
        strippers: see `StripSkull`.

    Raises:
        BundleError: if there is no such stripper.
    """

    def __init__(self, space: TargetSpace, stripper: Any, strippers: Mapping[str, Callable[[], Stripper]]) -> None:
        self.space, self.strip = space, StripSkull(space, stripper, strippers, flag="centre_by")

    def __call__(self, record: Record) -> Record:
        """The record with `found`, a turn of the axes and a shift.

        Raises:
            BundleError: if the stripper fails or finds no brain.
        """
        scan, grid = record.scan, self.space.grid
        found = self._centred(scan, head_centre(scan))
        if self.strip.stripper is not None:
            volume = resample(scan, found.rigid, grid.shape, grid.affine, order=1)
            brain = grid.affine @ [*_middle(self.strip.stripper.mask(volume, grid)), 1.0]
            found = self._centred(scan, (found.rigid @ brain)[:3])
        return record.updated(found=found)

    def _centred(self, scan: Scan, middle: np.ndarray) -> Registration:
        """How the scan lies where the point `middle`, in its mm, is in the middle of the grid."""
        grid, spacing = self.space.grid, scan.spacing
        centre = grid.affine[:3, :3] @ (np.array(grid.shape) - 1) / 2 + grid.affine[:3, 3]
        left, _, right = np.linalg.svd(scan.affine[:3, :3] / spacing)
        turn = left @ right  # the rotation nearest to the scan's axes, which may be sheared a little
        middle_voxel = np.linalg.solve(scan.affine[:3, :3], middle - scan.affine[:3, 3])
        first = middle_voxel + (grid.affine[:3, 3] - centre) / spacing
        alike = np.abs(spacing - np.abs(grid.spacing)) < ALIKE_MM
        shift = np.where(alike, np.round(first) - first, 0.0)  # of the grid's first voxel, in the scan's
        rigid = np.eye(4)
        rigid[:3, :3] = turn
        rigid[:3, 3] = middle + scan.affine[:3, :3] @ shift - turn @ centre
        return Registration(rigid, scale=1.0, similarity=float("nan"))

    def settings(self) -> dict[str, Any]:
        """What finds the brain, and the hash of its weights if it has some."""
        return self.strip.settings()


def _middle(brain: np.ndarray) -> np.ndarray:
    """The middle, in voxels, of the bounding box of a mask's largest part."""
    parts, _ = ndimage.label(brain)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    voxels = np.argwhere(parts == sizes.argmax())
    return (voxels.min(axis=0) + voxels.max(axis=0)) / 2
