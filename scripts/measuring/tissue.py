# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How a head's tissue looks: contrasts between tissues, how much is as bright as white matter, and levels.

Contrasts are differences of logarithms where both tissues are near: neither a gain nor a bias field changes them, and a
gamma multiplies all by the same factor, so that their ratios do without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.ndimage import gaussian_filter

from scripts.measuring.segmenter import BRAIN, CLASSES, INTRACRANIAL, VENTRICLES

SURE = 0.7
"""Share of a class from which a voxel counts as of it alone."""
NEAR_MM = 6.0
"""Standard deviation of the window in which two tissues are near each other."""
LEAST_SHARE = 0.02
"""Of a window that both tissues must have."""
DARKEST = 0.02
"""Intensity below which logarithms are not taken."""
CONTRASTS = {
    "white_grey": ("white", "grey"),
    "white_ventricle": ("white", VENTRICLES),
    "grey_fluid": ("grey", "outer_fluid"),
    "white_fluid": ("white", "outer_fluid"),
}
"""Name -> the brighter and the darker class."""
QUANTILES = (0.25, 0.5, 0.75)
"""Of the way from grey to white matter: how much of the brain lies beyond."""
PERCENTILES = (10, 25, 50, 75, 90)
LEVELS = ("outside", "white", "grey", "outer_fluid", VENTRICLES)
"""Classes whose percentiles are taken: logarithms, less that of the median of white matter."""
IN_SCALP = 0.3
"""Intensity, over that of white matter, from which what lies outside of the skull counts as of the head."""
SHARE_OUTSIDE = "outside_over_inside"
BEYOND = tuple(f"beyond_{quantile:g}" for quantile in QUANTILES)
TISSUE = (*CONTRASTS, *BEYOND, SHARE_OUTSIDE, *(f"{name}_{p}" for name in LEVELS for p in PERCENTILES))
"""What `tissue_numbers` gives."""
VERSION = 1
"""To count up when `tissue_numbers` gives other numbers."""


def tissue_numbers(image: np.ndarray, shares: np.ndarray, spacing: float) -> dict[str, float]:
    """Contrasts between tissues, and the shares of the brain beyond some intensities, by the names in `TISSUE`.

    Args:
        image: (x, y, z), T1-weighted, above 0 in the head.
        shares: (classes, x, y, z) on the same grid, from `scripts.measuring.segmenter.Segmenter.shares`.
        spacing: of the grid in mm.

    Returns:
        Contrasts as differences of the logarithms of local means, each place weighted by how much of both tissues is
        near; 0 where two tissues are nowhere near each other, as in a volume that shows no brain.
    """
    of = {name: share.astype(np.float32) for name, share in zip(CLASSES, shares)}
    logs = np.log(np.maximum(image, DARKEST))
    near = _Near(logs, {name: of[name] > SURE for name in _used()}, NEAR_MM / spacing)
    found = {name: near.contrast(*pair) for name, pair in CONTRASTS.items()}
    whiteness, brain = near.whiteness(), sum(of[name] for name in BRAIN) * near.both("white", "grey")
    total = float(brain.sum())
    beyond = [float((brain * (whiteness > quantile)).sum()) / total if total > 0.0 else 0.0 for quantile in QUANTILES]
    return {**found, **dict(zip(BEYOND, beyond)), **_levels(logs, of)}


def _levels(logs: np.ndarray, of: Mapping[str, np.ndarray]) -> dict[str, float]:
    white = logs[of["white"] > SURE]
    if not len(white):
        return dict.fromkeys(TISSUE[len(CONTRASTS) + len(BEYOND) :], 0.0)
    relative = logs - np.median(white)
    masks = {name: of[name] > SURE for name in LEVELS}
    masks["outside"] &= relative > np.log(IN_SCALP)
    found = {SHARE_OUTSIDE: float(masks["outside"].sum() / (1.0 - of["outside"]).sum())}
    for name, mask in masks.items():
        levels = np.percentile(relative[mask], PERCENTILES) if mask.any() else np.zeros(len(PERCENTILES))
        found |= {f"{name}_{p}": float(level) for p, level in zip(PERCENTILES, levels)}
    return found


def _used() -> list[str]:
    return list(dict.fromkeys(name for pair in CONTRASTS.values() for name in pair))


class _Near:
    """Local means of an image over each of several masks.

    Args:
        image: (x, y, z).
        masks: by name.
        window: standard deviation in voxels.
    """

    def __init__(self, image: np.ndarray, masks: Mapping[str, np.ndarray], window: float) -> None:
        self.image = image.astype(np.float32)
        weights = {name: mask.astype(np.float32) for name, mask in masks.items()}
        self.share = {name: _smoothed(mask, window) for name, mask in weights.items()}
        self.mean = {
            name: _smoothed(mask * self.image, window) / np.maximum(self.share[name], 1e-6)
            for name, mask in weights.items()
        }

    def both(self, first: str, second: str) -> np.ndarray:
        """Where both are near: (x, y, z), bool."""
        return np.minimum(self.share[first], self.share[second]) > LEAST_SHARE

    def contrast(self, bright: str, dark: str) -> float:
        """Mean difference of the local means; 0 where the two are nowhere near each other."""
        where = self.both(bright, dark)
        if not where.any():
            return 0.0
        a, b = self.share[bright][where], self.share[dark][where]
        return float(np.average((self.mean[bright] - self.mean[dark])[where], weights=a * b / (a + b)))

    def whiteness(self) -> np.ndarray:
        """0 at the local mean of grey matter, 1 at that of white: (x, y, z)."""
        step = np.maximum(self.mean["white"] - self.mean["grey"], DARKEST)
        return (self.image - self.mean["grey"]) / step


def _smoothed(values: np.ndarray, window: float) -> np.ndarray:
    return gaussian_filter(values, window, truncate=2.5)


def ageing_features(volumes: Mapping[str, float], tissue: Mapping[str, float]) -> list[float]:
    """What a line can tell age from: logarithms of volumes and contrasts, ratios of contrasts, and levels.

    Args:
        volumes: in mm3, of each of `INTRACRANIAL`.
        tissue: of `tissue_numbers`.

    Returns:
        NaN in all where the volume shows no brain, or no fluid beside it.
    """
    contrasts, beyond = ([tissue.get(name, 0.0) for name in names] for names in (CONTRASTS, BEYOND))
    sizes = [max(volumes.get(name, 0.0), 1.0) for name in INTRACRANIAL]
    if min(contrasts + beyond) <= 0.0:
        return [float("nan")] * (len(sizes) + 2 * len(contrasts) + len(TISSUE) - len(contrasts))
    ratios = [contrasts[0], *(contrasts[0] / other for other in contrasts[1:])]
    levels = [tissue[name] for name in TISSUE[len(contrasts) + len(beyond) :]]
    return [*np.log([*sizes, *contrasts, *beyond]).tolist(), *ratios, *levels]
