# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""LPIPS on slices of volumes: the perceptual loss of the autoencoder's training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.core.errors import BundleError
from scripts.networks.weights import read_checkpoint

# Convolutions of VGG16 in torchvision's numbering, by the block whose last activation LPIPS compares.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity with VGG16 features (Zhang et al. 2018, version 0.1).

    Its weights are frozen. Parameters are named as in torchvision's VGG16 (`features.N`) and in the lpips
    package (`linN`).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        previous = 3
        for numbers, channels in zip(BLOCKS, CHANNELS, strict=True):
            for number in numbers:
                self.features[str(number)] = nn.Conv2d(previous, channels, 3, padding=1)
                previous = channels
        for level, channels in enumerate(CHANNELS):
            self.add_module(f"lin{level}", nn.Conv2d(channels, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of pairs of images (B, 1 or 3, H, W); a tensor of shape (B,)."""
        total = torch.zeros(len(a), device=a.device)
        for level, (fa, fb) in enumerate(zip(self._levels(a), self._levels(b), strict=True)):
            difference = (_unit(fa) - _unit(fb)) ** 2
            total = total + self.get_submodule(f"lin{level}")(difference).float().mean(dim=(1, 2, 3))
        return total

    def _levels(self, image: Tensor) -> list[Tensor]:
        x = (image.expand(-1, 3, -1, -1) - self.shift) / self.scale
        levels = []
        for depth, numbers in enumerate(BLOCKS):
            x = F.max_pool2d(x, 2) if depth else x
            for number in numbers:
                x = F.relu(self.features[str(number)](x))
            levels.append(x)
        return levels


def _unit(features: Tensor) -> Tensor:
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)


class SlicePerceptualLoss(nn.Module):
    """Mean LPIPS over a random share of the slices along each of the three axes, summed over the axes.

    This is the "fake 3D" of MONAI's `PerceptualLoss`, with weights from a file instead of from a hub.

    Args:
        path: safetensors file that `make perceptual-weights` writes.
        fake_3d_ratio: share of the slices along each axis that are compared, above 0 and up to 1.

    Raises:
        BundleError: if the file is missing or of another network, or the ratio out of range.
    """

    def __init__(self, path: str, fake_3d_ratio: float = 0.25) -> None:
        super().__init__()
        if not 0.0 < fake_3d_ratio <= 1.0:
            raise BundleError(f"fake_3d_ratio must be above 0 and at most 1, got {fake_3d_ratio}")
        self.ratio = fake_3d_ratio
        self.network = _load(path)

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        """The loss, a scalar, of volumes (B, 1, X, Y, Z) with intensities 0..1."""
        losses = []
        for axis in (2, 3, 4):
            size = image.shape[axis]
            chosen = torch.randperm(size)[: max(1, round(self.ratio * size))].to(image.device)
            losses.append(self.network(_slices(reconstruction, axis, chosen), _slices(image, axis, chosen)).mean())
        return torch.stack(losses).sum()


def _slices(volumes: Tensor, axis: int, chosen: Tensor) -> Tensor:
    picked = volumes.index_select(axis, chosen).movedim(axis, 1)
    return picked.reshape(-1, 1, *picked.shape[3:])


def _load(path: str) -> LPIPS:
    if not Path(path).is_file():
        raise BundleError(
            f"no perceptual network at {path}: make it with `make perceptual-weights`, or train without "
            "this loss by --perceptual_weight 0"
        )
    network = LPIPS()
    checkpoint = read_checkpoint(path, "perceptual network")
    try:
        network.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise BundleError(f"{path} is not the perceptual network that `make perceptual-weights` writes") from error
    return network
