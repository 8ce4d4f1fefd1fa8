# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Label maps and measured volumes of samples, for whoever writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from scripts.compute.ownership import LABEL_MAP
from scripts.core.errors import BundleError
from scripts.core.options import yes_or_no
from scripts.measuring.segmenter import COLUMNS, Segmenter, summarised
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import read_volume, write_labels

MEASURED, LABELLED_BY = "measured", "labels"
"""Keys of a sidecar: the volumes by name, and what measured them."""
IMAGE = "_T1w"
Measures = Mapping[str, float] | None
"""Volumes in mm3 by the names of `scripts.measuring.segmenter.COLUMNS`; None of a volume without a brain."""


class Labeller:
    """Segments samples: each gets a label map in FreeSurfer's codes beside it, and its volumes.

    Args:
        segmenter: makes the segmenter when it is first needed.
        grid: of the samples.
    """

    def __init__(self, segmenter: Callable[[], Segmenter], grid: Grid) -> None:
        self._make, self.grid, self._lock = segmenter, grid, Lock()

    @cached_property
    def segmenter(self) -> Segmenter:
        """What segments."""
        return self._make()

    def facts(self) -> dict[str, Any]:
        """What decides label maps and volumes."""
        return {"sha256": self.segmenter.sha256, "amp": str(self.segmenter.amp)}

    def label(self, stem: str) -> Measures:
        """The volumes of the sample `stem`.nii.gz, whose label map is written: see `label_map_of`.

        Several threads may ask; one at a time is served.

        Raises:
            BundleError: if a file cannot be read or written.
        """
        volume = read_volume(f"{stem}.nii.gz", self.grid.shape)
        with self._lock:
            shares = self.segmenter.shares(volume, self.grid)
        write_labels(label_map_of(stem), self.segmenter.labels(shares, self.grid), self.grid)
        try:
            found = summarised(self.segmenter.volumes(shares, self.grid))
        except BundleError:  # there is no brain
            return None
        return {name: round(value, 1) for name, value in found.items()}


def label_map_of(stem: str) -> Path:
    """Where the label map of the sample `stem`.nii.gz lies: in BIDS it is called by the same head, without `T1w`."""
    return Path(f"{stem.removesuffix(IMAGE)}{LABEL_MAP}")


def choose_labeller(labels: Any, segmenter: Callable[[], Segmenter], grid: Grid) -> Labeller | None:
    """What labels samples, where `labels` is 1.

    Args:
        labels: 1 or 0.
        segmenter, grid: see `Labeller`.

    Raises:
        BundleError: for other `labels`.
    """
    return Labeller(segmenter, grid) if yes_or_no(labels, "labels") else None


def measured_columns(measured: Measures) -> dict[str, float | None]:
    """Measured volumes as columns beside those asked for: `measured_ventricular_vol_mm3` and the like."""
    return {f"measured_{name}": (measured or {}).get(name) for name in COLUMNS}
