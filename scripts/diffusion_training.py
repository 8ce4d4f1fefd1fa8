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
"""The second stage: what one iteration of the diffusion model's training does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ignite.engine import Engine
from torch import Tensor

from scripts.distributed import all_means
from scripts.ema import ExponentialMovingAverage
from scripts.hybrid import HybridInferer
from scripts.objective import DiffusionObjective
from scripts.optimisation import Batch, Optimisation

INPUTS = ("image", "condition", "noise", "timestep")


class DiffusionStep:
    """One iteration of the denoiser: the `iteration_update` of MONAI's `SupervisedTrainer`.

    MONAI's own iteration draws noise and timesteps from the device's random state; here they come with the batch, so
    that they depend neither on the number of processes nor on where a training was stopped.

    Args:
        optimisation: minimises with the denoiser.
        inferer: calls the denoiser with its conditions.
        objective: noise, target and weight of each sample.
        average: follows the weights, if not None.
    """

    def __init__(
        self,
        optimisation: Optimisation,
        inferer: HybridInferer,
        objective: DiffusionObjective,
        average: ExponentialMovingAverage | None = None,
    ) -> None:
        self.optimisation, self.inferer, self.objective, self.average = optimisation, inferer, objective, average

    def __call__(self, engine: Engine, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Train on one batch: scaled latents `image` (B, C, x, y, z), `condition` (B, n), `noise`, `timestep` (B,).

        Returns:
            `loss` and `losses`: means over the batch and over all processes.
        """
        self.optimisation.network.train()
        on_device = partial(Tensor.to, device=engine.state.device, non_blocking=True)
        losses = self.optimisation({name: on_device(batch[name]) for name in INPUTS}, self._losses)
        if self.average is not None:
            self.average.update()
        numbers = all_means(losses)
        return {"loss": numbers["loss"], "losses": numbers}

    def _losses(self, part: Batch) -> dict[str, Tensor]:
        latent, noise, timestep = part["image"], part["noise"], part["timestep"]
        noisy = self.objective.noisy(latent, noise, timestep)
        output = self.inferer.denoise(self.optimisation.network, noisy, timestep, part["condition"])
        return {"loss": self.objective.loss(output, latent, noise, timestep).mean()}
