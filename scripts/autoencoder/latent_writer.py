# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Writing the arrays of a folder of latents, by one process or several, so that any of them may be killed.

A row counts as encoded when its entry in `encoded.npy` holds two hashes: of the recipe (all that decides how the
latent looks, and whose it is) and of the volume. The order of writing makes that safe: the entry is cleared, the
posterior written and flushed to disk, then the entry is filled. Arrays that do not fit any more, for there are
other scans or another recipe, are replaced by new ones, into which the rows that are still wanted are copied.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from scripts.autoencoder.latents import CHECKSUMS, ENCODED, POSTERIORS, checksum, in_making, is_whole, mapped
from scripts.compute.processes import Waiting
from scripts.core.errors import BundleError
from scripts.core.files import replacing

HASH_BYTES = 32
RECIPE, VOLUME = 0, 1


class LatentWriter:
    """The arrays of a folder of latents, open for writing.

    Args:
        folder: where they are, or are made.
        recipes: (rows, 32) uint8, the hash of how each row is to be made.
        latent_shape: (C, x, y, z).
        dtype: of the posteriors, such as float16.
        prepares: whether this process makes or replaces the arrays; another one waits until that is done.
        patience: seconds to wait.

    Raises:
        BundleError: if the arrays cannot be written, or the wait was in vain.
    """

    def __init__(
        self,
        folder: Path,
        recipes: np.ndarray,
        latent_shape: Sequence[int],
        dtype: str,
        prepares: bool = True,
        patience: float = math.inf,
    ) -> None:
        self.folder, self.recipes = folder, recipes
        self.shape, self.dtype = (len(recipes), 2, *latent_shape), np.dtype(dtype)
        with writing(folder):
            self._prepare() if prepares else self._wait(patience)
            self._posteriors, self._encoded = ArrayFile(folder / POSTERIORS), ArrayFile(folder / ENCODED)
            self._checksums = ArrayFile(folder / CHECKSUMS)

    def encoded(self) -> np.ndarray:
        """(rows, 2, 32) uint8: the hashes of recipe and volume of each row, zeros where it is not encoded."""
        return np.array(mapped(self.folder / ENCODED))

    def clear_damaged(self, rows: Iterable[int]) -> list[int]:
        """Have those of some rows encoded again that are not what was written; which these are."""
        posteriors, checksums = self._posteriors.rows, self._checksums.rows
        marked = np.asarray(self.encoded()[:, RECIPE].any(axis=1))
        damaged = [r for r in rows if marked[r] and not is_whole(np.array(posteriors[r]), int(checksums[r]))]
        with writing(self.folder):
            for row in damaged:
                self._encoded.write(row, np.zeros((2, HASH_BYTES), np.uint8))
        return damaged

    def is_complete(self) -> bool:
        """Whether all rows are encoded, by whichever process."""
        return np.array_equal(self.encoded()[:, RECIPE], self.recipes)

    def write(self, row: int, posterior: np.ndarray, volume_sha256: bytes) -> None:
        """Put a posterior, (2, C, x, y, z), in its row.

        Raises:
            BundleError: if it cannot be written, for want of room for instance.
        """
        with writing(self.folder):
            if self._encoded.rows[row].any():
                self._encoded.write(row, np.zeros((2, HASH_BYTES), np.uint8))
            stored = posterior.astype(self.dtype)
            self._posteriors.write(row, stored)
            self._checksums.write(row, np.array(checksum(stored), np.uint64), flush=False)
            self._encoded.write(row, np.stack([self.recipes[row], np.frombuffer(volume_sha256, np.uint8)]), flush=False)

    def _wait(self, patience: float) -> None:
        lost = f"the process of rank 0 has not prepared {self.folder}: start all ranks with the same flags"
        waiting = Waiting(f"rank 0, which prepares {self.folder},", patience, lost)
        while not self._is_prepared():
            waiting.pause()

    def _is_prepared(self) -> bool:
        posteriors, encoded = self._existing()
        if posteriors is None or encoded is None or in_making(self.folder / ENCODED).exists():
            return False
        if posteriors.shape != self.shape or posteriors.dtype != self.dtype or len(encoded) != len(self.recipes):
            return False
        checksums = _try_map(self.folder / CHECKSUMS)
        if checksums is None or checksums.shape != (len(encoded),):
            return False
        made = encoded[:, RECIPE]
        return bool(((made == self.recipes) | ~made.any(axis=1, keepdims=True)).all())

    def _existing(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return _try_map(self.folder / POSTERIORS), _try_map(self.folder / ENCODED)

    def _prepare(self) -> None:
        self._put_in_place()
        self._add_checksums()
        if self._is_prepared():
            return
        kept = self._kept()
        if not kept:
            for name in (ENCODED, CHECKSUMS, POSTERIORS):
                (self.folder / name).unlink(missing_ok=True)
        self._check_room()
        self._make(kept)
        self._put_in_place()

    def _add_checksums(self) -> None:
        """Those of a folder that version 2.0.0 wrote, of its rows as they are."""
        posteriors, encoded = self._existing()
        if (
            posteriors is None
            or encoded is None
            or (self.folder / CHECKSUMS).exists()
            or len(posteriors) != len(encoded)
        ):
            return
        marked = np.asarray(encoded[:, RECIPE].any(axis=1))
        rows = (np.array(row) for row in posteriors)
        sums = [checksum(row) if mark and is_whole(row, 0) else 0 for row, mark in zip(rows, marked)]
        with replacing(self.folder / CHECKSUMS) as temporary, open(temporary, "wb") as file:
            np.save(file, np.array(sums, np.uint64))

    def _kept(self) -> dict[int, int]:
        """Row of the new array -> row of the old one that holds what belongs there."""
        posteriors, encoded = self._existing()
        if posteriors is None or encoded is None or posteriors.shape[1:] != self.shape[1:]:
            return {}
        rows = {made.tobytes(): row for row, made in enumerate(encoded[:, RECIPE]) if made.any()}
        wanted = {new: rows.get(recipe.tobytes()) for new, recipe in enumerate(self.recipes)}
        return {new: old for new, old in wanted.items() if old is not None and old < len(posteriors)}

    def _check_room(self) -> None:
        needed = int(np.prod(self.shape)) * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise BundleError(
                f"{self.folder / POSTERIORS} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left: "
                "give --latents_dir another disk"
            )

    def _make(self, kept: dict[int, int]) -> None:
        posteriors, encoded = self._existing()
        path = in_making(self.folder / POSTERIORS)
        np.lib.format.open_memmap(path, mode="w+", dtype=self.dtype, shape=self.shape)
        copy, marks = ArrayFile(path), np.zeros((len(self.recipes), 2, HASH_BYTES), np.uint8)
        sums, known = np.zeros(len(self.recipes), np.uint64), _try_map(self.folder / CHECKSUMS)
        for new, old in kept.items():
            row = np.array(posteriors[old])  # type: ignore[index]
            stated = int(known[old]) if known is not None and old < len(known) else 0
            if is_whole(row, stated):
                copy.write(new, row, flush=False)
                marks[new], sums[new] = encoded[old], checksum(row)  # type: ignore[index]
        copy.flush()
        for name, array in ((CHECKSUMS, sums), (ENCODED, marks)):
            with replacing(in_making(self.folder / name)) as temporary, open(temporary, "wb") as file:
                np.save(file, array)

    def _put_in_place(self) -> None:
        """Replace both arrays by those made for it. A finished new `encoded.npy` says that both are ready."""
        if in_making(self.folder / ENCODED).exists():
            for name in (POSTERIORS, CHECKSUMS, ENCODED):
                with suppress(FileNotFoundError):
                    os.replace(in_making(self.folder / name), self.folder / name)
        in_making(self.folder / POSTERIORS).unlink(missing_ok=True)


class ArrayFile:
    """A `.npy` file whose rows are written with plain file access: in a memory map, a full disk kills the process.

    Attributes:
        rows: the array as it now is, memory-mapped for reading.
    """

    def __init__(self, path: Path) -> None:
        self.rows = np.lib.format.open_memmap(path, mode="r")
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def write(self, number: int, row: np.ndarray, flush: bool = True) -> None:
        """Put a row in its place, and have it on the disk before this returns if `flush`."""
        if row.shape != self.rows.shape[1:] or row.dtype != self.rows.dtype:
            raise ValueError(f"a row is {self.rows.shape[1:]} {self.rows.dtype}, not {row.shape} {row.dtype}")
        self._file.seek(self.rows.offset + number * row.nbytes)
        left = memoryview(row.tobytes())
        while left:
            left = left[self._file.write(left) :]
        if flush:
            self.flush()

    def flush(self) -> None:
        """Have all that was written on the disk."""
        os.fsync(self._file.fileno())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the operating system says against writing into one line.

    Raises:
        BundleError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot write the latents in {folder}: {error.strerror or error}. What was encoded is kept: "
            "put that right, and run the same command again"
        ) from error


def _try_map(path: Path) -> np.ndarray | None:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return None
