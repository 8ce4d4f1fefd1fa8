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
"""How well one quantity follows another: correlations and slopes, with intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import scipy.stats

from scripts.bootstrap import Estimate, Summary, bootstrapped

logger = logging.getLogger(__name__)


def pearson(requested: np.ndarray, measured: np.ndarray) -> float:
    """Pearson's r of two (N,) arrays; NaN where one is constant."""
    x, y = (values - values.mean() for values in (requested, measured))
    scale = np.sqrt((x @ x) * (y @ y))
    constant = np.ptp(requested) == 0.0 or np.ptp(measured) == 0.0
    return float("nan") if constant or scale == 0.0 else float(np.clip(x @ y / scale, -1.0, 1.0))


def spearman(requested: np.ndarray, measured: np.ndarray) -> float:
    """Spearman's r: Pearson's r of the ranks, ties sharing their mean rank."""
    return pearson(scipy.stats.rankdata(requested), scipy.stats.rankdata(measured))


def in_words(r: float) -> str:
    """A correlation for the title of a picture."""
    return f"r = {r:.3f}" if np.isfinite(r) else "r not defined"


def slope(requested: np.ndarray, measured: np.ndarray) -> float:
    """Of the least squares line of what was measured on what was asked for; NaN where that is constant."""
    x = requested - requested.mean()
    return float("nan") if np.ptp(requested) == 0.0 else float(x @ measured / (x @ x))


def _of_columns(statistic: Callable[[np.ndarray, np.ndarray], float], pairs: np.ndarray) -> float:
    return statistic(pairs[:, 0], pairs[:, 1])


STATISTICS = {"pearson": pearson, "spearman": spearman, "slope": slope}


def correlations(name: str, requested: np.ndarray, measured: np.ndarray, seed: int) -> dict[str, Summary | Estimate]:
    """The statistics of one quantity: `name_pearson`, `name_spearman` and `name_slope`."""
    if np.ptp(requested) == 0.0:
        logger.warning(f"every volume has the same {name}: its correlation is not defined")
    elif np.ptp(measured) == 0.0:
        logger.warning(f"the same {name} was found in every volume: its correlation is not defined")
    pairs = np.stack([requested, measured], axis=1)
    found: dict[str, Summary | Estimate] = {}
    for label, statistic in STATISTICS.items():
        interval = bootstrapped(pairs, partial(_of_columns, statistic), seed)
        found[f"{name}_{label}"] = Estimate(statistic(requested, measured), len(pairs), interval)
    return found
