# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The family of the paper: diffusion in the latent space of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from scripts.compute.precision import autocast, precision_name
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.diffusion.denoiser import HybridInferer
from scripts.diffusion.samplers import Sampler
from scripts.diffusion.schedules import check_facts, schedule_facts, target_of
from scripts.networks.adapters import LatentDecoder
from scripts.networks.weights import Checkpoint
from scripts.sampling.family import Part
from scripts.sampling.trajectory import DiffusionFamily


class LatentDiffusion(DiffusionFamily):
    """Noise to volumes: the reverse trajectory in latent space, then the decoder (Pinaya et al. 2022).

    Args:
        network, hybrid, sampler, guidance, release, sampler_name, fast: see `DiffusionFamily`.
        autoencoder: MONAI's `AutoencoderKL`; it decodes, to 0..1.
        latent_shape: (C, x, y, z).
        latent_scale: factor that training put on the latents; they are divided by it before decoding.
        decoder_amp: precision of the decoder, see `scripts.compute.precision.half_precision`.
        checkpoints: of the `autoencoder` and of the `diffusion` model; for the facts and for export.
        conditions: what the denoiser is conditioned on; for export.

    Raises:
        BundleError: for a precision that does not exist.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: nn.Module,
        hybrid: HybridInferer,
        sampler: Sampler,
        latent_shape: Sequence[int] = (),
        latent_scale: float = 1.0,
        guidance: float | None = None,
        release: Callable[[], None] | None = None,
        decoder_amp: Any = False,
        checkpoints: Mapping[str, Checkpoint] | None = None,
        conditions: Conditions | None = None,
        sampler_name: str = "",
        fast: bool = False,
    ) -> None:
        super().__init__(network, hybrid, sampler, latent_shape, guidance, release, checkpoints, sampler_name, fast)
        self.autoencoder, self.latent_scale = autoencoder, latent_scale
        self.decoder_amp = precision_name(decoder_amp)
        self.conditions = conditions

    @torch.no_grad()
    def encode(self, volume: Tensor) -> Tensor:
        """Means of the volumes' posteriors, scaled as in training, one at a time; see `ModelFamily.encode`.

        Raises:
            BundleError: for exported networks, whose encoder is not among them.
        """
        if not hasattr(self.autoencoder, "encode"):
            raise BundleError("the exported networks have no encoder: edit with the weights that they were made of")
        latents = []
        for one in volume.split(1):
            with autocast(volume.device, self.decoder_amp):
                latents.append(self.autoencoder.encode(one)[0].float())  # type: ignore[operator]
        return torch.cat(latents) * self.latent_scale

    @torch.no_grad()
    def decode(self, clean: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of latents, one at a time since one full-size decode takes most memory."""
        volumes = []
        for one in clean.split(1):
            with autocast(clean.device, self.decoder_amp):
                decoded = self.autoencoder.decode_stage_2_outputs(one / self.latent_scale)  # type: ignore[operator]
            volumes.append(decoded.float())
        return torch.cat(volumes)

    def facts(self) -> dict[str, Any]:
        """Sampler, target and schedule, precisions, and the weights' hashes.

        Raises:
            BundleError: if the diffusion model was trained for another target or on another schedule.
        """
        return {
            **self.trajectory_facts(),
            "decoder_amp": self.decoder_amp,
            "fast": self.fast,
            "latent_scale": self.checkpoints["diffusion"].latent_scale,
            "weights": self.weights_facts("autoencoder", "diffusion"),
        }

    def export(self) -> tuple[list[Part], dict[str, Any]]:
        """The denoiser, which takes noisy latents with the conditions as further channels, and the decoder.

        `diffusion` takes `x`, (B, C + conditions, x, y, z); `timesteps`, (B,) float32; and, where there are conditions,
        `context`, (B, 1, conditions). It gives `output`, the estimate of the target, (B, C, x, y, z). `decoder` takes
        `latent`, as the last step leaves it, divides by the scale, and gives `volume`, (B, 1, X, Y, Z).

        Raises:
            BundleError: if the diffusion model was trained for another target or on another schedule.
        """
        device = next(self.network.parameters()).device
        (channels, *space), conditions = self.shape, len(self.conditions or ())
        # Two samples: from one, torch.export would conclude that there is always one.
        x = torch.zeros(2, channels + conditions, *space, device=device)
        inputs = {"x": x, "timesteps": torch.zeros(2, device=device)}
        inputs |= {"context": torch.zeros(2, 1, conditions, device=device)} if conditions else {}
        decoder = LatentDecoder(self.autoencoder, self.latent_scale)
        parts = [
            Part("diffusion", self.network, inputs, "output"),
            Part("decoder", decoder, {"latent": x[:, :channels].contiguous()}, "volume"),
        ]
        return parts, self._record()

    def _record(self) -> dict[str, Any]:
        diffusion, schedule = self.checkpoints["diffusion"], self.sampler.schedule
        check_facts(diffusion, schedule)
        conditions = {} if self.conditions is None else self.conditions.as_dict()
        facts = {"conditions": conditions, "target": target_of(schedule), "schedule": schedule_facts(schedule)}
        return {
            "latent_shape": list(self.shape),
            "facts": {**diffusion.facts, **facts, "latent_scale": diffusion.latent_scale},
            "weights": self.weights_facts("diffusion", "autoencoder"),
            "versions": {package: version(package) for package in ("torch", "monai")},
        }
