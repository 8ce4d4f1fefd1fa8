# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The range of intensities in pixel-space diffusion: volumes are 0..1, and the denoiser sees them as -1..1."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import MapTransform
from torch import Tensor


def to_denoiser(volume: Tensor) -> Tensor:
    """Volumes as the denoiser sees them, -1..1; what lies outside of 0..1 is cut, as samplers cut what they make."""
    return volume.clamp(0.0, 1.0) * 2.0 - 1.0


def to_volume(clean: Tensor) -> Tensor:
    """Volumes, nominally 0..1, of what a trajectory ends in: the inverse of `to_denoiser`."""
    return (clean + 1.0) / 2.0


class ToDenoiserd(MapTransform):
    """Dictionary transform from volumes of 0..1 to what the denoiser sees; see `to_denoiser`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its volumes in -1..1."""
        moved = dict(data)
        for key in self.key_iterator(moved):
            moved[key] = to_denoiser(moved[key])
        return moved
