# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Kernel distance between features (KID, Binkowski et al. 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.evaluation.metrics.feature_distance import FeatureDistance

DEGREE = 3
BLOCK = 1024


def polynomial_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012) with the kernel (x . y / d + 1)^3.

    Its expectation is 0 for two sets from one distribution at any sample size, so it can be negative. The kernel is
    summed in blocks: memory does not grow with the square of the number of volumes.

    Args:
        first, second: (N, d) and (M, d), N and M at least 2.
    """
    within = [_within(features.astype(np.float64)) for features in (first, second)]
    between = _kernel_sum(first.astype(np.float64), second.astype(np.float64)) / (len(first) * len(second))
    return within[0] + within[1] - 2.0 * between


def _within(features: np.ndarray) -> float:
    own = _kernel((features**2).sum(axis=1), features.shape[1]).sum()
    return (_kernel_sum(features, features) - own) / (len(features) * (len(features) - 1))


def _kernel_sum(first: np.ndarray, second: np.ndarray) -> float:
    starts = range(0, len(first), BLOCK)
    return sum(_kernel(first[i : i + BLOCK] @ second.T, first.shape[1]).sum() for i in starts)


def _kernel(products: np.ndarray, dimension: int) -> np.ndarray:
    return (products / dimension + 1.0) ** DEGREE


class KernelDistance(FeatureDistance):
    """The KID of the synthetic volumes; see `FeatureDistance` for what it comes with."""

    metric, headline = "kid", False

    says = (
        "How far the two sets are apart, as a pretrained network sees them, without the assumption that features are "
        "normally distributed. 0 is expected of equal distributions at any number of volumes."
    )
    pitfall = "It can be negative by chance, and figures of different networks or preprocessing do not compare."

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """See `polynomial_mmd`."""
        return polynomial_mmd(first, second)

    def settings(self) -> dict[str, Any]:
        """The kernel."""
        return {"kernel": "(x . y / d + 1)^3", "estimator": "unbiased"}
