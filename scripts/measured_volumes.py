# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Volumes of structures by the bundle's own segmenter: of samples for volumetry, and of any folder with label maps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.atomic import make_folder
from scripts.conditions import Conditions
from scripts.devices import process_rank
from scripts.errors import BundleError
from scripts.grid import Grid
from scripts.metrics.features import wait_for_all_processes
from scripts.metrics.volumetry import Segmentations, requested_volumes, stem
from scripts.options import is_absent
from scripts.outlines import outlined
from scripts.samples import Samples
from scripts.segmentation import SegmentationTool, segmentations
from scripts.segmenter import INTRACRANIAL, SHIPPED, Segmenter, summarised
from scripts.tables import write_table
from scripts.values import Values, identity
from scripts.volume_folders import VolumeFolder
from scripts.volumes import UNREADABLE, write_labels, write_picture

logger = logging.getLogger(__name__)

OWN = "own"
"""What `--segment_with` calls the bundle's segmenter."""
FEWEST = 3
"""Volumes that a correlation needs."""
FACTS = {"segmentations": OWN, "brain_vol": "normalised"}
"""What a report says of volumes by the bundle's segmenter."""
SHIPPED_AGREEMENT = {"r on phantoms": "ventricles 1.00, brain 0.98"}
"""Of the weights that ship, as measured in docs/segmenter.md."""
MEASURED = {"ventricular_vol": "ventricular_vol_mm3", "brain_vol": "brain_vol_mm3"}
"""Names of conditions -> of `scripts.segmenter.brain_volumes`."""
OBLIQUE = 1e-3
"""Largest share of a voxel's side by which an axis may lean."""


def grid_of(path: Path) -> Grid:
    """The grid of a volume's file.

    Raises:
        BundleError: if it cannot be read, or its axes are not those of the world.
    """
    try:
        image: Any = nib.load(path)
        affine = np.asarray(image.affine, np.float64)
    except UNREADABLE as error:
        raise BundleError(f"cannot read the volume {path}: it is damaged, cut short or no image ({error})") from error
    steps = np.diag(affine)[:3]
    if np.abs(affine[:3, :3] - np.diag(steps)).max() > OBLIQUE * np.abs(affine[:3, :3]).max():
        raise BundleError(f"the axes of {path} are not left-right, back-front and up-down: prepare the scan first")
    return Grid(image.shape, steps.tolist(), affine[:3, 3].tolist())


