# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks with one tensor in and one out, for MONAI's commands that check and export networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scripts.networks.weights import Checkpoint, load_network


class LatentDecoder(nn.Module):
    """The decoder half of the autoencoder: latents (B, C, x, y, z) to volumes (B, 1, X, Y, Z).

    MONAI's `verify_net_in_out` and `ckpt_export` call a network with one tensor and expect one back; the
    autoencoder itself returns a tuple, and the diffusion UNet needs timesteps and conditions.

    Args:
        autoencoder: MONAI's `AutoencoderKL`.
        latent_scale: factor that training put on the latents; they are divided by it before decoding.
    """

    def __init__(self, autoencoder: nn.Module, latent_scale: float = 1.0) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_scale = latent_scale

    def forward(self, latent: Tensor) -> Tensor:
        """Decode; intensities nominally 0..1, not clipped."""
        return self.autoencoder.decode_stage_2_outputs(latent / self.latent_scale)  # type: ignore[operator]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the state dict of the autoencoder, of monai-generative's or of MONAI core's names.

        Raises:
            BundleError: if a weight is missing, left over, or of another shape.
        """
        return load_network(self.autoencoder, Checkpoint(Path("the checkpoint"), dict(state_dict)), load_old=1)
