# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Few steps: a network whose every estimate of the clean latent is meant to be where the trajectory ends.

Consistency models (Song et al. 2023, arXiv:2303.01469). The clean latent that a network's output implies is z itself
where there is no noise, for all targets but `sample`, so that the network needs no other form to become one.
"""

from __future__ import annotations

import copy

import torch
from monai.networks.schedulers import RFlowScheduler, Scheduler
from torch import Tensor

from scripts.core.options import checked_steps
from scripts.diffusion.samplers import Generators, OneStepSampler, fresh_noise
from scripts.diffusion.schedules import signal_and_noise, target_of
from scripts.diffusion.targets import find_target


def trailing_timesteps(schedule: Scheduler, steps: int) -> list[int]:
    """n of N timesteps, from the noisiest down: (k + 1) N / n, less 1 on a schedule of diffusion.

    Those of fewer steps are among those of a multiple of them.

    Raises:
        BundleError: unless 1 <= steps <= N.
    """
    count, length = checked_steps(steps, schedule.num_train_timesteps), schedule.num_train_timesteps
    less = 0 if isinstance(schedule, RFlowScheduler) else 1
    return [(k + 1) * length // count - less for k in reversed(range(count))]


class ConsistencySampler(OneStepSampler):
    """Estimates the clean latent, and puts fresh noise of the next level on it: 1 to 4 steps of a distilled model.

    Args:
        schedule: the schedule that the model was trained with; it is copied.
        num_inference_steps: n of `trailing_timesteps`.

    Raises:
        BundleError: for an impossible number of steps.
    """

    eta = 1.0
    for_students = True
    """Only models that were distilled give heads by it."""

    def __init__(self, schedule: Scheduler, num_inference_steps: int) -> None:
        asked = trailing_timesteps(schedule, num_inference_steps)
        self.schedule = copy.deepcopy(schedule)
        self.schedule.timesteps = torch.tensor(asked)
        levels = signal_and_noise(schedule, asked)
        self._target = find_target(target_of(schedule))
        self._steps = dict(zip(asked, zip(levels, [*levels[1:], (1.0, 0.0)]), strict=True))

    def step(self, output: Tensor, timestep: int, latent: Tensor, generators: Generators) -> Tensor:
        """One step for a batch of shape (B, C, x, y, z), each sample with its own generator of fresh noise."""
        level, (a, s) = self._steps[timestep]
        clean = self._target.clean(output, latent, *level)
        return a * clean + s * fresh_noise(latent, generators) if s else clean
