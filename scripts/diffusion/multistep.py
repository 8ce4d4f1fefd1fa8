# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Samplers of second order that reuse earlier outputs of the network: DPM-Solver++ and UniPC.

Both follow the probability flow of z = a x + s e, from noise to data, in L = log(a/s). With m the clean latent that the
network implies, the exact step from one timestep to the next is

    z' = (s'/s) z + a' * integral from L to L' of exp(u - L') m(u) du,

and a sampler is a way to estimate m between the two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.core.options import checked_steps
from scripts.diffusion.samplers import CleanLatent, Denoise, Generators, Sampler
from scripts.diffusion.schedules import signal_and_noise

Weights = tuple[float, float, float]
"""Of three clean latents, the newest first, in an estimate of m."""


class Step(NamedTuple):
    """z' = decay z + gain m where the clean latent m does not change.

    Attributes:
        length: L' - L.
        predictor: weights of the clean latents at this timestep and before it.
        corrector: weights of those at the next timestep, at this one and before it.
    """

    decay: float
    gain: float
    length: float
    predictor: Weights
    corrector: Weights

    def __call__(self, latent: Tensor, weights: Weights, clean: Sequence[Tensor]) -> Tensor:
        """The latents (B, C, x, y, z) after the step, from those before it."""
        return self.decay * latent + sum(self.gain * weight * m for weight, m in zip(weights, clean) if weight)


class MultistepSampler(Sampler):
    """DPM-Solver++(2M) or, with a corrector, UniPC.

        z' = (s'/s) z + (a' - a s'/s) (w_0 m + w_1 m_before + ...)

    with weights w that sum up to 1, of the clean latents m that the network implies at this timestep and before it.

    DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) extrapolates m along the line through its last two values. Its first
    step, which knows one value, and its last, which ends at the clean latent itself, take m as constant. n steps call
    the network n times, as those of DDIM do, but their error falls with n^2. UniPC (Zhao et al. 2023, arXiv:2302.04867;
    of order 2, with `bh2` in its terms) is the same and then, once the network has been called at the end of a step,
    repeats the step with m interpolated, at no further call.

    The timesteps are evenly spaced in L from the noisiest of the schedule to its cleanest, as far as whole ones can be.

    Args:
        schedule: the schedule of diffusion that the model was trained with; it is copied.
        num_inference_steps: length of the trajectory.
        corrector: whether to repeat each step.

    Raises:
        BundleError: for another kind of schedule, or an impossible number of steps.
    """

    def __init__(self, schedule: DDIMScheduler, num_inference_steps: int, corrector: bool = False) -> None:
        if not isinstance(schedule, DDIMScheduler):
            raise BundleError(
                "this --sampler is for diffusion, and the target is flow: give --sampler flow or midpoint"
            )
        self.schedule = copy.deepcopy(schedule)
        self.corrector = corrector
        self._timesteps = even_in_log_ratio(schedule, checked_steps(num_inference_steps, schedule.num_train_timesteps))
        self._clean = CleanLatent(schedule, self._timesteps)
        self._steps = _steps([*signal_and_noise(schedule, self._timesteps), (1.0, 0.0)])

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the trajectory, falling."""
        return list(self._timesteps)

    def walk(self, denoise: Denoise, noise: Tensor, generators: Generators) -> Tensor:
        """The clean latents (B, C, x, y, z) at the end of a trajectory; `generators` are not used."""
        latent = before = noise
        clean: list[Tensor] = []  # the newest first
        for i, timestep in enumerate(self._timesteps):
            clean = [self._clean(denoise(latent, timestep), latent, timestep), *clean[:2]]
            if self.corrector and i:
                latent = self._steps[i - 1](before, self._steps[i - 1].corrector, clean)
            before, latent = latent, self._steps[i](latent, self._steps[i].predictor, clean)
        return latent


def even_in_log_ratio(schedule: DDIMScheduler, n: int) -> list[int]:
    """n falling timesteps, the last and the first of the schedule among them, between which L changes by equal amounts.

    Where L changes by more than that from one whole timestep to the next, at the clean end, each of these is taken.
    """
    last = schedule.num_train_timesteps - 1
    ratios = np.array([math.log(a / s) for a, s in signal_and_noise(schedule, range(last + 1))])
    ranks = np.arange(n)
    wanted = np.interp(np.linspace(ratios[-1], ratios[0], n)[::-1], ratios[::-1], np.arange(last + 1)[::-1])
    apart = np.maximum.accumulate(np.rint(wanted) - ranks) + ranks
    return np.minimum(apart, last - ranks[::-1]).astype(int)[::-1].tolist()


def _steps(levels: Sequence[tuple[float, float]]) -> list[Step]:
    steps: list[Step] = []
    for (a, s), (a_next, s_next) in pairwise(levels):
        decay = s_next / s
        length = math.log(a_next / s_next) - math.log(a / s) if s_next else math.inf
        before = steps[-1].length if steps else math.inf
        steps.append(Step(decay, a_next - a * decay, length, _predictor(length, before), _corrector(length, before)))
    return steps


def _predictor(length: float, before: float) -> Weights:
    slope = 0.0 if math.isinf(length) or math.isinf(before) else length / before / 2.0
    return 1.0 + slope, -slope, 0.0


def _corrector(length: float, before: float) -> Weights:
    """UniC with B(h) = exp(-h) - 1: of order 2, or 1 where there is nothing before; the last step has none."""
    if math.isinf(length) or math.isinf(before):
        return 0.5, 0.5, 0.0
    b = math.expm1(-length)
    first = -b / length - 1.0
    second = -first / length - 0.5
    slope = (first - 2.0 * second) / b / (1.0 + before / length)
    newest, oldest = first / b - slope, -slope * length / before
    return newest, 1.0 - newest - oldest, oldest
