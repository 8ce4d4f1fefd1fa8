# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The first stage: what one iteration of the autoencoder's adversarial training does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import AdversarialTrainer
from monai.losses import PatchAdversarialLoss
from torch import Tensor, nn

from scripts.errors import BundleError
from scripts.options import yes_or_no
from scripts.perceptual import SlicePerceptualLoss
from scripts.precision import autocast


def kl_to_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of N(mean, std^2) from N(0, 1), summed over a latent and averaged over the batch; in nats.

    Args:
        mean, std: (B, C, x, y, z).
    """
    mean, variance = mean.float(), std.float() ** 2
    per_voxel = 0.5 * (mean**2 + variance - torch.log(variance.clamp(min=1e-12)) - 1.0)
    return per_voxel.flatten(1).sum(dim=1).mean()


class AutoencoderStep:
    """One iteration of generator and discriminator: the `iteration_update` of MONAI's `AdversarialTrainer`.

    The generator minimises

        L1 + perceptual_weight * LPIPS + kl_weight * KL + adversarial_weight * LSGAN,

    the last only after `warm_up_epochs`; until then the discriminator rests too. MONAI's own iteration
    hands its losses the reconstruction alone, without the posterior that the KL term needs.

    Args:
        perceptual: the perceptual loss, or None to go without.
        perceptual_weight, kl_weight, adversarial_weight: factors of the terms.
        warm_up_epochs: epochs before the adversarial term comes in.
        clip_gradients: largest norm of the gradients of either network; 0 leaves them alone.
        amp: whether to compute in bfloat16; the KL and perceptual terms stay in float32.
    """

    def __init__(
        self,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        kl_weight: float,
        adversarial_weight: float,
        warm_up_epochs: int,
        clip_gradients: float = 1.0,
        amp: Any = False,
    ) -> None:
        self.perceptual = perceptual
        self.weights = {"l1": 1.0, "perceptual": perceptual_weight, "kl": kl_weight, "adversarial": adversarial_weight}
        self.warm_up_epochs = warm_up_epochs
        self.clip_gradients = clip_gradients
        self.amp = yes_or_no(amp, "amp")
        self.adversarial = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def __call__(self, engine: AdversarialTrainer, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Train on one batch whose `image` is (B, 1, X, Y, Z) with intensities 0..1.

        Returns:
            `image`, `pred` (the reconstruction) and `losses`, the unweighted terms as numbers.
        """
        images = batch["image"].to(engine.state.device, non_blocking=engine.non_blocking)
        adversarial = engine.state.epoch > self.warm_up_epochs and self.weights["adversarial"] > 0.0
        reconstruction, losses = self._train_generator(engine, images, adversarial)
        if adversarial:
            losses["discriminator"] = self._train_discriminator(engine, images, reconstruction)
        numbers = {name: loss.item() for name, loss in losses.items()}
        return {"image": images, "pred": reconstruction, "losses": numbers}

    def _train_generator(
        self, engine: AdversarialTrainer, images: Tensor, adversarial: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        network, optimizer = engine.state.g_network.train(), engine.state.g_optimizer
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, self.amp):
            reconstruction, mean, std = network(images)
        reconstruction = reconstruction.float()
        losses = {"l1": (reconstruction - images).abs().mean(), "kl": kl_to_standard_normal(mean, std)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstruction, images)
        if adversarial:
            losses["adversarial"] = self._fooling(engine, reconstruction)
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        total.backward()
        self._step(network, optimizer)
        return reconstruction.detach(), {"loss": total.detach(), **{n: loss.detach() for n, loss in losses.items()}}

    def _fooling(self, engine: AdversarialTrainer, reconstruction: Tensor) -> Tensor:
        with autocast(reconstruction.device, self.amp):
            logits = engine.state.d_network(reconstruction)[-1]
        return self.adversarial(logits.float(), target_is_real=True, for_discriminator=False)

    def _train_discriminator(self, engine: AdversarialTrainer, images: Tensor, reconstruction: Tensor) -> Tensor:
        network, optimizer = engine.state.d_network.train(), engine.state.d_optimizer
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, self.amp):
            real, fake = network(images)[-1], network(reconstruction)[-1]
        loss = 0.5 * (
            self.adversarial(real.float(), target_is_real=True, for_discriminator=True)
            + self.adversarial(fake.float(), target_is_real=False, for_discriminator=True)
        )
        loss.backward()
        self._step(network, optimizer)
        return loss.detach()

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.clip_gradients > 0.0:
            nn.utils.clip_grad_norm_(network.parameters(), self.clip_gradients)
        optimizer.step()


def perceptual_loss(path: str, weight: float, fake_3d_ratio: float, device: torch.device) -> nn.Module | None:
    """The perceptual loss, on the device, or None where its weight is 0.

    Raises:
        BundleError: if the weight is negative, or its network's file is not there.
    """
    if weight < 0.0:
        raise BundleError(f"--perceptual_weight must not be negative, got {weight}")
    return None if weight == 0.0 else SlicePerceptualLoss(path, fake_3d_ratio).to(device)


def autoencoder_to_train(network: nn.Module, initial_log_variance: float | None = None) -> nn.Module:
    """An `AutoencoderKL` whose posterior starts out narrow, where a log-variance is given.

    As PyTorch initialises it, the posterior's standard deviation is near 1 while its mean is near 0, and a short
    training learns little more than local averages before that noise has shrunk.

    Args:
        network: MONAI's `AutoencoderKL`, not yet trained.
        initial_log_variance: bias of the log-variance at the start, such as -8; None leaves it alone.
    """
    if initial_log_variance is not None:
        nn.init.constant_(network.quant_conv_log_sigma.conv.bias, initial_log_variance)  # type: ignore[union-attr, arg-type]
    return network
