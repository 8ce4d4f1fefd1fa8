# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The first stage: the autoencoder's adversarial loss, and the networks that take part."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.losses import PatchAdversarialLoss
from monai.transforms import MapTransform
from torch import Tensor, nn

from scripts.autoencoder.perceptual import SlicePerceptualLoss
from scripts.compute.precision import autocast
from scripts.compute.processes import bare
from scripts.core.errors import BundleError
from scripts.core.options import number, whole_number
from scripts.training.optimisation import Batch, Optimisation
from scripts.training.step import Loss
from scripts.volumes.grid import Grid


def kl_to_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of N(mean, std^2) from N(0, 1), summed over a latent and averaged over the batch; in nats.

    Args:
        mean, std: (B, C, x, y, z).
    """
    mean, variance = mean.float(), std.float() ** 2
    per_voxel = 0.5 * (mean**2 + variance - torch.log(variance.clamp(min=1e-12)) - 1.0)
    return per_voxel.flatten(1).sum(dim=1).mean()


class PosteriorAutoencoder(nn.Module):
    """An `AutoencoderKL` as the first stage trains it: the noise of its posterior is given, not drawn inside.

    Args:
        autoencoder: MONAI's network.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions of images (B, 1, X, Y, Z) from mean + std * noise; also mean and std, (B, C, x, y, z)."""
        mean, std = self.autoencoder.encode(images)  # type: ignore[operator]
        return self.autoencoder.decode(mean + std * noise), mean, std  # type: ignore[operator]


