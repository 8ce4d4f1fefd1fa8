# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A synthetic head: nested ellipsoids with a folded surface, for tests of the phantoms without a scan."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from scripts.core.tables import write_table
from scripts.phantoms.heads import SeedHead, build_head
from scripts.volumes.grid import Grid
from scripts.volumes.labels import LABELS

GRID = Grid((42, 57, 42), (-4.0, 4.0, 4.0), (82.0, -112.0, -59.5))
FINER = Grid((56, 76, 56), (-3.0, 3.0, 3.0), (82.5, -112.5, -60.0))
LEVELS = (0.0, 0.3, 0.1, 0.45, 0.65, 0.1, 0.1, 0.1)


def synthetic_labels(grid: Grid = GRID, swell: float = 1.0) -> np.ndarray:
    """Labels of `scripts.phantoms.heads.LABELS` on a grid; `swell` scales the head."""
    index = np.indices(grid.shape, dtype=np.float64)
    middle = (np.array(grid.shape) - 1) / 2
    mm = [(i - m) * abs(s) for i, m, s in zip(index, middle, grid.spacing)]
    radius = np.sqrt((mm[0] / 62) ** 2 + (mm[1] / 80) ** 2 + (mm[2] / 62) ** 2) / swell
    folds = 0.035 * (np.cos(mm[0] / 3.7) + np.cos(mm[1] / 4.1) + np.cos(mm[2] / 3.9))
    labels = np.zeros(grid.shape, np.uint8)
    labels[radius < 1.22] = LABELS["scalp_and_skull"]
    labels[radius < 1.05] = LABELS["outer_fluid"]
    labels[radius + folds < 0.96] = LABELS["grey"]
    labels[radius + folds < 0.80] = LABELS["white"]
    for side in (-1, 1):
        horn = np.sqrt(((mm[0] - side * 12) / 9) ** 2 + (mm[1] / 28) ** 2 + ((mm[2] - 8) / 10) ** 2) / swell
        labels[horn < 1.0] = LABELS["lateral_ventricles"]
    labels[np.sqrt((mm[0] / 4) ** 2 + (mm[1] / 10) ** 2 + ((mm[2] + 10) / 8) ** 2) < 1.0] = LABELS["third_ventricle"]
    labels[np.sqrt((mm[0] / 5) ** 2 + ((mm[1] + 30) / 5) ** 2 + ((mm[2] + 30) / 8) ** 2) < 1] = LABELS[
        "fourth_ventricle"
    ]
    return labels


def synthetic_image(labels: np.ndarray) -> np.ndarray:
    """Intensities 0..1 by tissue."""
    return np.array(LEVELS, np.float32)[labels]


def synthetic_head(name: str = "sub-round", swell: float = 1.0, grid: Grid = GRID) -> SeedHead:
    """A seed head of it."""
    labels = synthetic_labels(grid, swell)
    return build_head(name, torch.as_tensor(synthetic_image(labels)), torch.as_tensor(labels), grid)


def write_heads(folder: Path) -> tuple[Path, Path]:
    """Two synthetic heads as a prepared dataset and a folder of label maps."""
    dataset, label_maps = folder / "heads", folder / "labels"
    label_maps.mkdir(parents=True)
    rows = []
    for name, swell in (("sub-round", 1.0), ("sub-small", 0.95)):
        labels = synthetic_labels(swell=swell)
        path = f"{name}/anat/{name}_T1w.nii.gz"
        (dataset / path).parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(synthetic_image(labels), GRID.affine), dataset / path)
        nib.save(nib.Nifti1Image(labels, GRID.affine), label_maps / f"{name}_dseg.nii.gz")
        rows.append({"participant_id": name, "path": path})
    write_table(dataset / "participants.tsv", rows)
    return dataset, label_maps
