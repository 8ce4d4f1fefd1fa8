# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How brain volumes are normalised for the size of the head, in every way that they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import nibabel as nib
import numpy as np

from scripts.core.errors import BundleError
from scripts.core.paths import SHIPPED_MODELS

TEMPLATE = SHIPPED_MODELS / "template"
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


@dataclass(frozen=True)
class Structures:
    """Volumes in mm3 that a label map or a table states of one head.

    Attributes:
        ventricles: the lateral ones with their inferior horns.
        brain: grey and white matter, with cerebellum, brain stem and deep nuclei.
        intracranial: the brain and all fluid; None where the fluid around the brain is not stated.
    """

    ventricles: float
    brain: float
    intracranial: float | None

    def conditions(self, where: str, intracranial: float | None = None) -> dict[str, float]:
        """The volumes by the names of the conditions, the brain's normalised for the size of the head.

        Args:
            where: what they are of, for messages.
            intracranial: taken where it is not stated.

        Raises:
            BundleError: if neither is known, or the skull holds no more than brain and ventricles.
        """
        skull = self.intracranial if self.intracranial is not None else intracranial
        if skull is None:
            raise BundleError(f"{where} states no intracranial volume, to which the brain's is normalised")
        if not self.ventricles + self.brain < skull < float("inf"):
            raise BundleError(
                f"{where} has an impossible intracranial volume of {skull:g} mm3: brain and ventricles have "
                f"{self.ventricles + self.brain:g} mm3"
            )
        return {"ventricular_vol": self.ventricles, "brain_vol": normalised_brain(self.brain, skull)}


@cache
def reference_intracranial_mm3() -> float:
    """Intracranial volume of the reference head in mm3: the brain mask of the template in models/template/."""
    mask = nib.load(BRAIN)
    voxel = float(np.prod(np.linalg.norm(mask.affine[:3, :3], axis=0)))  # type: ignore[attr-defined]
    return voxel * float((np.asanyarray(mask.dataobj) > 0).sum())  # type: ignore[attr-defined]


def normalised_brain(brain_mm3: float, intracranial_mm3: float, reference_mm3: float | None = None) -> float:
    """A brain's volume times the reference head's intracranial volume over its own.

    The one definition of this project's brain volumes, after UK Biobank's field 25009, the volume of grey and white
    matter normalised for head size (Smith et al. 2002, SIENAX). The field takes the scale of the skull to the MNI152
    head for it; a scale that is fitted to a whole head is some per cent off in length, and three times that in volume.

    Args:
        brain_mm3: grey and white matter.
        intracranial_mm3: all within the skull; above 0.
        reference_mm3: of the reference head; None for `reference_intracranial_mm3`.
    """
    reference = reference_intracranial_mm3() if reference_mm3 is None else reference_mm3
    return brain_mm3 / intracranial_mm3 * reference
