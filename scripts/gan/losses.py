# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What LSGAN and VAE-GAN minimise; the discriminator steps first, on fakes of other noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.autoencoder.training import kl_to_standard_normal
from scripts.compute.precision import autocast
from scripts.compute.processes import bare
from scripts.core.options import number
from scripts.gan.opponent import CROSS_ENTROPY, INPUTS, LEAST_SQUARES, Opponent
from scripts.training.optimisation import Batch
from scripts.training.step import Loss

IN_THE_GENERATORS_STEP = 8  # number of a call of the discriminator, above those in its own step


class LSGANLoss(Loss):
    """Least squares: labels 1 for real and 0 for fake, and 1 for the generator (Mao et al. 2017, arXiv:1611.04076).

    The discriminator minimises the mean of (D(x) - 1)^2 and D(G(z))^2, then the generator (D(G(z')) - 1)^2.

    Args:
        opponent: the discriminator.
        amp: precision of the networks.
    """

    inputs = (*INPUTS, "prior_noise", "opponent_noise")

    def __init__(self, opponent: Opponent, amp: Any = False) -> None:
        self.opponent, self.amp = opponent, amp

    def before_step(self, network: nn.Module, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Step the discriminator."""
        return self.opponent.step(batch, partial(self._fakes, bare(network)), LEAST_SQUARES, iteration)

    def _fakes(self, network: nn.Module, part: Batch) -> list[Tensor]:
        with autocast(part["image"].device, self.amp):
            return [network(part["opponent_noise"])]

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """`adversarial`, which is the `loss`."""
        with autocast(part["image"].device, self.amp):
            fakes = network(part["prior_noise"])
        logits, _ = self.opponent.judge(fakes, part, IN_THE_GENERATORS_STEP)
        adversarial = LEAST_SQUARES(logits, 1.0)
        return {"loss": adversarial, "adversarial": adversarial}

    def before_update(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether the balance lets the generator step."""
        return not self.opponent.resting


class VAEGANLoss(Loss):
    """The VAE-GAN's three sets of gradients (Larsen et al. 2016, arXiv:1512.09300, Algorithm 1), losses averaged.

    - encoder: kl_weight KL + feature error;
    - generator, the decoder: w feature error - (1 - w) GAN;
    - discriminator: GAN,

    where the feature error is the mean squared difference between a volume and its reconstruction in the
    discriminator's third map, the KL divergence is per number of the latent, and GAN the discriminator's cross
    entropy on real volumes, reconstructions and decoded prior noise. No GAN term reaches the encoder, and no feature
    error the discriminator.

    Reported is also `adversarial`, the cross entropy of fakes that are taken for real, for watching alone.

    Args:
        opponent: the discriminator.
        generator: within the network, to hold it where the balance asks for that.
        feature_weight: w, above 0, at most 1.
        kl_weight: factor of the KL divergence.
        amp: precision of the networks.

    Raises:
        BundleError: for a weight that is out of range.
    """

    inputs = (*INPUTS, "prior_noise", "opponent_noise", "posterior_noise")

    def __init__(
        self, opponent: Opponent, generator: nn.Module, feature_weight: Any, kl_weight: Any, amp: Any = False
    ) -> None:
        self.opponent, self.generator, self.amp = opponent, generator, amp
        self.feature_weight = number(feature_weight, "feature_weight", 1.0e-6, 1.0)
        self.kl_weight = number(kl_weight, "kl_weight", 0.0)

    def before_step(self, network: nn.Module, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Step the discriminator."""
        return self.opponent.step(batch, partial(self._fakes, bare(network)), CROSS_ENTROPY, iteration)

    def _fakes(self, network: nn.Module, part: Batch) -> Sequence[Tensor]:
        with autocast(part["image"].device, self.amp):
            return network(part["image"], part["posterior_noise"], part["opponent_noise"])[1].chunk(2)

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The terms for a part, and their weighted sum, `loss`."""
        images, weight = part["image"], self.feature_weight
        with autocast(images.device, self.amp):
            given = (images, part["posterior_noise"], part["prior_noise"])
            reconstructions, fakes, mean, std = network(*given, encoder_factor=1.0 / weight)
        kl = kl_to_standard_normal(mean, std) / mean[0].numel()
        features = self._feature_error(images, reconstructions, part)
        logits, _ = self.opponent.judge(fakes, part, IN_THE_GENERATORS_STEP)
        gan, adversarial = CROSS_ENTROPY(logits, 0.0), CROSS_ENTROPY(logits, 1.0)
        total = self.kl_weight * kl + weight * features - (1.0 - weight) * gan
        return {"loss": total, "kl": kl, "features": features, "adversarial": adversarial}

    def _feature_error(self, images: Tensor, reconstructions: Tensor, part: Batch) -> Tensor:
        with torch.no_grad():
            _, wanted = self.opponent.judge(images, part, IN_THE_GENERATORS_STEP)
        _, found = self.opponent.judge(reconstructions, part, IN_THE_GENERATORS_STEP)
        return F.mse_loss(found, wanted)

    def before_update(self, losses: Mapping[str, Tensor]) -> bool:
        """Hold the generator where the balance asks for it; the encoder always steps."""
        if self.opponent.resting:
            self.generator.zero_grad(set_to_none=True)
        return True
