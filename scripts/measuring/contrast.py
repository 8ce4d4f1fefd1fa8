# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a prepared head is T1-weighted: by its likeness to the T1-weighted template that it was registered to."""

from __future__ import annotations

import os
from functools import cache

import numpy as np
from scipy import ndimage

from scripts.core.errors import BundleError
from scripts.core.paths import SHIPPED_MODELS
from scripts.volumes.grid import Grid
from scripts.volumes.placing import read_on_grid

TEMPLATE, BRAIN = (
    SHIPPED_MODELS / "template" / f"tpl-MNI152NLin2009cAsym_res-01_{kind}.nii.gz" for kind in ("T1w", "desc-brain_mask")
)
COARSE = Grid((54, 75, 54), (-3.0, 3.0, 3.0), (79.5, -124.5, -59.5))
SMOOTHING_VOXELS = 2.0
LEAST_CORRELATION = 0.3
"""Of 105 real heads and phantoms the least alike has 0.35; turned from bright to dark, all but one have below 0.3."""


@cache
def _template() -> tuple[np.ndarray, np.ndarray]:
    """The smoothed template, and where its brain is."""
    smooth = ndimage.gaussian_filter(read_on_grid(TEMPLATE, COARSE), SMOOTHING_VOXELS)
    return smooth, read_on_grid(BRAIN, COARSE, mode="nearest") > 0


def likeness_to_template(path: str | os.PathLike) -> float:
    """Correlation of a volume with the template in its brain, both smoothed by 6 mm so that folds do not count.

    Raises:
        BundleError: if the volume cannot be read.
    """
    template, brain = _template()
    volume = ndimage.gaussian_filter(read_on_grid(path, COARSE), SMOOTHING_VOXELS)[brain]
    return float(np.corrcoef(volume, template[brain])[0, 1]) if np.ptp(volume) > 0 else 0.0


def check_t1_weighted(path: str | os.PathLike) -> None:
    """Refuse a volume that is no T1-weighted head in the template's place.

    Raises:
        BundleError: naming it, or if it cannot be read.
    """
    found = likeness_to_template(path)
    if found < LEAST_CORRELATION:
        raise BundleError(
            f"{path} is not like the T1-weighted template (correlation {found:.2f}, and {LEAST_CORRELATION} is the "
            "least): is it of another contrast, or not registered? Prepare the T1-weighted scan (configs/prepare.yaml)"
        )
