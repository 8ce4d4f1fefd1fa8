# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What is random of a sample of a GAN's training, drawn with the sample: noise, and how real and fake are moved."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform, RandomizableTrait
from torch import Tensor
from torch.nn import functional as F

from scripts.core.options import number, probability, whole_number

NOISES = ("prior_noise", "opponent_noise", "posterior_noise")
SEED_LIMIT = 2**31


class Augmentation:
    """The same random flips, shifts and factors of intensity on real and on fake volumes, with gradients.

    The discriminator never sees a volume as it is, so that with few scans it does not learn them by heart (Zhao et al.
    2020, arXiv:2006.10738); the generator does not learn the changes, since fakes have them as well.

    Args:
        flip: probability of a left-right flip.
        shift: largest shift in voxels along each axis; what moves in is 0.
        intensity: largest relative change of the intensities.

    Raises:
        BundleError: for values that are none.
    """

    def __init__(self, flip: Any = 0.5, shift: Any = 2, intensity: Any = 0.1) -> None:
        self.flip = probability(flip, "flip")
        self.shift = whole_number(shift, "shift")
        self.intensity = number(intensity, "intensity", 0.0, 1.0)

    def draw(self) -> Tensor:
        """Whether to flip, the shifts along x, y, z, and the factor: (5,), from torch's random state."""
        flips = torch.rand(1) < self.flip
        shifts = torch.randint(-self.shift, self.shift + 1, (3,))
        return torch.cat([flips.float(), shifts.float(), 1.0 + self.intensity * (2.0 * torch.rand(1) - 1.0)])

    @staticmethod
    def apply(volumes: Tensor, draws: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) with what `draw` gave for each, (B, 5)."""
        return torch.stack([_moved(volume, *draw) for volume, draw in zip(volumes, draws.tolist(), strict=True)])


def _moved(volume: Tensor, flip: float, x: float, y: float, z: float, factor: float) -> Tensor:
    volume = volume.flip(1) if flip else volume
    return factor * F.pad(volume, [side for shift in (z, y, x) for side in (int(shift), -int(shift))])


class DrawNoisesd(MapTransform, RandomizableTrait):
    """Dictionary transform that adds what is random of a sample, from torch's random state.

    Added are three standard normal noises (noise_size,), `augmentation` (5,), and `noise_seed` for noise on volumes.

    Args:
        keys: the entry with the volume, which is left as it is.
        noise_size: of the generator.
        augmentation: draws what real and fake have in common.
    """

    def __init__(self, keys: str, noise_size: int, augmentation: Augmentation) -> None:
        super().__init__(keys)
        self.noise_size, self.augmentation = noise_size, augmentation

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with what was drawn."""
        drawn: dict[Hashable, Any] = {name: torch.randn(self.noise_size) for name in NOISES}
        drawn |= {"augmentation": self.augmentation.draw(), "noise_seed": torch.randint(SEED_LIMIT, ())}
        return {**data, **drawn}
