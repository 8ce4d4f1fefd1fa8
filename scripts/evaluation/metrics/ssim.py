# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""SSIM and MS-SSIM of volumes with separable windows, and with what depends on one volume alone kept from pair to pair.

The numbers are those of MONAI's metrics, which convolve with windows of 343 and 1331 weights; benchmarks/similarity.py
measures both in one run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from monai.metrics.regression import KernelType
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Places that one product with a banded matrix computes: with more of them, more factors are 0."""


class SeparableWindow:
    """A separable window.

    Args:
        weights: along x, y and z; for means, each must add up to 1.
    """

    def __init__(self, weights: Sequence[Sequence[float]]) -> None:
        self.weights = [[float(one) for one in axis] for axis in weights]

    def means(self, volume: Tensor) -> Tensor:
        """Weighted means of an (X, Y, Z) volume at all places where the window fits into it, (X', Y', Z')."""
        for axis in (2, 1, 0):
            volume = filter_along(volume, self.weights[axis], axis)
        return volume


def filter_along(volume: Tensor, weights: Sequence[float], axis: int) -> Tensor:
    """Correlate a contiguous (X, Y, Z) volume with w weights along one axis, which gets w - 1 shorter.

    It is a product with a banded matrix, since convolutions with one channel are slow on a CPU.
    """
    shape, reach = [*volume.shape], len(weights) - 1
    shape[axis] -= reach
    if axis == 2:
        return torch.mm(volume.view(-1, volume.shape[2]), _banded(volume, weights, shape[2]).T).view(shape)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    source, result = volume.view(before, -1, after), volume.new_empty(before, shape[axis], after)
    band = _banded(volume, weights, BLOCK)
    for start in range(0, shape[axis], BLOCK):
        out = result[:, start : start + BLOCK]
        rows = out.shape[1]
        factor = band[:rows, : rows + reach].expand(before, -1, -1)
        torch.bmm(factor, source[:, start : start + rows + reach], out=out)
    return result.view(shape)


def _banded(like: Tensor, weights: Sequence[float], rows: int) -> Tensor:
    matrix = like.new_zeros(rows, rows + len(weights) - 1)
    for place, weight in enumerate(weights):
        matrix.diagonal(place).fill_(weight)
    return matrix


def gaussian(size: int, sigma: float) -> list[float]:
    """Weights of a Gaussian window of `size` voxels, which add up to 1."""
    weights = [math.exp(-0.5 * ((place - (size - 1) / 2) / sigma) ** 2) for place in range(size)]
    return [weight / sum(weights) for weight in weights]


class LocalMoments(NamedTuple):
    """An (X, Y, Z) volume, and its mean and variance at each place of a window, (X', Y', Z')."""

    volume: Tensor
    mean: Tensor
    variance: Tensor


def moments(volume: Tensor, window: SeparableWindow) -> LocalMoments:
    """Mean and variance of an (X, Y, Z) volume in a window."""
    mean = window.means(volume)
    return LocalMoments(volume, mean, window.means(volume.square()).addcmul_(mean, mean, value=-1))


class _Constants(NamedTuple):
    luminance: float
    contrast: float


def _similarity(
    first: LocalMoments, second: LocalMoments, window: SeparableWindow, constants: _Constants, luminance: bool
) -> float:
    """Mean over all places of SSIM, or of SSIM without its luminance term."""
    total = first.volume.new_zeros((), dtype=torch.float64)
    products = window.means(first.volume * second.volume)
    for a, var_a, b, var_b, product in zip(first.mean, first.variance, second.mean, second.variance, products):
        both = a * b
        index = torch.add(product, both, alpha=-1).mul_(2).add_(constants.contrast)
        index.div_((var_a + var_b).add_(constants.contrast))
        if luminance:
            index.mul_(both.mul_(2).add_(constants.luminance))
            index.div_(a.square().addcmul_(b, b).add_(constants.luminance))
        total += index.sum(dtype=torch.float64)
    return float(total / products.numel())


class _Windowed:
    """What both metrics below have in common; mixed into MONAI's, whose settings it reads."""

    kernel_type: Any
    kernel_size: Sequence[int]
    kernel_sigma: Sequence[float]
    data_range: float
    k1: float
    k2: float

    def _window(self) -> SeparableWindow:
        if self.kernel_type == KernelType.UNIFORM:
            return SeparableWindow([[1 / size] * size for size in self.kernel_size])
        return SeparableWindow([gaussian(*axis) for axis in zip(self.kernel_size, self.kernel_sigma)])

    def _constants(self) -> _Constants:
        return _Constants((self.k1 * self.data_range) ** 2, (self.k2 * self.data_range) ** 2)

    def _scales(self) -> int:
        return 1

    def describe(self, volume: Tensor) -> list[LocalMoments]:
        """What a comparison needs of one (1, 1, X, Y, Z) volume, on each scale; it takes 14 bytes a voxel.

        Raises:
            ValueError: if the window does not fit into the coarsest scale.
        """
        window, scale, found = self._window(), volume.float(), []
        for _ in range(self._scales()):
            if any(side < size for side, size in zip(scale.shape[2:], self.kernel_size)):
                raise ValueError(f"a window of {tuple(self.kernel_size)} does not fit into {tuple(scale.shape[2:])}")
            found.append(moments(scale[0, 0].contiguous(), window))
            scale = F.avg_pool3d(scale, 2)
        return found

    @abstractmethod
    def compare(self, first: Sequence[LocalMoments], second: Sequence[LocalMoments]) -> float:
        """The index of two volumes that `describe` has described."""

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        if y_pred.shape != y.shape or y.dim() != 5 or y.shape[1] != 1:
            raise ValueError(
                f"volumes must be (B, 1, X, Y, Z) of one shape, not {tuple(y_pred.shape)}, {tuple(y.shape)}"
            )
        pairs = zip(y_pred.split(1), y.split(1))
        found = [[self.compare(self.describe(one), self.describe(other))] for one, other in pairs]
        return y.new_tensor(found, dtype=torch.float)


class SSIM(_Windowed, SSIMMetric):
    """MONAI's `SSIMMetric` of volumes with one channel: the mean of Wang et al. 2004 over all places of the window.

    The arguments are MONAI's, with `spatial_dims` 3.
    """

    def compare(self, first: Sequence[LocalMoments], second: Sequence[LocalMoments]) -> float:
        """The mean index of two volumes that `describe` has described."""
        return _similarity(first[0], second[0], self._window(), self._constants(), luminance=True)


class MultiScaleSSIM(_Windowed, MultiScaleSSIMMetric):
    """MONAI's `MultiScaleSSIMMetric` of volumes with one channel: Wang et al. 2003, negative scales taken as 0.

    The arguments are MONAI's, with `spatial_dims` 3.
    """

    def _scales(self) -> int:
        return len(self.weights)

    def compare(self, first: Sequence[LocalMoments], second: Sequence[LocalMoments]) -> float:
        """The index of two volumes that `describe` has described."""
        window, constants, last = self._window(), self._constants(), len(self.weights) - 1
        similar = [
            _similarity(a, b, window, constants, luminance=scale == last)
            for scale, (a, b) in enumerate(zip(first, second))
        ]
        return math.prod(max(one, 0.0) ** weight for one, weight in zip(similar, self.weights))
