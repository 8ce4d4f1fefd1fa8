# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks of both GANs: a generator of whole volumes, a discriminator, and the encoder of the VAE-GAN.

The paper (Pinaya et al. 2022) states no architecture of its baselines. These follow what is common for GANs of whole
heads: widths halved at each doubling (Kwon et al. 2019, arXiv:1908.02498), group normalisation in the generator and
spectral normalisation in the discriminator (Sun et al. 2022, arXiv:2008.01910).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets import Generator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from scripts.compute.precision import autocast
from scripts.core.errors import BundleError
from scripts.core.options import number

GROUPS = 8  # of a normalisation, at most
FEATURES = 3  # the convolution of the discriminator whose output is compared (Larsen et al. 2016)
SMALLEST, LARGEST = -30.0, 20.0  # of the logarithm of a posterior's variance, as in MONAI's AutoencoderKL


def _group_norm(channels: int) -> tuple[str, dict[str, int]]:
    return "GROUP", {"num_groups": math.gcd(GROUPS, channels)}


class UpsampleBlock(nn.Sequential):
    """Doubles each side by nearest neighbour, then a convolution, group normalisation and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        norm = _group_norm(out_channels)
        options = {"norm": norm, "act": "RELU", "adn_ordering": "NA", "bias": False}
        convolution = Convolution(3, in_channels, out_channels, **options)
        super().__init__(nn.Upsample(scale_factor=factor), convolution)


class VolumeGenerator(Generator):
    """Noise to volumes in one call: MONAI's `Generator`, upsampled by neighbours instead of transposed convolutions.

    Args:
        noise_size: numbers that a volume starts from.
        channels: of the smallest map, and after each doubling.
        shape: voxels along x, y, z of the volumes.

    Raises:
        BundleError: if a side cannot be halved that often.
    """

    def __init__(self, noise_size: int, channels: Sequence[int], shape: Sequence[int]) -> None:
        factor = 2 ** (len(channels) - 1)
        if len(channels) < 2 or any(side % factor for side in shape):
            raise BundleError(
                f"--generator_channels {list(channels)}: a generator doubles at least once, and {len(channels)} widths "
                f"ask for sides that are multiples of {factor}, where the grid is {tuple(shape)}"
            )
        first, *others = channels
        start = [first, *(side // factor for side in shape)]
        super().__init__([noise_size], start, [*others, 1], [*(2 for _ in others), 1])

    def _get_layer(self, in_channels: int, out_channels: int, strides: int, is_last: bool) -> nn.Module:
        if is_last:
            return Convolution(3, in_channels, out_channels, conv_only=True)
        return UpsampleBlock(in_channels, out_channels, strides)

    def forward(self, noise: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) float32 of 0 to 1 for noise (B, noise_size), or (B, 1, noise_size)."""
        return torch.sigmoid(super().forward(noise).float())


def _halving(channels: Sequence[int], normalised: bool) -> nn.ModuleList:
    """Convolutions that halve each side, the first of a volume, with leaky ReLU."""
    options: dict[str, Any] = {"kernel_size": 4, "padding": 1, "adn_ordering": "NA", "bias": not normalised}
    options |= {"strides": 2, "act": ("LEAKYRELU", {"negative_slope": 0.2})}
    norms = [_group_norm(after) if normalised else None for after in channels]
    return nn.ModuleList(
        Convolution(3, before, after, norm=norm, **options)
        for before, after, norm in zip([1, *channels], channels, norms)
    )


def _flat_size(channels: Sequence[int], shape: Sequence[int]) -> int:
    sides = [side >> len(channels) for side in shape]
    if len(channels) < FEATURES or 0 in sides:
        raise BundleError(
            f"--gan_discriminator_channels {list(channels)}: at least {FEATURES}, and no more than the grid "
            f"{tuple(shape)} can be halved"
        )
    return channels[-1] * math.prod(sides)


