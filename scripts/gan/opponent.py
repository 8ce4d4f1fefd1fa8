# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The discriminator's side of a GAN's training: its step, its judgement of fakes, and when one of the two rests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.compute.precision import autocast
from scripts.compute.processes import all_means, bare
from scripts.core.options import number, whole_number
from scripts.gan.augmentation import Augmentation
from scripts.training.optimisation import Batch, Optimisation

INPUTS = ("image", "augmentation", "noise_seed")
"""What the discriminator's step needs of a batch."""


class Criterion(NamedTuple):
    """How far judgements are from their labels: a mean of logits and labels, and its value for one who guesses."""

    loss: Callable[[Tensor, Tensor], Tensor]
    chance: float

    def __call__(self, logits: Tensor, label: float) -> Tensor:
        """The mean over judgements (B, 1) that should all be the label."""
        return self.loss(logits, torch.full_like(logits, label))


LEAST_SQUARES = Criterion(F.mse_loss, 0.25)  # Mao et al. 2017, arXiv:1611.04076
CROSS_ENTROPY = Criterion(F.binary_cross_entropy_with_logits, math.log(2.0))  # Goodfellow et al. 2014


class Steadying:
    """What keeps a GAN's players together; all of it is off at 0.

    Args:
        r1: factor g of the penalty g/2 |gradient of D at real volumes|^2 (Mescheder et al. 2018, arXiv:1801.04406).
        r1_every: iterations between two penalties, each of which weighs as many (Karras et al. 2020, arXiv:1912.04958).
        instance_noise: standard deviation of noise on what the discriminator judges (Soenderby et al. 2017,
            arXiv:1610.04490).
        balance: b of the rule that the discriminator rests while one of its losses is below 1 - b of that of a guess,
            and the generator while one is above 1 + b; Larsen et al. 2016 had 0.68 +- 0.35, which is 0.5.

    Raises:
        BundleError: for a number that is out of range.
    """

    def __init__(self, r1: Any = 0.0, r1_every: Any = 16, instance_noise: Any = 0.0, balance: Any = 0.0) -> None:
        self.r1 = number(r1, "r1", 0.0)
        self.r1_every = whole_number(r1_every, "r1_every", least=1)
        self.instance_noise = number(instance_noise, "instance_noise", 0.0)
        self.balance = number(balance, "balance", 0.0, 1.0)


class Opponent:
    """A discriminator with its optimiser.

    Args:
        optimisation: minimises with the discriminator, whose output is logits and features.
        augmentation: what volumes go through before they are judged.
        steadying: penalty, noise and balance.
        amp: precision; the penalty is in float32.
    """

    def __init__(
        self, optimisation: Optimisation, augmentation: Augmentation, steadying: Steadying, amp: Any = False
    ) -> None:
        self.optimisation, self.augmentation, self.steadying, self.amp = optimisation, augmentation, steadying, amp
        self.resting = False

    def step(
        self, batch: Batch, fakes_of: Callable[[Batch], Sequence[Tensor]], criterion: Criterion, iteration: int
    ) -> dict[str, Tensor]:
        """Step on a batch of real volumes and on fakes: the mean of the losses of each kind of volume.

        Args:
            batch: `INPUTS`, and what the fakes are made of.
            fakes_of: kinds of fakes for a part of the batch, each (B, 1, X, Y, Z); called without gradients.
            criterion: of the discriminator.
            iteration: which is going on, from 1.

        Returns:
            `discriminator`, its parts `discriminator_real` and `discriminator_fake`, its `_gradient_norm`, and
            `r1` where that was due.
        """
        bare(self.optimisation.network.train()).requires_grad_(True)
        penalised = self.steadying.r1 > 0.0 and iteration % self.steadying.r1_every == 0
        losses_of = partial(self._losses, fakes_of=fakes_of, criterion=criterion, penalised=penalised)
        found = self.optimisation(batch, losses_of, partial(self._decide, chance=criterion.chance))
        names = {"judged": "discriminator", **{n: f"discriminator_{n}" for n in ("real", "fake", "gradient_norm")}}
        return {names.get(name, name): value for name, value in found.items() if name != "loss"}

    def judge(self, volumes: Tensor, part: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Logits and features of volumes, with gradients for them and none for the discriminator.

        Args:
            volumes: (k B, 1, X, Y, Z), 0..1: k kinds, one after the other.
            part: `INPUTS` of B samples.
            number: of this call within the iteration: each has instance noise of its own.
        """
        return self._judge(bare(self.optimisation.network).eval().requires_grad_(False), volumes, part, number)

    def _judge(self, network: nn.Module, volumes: Tensor, part: Batch, number: int) -> tuple[Tensor, Tensor]:
        kinds = len(volumes) // len(part["augmentation"])
        moved = self.augmentation.apply(volumes, part["augmentation"].repeat(kinds, 1))
        with autocast(volumes.device, self.amp):
            logits, features = network(self._noisy(moved, part["noise_seed"], number))
        return logits.float(), features.float()

    def _noisy(self, volumes: Tensor, seeds: Tensor, number: int) -> Tensor:
        if not self.steadying.instance_noise:
            return volumes
        noise = torch.empty_like(volumes)
        for place, one in enumerate(noise):
            kind, sample = divmod(place, len(seeds))
            seed = (int(seeds[sample]) << 16) + (number << 8) + kind
            one.normal_(generator=torch.Generator(volumes.device).manual_seed(seed))
        return volumes + self.steadying.instance_noise * noise

    def _losses(
        self, part: Batch, fakes_of: Callable[[Batch], Sequence[Tensor]], criterion: Criterion, penalised: bool
    ) -> dict[str, Tensor]:
        network = self.optimisation.network
        with torch.no_grad():
            kinds = fakes_of(part)
        real = criterion(self._judge(network, part["image"], part, 0)[0], 1.0)
        fakes = [criterion(self._judge(network, kind, part, n)[0], 0.0) for n, kind in enumerate(kinds, start=1)]
        judged = torch.stack([real, *fakes]).mean()
        terms = {"loss": judged, "judged": judged, "real": real, "fake": torch.stack(fakes).mean()}
        if penalised:
            terms["r1"] = self._gradient_penalty(part)
            terms["loss"] = judged + 0.5 * self.steadying.r1 * self.steadying.r1_every * terms["r1"]
        return terms

    def _gradient_penalty(self, part: Batch) -> Tensor:
        """Squared norm of the gradient of the logits at real volumes, the batch's mean."""
        volumes = self.augmentation.apply(part["image"], part["augmentation"]).requires_grad_(True)
        with autocast(volumes.device, False):
            logits, _ = self.optimisation.network(volumes)
            (gradient,) = torch.autograd.grad(logits.sum(), volumes, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    def _decide(self, losses: Mapping[str, Tensor], chance: float) -> bool:
        """Whether the discriminator steps, and, in `resting`, whether the generator does not."""
        if not self.steadying.balance:
            return True
        means = all_means({name: losses[name] for name in ("real", "fake")}).values()
        strong = min(means) < (1.0 - self.steadying.balance) * chance
        weak = max(means) > (1.0 + self.steadying.balance) * chance
        self.resting = weak and not strong
        return weak or not strong
