# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The autoencoder in slabs: the same volume from a fraction of the memory.

MONAI's `AutoencoderKL` computes each feature map of a volume in one piece and holds several of them. Here a map is
computed a few rows along x at a time, each convolution with the rows beside them that it needs
(`scripts.networks.cpu.slabs`). Group normalisation needs the moments of the whole map first: they are summed over its
slabs, and the map is kept or computed again. So two maps of the largest size are held at the most, or one, beside a few
slabs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from monai.networks.blocks import Convolution, Upsample
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.networks.cpu.convolution import TILE, doubled, doubled_weights, winograd, winograd_weights
from scripts.networks.cpu.slabs import Computed, Convolved, Doubled, Halved, Moments, Rows, Stored, Sum, Tapped, Window

VOXELS = {"cpu": 2**17, "cuda": 2**22}  # of a slab
FEW = 8  # channels below which the plain convolution is as fast


class Streamed(nn.Module):
    """The encoder or the decoder of MONAI's `AutoencoderKL`, computed in slabs where no gradients are wanted.

    Blocks that it does not know, attention among them, get their map in one piece.

    Args:
        network: the encoder or decoder; its blocks and their names are kept.
        recompute: hold one map of the largest size in the place of two, and compute some convolutions twice.
        fast: take the convolutions of `scripts.networks.cpu.convolution`.
        voxels: of a slab; None for what was measured to be good on the device.
    """

    def __init__(self, network: nn.Module, recompute: bool, fast: bool, voxels: int | None = None) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = network.blocks  # type: ignore[assignment]
        self.recompute, self.fast, self.voxels = recompute, fast, voxels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, x, y, z) to what the plain network gives, in autocast's type where that is on."""
        if torch.is_grad_enabled():
            for block in self.blocks:
                x = block(x)
            return x
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        one_pass = Pass(dtype, self.recompute, self.fast, self.voxels or VOXELS.get(kind, VOXELS["cuda"]))
        with torch.autocast(kind, enabled=False):
            return torch.cat([one_pass(self.blocks, one.to(dtype)) for one in x.split(1)])


