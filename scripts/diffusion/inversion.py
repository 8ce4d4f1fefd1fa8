# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The way from a clean latent to its noise and back, by one rule that is its own inverse.

A noisy latent z = a x + s e, divided by a + s, lies on the straight line between the clean latent and the noise,

    u = z / (a + s) = (1 - r) x + r e,    r = s / (a + s),

for diffusion and rectified flow alike, and follows du/dr = e - x. DDIM's step (Song et al. 2021, arXiv:2010.02502) is
Euler's along it, with the estimate of e - x at the noisier end; run backwards it needs the estimate at the end that it
has not reached yet, so that what is carried to noise does not come back. Taken in the middle of the step instead,

    u' = u + (r' - r) w,    w = W(u + (r_m - r) w, r_m),

W being what the network estimates of e - x, the rule is the same from either end: the implicit midpoint rule, symmetric
in time and stable however stiff the path (Hairer, Lubich & Wanner 2006, Geometric Numerical Integration, chapter V.1).
Its w is found by iteration to a fixed point, as Pan et al. 2023 (arXiv:2309.04907) find DDIM's inverse; in the middle
of a step it contracts about twice as fast as there. Schemes that are invertible without an iteration, EDICT (Wallace et
al. 2022, arXiv:2211.12446) and BDIA (Zhang et al. 2023, arXiv:2307.10829), carry two latents that drift apart where the
path is stiff; here there is one, which is what a sampler starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from monai.networks.schedulers import RFlowScheduler, Scheduler
from torch import Tensor
from tqdm import tqdm

from scripts.core.options import checked_steps
from scripts.diffusion.samplers import Denoise
from scripts.diffusion.schedules import signal_and_noise, target_of
from scripts.diffusion.targets import find_target

TOLERANCE = 1.0e-5
"""Root mean square of what a step's last correction changes, of latents of unit variance."""
MOST_CALLS = 30
"""Calls of the network for a step, at the most."""
DEPTH = 4
"""So many earlier calls are remembered for the acceleration."""

Velocity = Callable[[Tensor], Tensor]
"""W at a place: u to the estimate of e - x."""


class Middle(NamedTuple):
    """Where a step asks the network.

    Attributes:
        timestep: of the schedule.
        a, s: signal and noise there.
    """

    timestep: int
    a: float
    s: float

    @property
    def r(self) -> float:
        """Place on the line from clean, 0, to noise, 1."""
        return self.s / (self.a + self.s)


@dataclass
class Walked:
    """What a walk came to.

    Attributes:
        latent: z at its end, (B, C, x, y, z).
        calls: of the network.
        correction: root mean square of the last correction of u, of the step where it was largest.
    """

    latent: Tensor
    calls: int = 0
    correction: float = 0.0


