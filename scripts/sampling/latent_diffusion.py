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
from scripts.diffusion.denoiser import HybridInferer
from scripts.diffusion.guidance import null_conditions
from scripts.diffusion.samplers import Sampler
from scripts.diffusion.schedules import check_facts, schedule_facts, target_of
from scripts.networks.adapters import LatentDecoder
from scripts.networks.weights import Checkpoint
from scripts.sampling.family import ModelFamily, Part


class LatentDiffusion(ModelFamily):
    """Noise to volumes: the reverse trajectory in latent space, then the decoder (Pinaya et al. 2022).

    Args:
        network: the denoiser.
        autoencoder: MONAI's `AutoencoderKL`; it decodes, to 0..1.
        hybrid: calls the denoiser with its conditions.
        sampler: walks along the trajectory.
        latent_shape: (C, x, y, z).
        latent_scale: factor that training put on the latents; they are divided by it before decoding.
        guidance: factor w of classifier-free guidance, which calls the network with and without conditions; None
            calls it with them alone. See `scripts.diffusion.guidance`.
        release: called before decoding; see `scripts.networks.cpu.memory.release_weights`.
        decoder_amp: precision of the decoder, see `scripts.compute.precision.half_precision`.
        checkpoints: of the `autoencoder` and of the `diffusion` model; for the facts and for export.
        conditions: what the denoiser is conditioned on; for export.
        sampler_name, fast: for the facts.

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
        super().__init__()
        self.network, self.autoencoder = network, autoencoder
        self.hybrid, self.sampler, self.sampler_name = hybrid, sampler, sampler_name
        self.latent_shape, self.latent_scale = tuple(latent_shape), latent_scale
        self.guidance, self.fast = guidance, fast
        self.decoder_amp = precision_name(decoder_amp)
        self.checkpoints, self.conditions = dict(checkpoints or {}), conditions
        self._release = release

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """That of the latents, (C, x, y, z)."""
        return self.latent_shape

    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Volumes (B, 1, X, Y, Z) float32 for noise (B, C, x, y, z); nominally 0..1, not clipped."""
        latent = self.sample_latent(noise, condition, generators)
        self.release()
        return self.decode(latent)

    def release(self) -> None:
        """Give back the memory of the denoiser's weights until it is called again."""
        if self._release is not None:
            self._release()

    def sample_latent(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The clean latents at the end of the trajectory, (B, C, x, y, z), scaled as in training."""

        def denoise(latent: Tensor, timestep: float) -> Tensor:
            return self._guided(latent, timestep, condition)

        return self.sampler.sample(denoise, noise, generators)

    def _guided(self, latent: Tensor, timestep: float, condition: Tensor) -> Tensor:
        if self.guidance is None:
            return self._denoise(latent, timestep, condition)
        conditions = torch.cat([null_conditions(condition), condition])
        null, conditional = self._denoise(torch.cat([latent, latent]), timestep, conditions).chunk(2)
        return torch.lerp(null, conditional, self.guidance)  # null + w (conditional - null), exact at 0 and 1

    def _denoise(self, latent: Tensor, timestep: float, condition: Tensor) -> Tensor:
        # On a CPU one at a time, where it costs little: PyTorch adds in an order that depends on the batch size.
        size = 1 if latent.device.type == "cpu" else len(latent)
        timesteps = torch.full((len(latent),), timestep, device=latent.device)
        parts = zip(latent.split(size), timesteps.split(size), condition.split(size), strict=True)
        return torch.cat([self.hybrid.denoise(self.network, *part) for part in parts])

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of latents, one at a time since one full-size decode takes most memory."""
        volumes = []
        for one in latent.split(1):
            with autocast(latent.device, self.decoder_amp):
                decoded = self.autoencoder.decode_stage_2_outputs(one / self.latent_scale)  # type: ignore[operator]
            volumes.append(decoded.float())
        return torch.cat(volumes)

    def facts(self) -> dict[str, Any]:
        """Sampler, target and schedule, precisions, and the weights' hashes.

        Raises:
            BundleError: if the diffusion model was trained for another target or on another schedule.
        """
        schedule = self.sampler.schedule
        check_facts(self.checkpoints["diffusion"], schedule)
        return {
            "sampler": self.sampler_name,
            "eta": self.sampler.eta,
            "num_inference_steps": len(self.sampler.timesteps),
            "guidance": self.guidance,
            "target": target_of(schedule),
            "schedule": schedule_facts(schedule),
            "amp": self.hybrid.amp,
            "decoder_amp": self.decoder_amp,
            "fast": self.fast,
            "latent_scale": self.checkpoints["diffusion"].latent_scale,
            "weights": self._weights("autoencoder", "diffusion"),
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
        (channels, *space), conditions = self.latent_shape, len(self.conditions or ())
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
            "latent_shape": list(self.latent_shape),
            "facts": {**diffusion.facts, **facts, "latent_scale": diffusion.latent_scale},
            "weights": self._weights("diffusion", "autoencoder"),
            "versions": {package: version(package) for package in ("torch", "monai")},
        }

    def _weights(self, *names: str) -> dict[str, dict[str, str]]:
        return {name: self.checkpoints[name].identity for name in names}
