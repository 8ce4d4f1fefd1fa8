# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading prepared scans for training, and which of them are held out."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.transforms import MapTransform
from torch import Tensor

from scripts.compute.processes import rank, world_size
from scripts.conditions.conditions import Conditions
from scripts.core.cells import present
from scripts.core.config import current_config
from scripts.core.errors import BundleError
from scripts.core.files import looks_there
from scripts.core.options import is_absent, probability
from scripts.core.tables import MISSING, read_table
from scripts.volumes.grid import Grid
from scripts.volumes.placing import check_place, read_on_grid

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
OF_WEIGHTS = (
    "a fine-tuning keeps the ranges of its weights, and learns these values beyond them; take the rows out, or train "
    "without --pretrained, with a wider range in `conditions`, where they matter"
)
LEAST, MOST = -0.5, 1.5  # of intensities that are meant to be 0 to 1
SPLITS = ("train", "validation", "test")
READERS = 16


def participants(folder: str, conditions: Conditions, missing: str = "error") -> list[dict[str, Any]]:
    """The rows of a prepared dataset.

    Args:
        folder: holds `participants.tsv`, whose column `path` is relative to the folder.
        conditions: which columns to read.
        missing: what to do where a condition is `n/a`; see `Conditions.from_row`.

    Returns:
        One dictionary a row: `image` is the file's path, `condition` a float32 tensor of shape
        (conditions,), `participant_id`, `path` and `split` (empty where the table has none) are the table's,
        and `row` is its whole row.

    Raises:
        BundleError: if the table or a file is not there, or a condition missing or malformed.
    """
    folder = str(folder)
    table = Path(folder) / TABLE
    if not looks_there(table):
        raise BundleError(f"there is no {table}: prepare a dataset first (configs/prepare.yaml), or give its folder")
    rows = read_table(table, required=("participant_id", "path"))
    path, count = Counter(row["path"] for row in rows).most_common(1)[0]
    if count > 1:
        raise BundleError(f"{table} has the path {path} in {count} rows: keep one of them")
    images = [_volume(table, row) for row in rows]
    return [{"image": i, **row} for i, row in zip(images, with_conditions(rows, conditions, missing, table))]


def _volume(table: Path, row: Mapping[str, str]) -> str:
    path = table.parent / row["path"]
    if not looks_there(path):
        where = f"participant {row['participant_id']} in {table}"
        raise BundleError(f"{where} has the path {row['path']}, but there is no such file")
    return str(path)


def with_conditions(
    rows: Sequence[dict[str, str]], conditions: Conditions, missing: str, table: Path
) -> list[dict[str, Any]]:
    """What `participants` returns of each row but the image.

    Raises:
        BundleError: if a condition is missing or malformed.
    """
    try:
        conditions.columns_in(rows[0], str(table))
    except BundleError as error:
        logger.warning(f"{error}: it is unknown for everybody")
    found = [_with_condition(row, conditions, missing, table) for row in rows]
    _warn_outside(found, conditions, table)
    return found


def _with_condition(row: dict[str, str], conditions: Conditions, missing: str, table: Path) -> dict[str, Any]:
    where = f"participant {row['participant_id']} in {table}"
    condition = conditions.from_row(row, where, missing, warn=False)
    named = {"participant_id": row["participant_id"], "path": row.get("path", ""), "split": _split(row)}
    return {"condition": condition, **named, "row": row}


def _split(row: Mapping[str, str]) -> str:
    return present(row, "split")


def _is_finetuning() -> bool:
    try:
        return not is_absent(current_config().get("pretrained"))
    except RuntimeError:  # called from Python
        return False


def _warn_outside(found: Sequence[Mapping[str, Any]], conditions: Conditions, table: Path) -> None:
    vectors = torch.stack([row["condition"] for row in found])
    advice = OF_WEIGHTS if _is_finetuning() else "to train on them, widen the range in `conditions`"
    for condition, outside in zip(conditions, ((vectors < 0.0) | (vectors > 1.0)).sum(dim=0).tolist(), strict=True):
        if outside:
            logger.warning(
                f"{outside} of {len(found)} rows of {table} lie outside the range of {condition.raw}, "
                f"{condition.in_words()}, which becomes 0 to 1: {advice}"
            )


