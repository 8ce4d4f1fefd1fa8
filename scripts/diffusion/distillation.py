# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Consistency distillation: a trained denoiser teaches a copy of itself to see in one step where many would lead."""

from __future__ import annotations

import copy
from typing import Any

import torch
from monai.networks.schedulers import Scheduler
from torch import Tensor, nn

from scripts.core.errors import BundleError
from scripts.core.options import is_absent, number
from scripts.diffusion.consistency import trailing_timesteps
from scripts.diffusion.guidance import null_conditions
from scripts.diffusion.schedules import signal_and_noise, target_of
from scripts.diffusion.targets import find_target
from scripts.diffusion.validation import Denoises
from scripts.networks.weights import Checkpoint
from scripts.training.ema import ExponentialMovingAverage
from scripts.training.optimisation import Batch
from scripts.training.step import Loss

HUBER = 0.00054
"""Of the pseudo-Huber distance, times the root of the number of values (Song & Dhariwal 2023, arXiv:2310.14189)."""


class ConsistencyLoss(Loss):
    """The distance between what a student sees at one level and, after the teacher's step, at the next.

    Consistency distillation of Song et al. 2023 (arXiv:2303.01469), algorithm 2. A clean latent with noise of level k
    is z; one DDIM step of the teacher leads to z' of level k - 1; with f the clean latent that a network's output
    implies, the student's f(z) is to be the f(z') of its own average, and z' where no noise is left. The distance is
    the pseudo-Huber one, which needs no network of perception.

    A batch holds scaled latents `image` (B, C, x, y, z), `noise` of their shape, `condition` (B, n), `timestep` (B,),
    which is taken to the level that it lies in.

    Args:
        inferer: calls a denoiser with its conditions.
        schedule: that the teacher was trained with.
        student: the network that is trained. It begins as the teacher, of which a copy is kept.
        checkpoint: of the teacher; None is refused.
        average: of the student's weights; None takes its weights of this moment.
        steps: levels of noise.
        guidance: factor of classifier-free guidance that the teacher's steps have, so that the student needs none.

    Raises:
        BundleError: without a teacher, for an impossible number of steps, the target `sample`, or guidance by a teacher
            that was trained without dropping conditions.
    """

    inputs = ("image", "condition", "noise", "timestep")

    def __init__(
        self,
        inferer: Denoises,
        schedule: Scheduler,
        student: nn.Module,
        checkpoint: Checkpoint | None,
        average: ExponentialMovingAverage | None = None,
        steps: Any = 48,
        guidance: Any = None,
    ) -> None:
        if checkpoint is None:
            raise BundleError("there is no teacher: give --pretrained, a trained diffusion model")
        target = target_of(schedule)
        if target == "sample":
            raise BundleError("a model of the target sample cannot be distilled: without noise, it is not its input")
        self.guidance = None if is_absent(guidance) else number(guidance, "teacher_guidance", 0.0)
        if self.guidance is not None and not checkpoint.facts.get("condition_dropout"):
            raise BundleError(
                f"--teacher_guidance needs a teacher trained with --condition_dropout, and {checkpoint.path} was not"
            )
        self.inferer, self.average, self.length = inferer, average, schedule.num_train_timesteps
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self._target = find_target(target)
        timesteps = trailing_timesteps(schedule, steps)[::-1]
        self._timesteps = torch.tensor(timesteps)
        self._levels = torch.tensor([(1.0, 0.0), *signal_and_noise(schedule, timesteps)])

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The `loss`."""
        clean, condition = part["image"], part["condition"]
        step = self._step_of(part["timestep"])
        a, s = self._level(step + 1, clean)
        noisy = a * clean + s * part["noise"]
        timestep = self._timesteps.to(clean.device)[step]
        with torch.no_grad():
            goal = self._goal(network, noisy, step, timestep, condition)
        output = self.inferer.denoise(network, noisy, timestep, condition)
        gap = (self._target.clean(output, noisy, a, s) - goal).float().flatten(1)
        scale = HUBER * gap.shape[1] ** 0.5
        return {"loss": ((gap.square().sum(1) + scale**2).sqrt() - scale).mean() / gap.shape[1] ** 0.5}

    def _step_of(self, timestep: Tensor) -> Tensor:
        """The number of each timestep's level, from 0, (B,)."""
        count = len(self._timesteps)
        return (timestep.float() * count / self.length).long().clamp(0, count - 1)

    def _level(self, place: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise of samples' levels, (B, 1, 1, 1, 1); place 0 is clean."""
        found = self._levels.to(like)[place].view(-1, 2, *[1] * (like.ndim - 1))
        return found[:, 0], found[:, 1]

    def _goal(self, network: nn.Module, noisy: Tensor, step: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Where the teacher's step leads, seen by the student's average."""
        a, s = self._level(step + 1, noisy)
        a_next, s_next = self._level(step, noisy)
        output = self._taught(noisy, timestep, condition)
        clean, noise = self._target.clean(output, noisy, a, s), self._target.noise(output, noisy, a, s)
        led = a_next * clean + s_next * noise
        watcher = network if self.average is None else self.average.network
        earlier = self._timesteps.to(noisy.device)[(step - 1).clamp(min=0)]
        seen = self.inferer.denoise(watcher, led, earlier, condition)
        ends = (step == 0).view(-1, *[1] * (noisy.ndim - 1))
        return torch.where(ends, led, self._target.clean(seen, led, a_next, s_next.clamp(min=1e-6)))

    def _taught(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        output = self.inferer.denoise(self.teacher, noisy, timestep, condition)
        if self.guidance is None:
            return output
        null = self.inferer.denoise(self.teacher, noisy, timestep, null_conditions(condition))
        return torch.lerp(null, output, self.guidance)


def distilled_facts(checkpoint: Checkpoint | None, steps: Any, guidance: Any) -> dict[str, Any]:
    """What checkpoints of a student say besides what its teacher's say: `distilled`, from which weights and how."""
    teacher = None if checkpoint is None else checkpoint.sha256
    scale = None if is_absent(guidance) else float(guidance)
    return {"distilled": {"method": "consistency", "teacher": teacher, "steps": int(steps), "guidance": scale}}
