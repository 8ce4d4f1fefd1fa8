# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Ridge regression (Hoerl and Kennard 1970), its penalty by leaving one out, and predictions of who was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PENALTIES = tuple(10.0 ** (step / 2) for step in range(-8, 13))
"""Penalties that are tried, relative to the mean square of the standardised features' singular values."""
FOLDS = 10


@dataclass(frozen=True)
class Ridge:
    """A fitted line: `centre + (features - mean) @ weights`.

    Attributes:
        mean: (d,), of the features in the fit.
        weights: (d,), per unit of each feature.
        centre: mean of the target.
        penalty: the one that was chosen.
    """

    mean: np.ndarray
    weights: np.ndarray
    centre: float
    penalty: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predictions (N,) of features (N, d)."""
        return self.centre + (features - self.mean) @ self.weights


def fit_ridge(features: np.ndarray, target: np.ndarray, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """The ridge whose error is least where each member is predicted from the others.

    Features are standardised first; those that do not vary have no weight. The errors of all penalties follow from one
    singular value decomposition: a residual over 1 less its leverage (Allen 1974).

    Args:
        features: (N, d), with N at least 3.
        target: (N,).
        penalties: to try.
    """
    mean, spread = features.mean(axis=0), features.std(axis=0)
    scale = np.where(spread > 1e-12 * np.abs(mean), spread, np.inf)
    u, s, vt = np.linalg.svd((features - mean) / scale, full_matrices=False)
    centre = float(target.mean())
    projected = u.T @ (target - centre)
    tried = [float(penalty * (s**2).mean()) or 1.0 for penalty in penalties]
    errors = [_error_left_out(u, s, target - centre, penalty) for penalty in tried]
    best = tried[int(np.argmin(errors))]
    return Ridge(mean, vt.T @ (s / (s**2 + best) * projected) / scale, centre, best)


def _error_left_out(u: np.ndarray, s: np.ndarray, target: np.ndarray, penalty: float) -> float:
    kept = s**2 / (s**2 + penalty)
    leverage = 1.0 / len(target) + (u**2) @ kept
    residual = target - u @ (kept * (u.T @ target))
    return float(np.mean((residual / np.maximum(1.0 - leverage, 1e-9)) ** 2))


def predicted_from_others(
    features: np.ndarray, target: np.ndarray, seed: int, groups: Sequence[object] | None = None, folds: int = FOLDS
) -> np.ndarray:
    """Each member's target as a ridge of the other folds tells it, whose penalty was chosen within these.

    Args:
        features: (N, d).
        target: (N,).
        seed: of the division into folds.
        groups: (N,), of whom no two folds may have a member, such as the volumes of one person; None where each member
            is by itself.
        folds: how many; fewer where there are fewer groups.
    """
    names = list(range(len(target))) if groups is None else list(groups)
    _, group = np.unique(np.array([str(name) for name in names]), return_inverse=True)
    order = np.random.default_rng(seed).permutation(group.max() + 1)
    fold, found = order[group] % folds, np.empty(len(target))
    for number in np.unique(fold):
        left_out = fold == number
        found[left_out] = fit_ridge(features[~left_out], target[~left_out])(features[left_out])
    return found
