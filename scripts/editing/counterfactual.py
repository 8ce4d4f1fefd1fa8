# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A head under other conditions: carried to noise under those that it has, and back under those that it shall have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.core.options import number, yes_or_no
from scripts.diffusion.inversion import TOLERANCE, ReversiblePath, Walked
from scripts.editing.changed_regions import change_mask, give_back
from scripts.sampling.family import ModelFamily
from scripts.sampling.trajectory import DiffusionFamily
from scripts.volumes.grid import Grid

logger = logging.getLogger(__name__)

METHOD = "implicit midpoint"
OF_SAMPLERS = ("sampler", "eta", "num_inference_steps", "clip_sample", "spacing", "recompute_noise")
"""Facts of a family that say how it samples, and nothing of a path that is gone in both directions."""
UNSOLVED = 1.0e-3
"""Correction of a step above which what comes back is not what went."""


def diffusion_family(family: ModelFamily) -> DiffusionFamily:
    """The family, if there is a way from its volumes to their noise.

    Raises:
        BundleError: if there is none, as for a GAN.
    """
    if not isinstance(family, DiffusionFamily):
        raise BundleError(f"{type(family).__name__} has no way from a volume to its noise: give a diffusion model")
    return family


@dataclass
class Edited:
    """One answer.

    Attributes:
        volume: the edited head, (X, Y, Z), 0..1.
        mask: how much of each voxel has changed, (X, Y, Z), 0..1.
        condition: what it was returned under, (conditions,).
    """

    volume: np.ndarray
    mask: np.ndarray
    condition: Tensor


@dataclass
class Answers:
    """What was made of one head.

    Attributes:
        reconstruction: what comes back under the head's own conditions, (X, Y, Z).
        edited: an answer for each target.
        facts: of the inversion, for the sidecar: `latent_error`, the root mean square between the latent that was
            carried to noise and the one that came back unedited; `noise_sd`; `calls` of the network.
    """

    reconstruction: np.ndarray
    edited: list[Edited]
    facts: dict[str, Any]


class Editor:
    """Encodes, inverts, returns and decodes.

    Args:
        family: the model.
        grid: where volumes lie.
        steps: of the whole path from clean to noise.
        strength: above 0 and up to 1, the share of the path that is gone: less keeps more of the head and changes less.
        tolerance: see `scripts.diffusion.inversion.TOLERANCE`.
        keep_residual: whether what the reconstruction lacks of the scan is given back where nothing changed.
        device: where to compute.

    Raises:
        BundleError: for a family without a way back, or an option out of range.
    """

    def __init__(
        self,
        family: ModelFamily,
        grid: Grid,
        steps: Any = 20,
        strength: Any = 1.0,
        tolerance: Any = TOLERANCE,
        keep_residual: Any = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.family, self.grid, self.device = diffusion_family(family), grid, torch.device(device)
        self.strength = number(strength, "strength", 0.0, 1.0)
        self.path = ReversiblePath(self.family.sampler.schedule, steps, number(tolerance, "inversion_tolerance", 0.0))
        self.start = round(self.strength * len(self.path))
        if self.start < 1:
            raise BundleError(
                f"--strength {self.strength:g} of {len(self.path)} steps is none: give more of either, such as 0.5"
            )
        self.keep_residual = yes_or_no(keep_residual, "keep_residual")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides an answer besides head and conditions, as plain data for sidecars."""
        model = {name: value for name, value in self.family.facts().items() if name not in OF_SAMPLERS}
        inversion = {"method": METHOD, "steps": len(self.path), "strength": self.strength}
        return {**model, "inversion": {**inversion, "tolerance": self.path.tolerance}, "residual": self.keep_residual}

    @torch.no_grad()
    def to_noise(self, latent: Tensor, condition: Tensor, steps: int | None = None) -> Walked:
        """Carry clean latents (B, C, x, y, z) to their noise, without guidance.

        Args:
            latent: as `ModelFamily.encode` gives it.
            condition: (B, conditions), what the heads have.
            steps: how far; None as far as `strength` says.
        """
        return self.path.walk(self.family.denoiser(condition, guided=False), latent, 0, steps or self.start)

    @torch.no_grad()
    def to_clean(self, noisy: Tensor, condition: Tensor, guided: bool = True, steps: int | None = None) -> Walked:
        """The way back, under any conditions; with the family's guidance, or without."""
        return self.path.walk(self.family.denoiser(condition, guided), noisy, steps or self.start, 0)

    def encode(self, scan: np.ndarray) -> Tensor:
        """The clean latent (1, C, x, y, z) of a volume (X, Y, Z)."""
        return self.family.encode(torch.from_numpy(np.ascontiguousarray(scan))[None, None].to(self.device))

    def decode(self, latents: Sequence[Tensor]) -> list[np.ndarray]:
        """The volumes (X, Y, Z) of latents (1, C, x, y, z), after the denoiser's memory is given back."""
        self.family.release()
        return [self.family.decode(latent)[0, 0].float().cpu().numpy() for latent in latents]

    def __call__(self, scan: np.ndarray, own: Tensor, targets: Sequence[Tensor]) -> Answers:
        """The head under each of some conditions.

        Args:
            scan: prepared, (X, Y, Z) on the grid, 0..1.
            own: what it has, (conditions,).
            targets: what it shall have, each (conditions,).
        """
        own, clean = own[None].to(self.device), self.encode(scan)
        out = self.to_noise(clean, own)
        back = self.to_clean(out.latent, own, guided=False)
        others = [self.to_clean(out.latent, target[None].to(self.device)) for target in targets]
        walks = [out, back, *others]
        reconstruction, *volumes = self.decode([back.latent, *(walk.latent for walk in others)])
        answers = [self._answer(scan, reconstruction, *pair) for pair in zip(volumes, targets, strict=True)]
        return Answers(reconstruction, answers, _facts_of(clean, out, back, walks))

    def _answer(self, scan: np.ndarray, reconstruction: np.ndarray, volume: np.ndarray, target: Tensor) -> Edited:
        mask = change_mask(reconstruction, volume, self.grid)
        volume = give_back(scan, reconstruction, volume, mask) if self.keep_residual else volume
        return Edited(volume.clip(0.0, 1.0), mask, target)


def _facts_of(clean: Tensor, out: Walked, back: Walked, walks: Sequence[Walked]) -> dict[str, Any]:
    correction = max(walk.correction for walk in walks)
    error = float((back.latent - clean).square().mean().sqrt())
    if not error < UNSOLVED:
        logger.warning(
            f"what came back without an edit is off by {error:.2g} (a step was solved to {correction:.2g}): the "
            "inversion is not exact; give more --inversion_steps, or check that the model fits the scan"
        )
    noise_sd = round(float(out.latent.std()), 4)
    calls = sum(walk.calls for walk in walks)
    return {"latent_error": error, "largest_correction": correction, "noise_sd": noise_sd, "calls": calls}
