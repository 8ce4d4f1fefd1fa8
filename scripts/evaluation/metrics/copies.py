# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The training volume that a volume is most alike, among those nearest to it in feature space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from scripts.compute.counting import counted
from scripts.compute.kept import Values, complete, identity
from scripts.core.errors import BundleError
from scripts.evaluation.metrics.alignment import WINDOW, Aligned, Alignment, Motion, moved
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.pictures import strip

BLOCK = 1024


class Likest(NamedTuple):
    """The training volume that a volume is most alike.

    Attributes:
        position: of the training volume in its folder.
        aligned: how alike it is, and how it was moved.
    """

    position: int
    aligned: Aligned


def nearest(features: np.ndarray, training: np.ndarray, most: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The nearest training volumes of each volume in Euclidean distance, the nearest first, block by block.

    Args:
        features: (N, d).
        training: (M, d).
        most: how many; all M if these are fewer.

    Returns:
        (N, min(most, M)) positions in `training`, and the distances.
    """
    blocks = [cdist(features[i : i + BLOCK], training) for i in range(0, len(features), BLOCK)]
    orders = [block.argsort(axis=1, kind="stable")[:, :most] for block in blocks]
    distances = [np.take_along_axis(block, order, axis=1) for block, order in zip(blocks, orders)]
    return np.concatenate(orders), np.concatenate(distances)


class CopySearch:
    """Aligns volumes with the training volumes nearest to them in feature space, and keeps how alike they are.

    Args:
        alignment: how two volumes are compared.
        values: where the similarities are kept.
        training: the volumes that the model was trained on.
        candidates: how many each volume has.
    """

    def __init__(self, alignment: Alignment, values: Values, training: VolumeFolder, candidates: int) -> None:
        self.alignment, self.values, self.training = alignment, values, training
        self.candidates = candidates
        self.identity = identity("aligned_ssim", alignment, **alignment.facts())

    def check(self, folder: VolumeFolder) -> None:
        """Raise a `BundleError` unless the volumes of a folder can be laid on the training volumes."""
        self.training.check_same_grid(folder)
        if min(folder.shape) < WINDOW:
            raise BundleError(
                f"--{folder.flag}: volumes of {folder.shape} are smaller than the window of SSIM, {WINDOW}"
            )

    def update(
        self,
        folder: VolumeFolder,
        chosen: Sequence[int],
        features: np.ndarray,
        training: np.ndarray,
        alone: bool = False,
    ) -> None:
        """Compare what was not compared before, as one of several processes if there are any.

        Args:
            folder: the volumes.
            chosen: positions of those that count.
            features, training: features of these, (N, d), and of the training volumes, (M, d).
            alone: see `scripts.compute.kept.complete`.
        """
        found, _ = nearest(features, training, self.candidates)
        pairs = [(i, j) for i, row in zip(chosen, found.tolist()) for j in row]

        def is_known(pair: tuple[int, int]) -> bool:
            return self._known(folder, *pair) is not None

        label = f"alignments of {folder.flag}"
        complete(label, pairs, is_known, partial(self._compare, folder), self.values, alone)

    def likest(
        self, folder: VolumeFolder, chosen: Sequence[int], features: np.ndarray, training: np.ndarray
    ) -> list[Likest]:
        """For each chosen volume the candidate with the highest similarity; arguments as for `update`."""
        self.update(folder, chosen, features, training, alone=True)
        found, _ = nearest(features, training, self.candidates)
        return [self._best(folder, i, row) for i, row in zip(chosen, found.tolist())]

    def _best(self, folder: VolumeFolder, index: int, positions: Sequence[int]) -> Likest:
        compared = [(j, self._known(folder, index, j)) for j in positions]
        return max((Likest(j, a) for j, a in compared if a is not None), key=_similarity)

    def _known(self, folder: VolumeFolder, index: int, position: int) -> Aligned | None:
        kept = self.values.get(self.identity, folder.hashes[index], self.training.hashes[position])
        if kept is None:
            return None
        ssim, *motion, mirrored = kept
        (a, b, c), (x, y, z) = motion[:3], motion[3:]
        return Aligned(ssim, Motion((a, b, c), (x, y, z), bool(mirrored)))

    def _compare(self, folder: VolumeFolder, missing: Sequence[tuple[int, int]]) -> None:
        for i, j in counted(missing, f"aligning {folder.flag}", unit="pair"):
            volumes = self.alignment.reduced(folder, i), self.alignment.reduced(self.training, j)
            found = self.alignment.compare(*volumes, self.alignment.sides(folder))
            files = folder.hashes[i], self.training.hashes[j]
            rotation, shift, mirrored = found.motion
            self.values.add(self.identity, files, (found.ssim, *rotation, *shift, mirrored))

    def facts(self) -> dict[str, Any]:
        """How volumes are compared, for the report."""
        return {**self.alignment.facts(), "candidates": self.candidates}

    def planes(self, folder: VolumeFolder, index: int, likest: Likest) -> tuple[np.ndarray, np.ndarray]:
        """The middle planes of a volume and of the training volume that was laid on it."""
        training = self.alignment.reduced(self.training, likest.position)
        laid, _ = moved(training, likest.aligned.motion, self.alignment.sides(self.training))
        return strip(self.alignment.reduced(folder, index)), strip(laid)


def _similarity(found: Likest) -> float:
    return found.aligned.ssim
