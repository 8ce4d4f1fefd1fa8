# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device that trains, where loading processes would be too slow for it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.transforms import MapTransform
from torch import Tensor

from scripts.core.options import number

SEEDS = "augmentation"
"""What a batch calls the seeds of its samples, (B,) int64."""


class DrawSeedd(MapTransform):
    """Dictionary transform that adds the seed of a sample's augmentation, drawn from torch's random state."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with `SEEDS`, int64 without dimensions."""
        return {**data, SEEDS: torch.randint(2**62, ())}


class DeviceAugmentation:
    """Smooth deformations with shifts, gain, gamma and noise of volumes of 0 to 1, each drawn from its own seed.

    The deformation is a free-form one, cubic B-splines of displacements at control points (Rueckert et al. 1999,
    doi:10.1109/42.796284). What a volume becomes depends on its seed alone, to rounding, not on the batch.

    Args:
        strength: factor of all that follows.
        shift, deformation: standard deviations in voxels, along each axis.
        control: voxels between two control points.
        gain, gamma: standard deviations, of a factor of intensities and of the logarithm of their exponent.
        noise: the largest standard deviation of normal noise; each volume's is uniform below it.

    Raises:
        BundleError: for a strength that is no number of at least 0.
    """

    def __init__(
        self,
        strength: Any,
        shift: float = 2.0,
        deformation: float = 2.0,
        control: float = 40.0,
        gain: float = 0.05,
        gamma: float = 0.1,
        noise: float = 0.01,
    ) -> None:
        self.strength, self.control = number(strength, "device_augmentation", least=0.0), control
        self.shift, self.deformation = shift * self.strength, deformation * self.strength
        self.gain, self.gamma, self.noise = (value * self.strength for value in (gain, gamma, noise))

    @torch.no_grad()
    def __call__(self, volumes: Tensor, seeds: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) to the same shape, cut to 0 to 1."""
        return torch.cat([self._augmented(one, seed) for one, seed in zip(volumes.split(1), seeds.tolist())])

    def _augmented(self, volume: Tensor, seed: int) -> Tensor:
        drawn = torch.Generator().manual_seed(seed)
        moved = self._moved(volume, drawn)
        gain, gamma, noise = torch.randn(2, generator=drawn).tolist() + torch.rand(1, generator=drawn).tolist()
        toned = moved.clamp(0.0, 1.0).pow(math.exp(self.gamma * gamma)) * (1.0 + self.gain * gain)
        hiss = torch.randn(
            volume.shape, device=volume.device, generator=torch.Generator(volume.device).manual_seed(seed)
        )
        return toned.add_(hiss, alpha=self.noise * noise).clamp_(0.0, 1.0)

    def _moved(self, volume: Tensor, drawn: torch.Generator) -> Tensor:
        shape = volume.shape[2:]
        bases = [cubic_basis(side, self.control).to(volume.device) for side in shape]
        points = torch.randn(3, *(basis.shape[1] for basis in bases), generator=drawn) * self.deformation
        points += torch.randn(3, 1, 1, 1, generator=drawn) * self.shift
        voxels = torch.einsum("cijk,xi,yj,zk->cxyz", points.to(volume.device), *bases)
        unit = torch.tensor([2.0 / side for side in shape], device=volume.device).view(3, 1, 1, 1)
        displacement = (voxels * unit).flip(0).permute(1, 2, 3, 0)  # grid_sample counts axes from the last
        identity = F.affine_grid(torch.eye(3, 4, device=volume.device)[None], list(volume.shape), align_corners=False)
        return F.grid_sample(volume, identity + displacement, padding_mode="zeros", align_corners=False)


def augmentation_on_device(strength: Any, **settings: float) -> DeviceAugmentation | None:
    """`DeviceAugmentation` of that strength, or None where it is 0.

    Raises:
        BundleError: as that.
    """
    made = DeviceAugmentation(strength, **settings)
    return made if made.strength > 0.0 else None


def cubic_basis(side: int, control: float) -> Tensor:
    """Values of the cubic B-splines around control points at each voxel of an axis, (voxels, points); rows sum to 1."""
    at = torch.arange(side) / control
    first = at.floor().long()
    t = at - first
    values = torch.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3],
        dim=1,
    )
    basis = torch.zeros(side, int(first.max()) + 4)
    return basis.scatter_(1, first[:, None] + torch.arange(4), values / 6.0)
