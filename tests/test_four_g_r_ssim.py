# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""4-G-R-SSIM against a slow implementation of its formulae, and what must hold of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate, gaussian_filter, map_coordinates

from scripts.core.errors import BundleError
from scripts.evaluation.metrics.four_g_r_ssim import FourGRSSIM, gradient_map

SHAPE = (26, 22, 24)


def volume(seed: int, shape: tuple[int, ...] = SHAPE, smooth: float = 1.5) -> np.ndarray:
    """Smooth random intensities within 0 to 1, whose contrast grows from an empty side to the other."""
    values = gaussian_filter(np.random.default_rng(seed).random(shape), smooth)
    values = (values - values.min()) / np.ptp(values)
    return values * np.linspace(-0.2, 1.0, shape[0]).clip(0.0)[:, None, None] ** 2


def index(a: np.ndarray, b: np.ndarray, **options: Any) -> float:
    first, second = (torch.from_numpy(x)[None, None] for x in (a, b))
    return float(FourGRSSIM(a.shape, **options)(first, second))


# From the papers, voxel by voxel.


def slow_gradient(v: np.ndarray) -> np.ndarray:
    total = np.zeros_like(v)
    for axis in range(3):
        parts = [np.array([-1.0, 0.0, 1.0]) if i == axis else np.array([1.0, 2.0, 1.0]) for i in range(3)]
        total += np.abs(correlate(v, np.einsum("i,j,k->ijk", *parts)))
    return total[1:-1, 1:-1, 1:-1]


def slow_structures(a: np.ndarray, b: np.ndarray, side: int) -> np.ndarray:
    offsets = np.arange(side) - side // 2
    one = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.einsum("i,j,k->ijk", one, one, one)
    window /= window.sum()
    counts = [n - side + 1 for n in a.shape]
    structure = np.empty(counts)
    for i, j, k in itertools.product(*map(range, counts)):
        here = (slice(i, i + side), slice(j, j + side), slice(k, k + side))
        x, y = a[here], b[here]
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        sigma_x = np.sqrt((window * (x - mean_x) ** 2).sum())
        sigma_y = np.sqrt((window * (y - mean_y) ** 2).sum())
        sigma_xy = (window * (x - mean_x) * (y - mean_y)).sum()
        structure[i, j, k] = (sigma_xy + 0.03**2 / 2) / (sigma_x * sigma_y + 0.03**2 / 2)
    return structure


