# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of volumes that are compared with each other."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.compute.kept import Values
from scripts.compute.ownership import LABEL_MAP, only_results
from scripts.core.errors import BundleError
from scripts.core.files import check_content, file_hash, looks_there
from scripts.core.inputs import Input
from scripts.core.options import yes_or_no
from scripts.core.tables import read_table
from scripts.volumes.grid import Grid
from scripts.volumes.labels import stem
from scripts.volumes.placing import Place, place_of, read_at, world_grid
from scripts.volumes.reading import OTHERS, has_suffix

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
TOLERANCE = 1e-3
RANGE = "range"


class VolumeFolder(Input):
    """The volumes of a folder, all in one place; each is read when it is asked for and not kept.

    They are those that a prepared dataset's `participants.tsv` lists in its column `path`, else every NIfTI and MGH
    file in the folder and below it, in the order of their names. Their axes are turned, by permutations and flips, to
    run as those of the bundle's grid: to the left, the front and up.

    Args:
        path: the folder; None if none was given.
        flag: the command-line flag that gives it, for messages.
        values: where the intensity ranges of volumes that were read are kept; None to keep none.
        grid: where volumes are to be brought by resampling.
        resample: whether they are; otherwise each must lie where the first does.
        one_place: whether that is asked for. Without it, shape and spacing are enough.

    Attributes:
        shape: voxels along x, y, z of every volume; empty if no folder was given.
        spacing: sides of a voxel in mm; empty if no folder was given.
        warnings: what was warned of when the folder was looked at.

    Raises:
        BundleError: if the folder is missing or has no volumes, or if a volume is missing, unreadable, not
            3D or elsewhere than the first. Only headers are looked at here.
    """

    def __init__(
        self,
        path: Any,
        flag: str,
        values: Values | None = None,
        grid: Grid | None = None,
        resample: Any = False,
        one_place: Any = True,
    ) -> None:
        self.flag = flag
        self.values = values
        self.one_place = yes_or_no(one_place, "one_place")
        if path is not None and not str(path).strip():
            raise BundleError(f"--{flag} is empty: give a folder, or leave it out")
        self.folder = None if path is None else Path(str(path))
        self.warnings: list[str] = []
        self.paths = [] if self.folder is None else find_volumes(self.folder, flag, self._warn)
        self.target = grid if grid is not None and yes_or_no(resample, "resample_volumes") else None
        self._places = {path: place_of(path) for path in self.paths}
        self._check_places()
        self._ranges: dict[int, tuple[float, float]] = {}
        self._hashes: list[str] = []
        self._warned: set[str] = set()

    @property
    def requested(self) -> bool:
        """Whether a folder was given."""
        return self.folder is not None

    @property
    def _first(self) -> Place | None:
        """Where all volumes lie once they are read."""
        if self.target is not None and self.paths:
            return Place(self.target.shape, self.target.affine)
        return self._places[self.paths[0]] if self.paths else None

    @property
    def shape(self) -> tuple[int, ...]:
        """See the class."""
        return self._first.shape if self._first else ()

    @property
    def spacing(self) -> tuple[float, ...]:
        """See the class."""
        return self._first.spacing if self._first else ()

    def grid_of(self, index: int) -> Grid:
        """The grid on which volume number `index` lies once it is read.

        Raises:
            BundleError: if its axes are not those of the world.
        """
        return self.target or world_grid(self._places[self.paths[index]], self.paths[index])

    def _check_places(self) -> None:
        for path in self.paths if self.target is None else []:
            _check_place(path, self._places[path], self.paths[0], self._places[self.paths[0]], self.one_place)
        moved = [path for path in self.paths if self._moves(path)]
        if moved and self.target is not None:
            logger.info(
                f"--{self.flag}: {len(moved)} of {len(self)} volumes are brought onto the grid as they are read"
            )
        elif moved:
            self._warn(
                f"{len(moved)} of {len(self)} volumes of --{self.flag} have axes in another order or direction "
                f"than the bundle's grid, {moved[0]} the first: they are turned as they are read"
            )

    def _moves(self, path: Path) -> bool:
        """Whether a volume is changed as it is read."""
        place = self._places[path]
        return place.turned or (self.target is not None and not place.lies_on(self.target))

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            logger.warning(text)

    def part(self, paths: Sequence[Path]) -> VolumeFolder:
        """The same folder with some of its volumes alone."""
        some = copy.copy(self)
        some.paths, some._ranges, some._hashes = list(paths), {}, []
        return some

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of each volume: of its file, and where it is changed as it is read, of how."""
        if not self._hashes:
            self._hashes = [self._hash(path) for path in self.paths]
        return self._hashes

    def _hash(self, path: Path) -> str:
        digest = file_hash(path)
        if not self._moves(path):
            return digest
        onto = None if self.target is None else (self.target.shape, self.target.affine.tolist())
        return hashlib.sha256(f"{digest} turned {onto}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Volume number `index` as float32 of shape (1, 1, X, Y, Z), intensities as they are on disk.

        Raises:
            BundleError: if it is cut short, damaged, or holds NaN in the head.
        """
        volume = torch.from_numpy(read_at(self.paths[index], self.target))
        self._note_range(index, float(volume.min()), float(volume.max()))
        if self.values is not None and self.values.get(RANGE, self.hashes[index]) is None:
            self.values.add(RANGE, [self.hashes[index]], self._ranges[index])
        return volume[None, None]

    def _note_range(self, index: int, low: float, high: float) -> None:
        self._ranges[index] = low, high
        if _outside(low, high):
            self._warn_once(
                "outside",
                f"{self.paths[index]} ranges from {low:g} to {high:g}: the measures are meant for intensities of 0 to "
                "1, and take these as they are",
            )
        if low == high:
            self._warn_once(
                "constant",
                f"{self.paths[index]} is {low:g} everywhere, so it shows no head: similarities to it say nothing "
                "(4-G-R-SSIM is 1 with any volume); remove such volumes, or find out why they are empty",
            )

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned = {*self._warned, kind}
            logger.warning(text)

    def _recall_ranges(self) -> None:
        if self.values is not None:
            for index, digest in enumerate(self.hashes):
                kept = self.values.get(RANGE, digest)
                if index not in self._ranges and kept is not None:
                    self._note_range(index, *kept)

    def check_same_grid(self, other: VolumeFolder) -> None:
        """Raise a `BundleError` unless another folder's volumes lie where these do."""
        if self._first and other._first:
            _check_place(other.paths[0], other._first, self.paths[0], self._first, self.one_place)

    def name(self, index: int) -> str:
        """The path of volume number `index` within the folder."""
        return os.path.relpath(self.paths[index], self.folder)

    def summary(self) -> dict[str, Any]:
        """Where the volumes are, how many, their shape, and the intensity range of those read, now or earlier."""
        self._recall_ranges()
        lows, highs = zip(*self._ranges.values()) if self._ranges else ((), ())
        return {
            "folder": str(self.folder),
            "volumes": len(self),
            "shape": list(self.shape),
            "intensities_read": [min(lows), max(highs)] if lows else None,
            "volumes_outside_0_to_1": sum(_outside(low, high) for low, high in self._ranges.values()),
            "constant_volumes": sum(low == high for low, high in self._ranges.values()),
            "turned_or_resampled_volumes": sum(map(self._moves, self.paths)),
        }


