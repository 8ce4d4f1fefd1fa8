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
"""Samplers: how a latent moves from one timestep of a trajectory to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from monai.networks.schedulers import DDIMScheduler, RFlowScheduler, Scheduler
from torch import Tensor

from scripts.errors import BundleError
from scripts.options import whole_number
from scripts.schedules import schedule_name


class Sampler(Protocol):
    """What walks from noise to a clean latent: one entry of the map `samplers`.

    Attributes:
        schedule: the noise levels that it steps along.
        eta: share of fresh noise in a step; 0 for a deterministic sampler.
    """

    schedule: Scheduler
    eta: float

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the trajectory, falling."""

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The latents (B, C, x, y, z) at the next timestep, from the network's output at this one."""


class LeadingDDIMScheduler(DDIMScheduler):
    """MONAI's DDIM schedule with the timesteps that the released model was sampled with.

    For n of N steps these are (n - 1) * (N // n), ..., N // n, 0. MONAI 1.6 spaces its own from N - 1 down
    to 0 but still steps by N // n, so that it lands between the timesteps of its list.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a trajectory.

        Raises:
            BundleError: unless 1 <= num_inference_steps <= num_train_timesteps.
        """
        steps = _checked_steps(num_inference_steps, self)
        self.num_inference_steps = steps
        stride = self.num_train_timesteps // steps
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device) * stride + self.steps_offset


class DDIMSampler:
    """The family of Song et al. 2021 (arXiv:2010.02502), from deterministic to ancestral.

    With x0 and e the clean latent and the noise that the network's output implies at timestep t, and a_s the
    cumulated alpha of the timestep s that comes after t,

        x_s = sqrt(a_s) x0 + sqrt(1 - a_s - v) e + sqrt(v) n,   v = eta^2 (1 - a_s)/(1 - a_t) (1 - a_t/a_s).

    `eta` 0 is DDIM. `eta` 1 over all steps of the schedule is the ancestral sampler of DDPM (Ho et al. 2020)
    with its smaller variance; over fewer it is that sampler on the shortened schedule.

    Args:
        schedule: the schedule that the model was trained with; it is copied.
        num_inference_steps: length of the trajectory.
        eta: 0 to 1, the share of fresh noise.

    Raises:
        BundleError: for another kind of schedule, or an impossible number of steps.
    """

    def __init__(self, schedule: LeadingDDIMScheduler, num_inference_steps: int, eta: float = 0.0) -> None:
        if not isinstance(schedule, DDIMScheduler):
            raise BundleError("this --sampler is for diffusion, and the target is flow: give --sampler flow")
        self.schedule = copy.deepcopy(schedule)
        self.schedule.set_timesteps(num_inference_steps)
        self.eta = float(eta)

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the trajectory, falling."""
        return self.schedule.timesteps.tolist()

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z), each sample with its own generator of fresh noise."""
        if self.eta == 0.0:
            return self.schedule.step(output, timestep, latent)[0]
        moved = [self._step_one(output[i : i + 1], timestep, latent[i : i + 1], g) for i, g in enumerate(generators)]
        return torch.cat(moved)

    def _step_one(self, output: Tensor, timestep: int, latent: Tensor, generator: torch.Generator) -> Tensor:
        # MONAI draws the noise where its input lies; on the CPU it is the same noise for every device.
        moved = self.schedule.step(output.float().cpu(), timestep, latent.cpu(), self.eta, generator)[0]
        return moved.to(latent)


class FlowSampler:
    """Euler steps along the straight path of rectified flow (Liu et al. 2022, arXiv:2209.03003).

    From t to the next timestep s of N, x_s = x_t + (t - s)/N v, with v the velocity from noise to data. The timesteps
    are those of MONAI's `RFlowScheduler`, whole numbers from N down, and 0 after the last.

    Args:
        schedule: the schedule that the model was trained with; it is copied.
        num_inference_steps: length of the trajectory.

    Raises:
        BundleError: for another kind of schedule, an impossible number of steps, or a schedule whose timesteps are
            not evenly spaced whole numbers: MONAI's step would round the next one of those and miss the end.
    """

    eta = 0.0

    def __init__(self, schedule: RFlowScheduler, num_inference_steps: int) -> None:
        if not isinstance(schedule, RFlowScheduler):
            raise BundleError("this --sampler is for the target flow: give --sampler ddim, or --target flow")
        if schedule.use_timestep_transform or not schedule.use_discrete_timesteps:
            raise BundleError(
                "the flow sampler needs schedules::flow with use_discrete_timesteps and without use_timestep_transform"
            )
        self.schedule = copy.deepcopy(schedule)
        self.schedule.set_timesteps(_checked_steps(num_inference_steps, schedule))

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the trajectory, falling."""
        return self.schedule.timesteps.tolist()

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z); `generators` are not used."""
        following = max((t for t in self.timesteps if t < timestep), default=0)
        return self.schedule.step(output, timestep, latent, following)[0]


def _checked_steps(num_inference_steps: Any, schedule: Scheduler) -> int:
    steps = whole_number(num_inference_steps, "num_inference_steps", least=1)
    if steps > schedule.num_train_timesteps:
        raise BundleError(
            f"--num_inference_steps {steps} is more than the {schedule.num_train_timesteps} steps of the schedule"
        )
    return steps


def default_sampler(target: str) -> str:
    """The name of the sampler that a target is sampled with unless another is asked for.

    Raises:
        BundleError: for an unknown target.
    """
    return schedule_name(target)


def choose_sampler(
    samplers: Mapping[str, Callable[..., Sampler]], name: str, num_inference_steps: Any = None
) -> Sampler:
    """The sampler of that name, with its own number of steps unless another is given.

    Raises:
        BundleError: for a name that is not in the map, or a sampler of another schedule than the target's.
    """
    if name not in samplers:
        raise BundleError(f"--sampler must be one of {', '.join(samplers)}, got '{name}'")
    if num_inference_steps is None:
        return samplers[name]()
    return samplers[name](num_inference_steps=num_inference_steps)
