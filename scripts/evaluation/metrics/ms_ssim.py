# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Multi-scale structural similarity (Wang et al. 2003) on volumes that may be small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.core.errors import BundleError
from scripts.evaluation.metrics.ssim import MultiScaleSSIM

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_metric(
    shape: Sequence[int], kernel_size: int = 7, weights: Sequence[float] = WEIGHTS, **options: Any
) -> MultiScaleSSIM:
    """MS-SSIM with as many of its scales as fit into the volumes.

    Where not all fit, the coarsest are left out and the others' weights divided by their sum, so that
    they add up to 1 again.

    Args:
        shape: voxels along x, y, z.
        kernel_size: side of the window in voxels, on every scale.
        weights: exponent of each scale, finest first. The default is Wang's.
        options: what else `MultiScaleSSIM` takes, such as `data_range` and `kernel_type`.

    Raises:
        BundleError: if the window does not even fit into the finest scale.
    """
    scales = scales_that_fit(min(shape), kernel_size, len(weights))
    if scales == 0:
        raise BundleError(
            f"volumes of shape {tuple(shape)} are too small for MS-SSIM, whose window has {kernel_size} voxels a side"
        )
    kept = list(weights) if scales == len(weights) else [w / sum(weights[:scales]) for w in weights[:scales]]
    return MultiScaleSSIM(spatial_dims=3, kernel_size=kernel_size, weights=kept, **options)


def scales_that_fit(size: int, kernel_size: int, most: int) -> int:
    """How many scales, each half as large as the one before, a side of `size` voxels allows.

    The window must fit into the coarsest, and MONAI asks that it fits into size // (scales - 1)^2 as well.
    """
    fits = [n for n in range(1, most + 1) if min(size >> (n - 1), size // max(1, n - 1) ** 2) >= kernel_size]
    return max(fits, default=0)
