# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""An autoencoder that learns what a linear transform code leaves out: for small models on a CPU.

Encoder and decoder are each the sum of a linear map and of a convolutional network whose last layer starts at 0. The
linear maps start as a discrete cosine transform of cubes of voxels (Ahmed et al. 1974), cut after its lowest
frequencies, and its inverse; as convolutions over neighbouring cubes they can become a lapped transform (Malvar and
Staelin 1989). So the first iteration reconstructs what that code does, where an `AutoencoderKL` spends hours on it, and
all that is learnt comes on top. What the networks give is in units of the standard deviation of what the linear code
leaves: an optimiser that moves all weights alike, as Adam does, would otherwise move the image by more than that at a
rate at which the networks hardly learn. Shortcuts that carry voxels as channels around the networks are the residual
autoencoding of Chen et al. 2024 (https://arxiv.org/abs/2410.10733); there they have no weights.

Norms are over the channels of one position (Li et al. 2019, https://arxiv.org/abs/1907.04312): crops and whole volumes
are normalised alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets import AutoencoderKL
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualAutoencoderKL(AutoencoderKL):
    """A 3D variational autoencoder with linear shortcuts from voxels to latents and back.

    Its interface is that of MONAI's `AutoencoderKL`. Its latent is `patch * 2 ** (len(channels) - 1)` times smaller
    along each side than the volume.

    Args:
        latent_channels: of the latent, L; the frequencies that the shortcuts start with.
        channels: of the convolutional networks, at cubes of `patch` voxels, of twice as many, and so on.
        num_res_blocks: residual blocks at each level of the decoder, or one number for all.
        encoder_res_blocks: the same of the encoder.
        patch: voxels along each side of the smallest cubes.
        norm_num_groups: groups of a position's channels that are normalised each by itself.
        norm_eps: added to their mean square.
        mean: of the volumes' intensities; where the latents' mean starts at 0.
        coefficient_stds: L numbers by which the volumes' lowest coefficients are divided, in the order of
            `lowest_frequencies`, such as their standard deviations; all 1 by default.
        residual_std: of what the linear code leaves of the volumes, about; the unit of the decoder's network.
        in_channels, out_channels, spatial_dims: 1, 1 and 3.

    Raises:
        ValueError: for another number of standard deviations or blocks, for channels that are no multiple of the
            groups, or for volumes that are not 3D or have several channels.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (48, 128),
        num_res_blocks: Sequence[int] | int = 2,
        encoder_res_blocks: Sequence[int] | int = 1,
        patch: int = 4,
        norm_num_groups: int = 1,
        norm_eps: float = 1e-6,
        mean: float = 0.0,
        coefficient_stds: Sequence[float] | None = None,
        residual_std: float = 1.0,
        in_channels: int = 1,
        out_channels: int = 1,
        spatial_dims: int = 3,
    ) -> None:
        nn.Module.__init__(self)
        if (spatial_dims, in_channels, out_channels) != (3, 1, 1):
            raise ValueError("volumes of this autoencoder are 3D and have one channel")
        if any(width % norm_num_groups for width in channels):
            raise ValueError(f"channels {[*channels]} must be multiples of norm_num_groups {norm_num_groups}")
        stds = torch.tensor([1.0] * latent_channels if coefficient_stds is None else [*coefficient_stds])
        if len(stds) != latent_channels:
            raise ValueError(f"{len(stds)} coefficient_stds are given for {latent_channels} latent channels")
        self.latent_channels, self.use_checkpoint = latent_channels, False
        norm = {"groups": norm_num_groups, "eps": norm_eps}
        levels = len(channels)
        self.encoder: nn.Module = Blocks(
            Encoder(latent_channels, channels, _each(encoder_res_blocks, levels), patch, **norm)  # type: ignore[arg-type]
        )
        self.decoder: nn.Module = Blocks(
            Decoder(latent_channels, channels, _each(num_res_blocks, levels), patch, residual_std, **norm)  # type: ignore[arg-type]
        )
        self._start_as_transform(patch, levels, mean, stds)
        self.quant_conv_mu, self.quant_conv_log_sigma, self.post_quant_conv = (
            Convolution(3, latent_channels, latent_channels, kernel_size=1, conv_only=True) for _ in range(3)
        )
        for pointwise in (self.quant_conv_mu, self.post_quant_conv):
            nn.init.dirac_(pointwise.conv.weight)  # type: ignore[arg-type]
            nn.init.zeros_(pointwise.conv.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.quant_conv_log_sigma.conv.weight)  # type: ignore[arg-type]

    def _start_as_transform(self, patch: int, levels: int, mean: float, stds: Tensor) -> None:
        side = patch * 2 ** (levels - 1)
        basis = pixelunshuffle(dct_basis(side, self.latent_channels)[:, None], 3, patch)
        for _ in range(levels - 1):
            basis = pixelunshuffle(basis, 3, 2)
        basis = basis.flatten(1)
        analysis, synthesis = self.encoder.blocks[0].shortcut, self.decoder.blocks[0].shortcut  # type: ignore[union-attr, index]
        with torch.no_grad():
            for convolution, centre in ((analysis, basis / stds[:, None]), (synthesis, basis.T * stds)):
                convolution.weight.zero_()
                convolution.weight[:, :, 1, 1, 1] = centre / convolution.gain
            analysis.bias.copy_(-mean * basis.sum(dim=1) / stds)
            synthesis.bias.fill_(mean)


def _each(number: Sequence[int] | int, levels: int) -> list[int]:
    numbers = [number] * levels if isinstance(number, int) else [*number]
    if len(numbers) != levels:
        raise ValueError(f"{len(numbers)} numbers of residual blocks are given for {levels} levels")
    return numbers


def lowest_frequencies(side: int, number: int) -> list[tuple[int, int, int]]:
    """The `number` lowest frequencies of cubes of `side` voxels, by length and then in the order of their axes."""
    every = [(i, j, k) for i in range(side) for j in range(side) for k in range(side)]
    return sorted(every, key=lambda one: (sum(i * i for i in one), one))[:number]


def dct_basis(side: int, number: int) -> Tensor:
    """Functions of the orthonormal 3D discrete cosine transform (DCT-II) of lowest frequency, (number, side^3 cube)."""
    places = (torch.arange(side, dtype=torch.float64) + 0.5) * math.pi / side
    waves = torch.cos(torch.arange(side)[:, None] * places) * math.sqrt(2.0 / side)
    waves[0] /= math.sqrt(2.0)
    cubes = [torch.einsum("i,j,k->ijk", *(waves[k] for k in one)) for one in lowest_frequencies(side, number)]
    return torch.stack(cubes).float()


class Blocks(nn.Module):
    """Blocks one after the other, under the name that MONAI's encoders and decoders have for theirs."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ChannelNorm(nn.Module):
    """Root mean square normalisation over groups of the channels of each position, with a learnt scale.

    Args:
        channels: of the map.
        groups: of channels.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, x, y, z) to the same shape."""
        grouped = x.unflatten(1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(dim=2, keepdim=True) + self.eps)
        return (grouped * scale).flatten(1, 2) * self.weight.view(-1, 1, 1, 1)


class ResBlock(nn.Module):
    """x + convolution(SiLU(convolution(norm(x)))), the last convolution starting at 0."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, groups, eps)
        self.conv1 = convolution(channels, channels, 3)
        self.conv2 = convolution(channels, channels, 3, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, x, y, z) to the same shape."""
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def convolution(in_channels: int, out_channels: int, kernel_size: int, zero: bool = False) -> nn.Conv3d:
    """One that keeps the size of its maps; its biases start at 0, and its weights too if `zero`."""
    layer = nn.Conv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


class EqualisedConv3d(nn.Conv3d):
    """A convolution whose weights are kept in units of one over the square root of the inputs that each output sees.

    Layers that see 400 numbers and layers that see 13,000 then learn at the same rate of the optimiser, and at one at
    which networks beside them learn: the equalised learning rate of Karras et al. 2018
    (https://arxiv.org/abs/1710.10196).

    Args:
        in_channels, out_channels: of the maps.
        kernel_size: odd; the maps keep their size.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.gain = (in_channels * kernel_size**3) ** -0.5
        nn.init.normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, x, y, z) to (B, out_channels, x, y, z)."""
        return F.conv3d(x, self.weight * self.gain, self.bias, padding=self.padding)


class Encoder(nn.Module):
    """Volumes (B, 1, X, Y, Z) to maps (B, L, x, y, z): linear shortcut and residual network.

    Args:
        latent_channels: L.
        channels, res_blocks: of each level, from small cubes to large.
        patch: side of the smallest cubes.
        groups, eps: of the norms.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: Sequence[int],
        res_blocks: Sequence[int],
        patch: int,
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.shortcut = EqualisedConv3d(patch**3 * 8 ** (len(channels) - 1), latent_channels, 3)
        self.entry = convolution(patch**3, channels[0], 3)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResBlock(width, groups, eps) for _ in range(number)))
            for width, number in zip(channels, res_blocks, strict=True)
        )
        self.folded = nn.ModuleList(convolution(8 * fine, coarse, 1) for fine, coarse in pairwise(channels))
        self.norm = ChannelNorm(channels[-1], groups, eps)
        self.exit = convolution(channels[-1], latent_channels, 3, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Raises:
            ValueError: if a side of the volumes is no multiple of that of the largest cubes.
        """
        fine = voxels = pixelunshuffle(x, 3, self.patch)
        for _ in self.folded:
            voxels = pixelunshuffle(voxels, 3, 2)
        return self.shortcut(voxels) + (0.0 if idle(self.exit) else self._network(fine))

    def _network(self, voxels: Tensor) -> Tensor:
        h = self.levels[0](self.entry(voxels))
        for folded, level in zip(self.folded, self.levels[1:], strict=True):
            h = level(folded(pixelunshuffle(h, 3, 2)))
        return self.exit(F.silu(self.norm(h)))


class Decoder(nn.Module):
    """Latents (B, L, x, y, z) to volumes (B, 1, X, Y, Z): linear shortcut and residual network.

    The network's finest level sees what the shortcut made of the latents as well.

    Args:
        residual_std: of what the shortcut leaves; the network's unit.
        latent_channels, channels, res_blocks, patch, groups, eps: see `Encoder`.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: Sequence[int],
        res_blocks: Sequence[int],
        patch: int,
        residual_std: float,
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.patch, self.residual_std, widths = patch, residual_std, [*reversed(channels)]
        self.shortcut = EqualisedConv3d(latent_channels, patch**3 * 8 ** (len(channels) - 1), 3)
        self.entry = convolution(latent_channels, channels[-1], 3)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResBlock(width, groups, eps) for _ in range(number)))
            for width, number in zip(widths, reversed(res_blocks), strict=True)
        )
        self.unfolded = nn.ModuleList(
            convolution(coarse, 8 * fine, 1) for coarse, fine in pairwise([*reversed(channels)])
        )
        self.seen = convolution(patch**3, channels[0], 1)
        self.norm = ChannelNorm(channels[0], groups, eps)
        self.exit = convolution(channels[0], patch**3, 3, zero=True)

    def forward(self, z: Tensor) -> Tensor:
        """Decode."""
        voxels = self.shortcut(z)
        for _ in self.unfolded:
            voxels = pixelshuffle(voxels, 3, 2)
        residual = 0.0 if idle(self.exit) else self.residual_std * self._network(z, voxels)
        return pixelshuffle(voxels + residual, 3, self.patch)

    def _network(self, z: Tensor, voxels: Tensor) -> Tensor:
        h = self.entry(z)
        for unfolded, level in zip(self.unfolded, self.levels[:-1], strict=True):
            h = pixelshuffle(unfolded(level(h)), 3, 2)
        h = self.levels[-1](h + self.seen(voxels))
        return self.exit(F.silu(self.norm(h)))


def idle(exit: nn.Conv3d) -> bool:
    """Whether the last layer of a network in training is frozen at 0, so that what comes before need not be computed.

    In evaluation it is computed all the same: the check would cost a GPU more than it saves.
    """
    return exit.training and not exit.weight.requires_grad and not exit.weight.any()
