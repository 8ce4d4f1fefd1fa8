# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How well one quantity follows another: correlations and slopes, with intervals."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import scipy.stats

from scripts.core.bootstrap import Estimate, bootstrapped

logger = logging.getLogger(__name__)


def pearson(requested: np.ndarray, measured: np.ndarray, axis: int = -1) -> Any:
    """Pearson's r along an axis of two arrays of one shape, by SciPy; NaN where one is constant."""
    if requested.shape[axis] < 2:
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        warnings.simplefilter("ignore", scipy.stats.NearConstantInputWarning)
        return scipy.stats.pearsonr(requested, measured, axis=axis).statistic


def spearman(requested: np.ndarray, measured: np.ndarray, axis: int = -1) -> Any:
    """Spearman's r: Pearson's r of the ranks, ties sharing their mean rank. Unlike SciPy's it takes many at once."""
    ranks = [scipy.stats.rankdata(values, axis=axis) for values in (requested, measured)]
    return pearson(ranks[0], ranks[1], axis)


def slope(requested: np.ndarray, measured: np.ndarray, axis: int = -1) -> Any:
    """Slope of the least squares line of what was measured on what was asked for; NaN where that is constant.

    That of SciPy's `linregress`, which takes one line at a time, and none where all is constant.
    """
    x = requested - requested.mean(axis, keepdims=True)
    constant = np.ptp(requested, axis) == 0.0
    return np.where(constant, np.nan, (x * measured).sum(axis) / np.where(constant, 1.0, (x * x).sum(axis)))


def in_words(r: float) -> str:
    """A correlation for the title of a picture."""
    return f"r = {r:.3f}" if np.isfinite(r) else "r not defined"


STATISTICS = {"pearson": pearson, "spearman": spearman, "slope": slope}


def correlations(name: str, requested: np.ndarray, measured: np.ndarray, seed: int) -> dict[str, Estimate]:
    """Pearson's and Spearman's r and the slope of one quantity, by the names in `STATISTICS`.

    Args:
        name: of the quantity, for messages.
        requested, measured: (N,).
        seed: of the bootstrap.
    """
    if np.ptp(requested) == 0.0:
        logger.warning(f"every volume has the same {name}: its correlation is not defined")
    elif np.ptp(measured) == 0.0:
        logger.warning(f"the same {name} was found in every volume: its correlation is not defined")
    found = {}
    for metric, statistic in STATISTICS.items():
        interval = bootstrapped([requested, measured], statistic, seed, paired=True)
        found[metric] = Estimate(float(statistic(requested, measured)), len(requested), interval=interval)
    return found
