# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Correction of the slow change of brightness across a scan that the receiving coils cause."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from scripts.preparation.registration import as_ants_image, deterministic_ants, foreground, thinned
from scripts.volumes.scans import Scan

FIELD_MM = 6.0
ITERATIONS = (40, 30, 20)


def without_bias_field(scan: Scan, seed: int = 1) -> Scan:
    """The scan divided by its bias field, as N4 estimates it (Tustison et al. 2010).

    The field is fitted to what is brighter than the background of the scan thinned to 6 mm, where it is as smooth as
    before, and interpolated linearly. It is 1 on average (geometrically) in this foreground.

    Args:
        scan: intensities of at least 0 in the head.
        seed: of ANTs, which with one thread makes the result the same each time.
    """
    field = bias_field(scan, seed)
    to_field = np.linalg.inv(field.affine) @ scan.affine
    fine = ndimage.affine_transform(
        field.data, to_field[:3, :3], to_field[:3, 3], scan.data.shape, order=1, mode="nearest"
    )
    return Scan((scan.data / fine).astype(np.float32), scan.affine)


def bias_field(scan: Scan, seed: int = 1) -> Scan:
    """The field by which the true brightness was multiplied, at 6 mm; positive, its geometric mean in the head 1."""
    ants = deterministic_ants(seed)
    coarse = thinned(scan, FIELD_MM)
    inside = foreground(coarse.data)
    positive = Scan(np.maximum(coarse.data, 0.0), coarse.affine)
    found = ants.n4_bias_field_correction(
        as_ants_image(positive),
        mask=as_ants_image(Scan(inside.astype(np.float32), coarse.affine)),
        shrink_factor=1,
        convergence={"iters": list(ITERATIONS), "tol": 1e-5},
        return_bias_field=True,
    ).numpy()
    return Scan((found / np.exp(np.log(found[inside]).mean())).astype(np.float32), coarse.affine)
