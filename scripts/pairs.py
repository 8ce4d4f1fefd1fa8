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
"""Similarity of random pairs of volumes: how diverse a set is, or how alike two sets are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scripts.bootstrap import summarise
from scripts.errors import BundleError
from scripts.measures import Metric, Result, missing_flags, settings
from scripts.options import whole_number
from scripts.volume_folders import VolumeFolder


class PairSimilarity:
    """Metrics of random pairs within one folder, or of pairs with one volume from each of two folders.

    Diversity as Pinaya et al. 2022 measure it: the mean over 1000 pairs within the synthetic volumes is to
    equal the one within the real volumes. Only the two volumes of a pair are in memory.

    Args:
        folders: one, or two of one shape.
        metrics: name -> function from the volumes' shape to a metric of two (1, 1, X, Y, Z) tensors.
        num_pairs: how many pairs, or all that there are if these are fewer.
        seed: of the choice of pairs and of the bootstrap.
        device: where to compute.
        target: name of the measure whose means these should equal; None if there is none.

    Raises:
        BundleError: if there is no pair, the folders differ in shape, or a metric refuses that shape.
    """

    def __init__(
        self,
        folders: Sequence[VolumeFolder],
        metrics: Mapping[str, Callable[[Sequence[int]], Metric]],
        num_pairs: Any = 1000,
        seed: Any = 0,
        device: torch.device | str = "cpu",
        target: str | None = None,
    ) -> None:
        self.inputs = self.folders = list(folders)
        self.target = target
        self.num_pairs = whole_number(num_pairs, "num_pairs", least=1)
        self.seed = whole_number(seed, "seed")
        self.device = torch.device(device)
        if not missing_flags(self):
            self._check_folders()
            self.metrics = {name: build(self.folders[0].shape) for name, build in metrics.items()}

    def _check_folders(self) -> None:
        first, last = self.folders[0], self.folders[-1]
        if first is last and len(first) < 2:
            raise BundleError(f"--{first.flag}: {first.folder} holds one volume; pairs need two or more")
        first.check_same_grid(last)

    @torch.no_grad()
    def compute(self) -> Result:
        """Measure every pair."""
        first, last = self.folders[0], self.folders[-1]
        pairs = random_pairs([len(folder) for folder in self.folders], self.num_pairs, self.seed)
        label = "pairs of " + " and ".join(folder.flag for folder in self.folders)
        values = [self._compare(first[a], last[b]) for a, b in tqdm(pairs.tolist(), label, unit="pair", disable=None)]
        members = pairs if first is last else pairs + [0, len(first)]
        return Result(
            {name: summarise(np.array([v[name] for v in values]), members, self.seed) for name in self.metrics},
            {"pairs": len(pairs), "seed": self.seed, "settings": settings(self.metrics), **self._sources()},
        )

    def _compare(self, first: torch.Tensor, last: torch.Tensor) -> dict[str, float]:
        first, last = first.to(self.device), last.to(self.device)
        return {name: float(metric(first, last)) for name, metric in self.metrics.items()}

    def _sources(self) -> dict[str, Any]:
        return {folder.flag: folder.summary() for folder in self.folders}


def random_pairs(sizes: Sequence[int], num_pairs: int, seed: int) -> np.ndarray:
    """Distinct random pairs of positions, in ascending order.

    Args:
        sizes: one size for unordered pairs of two different members of one set; two sizes for pairs with a
            member from each of two sets.
        num_pairs: how many, or all if there are fewer.
        seed: of the choice.

    Returns:
        (N, 2) integers.
    """
    total = sizes[0] * (sizes[0] - 1) // 2 if len(sizes) == 1 else sizes[0] * sizes[1]
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(total, size=min(num_pairs, total), replace=False))
    if len(sizes) == 2:
        return np.stack(np.divmod(chosen, sizes[1]), axis=1)
    starts = np.concatenate([[0], np.cumsum(np.arange(sizes[0] - 1, 0, -1))])
    first = np.searchsorted(starts, chosen, side="right") - 1
    return np.stack([first, chosen - starts[first] + first + 1], axis=1)
