# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""An autoencoder that sees each cube of voxels as the channels of one: for small models on a CPU.

Most of the time of an `AutoencoderKL` goes to its first level, where few channels meet all voxels. Folding the voxels
of a cube into channels (space to depth: Shi et al. 2016, https://arxiv.org/abs/1609.05158; before an autoencoder for
latent diffusion: the tokenizer of Cosmos, https://arxiv.org/abs/2501.03575) does that level's work at half the
resolution with eight times the input channels.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets import AutoencoderKL
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor


class OnCubes:
    """Mixed in before an `AutoencoderKL`: `encode` folds cubes of voxels into channels, and `decode` unfolds them.

    Args:
        patch: voxels along each side of a cube.
        in_channels, out_channels: of the volume.
        **network: the other arguments of the autoencoder.
    """

    def __init__(self, patch: int = 2, in_channels: int = 1, out_channels: int = 1, **network: Any) -> None:
        cube = patch**3
        super().__init__(in_channels=in_channels * cube, out_channels=out_channels * cube, **network)  # type: ignore[call-arg]
        self.patch = patch

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (B, L, x, y, z), of the posterior of volumes (B, C, X, Y, Z).

        Raises:
            ValueError: if a side of the volumes is no multiple of `patch`.
        """
        return super().encode(pixelunshuffle(x, 3, self.patch))  # type: ignore[misc]

    def decode(self, z: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) of latents (B, L, x, y, z)."""
        return pixelshuffle(super().decode(z), 3, self.patch)  # type: ignore[misc]


class PatchedAutoencoderKL(OnCubes, AutoencoderKL):
    """MONAI's 3D `AutoencoderKL` on cubes of voxels; its arguments are those of `OnCubes`.

    Its latent is `patch` times smaller along each side than that of an `AutoencoderKL` of the same levels.
    """
