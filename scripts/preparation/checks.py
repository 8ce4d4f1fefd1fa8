# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a scan shows the whole brain, lies upright, and says plainly which side is left; the step that checks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scripts.preparation.appearance import VAULT_FROM_MM, Appearance, appearance, at_template_size
from scripts.preparation.registration import LIKELY_SCALES, Registration, Template, correlation, seen_fraction
from scripts.preparation.steps import Record, TargetSpace
from scripts.volumes.scans import Scan

SKULL_MM = 12.0
THICK_MM = 2.0
DOUBTFUL_SIDES = -0.008


@dataclass(frozen=True)
class FieldOfView:
    """How much of a head the scan shows: fractions 0..1 of the template brought to the head's place and size.

    Attributes:
        brain: of the brain.
        vault: of the brain and the 12 mm around it, above the skull's base (MNI z over -30 mm).
    """

    brain: float
    vault: float

    def flag(self, least_brain: float = 0.99, least_vault: float = 0.98) -> str:
        """`cut` if a part of the brain is missing, `skull cut` if a part of what is around it is, else `whole`."""
        if self.brain < least_brain:
            return "cut"
        return "skull cut" if self.vault < least_vault else "whole"


def field_of_view(scan: Scan, found: Registration, template: Template) -> FieldOfView:
    """What the scan shows of the head; constant planes at its ends are padding and show nothing.

    Args:
        scan: the raw scan.
        found: how it lies on the template.
        template: the head that it was registered to.
    """
    coarse = template.thinned
    transform, affine = found.with_scale(template.centre), coarse.head.affine
    heights = affine[2, 3] + affine[2, 2] * np.arange(coarse.head.data.shape[2])
    vault = coarse.near_brain(SKULL_MM) & (heights > VAULT_FROM_MM)
    return FieldOfView(
        seen_fraction(scan, transform, coarse.in_brain, affine), seen_fraction(scan, transform, vault, affine)
    )


@dataclass(frozen=True)
class PoseCorrelations:
    """How a prepared volume lies, by its correlation with the turned and with the mirrored template at 4 mm.

    Attributes:
        upright: correlation with the template as it is.
        turned: the best correlation with the template after one of the 23 quarter or half turns.
        sides: correlation with the template less that with its mirror image. The asymmetry of the average head
            (the petalias) makes it positive in most heads and negative in most mirrored ones, but not in all.
    """

    upright: float
    turned: float
    sides: float

    @property
    def is_upright(self) -> bool:
        """Whether no turn of the template fits better."""
        return self.upright > self.turned

    @property
    def sides_are_doubtful(self) -> bool:
        """Whether the mirrored template fits clearly better: a reason to look, and no proof."""
        return self.sides < DOUBTFUL_SIDES


def pose(volume: np.ndarray, affine: np.ndarray, scale: float, template: Template) -> PoseCorrelations:
    """Compare a prepared volume with the template in its place, turned, and mirrored.

    Args:
        volume: prepared, in the template's frame.
        affine: of the volume.
        scale: length in the head over length in the template.
        template: the head that it was registered to.
    """
    return _pose(*at_template_size(volume, affine, scale, template), template.centre)


def _pose(found: Scan, coarse: Template, centre: np.ndarray) -> PoseCorrelations:
    moved, near = found.data, coarse.near_brain(SKULL_MM)
    turns = [_similarity(moved, coarse.head, _about(centre, turn), near) for turn in _quarter_turns()]
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    sides = turns[0] - _similarity(moved, coarse.head, mirror, near)
    return PoseCorrelations(turns[0], max(turns[1:]), sides)


def _quarter_turns() -> list[np.ndarray]:
    """The 24 rotations of a cube, the identity first."""
    turns = Rotation.create_group("O")
    return [turns[index].as_matrix() for index in np.argsort(turns.magnitude(), kind="stable")]


