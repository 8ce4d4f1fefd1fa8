# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How far two sets of people are apart in several measurements, such as the volumes of brain regions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

SMALL = 0.2
"""The largest Cohen's d that counts as no difference (Cohen 1988: 0.2 small, 0.5 medium, 0.8 large)."""


def cohens_d(first: np.ndarray, second: np.ndarray, axis: int = 0) -> np.ndarray:
    """Difference of means over the pooled standard deviation (Cohen 1988).

    Args:
        first, second: (N, R) and (M, R), or with any other shape that agrees but for `axis`; N and M at least 2.
        axis: along which the members of a set lie.

    Returns:
        (R,), NaN where nothing varies.
    """
    sizes = first.shape[axis], second.shape[axis]
    squares = [size * found.var(axis=axis) for size, found in zip(sizes, (first, second))]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (first.mean(axis=axis) - second.mean(axis=axis)) / np.sqrt(sum(squares) / (sum(sizes) - 2))
    return np.where(np.isfinite(found), found, np.nan)


def corrected_p(first: np.ndarray, second: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """P-values of differences of means, corrected for the number of measurements.

    A permutation test with the largest |d| of all measurements (Westfall and Young 1993), which heeds that they go
    together, as Bonferroni's correction does not: the chance to find any difference at all where there is none.

    Args:
        first, second: (N, R) and (M, R).
        permutations: how often members change sides.
        seed: of the permutations.

    Returns:
        (R,), at least 1 / (permutations + 1); 1 where d is not defined.
    """
    both, generator = np.concatenate([first, second]), np.random.default_rng(seed)
    found, largest = np.abs(cohens_d(first, second)), np.zeros(permutations)
    for number in range(permutations):
        order = generator.permutation(len(both))
        moved = np.abs(cohens_d(both[order[: len(first)]], both[order[len(first) :]]))
        largest[number] = np.nanmax(moved, initial=0.0)
    reached = (largest[:, None] >= found * (1 - 1e-12)).sum(axis=0)
    return np.where(np.isnan(found), 1.0, (reached + 1) / (permutations + 1))


def wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    """Wasserstein-1 distance of two sets of equally many points: the mean way under the best assignment.

    Args:
        first, second: (N, R).
    """
    ways = cdist(first, second)
    return float(ways[linear_sum_assignment(ways)].mean())
