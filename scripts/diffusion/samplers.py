# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Samplers: how a trajectory goes from noise to a clean latent, or volume."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler, RFlowScheduler, Scheduler
from torch import Tensor

from scripts.compute.bars import StepBar
from scripts.compute.devices import sent
from scripts.core.errors import BundleError
from scripts.core.options import checked_steps, yes_or_no
from scripts.diffusion.schedules import signal_and_noise, target_of
from scripts.diffusion.targets import find_target

Denoise = Callable[[Tensor, int], Tensor]
"""What calls the network: noisy latents (B, C, x, y, z) and their timestep to its output of the same shape."""

Generators = Sequence[torch.Generator]
"""One for each sample of a batch, on the CPU, of the noise that is added on the way."""


class Sampler(ABC):
    """What walks from noise to a clean latent: one entry of the map `samplers`.

    It holds what all trajectories of its length share, and nothing of a single one.

    Attributes:
        schedule: the noise levels that it steps along.
        eta: share of fresh noise in a step; 0 for a deterministic sampler.
    """

    schedule: Scheduler
    eta: float = 0.0

    @property
    def timesteps(self) -> list[int]:
        """One entry for each call of the network, in order; a level visited twice stands twice.

        Their number is the bar's total, and `num_inference_steps` in the sidecars.
        """
        return self.schedule.timesteps.tolist()

    @property
    def settings(self) -> dict[str, Any]:
        """For the sidecars: what else decides its samples, where it is not as by default."""
        return {"clip_sample": True} if getattr(self.schedule, "clip_sample", False) else {}

    @torch.no_grad()
    def sample(self, denoise: Denoise, noise: Tensor, generators: Generators) -> Tensor:
        """Walk a whole trajectory, with a bar on a terminal.

        Args:
            denoise: is called once for each entry of `timesteps`, in their order.
            noise: standard normal, (B, C, x, y, z).
            generators: of the batch's samples.

        Returns:
            The clean latents, (B, C, x, y, z).
        """
        with StepBar(len(self.timesteps), "denoising") as bar:

            def counted(latent: Tensor, timestep: int) -> Tensor:
                output = denoise(latent, timestep)
                bar.update()
                return output

            return self.walk(counted, noise, generators)

    @abstractmethod
    def walk(self, denoise: Denoise, noise: Tensor, generators: Generators) -> Tensor:
        """`sample`, without the bar."""


class OneStepSampler(Sampler):
    """A sampler whose next latent follows from the latest and the network's output for it."""

    def walk(self, denoise: Denoise, noise: Tensor, generators: Generators) -> Tensor:
        """A step at each timestep."""
        latent = noise
        for timestep in self.timesteps:
            latent = self.step(denoise(latent, timestep), timestep, latent, generators)
        return latent

    @abstractmethod
    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Generators) -> Tensor:
        """The latents (B, C, x, y, z) at the next timestep, from the network's output at this one."""


class LeadingDDIMScheduler(DDIMScheduler):
    """MONAI's DDIM schedule with the timesteps that the released model was sampled with.

    For n of N steps these are i N / n, rounded down, for i from n - 1 to 0: more steps start no later, and where n
    divides N, as the released 50 do, all are N / n apart. MONAI 1.6 spaces its own from N - 1 down to 0 but still
    steps by N // n, so that it lands between the timesteps of its list.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a trajectory.

        Raises:
            BundleError: unless 1 <= num_inference_steps <= num_train_timesteps.
        """
        steps = checked_steps(num_inference_steps, self.num_train_timesteps)
        self.num_inference_steps = steps
        places = torch.arange(steps - 1, -1, -1, device=device) * self.num_train_timesteps // steps
        self.timesteps = places + self.steps_offset


