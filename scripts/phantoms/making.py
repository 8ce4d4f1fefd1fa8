# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Digital head phantoms: real heads with another age, sex, ventricular and brain volume, each exactly known."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.phantoms.deformation import cosine_field, sample, smooth_coefficients
from scripts.phantoms.heads import SeedHead
from scripts.phantoms.looks import Looks, aged, draw_looks, scanned
from scripts.phantoms.population import Covariates, Population
from scripts.phantoms.shapes import PhantomTarget, Pose, Shape, deform

logger = logging.getLogger(__name__)

ATTEMPTS = 4
DRAWS = 50
COVARIATES, ANATOMY, LOOKS = range(3)


@dataclass(frozen=True)
class Phantom:
    """One phantom.

    Attributes:
        image: (1, X, Y, Z) float32, intensities 0..1.
        labels: (1, X, Y, Z) uint8, values of `scripts.phantoms.heads.LABELS`.
        measured: covariates, the volumes counted on `labels`.
        requested: covariates that were asked for.
        facts: how it was made: seed head, flip, smallest Jacobian determinant, how often it was tried.
    """

    image: Tensor
    labels: Tensor
    measured: Covariates
    requested: Covariates
    facts: dict[str, Any]


@dataclass(frozen=True)
class Anatomy:
    """What is drawn for the shape of one phantom.

    Attributes:
        head: index of the seed head.
        flipped: left for right.
        stretch: logarithm of the scale along each axis, of mean 0.
        angles: see `Pose`.
        velocity: (3, k, l, m) cosine coefficients in mm, of the random deformation.
    """

    head: int
    flipped: bool
    stretch: tuple[float, float, float]
    angles: tuple[float, float, float]
    velocity: Tensor


