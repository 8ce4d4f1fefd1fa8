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
"""Running a segmentation tool over a folder of volumes, for volumetry."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from scripts.atomic import make_folder, replacing
from scripts.devices import process_rank
from scripts.errors import BundleError
from scripts.metrics.features import wait_for_all_processes
from scripts.metrics.volumetry import Segmentations, label_volumes, read_synthseg, stem
from scripts.options import is_absent
from scripts.samples import Samples, several
from scripts.volume_folders import VolumeFolder
from scripts.volumes import UNREADABLE

logger = logging.getLogger(__name__)

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that would lead a tool with a Python of its own to the modules of this one."""


class SegmentationTool(ABC):
    """A tool that writes one label map, in FreeSurfer's codes, for each volume.

    Args:
        command: name of the program, or its path.
    """

    name: str
    source: str
    """Where to get the program, for messages."""

    def __init__(self, command: str) -> None:
        self.command = command

    def program(self) -> str:
        """Path of the program.

        Raises:
            BundleError: if it is not installed.
        """
        found = shutil.which(self.command) or shutil.which(Path(self.command).name)
        if found is None:
            raise BundleError(f"--segment_with {self.name}: there is no program {self.command}: {self.source}")
        return found

    def label_map(self, volume: Path, output_dir: Path) -> Path:
        """Where the label map of a volume lies."""
        return output_dir / f"{stem(volume)}_{self.name}.nii.gz"

    @abstractmethod
    def segment(self, volumes: Sequence[Path], output_dir: Path) -> None:
        """Write the label maps of volumes; those that are finished stay when it is interrupted.

        Raises:
            BundleError: if the program is not there, or fails.
        """

    def table(self, output_dir: Path) -> Path | None:
        """The tool's own table of volumes, as `read_synthseg` takes it; None if it writes none."""
        return None


class SynthSeg(SegmentationTool):
    """`mri_synthseg` of FreeSurfer 7.4 or later (Billot et al. 2023), once for all volumes."""

    name = "synthseg"
    source = "install FreeSurfer 7.4 or later, https://surfer.nmr.mgh.harvard.edu, and put its bin folder on the PATH"

    def segment(self, volumes: Sequence[Path], output_dir: Path) -> None:
        """See `SegmentationTool`; the program is given a folder of links to the volumes."""
        program = self.program()
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".volumes-") as folder:
            for volume in volumes:
                ending = ".nii.gz" if volume.name.endswith(".gz") else ".nii"
                (Path(folder) / f"{stem(volume)}{ending}").symlink_to(volume.resolve())
            options = [
                "--i",
                folder,
                "--o",
                str(output_dir),
                "--vol",
                str(self.table(output_dir)),
                "--threads",
                _threads(),
            ]
            _run(self.name, [program, *options], output_dir / f"synthseg{_of_process()}.log")

    def table(self, output_dir: Path) -> Path:
        """See `SegmentationTool`; it has the volumes of the last run of this process alone."""
        return output_dir / f"synthseg_volumes{_of_process()}.csv"


class Samseg(SegmentationTool):
    """SAMSEG (Puonti et al. 2016) as the package samseg, in an environment of its own: about 10 minutes a volume."""

    name = "samseg"
    source = "`make samseg` installs it"

    def segment(self, volumes: Sequence[Path], output_dir: Path) -> None:
        """See `SegmentationTool`; one volume after the other."""
        program = self.program()
        for volume in tqdm(volumes, "samseg", unit="volume", disable=None):
            with tempfile.TemporaryDirectory(dir=output_dir, prefix=".samseg-") as folder:
                options = ["--input", str(volume), "--output", folder, "--threads", _threads()]
                _run(self.name, [program, *options], output_dir / f"{stem(volume)}_samseg.log")
                self._convert(Path(folder) / "seg.mgz", self.label_map(volume, output_dir))

    def _convert(self, found: Path, label_map: Path) -> None:
        if not found.is_file():
            raise BundleError(f"samseg ended without {found.name}: see the .log files in {label_map.parent}")
        image: Any = nib.load(found)
        codes = np.rint(np.asanyarray(image.dataobj)).astype(np.int16)
        with replacing(label_map) as temporary:
            nib.save(nib.Nifti1Image(codes, image.affine), temporary)


def _of_process() -> str:
    """What tells the files of several processes apart."""
    rank, processes = process_rank()
    return f"_{rank}" if processes > 1 else ""


def _threads() -> str:
    return str(torch.get_num_threads())


