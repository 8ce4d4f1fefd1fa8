# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A family without networks: blobs of noise, as bright as the first condition says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.conditions.conditions import Conditions
from scripts.sampling.family import ModelFamily
from scripts.volumes.grid import Grid


class Blobs(ModelFamily):
    """Its own range is -1..1, as that of a GAN; each sample draws a shift from its generator besides."""

    def __init__(self, grid: Grid, conditions: Conditions, contrast: float = 1.0) -> None:
        super().__init__()
        self.grid, self.conditions, self.contrast = grid, conditions, contrast

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (2, 4, 6, 4)

    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        assert condition.shape == (len(noise), len(self.conditions))
        bright = condition[:, :1].sum(dim=1) + torch.stack([0.1 * torch.rand((), generator=g) for g in generators])
        blobs = self.contrast * F.interpolate(noise[:, :1], self.grid.shape, mode="trilinear") + bright.view(
            -1, 1, 1, 1, 1
        )
        return (blobs.tanh() + 1.0) / 2.0

    def facts(self) -> dict[str, Any]:
        return {"family": "blobs", "contrast": self.contrast}