class Phantoms:
    """Maker of phantoms: number n of seed s depends on s, n and the settings alone.

    Args:
        heads: the seed heads, all on one grid, where the phantoms lie too.
        population: draws the covariates that are not asked for.
        reference_intracranial_mm3: of the head to whose size the brain is normalised.
        anatomy: `amplitude` (mm) and `wavelength` (mm) of the random deformation, `stretch` (of the head along each
            axis, relative) and `tilt` (degrees): standard deviations.
        ageing: `head_age` of the seed heads in years; `grey_over_white` and `contrast`, what each of these loses in a
            year, relative.
        looks: see `scripts.phantoms.looks.draw_looks`, and the `wavelength` of the bias field in mm.
    """

    def __init__(
        self,
        heads: Sequence[SeedHead],
        population: Population,
        reference_intracranial_mm3: float,
        anatomy: Mapping[str, float],
        ageing: Mapping[str, float],
        looks: Mapping[str, float],
    ) -> None:
        self.heads, self.population = list(heads), population
        self.reference = float(reference_intracranial_mm3)
        self.anatomy, self.ageing, self.looks = anatomy, ageing, looks
        self.grid = self.heads[0].grid
        self.extent = [n * abs(s) for n, s in zip(self.grid.shape, self.grid.spacing)]

    def settings(self) -> dict[str, Any]:
        """What besides seed and number decides how a phantom comes out, as plain data."""
        return {
            "heads": [head.name for head in self.heads],
            "reference_intracranial_mm3": self.reference,
            "anatomy": dict(self.anatomy),
            "ageing": dict(self.ageing),
            "looks": dict(self.looks),
            "population": self.population.settings(),
            "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()},
        }

    def covariates(self, seed: int, number: int, fixed: Mapping[str, float] | None = None, draw: int = 0) -> Covariates:
        """What a phantom is asked to be; `fixed` holds what is not drawn, by raw name, and `draw` counts the draws."""
        return self.population.draw(stream(seed, number, COVARIATES, draw), fixed)

    def make(self, seed: int, number: int, fixed: Mapping[str, float] | None = None) -> Phantom:
        """One phantom.

        If one draw of head and deformation cannot take the volumes, others are tried, each deformed half as much at
        random as the one before. If none can, the covariates that are not fixed are drawn again.

        Args:
            seed, number: which one.
            fixed: raw name -> value of covariates that are not drawn.

        Raises:
            BundleError: if no seed head can be given these volumes.
        """
        failure = None
        for draw in range(1 if {"ventricular_vol_mm3", "brain_vol_mm3"} <= set(fixed or {}) else DRAWS):
            wanted = self.covariates(seed, number, fixed, draw)
            for attempt in range(ATTEMPTS):
                try:
                    return self._attempt(wanted, seed, number, draw, attempt)
                except BundleError as error:
                    logger.info(f"phantom {number}, draw {draw + 1}, attempt {attempt + 1}: {error}")
                    failure = error
        raise BundleError(f"phantom {number} of seed {seed} cannot be made: {failure}")

    def _attempt(self, wanted: Covariates, seed: int, number: int, draw: int, attempt: int) -> Phantom:
        anatomy = self._draw_anatomy(stream(seed, number, ANATOMY, draw, attempt), 0.5**attempt)
        shape = self._shape(wanted, anatomy)
        looks = self._draw_looks(stream(seed, number, LOOKS))
        return self._phantom(wanted, anatomy, shape, looks, {"redrawn": draw, "attempt": attempt})

    def _draw_anatomy(self, generator: torch.Generator, calm: float) -> Anatomy:
        head = int(torch.randint(len(self.heads), (1,), generator=generator))
        flipped = bool(torch.rand(1, generator=generator) < 0.5)
        stretch, angles = torch.randn(2, 3, generator=generator, dtype=torch.float64).clamp(-2.0, 2.0)
        stretch = self.anatomy["stretch"] * (stretch - stretch.mean())
        x, y, z = stretch.tolist()
        a, b, c = (math.radians(self.anatomy["tilt"]) * angles).tolist()
        modes = smooth_coefficients(3, self.extent, self.anatomy["wavelength"], generator)
        return Anatomy(head, flipped, (x, y, z), (a, b, c), self.anatomy["amplitude"] * calm * modes)

    def _draw_looks(self, generator: torch.Generator) -> Looks:
        modes = smooth_coefficients(1, self.extent, self.looks["wavelength"], generator)
        return draw_looks(self.looks, modes, generator)

    def _shape(self, wanted: Covariates, anatomy: Anatomy) -> Shape:
        head = self.heads[anatomy.head]
        years = wanted.age_years - self.ageing["head_age"]
        ratio = head.volumes.grey / head.volumes.white * math.exp(-self.ageing["grey_over_white"] * years)
        target = PhantomTarget(wanted.ventricular_vol_mm3, wanted.brain_vol_mm3 / self.reference, ratio)
        velocity = cosine_field(anatomy.velocity, head.shares.shape[2:]).to(head.shares)
        return deform(head, target, self._pose(head, wanted, anatomy), velocity)

    def _pose(self, head: SeedHead, wanted: Covariates, anatomy: Anatomy) -> Pose:
        """The pose of the wanted intracranial volume, or of the largest one that the grid holds."""
        size = (wanted.intracranial_mm3 / head.volumes.intracranial) ** (1.0 / 3.0)
        x, y, z = (size * math.exp(s) for s in anatomy.stretch)
        fit = min(1.0, *(0.97 * room / s for room, s in zip(head.room, (x, y, z))))
        return Pose((x * fit, y * fit, z * fit), anatomy.angles)

    def _phantom(
        self, wanted: Covariates, anatomy: Anatomy, shape: Shape, looks: Looks, tries: Mapping[str, int]
    ) -> Phantom:
        head = self.heads[anatomy.head]
        contrast = 1.0 - self.ageing["contrast"] * (wanted.age_years - self.ageing["head_age"])
        image = scanned(aged(sample(head.images, shape.positions, beyond="zeros"), head.levels, contrast), looks)
        labels = shape.labels.to(torch.uint8)
        if anatomy.flipped:
            image, labels = image.flip(2), labels.flip(2)
        volumes = shape.volumes
        measured = dataclasses.replace(
            wanted,
            ventricular_vol_mm3=volumes.ventricles,
            brain_vol_mm3=volumes.brain / volumes.intracranial * self.reference,
            intracranial_mm3=volumes.intracranial,
        )
        facts = {
            "seed_head": head.name,
            "flipped": int(anatomy.flipped),
            "grey_mm3": volumes.grey,
            "white_mm3": volumes.white,
            "least_jacobian": round(shape.least_jacobian, 4),
            "stages": shape.stages,
            **tries,
        }
        return Phantom(image[0].cpu(), labels[0].cpu(), measured, wanted, facts)


def stream(*numbers: int) -> torch.Generator:
    """The random stream, on the CPU, that belongs to a sequence of numbers."""
    state = np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
