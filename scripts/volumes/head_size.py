# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The head to whose size brain volumes are normalised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import nibabel as nib
import numpy as np

from scripts.core.paths import MODELS

TEMPLATE = MODELS / "template"
BRAIN = TEMPLATE / "tpl-MNI152NLin2009cAsym_res-01_desc-brain_mask.nii.gz"


@dataclass(frozen=True)
class Volumes:
    """Volumes of one head in mm3; `ventricles` are the lateral ones, `intracranial` is all within the skull."""

    ventricles: float
    grey: float
    white: float
    intracranial: float

    @property
    def brain(self) -> float:
        """Grey and white matter."""
        return self.grey + self.white

    @property
    def of_tissues(self) -> tuple[float, float, float]:
        """Ventricles, grey and white matter."""
        return self.ventricles, self.grey, self.white


@cache
def reference_intracranial_mm3() -> float:
    """Intracranial volume of the reference head in mm3: the brain mask of the template in models/template/."""
    mask = nib.load(BRAIN)
    voxel = float(np.prod(mask.header.get_zooms()[:3]))  # type: ignore[attr-defined]
    return voxel * float((np.asanyarray(mask.dataobj) > 0).sum())  # type: ignore[attr-defined]


def normalised_brain(brain_mm3: float, intracranial_mm3: float, reference_mm3: float | None = None) -> float:
    """A brain's volume times the reference head's intracranial volume over its own: as UK Biobank's field 25009 is.

    Args:
        brain_mm3: grey and white matter.
        intracranial_mm3: all within the skull; above 0.
        reference_mm3: of the reference head; None for `reference_intracranial_mm3`.
    """
    reference = reference_intracranial_mm3() if reference_mm3 is None else reference_mm3
    return brain_mm3 / intracranial_mm3 * reference
