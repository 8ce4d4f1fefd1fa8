# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Label maps and measured volumes of samples, and the rule by which a sample is accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import are_whole, fingerprints, read_json, write_json
from scripts.core.options import number
from scripts.measuring.segmenter import COLUMNS, Segmenter, summarised
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import read_volume, write_labels

Measures = Mapping[str, float] | None
"""Volumes in mm3 by the names of `COLUMNS`; None of a volume without a brain."""


class Labeller:
    """Segments samples: each gets a label map in FreeSurfer's codes beside it, and its volumes.

    Args:
        segmenter: makes the segmenter when it is first needed.
        grid: of the samples.
    """

    def __init__(self, segmenter: Callable[[], Segmenter], grid: Grid) -> None:
        self._make, self.grid = segmenter, grid

    @cached_property
    def segmenter(self) -> Segmenter:
        """What segments."""
        return self._make()

    def facts(self) -> dict[str, Any]:
        """What decides label maps and volumes."""
        return {"sha256": self.segmenter.sha256, "amp": str(self.segmenter.amp)}

    def label(self, stem: str) -> Measures:
        """The volumes of the sample `stem`.nii.gz, whose label map `stem`_dseg.nii.gz is written if it is not there.

        Raises:
            BundleError: if a file cannot be read or written.
        """
        volume, labels, kept = (Path(f"{stem}{ending}") for ending in (".nii.gz", "_dseg.nii.gz", "_measured.json"))
        known = read_json(kept)
        if known and are_whole(volume.parent, known.get("files")):
            return known["measured"]
        shares = self.segmenter.shares(read_volume(volume, self.grid.shape), self.grid)
        write_labels(labels, self.segmenter.labels(shares, self.grid), self.grid)
        measured = self._volumes(shares)
        write_json(kept, {"measured": measured, "files": fingerprints([volume, labels])})
        return measured

    def _volumes(self, shares: Any) -> Measures:
        try:
            found = summarised(self.segmenter.volumes(shares, self.grid))
        except BundleError:  # there is no brain
            return None
        return {name: round(value, 1) for name, value in found.items()}


class AcceptanceRule:
    """By which samples are kept: measured volumes within a share of what was asked for.

    Args:
        stated: raw name of a measured condition -> largest relative difference, such as 0.1; None keeps all.
        conditions: what is asked for.

    Raises:
        BundleError: for a name that is not asked for or not measured, or a share that is not above 0.
    """

    def __init__(self, stated: Any, conditions: Conditions) -> None:
        measured = [c.raw for c in conditions if c.raw in COLUMNS]
        if not isinstance(stated, (Mapping, type(None))):
            raise BundleError(f"--accept must be a map such as {{'ventricular_vol_mm3':0.1}}, got {stated!r}")
        for name in stated or {}:
            if name not in measured:
                raise BundleError(
                    f"--accept: '{name}' is none of what is asked for and measured: {', '.join(measured)}"
                )
        self.stated = {name: number(share, f"accept::{name}", 1e-6) for name, share in (stated or {}).items()}

    def accepts(self, asked: Mapping[str, Any], measured: Measures) -> bool:
        """Whether a sample may stay.

        Args:
            asked: raw names -> raw values.
            measured: see `Labeller.label`.
        """
        return all(
            measured is not None and abs(measured[name] - asked[name]) <= share * abs(asked[name])
            for name, share in self.stated.items()
        )
