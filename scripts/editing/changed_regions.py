# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where an edit has changed a head: a soft mask, what is given back outside of it, how tissue seems to have moved."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.registration import optical_flow_ilk

from scripts.volumes.grid import Grid

SMOOTHING_MM = 2.0
UNCHANGED, CHANGED = 0.01, 0.05
"""Smoothed differences of intensities of 0 to 1: up to the first nothing has changed, from the second on all has."""
FLOW_MM, FLOW_RADIUS, FLOW_WARPS = 3.0, 3, 5
"""Voxels in mm at which motion is estimated, the radius of its window in these voxels, and how often it is refined."""
DARK = 0.05
"""Smoothed intensity below which there is air, which neither grows nor shrinks."""


def change_mask(reconstruction: np.ndarray, edited: np.ndarray, grid: Grid) -> np.ndarray:
    """How much of each voxel has changed: (X, Y, Z) float32, 0..1.

    Args:
        reconstruction: what comes back without an edit, (X, Y, Z).
        edited: what comes back with it, so that what the autoencoder cannot show is in neither.
        grid: of both.
    """
    sigmas = [SMOOTHING_MM / abs(step) for step in grid.spacing]
    difference = ndimage.gaussian_filter(np.abs(edited - reconstruction), sigmas)
    share = ((difference - UNCHANGED) / (CHANGED - UNCHANGED)).clip(0.0, 1.0)
    return (share * share * (3.0 - 2.0 * share)).astype(np.float32)


def give_back(scan: np.ndarray, reconstruction: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The edited volume with what the reconstruction lacks of the scan, where the mask of change is 0."""
    return edited + (1.0 - mask) * (scan - reconstruction)


def apparent_growth(before: np.ndarray, after: np.ndarray, grid: Grid) -> np.ndarray:
    """Logarithm of how much larger tissue seems to have become at each voxel, (X, Y, Z) float32.

    That of the Jacobian determinant of the optical flow between both (Le Besnerais & Champagnat 2005, iterative
    Lucas-Kanade), at 3 mm; 0 in the air. It is a picture of a change and no registration: no more than a few mm are
    followed.
    """
    zoom = [min(1.0, abs(step) / FLOW_MM) for step in grid.spacing]
    first, second = (ndimage.zoom(volume, zoom, order=1) for volume in (before, after))
    flow = optical_flow_ilk(second, first, radius=FLOW_RADIUS, num_warp=FLOW_WARPS, gaussian=True)
    derivatives = np.stack([np.stack(np.gradient(part), axis=-1) for part in flow], axis=-2)
    growth = -np.log(np.linalg.det(np.eye(3) + derivatives).clip(0.2, 5.0))  # the flow leads from after to before
    growth[ndimage.gaussian_filter(np.maximum(first, second), FLOW_RADIUS / 2) < DARK] = 0.0
    scale = [n / m for n, m in zip(before.shape, growth.shape, strict=True)]
    return ndimage.zoom(growth.astype(np.float32), scale, order=1, grid_mode=True, mode="nearest")
