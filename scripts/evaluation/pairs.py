# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Similarity of random pairs of volumes: how diverse a set is, or how alike two sets are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from scripts.compute.counting import counted
from scripts.compute.kept import Values, complete, identity
from scripts.core.bootstrap import summarise
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Metric, Result, Row, check_entries, settings
from scripts.evaluation.metrics.features import FeatureSet

SAYS_OF_TWO_SETS = (
    "How alike a sample and a real volume are, over random pairs. Samples that could be real are as alike to real "
    "volumes as these are to each other; it says nothing of how diverse they are."
)


class PairSimilarity(Measure):
    """Metrics of random pairs within one set of volumes, or of pairs with one volume from each of two sets.

    Diversity as Pinaya et al. 2022 measure it: the mean over 1000 pairs within the synthetic volumes is to
    equal the one within the real volumes. Only the two volumes of a pair are in memory. What was measured is
    kept: an interrupted run goes on where it stopped, and under torchrun each process measures its share.

    Args:
        metrics: name -> function from the volumes' shape to a metric of two (1, 1, X, Y, Z) tensors.
        values: where what was measured is kept.
        synthetic, real: one set, or two of one shape.
        num_pairs: how many pairs, or all that there are if these are fewer.
        seed: of the choice of pairs and of the bootstrap.
        device: where to compute.
        target: name of the measure whose means these should equal; None if there is none.

    Raises:
        BundleError: if there is no pair, the sets differ in shape, or a metric refuses that shape; where pairs are
            measured, if one has a value that is not finite.
    """

    says = (
        "How alike random pairs of volumes are, which says how diverse a set is. The target is the value within the "
        "real volumes: above it, samples are too much alike; below it, they differ too much or hold noise."
    )
    pitfall = (
        "The level depends on preparation (noise in the background, smoothing, registration, resolution): only sets "
        "that were prepared alike compare. A set that is as diverse as the real one can still look like no brain."
    )

    def __init__(
        self,
        metrics: Mapping[str, Callable[[Sequence[int]], Metric]],
        values: Values,
        synthetic: FeatureSet | None = None,
        real: FeatureSet | None = None,
        num_pairs: Any = 1000,
        seed: Any = 0,
        device: torch.device | str = "cpu",
        target: str | None = None,
    ) -> None:
        self.inputs = self.folders = [features.folder for features in (synthetic, real) if features is not None]
        if len(self.folders) == 2:
            self.says = SAYS_OF_TWO_SETS
        self.values = values
        self.target = target
        self.num_pairs = whole_number(num_pairs, "num_pairs", least=1)
        self.seed = whole_number(seed, "seed")
        self.device = torch.device(device)
        self._described: dict[tuple[int, int], Described] = {}
        check_entries("pair_metrics", metrics)
        if not self.missing_flags():
            self._check_folders()
            self.metrics = {name: build(self.folders[0].shape) for name, build in metrics.items()}
            self._identities = {n: identity(n, m, **settings({n: m})[n]) for n, m in self.metrics.items()}

    def _check_folders(self) -> None:
        first, last = self.folders[0], self.folders[-1]
        if first is last and len(first) < 2:
            raise BundleError(f"--{first.flag}: {first.folder} holds one volume; pairs need two or more")
        first.check_same_grid(last)

    def update(self) -> None:
        """Measure the pairs that were not measured before, as one of several processes if there are any."""
        self._complete()

    def compute(self) -> Result:
        """The means over all pairs."""
        self._complete(alone=True)
        first, last = self.folders[0], self.folders[-1]
        pairs = self._pairs()
        found = [self._known(*pair) for pair in pairs.tolist()]
        members = pairs if first is last else pairs + [0, len(first)]
        means = {name: summarise(np.array([one[name] for one in found]), members, self.seed) for name in self.metrics}
        return Result(
            [Row(name, mean, headline=first is last) for name, mean in means.items()],
            {"pairs": len(pairs), "seed": self.seed, "settings": settings(self.metrics), **self._sources()},
            [{"first": first.name(a), "second": last.name(b), **one} for (a, b), one in zip(pairs.tolist(), found)],
        )

    def _pairs(self) -> np.ndarray:
        return random_pairs([len(folder) for folder in self.folders], self.num_pairs, self.seed)

    def _complete(self, alone: bool = False) -> None:
        label = "pairs of " + " and ".join(folder.flag for folder in self.folders)

        def measure(missing: list[list[int]]) -> None:
            self._described = {}
            for a, b in counted(missing, label, unit="pair"):
                self._compare(a, b)
            self._described = {}

        complete(label, self._pairs().tolist(), self._is_known, measure, self.values, alone)

    def _is_known(self, pair: Sequence[int]) -> bool:
        return self._known(*pair).keys() >= self.metrics.keys()

    def _known(self, a: int, b: int) -> dict[str, float]:
        files = self.folders[0].hashes[a], self.folders[-1].hashes[b]
        found = {name: self.values.get(what, *files) for name, what in self._identities.items()}
        return {name: numbers[0] for name, numbers in found.items() if numbers is not None}

    @torch.no_grad()
    def _compare(self, a: int, b: int) -> None:
        first, last = self.folders[0], self.folders[-1]
        wanted = (0, a), (len(self.folders) - 1, b)
        self._described = {one: self._described.get(one) or self._read(one) for one in wanted}
        one, other = (self._described[which] for which in wanted)
        known = self._known(a, b)
        for name in [name for name in self.metrics if name not in known]:
            value = one.compare(other, name, self.metrics[name])
            if not math.isfinite(value):
                raise BundleError(
                    f"{name} of {first.paths[a]} and {last.paths[b]} is {value:g}: their intensities are too large for "
                    "it; give volumes of 0 to 1"
                )
            self.values.add(self._identities[name], [first.hashes[a], last.hashes[b]], [value])

    def _read(self, which: tuple[int, int]) -> Described:
        return Described(self.folders[which[0]][which[1]].to(self.device))

    def _sources(self) -> dict[str, Any]:
        return {folder.flag: folder.summary() for folder in self.folders}


