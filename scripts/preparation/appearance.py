# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a prepared head looks like: whether its contrast is that of T1, its air is dark, and its skull is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from scripts.preparation.registration import Template, foreground, resample, resized_about, thinned
from scripts.volumes.scans import Scan

CHECK_MM = 4.0
WHITE, GREY = (75.0, 100.0), (20.0, 45.0)
"""Percentiles of the template's brain between which it is white and grey matter."""
SCALP_MM = (6.0, 22.0)
VAULT_FROM_MM = -30.0
AIR_MM = 8.0
LEAST_CONTRAST = 1.05
BRIGHT = 0.2
MOST_BRIGHT_AIR, LEAST_SCALP = 0.3, 0.12


@dataclass(frozen=True)
class Appearance:
    """What a head shows at the places where the template has white and grey matter, scalp and air.

    Attributes:
        white_over_grey: median of white over that of grey matter, above 1.05 where the contrast is that of T1.
        bright_air: fraction of the air around the head that is brighter than a fifth of white matter.
        bright_scalp: the same of what lies 6 to 22 mm outside of the brain, above the skull's base.
    """

    white_over_grey: float
    bright_air: float
    bright_scalp: float

    @property
    def contrast(self) -> str:
        """`T1w`, `flat`, or `inverted` where white matter is darker than grey."""
        if self.white_over_grey >= LEAST_CONTRAST:
            return "T1w"
        return "inverted" if self.white_over_grey < 1.0 / LEAST_CONTRAST else "flat"

    @property
    def air(self) -> str:
        """`dark`, or `bright` as in the images of MP2RAGE that are called UNI."""
        return "bright" if self.bright_air > MOST_BRIGHT_AIR else "dark"

    @property
    def skull(self) -> str:
        """`on` or `stripped`."""
        return "stripped" if self.bright_scalp < LEAST_SCALP else "on"


def at_template_size(volume: np.ndarray, affine: np.ndarray, scale: float, template: Template) -> tuple[Scan, Template]:
    """A prepared volume at the template's size, and the template, both at 4 mm on the template's grid.

    Args:
        volume: prepared, in the template's frame.
        affine: of the volume.
        scale: length in the head over length in the template.
        template: the head that it was registered to.
    """
    coarse = Template(thinned(template.head, CHECK_MM), template.brain)
    sized, shape = resized_about(template.centre, scale), coarse.head.data.shape
    moved = resample(thinned(Scan(volume, affine), CHECK_MM), sized, shape, coarse.head.affine, order=1)
    return Scan(moved, coarse.head.affine), coarse


def appearance(moved: Scan, template: Template) -> Appearance:
    """What a head looks like; both as `at_template_size` gives them."""
    head, brain = template.head.data, template.in_brain
    white, grey = (_level(moved.data, head, brain, between) for between in (WHITE, GREY))
    bright = moved.data > BRIGHT * max(white, grey)
    heights = moved.affine[2, 3] + moved.affine[2, 2] * np.arange(moved.data.shape[2])
    vault = np.broadcast_to(heights > VAULT_FROM_MM, head.shape)
    scalp = vault & template.near_brain(SCALP_MM[1]) & ~template.near_brain(SCALP_MM[0])
    far = ndimage.distance_transform_edt(~(foreground(head) | template.near_brain(SCALP_MM[0])), sampling=moved.spacing)
    return Appearance(white / max(grey, 1e-6), _mean(bright[vault & (far > AIR_MM)]), _mean(bright[scalp]))


def _level(values: np.ndarray, head: np.ndarray, brain: np.ndarray, between: tuple[float, float]) -> float:
    low, high = np.percentile(head[brain], between)
    return float(np.median(values[brain & (head >= low) & (head <= high)]))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