class Pass:
    """One volume's way through the blocks of `Streamed`, whose arguments it shares; `dtype` is that of the maps."""

    def __init__(self, dtype: torch.dtype, recompute: bool, fast: bool, voxels: int) -> None:
        self.dtype, self.recompute, self.fast, self.voxels = dtype, recompute, fast, voxels

    def __call__(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """(1, C, x, y, z) to the last block's output."""
        rows: Rows = Stored(x)
        for block in blocks:
            rows = KINDS.get(type(block), Pass.whole)(self, block, rows)
        return self.store(rows).tensor

    def whole(self, block: nn.Module, rows: Rows) -> Rows:
        """Any block, of its map in one piece."""
        tensor = self.store(rows).tensor
        with torch.autocast(tensor.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)):
            return Stored(block(tensor).to(self.dtype))

    def convolution(self, block: nn.Module, rows: Rows) -> Rows:
        """3 x 3 x 3, stride 1."""
        weight, bias = self._parameters(block)
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if self.fast and on_cpu and min(weight.shape[:2]) >= FEW and rows.shape[4] % TILE == 0:
            return Convolved(rows, len(weight), partial(_winograd, weights=winograd_weights(weight), bias=bias))
        return Convolved(rows, len(weight), partial(_plain, weight=weight, bias=bias))

    def norm(self, block: nn.GroupNorm, rows: Rows) -> Rows:
        """Group normalisation with no nonlinearity after it."""
        return self._normalised(self.store(rows), block, silu=False)

    def upsample(self, block: Upsample, rows: Rows) -> Rows:
        """Nearest upsampling by two, and the convolution after it."""
        if not hasattr(block, "postconv"):
            return self.whole(block, rows)
        return self._doubled(self.store(rows), *self._parameters(block.postconv))

    def downsample(self, block: AEKLDownsample, rows: Rows) -> Rows:
        """3 x 3 x 3, stride 2."""
        weight, bias = self._parameters(block.conv)
        return self.store(Halved(self.store(rows), len(weight), partial(F.conv3d, weight=weight, bias=bias, stride=2)))

    def residual(self, block: AEKLResBlock, rows: Rows) -> Rows:
        """Of a map that is kept, whose memory is then used again, or of one that is computed whenever it is read."""
        return self._of_stored(block, rows) if isinstance(rows, Stored) else self._of_computed(block, rows)

    def _of_stored(self, block: AEKLResBlock, x: Stored) -> Stored:
        inner = self.convolution(block.conv1, self._normalised(x, block.norm1))
        same = isinstance(block.nin_shortcut, nn.Identity)
        if same and self.recompute:
            return self._sum(block, inner, x, x.tensor)
        stored = self.store(inner)
        return self._sum(block, stored, self._shortcut(block, x), x.tensor if same else stored.tensor)

    def _of_computed(self, block: AEKLResBlock, x: Rows) -> Stored:
        x_moments, shortcut = self._moments(x), self._shortcut(block, x)
        if self.recompute:
            inner = self.store(self.convolution(block.conv1, self._normalised(x, block.norm1, x_moments)))
            return self._sum(block, inner, shortcut, inner.tensor)
        kept = self._empty(shortcut.shape, block.conv1.conv.weight.device)
        tapped = Tapped(x, self._pointwise(block), kept)
        inner = self.store(self.convolution(block.conv1, self._normalised(tapped, block.norm1, x_moments)))
        return self._sum(block, inner, Stored(kept), kept)

    def _sum(self, block: AEKLResBlock, inner: Rows, shortcut: Rows, into: Tensor) -> Stored:
        # `into` holds a map that the sum is computed from: windows read each row once, before it is written over.
        branch = self.convolution(block.conv2, self._normalised(inner, block.norm2))
        return self.store(Sum(shortcut, branch), into)

    def _shortcut(self, block: AEKLResBlock, x: Rows) -> Rows:
        if isinstance(block.nin_shortcut, nn.Identity):
            return x
        weight, bias = self._parameters(block.nin_shortcut)
        if isinstance(x, Doubled):  # one convolution in the place of two
            mixing = weight.flatten(1)
            return self._doubled(x.source, torch.einsum("om,mixyz->oixyz", mixing, x.weight), mixing @ x.bias + bias)
        return Computed(x, torch.Size((1, len(weight), *x.shape[2:])), self._pointwise(block))

    def _pointwise(self, block: AEKLResBlock) -> Callable[[Tensor], Tensor]:
        if isinstance(block.nin_shortcut, nn.Identity):
            return nn.Identity()
        weight, bias = self._parameters(block.nin_shortcut)
        return partial(F.conv3d, weight=weight, bias=bias)

    def _doubled(self, source: Stored, weight: Tensor, bias: Tensor) -> Doubled:
        if self.fast:
            convolve = partial(_doubled, weights=doubled_weights(weight), bias=bias)
        else:
            convolve = partial(_upsampled, weight=weight, bias=bias)
        return Doubled(source, weight, bias, convolve)

    def _normalised(self, rows: Rows, norm: nn.GroupNorm, moments: Moments | None = None, silu: bool = True) -> Window:
        scale, shift = (moments or self._moments(rows)).scale_and_shift(norm)

        def normalise(slab: Tensor) -> Tensor:
            normed = (slab.float() * scale).add_(shift)
            return (F.silu(normed, inplace=True) if silu else normed).to(self.dtype)

        return Window(rows, normalise)

    def _parameters(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        convolution: Any = block.conv
        weight = convolution.weight.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        return weight, convolution.bias.to(self.dtype)

    def _moments(self, rows: Rows) -> Moments:
        if isinstance(rows, Stored) and rows.moments is not None:
            return rows.moments
        moments = Moments()
        for start, stop in self._slabs(rows.shape):
            moments.add(rows.rows(start, stop))
        return moments

    def store(self, rows: Rows, into: Tensor | None = None) -> Stored:
        """A map in memory, that of `into` where it is given, with its moments."""
        if isinstance(rows, Stored):
            return rows
        moments, tensor = Moments(), into
        for start, stop in self._slabs(rows.shape):
            slab = rows.rows(start, stop)
            moments.add(slab)
            tensor = self._empty(rows.shape, slab.device) if tensor is None else tensor
            tensor[:, :, start:stop] = slab
        assert tensor is not None
        return Stored(tensor, moments)

    def _empty(self, shape: torch.Size, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=torch.channels_last_3d)

    def _slabs(self, shape: torch.Size) -> list[tuple[int, int]]:
        thickness = 2 * max(1, round(self.voxels / (2 * shape[3] * shape[4])))
        return [(start, min(start + thickness, shape[2])) for start in range(0, shape[2], thickness)]


def _winograd(slab: Tensor, out: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return winograd(slab, weights, bias, (0, 1), out)


def _plain(slab: Tensor, out: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(slab, weight, bias, padding=(0, 1, 1))


def _doubled(slab: Tensor, out: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return doubled(slab, weights, bias, out)


def _upsampled(slab: Tensor, out: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    large = F.interpolate(slab, scale_factor=2.0, mode="nearest")[:, :, 1:-1]
    return F.conv3d(large, weight, bias, padding=(0, 1, 1))


KINDS: dict[type[nn.Module], Callable[[Pass, Any, Rows], Rows]] = {
    Convolution: Pass.convolution,
    nn.GroupNorm: Pass.norm,
    Upsample: Pass.upsample,
    AEKLDownsample: Pass.downsample,
    AEKLResBlock: Pass.residual,
}


def stream(autoencoder: AutoencoderKL, recompute: bool, fast: bool, voxels: int | None = None) -> AutoencoderKL:
    """Let an autoencoder encode and decode in slabs; see `Streamed`.

    Returns:
        The same network, with the same names of its weights.
    """
    autoencoder.encoder = Streamed(autoencoder.encoder, recompute, fast, voxels)
    autoencoder.decoder = Streamed(autoencoder.decoder, recompute, fast, voxels)
    return autoencoder
