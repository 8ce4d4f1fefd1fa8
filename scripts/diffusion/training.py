# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The second stage: what the denoiser minimises."""

from __future__ import annotations

from torch import Tensor, nn

from scripts.diffusion.objective import DiffusionObjective
from scripts.diffusion.validation import Denoises
from scripts.training.optimisation import Batch
from scripts.training.step import Loss


class DenoisingLoss(Loss):
    """The objective's mean loss of noisy latents.

    A batch holds scaled latents `image` (B, C, x, y, z), `noise` of their shape, `condition` (B, n), `timestep` (B,).

    Args:
        inferer: calls the denoiser with its conditions, such as `scripts.diffusion.denoiser.HybridInferer`.
        objective: noisy latents, target and weight of each sample.
    """

    inputs = ("image", "condition", "noise", "timestep")

    def __init__(self, inferer: Denoises, objective: DiffusionObjective) -> None:
        self.inferer, self.objective = inferer, objective

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The `loss`."""
        latent, noise, timestep = part["image"], part["noise"], part["timestep"]
        noisy = self.objective.noisy(latent, noise, timestep)
        output = self.inferer.denoise(network, noisy, timestep, part["condition"])
        return {"loss": self.objective.loss(output, latent, noise, timestep).mean()}
