# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Label maps: which codes are ventricles and brain, and their volumes, from the maps or from SynthSeg's tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.core.errors import BundleError
from scripts.core.tables import read_table
from scripts.volumes.nifti import UNREADABLE

LABELS = {
    "outside": 0,
    "scalp_and_skull": 1,
    "outer_fluid": 2,
    "grey": 3,
    "white": 4,
    "lateral_ventricles": 5,
    "third_ventricle": 6,
    "fourth_ventricle": 7,
}
"""The codes of phantoms."""
QUANTITIES = ("ventricular_vol", "brain_vol")
"""The names of the conditions that can be measured."""
VENTRICLES = (4, 5, 43, 44)
"""Left and right lateral and inferior lateral ventricles in FreeSurfer's and SynthSeg's codes."""
TISSUE = (2, 3, 7, 8, 10, 11, 12, 13, 16, 17, 18, 26, 28, 41, 42, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60)
LESIONS_AND_CALLOSUM = (77, 78, 79, 80, 81, 82, 192, 251, 252, 253, 254, 255)
"""These are grey and white matter, cerebellum and brain stem in these codes, without any fluid."""
PARCELS = range(1000, 5003)
"""The codes of cortical parcels and of the white matter below them: brain as well."""
ALWAYS_IN_PHANTOMS = [
    LABELS[name] for name in ("scalp_and_skull", "outer_fluid", "grey", "white", "lateral_ventricles")
]

VENTRICLE_COLUMNS = (
    "left lateral ventricle",
    "left inferior lateral ventricle",
    "right lateral ventricle",
    "right inferior lateral ventricle",
)
FLUID_COLUMNS = (*VENTRICLE_COLUMNS, "3rd ventricle", "4th ventricle", "csf")
INTRACRANIAL = "total intracranial"
CORTEX_PARCEL = re.compile(r"ctx-[lr]h-")
"""SynthSeg's columns of cortical parcels, which are parts of the column of the cortex."""


def label_volumes(path: Path) -> dict[str, float]:
    """Ventricular and brain volume of a label map in FreeSurfer's, SynthSeg's or the phantoms' codes, in mm3.

    Raises:
        BundleError: if it cannot be read, does not hold whole numbers, or has no ventricle or no brain.
    """
    try:
        image: Any = nib.load(path)
        codes = np.asanyarray(image.dataobj)
        voxel = float(np.prod(image.header.get_zooms()[:3]))
    except UNREADABLE as error:
        raise BundleError(f"cannot read the label map {path}: it is damaged, cut short or no image") from error
    present, counts = np.unique(codes, return_counts=True)
    if not np.isfinite(present).all() or (present != np.rint(present)).any():
        raise BundleError(f"{path} is no label map: it holds other values than whole numbers")
    ventricles, brain = _structures_of(present)
    volumes = {
        "ventricular_vol": voxel * counts[np.isin(present, ventricles)].sum(),
        "brain_vol": voxel * counts[np.isin(present, brain)].sum(),
    }
    for name, volume in volumes.items():
        if not volume:
            raise BundleError(f"{path} has no label of {name}: codes of FreeSurfer or SynthSeg are expected")
    return {name: float(volume) for name, volume in volumes.items()}


def _structures_of(present: np.ndarray) -> tuple[list[int], list[int]]:
    """The codes of ventricles and brain in a label map with these codes.

    Phantoms have codes of 1 to 7 alone; maps of FreeSurfer and SynthSeg have those of the right hemisphere, above 40.
    """
    if np.isin(ALWAYS_IN_PHANTOMS, present).all() and present.max() <= max(LABELS.values()):
        return [LABELS["lateral_ventricles"]], [LABELS["grey"], LABELS["white"]]
    return list(VENTRICLES), [*TISSUE, *LESIONS_AND_CALLOSUM, *PARCELS]


def read_synthseg(path: Path) -> dict[str, dict[str, float]]:
    """Ventricular and brain volumes out of a table of volumes (mm3) by SynthSeg (Billot et al. 2023).

    Brain is every structure but fluid; the intracranial volume and the cortical parcels, which are parts of the
    cortex, are left out.

    Raises:
        BundleError: if a column is missing, a volume is no number, or a subject has two rows.
    """
    found: dict[str, dict[str, float]] = {}
    for row in read_table(path, ["subject", *VENTRICLE_COLUMNS]):
        name = stem(Path(row["subject"]))
        if name in found:
            raise BundleError(f"the table {path} has two rows of {name}")
        found[name] = _structures({k: v for k, v in row.items() if k != "subject"}, f"{name} in {path}")
    return found


def _structures(row: Mapping[str, str], where: str) -> dict[str, float]:
    try:
        volumes = {name.lower(): float(value) for name, value in row.items() if value}
    except ValueError as error:
        raise BundleError(f"a volume of {where} is no number: {error}") from error
    if not np.isfinite(list(volumes.values())).all():
        raise BundleError(f"a volume of {where} is NaN or infinite")
    brain = [
        volume
        for name, volume in volumes.items()
        if name not in (*FLUID_COLUMNS, INTRACRANIAL) and not CORTEX_PARCEL.match(name)
    ]
    return {"ventricular_vol": sum(volumes[name] for name in VENTRICLE_COLUMNS), "brain_vol": sum(brain)}


def stem(path: Path) -> str:
    """The name of a file without its folder, `.nii`, `.nii.gz`, `.mgz` or `.mgh`."""
    return re.sub(r"\.(nii\.gz|nii|mgz|mgh)$", "", path.name)


def belongs(segmentation: str, volume: str) -> bool:
    """Whether a segmentation is of a volume, by their names: the same, or that with more after a `_`, `-` or `.`."""
    return segmentation == volume or segmentation.startswith((f"{volume}_", f"{volume}-", f"{volume}."))