class Described:
    """A volume, and what metrics say of it alone, which is computed when it is first needed.

    A metric that has `describe(volume)` and `compare(one description, another)` computes what depends on one volume
    once and not once a pair; any other is called with both volumes.
    """

    def __init__(self, volume: torch.Tensor) -> None:
        self.volume = volume
        self._found: dict[str, Any] = {}

    def by(self, name: str, metric: Any) -> Any:
        """What `metric`, known as `name`, says of this volume."""
        if name not in self._found:
            self._found[name] = metric.describe(self.volume)
        return self._found[name]

    def compare(self, other: Described, name: str, metric: Any) -> float:
        """The value of a metric of this volume and another one."""
        if hasattr(metric, "describe"):
            return float(metric.compare(self.by(name, metric), other.by(name, metric)))
        return float(metric(self.volume, other.volume))


def random_pairs(sizes: Sequence[int], num_pairs: int, seed: int) -> np.ndarray:
    """Distinct random pairs of positions, along random walks: nearly every pair shares one member with the one before.

    Each member is in as many pairs as any other, but for one or two.

    Args:
        sizes: one size for unordered pairs of two different members of one set; two sizes for pairs with a
            member from each of two sets.
        num_pairs: how many, or all if there are fewer.
        seed: of the choice.

    Returns:
        (N, 2) integers; in a pair of one set the smaller comes first.
    """
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(size) for size in sizes]
    walk = _walk_within(sizes[0]) if len(sizes) == 1 else _walk_between(*sizes)
    pairs = np.array([*itertools.islice(walk, num_pairs)], dtype=int).reshape(-1, 2)
    chosen = np.stack([orders[0][pairs[:, 0]], orders[-1][pairs[:, 1]]], axis=1)
    return np.sort(chosen, axis=1) if len(sizes) == 1 else chosen


def _walk_within(size: int) -> Iterator[tuple[int, int]]:
    """All pairs of a set along paths through all members: Walecki's zigzags (Alspach 2008), an odd set plus one."""
    even = size + size % 2
    for start in range(even // 2):
        zigzag = [(start + (step + 1) // 2 * (-1) ** (step + 1)) % even for step in range(even)]
        yield from (pair for pair in itertools.pairwise(zigzag) if max(pair) < size)


def _walk_between(first: int, second: int) -> Iterator[tuple[int, int]]:
    """All pairs of members of two sets, along stairs down the diagonals of their table."""
    taken: set[tuple[int, int]] = set()
    for offset in range(0, math.gcd(first, second), 2):
        for step in range(math.lcm(first, second)):
            for pair in ((step + offset) % first, step % second), ((step + offset + 1) % first, step % second):
                if pair not in taken:
                    taken.add(pair)
                    yield pair
