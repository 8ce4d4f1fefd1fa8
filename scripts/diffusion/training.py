# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
