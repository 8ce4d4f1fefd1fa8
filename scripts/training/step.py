# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One iteration of any training: what is minimised is its `Loss`, and all else is the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from ignite.engine import Engine
from torch import Tensor, nn

from scripts.compute.processes import all_means
from scripts.training.augmentation import SEEDS
from scripts.training.ema import ExponentialMovingAverage
from scripts.training.optimisation import Batch, Optimisation


class Loss(ABC):
    """What a training minimises, and what it does besides after each step."""

    inputs: ClassVar[tuple[str, ...]]
    """The entries of a batch that it needs: tensors that have the batch's size in common."""

    @abstractmethod
    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The terms for a part of a batch, each a mean over it; `loss` is what is minimised.

        Args:
            network: in training mode, from `scripts.compute.processes.parallel`.
            part: the `inputs`, on the network's device.
            epoch: which is going on, from 1.
        """

    def before_step(self, network: nn.Module, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """What goes before a step on the whole batch, such as that of a discriminator; more terms to report.

        Args:
            network: as the loss gets it.
            batch: the `inputs`, on the network's device.
            iteration: which is going on, from 1.
        """
        return {}

    def before_update(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether the optimiser steps, asked once the gradients are there, which may be changed.

        Args:
            losses: the terms' means over the batch.
        """
        return True

    def after_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """What follows a step on the whole batch, such as that of a discriminator; more terms to report."""
        return {}


class TrainingStep:
    """One iteration: the `iteration_update` of MONAI's `Trainer`.

    Nothing random is drawn here: noise, timesteps and the like come with the batch, so that they depend neither on the
    number of processes nor on where a training was stopped.

    Args:
        optimisation: minimises with the network.
        loss: what it minimises.
        average: follows the weights, if not None.
        augment: changes a batch's images on the device, by the seed of each sample that comes with the batch, if not
            None; see `scripts.training.augmentation`.
    """

    def __init__(
        self,
        optimisation: Optimisation,
        loss: Loss,
        average: ExponentialMovingAverage | None = None,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.optimisation, self.loss, self.average, self.augment = optimisation, loss, average, augment

    def __call__(self, engine: Engine, batch: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Train on one batch.

        Returns:
            `losses`: all terms, and norms of gradients; means over the batch and over all processes.
        """
        device, epoch = engine.state.device, engine.state.epoch
        inputs = {name: batch[name].to(device=device, non_blocking=True) for name in self.loss.inputs}
        if self.augment is not None:
            inputs["image"] = self.augment(inputs["image"], batch[SEEDS])
        network = self.optimisation.network.train()
        before = self.loss.before_step(network, inputs, engine.state.iteration)
        losses = self.optimisation(inputs, partial(self.loss, network, epoch=epoch), self.loss.before_update)
        losses |= before | self.loss.after_step(inputs, epoch)
        if self.average is not None:
            self.average.update()
        return {"losses": all_means(losses)}