class MeasuredVolumes:
    """The volumes of structures in the files of a folder, kept by the hashes of file and weights.

    Args:
        folder: the files.
        segmenter: makes the segmenter, when it is first needed.
        values: where the numbers are kept.
    """

    def __init__(self, folder: VolumeFolder, segmenter: Callable[[], Segmenter], values: Values) -> None:
        self.folder, self._make, self.values = folder, segmenter, values

    @cached_property
    def segmenter(self) -> Segmenter:
        """What measures."""
        return self._make()

    @cached_property
    def what(self) -> str:
        """What the numbers are of."""
        return identity("structures", self.segmenter, weights=self.segmenter.sha256, amp=str(self.segmenter.amp))

    def known(self, index: int) -> dict[str, float] | None:
        """Volume in mm3 of each class in file number `index`; None if it was not measured yet."""
        numbers = self.values.get(self.what, self.folder.hashes[index])
        return None if numbers is None else dict(zip(INTRACRANIAL, numbers))

    def measure(self, index: int, label_map: Path | None = None) -> None:
        """Segment file number `index` and keep its volumes; if a path is given, write label map and picture.

        Raises:
            BundleError: if the file cannot be read, or lies on no grid whose axes are the world's.
        """
        grid, volume = grid_of(self.folder.paths[index]), self.folder[index][0]
        shares = self.segmenter.shares(volume, grid)
        if label_map is not None:
            labels = self.segmenter.labels(shares, grid)
            picture = make_folder(label_map.parent / "figures") / f"{stem(self.folder.paths[index])}.png"
            write_picture(picture, outlined(volume[0].numpy(), labels))
            write_labels(label_map, labels, grid)
        volumes = self.segmenter.volumes(shares, grid)
        self.values.add(self.what, [self.folder.hashes[index]], [volumes[name] for name in INTRACRANIAL])

    def complete(self, label_map: Callable[[int], Path] | None = None) -> None:
        """Measure what is not known, and write label maps that are not there; under torchrun, each process its share.

        Args:
            label_map: where that of a file goes; None for no label maps.
        """
        rank, processes = process_rank()
        mine = range(len(self.folder))[rank::processes]
        missing = [i for i in mine if self.known(i) is None or (label_map is not None and not label_map(i).is_file())]
        for index in tqdm(missing, "segmenting", unit="volume", disable=None):
            self.measure(index, None if label_map is None else label_map(index))
        wait_for_all_processes()
        self.values.reload()

    def rows(self) -> list[dict[str, float]]:
        """What `scripts.segmenter.summarised` makes of each file; zeros, with a warning, where there is no brain."""
        found = []
        for index in range(len(self.folder)):
            volumes = self.known(index)
            assert volumes is not None
            try:
                found.append({**summarised(volumes), **{f"{name}_mm3": v for name, v in volumes.items()}})
            except BundleError:
                logger.warning(f"{self.folder.paths[index]} shows no brain: its volumes are 0")
                found.append(
                    dict.fromkeys(["ventricular_vol_mm3", "brain_vol_mm3", "brain_mm3", "intracranial_mm3"], 0.0)
                )
        return found


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
        if any(self.measurement.known(index) is None for index in range(len(self.measurement.folder))):
            self.prepare()
        rows = self.measurement.rows()
        return {name: {key: row[column] for key, column in MEASURED.items()} for name, row in zip(self.names(), rows)}


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
        path, segment_with, segmenters, samples, output_dir: see `scripts.segmentation.segmentations`; `own`, the
            default of `--segment_with`, stands back where `path` is given.
        own: what the bundle's segmenter measures.

    Raises:
        BundleError: as `segmentations`, or if `segment_with` is no name of one.
    """
    named = str(segment_with).strip()
    if named == OWN:
        return own if path is None else segmentations(path, None, segmenters, samples, output_dir)
    if not is_absent(segment_with) and named not in segmenters:
        raise BundleError(f"--segment_with: there is no '{named}'; there are {', '.join([OWN, *segmenters])}")
    return segmentations(path, segment_with, segmenters, samples, output_dir)


def segment_folder(
    folder: VolumeFolder, segmenter: Callable[[], Segmenter], values: Values, output_dir: str | os.PathLike
) -> None:
    """The verb `segment`: a label map `NAME_dseg.nii.gz` of each volume of a folder, pictures, and `volumes.tsv`.

    What is there already stays; under torchrun each process segments its share.

    Args:
        folder: the volumes.
        segmenter, values: see `MeasuredVolumes`.
        output_dir: where to write; not within the folder.

    Raises:
        BundleError: if no folder is given, two volumes have one name, or the label maps would lie among the volumes.
    """
    if folder.folder is None:
        raise BundleError(f"there is nothing to segment: give --{folder.flag} FOLDER")
    output = Path(str(output_dir))
    if output.resolve().is_relative_to(folder.folder.resolve()):
        raise BundleError(f"--output_dir {output} lies in --{folder.flag} {folder.folder}: give another")
    names = [stem(path) for path in folder.paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BundleError(f"two volumes in {folder.folder} are called {twice}, and so would be their label maps")
    make_folder(output)
    measurement = MeasuredVolumes(folder, segmenter, values)
    measurement.complete(lambda index: output / f"{names[index]}_dseg.nii.gz")
    if process_rank()[0] == 0:
        rows = [{key: round(value, 1) for key, value in row.items()} for row in measurement.rows()]
        table = output / "volumes.tsv"
        write_table(table, [{"volume": folder.name(i), **row} for i, row in enumerate(rows)])
        logger.info(f"wrote {len(rows)} label maps and {table}")