def find_volumes(folder: Path, flag: str, warn: Callable[[str], None] = logger.warning) -> list[Path]:
    """The volumes of a folder, as `VolumeFolder` takes them.

    Args:
        folder: where.
        flag: the command-line flag that gives it, for messages.
        warn: is told of volumes that the table does not name.

    Raises:
        BundleError: if the folder is missing or has none, or one that its table lists is missing.
    """
    if not folder.is_dir():
        raise BundleError(f"--{flag}: there is no folder {folder}")
    searched = _searched(folder)
    found = only_results(folder, searched)
    rows = read_table(folder / TABLE) if looks_there(folder / TABLE) else []
    listed = _listed(folder, rows)
    if not (listed or found):
        raise BundleError(
            f"--{flag}: the folder {folder} holds no NIfTI or MGH file (.nii, .nii.gz, .mgh, .mgz) and no {TABLE} that "
            f"lists any{_others(folder)}"
        )
    if listed:
        named = {folder / cell for row in rows for cell in row.values()}  # label maps have a column of their own
        others = [path for path in found if path not in named]
        if others:
            count, first = len(others), others[0].name
            warn(f"{folder / TABLE} has no row for {count} of the volumes in {folder}, {first} the first: left out")
    elif left := _left_out(searched, found):
        warn(f"{len(left)} volumes below {folder} are other commands' or no samples, {left[0]} the first: left out")
    if not listed and (said := _others(folder)):
        warn(f"the folder {folder}{said}")
    return listed or found


def _left_out(searched: Sequence[Path], found: Sequence[Path]) -> list[Path]:
    """Volumes that are not taken, but for the label maps of those that are."""
    taken = set(found)
    maps = {path.with_name(f"{stem(path).removesuffix('_T1w')}{LABEL_MAP}") for path in found}
    return [path for path in searched if path not in taken | maps]


def _others(folder: Path) -> str:
    """What to say of files that look like volumes and are not taken; empty if there are none."""
    others = sorted(path for path in _visible(folder) if has_suffix(path, OTHERS))
    if not others:
        return ""
    return (
        f" has {len(others)} files of other formats, {others[0].name} the first, which are left out: convert to NIfTI"
    )


def _listed(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    paths = [folder / row["path"] for row in rows if "path" in row]
    for number, path in enumerate(paths, start=1):
        if not looks_there(path):
            raise BundleError(f"row {number} of {folder / TABLE} names a volume that is not there: {path}")
        check_content(path)
    twice = next((path for path, rows in Counter(paths).items() if rows > 1), None)
    if twice is not None:
        raise BundleError(f"{folder / TABLE} names the volume {twice} in two rows")
    return paths


def _searched(folder: Path) -> list[Path]:
    """Files by the names of volumes, links without content among them, which are refused when they are read."""
    return sorted(path for path in _visible(folder) if has_suffix(path) and not path.is_dir())


def _visible(folder: Path) -> Iterator[Path]:
    """All below a folder but what, or whose folder, has a name that begins with a dot."""
    inside = (path for path in folder.rglob("*") if "." in path.name)
    return (path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _outside(low: float, high: float) -> bool:
    return low < -TOLERANCE or high > 1 + TOLERANCE


def _check_place(path: Path, place: Place, first_path: Path, first: Place, one_place: bool) -> None:
    ways = "use one grid, or give --resample_volumes 1 in the evaluation"
    if place.shape != first.shape:
        raise BundleError(f"the volume {path} has shape {place.shape}, but {first_path} has {first.shape}: {ways}")
    if not np.allclose(place.spacing, first.spacing, rtol=TOLERANCE):
        found, wanted = (" x ".join(f"{side:g}" for side in spacing) for spacing in (place.spacing, first.spacing))
        raise BundleError(f"the volume {path} has voxels of {found} mm, but {first_path} of {wanted} mm: {ways}")
    if one_place and not place.meets(first):
        raise BundleError(
            f"the volume {path} lies elsewhere than {first_path}: it has {place.in_words()}, that has "
            f"{first.in_words()}: {ways}"
        )
