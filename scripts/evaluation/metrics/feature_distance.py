# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What distances between two sets of features have in common: the floor, and the spread over resamplings."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from scripts.compute.counting import counted
from scripts.core.bootstrap import Difference, Estimate
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet

logger = logging.getLogger(__name__)


class FeatureDistance(Measure):
    """A distance between the features of the synthetic and of the real volumes, with its floor, for each network.

    For each network the result has rows of three kinds:

    - `all`: the distance of all synthetic volumes to all real ones;
    - `halves`: the distance of m synthetic volumes to m real ones, m being half of the smaller set;
    - `floor`: the distance of m real volumes to m others, which is what a perfect model would get.

    The last two are means and standard deviations over random choices of the volumes, and compare with each other:
    they have equal sample sizes, on which such distances depend.

    Attributes:
        metric: what the rows are called.
        headline: whether they have columns in the table of models.

    Args:
        synthetic, real: the features.
        resamplings: how many random choices.
        seed: of the choices.
    """

    metric: str
    headline: bool = True

    def __init__(self, synthetic: FeatureSet, real: FeatureSet, resamplings: Any = 20, seed: Any = 0) -> None:
        self.synthetic, self.real = synthetic, real
        self.inputs = [synthetic.folder, real.folder, synthetic.networks]
        self.resamplings = whole_number(resamplings, "resamplings", least=2)
        self.seed = whole_number(seed, "seed")

    @abstractmethod
    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """The distance between two sets of features, (N, d) and (M, d), with N and M at least 2."""

    def settings(self) -> dict[str, Any]:
        """What the distance was computed with, for the report."""
        return {}

    def check(self) -> None:
        """Raise a `BundleError` unless both sets have two volumes or more, on one grid."""
        for features in (self.synthetic, self.real):
            if len(features.folder) < 2:
                raise BundleError(
                    f"--{features.folder.flag}: {features.folder.folder} holds one volume; "
                    "a distance between distributions needs two or more"
                )
        self.real.folder.check_same_grid(self.synthetic.folder)

    def update(self) -> None:
        """Compute the features that are missing, as one of several processes if there are any."""
        self.check()
        for features in (self.synthetic, self.real):
            features.extract()

    def compute(self) -> Result:
        """Measure with every network that was asked for."""
        return Result([row for name in self.synthetic.networks.chosen for row in self._rows(name)], self._facts())

    def _rows(self, name: str) -> list[Row]:
        synthetic, real = self.synthetic.matrix(name), self.real.matrix(name)
        self._warn(name, len(synthetic), len(real), synthetic.shape[1])
        row = partial(Row, self.metric, network=name, headline=self.headline)
        all_of_both = Estimate(self.distance(synthetic, real), min(len(synthetic), len(real)))
        if self._half < 2:
            return [row(all_of_both, kind="all")]
        generator = np.random.default_rng(self.seed)
        rounds = counted(range(self.resamplings), f"resampling {name}")
        pairs = [self._resampled(synthetic, real, generator) for _ in rounds]
        return [row(all_of_both, kind="all"), *halves_and_floor(row, np.array(pairs))]

    @property
    def _half(self) -> int:
        return min(len(self.synthetic.folder), len(self.real.folder)) // 2

    def _resampled(
        self, synthetic: np.ndarray, real: np.ndarray, generator: np.random.Generator
    ) -> tuple[float, float]:
        chosen, first, second = random_halves(synthetic, real, self._half, generator)
        return self.distance(chosen, first), self.distance(first, second)

    def _warn(self, name: str, synthetic: int, real: int, dimension: int) -> None:
        if min(synthetic, real) < dimension:
            logger.warning(
                f"{name}: {synthetic} synthetic and {real} real volumes for {dimension} features: with fewer volumes "
                "than features FID's covariances are not determined: read it against its floor alone, or KID"
            )
        if self._half < 2:
            logger.warning(f"{name}: {synthetic} synthetic and {real} real volumes are too few for a floor: it needs 4")

    def _facts(self) -> dict[str, Any]:
        chosen = self.synthetic.networks.chosen
        return {
            "networks": {name: network.facts() for name, network in chosen.items()},
            "fewer_volumes_than_features": {n: self._fewest < network.dimension for n, network in chosen.items()},
            "synthetic_volumes": len(self.synthetic.folder),
            "real_volumes": len(self.real.folder),
            "synthetic_dir": self.synthetic.folder.summary(),
            "real_dir": self.real.folder.summary(),
            "volumes_per_half": self._half,
            "resamplings": self.resamplings,
            "seed": self.seed,
            "settings": self.settings(),
        }

    @property
    def _fewest(self) -> int:
        return min(len(self.synthetic.folder), len(self.real.folder))


def random_halves(
    synthetic: np.ndarray, real: np.ndarray, half: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random choice of `half` synthetic volumes, of as many real ones, and of as many other real ones."""
    chosen = synthetic[generator.permutation(len(synthetic))[:half]]
    order = generator.permutation(len(real))
    return chosen, real[order[:half]], real[order[half : 2 * half]]


def halves_and_floor(row: Callable[..., Row], values: np.ndarray) -> list[Row]:
    """The rows of a distance over random choices.

    Args:
        row: makes a row of an estimate.
        values: (choices, 2), between synthetic and real volumes, and between real and other real ones.
    """
    halves, floor = (_over_choices(one) for one in values.T)
    to_floor = Difference(floor.value, halves.value - floor.value, None)
    return [row(halves, kind="halves", difference=to_floor), row(floor, kind="floor")]


def _over_choices(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), len(values), float(values.std(ddof=1)))
