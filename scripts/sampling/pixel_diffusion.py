# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The family of pixel-space DDPMs: diffusion of the volumes themselves, without an autoencoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scripts.diffusion.pixel_range import to_denoiser, to_volume
from scripts.sampling.trajectory import DiffusionFamily

NAME = "pixel_diffusion"


class PixelDiffusion(DiffusionFamily):
    """Noise to volumes by the reverse trajectory alone (Remedios et al., "Minimally Preprocessed Brain MRI").

    See docs/pixel_diffusion.md for the models that this family is after. `shape` is (1, X, Y, Z).
    """

    def encode(self, volume: Tensor) -> Tensor:
        """The volumes in -1..1; see `ModelFamily.encode`."""
        return to_denoiser(volume.float())

    def decode(self, clean: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z), nominally 0..1, of -1..1."""
        return to_volume(clean.float())

    def facts(self) -> dict[str, Any]:
        """Sampler, target and schedule, precision, and the weights' hash.

        Raises:
            BundleError: if the model was trained for another target or on another schedule.
        """
        trajectory = self.trajectory_facts()
        return {"family": NAME, **trajectory, "fast": self.fast, "weights": self.weights_facts("diffusion")}