class VolumeDiscriminator(nn.Module):
    """Judges whole volumes: strided convolutions and a linear output, with spectral normalisation (Miyato et al. 2018).

    In training mode each call takes one step of the power iteration; in evaluation mode none.

    Args:
        channels: of its convolutions, three at least.
        shape: voxels along x, y, z of the volumes.

    Raises:
        BundleError: for fewer convolutions, or more than the volumes can be halved.
    """

    def __init__(self, channels: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__()
        size = _flat_size(channels, shape)
        self.layers = _halving(channels, normalised=False)
        self.output = nn.Linear(size, 1)
        self.normalised: list[Any] = [*(layer.conv for layer in self.layers), self.output]
        for layer in self.normalised:
            spectral_norm(layer)

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 1), and the third convolution's output (B, C, x, y, z), of volumes (B, 1, X, Y, Z)."""
        with parametrize.cached():
            with autocast(volumes.device, False):  # weights are normalised in float32, and kept
                for layer in self.normalised:
                    _ = layer.weight
            maps = [volumes]
            for layer in self.layers:
                maps.append(layer(maps[-1]))
            return self.output(maps[-1].flatten(1)), maps[FEATURES]


class VolumeEncoder(nn.Module):
    """Volumes to the normal posterior of the noise that a generator would make them of.

    Args:
        noise_size: of the generator.
        channels: of its convolutions.
        shape: voxels along x, y, z of the volumes.
        initial_log_variance: where the logarithm of the variance starts, such as -8; None leaves it alone.

    Raises:
        BundleError: as `VolumeDiscriminator`.
    """

    def __init__(
        self, noise_size: int, channels: Sequence[int], shape: Sequence[int], initial_log_variance: Any = None
    ) -> None:
        super().__init__()
        size = _flat_size(channels, shape)
        self.layers = nn.Sequential(*_halving(channels, normalised=True), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(size, noise_size), nn.Linear(size, noise_size)
        if initial_log_variance is not None:
            nn.init.constant_(self.log_variance.bias, number(initial_log_variance, "initial_log_variance"))

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (B, noise_size) float32, for volumes (B, 1, X, Y, Z)."""
        features = self.layers(volumes)
        log_variance = self.log_variance(features).float().clamp(SMALLEST, LARGEST)
        return self.mean(features).float(), (0.5 * log_variance).exp()


class VariationalGenerator(nn.Module):
    """Encoder and generator of a VAE-GAN (Larsen et al. 2016, arXiv:1512.09300) as one network.

    Args:
        encoder: a `VolumeEncoder`.
        generator: a `VolumeGenerator`, which is its decoder.
    """

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder, self.generator = encoder, generator

    def encode(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior as one channel, (B, 1, noise_size)."""
        mean, std = self.encoder(volumes)
        return mean[:, None], std[:, None]

    def decode(self, latent: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of 0 to 1 for latents (B, 1, noise_size)."""
        return self.generator(latent)

    def forward(
        self, images: Tensor, posterior_noise: Tensor, prior_noise: Tensor, encoder_factor: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the VAE-GAN's loss is made of, each with the gradients that it may have.

        Args:
            images: (B, 1, X, Y, Z), 0..1.
            posterior_noise, prior_noise: standard normal, (B, noise_size).
            encoder_factor: on gradients of the reconstructions where they go on into the encoder.

        Returns:
            Reconstructions, (B, 1, X, Y, Z); fakes for the discriminator, (2 B, 1, X, Y, Z), which are the same
            reconstructions without a way back to the encoder, then decoded prior noise; mean and standard deviation of
            the posterior, (B, noise_size).
        """
        mean, std = self.encoder(images)
        latent = mean + std * posterior_noise
        fixed = latent.detach()
        reconstructions = self.generator(fixed + encoder_factor * (latent - fixed))
        return reconstructions, self.generator(torch.cat([fixed, prior_noise])), mean, std
