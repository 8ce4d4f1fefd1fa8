# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Features of Med3D's ResNet-50 (Chen et al. 2019), those of the paper's FID.

The network is the one of the public MedicalNet code, `resnet_50_23dataset.pth`, to which torch.hub gives the name
`medicalnet_resnet50_23datasets`. MONAI's `resnet50` takes these weights without complaint but is another network:
its first convolution has stride 1 and its last two stages have stride 2, where MedicalNet has stride 2 at first and
dilation 2 and 4 at the end. Both are put right here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import ResNet, resnet50

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.evaluation.metrics.features import Extractor, load_strictly, read_weights

SOURCE = (
    "give --medicalnet_path resnet_50_23dataset.pth from https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet50 "
    "or https://github.com/Tencent/MedicalNet"
)
WHAT = "MedicalNet's ResNet-50 (23 datasets)"
DILATIONS = {"layer3": 2, "layer4": 4}


class MedicalNet:
    """The 2048 averages over space of the last feature maps, of volumes with mean 0 and standard deviation 1.

    Args:
        path: `resnet_50_23dataset.pth`, which no package index has; None if it was not given.
    """

    dimension = 2048

    def __init__(self, path: Any = None) -> None:
        self.path = path

    @property
    def given(self) -> bool:
        """Whether the file was given."""
        return self.path is not None

    def facts(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        return {
            "network": "medicalnet_resnet50_23datasets",
            "weights_sha256": file_hash(self._file()),
            "preprocessing": "z-score over the whole volume",
            "pooling": "mean over space of the last feature maps",
            "dimension": self.dimension,
        }

    def _file(self) -> Path:
        if self.path is None or not Path(str(self.path)).is_file():
            raise BundleError(f"there are no weights of {WHAT}{f' at {self.path}' if self.path else ''}: {SOURCE}")
        return Path(str(self.path))

    def load(self, device: torch.device) -> Extractor:
        """See `FeatureNetwork`.

        Raises:
            BundleError: if the file is not this network.
        """
        network = medicalnet_resnet50()
        load_strictly(network, read_weights(self._file(), WHAT, SOURCE), self.path, WHAT)
        network.to(device).eval()
        return lambda volume: network(standardised(volume))[0]


def medicalnet_resnet50() -> ResNet:
    """MedicalNet's ResNet-50 up to the mean over space: (N, 1, X, Y, Z) -> (N, 2048), not yet trained."""
    network = resnet50(
        pretrained=False,
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_stride=2,
        shortcut_type="B",
        bias_downsample=False,
        feed_forward=False,
    )
    for name, dilation in DILATIONS.items():
        stage = getattr(network, name)
        stage[0].downsample[0].stride = (1, 1, 1)
        for block in stage:
            block.conv2.stride = (1, 1, 1)
            block.conv2.dilation = block.conv2.padding = (dilation,) * 3
    return network


def standardised(volume: torch.Tensor) -> torch.Tensor:
    """The volume less its mean, over its standard deviation; zeros if it is constant."""
    return (volume - volume.mean()) / volume.std(correction=0).clamp(min=1e-8)