def strided_timesteps(schedule: DDIMScheduler) -> Tensor:
    """For n of N steps (n - 1) (N // n), ..., N // n, 0: with 64 of 1000 the first is 945, not 984. int64."""
    n = schedule.num_inference_steps
    return torch.arange(n - 1, -1, -1) * (schedule.num_train_timesteps // n)


def even_timesteps(schedule: DDIMScheduler) -> Tensor:
    """Whole timesteps from the noisiest of a schedule down to 0, as evenly spaced as rounding lets them be: int64."""
    spaced = np.linspace(schedule.num_train_timesteps - 1, 0, schedule.num_inference_steps)
    return torch.from_numpy(spaced.round().astype(np.int64))


SPACINGS: dict[str, Callable[[DDIMScheduler], Tensor]] = {
    "leading": lambda schedule: schedule.timesteps,
    "strided": strided_timesteps,
    "even": even_timesteps,
}
"""Name -> the timesteps of a schedule whose number of steps is set; `leading` are those of `LeadingDDIMScheduler`."""


class DDIMSampler(OneStepSampler):
    """The family of Song et al. 2021 (arXiv:2010.02502), from deterministic to ancestral.

    With x and e the clean latent and the noise that the network's output implies at timestep t, and a_s the
    cumulated alpha of the timestep s that comes after t,

        x_s = sqrt(a_s) x + sqrt(1 - a_s - v) e + sqrt(v) n,   v = eta^2 (1 - a_s)/(1 - a_t) (1 - a_t/a_s).

    `eta` 0 is DDIM. `eta` 1 over all steps of the schedule is the ancestral sampler of DDPM (Ho et al. 2020)
    with its smaller variance; over fewer it is that sampler on the shortened schedule.

    Where the schedule clips x, e no longer fits it: with `recompute_noise`, and with `eta` above 0, it becomes
    (z - sqrt(a_t) x) / sqrt(1 - a_t), for noisy z.

    Args:
        schedule: the schedule that the model was trained with; it is copied.
        num_inference_steps: length of the trajectory.
        eta: 0 to 1, the share of fresh noise.
        spacing: of the timesteps, one of `SPACINGS`.
        recompute_noise: whether the noise follows from the clipped x; without clipping, it is the same.

    Raises:
        BundleError: for another kind of schedule, an impossible number of steps, or another spacing.
    """

    def __init__(
        self,
        schedule: LeadingDDIMScheduler,
        num_inference_steps: int,
        eta: float = 0.0,
        spacing: str = "leading",
        recompute_noise: Any = False,
    ) -> None:
        if not isinstance(schedule, DDIMScheduler):
            raise BundleError("this --sampler is for diffusion, and the target is flow: give --sampler flow")
        if spacing not in SPACINGS:
            raise BundleError(f"the spacing of a sampler's timesteps is {' or '.join(SPACINGS)}, not '{spacing}'")
        self.schedule = copy.deepcopy(schedule)
        self.schedule.set_timesteps(num_inference_steps)
        self.schedule.timesteps = SPACINGS[spacing](self.schedule)
        self.eta, self.spacing = float(eta), spacing
        self.recompute_noise = yes_or_no(recompute_noise, "recompute_noise")
        self._clean = CleanLatent(self.schedule, self.timesteps)
        levels = signal_and_noise if self.eta else rounded_signal_and_noise
        final = float(self.schedule.final_alpha_cumprod)
        visited = [*levels(self.schedule, self.timesteps), (final**0.5, (1.0 - final) ** 0.5)]
        self._steps = dict(zip(self.timesteps, pairwise(visited), strict=True))

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Generators) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z), each sample with its own generator of fresh noise."""
        (a, s), (a_next, s_next) = self._steps[timestep]
        if self.eta == 0.0 and not self.recompute_noise:
            clean, noise = self._clean.with_noise(output, latent, a, s)
            return a_next * clean + s_next * noise
        variance = (self.eta * s_next / s) ** 2 * (1.0 - (a / a_next) ** 2)
        clean = self._clean(output, latent, timestep)
        noise = (latent - a * clean) / s
        moved = a_next * clean + (s_next**2 - variance) ** 0.5 * noise
        return moved + variance**0.5 * fresh_noise(latent, generators) if variance else moved

    @property
    def settings(self) -> dict[str, Any]:
        """Clipping, spacing, and whether noise is recomputed, where they are not as by default."""
        spacing = {} if self.spacing == "leading" else {"spacing": self.spacing}
        return {**super().settings, **spacing, **({"recompute_noise": True} if self.recompute_noise else {})}


def rounded_signal_and_noise(schedule: Scheduler, timesteps: Sequence[int]) -> list[tuple[float, float]]:
    """`signal_and_noise` as MONAI computes it, in float32 all along: so DDIM's steps are theirs bit for bit."""
    powers = schedule.alphas_cumprod[list(timesteps)]
    return list(zip((powers**0.5).tolist(), ((1 - powers) ** 0.5).tolist(), strict=True))


