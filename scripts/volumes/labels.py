# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Label maps: which codes are ventricles and brain, and their volumes, from the maps or from SynthSeg's tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from scripts.core.cells import read_number, shown
from scripts.core.errors import BundleError
from scripts.core.tables import read_table
from scripts.volumes.head_size import Structures
from scripts.volumes.reading import read_codes
from scripts.volumes.scans import without_suffix

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
OTHER_FLUID = (14, 15, 24, 30, 31, 62, 63, 72, 85, 257)
"""What else is within the skull: third, fourth and fifth ventricle, fluid, vessels, choroid plexus, chiasm."""
LEAST_OTHER_FLUID = 0.02
"""Share of the intracranial volume that fluid beside the lateral ventricles has where all of it is labelled; maps of
FreeSurfer's `aseg` label a millilitre."""
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


def label_volumes(path: Path) -> Structures:
    """Volumes of a label map in FreeSurfer's, SynthSeg's or the phantoms' codes.

    Raises:
        BundleError: if it cannot be read, does not hold whole numbers, or has no ventricle or no brain.
    """
    codes, affine = read_codes(path)
    found = counted_structures(codes, float(np.prod(np.linalg.norm(affine[:3, :3], axis=0))))
    for name, volume in (("ventricular_vol", found.ventricles), ("brain_vol", found.brain)):
        if not volume:
            raise BundleError(f"{path} has no label of {name}: codes of FreeSurfer or SynthSeg are expected")
    return found


def counted_structures(codes: np.ndarray, voxel: float) -> Structures:
    """Volumes of labels in FreeSurfer's, SynthSeg's or the phantoms' codes, of voxels of so many mm3."""
    present, counts = np.unique(codes, return_counts=True)
    ventricles, brain, fluid = (
        voxel * float(counts[np.isin(present, structure)].sum()) for structure in _structures_of(present)
    )
    return Structures(ventricles, brain, _intracranial(ventricles + brain, fluid))


def _intracranial(inner: float, fluid: float) -> float | None:
    """All within the skull, of ventricles and brain and the other fluid; None where that is not labelled as a whole."""
    return inner + fluid if fluid >= LEAST_OTHER_FLUID * (inner + fluid) else None


def _structures_of(present: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """The codes of ventricles, brain and other fluid in a label map with these codes.

    Phantoms have codes of 1 to 7 alone; maps of FreeSurfer and SynthSeg have those of the right hemisphere, above 40.
    """
    if np.isin(ALWAYS_IN_PHANTOMS, present).all() and present.max() <= max(LABELS.values()):
        fluid = [LABELS[name] for name in ("outer_fluid", "third_ventricle", "fourth_ventricle")]
        return [LABELS["lateral_ventricles"]], [LABELS["grey"], LABELS["white"]], fluid
    return list(VENTRICLES), [*TISSUE, *LESIONS_AND_CALLOSUM, *PARCELS], list(OTHER_FLUID)


def read_synthseg(path: Path) -> dict[str, Structures]:
    """The volumes of each subject out of a table of volumes (mm3) by SynthSeg (Billot et al. 2023).

    Brain is every structure but fluid; cortical parcels, which are parts of the cortex, are left out. A table without
    the intracranial volume has it as the sum of all, where it states the fluid around the brain.

    Raises:
        BundleError: if a column is missing, a volume is no number, or a subject has two rows.
    """
    found: dict[str, Structures] = {}
    for row in read_table(path, ["subject", *VENTRICLE_COLUMNS]):
        name = stem(Path(row["subject"]))
        if name in found:
            raise BundleError(f"the table {path} has two rows of {name}")
        found[name] = _structures({k: v for k, v in row.items() if k != "subject"}, f"{name} in {path}")
    return found


def _structures(row: Mapping[str, str], where: str) -> Structures:
    volumes: dict[str, float] = {}
    for name, cell in row.items():
        number = read_number(cell)
        if number.value is None and cell:
            raise BundleError(f"a volume of {where} is no number: '{shown(cell)}' in the column '{name}'")
        volumes |= {} if number.value is None else {name.lower(): number.value}
    left_out = (*FLUID_COLUMNS, INTRACRANIAL)
    brain = sum(v for name, v in volumes.items() if name not in left_out and not CORTEX_PARCEL.match(name))
    ventricles = sum(volumes[name] for name in VENTRICLE_COLUMNS)
    other = sum(v for name, v in volumes.items() if name in FLUID_COLUMNS and name not in VENTRICLE_COLUMNS)
    return Structures(ventricles, brain, volumes.get(INTRACRANIAL, _intracranial(ventricles + brain, other)))


def stem(path: Path) -> str:
    """The name of a file without its folder, `.nii`, `.nii.gz`, `.mgz` or `.mgh`."""
    return without_suffix(path.name)


def by_stem(paths: Iterable[Path], flag: str) -> dict[str, Path]:
    """Files by their names without endings.

    Raises:
        BundleError: naming two files of one name, of which one would be lost.
    """
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(stem(path), path)
        if other != path:
            raise BundleError(f"--{flag}: {other} and {path} have one name: which is meant? Leave one of them out")
    return found


def belongs(segmentation: str, volume: str) -> bool:
    """Whether a segmentation is of a volume, by their names: the same, or that with more after a `_`, `-` or `.`."""
    return segmentation == volume or segmentation.startswith((f"{volume}_", f"{volume}-", f"{volume}."))
