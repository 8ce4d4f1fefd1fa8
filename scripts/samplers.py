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
from scripts.options import checked_steps
from scripts.schedules import schedule_name, signal_and_noise, target_of


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
        steps = checked_steps(num_inference_steps, self.num_train_timesteps)
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
        self._clean = CleanLatent(self.schedule, self.timesteps)
        levels = signal_and_noise(self.schedule, self.timesteps)
        final = float(self.schedule.final_alpha_cumprod)
        following = [*levels[1:], (final**0.5, (1.0 - final) ** 0.5)]
        self._steps = dict(zip(self.timesteps, zip(levels, following), strict=True))

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the trajectory, falling."""
        return self.schedule.timesteps.tolist()

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z), each sample with its own generator of fresh noise."""
        if self.eta == 0.0:
            return self.schedule.step(output, timestep, latent)[0]
        (a, s), (a_next, s_next) = self._steps[timestep]
        variance = (self.eta * s_next / s) ** 2 * (1.0 - (a / a_next) ** 2)
        clean = self._clean(output, latent, timestep)
        noise = (latent - a * clean) / s
        moved = a_next * clean + (s_next**2 - variance) ** 0.5 * noise
        return moved + variance**0.5 * fresh_noise(latent, generators) if variance else moved


def fresh_noise(latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of the latents' shape, each sample's from its own generator on the CPU."""
    noise = torch.stack([torch.randn(latent.shape[1:], generator=generator) for generator in generators])
    if latent.device.type == "cuda":  # from pinned memory the copy does not wait for what the GPU still computes
        noise = noise.pin_memory()
    return noise.to(latent.device, non_blocking=True)


class CleanLatent:
    """The clean latent that the network's output implies, on a schedule of diffusion.

    `DiffusionObjective.clean` is the same for batches of mixed timesteps. Here a timestep's factors are numbers on the
    host, computed beforehand, so that a trajectory never waits for the device.

    Args:
        schedule: of diffusion; its `clip_sample` is heeded.
        timesteps: those that it will be asked for.
    """

    def __init__(self, schedule: Scheduler, timesteps: Sequence[int]) -> None:
        target, levels = target_of(schedule), signal_and_noise(schedule, timesteps)
        self._factors = {t: _factors(target, *level) for t, level in zip(timesteps, levels, strict=True)}
        self._limits = schedule.clip_sample_values if schedule.clip_sample else None

    def __call__(self, output: Tensor, latent: Tensor, timestep: int) -> Tensor:
        """The clean latents (B, C, x, y, z) from the network's output for noisy ones at the timestep."""
        of_latent, of_output = self._factors[timestep]
        clean = of_latent * latent + of_output * output
        return clean if self._limits is None else clean.clamp(*self._limits)


def _factors(target: str, a: float, s: float) -> tuple[float, float]:
    return {"epsilon": (1.0 / a, -s / a), "sample": (0.0, 1.0), "velocity": (a, -s)}[target]


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
        self.schedule.set_timesteps(checked_steps(num_inference_steps, schedule.num_train_timesteps))

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the trajectory, falling."""
        return self.schedule.timesteps.tolist()

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z); `generators` are not used."""
        return self.schedule.step(output, timestep, latent, self._following(timestep))[0]

    def _following(self, timestep: int) -> int:
        return max((t for t in self.timesteps if t < timestep), default=0)


class MidpointSampler(FlowSampler):
    """The midpoint method on the path of rectified flow: a whole step takes the velocity at its middle.

    Of the timesteps of `FlowSampler`, every second one is the middle of a step from the one before to the one after.
    n timesteps call the network n times, and the error falls with n^2, where that of Euler's steps falls with n.

    Args:
        schedule: the schedule that the model was trained with; it is copied.
        num_inference_steps: length of the trajectory, an even number.

    Raises:
        BundleError: as `FlowSampler`, and for an odd number of steps.
    """

    def __init__(self, schedule: RFlowScheduler, num_inference_steps: int) -> None:
        super().__init__(schedule, num_inference_steps)
        if len(self.timesteps) % 2:
            raise BundleError(f"--num_inference_steps of --sampler midpoint must be even, got {num_inference_steps}")

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Half a step, to the middle, or a whole one from where that began; `generators` are not used."""
        if self.timesteps.index(timestep) % 2 == 0:
            self._start = timestep, latent
            return super().step(output, timestep, latent, generators)
        start, before = self._start
        return self.schedule.step(output, start, before, self._following(timestep))[0]


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
