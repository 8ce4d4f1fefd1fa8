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
"""Means of measures with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
REPEATS = 2000
FEWEST = 3


@dataclass(frozen=True)
class Summary:
    """A measure's values in brief.

    Attributes:
        count: number of values.
        mean: their mean.
        standard_deviation: with divisor count - 1; None for a single value.
        interval: bootstrap 95 % confidence interval of the mean; None for fewer than three values.

    Both are None as well where a value is infinite, as the PSNR of equal volumes is.
    """

    count: int
    mean: float
    standard_deviation: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Estimate:
    """One number that was computed from all volumes, not the mean of a value of each.

    Attributes:
        value: NaN where it is not defined, as a correlation with a constant.
        count: number of volumes; of the smaller set where there are two.
        interval: its bootstrap 95 % confidence interval, if it has one.
    """

    value: float
    count: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    """How far a mean lies from the one that it should have.

    Attributes:
        target: the mean that it should have.
        value: the mean less the target.
        interval: its 95 % confidence interval; None where one of the two has none.
    """

    target: float
    value: float
    interval: tuple[float, float] | None


def difference(found: Summary, target: Summary) -> Difference:
    """The difference of two means of independent sets.

    The interval follows from the two means' own (method of variance estimates recovery, Zou and Donner 2008).
    """
    value = found.mean - target.mean
    if found.interval is None or target.interval is None:
        return Difference(target.mean, value, None)
    below = np.hypot(found.mean - found.interval[0], target.interval[1] - target.mean)
    above = np.hypot(found.interval[1] - found.mean, target.mean - target.interval[0])
    return Difference(target.mean, value, (float(value - below), float(value + above)))


def summarise(values: np.ndarray, members: np.ndarray, seed: int) -> Summary:
    """Mean, standard deviation and confidence interval of a measure of volumes or of pairs of volumes.

    Args:
        values: (N,).
        members: (N,) or (N, k) integers, the volumes that each value was computed from.
        seed: of the bootstrap.
    """
    known = len(values) if np.isfinite(values).all() else 0
    deviation = float(values.std(ddof=1)) if known > 1 else None
    interval = confidence_interval(values, members, seed) if known >= FEWEST else None
    return Summary(len(values), float(values.mean()), deviation, interval)


def confidence_interval(values: np.ndarray, members: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979) of the mean, in which volumes are drawn, not values.

    Pairs that share a volume are not independent, so a bootstrap over pairs is too narrow. Here each
    repeat draws volumes with replacement, and a value counts as often as the product of its volumes'
    counts (for one volume a value this is the ordinary bootstrap).

    Args:
        values, members, seed: as for `summarise`; all values are finite.
    """
    volumes, index = np.unique(members, return_inverse=True)
    index = index.reshape(len(values), -1)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(REPEATS):
        drawn = generator.integers(len(volumes), size=len(volumes))
        weights = np.bincount(drawn, minlength=len(volumes))[index].prod(axis=1)
        if weights.any():
            means.append(np.average(values, weights=weights))
    return _middle(means)


def _middle(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrapped(
    volumes: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int
) -> tuple[float, float] | None:
    """Percentile bootstrap (Efron 1979) of any statistic of volumes.

    Args:
        volumes: (N, ...), what is known of each volume.
        statistic: of such an array; repeats in which it is NaN are left out.
        seed: of the bootstrap.

    Returns:
        The 95 % interval; None for fewer than three volumes, or where the statistic is not defined.
    """
    if len(volumes) < FEWEST or not np.isfinite(statistic(volumes)):
        return None
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(len(volumes), size=len(volumes)) for _ in range(REPEATS))
    values = [value for value in (statistic(volumes[index]) for index in drawn) if np.isfinite(value)]
    return _middle(values)


def bootstrapped_of_two(
    first: np.ndarray, second: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], float], seed: int
) -> tuple[float, float] | None:
    """Percentile bootstrap of a statistic of two independent sets of volumes, each drawn anew.

    Args:
        first, second: (N, ...) and (M, ...), what is known of each volume.
        statistic: of two such arrays; repeats in which it is NaN are left out.
        seed: of the bootstrap.

    Returns:
        The 95 % interval; None for fewer than three volumes in a set, or where the statistic is not defined.
    """
    if min(len(first), len(second)) < FEWEST or not np.isfinite(statistic(first, second)):
        return None
    generator = np.random.default_rng(seed)
    repeats = (
        statistic(*(values[generator.integers(len(values), size=len(values))] for values in (first, second)))
        for _ in range(REPEATS)
    )
    return _middle([value for value in repeats if np.isfinite(value)])
