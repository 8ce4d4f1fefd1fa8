# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What all diffusion models have in common as families: a trajectory from noise to a clean latent or volume."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scripts.diffusion.consistency import ConsistencySampler
from scripts.diffusion.denoiser import HybridInferer
from scripts.diffusion.guidance import null_conditions
from scripts.diffusion.samplers import Denoise, Sampler
from scripts.diffusion.schedules import check_facts, schedule_facts, target_of
from scripts.networks.weights import Checkpoint
from scripts.sampling.family import ModelFamily

logger = logging.getLogger(__name__)


class DiffusionFamily(ModelFamily):
    """Noise to volumes: the reverse trajectory, then what decodes its end.

    Args:
        network: the denoiser.
        hybrid: calls it with its conditions.
        sampler: walks along the trajectory.
        shape: of the noise of one sample, (C, x, y, z).
        guidance: factor w of classifier-free guidance, which calls the network with and without conditions; None
            calls it with them alone. See `scripts.diffusion.guidance`.
        release: called before decoding; see `scripts.networks.cpu.memory.release_weights`.
        checkpoints: by network; that of the `diffusion` model is needed for the facts.
        sampler_name, fast: for the facts.
    """

    def __init__(
        self,
        network: nn.Module,
        hybrid: HybridInferer,
        sampler: Sampler,
        shape: Sequence[int] = (),
        guidance: float | None = None,
        release: Callable[[], None] | None = None,
        checkpoints: Mapping[str, Checkpoint] | None = None,
        sampler_name: str = "",
        fast: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.hybrid, self.sampler, self.sampler_name = hybrid, sampler, sampler_name
        self.shape, self.guidance, self.fast = tuple(shape), guidance, fast
        self.checkpoints = dict(checkpoints or {})
        self._release = release

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """That of what is diffused, (C, x, y, z)."""
        return self.shape

    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Volumes (B, 1, X, Y, Z) float32 for noise (B, C, x, y, z); nominally 0..1, not clipped."""
        clean = self.sample_clean(noise, condition, generators)
        self.release()
        return self.decode(clean)

    @abstractmethod
    def decode(self, clean: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z), nominally 0..1, of what trajectories end in, (B, C, x, y, z)."""

    def release(self) -> None:
        """Give back the memory of the denoiser's weights until it is called again."""
        if self._release is not None:
            self._release()

    def sample_clean(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """What trajectories end in, (B, C, x, y, z), scaled as in training."""

        return self.sampler.sample(self.denoiser(condition), noise, generators)

    def denoiser(self, condition: Tensor, guided: bool = True) -> Denoise:
        """What calls the network under conditions (B, n), with the family's guidance or without any."""
        call = self._guided if guided else self._denoise
        return lambda noisy, timestep: call(noisy, timestep, condition)

    def _guided(self, noisy: Tensor, timestep: float, condition: Tensor) -> Tensor:
        if self.guidance is None:
            return self._denoise(noisy, timestep, condition)
        conditions = torch.cat([null_conditions(condition), condition])
        null, conditional = self._denoise(torch.cat([noisy, noisy]), timestep, conditions).chunk(2)
        return torch.lerp(null, conditional, self.guidance)  # null + w (conditional - null), exact at 0 and 1

    def _denoise(self, noisy: Tensor, timestep: float, condition: Tensor) -> Tensor:
        # On a CPU one at a time, where it costs little: PyTorch adds in an order that depends on the batch size.
        size = 1 if noisy.device.type == "cpu" else len(noisy)
        timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
        parts = zip(noisy.split(size), timesteps.split(size), condition.split(size), strict=True)
        return torch.cat([self.hybrid.denoise(self.network, *part) for part in parts])

    def trajectory_facts(self) -> dict[str, Any]:
        """Sampler, target, schedule and precision of the denoiser, as the sidecars say them.

        Raises:
            BundleError: if the diffusion model was trained for another target or on another schedule.
        """
        schedule = self.sampler.schedule
        check_facts(self.checkpoints["diffusion"], schedule)
        self._warn_of_distillation()
        return {
            "sampler": self.sampler_name,
            "eta": self.sampler.eta,
            "num_inference_steps": len(self.sampler.timesteps),
            **self.sampler.settings,
            "guidance": self.guidance,
            "target": target_of(schedule),
            "schedule": schedule_facts(schedule),
            "amp": self.hybrid.amp,
        }

    def _warn_of_distillation(self) -> None:
        checkpoint, is_few = self.checkpoints["diffusion"], isinstance(self.sampler, ConsistencySampler)
        if is_few and "distilled" not in checkpoint.facts:
            logger.warning(
                f"--sampler few is for a model that was distilled (configs/few_steps.yaml), and {checkpoint.path} does "
                "not say that it was: expect blurred samples"
            )

    def weights_facts(self, *names: str) -> dict[str, dict[str, str]]:
        """Name and hash of the files that networks were read from, by the networks' names."""
        return {name: self.checkpoints[name].identity for name in names}
