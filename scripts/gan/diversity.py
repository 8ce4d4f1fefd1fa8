# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a generator collapses: how much samples of fixed noises resemble each other, beside real volumes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from scripts.compute.precision import autocast
from scripts.compute.processes import is_main, rank, world_size
from scripts.core.options import whole_number
from scripts.training.validation import Evaluation, Network, in_order
from scripts.volumes import pictures

PICTURED = 4


class SampleDiversity(Evaluation):
    """MS-SSIM between samples of fixed noises, and between real volumes, whose value a collapsed generator exceeds.

    Values: `ms_ssim`, and `ms_ssim_real` where there are two real volumes at least, means over pairs of neighbours in a
    ring. The first samples are drawn as `figures/samples_iteration-N.png`.

    Args:
        network, run_dir, every: see `Evaluation`. The network is a generator.
        noise_size: of the generator.
        metric: similarity of two volumes, each (1, 1, X, Y, Z).
        real: its items have `image`, (1, X, Y, Z), 0..1; the first ones are taken.
        count: of noises and of real volumes.
        amp: precision of the generator.
    """

    def __init__(
        self,
        network: Network,
        run_dir: str | os.PathLike,
        noise_size: int,
        metric: Callable[[Tensor, Tensor], Tensor],
        real: Dataset,
        every: Any = 1,
        count: Any = 8,
        amp: Any = False,
    ) -> None:
        super().__init__(network, run_dir, every)
        self.noise_size, self.metric, self.real, self.amp = noise_size, metric, real, amp
        self.count = whole_number(count, "diversity_volumes", least=2)
        self.of_real: dict[str, float] | None = None

    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        """Compare and draw; the real volumes are compared once."""
        device = next(network.parameters()).device
        if self.of_real is None:
            known = min(self.count, len(self.real))  # type: ignore[arg-type]
            similarity = self._similarity(lambda index: self.real[index]["image"][None].to(device), known)
            self.of_real = {"ms_ssim_real": similarity} if known > 1 else {}
        of_samples = self._similarity(lambda index: self._sample(network, index, device), self.count)
        self._draw(network, iteration, device)
        return {"ms_ssim": of_samples, **self.of_real}

    def _similarity(self, volume: Callable[[int], Tensor], count: int) -> float:
        own = list(enumerate(ring(count)))[rank() :: world_size()]
        values = in_order([(place, float(self.metric(volume(i), volume(j)))) for place, (i, j) in own])
        getattr(self.metric, "reset", int)()  # MONAI's metrics keep every value until they are told not to
        return float(np.mean(values)) if values else math.nan

    def _sample(self, network: nn.Module, index: int, device: torch.device) -> Tensor:
        noise = torch.randn(1, self.noise_size, generator=torch.Generator().manual_seed(index))
        with autocast(device, self.amp):
            return network(noise.to(device)).float()

    def _draw(self, network: nn.Module, iteration: int, device: torch.device) -> None:
        if is_main():
            volumes = [self._sample(network, index, device) for index in range(min(self.count, PICTURED))]
            planes = [pictures.strip(volume[0, 0].cpu().numpy()) for volume in volumes]
            labels = [f"noise {index}" for index in range(len(planes))]
            pictures.write(self.run_dir, "samples", iteration, pictures.sample_picture(labels, planes))


def ring(count: int) -> Sequence[tuple[int, int]]:
    """Pairs of neighbours among so many in a ring, none twice."""
    return [(index, (index + 1) % count) for index in range(count if count > 2 else count - 1)]
