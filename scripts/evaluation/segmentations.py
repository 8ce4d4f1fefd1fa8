# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the volumes of structures in samples come from: label maps, SynthSeg's table, a tool, or the own segmenter."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.compute.kept import Values, complete
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import make_folder
from scripts.core.inputs import Input
from scripts.evaluation.samples import Samples, several
from scripts.evaluation.stated_conditions import requested_volumes
from scripts.measuring.measured import MeasuredVolumes
from scripts.measuring.segmenter import SHIPPED, Segmenter
from scripts.measuring.tools import SegmentationTool, chosen_way
from scripts.volumes.folders import VolumeFolder, find_volumes
from scripts.volumes.head_size import Structures
from scripts.volumes.labels import belongs, by_stem, label_volumes, read_synthseg, stem
from scripts.volumes.reading import read_codes

logger = logging.getLogger(__name__)

OWN = "own"
"""What `--segment_with` calls the bundle's segmenter."""
FEWEST = 3
"""Volumes that a correlation needs."""
NORMALISED = "normalised"
"""What a report says of brain volumes that are."""
FACTS = {"segmentations": OWN, "brain_vol": NORMALISED}
"""What a report says of volumes by the bundle's segmenter."""
SHIPPED_AGREEMENT = {"r on phantoms": "ventricles 1.00, brain 0.98"}
"""Of the weights that ship, as measured in docs/segmenter.md."""
MEASURED = {"ventricular_vol": "ventricular_vol_mm3", "brain_vol": "brain_vol_mm3"}
"""Names of conditions -> of `scripts.measuring.segmenter.brain_volumes`."""


class Segmentations(Input):
    """Where the volumes of the structures come from.

    Args:
        path: a folder of label maps in FreeSurfer's or SynthSeg's codes, or the `.csv` of volumes that SynthSeg
            writes; None if none was given.
        flag: the command-line flag that gives it, for messages.

    Raises:
        BundleError: if it is neither.
    """

    def __init__(self, path: Any, flag: str = "segmentations") -> None:
        self.flag = flag
        self.path = None if path is None else Path(str(path))
        self.scale = NORMALISED
        if self.path is not None and not (self.path.is_dir() or self.path.is_file()):
            raise BundleError(f"--{flag}: there is no folder of label maps and no table {self.path}")

    @property
    def requested(self) -> bool:
        """Whether one was given."""
        return self.path is not None

    def of(self, folder: VolumeFolder) -> Segmentations:
        """Those of one model's volumes: these, where there is one model."""
        return self

    def facts(self) -> dict[str, Any]:
        """Where the numbers come from, for the report."""
        return {"segmentations": str(self.path), "brain_vol": self.scale}

    def prepare(self) -> None:
        """Nothing: they are there."""

    def names(self) -> list[str] | None:
        """Names of the segmentations that are there; None where a tool is yet to make them."""
        assert self.path is not None
        if self.path.is_file():
            return list(read_synthseg(self.path))
        return list(by_stem(find_volumes(self.path, self.flag), self.flag))

    def measured(self) -> dict[str, dict[str, float]]:
        """Name of each segmented volume -> the volumes of its structures in mm3, by name of the condition.

        Raises:
            BundleError: if a label map or the table cannot be used.
        """
        assert self.path is not None
        if self.path.is_file():
            return self.normalised(read_synthseg(self.path))
        maps = by_stem(find_volumes(self.path, self.flag), self.flag)
        bar = tqdm(maps.items(), "label maps", unit="volume", disable=None)
        found = {name: label_volumes(path) for name, path in bar}
        return self.normalised(found)

    def normalised(self, found: Mapping[str, Structures]) -> dict[str, dict[str, float]]:
        """Volumes by name of the condition, brains normalised for head size where all segmentations allow it.

        Where one lacks the fluid around the brain none is normalised, and a warning says so. NaN stands for what an
        intracranial volume makes impossible.
        """
        lacking = [name for name, one in found.items() if one.intracranial is None]
        if lacking:
            self.scale = "not normalised"
            logger.warning(
                f"{len(lacking)} segmentations lack the fluid around the brain, {lacking[0]} the first: brain volumes "
                "are not normalised for head size, as those that were asked for are"
            )
            return {name: {"ventricular_vol": one.ventricles, "brain_vol": one.brain} for name, one in found.items()}
        return {name: _possible(name, one) for name, one in found.items()}


def _possible(name: str, volumes: Structures) -> dict[str, float]:
    try:
        return volumes.conditions(name)
    except BundleError as error:
        logger.warning(str(error))
        return {"ventricular_vol": volumes.ventricles, "brain_vol": float("nan")}


