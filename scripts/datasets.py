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
"""Reading prepared scans and cached latents for training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from safetensors.torch import load_file
from torch import Tensor

from scripts.conditions import Conditions
from scripts.errors import BundleError
from scripts.grid import Grid
from scripts.tables import read_table
from scripts.volumes import read_volume

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"


def participants(folder: str, conditions: Conditions, missing: str = "error") -> list[dict[str, Any]]:
    """The rows of a prepared dataset or of a folder of cached latents.

    Args:
        folder: holds `participants.tsv`, whose column `path` is relative to the folder.
        conditions: which columns to read.
        missing: what to do where a condition is `n/a`; see `Conditions.from_row`.

    Returns:
        One dictionary a row: `image` is the file's path, `condition` a float32 tensor of shape
        (conditions,), `row` the table's row.

    Raises:
        BundleError: if the table or a file is not there, or a condition missing or malformed.
    """
    folder = str(folder)
    table = Path(folder) / TABLE
    if not table.is_file():
        raise BundleError(f"there is no {table}: prepare a dataset first (configs/prepare.yaml), or give its folder")
    rows = read_table(table, required=("participant_id", "path"))
    _check_rows(rows, conditions, table)
    found = [_participant(Path(folder), row, conditions, missing) for row in rows]
    _warn_outside(found, conditions, table)
    return found


def _check_rows(rows: Sequence[Mapping[str, str]], conditions: Conditions, table: Path) -> None:
    path, count = Counter(row["path"] for row in rows).most_common(1)[0]
    if count > 1:
        raise BundleError(f"{table} has the path {path} in {count} rows: keep one of them")
    try:
        conditions.columns_in(list(rows[0]), str(table))
    except BundleError as error:
        logger.warning(f"{error}: it is unknown for everybody")


def _warn_outside(found: Sequence[Mapping[str, Any]], conditions: Conditions, table: Path) -> None:
    vectors = torch.stack([row["condition"] for row in found])
    for condition, outside in zip(conditions, ((vectors < 0.0) | (vectors > 1.0)).sum(dim=0).tolist(), strict=True):
        if outside:
            logger.warning(
                f"{outside} of {len(found)} rows of {table} lie outside the range of {condition.raw}, "
                f"{condition.in_words()}, which becomes 0 to 1: to train on them, widen the range in `conditions`"
            )


def _participant(folder: Path, row: dict[str, str], conditions: Conditions, missing: str) -> dict[str, Any]:
    path = folder / row["path"]
    where = f"participant {row['participant_id']} in {folder / TABLE}"
    if not path.is_file():
        raise BundleError(f"{where} has the path {row['path']}, but there is no such file")
    return {"image": str(path), "condition": conditions.from_row(row, where, missing, warn=False), "row": row}


class LoadVolumed(MapTransform):
    """Dictionary transform from a path to a float32 tensor (1, X, Y, Z) on the grid.

    Args:
        keys: entries that hold paths.
        grid: where the voxels must lie.
        resample: whether to bring volumes of other grids onto it (trilinear), as the tiny overlay does;
            otherwise another shape is an error.

    Raises:
        BundleError: when called, if a file is unreadable, not finite, or not on the grid.
    """

    def __init__(self, keys: str | Sequence[str], grid: Grid, resample: bool = False) -> None:
        super().__init__(keys)
        self.grid = grid
        self.resample = resample

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with the volumes in place of their paths."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = self._load(loaded[key])
        return loaded

    def _load(self, path: str) -> Tensor:
        if not self.resample:
            return torch.from_numpy(read_volume(path, self.grid.shape))[None]
        volume = MetaTensor(torch.from_numpy(read_volume(path))[None], affine=nib.load(path).affine)  # type: ignore[attr-defined]
        if np.allclose(volume.affine, self.grid.affine) and tuple(volume.shape[1:]) == self.grid.shape:
            return volume.as_tensor()
        onto = SpatialResample(mode="bilinear", padding_mode="zeros")
        return onto(volume, dst_affine=self.grid.affine, spatial_size=self.grid.shape).as_tensor()


class SamplePosteriord(MapTransform):
    """Dictionary transform from the path of a cached posterior to a scaled sample of it.

    Draws mean + standard deviation * noise with torch's random state and multiplies by the scale, so that
    the diffusion model sees latents of unit variance, and different ones of one scan in every epoch.

    Args:
        keys: entries that hold paths of safetensors files with `mean` and `std`, each (C, x, y, z).
        scale: factor on the latents.
    """

    def __init__(self, keys: str | Sequence[str], scale: float) -> None:
        super().__init__(keys)
        self.scale = float(scale)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with latents (C, x, y, z), float32, in place of their paths."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            mean, std = read_posterior(loaded[key])
            loaded[key] = (mean + std * torch.randn_like(mean)) * self.scale
        return loaded


class RandFillMissingd(MapTransform):
    """Dictionary transform that puts a uniform random value from 0 to 1 in place of each NaN."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its tensors filled; drawn with torch's random state."""
        filled = dict(data)
        for key in self.key_iterator(filled):
            filled[key] = torch.where(filled[key].isnan(), torch.rand_like(filled[key]), filled[key])
        return filled


def read_posterior(path: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (C, x, y, z) float32, of a cached latent.

    Raises:
        BundleError: if the file is damaged or holds something else.
    """
    try:
        tensors = load_file(path)
        return tensors["mean"].float(), tensors["std"].float()
    except Exception as error:
        raise BundleError(f"{path} is no cached latent: run configs/encode_latents.yaml again") from error


def latent_scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """One over the standard deviation of the latents of all rows, pooled over voxels and channels.

    The variance of a sample of the posteriors: E[mean^2 + std^2] - E[mean]^2, in float64.

    Raises:
        BundleError: if it is not finite or zero.
    """
    sums = np.zeros(3)
    for row in rows:
        mean, std = (t.double() for t in read_posterior(row["image"]))
        sums += [mean.numel(), mean.sum().item(), (mean**2 + std**2).sum().item()]
    variance = sums[2] / sums[0] - (sums[1] / sums[0]) ** 2
    if not np.isfinite(variance) or variance <= 0.0:
        raise BundleError(f"the cached latents have variance {variance}: the autoencoder is not usable")
    return float(variance**-0.5)
