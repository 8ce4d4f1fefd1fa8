# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Conditioning by concatenation and cross-attention together, and sampling with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.schedulers import Scheduler
from torch import Tensor, nn
from tqdm import tqdm

from scripts.guidance import null_conditions
from scripts.precision import autocast, precision_name
from scripts.samplers import Sampler


class HybridInferer(Inferer):
    """Calls the denoiser with its conditions both as extra channels and as the context of cross-attention.

    The hybrid of Rombach et al. 2022 as Pinaya et al. 2022 use it: the vector of conditions is one context
    token, and each condition fills one more input channel. MONAI's own inferers do one or the other.
    Training calls the inferer; sampling calls `denoise` with the same arguments.

    Args:
        schedule: adds the noise in training.
        amp: precision of the network, see `scripts.precision.half_precision`; its output is float32 all the same.
    """

    def __init__(self, schedule: Scheduler, amp: Any = False) -> None:
        self.schedule = schedule
        self.amp = precision_name(amp)

    def __call__(
        self, inputs: Tensor, network: nn.Module, noise: Tensor, timesteps: Tensor, condition: Tensor
    ) -> Tensor:
        """The network's output for clean latents that this call makes noisy.

        Args:
            inputs: scaled latents, (B, C, x, y, z).
            network: the denoiser.
            noise: standard normal, of the same shape.
            timesteps: (B,), as the schedule has them.
            condition: (B, conditions), nominally 0..1.

        Returns:
            (B, C, x, y, z): the estimate of the training target.
        """
        noisy = self.schedule.add_noise(original_samples=inputs, noise=noise, timesteps=timesteps)
        return self.denoise(network, noisy, timesteps, condition)

    def denoise(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The network's output for noisy latents (B, C, x, y, z) at timesteps (B,) with conditions (B, n)."""
        channels = condition[:, :, None, None, None].expand(-1, -1, *noisy.shape[2:])
        x = torch.cat([noisy, channels.to(noisy)], dim=1)
        with autocast(noisy.device, self.amp):
            output = network(x=x, timesteps=timesteps, context=condition[:, None, :])
        return output.float()


class LatentDiffusionSampler(Inferer):
    """Noise to volumes: the reverse trajectory in latent space, then the decoder.

    Args:
        hybrid: calls the denoiser with its conditions.
        sampler: steps along the trajectory.
        autoencoder: MONAI's `AutoencoderKL`; it decodes.
        latent_scale: factor that training put on the latents; they are divided by it before decoding.
        guidance: factor w of classifier-free guidance, which calls the network with and without conditions; None
            calls it with them alone. See `scripts.guidance`.
        release: called before decoding; see `scripts.memory.release_weights`.
        decoder_amp: precision of the decoder, see `scripts.precision.half_precision`.

    Raises:
        BundleError: for a precision that does not exist.
    """

    def __init__(
        self,
        hybrid: HybridInferer,
        sampler: Sampler,
        autoencoder: nn.Module,
        latent_scale: float = 1.0,
        guidance: float | None = None,
        release: Callable[[], None] | None = None,
        decoder_amp: Any = False,
    ) -> None:
        self.hybrid = hybrid
        self.sampler = sampler
        self.autoencoder = autoencoder
        self.latent_scale = latent_scale
        self.guidance = guidance
        self.release = release
        self.decoder_amp = precision_name(decoder_amp)

    def __call__(
        self, inputs: Tensor, network: nn.Module, condition: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Volumes for a batch of noise.

        Args:
            inputs: standard normal noise, (B, C, x, y, z).
            network: the denoiser.
            condition: (B, conditions), nominally 0..1.
            generators: one for each sample, for samplers that add noise.

        Returns:
            (B, 1, X, Y, Z) float32 on the network's device; intensities nominally 0..1, not clipped.
        """
        latent = self.sample_latent(inputs, network, condition, generators)
        if self.release is not None:
            self.release()
        return self.decode(latent)

    @torch.no_grad()
    def sample_latent(
        self, noise: Tensor, network: nn.Module, condition: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The clean latent at the end of the trajectory, (B, C, x, y, z), scaled as in training."""
        latent = noise
        for timestep in tqdm(self.sampler.timesteps, "denoising", unit="step", leave=False, disable=None):
            output = self._guided(network, latent, timestep, condition)
            latent = self.sampler.step(output, timestep, latent, generators)
        return latent

    def _guided(self, network: nn.Module, latent: Tensor, timestep: float, condition: Tensor) -> Tensor:
        if self.guidance is None:
            return self._denoise(network, latent, timestep, condition)
        conditions = torch.cat([null_conditions(condition), condition])
        null, conditional = self._denoise(network, torch.cat([latent, latent]), timestep, conditions).chunk(2)
        return torch.lerp(null, conditional, self.guidance)  # null + w (conditional - null), exact at 0 and 1

    def _denoise(self, network: nn.Module, latent: Tensor, timestep: float, condition: Tensor) -> Tensor:
        # On a CPU one at a time, where it costs little: PyTorch adds in an order that depends on the batch size.
        size = 1 if latent.device.type == "cpu" else len(latent)
        timesteps = torch.full((len(latent),), timestep, device=latent.device)
        parts = zip(latent.split(size), timesteps.split(size), condition.split(size), strict=True)
        return torch.cat([self.hybrid.denoise(network, *part) for part in parts])

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of latents, one at a time since one full-size decode takes most memory."""
        volumes = []
        for one in latent.split(1):
            with autocast(latent.device, self.decoder_amp):
                decoded = self.autoencoder.decode_stage_2_outputs(one / self.latent_scale)  # type: ignore[operator]
            volumes.append(decoded.float())
        return torch.cat(volumes)
