# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Ventricular and brain volumes of prepared scans, measured where no table states them."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scripts.conditions.conditions import Conditions
from scripts.conditions.plausible import Plausible, why_impossible
from scripts.core.cells import present
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import is_absent
from scripts.measuring.tools import SegmentationTool, chosen_way
from scripts.preparation.steps import Record, TargetSpace
from scripts.volumes.head_size import Structures
from scripts.volumes.labels import QUANTITIES, belongs, by_stem, label_volumes, read_synthseg, stem
from scripts.volumes.nifti import as_stored, write_volume
from scripts.volumes.reading import SUFFIXES, Scan, has_suffix, read_codes
from scripts.volumes.scans import ScanError

LABELS_COLUMN = "labels"
BESIDE = ("_dseg", "_aseg", "_seg")


class VolumeMethod(ABC):
    """A way to the volumes of a scan."""

    @abstractmethod
    def measure(self, record: Record, space: TargetSpace) -> tuple[dict[str, float], Scan | None]:
        """Volumes by the names of the conditions, `ventricular_vol` and `brain_vol`, in mm3; and the labels, if any.

        The brain's is that of grey and white matter, normalised for the size of the head.

        Raises:
            BundleError: if they cannot be measured.
        """

    def reads(self, name: str, raw: Path, row: Mapping[str, str]) -> Path | None:
        """The file besides the scan itself that holds its labels; None if there is none. See `MeasureVolumes.reads`."""
        return None

    def check(self) -> None:  # noqa: B027 (most need no program)
        """Raise a `BundleError` if the program that it needs is not there; before the first scan."""

    def settings(self) -> dict[str, Any]:
        """Plain data on which the volumes depend."""
        return {}


class LabelsBeside(VolumeMethod):
    """Label maps in FreeSurfer's codes that lie beside the raw scans.

    Named by the table's column `labels`, relative to the scan's folder; else the scan's own name with `_dseg`, `_aseg`
    or `_seg` in place of `_T1w`, in NIfTI or MGH.
    """

    def measure(self, record: Record, space: TargetSpace) -> tuple[dict[str, float], Scan | None]:
        """See `VolumeMethod`."""
        found = self.reads(record.name, record.raw, record.row)
        if found is None:
            first = self._candidates(record.raw, record.row)[0].name
            raise ScanError("no label map", f"there is no label map beside {record.raw}, such as {first}")
        return normalised_for_head_size(label_volumes(found), str(found), record, space), None

    def settings(self) -> dict[str, Any]:
        """How brains are normalised."""
        return normalisation()

    def reads(self, name: str, raw: Path, row: Mapping[str, str]) -> Path | None:
        """The scan's label map."""
        return next((path for path in self._candidates(raw, row) if path.is_file()), None)

    def _candidates(self, raw: Path, row: Mapping[str, str]) -> list[Path]:
        named = present(row, LABELS_COLUMN)
        if named:
            return [raw.parent / named]
        name = stem(raw).removesuffix("_T1w")
        return [raw.with_name(f"{name}{word}{ending}") for word in BESIDE for ending in SUFFIXES]


class GivenVolumes(VolumeMethod):
    """Label maps in a folder, or a table of SynthSeg, told by the scans' names.

    Args:
        path: as `--segmentations` of the evaluation.

    Raises:
        BundleError: if it is neither.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(str(path))
        if self.path.is_file():
            self.table, self.maps = read_synthseg(self.path), {}
        elif self.path.is_dir():
            self.table, self.maps = {}, by_stem(self._files(), "segmentations")
        else:
            raise BundleError(f"--segmentations: there is no folder of label maps and no table {self.path}")

    def _files(self) -> list[Path]:
        files = sorted(file for file in self.path.rglob("*") if has_suffix(file))
        if not files:
            raise BundleError(f"--segmentations: the folder {self.path} holds no label map in NIfTI or MGH")
        return files

    def measure(self, record: Record, space: TargetSpace) -> tuple[dict[str, float], Scan | None]:
        """See `VolumeMethod`."""
        name = self._name(record.name, self.table or self.maps)
        found = self.table[name] if self.table else label_volumes(self.maps[name])
        where = f"{name} in {self.path}" if self.table else str(self.maps[name])
        return normalised_for_head_size(found, where, record, space), None

    def reads(self, name: str, raw: Path, row: Mapping[str, str]) -> Path | None:
        """The scan's label map in the folder; none where there is not one, which `measure` refuses."""
        fitting = self._fitting(name, self.maps)
        return self.maps[fitting[0]] if len(fitting) == 1 else None

    def _fitting(self, name: str, known: Mapping[str, Any]) -> list[str]:
        return [one for one in known if belongs(one, name) or belongs(one, name.removeprefix("sub-"))]

    def _name(self, name: str, known: Mapping[str, Any]) -> str:
        fitting = self._fitting(name, known)
        if len(fitting) != 1:
            raise ScanError("no label map", f"{self.path} has {len(fitting)} segmentations of {name}")
        return fitting[0]

    def settings(self) -> dict[str, Any]:
        """The table's hash, or the folder's name, and how brains are normalised."""
        table = file_hash(self.path) if self.path.is_file() else None
        return {"path": self.path.name, "sha256": table, **normalisation()}