def _run(name: str, command: Sequence[str], log: Path) -> None:
    logger.info(f"running {' '.join(command)}; its output goes to {log}")
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise BundleError(
            f"{name} failed with exit status {done.returncode}: {lines[-1].strip()[:200]}. All of it: {log}"
        )


class SegmentedNow(Segmentations):
    """Segmentations that a tool makes of a folder's volumes, where they are not there yet.

    A label map counts as there if it can be read and is not older than its volume. Under torchrun, each process has
    its share of the volumes segmented.

    Args:
        segmenter: the tool.
        folder: the volumes.
        output_dir: where the label maps go.

    Raises:
        BundleError: if the label maps would lie among the volumes.
    """

    def __init__(self, segmenter: SegmentationTool, folder: VolumeFolder, output_dir: str | os.PathLike) -> None:
        super().__init__(None)
        self.segmenter, self.folder, self.path = segmenter, folder, Path(str(output_dir))
        if folder.folder is not None and self.path.resolve().is_relative_to(folder.folder.resolve()):
            raise BundleError(
                f"--segmentation_dir {self.path} lies in --{folder.flag} {folder.folder}: its label maps would be "
                "taken for volumes; give another"
            )

    def names(self) -> None:
        """See `Segmentations`."""

    def prepare(self) -> None:
        """Segment what has no label map yet.

        Raises:
            BundleError: as `SegmentationTool.segment`, or if a label map was not written.
        """
        assert self.path is not None
        output_dir = make_folder(self.path)
        rank, processes = process_rank()
        mine = self.folder.paths[rank::processes]
        missing = [volume for volume in mine if not _is_done(self.segmenter.label_map(volume, output_dir), volume)]
        if missing:
            logger.info(
                f"{self.segmenter.name}: {len(mine) - len(missing)} of {len(mine)} volumes are segmented already"
            )
            self.segmenter.segment(missing, output_dir)
        for volume in missing:
            if not self.segmenter.label_map(volume, output_dir).is_file():
                raise BundleError(f"{self.segmenter.name} wrote no label map of {volume}: see the .log in {output_dir}")
        wait_for_all_processes()

    def measured(self) -> dict[str, dict[str, float]]:
        """See `Segmentations`: from the tool's own table where it has all volumes, else from the label maps.

        Raises:
            BundleError: as `prepare`, or if a label map or the table cannot be used.
        """
        assert self.path is not None
        if not all(_is_done(self.segmenter.label_map(volume, self.path), volume) for volume in self.folder.paths):
            self.prepare()
        names, table = [stem(volume) for volume in self.folder.paths], self.segmenter.table(self.path)
        if table is not None and table.is_file():
            rows = read_synthseg(table)
            if set(names) <= rows.keys():
                return {name: rows[name] for name in names}
            logger.info(f"{table} has not all volumes: they are taken from the label maps")
        return {name: label_volumes(self.segmenter.label_map(Path(name), self.path)) for name in names}


def _is_done(label_map: Path, volume: Path) -> bool:
    if not label_map.is_file() or label_map.stat().st_mtime < volume.stat().st_mtime:
        return False
    try:
        np.asanyarray(nib.load(label_map).dataobj)  # type: ignore[attr-defined]
    except UNREADABLE:
        return False
    return True


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


def segmentations(
    path: Any, segment_with: Any, segmenters: Mapping[str, SegmentationTool], samples: Samples, output_dir: str
) -> Segmentations:
    """Those of `--segmentations`, or those that the tool `--segment_with` makes.

    Args:
        path: see `Segmentations`; of several models one each, separated by commas or as a list in the order of the
            models, or a map from their names, or one folder with a folder for each model by its name.
        segment_with: name of a tool, or None.
        segmenters: all that there are, by name.
        samples: of the models.
        output_dir: where label maps go; those of several models into folders by their names.

    Raises:
        BundleError: if both are given, the tool is not known, or segmentations are not one for each model.
    """
    if is_absent(segment_with):
        paths = _paths(path, list(samples.sets))
        return _of_each(samples, {model: Segmentations(paths[model]) for model in samples.sets})
    if path is not None:
        raise BundleError("--segmentations and --segment_with say both where label maps come from: give one of them")
    if str(segment_with) not in segmenters:
        raise BundleError(f"--segment_with: there is no '{segment_with}'; there are {', '.join(segmenters)}")
    tool = segmenters[str(segment_with)]
    folders = {model: features.folder for model, features in samples.sets.items()}
    return _of_each(samples, {m: SegmentedNow(tool, f, Path(str(output_dir)) / m) for m, f in folders.items()})


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