def check_headers(rows: Sequence[Mapping[str, Any]], grid: Grid, resample: bool = False) -> None:
    """Look at the headers of all scans before a training starts, which otherwise might meet a bad one hours later.

    Each of several processes looks at its share.

    Args:
        rows: of `participants`.
        grid, resample: as `LoadVolumed` takes them.

    Raises:
        BundleError: for the first scan that is unreadable, or elsewhere than the grid and not to be resampled.
    """
    own = [row["image"] for row in rows[rank() :: world_size()]]
    with ThreadPoolExecutor(READERS) as readers:  # on a network's disks, reading a header is waiting
        list(readers.map(partial(check_place, grid=grid, resample=resample), own))


def split(
    rows: Sequence[dict[str, Any]], name: str, validation_fraction: Any = 0.05, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of one split. All scans of a subject, and all latents of a scan, are in the same one.

    Where the table says nothing, a subject's split follows from a hash of its `participant_id` alone (without
    a session, such as the `_ses-2` of `sub-01_ses-2`), so that more subjects do not move those that are there.
    The one exception: where the hashes would leave no one for the validation, the subject with the lowest is.

    Args:
        rows: of `participants` or `scripts.autoencoder.latents.latents`.
        name: `train`, `validation` or `test`.
        validation_fraction: share of the subjects, 0 to 1, where the table has no column `split`.
        seed: for other subjects in the validation.

    Raises:
        BundleError: if there are no rows, or none to train on; if the column holds another word, is not complete,
            or puts one subject in two splits; for another name, or a fraction out of range.
    """
    if name not in SPLITS:
        raise BundleError(f"a split is one of {', '.join(SPLITS)}, not '{name}'")
    fraction = probability(validation_fraction, "validation_fraction")
    if not rows:
        raise BundleError("the table has no rows: there is nothing to train on")
    of_subject = _stated_splits(rows) if any(row["split"] for row in rows) else _hashed_splits(rows, fraction, seed)
    if "train" not in of_subject.values():
        raise BundleError(
            f"none of the {len(of_subject)} subjects are in the split 'train': there is nothing to train on"
        )
    return [row for row in rows if of_subject[_subject(row)] == name]


def _subject(row: Mapping[str, Any]) -> str:
    return str(row["participant_id"]).split("_ses-")[0]


def _stated_splits(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    of_subject: dict[str, str] = {}
    for row in rows:
        subject, word = _subject(row), row["split"]
        if word not in SPLITS:
            raise BundleError(f"participant {subject} has the split '{word or MISSING}': use {', '.join(SPLITS)}")
        if of_subject.setdefault(subject, word) != word:
            raise BundleError(f"participant {subject} is in two splits, {of_subject[subject]} and {word}: keep one")
    return of_subject


def _hashed_splits(rows: Sequence[Mapping[str, Any]], fraction: float, seed: int) -> dict[str, str]:
    places = {subject: place(subject, seed) for subject in map(_subject, rows)}
    chosen = {subject for subject, place in places.items() if place < fraction}
    if not chosen and fraction > 0.0 and len(places) > 1:
        chosen = {min(places, key=lambda subject: places[subject])}
    return {subject: "validation" if subject in chosen else "train" for subject in places}


def place(subject: str, seed: int) -> float:
    """A number from 0 to 1 that follows from a hash of a subject's name, uniform over names."""
    digest = hashlib.sha256(f"{seed} {subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class LoadVolumed(MapTransform):
    """Dictionary transform from a path to a float32 tensor (1, X, Y, Z) on the grid.

    Args:
        keys: entries that hold paths.
        grid: where the voxels must lie; a permutation or flip of a volume's axes is undone.
        resample: whether to bring volumes from elsewhere onto it (trilinear), as the tiny overlay does; otherwise they
            are an error.

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
        volume = torch.from_numpy(read_on_grid(path, self.grid, self.resample))[None]
        low, high = volume.min().item(), volume.max().item()
        if low < LEAST or high > MOST:
            raise BundleError(
                f"the volume {path} has intensities from {low:.3g} to {high:.3g}, not 0 to 1: prepare it first "
                "(configs/prepare.yaml)"
            )
        return volume


class RandFillMissingd(MapTransform):
    """Dictionary transform that puts a uniform random value from 0 to 1 in place of each NaN."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its tensors filled; drawn with torch's random state."""
        filled = dict(data)
        for key in self.key_iterator(filled):
            filled[key] = torch.where(filled[key].isnan(), torch.rand_like(filled[key]), filled[key])
        return filled