def segmentation_of_each(
    volumes: Sequence[str], segmentations: Sequence[str], folder: str = "--synthetic_dir"
) -> dict[str, str]:
    """Name of each volume -> name of the segmentation that belongs to it.

    Args:
        volumes, segmentations: their names.
        folder: of the volumes, for messages.

    Raises:
        BundleError: if a volume has none or several, or a segmentation belongs to no volume.
    """
    found: dict[str, str] = {}
    for segmentation in segmentations:
        owners = [volume for volume in volumes if belongs(segmentation, volume)]
        if not owners:
            raise BundleError(f"the segmentation {segmentation} belongs to no volume of {folder}")
        owner = max(owners, key=len)
        if owner in found:
            raise BundleError(f"two segmentations belong to {owner}: {found[owner]} and {segmentation}")
        found[owner] = segmentation
    lacking = [volume for volume in volumes if volume not in found]
    if lacking:
        raise BundleError(f"{len(lacking)} volumes of {folder} have no segmentation, {lacking[0]} the first")
    return found


class SegmentedNow(Segmentations):
    """Segmentations that a tool makes of a folder's volumes, where they are not there yet.

    A label map counts as there if it can be read and is not older than its volume. Under torchrun, each process has
    its share of the volumes segmented.

    Args:
        tool: what makes them.
        folder: the volumes.
        output_dir: where the label maps go.

    Raises:
        BundleError: if the label maps would lie among the volumes.
    """

    def __init__(self, tool: SegmentationTool, folder: VolumeFolder, output_dir: str | os.PathLike) -> None:
        super().__init__(None)
        self.tool, self.folder, self.path = tool, folder, Path(str(output_dir))
        if folder.folder is not None and self.path.resolve().is_relative_to(folder.folder.resolve()):
            raise BundleError(
                f"--segmentation_dir {self.path} lies in --{folder.flag} {folder.folder}: its label maps would be "
                "taken for volumes; give another"
            )

    def names(self) -> None:
        """See `Segmentations`."""

    def prepare(self, alone: bool = False) -> None:
        """Segment what has no label map yet.

        Args:
            alone: see `scripts.compute.kept.complete`.

        Raises:
            BundleError: as `SegmentationTool.segment`, or if a label map was not written.
        """
        assert self.path is not None
        make_folder(self.path)
        complete(f"label maps by {self.tool.name}", self.folder.paths, self._is_segmented, self._segment, alone=alone)

    def _is_segmented(self, volume: Path) -> bool:
        assert self.path is not None
        return _is_done(self.tool.label_map(volume, self.path), volume)

    def _segment(self, missing: list[Path]) -> None:
        assert self.path is not None
        self.tool.segment(missing, self.path)
        for volume in missing:
            if not self.tool.label_map(volume, self.path).is_file():
                raise BundleError(f"{self.tool.name} wrote no label map of {volume}: see the .log in {self.path}")

    def measured(self) -> dict[str, dict[str, float]]:
        """See `Segmentations`: from the tool's own table where it has all volumes, else from the label maps.

        Raises:
            BundleError: as `prepare`, or if a label map or the table cannot be used.
        """
        assert self.path is not None
        self.prepare(alone=True)
        names, table = [stem(volume) for volume in self.folder.paths], self.tool.table(self.path)
        if table is not None and table.is_file():
            rows = read_synthseg(table)
            if set(names) <= rows.keys():
                return self.normalised({name: rows[name] for name in names})
            logger.info(f"{table} has not all volumes: they are taken from the label maps")
        return self.normalised({name: label_volumes(self.tool.label_map(Path(name), self.path)) for name in names})


def _is_done(label_map: Path, volume: Path) -> bool:
    if not label_map.is_file() or label_map.stat().st_mtime < volume.stat().st_mtime:
        return False
    try:
        read_codes(label_map)
    except BundleError:
        return False
    return True