def _about(centre: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, centre - rotation @ centre
    return matrix


def _similarity(moved: np.ndarray, head: Scan, transform: np.ndarray, near: np.ndarray) -> float:
    to_voxels = np.linalg.inv(head.affine) @ transform @ head.affine
    turned = ndimage.affine_transform(head.data, to_voxels[:3, :3], to_voxels[:3, 3], order=1)
    return correlation(moved[near], turned[near])


def described(findings: Sequence[str]) -> str:
    """The findings as one cell of a table; `none` if there are none."""
    return "; ".join(findings) if findings else "none"


@dataclass(frozen=True)
class CheckScan:
    """Says how much of the head the scan shows, whether it lies upright, and what makes left and right doubtful.

    Args:
        space: the template and the grid.
        min_brain: a scan that shows less of the brain than this fraction is flagged as `cut`.
        min_vault: one that shows less of what is around the brain, as `skull cut`.
    """

    space: TargetSpace
    min_brain: float = 0.99
    min_vault: float = 0.98

    columns: ClassVar[Mapping[str, str]] = {
        "brain_seen": "fraction of the brain inside the scan's field of view",
        "vault_seen": "the same of the brain and the 12 mm around it, above the base of the skull",
        "field_of_view": "`cut` where a part of the brain is missing, `skull cut` of what is around it, else `whole`",
        "orientation": "`upright`, or `turned` where the template fits better after a quarter or half turn",
        "sides": "`usual`, or `doubtful` where the mirrored template fits clearly better",
        "sides_score": "correlation with the template less that with its mirror image",
        "header": "what is doubtful in the file: left and right, the position, or its bytes; `none` if nothing is",
        "contrast": "`T1w`, or `flat` or `inverted` where white matter is not clearly brighter than grey",
        "air": "`dark`, or `bright` where the air around the head is not, as in UNI images of MP2RAGE",
        "skull": "`on`, or `stripped` where the scan has next to nothing around the brain",
        "largest_voxel_mm": "longest side of the scan's voxels, such as the distance of its slices",
    }

    def __call__(self, record: Record) -> Record:
        """The record with its columns, and a warning for each finding."""
        found, template, grid = record.registered(), self.space.template, self.space.grid
        view = field_of_view(record.original, found, template)
        moved, coarse = at_template_size(record.on_grid(), grid.affine, found.scale, template)
        lies, looks = _pose(moved, coarse, template.centre), appearance(moved, coarse)
        flag = view.flag(self.min_brain, self.min_vault)
        record = record.warned(flag == "cut", f"{1 - view.brain:.1%} of the brain is outside its field of view")
        record = record.warned(flag == "skull cut", f"{1 - view.vault:.1%} of the skull's vault is outside its view")
        record = record.warned(not lies.is_upright, "the template fits better when it is turned: look at its picture")
        record = record.warned(lies.sides_are_doubtful, "the mirrored template fits better: check left and right")
        record = self._looked_at(record, looks, found.scale)
        return record.with_measured(
            brain_seen=round(view.brain, 4),
            vault_seen=round(view.vault, 4),
            field_of_view=flag,
            orientation="upright" if lies.is_upright else "turned",
            sides="doubtful" if lies.sides_are_doubtful else "usual",
            sides_score=round(lies.sides, 4),
            header=described(record.original.findings),
            contrast=looks.contrast,
            air=looks.air,
            skull=looks.skull,
            largest_voxel_mm=round(float(record.original.spacing.max()), 2),
        )

    def _looked_at(self, record: Record, looks: Appearance, scale: float) -> Record:
        """The record with a warning for what does not look like a T1-weighted adult head with its skull, at 1 mm."""
        low, high = LIKELY_SCALES
        thickest = float(record.original.spacing.max())
        for condition, message in (
            (looks.contrast != "T1w", f"its contrast is {looks.contrast}: is it T1-weighted?"),
            (
                looks.air == "bright",
                "its air is as bright as a head, as in UNI images of MP2RAGE: take the denoised one",
            ),
            (looks.skull == "stripped", "it is skull-stripped"),
            (
                not low <= scale <= high,
                f"its length is {scale:.2f} of the template's; adults have {low:.2f} to {high:.2f}",
            ),
            (thickest > THICK_MM, f"its voxels are up to {thickest:g} mm long"),
        ):
            record = record.warned(condition, message)
        return record.updated(skull_stripped=record.skull_stripped or looks.skull == "stripped")
