# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Means of measures with their uncertainty."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.stats

LEVEL = 0.95
REPEATS = 2000
FEWEST = 3
VALUES_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean of values of single volumes or pairs, or one number that was computed from all of them together.

    Attributes:
        value: NaN where it is not defined, as a correlation with a constant.
        count: number of values; of the smaller set where there are two.
        standard_deviation: of the values about their mean, with divisor count - 1; None for a single value, for what
            is no mean, and where a value is infinite, as the PSNR of equal volumes is.
        interval: its 95 % confidence interval, if it has one.
    """

    value: float
    count: int
    standard_deviation: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    """How far a figure lies from the one that it should equal.

    Attributes:
        target: the value that it should have.
        value: the figure less the target.
        interval: its 95 % confidence interval; None where one of the two has none.
    """

    target: float
    value: float
    interval: tuple[float, float] | None


def difference(found: Estimate, target: Estimate) -> Difference:
    """The difference of two figures of independent sets.

    The interval follows from their own (method of variance estimates recovery, Zou and Donner 2008).
    """
    value = found.value - target.value
    if found.interval is None or target.interval is None:
        return Difference(target.value, value, None)
    below = np.hypot(found.value - found.interval[0], target.interval[1] - target.value)
    above = np.hypot(found.interval[1] - found.value, target.value - target.interval[0])
    return Difference(target.value, value, (float(value - below), float(value + above)))


def summarise(values: np.ndarray, members: np.ndarray, seed: int) -> Estimate:
    """Mean, standard deviation and confidence interval of a measure of volumes or of pairs of volumes.

    Args:
        values: (N,).
        members: (N,) or (N, k) integers, the volumes that each value was computed from.
        seed: of the bootstrap.
    """
    known = len(values) if np.isfinite(values).all() else 0
    deviation = float(values.std(ddof=1)) if known > 1 else None
    interval = confidence_interval(values, members, seed) if known >= FEWEST else None
    return Estimate(float(values.mean()), len(values), deviation, interval)


def confidence_interval(values: np.ndarray, members: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean, in which volumes are drawn, not values.

    Pairs that share a volume are not independent, so a bootstrap over pairs is too narrow. Here each
    repeat draws volumes with replacement, and a value counts as often as the product of its volumes'
    counts (for one volume a value this is the ordinary bootstrap).

    Args:
        values, members, seed: as for `summarise`; all values are finite.
    """
    volumes, index = np.unique(members, return_inverse=True)
    means = partial(_means_of_drawn, values, index.reshape(len(values), -1))
    return bootstrapped([np.arange(len(volumes))], means, seed)


def _means_of_drawn(values: np.ndarray, members: np.ndarray, drawn: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of each row of drawn volumes; NaN where no value has all its volumes among them."""
    rows = np.atleast_2d(drawn)
    parts = np.array_split(rows, np.ceil(len(rows) * len(values) / VALUES_AT_ONCE))
    means = np.concatenate([_means_of_rows(values, members, part) for part in parts])
    return means.reshape(drawn.shape[:-1])


def _means_of_rows(values: np.ndarray, members: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    number, volumes = len(drawn), members.max() + 1
    places = drawn + volumes * np.arange(number)[:, None]
    counts = np.bincount(places.ravel(), minlength=number * volumes).reshape(number, volumes)
    weights = counts[:, members].prod(axis=2)
    with np.errstate(invalid="ignore"):
        return (values * weights).sum(axis=1) / weights.sum(axis=1)


def bootstrapped(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray | float],
    seed: int,
    paired: bool = False,
    vectorized: bool = True,
) -> tuple[float, float] | None:
    """Percentile bootstrap (Efron 1979) of a statistic of one set of volumes or of several, by `scipy.stats.bootstrap`.

    SciPy's interval is NaN if one repeat is, as a correlation is where one volume is drawn each time; here such repeats
    are left out.

    Args:
        samples: one (N,) array a set; of one length if they are paired.
        statistic: of such arrays, along the `axis` that it is given if it is vectorized.
        seed: of the choice of volumes.
        paired: whether the arrays are of the same volumes, which are drawn together.
        vectorized: whether the statistic takes the arrays of many repeats at once.

    Returns:
        The 95 % interval; None for fewer than three volumes, or where the statistic is not defined.
    """
    defined = min(map(len, samples)) >= FEWEST and np.isfinite(statistic(*samples))
    if not defined:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        repeats = scipy.stats.bootstrap(
            samples,
            statistic,
            n_resamples=REPEATS,
            batch=1 if len(samples) > 1 and not paired else None,  # sets are drawn in turn, as version 2.0.0 drew them
            vectorized=vectorized,
            paired=paired,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    low, high = np.quantile(repeats[np.isfinite(repeats)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
