# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes of structures in the files of a folder by the bundle's own segmenter, and label maps of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from scripts.compute.counting import counted
from scripts.compute.devices import process_rank
from scripts.compute.kept import Values, complete, identity
from scripts.conditions.plausible import Plausible, why_impossible
from scripts.core.errors import BundleError
from scripts.core.files import make_folder
from scripts.core.tables import write_table
from scripts.measuring.outlines import outlined
from scripts.measuring.segmenter import COLUMNS, INTRACRANIAL, Segmenter, summarised, thinned
from scripts.measuring.tissue import TISSUE, VERSION, tissue_numbers
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.labels import stem
from scripts.volumes.nifti import write_labels, write_picture

logger = logging.getLogger(__name__)


class MeasuredVolumes:
    """The volumes of structures in the files of a folder, kept by the hashes of file and weights.

    Args:
        folder: the files.
        segmenter: makes the segmenter, when it is first needed.
        values: where the numbers are kept.
        tissue: whether contrasts of tissues are measured too, on the same label maps.
    """

    def __init__(
        self, folder: VolumeFolder, segmenter: Callable[[], Segmenter], values: Values, tissue: bool = False
    ) -> None:
        self.folder, self._make, self.values, self._with_tissue = folder, segmenter, values, tissue

    @cached_property
    def segmenter(self) -> Segmenter:
        """What measures."""
        return self._make()

    @cached_property
    def what(self) -> str:
        """What the volumes are of."""
        return self._identity("structures")

    def _identity(self, name: str, **facts: int) -> str:
        return identity(name, self.segmenter, weights=self.segmenter.sha256, amp=str(self.segmenter.amp), **facts)

    def known(self, index: int) -> dict[str, float] | None:
        """Volume in mm3 of each class in file number `index`; None if it was not measured yet."""
        numbers = self.values.get(self.what, self.folder.hashes[index])
        return None if numbers is None else dict(zip(INTRACRANIAL, numbers))

    @cached_property
    def what_tissue(self) -> str:
        """What the contrasts are of."""
        return self._identity("tissue", tissue=VERSION)

    def tissue(self, index: int) -> dict[str, float] | None:
        """`tissue_numbers` of file number `index`; None if they were not measured yet."""
        numbers = self.values.get(self.what_tissue, self.folder.hashes[index])
        return None if numbers is None else dict(zip(TISSUE, numbers))

    def measure(self, index: int, label_map: Path | None = None) -> None:
        """Segment file number `index` and keep its volumes; if a path is given, write label map and picture.

        Raises:
            BundleError: if the file cannot be read, or lies on no grid whose axes are the world's.
        """
        grid, volume = self.folder.grid_of(index), self.folder[index][0]
        shares = self.segmenter.shares(volume, grid)
        if label_map is not None:
            labels = self.segmenter.labels(shares, grid)
            picture = make_folder(label_map.parent / "figures") / f"{stem(self.folder.paths[index])}.png"
            write_picture(picture, outlined(volume[0].numpy(), labels))
            write_labels(label_map, labels, grid)
        volumes = self.segmenter.volumes(shares, grid)
        self.values.add(self.what, [self.folder.hashes[index]], [volumes[name] for name in INTRACRANIAL])
        if self._with_tissue:
            step = self.segmenter.spacing
            found = tissue_numbers(thinned(volume, grid, step)[0].numpy(), shares.numpy(), step)
            self.values.add(self.what_tissue, [self.folder.hashes[index]], [found[name] for name in TISSUE])

    def complete(self, label_map: Callable[[int], Path] | None = None, alone: bool = False) -> None:
        """Measure what is not known, and write label maps that are not there; under torchrun, each process its share.

        Args:
            label_map: where that of a file goes; None for no label maps.
            alone: see `scripts.compute.kept.complete`.
        """

        def is_done(index: int) -> bool:
            measured = self.known(index) is not None and (not self._with_tissue or self.tissue(index) is not None)
            return measured and (label_map is None or label_map(index).is_file())

        def measure(missing: list[int]) -> None:
            for index in counted(missing, "segmenting", unit="volume"):
                self.measure(index, None if label_map is None else label_map(index))

        label = f"segmented volumes of {self.folder.flag}"
        complete(label, range(len(self.folder)), is_done, measure, self.values, alone)

    def rows(self) -> list[dict[str, float]]:
        """What `scripts.measuring.segmenter.summarised` makes of each file; NaN, said in a warning, without a brain."""
        found = []
        for index in range(len(self.folder)):
            volumes = self.known(index)
            assert volumes is not None
            try:
                found.append({**summarised(volumes), **{f"{name}_mm3": v for name, v in volumes.items()}})
            except BundleError:
                logger.warning(f"{self.folder.paths[index]} shows no brain: its volumes are not known")
                found.append(dict.fromkeys(COLUMNS, float("nan")))
        return found


def segment_folder(
    folder: VolumeFolder,
    segmenter: Callable[[], Segmenter],
    values: Values,
    output_dir: str | os.PathLike,
    plausible: Plausible | None = None,
) -> None:
    """The verb `segment`: a label map `NAME_dseg.nii.gz` of each volume of a folder, pictures, and `volumes.tsv`.

    Volumes that no person can have are `n/a` in the table, with a warning. What is there already stays; under torchrun
    each process segments its share.

    Args:
        folder: the volumes.
        segmenter, values: see `MeasuredVolumes`.
        output_dir: where to write; not within the folder.
        plausible: lowest and highest volume that a person can have, by column.

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
        table, found = output / "volumes.tsv", measurement.rows()
        rows = [{"volume": folder.name(i), **_possible(folder.name(i), row, plausible)} for i, row in enumerate(found)]
        write_table(table, rows)
        logger.info(f"wrote {len(rows)} label maps and {table}")


def _possible(name: str, row: Mapping[str, float], plausible: Plausible | None) -> dict[str, float | None]:
    """The volumes of one file in tenths of a mm3; None for those that no person has."""
    why = {column: why_impossible(column, value, plausible) for column, value in row.items()}
    for column, reason in why.items():
        if reason and column in (plausible or {}):
            logger.warning(f"{column} of {name} was measured as {row[column]:g} mm3: {reason}")
    return {column: None if why[column] else round(value, 1) for column, value in row.items()}
