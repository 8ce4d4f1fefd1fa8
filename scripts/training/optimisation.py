# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One optimiser's step: parts of a batch, scaled losses, clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer

from scripts.compute.precision import half_precision
from scripts.compute.processes import bare, without_sync
from scripts.core.errors import BundleError
from scripts.core.options import number, whole_number

LEAST_SCALE = 2.0**-10  # float16 gradients that are infinite even when divided by 1000 are so for good
DECAYS = ("constant", "cosine", "exponential")
LEAST_FACTOR = 1.0e-6  # of one epoch's rate to that before

Batch = Mapping[str, Tensor]


class Optimisation:
    """Minimises a loss of batches with one optimiser.

    A batch is taken in `accumulate` parts whose gradients are added up, which gives the step of the whole batch for the
    memory of a part. In float16 the loss is scaled so that small gradients survive (Micikevicius et al. 2018), and
    steps with infinite ones are left out.

    Args:
        network: what is optimised, from `scripts.compute.processes.parallel`.
        optimizer: of its parameters.
        amp: see `scripts.compute.precision.half_precision`; only float16 needs scaling.
        accumulate: parts of a batch; its size must be a multiple of it.
        clip_gradients: largest norm of all gradients together; 0 leaves them alone.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        amp: Any = False,
        accumulate: Any = 1,
        clip_gradients: float = 1.0,
    ) -> None:
        self.network, self.optimizer = network, optimizer
        self.accumulate = whole_number(accumulate, "accumulate", least=1)
        self.clip_gradients = number(clip_gradients, "clip_gradients", least=0.0)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaled = half_precision(amp) is torch.float16
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=scaled)

    def __call__(
        self,
        batch: Batch,
        losses_of: Callable[[Batch], dict[str, Tensor]],
        before_update: Callable[[Mapping[str, Tensor]], bool] = lambda losses: True,
    ) -> dict[str, Tensor]:
        """Step once.

        Args:
            batch: tensors that have the batch's size in common.
            losses_of: the terms of a part of the batch, each a mean over it; `loss` is what is minimised.
            before_update: is told the means over the batch once the gradients are there, and says whether to step.

        Returns:
            Each term's mean over the batch, and `gradient_norm`, before clipping; 0 where the step was left out.

        Raises:
            BundleError: if the batch cannot be parted, or if float16 leaves out one step after the other.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._parts(batch)
        means: dict[str, Tensor] = {}
        for place, part in enumerate(parts, start=1):
            with without_sync(self.network, place < len(parts)):
                losses = {name: loss / len(parts) for name, loss in losses_of(part).items()}
                self.scaler.scale(losses["loss"]).backward()
            means = {name: means.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
        norm = self._step() if before_update(means) else torch.zeros_like(means["loss"])
        return {**means, "gradient_norm": norm}

    def _parts(self, batch: Batch) -> list[Batch]:
        size = len(next(iter(batch.values())))
        if size % self.accumulate:
            raise BundleError(f"--batch_size {size} is no multiple of --accumulate {self.accumulate}")
        chunks = {name: values.split(size // self.accumulate) for name, values in batch.items()}
        return [{name: chunk[i] for name, chunk in chunks.items()} for i in range(self.accumulate)]

    def _step(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_gradients or math.inf).detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not self.scaler.is_enabled():
            return norm
        if self.scaler.get_scale() < LEAST_SCALE:
            raise BundleError(
                "the gradients are infinite in float16 at every scale: use --amp bf16, which has the range of float32"
            )
        return norm.nan_to_num(0.0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """State of optimiser and scaler, and the names of what they optimise."""
        return {"names": self._names(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def _names(self) -> list[str]:
        own = {id(parameter) for parameter in self.parameters}
        return [name for name, parameter in bare(self.network).named_parameters() if id(parameter) in own]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            BundleError: if the checkpoint optimised other parameters.
        """
        then, now = state["names"], self._names()
        if then != now:
            other = next(iter({*then} ^ {*now}), "their order")
            raise BundleError(
                f"the checkpoint optimised {len(then)} tensors of the {type(bare(self.network)).__name__}, now it is "
                f"{len(now)}, and not the same ({other}): give the --freeze of before, or another --run_dir"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class LearningRate:
    """Handler that sets an optimiser's rate at every iteration, as a function of the iteration, and of time if that is
    limited (`scripts.training.engine.TimeLimit`).

    A linear rise over the first iterations, then constant, half a cosine down to 0 at the end (Loshchilov and Hutter
    2017), or the same share less after each epoch. Nothing of it is kept in checkpoints, so a resumed training takes
    the rate and the length that it is given.

    Args:
        optimizer: whose rate to set.
        lr: the highest rate.
        decay: one of `DECAYS`.
        warm_up: iterations of the rise.
        factor: with `exponential`, of each epoch's rate to that of the epoch before; above 0, at most 1.
        name: of the flag that gives the rate.

    Raises:
        BundleError: for a rate that is no number, another `decay`, or a factor out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr: Any,
        decay: str = "constant",
        warm_up: Any = 0,
        factor: Any = 0.97,
        name: str = "lr",
    ) -> None:
        if decay not in DECAYS:
            raise BundleError(f"--lr_decay must be one of {', '.join(DECAYS)}, got '{decay}'")
        self.optimizer, self.lr, self.decay, self.name = optimizer, number(lr, name), decay, name
        self.warm_up = whole_number(warm_up, "lr_warm_up")
        self.factor = number(factor, "lr_decay_factor", LEAST_FACTOR, 1.0)

    def attach(self, engine: Engine) -> None:
        """Follow a MONAI trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the rate of the iteration that begins."""
        state, share = engine.state, getattr(engine.state, "time_share", 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.at(state.iteration - 1, state.epoch_length, state.max_epochs, share)

    @property
    def rate(self) -> float:
        """The optimiser's rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def at(self, done: int, epoch_length: int, epochs: int, time_share: float = 0.0) -> float:
        """The rate after `done` iterations of a training of that many epochs, or of a share of its minutes."""
        total = epochs * epoch_length
        if done < self.warm_up:
            return self.lr * (done + 1) / (self.warm_up + 1)
        if self.decay == "constant":
            return self.lr
        if self.decay == "exponential":
            return self.lr * self.factor ** (done // epoch_length)
        share = (done - self.warm_up) / max(1, total - self.warm_up)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(share, time_share))))