def slow_pooled(structure: np.ndarray, reference: np.ndarray, other: np.ndarray, side: int) -> float:
    high, low = 0.12 * reference.max(), 0.06 * reference.max()
    regions: dict[str, list[float]] = {"preserved": [], "changed": [], "texture": [], "smooth": []}
    for place in np.ndindex(structure.shape):
        at = tuple(i + side // 2 for i in place)
        edge, other_edge = reference[at] > high, other[at] > high
        if edge and other_edge:
            kind = "preserved"
        elif edge or other_edge:
            kind = "changed"
        elif reference[at] < low:
            kind = "smooth"
        else:
            kind = "texture"
        regions[kind].append(float(structure[place]))
    return float(np.mean([np.mean(values) for values in regions.values() if values]))


def slow_index(x: np.ndarray, y: np.ndarray, side: int = 11) -> float:
    a, b = slow_gradient(x), slow_gradient(y)
    structure = slow_structures(a, b, side)
    return (slow_pooled(structure, a, b, side) + slow_pooled(structure, b, a, side)) / 2


@pytest.mark.parametrize(("side", "mix"), [(11, 0.2), (11, 1.0), (7, 0.5)])
def test_it_is_the_slow_implementation_s(side: int, mix: float) -> None:
    a, b = volume(1), (1 - mix) * volume(1) + mix * volume(2)
    expected = slow_index(a, b, side)
    assert 0.0 < expected < 0.98
    assert index(a, b, kernel_size=side) == pytest.approx(expected, abs=1e-6)


def test_all_four_regions_occur_where_it_is_compared() -> None:
    a, b = slow_gradient(volume(1)), slow_gradient(volume(2))
    high, low = 0.12 * a.max(), 0.06 * a.max()
    shares = [
        ((a > high) & (b > high)).mean(),
        ((a > high) ^ (b > high)).mean(),
        ((a <= high) & (b <= high) & (a >= low)).mean(),
        ((a < low) & (b <= high)).mean(),
    ]
    assert min(shares) > 0.02


def test_several_scales_are_the_product_of_powers() -> None:
    a, b = volume(3, (30, 28, 32)), 0.7 * volume(3, (30, 28, 32)) + 0.3 * volume(4, (30, 28, 32))
    halves = [x.reshape(15, 2, 14, 2, 16, 2).mean((1, 3, 5)) for x in (a, b)]
    expected = slow_index(a, b) ** 0.3 * slow_index(halves[0], halves[1]) ** 0.7
    assert index(a, b, scale_weights=(0.3, 0.7)) == pytest.approx(expected, abs=1e-6)


def test_gradients_of_a_ramp() -> None:
    ramp = torch.arange(8.0)[None, None, :, None, None].expand(1, 1, 8, 6, 6)
    gradient = gradient_map(ramp)
    assert gradient.shape == (1, 1, 6, 4, 4) and torch.equal(gradient, torch.full_like(gradient, 32.0))


def test_equal_volumes_and_symmetry() -> None:
    a, b = volume(5), volume(6)
    assert index(a, a) == pytest.approx(1.0, abs=1e-9)
    assert index(a, b) == index(b, a) < 0.9
    assert index(np.zeros(SHAPE), np.zeros(SHAPE)) == 1.0


def test_brightness_does_not_matter_and_orientation_of_axes_neither() -> None:
    a, b = volume(7), 0.5 * volume(7) + 0.5 * volume(8)
    assert index(a, b + 0.3) == pytest.approx(index(a, b), abs=1e-9)
    assert index(a.transpose(2, 0, 1), b.transpose(2, 0, 1)) == pytest.approx(index(a, b), abs=1e-9)


def test_unrelated_noise_is_near_zero() -> None:
    a, b = (np.random.default_rng(seed).random(SHAPE) for seed in (1, 2))
    assert abs(index(a, b)) < 0.1


def warped(a: np.ndarray, amount: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    shifts = [gaussian_filter(generator.standard_normal(a.shape), 4) for _ in range(3)]
    places = [grid + amount * shift / np.abs(shift).max() for grid, shift in zip(np.indices(a.shape), shifts)]
    return map_coordinates(a, places, order=1, mode="nearest")


def noisy(a: np.ndarray, amount: float) -> np.ndarray:
    return a + 0.1 * amount * np.random.default_rng(0).standard_normal(a.shape)


def blurred(a: np.ndarray, amount: float) -> np.ndarray:
    return gaussian_filter(a, amount) if amount else a


@pytest.mark.parametrize("damage", [blurred, noisy, warped])
def test_it_falls_as_damage_grows(damage: Callable[[np.ndarray, float], np.ndarray]) -> None:
    a = volume(9, (32, 36, 32))
    values = [index(a, damage(a, amount)) for amount in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert values[0] == pytest.approx(1.0) and all(later < earlier for earlier, later in itertools.pairwise(values))


def test_metric_states_its_settings() -> None:
    metric = FourGRSSIM(SHAPE, kernel_size=7)
    assert vars(metric)["kernel_size"] == 7 and vars(metric)["scale_weights"] == [1.0]


def test_what_was_kept_of_a_volume_serves_every_pair_that_it_is_in() -> None:
    metric, volumes = FourGRSSIM(SHAPE), [torch.from_numpy(volume(seed))[None, None] for seed in range(3)]
    kept = [metric.describe(one) for one in volumes]
    for a, b in itertools.permutations(range(3), 2):
        assert metric.compare(kept[a], kept[b]) == pytest.approx(float(metric(volumes[a], volumes[b])), abs=1e-6)


@pytest.mark.parametrize(("shape", "scales"), [((12, 30, 30), 1), ((24, 30, 30), 2)])
def test_volumes_smaller_than_the_window_are_refused(shape: tuple[int, ...], scales: int) -> None:
    with pytest.raises(BundleError, match="13 voxels a side"):
        FourGRSSIM(shape, scale_weights=[1.0] * scales)
