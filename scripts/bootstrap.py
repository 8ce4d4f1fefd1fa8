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
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