class DrawPosteriorNoised(MapTransform):
    """Dictionary transform that adds the standard normal `noise` of a volume's latent, from torch's random state.

    Args:
        keys: the entry with the volume, (1, X, Y, Z).
        channels: of the latent.
        factor: voxels of the volume along each side of a voxel of the latent.
    """

    def __init__(self, keys: str, channels: int, factor: int) -> None:
        super().__init__(keys)
        self.channels, self.factor = channels, factor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with `noise`, (channels, x, y, z).

        Raises:
            BundleError: if a side of the volume is no multiple of the factor.
        """
        shape = data[self.first_key(data)].shape[1:]
        if any(side % self.factor for side in shape):
            raise BundleError(f"each side of {tuple(shape)} must be a multiple of {self.factor}: see --patch_shape")
        return {**data, "noise": torch.randn(self.channels, *(side // self.factor for side in shape))}


class AdversarialLoss(Loss):
    """What the autoencoder minimises, and the step of the discriminator that follows.

    The autoencoder minimises

        l1_weight * L1 + l2_weight * L2 + perceptual_weight * LPIPS + kl_weight * KL + adversarial_weight * LSGAN,

    the last only after `warm_up_epochs`; until then the discriminator rests too.

    A batch holds `image` (B, 1, X, Y, Z) with intensities 0..1, and `noise` (B, C, x, y, z). All terms are reported
    unweighted, with the `loss` of the discriminator as `discriminator`.

    Args:
        discriminator: minimises with the patch discriminator.
        perceptual: the perceptual loss, or None to go without.
        perceptual_weight, kl_weight, adversarial_weight: factors of the terms.
        warm_up_epochs: epochs before the adversarial term comes in.
        amp: precision of the networks; the KL and perceptual terms stay in float32.
        l1_weight, l2_weight: factors of the mean absolute and the mean squared error; the second is computed, and
            reported, only where its factor is above 0.

    Raises:
        BundleError: for a weight that is negative or no number.
    """

    inputs = ("image", "noise")

    def __init__(
        self,
        discriminator: Optimisation,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        kl_weight: float,
        adversarial_weight: float,
        warm_up_epochs: int,
        amp: Any = False,
        l1_weight: float = 1.0,
        l2_weight: float = 0.0,
    ) -> None:
        self.discriminator, self.perceptual = discriminator, perceptual
        weights = {"perceptual": perceptual_weight, "kl": kl_weight, "adversarial": adversarial_weight}
        weights |= {"l1": l1_weight, "l2": l2_weight}
        self.weights = {name: _weight(name, weight) for name, weight in weights.items()}
        self.warm_up_epochs = whole_number(warm_up_epochs, "warm_up_epochs")
        self.amp = amp
        self.adversarial = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        self.reconstructions: list[Tensor] = []  # of the parts of a batch, until the discriminator has seen them

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The terms for a part, and their weighted sum, `loss`."""
        with autocast(part["image"].device, self.amp):
            reconstruction, mean, std = network(part["image"], part["noise"])
        reconstruction = reconstruction.float()
        error = reconstruction - part["image"]
        terms = {"l1": error.abs().mean(), "kl": kl_to_standard_normal(mean, std)}
        if self.weights["l2"] > 0.0:
            terms["l2"] = error.square().mean()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, part["image"])
        if self._is_adversarial(epoch):
            self.reconstructions.append(reconstruction.detach())
            opponent = bare(self.discriminator.network).train().requires_grad_(False)
            terms["adversarial"] = self._judge(opponent, reconstruction, real=True, for_discriminator=False)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": total, **terms}

    def after_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Step the discriminator on the batch and its reconstructions."""
        if not self._is_adversarial(epoch):
            return {}
        bare(self.discriminator.network.train()).requires_grad_(True)
        both = {"image": batch["image"], "reconstruction": torch.cat(self.reconstructions)}
        self.reconstructions.clear()
        losses = self.discriminator(both, self._discriminate)
        return {"discriminator": losses["loss"], "discriminator_gradient_norm": losses["gradient_norm"]}

    def _is_adversarial(self, epoch: int) -> bool:
        return epoch > self.warm_up_epochs and self.weights["adversarial"] > 0.0

    def _discriminate(self, part: Batch) -> dict[str, Tensor]:
        network = self.discriminator.network
        real = self._judge(network, part["image"], real=True, for_discriminator=True)
        fake = self._judge(network, part["reconstruction"], real=False, for_discriminator=True)
        return {"loss": 0.5 * (real + fake)}

    def _judge(self, network: nn.Module, volumes: Tensor, real: bool, for_discriminator: bool) -> Tensor:
        with autocast(volumes.device, self.amp):
            logits = network(volumes)[-1]
        return self.adversarial(logits.float(), target_is_real=real, for_discriminator=for_discriminator)


def _weight(name: str, value: Any) -> float:
    if isinstance(value, (str, bool)) or not value >= 0.0:
        raise BundleError(f"--{name}_weight must be a number of at least 0, such as 1.0e-3, got '{value}'")
    return float(value)


def perceptual_loss(path: str, weight: float, fake_3d_ratio: float, device: torch.device) -> nn.Module | None:
    """The perceptual loss, on the device, or None where its weight is 0.

    Raises:
        BundleError: if the weight is negative, or its network's file is not there.
    """
    return None if _weight("perceptual", weight) == 0.0 else SlicePerceptualLoss(path, fake_3d_ratio).to(device)


def check_patch(patch_shape: Any, grid: Grid, discriminator_layers: Any = None) -> None:
    """Refuse a shape of crops that is none, and a discriminator of which nothing is left at its end.

    Each of the discriminator's layers halves the crop, and its two last convolutions take a voxel each.

    Raises:
        BundleError: unless it is three whole numbers, each from 1 to the grid's side; for too many layers.
    """
    sides = patch_shape if isinstance(patch_shape, Sequence) and not isinstance(patch_shape, str) else [patch_shape]
    fits = [isinstance(side, int) and 1 <= side <= most for side, most in zip(sides, grid.shape)]
    if len(sides) != 3 or not all(fits):
        most = list(grid.shape)
        raise BundleError(
            f'--patch_shape must be three whole numbers up to {most}, such as "[64,64,64]", not {patch_shape}'
        )
    layers = 0 if discriminator_layers is None else whole_number(discriminator_layers, "discriminator_layers", least=1)
    if layers and min(sides) >> layers < 3:
        fitting = max(1, (min(sides) // 3).bit_length() - 1)
        raise BundleError(
            f"--discriminator_layers {layers} leave nothing of a crop of {list(sides)} voxels: at most {fitting}"
        )


def autoencoder_to_train(network: nn.Module, initial_log_variance: float | None = None) -> nn.Module:
    """An `AutoencoderKL` whose posterior starts out narrow, where a log-variance is given.

    As PyTorch initialises it, the posterior's standard deviation is near 1 while its mean is near 0, and a short
    training learns little more than local averages before that noise has shrunk.

    Args:
        network: MONAI's `AutoencoderKL`, not yet trained.
        initial_log_variance: bias of the log-variance at the start, such as -8; None leaves it alone.
    """
    if initial_log_variance is not None:
        start = number(initial_log_variance, "initial_log_variance")
        nn.init.constant_(network.quant_conv_log_sigma.conv.bias, start)  # type: ignore[union-attr, arg-type]
    return network