def fresh_noise(latent: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise of the latents' shape, each sample's from its own generator on the CPU."""
    noise = torch.stack([torch.randn(latent.shape[1:], generator=generator) for generator in generators])
    return sent(noise, latent.device)


class CleanLatent:
    """The clean latent that the network's output implies, on a schedule of diffusion.

    A timestep's factors are numbers on the host, computed beforehand, so that a trajectory never waits for the device.

    Args:
        schedule: of diffusion; its `clip_sample` is heeded.
        timesteps: those that it will be asked for.
    """

    def __init__(self, schedule: Scheduler, timesteps: Sequence[int]) -> None:
        self._target, levels = find_target(target_of(schedule)), signal_and_noise(schedule, timesteps)
        self._factors = {t: self._target.clean_factors(*level) for t, level in zip(timesteps, levels, strict=True)}
        self._limits = schedule.clip_sample_values if schedule.clip_sample else None

    def __call__(self, output: Tensor, latent: Tensor, timestep: int) -> Tensor:
        """The clean latents (B, C, x, y, z) from the network's output for noisy ones at the timestep."""
        of_latent, of_output = self._factors[timestep]
        return self._clipped(of_latent * latent + of_output * output)

    def with_noise(self, output: Tensor, latent: Tensor, a: float, s: float) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise, both (B, C, x, y, z), for noisy latents of the level a, s."""
        clean = self._clipped(self._target.clean(output, latent, a, s))
        return clean, self._target.noise(output, latent, a, s)

    def _clipped(self, clean: Tensor) -> Tensor:
        return clean if self._limits is None else clean.clamp(*self._limits)


class FlowSampler(OneStepSampler):
    """Euler steps along the straight path of rectified flow (Liu et al. 2022, arXiv:2209.03003).

    From t to the next timestep s of N, with v the network's output, the velocity from noise to data,

        x_s = x_t + (t - s)/N v.

    The timesteps are those of MONAI's `RFlowScheduler`, whole numbers from N down, and 0 after the last.

    Args:
        schedule: the schedule that the model was trained with; it is copied.
        num_inference_steps: length of the trajectory.

    Raises:
        BundleError: for another kind of schedule, an impossible number of steps, or a schedule whose timesteps are
            not evenly spaced whole numbers, between which the trajectory would miss the end.
    """

    def __init__(self, schedule: RFlowScheduler, num_inference_steps: int) -> None:
        if not isinstance(schedule, RFlowScheduler):
            raise BundleError("this --sampler is for the target flow: give --sampler ddim, or --target flow")
        if schedule.use_timestep_transform or not schedule.use_discrete_timesteps:
            raise BundleError(
                "the flow sampler needs schedules::flow with use_discrete_timesteps and without use_timestep_transform"
            )
        self.schedule = copy.deepcopy(schedule)
        self.schedule.set_timesteps(checked_steps(num_inference_steps, schedule.num_train_timesteps))
        self._following = dict(pairwise([*self.timesteps, 0]))

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Generators) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z); `generators` are not used."""
        return self._moved(latent, output, timestep, self._following[timestep])

    def _moved(self, latent: Tensor, velocity: Tensor, timestep: int, following: int) -> Tensor:
        return latent + velocity * ((timestep - following) / self.schedule.num_train_timesteps)


class MidpointSampler(FlowSampler):
    """The midpoint method on the path of rectified flow: a whole step takes the velocity at its middle.

    From t over the middle m to s, with v(x, t) the network's output for x at t,

        x_m = x_t + (t - m)/N v(x_t, t),   x_s = x_t + (t - s)/N v(x_m, m).

    Of the timesteps of `FlowSampler`, every second one is a middle. n timesteps call the network n times, and the error
    falls with n^2, where that of Euler's steps falls with n.

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

    def walk(self, denoise: Denoise, noise: Tensor, generators: Generators) -> Tensor:
        """Two timesteps a step; `generators` are not used."""
        latent = noise
        for timestep, middle in zip(self.timesteps[::2], self.timesteps[1::2], strict=True):
            halfway = self.step(denoise(latent, timestep), timestep, latent, generators)
            latent = self._moved(latent, denoise(halfway, middle), timestep, self._following[middle])
        return latent


def default_sampler(target: str) -> str:
    """The name of the sampler that a target is sampled with unless another is asked for: that of its schedule.

    Raises:
        BundleError: for an unknown target.
    """
    return find_target(target).schedule


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