class OwnSegmentations(Segmentations):
    """Volumes that the bundle's own segmenter measures in samples.

    They count as asked for where they can be measured and compared: three samples or more whose conditions are known.

    Args:
        segmenter, values: see `MeasuredVolumes`.
        conditions: which are known.
        path: weights of the segmenter; None for those that ship.
        folder: the samples of one model; see `of`.

    Raises:
        BundleError: if weights were given that are not there.
    """

    def __init__(
        self,
        segmenter: Callable[[], Segmenter],
        values: Values,
        conditions: Conditions,
        path: Any = None,
        folder: VolumeFolder | None = None,
    ) -> None:
        super().__init__(None)
        self._make, self.values, self.conditions, self.folder = segmenter, values, conditions, folder
        self.weights = SHIPPED if path is None else Path(str(path))
        if self.weights != SHIPPED and not self.weights.is_file():
            raise BundleError(
                f"--segmenter_path: there are no weights of a segmenter at {path}: leave it out for those that ship, "
                "or train some with configs/train_segmenter.yaml"
            )

    def of(self, folder: VolumeFolder) -> Segmentations:
        """Those of one model's samples."""
        return OwnSegmentations(self._make, self.values, self.conditions, self.weights, folder)

    @property
    def requested(self) -> bool:
        """Whether there are weights, and samples with known conditions, enough of them for a correlation."""
        return self.folder is not None and self.folder.requested and not self.why_not

    @cached_property
    def why_not(self) -> str:
        """Why samples that are there are not measured; empty where they are, and where there are none."""
        if self.folder is None or not self.folder.requested:
            return ""
        reason = self._reason(self.folder)
        if reason:
            logger.info(f"no volumetry of --{self.folder.flag}: {reason}")
        return reason

    def _reason(self, folder: VolumeFolder) -> str:
        if not self.weights.is_file():
            return f"there are no weights of a segmenter at {self.weights}"
        try:
            known = requested_volumes(folder, self.conditions)
        except BundleError as error:
            return str(error)
        return f"it needs {FEWEST} volumes" if len(known) < FEWEST else ""

    @cached_property
    def measurement(self) -> MeasuredVolumes:
        """The samples' volumes."""
        assert self.folder is not None
        return MeasuredVolumes(self.folder, self._make, self.values)

    def facts(self) -> dict[str, Any]:
        """What measured: the hash of the weights, and that brains are normalised for head size."""
        agreement = SHIPPED_AGREEMENT if self.weights == SHIPPED else {}
        return {**FACTS, **agreement, "weights_sha256": self.measurement.segmenter.sha256}

    def names(self) -> list[str]:
        """See `Segmentations`: those of the samples."""
        return [stem(path) for path in self.measurement.folder.paths]

    def prepare(self) -> None:
        """Measure what is not known yet."""
        self.measurement.complete()

    def measured(self) -> dict[str, dict[str, float]]:
        """See `Segmentations`; `brain_vol` is normalised for head size, as the condition is."""
        self.measurement.complete(alone=True)
        rows = self.measurement.rows()
        return {name: {key: row[column] for key, column in MEASURED.items()} for name, row in zip(self.names(), rows)}


class OfModels(Segmentations):
    """Segmentations of several models' samples.

    Args:
        parts: the samples of each model, and their segmentations.
    """

    def __init__(self, parts: Sequence[tuple[VolumeFolder, Segmentations]]) -> None:
        super().__init__(None)
        self.parts = parts

    def of(self, folder: VolumeFolder) -> Segmentations:
        """Those of one model's samples."""
        return next(part for owner, part in self.parts if owner is folder)


def chosen_segmentations(
    path: Any,
    segment_with: Any,
    segmenters: Mapping[str, SegmentationTool],
    samples: Samples,
    output_dir: str,
    own: OwnSegmentations,
) -> Segmentations:
    """Those of `--segmentations`; else those of `--segment_with`, which is the bundle's own segmenter or a tool.

    Args:
        path: see `Segmentations`; of several models one each, separated by commas or as a list in the order of the
            models, or a map from their names, or one folder with a folder for each model by its name.
        segment_with: `own`, which stands back where `path` is given, the name of a tool, or None.
        segmenters: the tools, by name.
        samples: of the models.
        output_dir: where label maps go; those of several models into folders by their names.
        own: what the bundle's segmenter measures.

    Raises:
        BundleError: if both are given, the tool is not known, or segmentations are not one for each model.
    """
    way = chosen_way(segment_with, path, [OWN, *segmenters], default=OWN)
    if way == OWN:
        return own
    if way is None:
        paths = _paths(path, list(samples.sets))
        return _of_each(samples, {model: Segmentations(paths[model]) for model in samples.sets})
    folders = {model: features.folder for model, features in samples.sets.items()}
    tool, output = segmenters[way], Path(str(output_dir))
    return _of_each(samples, {model: SegmentedNow(tool, folder, output / model) for model, folder in folders.items()})


def _of_each(samples: Samples, found: Mapping[str, Segmentations]) -> Segmentations:
    if len(found) == 1:
        return next(iter(found.values()))
    return OfModels([(features.folder, found[model]) for model, features in samples.sets.items()])


def _paths(path: Any, models: Sequence[str]) -> dict[str, Any]:
    """Model -> what was given for it."""
    if isinstance(path, Mapping):
        paths = {str(model): part for model, part in path.items()}
    else:
        parts = several(path)
        if len(parts) == 1 and len(models) > 1 and Path(parts[0]).is_dir():
            parts = [str(Path(parts[0]) / model) for model in models]
        paths = dict(zip(models, parts)) if len(parts) == len(models) else {}
    if path is not None and paths.keys() != set(models):
        raise BundleError(f"--segmentations {path} is not one for each model: {', '.join(models)}")
    return {model: paths.get(model) for model in models}
