# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between features (FID, Heusel et al. 2017)."""

from __future__ import annotations

import numpy as np

from scripts.evaluation.metrics.feature_distance import FeatureDistance

NEGATIVE = 1e-6


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Squared Frechet distance between two normal distributions (Dowson and Landau 1982).

        |m - n|^2 + tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2)

    The matrix under the root is symmetric, so its root is real, unlike that of A B, and stays accurate where A and
    B are singular.

    Args:
        mean, other_mean: (d,).
        covariance, other_covariance: (d, d), symmetric and without negative eigenvalues.

    Raises:
        ValueError: if a matrix has negative eigenvalues beyond rounding.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(_not_negative(values))) @ vectors.T
    inner = root @ other_covariance @ root
    shared = np.sqrt(_not_negative(np.linalg.eigvalsh((inner + inner.T) / 2))).sum()
    return _distance(mean - other_mean, np.trace(covariance), np.trace(other_covariance), shared)


def frechet_distance_of_samples(first: np.ndarray, second: np.ndarray) -> float:
    """The Frechet distance between the normal distributions fitted to two sets of features.

    With the centred features X and Y as rows over the root of the number of degrees of freedom, A = X^T X and
    B = Y^T Y, and the trace of the root of A B is the sum of the singular values of X Y^T: for fewer volumes than
    features that is a small matrix, and exact.

    Args:
        first, second: (N, d) and (M, d), N and M at least 2.
    """
    if min(len(first), len(second)) >= first.shape[1]:
        return frechet_distance(*_moments(first), *_moments(second))
    x, y = (_centred(features) for features in (first, second))
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return _distance(first.mean(axis=0) - second.mean(axis=0), (x**2).sum(), (y**2).sum(), shared)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.astype(np.float64).mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _centred(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)


def _not_negative(eigenvalues: np.ndarray) -> np.ndarray:
    if eigenvalues.min() < -NEGATIVE * max(np.abs(eigenvalues).max(), 1e-300):
        raise ValueError(f"a covariance with the eigenvalue {eigenvalues.min():g}")
    return eigenvalues.clip(min=0.0)


def _distance(step: np.ndarray, trace: float, other_trace: float, shared: float) -> float:
    return max(float(step @ step + trace + other_trace - 2.0 * shared), 0.0)


class FrechetDistance(FeatureDistance):
    """The FID of the synthetic volumes; see `FeatureDistance` for what it comes with."""

    metric = "fid"

    says = (
        "How far the two sets are apart, as a pretrained network sees them: the squared Frechet distance between "
        "normal distributions fitted to its features. Read the distance of m synthetic to m real volumes against the "
        "floor, that of m real to m other real ones."
    )
    pitfall = (
        "It grows as the number of volumes falls, so that it means nothing without that number and the floor; figures "
        "of different networks or preprocessing do not compare. The spread is over choices from the same volumes and "
        "is no confidence interval."
    )

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """See `frechet_distance_of_samples`."""
        return frechet_distance_of_samples(first, second)
