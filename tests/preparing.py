# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Small synthetic heads to prepare, whose pose is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation
from stand_ins import KnownPose

from scripts.compute.ownership import LOCK, MARK
from scripts.conditions.conditions import Conditions
from scripts.preparation.checks import CheckScan
from scripts.preparation.registration import resample
from scripts.preparation.run import Preparation
from scripts.preparation.steps import FromDarkest, Reorient, Resample, ScaleIntensities, TargetSpace
from scripts.volumes.grid import Grid
from scripts.volumes.scans import load_scan

GRID = Grid((20, 28, 20), (-8.0, 8.0, 8.0), (76.0, -120.0, -56.0))
CONDITIONS = Conditions(
    gender={"raw": "sex", "unit": "", "minimum": 0, "maximum": 1, "codes": {"female": 0, "male": 1}},
    age={"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82},
    ventricular_vol={"raw": "ventricular_vol_mm3", "unit": "mm3", "minimum": 7000, "maximum": 170000},
    brain_vol={"raw": "brain_vol_mm3", "unit": "mm3", "minimum": 1.1e6, "maximum": 1.8e6},
)
TEMPLATE = Path(__file__).resolve().parents[1] / "models" / "template"
HEAD = TEMPLATE / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
BRAIN = TEMPLATE / "tpl-MNI152NLin2009cAsym_res-01_desc-brain_mask.nii.gz"
COLUMNS = {"age_years": ["age_years", "age"], "sex": ["sex", "gender"]}
PLAUSIBLE = {"age_years": [0, 120]}


def head(grid: Grid = GRID, swell: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Intensities of a scalp, a brain and its ventricles, and the brain, on a grid."""
    index = np.moveaxis(np.indices(grid.shape), 0, -1) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    radius = np.linalg.norm((index - [0, -15, 15]) / [62.0, 80.0, 60.0], axis=-1) / swell
    image = 0.9 * (radius < 1.2) - 0.7 * (radius < 1.1) + 0.4 * (radius < 1.0) - 0.4 * (radius < 0.25)
    return image.astype(np.float32), (radius < 1.0).astype(np.float32)


def save(path: Path, data: np.ndarray, affine: np.ndarray = GRID.affine) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def coarse_template(folder: Path) -> dict[str, Path]:
    """Template and brain mask at 4 mm, with which a registration takes less."""
    shape, affine = (44, 56, 45), np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-88, -128, -78)
    files = {"template": HEAD, "template_brain": BRAIN}
    return {
        name: save(folder / f"{name}.nii.gz", resample(load_scan(file), np.eye(4), shape, affine, order=1), affine)
        for name, file in files.items()
    }


def posed(image: nib.Nifti1Image, angles: tuple, shift: tuple, axes: str) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The image as a scanner in which the head lies otherwise would store it, and the motion; no voxel changes."""
    data, affine = np.asarray(image.dataobj), image.affine
    middle = affine @ np.append((np.array(data.shape) - 1) / 2, 1.0)
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    motion[:3, 3] = middle[:3] - motion[:3, :3] @ middle[:3] + shift
    wanted = nib.orientations.axcodes2ornt(axes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
    stored = nib.orientations.apply_orientation(data, turn)
    return nib.Nifti1Image(stored, motion @ affine @ nib.orientations.inv_ornt_aff(turn, data.shape)), motion


def space(folder: Path) -> TargetSpace:
    image, brain = head()
    files = (save(folder / "template.nii.gz", image), save(folder / "brain.nii.gz", brain))
    return TargetSpace(GRID, *files)


def steps(target: TargetSpace, **more: Any) -> dict[str, Any]:
    return {
        "reorient": Reorient(),
        "darkest": FromDarkest(),
        "register": KnownPose(),
        **more,
        "resample": Resample(target, order=1),
        "scale": ScaleIntensities(target),
        "check": CheckScan(target),
    }


def write_bids(folder: Path, number: int, columns: Mapping[str, Any] | None = None) -> Path:
    """A BIDS dataset of `number` heads, each of its own size."""
    rows = ["\t".join(["participant_id", *(columns or {})])]
    for i in range(number):
        name = f"sub-{i:02d}"
        image, _ = head(swell=0.9 + 0.01 * i)
        save(folder / name / "anat" / f"{name}_T1w.nii.gz", np.rint(1000 * image).astype(np.int16))
        rows.append("\t".join([name, *(str(values[i]) for values in (columns or {}).values())]))
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


def preparation(target: TargetSpace, dataset_dir: Path, **options: Any) -> Preparation:
    arguments: dict[str, Any] = {
        "space": target,
        "steps": steps(target),
        "conditions": CONDITIONS,
        "input_dir": None,
        "input_table": None,
        "dataset_dir": dataset_dir,
        "columns": COLUMNS,
        "plausible": PLAUSIBLE,
        "splits": {"train": 0.8, "validation": 0.1, "test": 0.1},
    }
    return Preparation(**{**arguments, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path, with its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARK, LOCK))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
