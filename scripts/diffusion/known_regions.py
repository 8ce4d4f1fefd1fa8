# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Sampling what is missing so that it fits what is known: RePaint (Lugmayr et al. 2022, arXiv:2201.09865)."""

from __future__ import annotations

import torch
from monai.networks.schedulers import RFlowScheduler, Scheduler
from torch import Tensor
from tqdm import tqdm

from scripts.core.options import checked_steps, whole_number
from scripts.diffusion.samplers import Denoise, Generators, fresh_noise
from scripts.diffusion.schedules import signal_and_noise, target_of
from scripts.diffusion.targets import find_target

Level = tuple[float, float]


class KnownRegionSampler:
    """The ancestral sampler of any schedule, which is told at each level what is known there.

    With z' drawn from z of level (a, s) for the next one, (a', s'), by the network's x and e,

        z' = a' x + sqrt(s'^2 - v) e + sqrt(v) n,    v = (s'/s)^2 (s^2 - (a/a')^2 s'^2),

    and what is known replaced by the known latent with as much noise. The step is taken several times, each but the
    first after noise has carried z' back, z = (a/a') z' + sqrt(s^2 - (a/a')^2 s'^2) n, so that both regions agree.

    Args:
        schedule: that the model was trained with.
        steps: levels of noise.
        resamplings: how often each step is taken, at least once.

    Raises:
        BundleError: for a number out of range.
    """

    def __init__(self, schedule: Scheduler, steps: int, resamplings: int = 4) -> None:
        count, length = checked_steps(steps, schedule.num_train_timesteps), schedule.num_train_timesteps
        flows = isinstance(schedule, RFlowScheduler)
        self.timesteps = [((k + 1) if flows else k) * length // count for k in range(count)]
        self.levels = [(1.0, 0.0), *signal_and_noise(schedule, self.timesteps)]
        self.resamplings = whole_number(resamplings, "resamplings", least=1)
        self._target = find_target(target_of(schedule))

    @torch.no_grad()
    def sample(self, denoise: Denoise, known: Tensor, missing: Tensor, generators: Generators) -> Tensor:
        """Clean latents (B, C, x, y, z).

        Args:
            denoise: calls the network.
            known: clean latents, of which any value may stand where something is missing.
            missing: 1 where it is, else 0, (1, 1, x, y, z).
            generators: one a sample, of all noise.
        """
        latent = fresh_noise(known, generators)
        bar = tqdm(range(len(self.timesteps), 0, -1), "inpainting", unit="step", leave=False, disable=None)
        for step in bar:
            level, after = self.levels[step], self.levels[step - 1]
            for again in range(self.resamplings if step > 1 else 1):
                if again:
                    latent = self._noisier(latent, after, level, generators)
                told = level[0] * known + level[1] * fresh_noise(known, generators)
                latent = torch.where(missing > 0, latent, told)
                latent = self._step(denoise(latent, self.timesteps[step - 1]), latent, level, after, generators)
        return torch.where(missing > 0, latent, known)

    def _step(self, output: Tensor, latent: Tensor, level: Level, after: Level, generators: Generators) -> Tensor:
        (a, s), (a_next, s_next) = level, after
        clean = self._target.clean(output, latent, a, s)
        if not s_next:
            return clean
        variance = (s_next / s) ** 2 * (s**2 - (a / a_next * s_next) ** 2)
        noise = (latent - a * clean) / s
        kept = max(s_next**2 - variance, 0.0) ** 0.5
        return a_next * clean + kept * noise + variance**0.5 * fresh_noise(latent, generators)

    def _noisier(self, latent: Tensor, level: Level, wanted: Level, generators: Generators) -> Tensor:
        ratio = wanted[0] / level[0]
        spread = (wanted[1] ** 2 - (ratio * level[1]) ** 2) ** 0.5
        return ratio * latent + spread * fresh_noise(latent, generators)
