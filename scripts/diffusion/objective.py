# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the diffusion model is trained on: noisy latents, the target, and the weight of each noise level."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.networks.schedulers import RFlowScheduler, Scheduler
from monai.transforms import MapTransform
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.core.options import is_absent, number
from scripts.diffusion.schedules import target_of
from scripts.diffusion.targets import find_target

DENSITIES = ("uniform", "logit-normal")


class DiffusionObjective:
    """The training objective on a schedule: the weighted squared error of the network's estimate of a target.

    A noisy latent at timestep t is z = a x + s e, for a clean latent x and standard normal noise e. On a schedule of
    diffusion with cumulated alphas A, a = sqrt(A_t) and s = sqrt(1 - A_t) at whole timesteps 0..N-1; on the
    rectified flow a = 1 - t/N and s = t/N at any t from 0 to N. The target, which follows from the schedule, is a row
    of `scripts.diffusion.targets.TARGETS`.

    Args:
        schedule: as `scripts.diffusion.schedules.choose_schedule` makes it.
        min_snr_gamma: cap on the signal-to-noise ratio in the loss's weight (Hang et al. 2023, arXiv:2303.09556,
            where it is 5; see `Target.min_snr_weight`); None or 0 weighs all timesteps alike.
        timestep_density: how training draws timesteps: `uniform`, or `logit-normal` (Esser et al. 2024,
            arXiv:2403.03206).
        density_location: of the logit-normal density; above 0 for more noise.
        density_scale: of the logit-normal density.

    Raises:
        BundleError: for an unknown density, a bad number, or `min_snr_gamma` with the target `flow`.
    """

    def __init__(
        self,
        schedule: Scheduler,
        min_snr_gamma: Any = None,
        timestep_density: str = "uniform",
        density_location: Any = 0.0,
        density_scale: Any = 1.0,
    ) -> None:
        self.row = find_target(target_of(schedule))
        self.is_flow = isinstance(schedule, RFlowScheduler)
        self.num_train_timesteps = schedule.num_train_timesteps
        self.gamma = None if is_absent(min_snr_gamma) else number(min_snr_gamma, "min_snr_gamma", 0.0) or None
        if timestep_density not in DENSITIES:
            raise BundleError(f"--timestep_density must be one of {', '.join(DENSITIES)}, got '{timestep_density}'")
        self.density = timestep_density
        self.location = number(density_location, "density_location")
        self.scale = number(density_scale, "density_scale", 0.0)
        if self.is_flow:
            if self.gamma is not None:
                raise BundleError("--min_snr_gamma is a weight of diffusion schedules: leave it out with --target flow")
        else:
            self._signal_power = schedule.alphas_cumprod.detach().clone()

    def draw(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and a timestep for one latent, with torch's random state.

        Args:
            latent: (C, x, y, z).

        Returns:
            Standard normal noise of the latent's shape, and the timestep without dimensions: int64, or float32
            for the rectified flow.
        """
        noise = torch.randn_like(latent)
        return noise, self.timestep_at(self._noise_quantile())

    def timestep_at(self, u: Tensor) -> Tensor:
        """Timesteps at fractions `u` of the schedule, from 0, the clean end, to 1: int64, or float32 for the flow."""
        timestep = u * self.num_train_timesteps
        return timestep if self.is_flow else timestep.long().clamp(max=self.num_train_timesteps - 1)

    def _noise_quantile(self) -> Tensor:
        if self.density == "uniform":
            return torch.rand(())
        return torch.sigmoid(self.location + self.scale * torch.randn(()))

    def _signal_and_noise(self, timestep: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
        if self.is_flow:
            noise = timestep.float() / self.num_train_timesteps
            signal = 1.0 - noise
        else:
            power = self._signal_power.to(timestep.device)[timestep]
            signal, noise = power.sqrt(), (1.0 - power).sqrt()
        shape = (-1, *[1] * (dimensions - 1))
        return signal.reshape(shape), noise.reshape(shape)

    def noisy(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noisy latents: `latent` and `noise` are (B, C, x, y, z), `timestep` (B,)."""
        a, s = self._signal_and_noise(timestep, latent.ndim)
        return a * latent + s * noise

    def target(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network shall put out for `noisy` of the same arguments, (B, C, x, y, z)."""
        return self.row.output(latent, noise, *self._signal_and_noise(timestep, latent.ndim))

    def weight(self, timestep: Tensor) -> Tensor:
        """The weight of each sample's squared error, (B,) float32; 1 without a cap."""
        if self.gamma is None:
            return torch.ones(timestep.shape, device=timestep.device)
        return self.row.min_snr_weight(*self._signal_and_noise(timestep, 1), self.gamma)

    def loss(self, output: Tensor, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The weighted mean squared error of each sample, (B,) float32, for the network's output on `noisy`."""
        error = output.float() - self.target(latent, noise, timestep).float()
        return self.weight(timestep) * error.square().flatten(1).mean(1)


class DrawNoised(MapTransform):
    """Dictionary transform that adds a latent's `noise` and `timestep` as the objective draws them.

    Args:
        keys: the one entry that holds the latent, (C, x, y, z).
        objective: draws, with torch's random state.

    Raises:
        ValueError: for more than one key.
    """

    def __init__(self, keys: str | Sequence[str], objective: DiffusionObjective) -> None:
        super().__init__(keys)
        if len(self.keys) != 1:
            raise ValueError(f"noise is drawn for one latent, got the keys {self.keys}")
        self.objective = objective

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with `noise`, of the latent's shape, and `timestep`, without dimensions."""
        noise, timestep = self.objective.draw(data[self.keys[0]])
        return {**data, "noise": noise, "timestep": timestep}