class ReversiblePath:
    """Steps between clean latents and noise that can be gone in either direction.

    The network is asked at n timesteps that are evenly spaced over the schedule; steps end halfway between them. The
    clean end is the schedule's lowest level, timestep 0: of diffusion, a little noise is left there, and what a clean
    latent has of such detail is taken for it, as in DDIM's inversion.

    Args:
        schedule: that the model was trained with.
        steps: n, the number of steps of the whole path.
        tolerance: see `TOLERANCE`.
        most_calls: see `MOST_CALLS`.

    Raises:
        BundleError: for an impossible number of steps.
    """

    def __init__(
        self, schedule: Scheduler, steps: int, tolerance: float = TOLERANCE, most_calls: int = MOST_CALLS
    ) -> None:
        count, length = checked_steps(steps, schedule.num_train_timesteps), schedule.num_train_timesteps
        self.tolerance, self.most_calls = tolerance, most_calls
        asked = [int((k + 0.5) * length / count) for k in range(count)]
        last = length if isinstance(schedule, RFlowScheduler) else length - 1
        ends = [*(round(k * length / count) for k in range(count)), last]
        self.middles = [Middle(t, *level) for t, level in zip(asked, signal_and_noise(schedule, asked), strict=True)]
        self.levels = signal_and_noise(schedule, ends)
        """Signal and noise, a and s, after so many steps from the clean end."""
        self._target = find_target(target_of(schedule))

    def __len__(self) -> int:
        return len(self.middles)

    def walk(self, denoise: Denoise, latent: Tensor, start: int, end: int) -> Walked:
        """Go from after `start` steps to after `end`; 0 is the clean end.

        Args:
            denoise: calls the network.
            latent: z at the start, (B, C, x, y, z).
            start, end: either may be the larger.
        """
        steps = range(start, end) if end > start else range(start - 1, end - 1, -1)
        place = [s / (a + s) for a, s in self.levels]
        u, walked, before = latent / sum(self.levels[start]), Walked(latent), _Before()
        bar = tqdm(steps, "inverting" if end > start else "returning", unit="step", leave=False, disable=None)
        for step in bar:
            here, there = (place[step], place[step + 1]) if end > start else (place[step + 1], place[step])
            middle = self.middles[step]
            guess = before.extrapolated(middle.r)
            w = self._solve(self._velocity(denoise, middle), u, middle.r - here, there - here, guess, walked)
            before.add(middle.r, w)
            u = u + (there - here) * w
        walked.latent = u * sum(self.levels[end])
        return walked

    def _velocity(self, denoise: Denoise, at: Middle) -> Velocity:
        def velocity(u: Tensor) -> Tensor:
            noisy, target = (at.a + at.s) * u, self._target
            output = denoise(noisy, at.timestep)
            return target.noise(output, noisy, at.a, at.s) - target.clean(output, noisy, at.a, at.s)

        return velocity

    def _solve(
        self, velocity: Velocity, u: Tensor, to_middle: float, length: float, guess: Tensor | None, walked: Walked
    ) -> Tensor:
        """w of one step from a first guess: the iteration, with Anderson's acceleration."""
        guess = torch.zeros_like(u) if guess is None else guess
        gaps: list[Tensor] = []
        found: list[Tensor] = []
        correction = torch.inf
        for _ in range(self.most_calls):
            found = [*found[-DEPTH:], velocity(u + to_middle * guess)]
            walked.calls += 1
            gaps = [*gaps[-DEPTH:], found[-1] - guess]
            correction = abs(length) * float(gaps[-1].square().mean().sqrt())
            guess = _accelerated(gaps, found)
            if correction <= self.tolerance:
                break
        walked.correction = max(walked.correction, correction)
        return guess


class _Before:
    """The steps before this one, which tell about where its w will be."""

    def __init__(self) -> None:
        self.known: list[tuple[float, Tensor]] = []

    def add(self, r: float, w: Tensor) -> None:
        self.known = [*self.known[-1:], (r, w)]

    def extrapolated(self, r: float) -> Tensor | None:
        """w at a place, on the line through the last two; None where there are none."""
        if len(self.known) < 2:
            return self.known[0][1] if self.known else None
        (first, w_first), (second, w_second) = self.known
        return torch.lerp(w_first, w_second, (r - first) / (second - first))


def _accelerated(gaps: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """The next guess (Anderson 1965, J. ACM 12:547): of each sample, the mixture of what was found with the least gap.

    Args:
        gaps: what was found less what was guessed, (B, C, x, y, z) each, the newest last.
        found: what belongs to them.
    """
    if len(gaps) < 2:
        return found[-1]
    changes = torch.stack([(after - before).flatten(1) for before, after in pairwise(gaps)], dim=2).double()
    moved = torch.stack([(after - before).flatten(1) for before, after in pairwise(found)], dim=2)
    products = changes.mT @ changes
    size = products.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    damped = products + 1e-10 * size[:, None, None] * torch.eye(len(gaps) - 1).to(products)
    shares = torch.linalg.solve(damped, changes.mT @ gaps[-1].flatten(1).double()[:, :, None])
    return found[-1] - (moved @ shares.to(moved))[:, :, 0].view_as(found[-1])