class ByTool(VolumeMethod):
    """A program that segments the prepared volume: `synthseg` or `samseg`; its label map is kept in the dataset.

    Args:
        segmenter: the program.
    """

    def __init__(self, segmenter: SegmentationTool) -> None:
        self.segmenter = segmenter

    def measure(self, record: Record, space: TargetSpace) -> tuple[dict[str, float], Scan | None]:
        """See `VolumeMethod`."""
        with tempfile.TemporaryDirectory(prefix="segmented-") as folder:
            volume = Path(folder) / f"{record.name}.nii.gz"
            write_volume(volume, record.on_grid(), space.grid)
            self.segmenter.segment([volume], Path(folder))
            found = self.segmenter.label_map(volume, Path(folder))
            if not found.is_file():
                raise BundleError(f"{self.segmenter.name} wrote no label map of {record.name}")
            codes, affine = read_codes(found)
            labels, where = Scan(codes.astype(np.int16), affine), f"{self.segmenter.name}'s label map of {record.name}"
            return normalised_for_head_size(label_volumes(found), where, record, space), labels

    def check(self) -> None:
        """See `VolumeMethod`."""
        self.segmenter.program()

    def settings(self) -> dict[str, Any]:
        """The program's name, and how brains are normalised."""
        return {"segmenter": self.segmenter.name, **normalisation()}


class OwnSegmenter(VolumeMethod):
    """The bundle's own network; see `scripts.measuring.segmenter`."""

    def measure(self, record: Record, space: TargetSpace) -> tuple[dict[str, float], Scan | None]:
        """See `VolumeMethod`."""
        from scripts.measuring.segmenter import brain_volumes  # type: ignore[import-not-found] # reads weights when imported

        found = brain_volumes(as_stored(record.on_grid()), space.grid)
        return {name: found[f"{name}_mm3"] for name in QUANTITIES}, None

    def settings(self) -> dict[str, Any]:
        """The hash of the weights."""
        from scripts.measuring.segmenter import SHIPPED

        return {"weights_sha256": file_hash(SHIPPED) if SHIPPED.is_file() else None}


class MeasureVolumes:
    """The step that fills in the volumes that no table states; a scan that lacks none goes through unchanged.

    Args:
        space: the grid.
        conditions: those called `ventricular_vol` and `brain_vol` are measured.
        segment_with: name of a way in `ways`; None for none.
        segmentations: folder of label maps or table of SynthSeg, which then is the way.
        ways: name -> `VolumeMethod`.
        plausible: what a person can have; None for no limits.

    Raises:
        BundleError: if there is no way of that name, or both are given.
    """

    columns: ClassVar[Mapping[str, str]] = {"measured_volumes": "conditions that were measured, not read from a table"}

    def __init__(
        self,
        space: TargetSpace,
        conditions: Conditions,
        segment_with: Any,
        segmentations: Any,
        ways: Mapping[str, VolumeMethod],
        plausible: Plausible | None = None,
    ) -> None:
        self.space, self.plausible = space, plausible
        self.names = {c.raw: c.name for c in conditions if c.name in QUANTITIES}
        self.chosen = chosen_way(segment_with, segmentations, ways)
        given = None if is_absent(segmentations) else GivenVolumes(segmentations)
        self.way = given if self.chosen is None else ways[self.chosen]

    def reads(self, name: str, raw: Path, row: Mapping[str, str], lacking: Sequence[str]) -> Path | None:
        """The file besides the scan itself that a scan which lacks these conditions is measured by; None for none.

        Args:
            name: of the scan.
            raw: the scan's file.
            row: what the tables say of it, by column.
            lacking: raw names of the conditions that no table states of it.
        """
        wanted = self.way is not None and any(raw_name in self.measures for raw_name in lacking)
        return self.way.reads(name, raw, row) if self.way and wanted else None

    def check(self) -> None:
        """Whether the program is there that the way needs, before the first scan."""
        if self.way is not None:
            self.way.check()

    @property
    def measures(self) -> tuple[str, ...]:
        """Raw names of the conditions that are measured where they lack."""
        return tuple(self.names) if self.way else ()

    def __call__(self, record: Record) -> Record:
        """The record with its `covariates`.

        Raises:
            BundleError: if they cannot be measured, or no person has such volumes.
        """
        lacking = [raw for raw in record.lacking if raw in self.measures]
        if self.way is None or not lacking:
            return record
        volumes, labels = self.way.measure(record, self.space)
        found = {raw: round(volumes[self.names[raw]], 1) for raw in lacking}
        for raw, value in found.items():
            why = why_impossible(raw, value, self.plausible)
            if why:
                message = f"{raw} of {record.name} was measured as {value:g} mm3: {why}"
                raise ScanError(f"impossible {raw}", message)
        return replace(record.with_measured(measured_volumes=" ".join(lacking)), covariates=found, labels=labels)

    def settings(self) -> dict[str, Any]:
        """The way, and what it depends on."""
        return {"segment_with": self.chosen, **(self.way.settings() if self.way else {})}


def normalised_for_head_size(volumes: Structures, where: str, record: Record, space: TargetSpace) -> dict[str, float]:
    """The volumes of a head by the names of the conditions; see `scripts.volumes.head_size.normalised_brain`.

    The rigid motion onto the grid changes no volume, so that label maps of the raw and of the prepared scan give the
    same. The intracranial volume is that of the labels, if they have the fluid around the brain; else the bundle's own
    segmenter measures it in the prepared scan.

    Raises:
        BundleError: if the labels lack it, and there are no weights of the segmenter, or it finds no brain.
    """
    if volumes.intracranial is not None:
        return volumes.conditions(where)
    from scripts.measuring.segmenter import brain_volumes  # type: ignore[import-not-found] # reads weights when imported

    return volumes.conditions(where, brain_volumes(as_stored(record.on_grid()), space.grid)["intracranial_mm3"])


def normalisation() -> dict[str, Any]:
    """Plain data that stand for how the volumes of labels are normalised; 2.1.0 and before took the head's scale."""
    from scripts.measuring.segmenter import SHIPPED

    return {"normalised_by": "intracranial", "weights_sha256": file_hash(SHIPPED) if SHIPPED.is_file() else None}
