# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The voxel grid that every volume of the project lies on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scripts.core.errors import BundleError


class Grid:
    """A regular voxel grid in MNI152 millimetres, its axes parallel to the world's.

    Args:
        shape: voxels along x, y, z.
        spacing: step in mm from one voxel to the next along each axis; negative where the index runs
            against the world axis (the released model stores x from right to left).
        origin: world coordinates (RAS+, mm) of the centre of voxel (0, 0, 0).

    Raises:
        BundleError: if a size is not positive or a step is zero.
    """

    def __init__(self, shape: Sequence[int], spacing: Sequence[float], origin: Sequence[float]) -> None:
        self.spacing = tuple(float(s) for s in spacing)
        self.origin = tuple(float(o) for o in origin)
        if not len(shape) == len(self.spacing) == len(self.origin) == 3:
            raise BundleError(f"a grid has three axes: got shape {shape}, spacing {spacing}, origin {origin}")
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        if min(self.shape) < 1 or 0.0 in self.spacing:
            raise BundleError(f"a grid needs sizes above 0 and steps other than 0: got {shape}, {spacing}")

    @property
    def affine(self) -> np.ndarray:
        """The 4 x 4 matrix from voxel indices to world millimetres, float64."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = self.origin
        return affine

    def latent_shape(self, factor: int, multiple: int = 1) -> tuple[int, int, int]:
        """Spatial shape of the latent of an autoencoder which divides each side by `factor`.

        Args:
            factor: of the autoencoder; 1 where there is none.
            multiple: what each side of the latent has to be divisible by: a UNet that halves it twice needs 4.

        Raises:
            BundleError: if a size of the grid is no multiple of the factor, or the latent's none of `multiple`.
        """
        if any(n % factor for n in self.shape):
            raise BundleError(f"the autoencoder divides the grid {self.shape} by {factor}: use multiples of {factor}")
        if factor == 1 and any(n % multiple for n in self.shape):
            raise BundleError(f"the diffusion UNet halves the grid {self.shape}: use multiples of {multiple}")
        if any(n // factor % multiple for n in self.shape):
            raise BundleError(
                f"of the grid {self.shape} the autoencoder makes latents {tuple(n // factor for n in self.shape)}, and "
                f"the diffusion UNet needs multiples of {multiple}: use a grid of multiples of {factor * multiple}, or "
                "fewer levels"
            )
        x, y, z = (n // factor for n in self.shape)
        return x, y, z
