# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The template brought onto a head by a deformable registration: SyN on local correlation (Avants et al. 2008)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from scripts.preparation.registration import (
    Template,
    as_ants_image,
    deterministic_ants,
    resized_about,
    thinned,
    without_highlights,
    write_ants_map,
)
from scripts.volumes.scans import Scan

WARP_MM = 2.0
WARP_RADIUS = 2


def warped_onto(scan: Scan, scale: float, template: Template, maps: Iterable[Scan], seed: int = 1) -> list[np.ndarray]:
    """Maps on the template's grid, brought onto a prepared scan, linearly interpolated.

    Args:
        scan: a prepared head, rigidly on the template.
        scale: length in the head over length in the template, as preparation found it.
        template: what is warped.
        maps: what to bring over.
        seed: of ANTs, above 0.

    Returns:
        One array of the scan's shape for each map.
    """
    ants = deterministic_ants(seed)
    with tempfile.TemporaryDirectory() as folder:
        start = write_ants_map(resized_about(template.centre, 1.0 / scale), Path(folder) / "start.mat")
        found = ants.registration(
            fixed=as_ants_image(thinned(without_highlights(scan), WARP_MM)),
            moving=as_ants_image(thinned(template.head, WARP_MM)),
            type_of_transform="SyNOnly",
            initial_transform=[start],
            outprefix=f"{folder}/warp",
            syn_metric="CC",
            syn_sampling=WARP_RADIUS,
            reg_iterations=(60, 40, 15),
        )
        fixed = as_ants_image(scan)
        return [ants.apply_transforms(fixed, as_ants_image(m), found["fwdtransforms"]).numpy() for m in maps]
