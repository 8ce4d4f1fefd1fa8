# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""4-G-R-SSIM: the structural similarity of gradients, pooled over four kinds of regions, in 3D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.evaluation.metrics.ssim import LocalMoments, SeparableWindow, gaussian, moments

EDGE, SMOOTH = 0.12, 0.06
REGION_WEIGHTS = (0.25, 0.25, 0.25, 0.25)
K2 = 0.03


class FourGRSSIM:
    """4-G-R-SSIM of two volumes, in float32.

    G (Chen, Yang and Xie 2006): of each volume the gradient map g = |S_x * v| + |S_y * v| + |S_z * v|, with the
    Sobel kernels S of 3^3 voxels, (-1, 0, 1) along one axis and (1, 2, 1) along the others.

    R (Rouse and Hemami 2008): of SSIM only the structure term, with means, deviations and covariance of the gradient
    maps a and b in a Gaussian window:

        s = (sigma_ab + C) / (sigma_a sigma_b + C),    C = (0.03 data_range)^2 / 2

    4 (Li and Bovik 2010): with t = 0.12 max(a), u = 0.06 max(a), a the reference, every voxel is of

        preserved edges    a > t and b > t
        changed edges      one of a and b > t
        smooth regions     a < u and b <= t
        texture            all others

    and the index is the weighted mean over the regions that are there of the mean of s in them. Of two samples
    neither is the reference, so the mean of both orders is taken: the index is symmetric. It is 1 for equal volumes
    and about 0 for unrelated noise.

    One scale, as the name says: Renieblas et al. (2017, J. Med. Imaging 4(3):035501), who compare this family of
    indices, mark several scales by MS, as in 4-MS-G-SSIM beside 4-G-SSIM. The nearest public code, of the paper's
    group (the fork of pytorch-msssim at github.com/AmigoLab), has these parts (L1 gradients, thresholds of 0.12 and
    0.06, exponents of SSIM's three terms), but joins them in no finished function; its sketch of one has one scale
    too. With several `scale_weights` the volumes are halved by averages of 2^3 voxels between scales, and the result is
    the product of the scales' indices, where negative taken as 0, to the power of their weights.

    Args:
        shape: voxels along x, y, z.
        kernel_size, kernel_sigma: of the Gaussian window, in voxels.
        data_range: of the intensities.
        scale_weights: exponent of each scale, finest first.
        region_weights: of preserved edges, changed edges, texture and smooth regions.

    Raises:
        BundleError: if the window does not fit into the volumes at every scale, which each need `kernel_size` + 2
            voxels a side.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kernel_size: int = 11,
        kernel_sigma: float = 1.5,
        data_range: float = 1.0,
        scale_weights: Sequence[float] = (1.0,),
        region_weights: Sequence[float] = REGION_WEIGHTS,
    ) -> None:
        coarsest = min(shape) >> (len(scale_weights) - 1)
        if coarsest < kernel_size + 2:
            raise BundleError(
                f"volumes of shape {tuple(shape)} are too small for 4-G-R-SSIM with {len(scale_weights)} scales: "
                f"each needs {kernel_size + 2} voxels a side"
            )
        self.kernel_size = kernel_size
        self.kernel_sigma = kernel_sigma
        self.data_range = data_range
        self.scale_weights = list(scale_weights)
        self.region_weights = list(region_weights)

    def describe(self, volume: Tensor) -> list[Gradients]:
        """What a comparison needs of one (1, 1, X, Y, Z) volume, on each scale; it takes 14 bytes a voxel."""
        window, scale, found = self._window(), volume.float(), []
        for _ in self.scale_weights:
            found.append(describe_gradients(gradient_map(scale)[0, 0], window))
            scale = F.avg_pool3d(scale, 2)
        return found

    def compare(self, first: Sequence[Gradients], second: Sequence[Gradients]) -> float:
        """The index of two volumes that `describe` has described."""
        constant, window = (K2 * self.data_range) ** 2 / 2, self._window()
        indices = [_index(a, b, window, constant, self.region_weights) for a, b in zip(first, second)]
        if len(indices) == 1:
            return indices[0]
        return math.prod(max(index, 0.0) ** weight for index, weight in zip(indices, self.scale_weights))

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """The index of two (1, 1, X, Y, Z) volumes, a scalar."""
        return torch.tensor(self.compare(self.describe(first), self.describe(second)))

    def _window(self) -> SeparableWindow:
        return SeparableWindow([gaussian(self.kernel_size, self.kernel_sigma)] * 3)


class Gradients(NamedTuple):
    """A gradient map.

    Attributes:
        inner: the map where the window fits, (X', Y', Z').
        edge, smooth: its thresholds.
        moments: of the map, with standard deviations in the place of variances.
    """

    inner: Tensor
    edge: float
    smooth: float
    moments: LocalMoments


def describe_gradients(gradients: Tensor, window: SeparableWindow) -> Gradients:
    """Thresholds and moments of an (X, Y, Z) gradient map."""
    found, highest = moments(gradients.contiguous(), window), float(gradients.max())
    margins = [(whole - valid) // 2 for whole, valid in zip(gradients.shape, found.mean.shape)]
    inner = gradients[tuple(slice(m, m + n) for m, n in zip(margins, found.mean.shape))]
    deviations = found.variance.clamp_(min=0.0).sqrt_()
    return Gradients(inner, EDGE * highest, SMOOTH * highest, found._replace(variance=deviations))


def _index(a: Gradients, b: Gradients, window: SeparableWindow, constant: float, weights: Sequence[float]) -> float:
    products = window.means(a.moments.volume * b.moments.volume)
    sums = a.inner.new_zeros(2, 2, 4, dtype=torch.float64)
    slices = zip(products, a.moments.mean, b.moments.mean, a.moments.variance, b.moments.variance, a.inner, b.inner)
    for product, mean_a, mean_b, deviation_a, deviation_b, inner_a, inner_b in slices:
        structure = product.addcmul_(mean_a, mean_b, value=-1).add_(constant)
        structure.div_((deviation_a * deviation_b).add_(constant))
        sums[0] += sum_by_region(structure, inner_a, inner_b, a.edge, a.smooth)
        sums[1] += sum_by_region(structure, inner_b, inner_a, b.edge, b.smooth)
    return sum(pool_regions(found, counts, weights) for found, counts in sums.tolist()) / 2


def sum_by_region(structure: Tensor, reference: Tensor, other: Tensor, edge: float, smooth: float) -> Tensor:
    """Sums of the structure term in preserved and changed edges, texture and smooth regions; their voxels: (2, 4)."""
    ours, theirs = reference > edge, other > edge
    preserved, changed, flat = ours & theirs, ours ^ theirs, (reference < smooth) & ~theirs
    masks = torch.stack([preserved, changed, ~(preserved | changed | flat), flat]).flatten(1).to(structure.dtype)
    return torch.stack([torch.mv(masks, structure.flatten()), masks.sum(dim=1)]).double()


def pool_regions(sums: Sequence[float], counts: Sequence[float], weights: Sequence[float] = REGION_WEIGHTS) -> float:
    """The index, from the sums and numbers of voxels that `sum_by_region` gives."""
    there = [(weight, total / count) for weight, total, count in zip(weights, sums, counts) if count]
    return sum(weight * mean for weight, mean in there) / sum(weight for weight, _ in there)


def gradient_map(volume: Tensor) -> Tensor:
    """Sum of the absolute Sobel gradients along the three axes: (1, 1, X, Y, Z) -> (1, 1, X-2, Y-2, Z-2)."""
    total = torch.zeros(())
    for axis in range(3):
        gradient = volume
        for other in range(3):
            gradient = _filtered(gradient, [-1.0, 0.0, 1.0] if other == axis else [1.0, 2.0, 1.0], other + 2)
        total = total + gradient.abs()
    return total


def _filtered(volume: Tensor, kernel: Sequence[float], dim: int) -> Tensor:
    # Shifted sums: on a CPU twenty times as fast as conv3d with one input channel.
    length = volume.shape[dim] - len(kernel) + 1
    result = volume.narrow(dim, 0, length) * kernel[0]
    for shift, weight in enumerate(kernel[1:], start=1):
        if weight:
            result.add_(volume.narrow(dim, shift, length), alpha=weight)
    return result
