# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Folders of volumes that are compared with each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import torch

from scripts.errors import BundleError
from scripts.tables import read_table
from scripts.volumes import UNREADABLE, read_volume

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
TOLERANCE = 1e-3


class VolumeFolder:
    """The volumes of a folder, all of one shape; each is read when it is asked for and not kept.

    They are those that a prepared dataset's `participants.tsv` lists in its column `path`, else every
    `.nii` and `.nii.gz` file in the folder and below it, in the order of their names.

    Args:
        path: the folder; None if none was given.
        flag: the command-line flag that gives it, for messages.

    Attributes:
        shape: voxels along x, y, z of every volume; empty if no folder was given.
        lowest, highest: smallest and largest intensity among the volumes read so far.

    Raises:
        BundleError: if the folder is missing or has no volumes, or if a volume is missing, unreadable, not
            3D or of another shape than the first. Only headers are looked at here.
    """

    def __init__(self, path: Any, flag: str) -> None:
        self.flag = flag
        self.folder = None if path is None else Path(str(path))
        self.paths = [] if self.folder is None else _find_volumes(self.folder, flag)
        self.shape = _common_shape(self.paths)
        self.lowest, self.highest = float("inf"), float("-inf")

    @property
    def requested(self) -> bool:
        """Whether a folder was given."""
        return self.folder is not None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Volume number `index` as float32 of shape (1, 1, X, Y, Z), intensities as they are on disk.

        Raises:
            BundleError: if it is cut short or holds NaN.
        """
        volume = torch.from_numpy(read_volume(self.paths[index]))
        self._note_range(self.paths[index], float(volume.min()), float(volume.max()))
        return volume[None, None]

    def _note_range(self, path: Path, low: float, high: float) -> None:
        inside = self.lowest >= -TOLERANCE and self.highest <= 1 + TOLERANCE
        if inside and (low < -TOLERANCE or high > 1 + TOLERANCE):
            logger.warning(f"{path} ranges from {low:g} to {high:g}: the measures are meant for intensities of 0 to 1")
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)

    def name(self, index: int) -> str:
        """The path of volume number `index` within the folder."""
        return os.path.relpath(self.paths[index], self.folder)

    def summary(self) -> dict[str, Any]:
        """Where the volumes are, how many, their shape, and the intensity range of those read."""
        return {
            "folder": str(self.folder),
            "volumes": len(self),
            "shape": list(self.shape),
            "intensities_read": [self.lowest, self.highest],
        }


def _find_volumes(folder: Path, flag: str) -> list[Path]:
    if not folder.is_dir():
        raise BundleError(f"--{flag}: there is no folder {folder}")
    paths = _listed(folder) or _searched(folder)
    if not paths:
        raise BundleError(f"--{flag}: the folder {folder} holds no .nii or .nii.gz file and no {TABLE} that lists any")
    return paths


def _listed(folder: Path) -> list[Path]:
    if not (folder / TABLE).is_file():
        return []
    paths = [folder / row["path"] for row in read_table(folder / TABLE) if "path" in row]
    for number, path in enumerate(paths, start=1):
        if not path.is_file():
            raise BundleError(f"row {number} of {folder / TABLE} names a volume that is not there: {path}")
    return paths


def _searched(folder: Path) -> list[Path]:
    found = (path for pattern in ("*.nii", "*.nii.gz") for path in folder.rglob(pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _common_shape(paths: Sequence[Path]) -> tuple[int, ...]:
    shapes = [_shape(path) for path in paths]
    for path, shape in zip(paths, shapes):
        if shape != shapes[0]:
            raise BundleError(f"the volume {path} has shape {shape}, but {paths[0]} has {shapes[0]}: use one grid")
    return shapes[0] if shapes else ()


def _shape(path: Path) -> tuple[int, ...]:
    try:
        image: Any = nib.load(path)
    except UNREADABLE as error:
        raise BundleError(f"cannot read the volume {path}: it is damaged, cut short or no image ({error})") from error
    if len(image.shape) != 3:
        raise BundleError(f"the volume {path} has shape {image.shape}, not 3D")
    return image.shape
