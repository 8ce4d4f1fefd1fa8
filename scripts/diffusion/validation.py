# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Validation of the second stage: the loss on held-out latents, and samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scripts.compute.processes import is_main, rank, world_size
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.training.validation import Evaluation, HeldOut, Network, in_order
from scripts.volumes import pictures

UNKNOWN = 0.5


class Denoises(Protocol):
    """What calls the denoiser, such as `scripts.diffusion.denoiser.HybridInferer`."""

    def denoise(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The network's output for noisy latents (B, C, x, y, z) at timesteps (B,) with conditions (B, n)."""
        ...


class Objective(Protocol):
    """What the denoiser is trained for, such as `scripts.diffusion.objective.DiffusionObjective`."""

    def timestep_at(self, u: Tensor) -> Tensor:
        """Timesteps (B,) at the fractions u (B,) of the schedule, from 0, the clean end, to 1."""
        ...

    def noisy(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noisy latents (B, C, x, y, z)."""
        ...

    def loss(self, output: Tensor, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The loss of each sample, (B,)."""
        ...


class DiffusionValidation(HeldOut):
    """The training's loss on held-out latents with noise and timesteps that are the same in every evaluation.

    A row's noise and timesteps come from a generator that is seeded with its place in the data set. Its k-th draw
    lies in another of the `bands`, equal parts of the schedule, than the one before, so that all of them are
    visited equally often. Without this, the loss at one timestep, which differs by orders of magnitude from that
    at another, hides how the loss changes.

    Values: `loss`, the mean over all draws, and `loss_band0` (nearly clean) to `loss_band4` (nearly noise).

    Args:
        hybrid: calls the network with its conditions.
        objective: makes latents noisy and has the loss.
        bands: parts of the schedule.
        draws: timesteps for each row; a multiple of `bands` lets each row visit each band alike.
        at_once: how many of a row's draws go through the network together; None for all.
        held_out: see `HeldOut`. Items hold `image`, the scaled posterior mean (C, x, y, z), and `condition` (n,), where
            NaN, an unknown value, becomes 0.5.
    """

    def __init__(
        self,
        *,
        hybrid: Denoises,
        objective: Objective,
        bands: int = 5,
        draws: int = 5,
        at_once: int | None = None,
        **held_out: Any,
    ) -> None:
        super().__init__(**held_out)
        self.hybrid, self.objective = hybrid, objective
        self.bands, self.draws, self.at_once = bands, draws, at_once or draws

    def measure(self, network: nn.Module, device: torch.device, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        """The loss of each draw, and its band."""
        latent = torch.as_tensor(item["image"])[None].expand(self.draws, -1, -1, -1, -1)
        condition = torch.as_tensor(item["condition"]).nan_to_num(UNKNOWN)[None].expand(self.draws, -1)
        noise, u, bands = self._draw(index, latent.shape)
        drawn = (latent, noise, self.objective.timestep_at(u), condition)
        parts = zip(*(one.split(self.at_once) for one in drawn), strict=True)
        losses = [self._losses(network, *(one.to(device) for one in part)) for part in parts]
        return {"bands": bands.tolist(), "losses": torch.cat(losses).tolist()}

    def _losses(self, network: nn.Module, latent: Tensor, noise: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        output = self.hybrid.denoise(network, self.objective.noisy(latent, noise, timestep), timestep, condition)
        return self.objective.loss(output, latent, noise, timestep)

    def _draw(self, index: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(shape, generator=generator)
        bands = (index * self.draws + torch.arange(self.draws)) % self.bands
        within = torch.rand(self.draws, generator=generator)
        return noise, (bands + within) / self.bands, bands

    def summarise(self, rows: Sequence[Mapping[str, Any]], iteration: int) -> dict[str, float]:
        """Means over all draws and over those of each band; NaN for a band that no draw is in."""
        bands, losses = (np.array(list(chain.from_iterable(row[name] for row in rows))) for name in ("bands", "losses"))
        of_bands = [losses[bands == band] for band in range(self.bands)]
        means = {f"loss_band{i}": float(band.mean()) for i, band in enumerate(of_bands) if len(band)}
        return {"loss": float(losses.mean()), **means}


class Family(Protocol):
    """What makes volumes of noise, such as `scripts.sampling.family.ModelFamily`."""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of one sample's noise."""
        ...

    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Volumes (B, 1, X, Y, Z), nominally 0..1, for noise (B, *noise_shape) and conditions (B, n)."""
        ...


class SampleFigure(Evaluation):
    """Samples that are drawn as `figures/samples_iteration-N.png`: the same noise, conditions low and high.

    All rows start from one noise, so that rows differ by their conditions alone, and pictures of two epochs by
    the training between them.

    Args:
        network, run_dir, every: see `Evaluation`.
        family: makes the volumes, with that network.
        conditions: what the network is conditioned on.
        requests: conditions of each row, as `Conditions.from_request` takes them; by default each condition in turn
            is 0 and 1 and the others have their default.
        seed: of the noise.
    """

    flag = "sample_every"

    def __init__(
        self,
        network: Network,
        family: Family,
        conditions: Conditions,
        run_dir: str | os.PathLike,
        every: Any = 1,
        requests: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, run_dir, every)
        self.family, self.conditions, self.seed = family, conditions, seed
        requests = low_and_high(conditions) if requests is None else requests
        if not requests:
            raise BundleError("no samples to draw: give at least one request, or leave them to their default")
        self.vectors = [
            conditions.from_request(request, " of the figure's samples", warn=False) for request in requests
        ]

    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        """Draw the picture; there are no values."""
        own = range(len(self.vectors))[rank() :: world_size()]
        planes = in_order([(index, self._planes(network, self.vectors[index])) for index in own])
        if is_main():
            labels = [label(self.conditions, vector) for vector in self.vectors]
            pixels = pictures.sample_picture(labels, planes)
            pictures.write(self.run_dir, "samples", iteration, pixels)
        return {}

    def _planes(self, network: nn.Module, vector: Tensor) -> np.ndarray:
        device = next(network.parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((1, *self.family.noise_shape), generator=generator).to(device)
        volumes = self.family.sample(noise, vector[None].to(device), [generator])
        return pictures.strip(volumes[0, 0].float().cpu().numpy())


def low_and_high(conditions: Conditions) -> list[dict[str, float]]:
    """Requests in which each condition in turn is 0 and 1, the others at their default; one if there is none."""
    return [{condition.name: value} for condition in conditions for value in (0.0, 1.0)] or [{}]


def label(conditions: Conditions, vector: Tensor) -> str:
    """A line for each condition of a vector (n,): its name, its value 0..1, and that in raw units or as a word."""
    pairs = zip(conditions, (round(value, 6) for value in vector.tolist()), strict=True)
    return "\n".join(f"{c.name} {value:g} ({c.describe(float(f'{c.denormalise(value):.7g}'))})" for c, value in pairs)
