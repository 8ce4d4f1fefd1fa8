# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation tools that are programs of their own, and the choice of what segments."""

from __future__ import annotations

import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from scripts.compute.counting import counted
from scripts.compute.devices import process_rank
from scripts.core.errors import BundleError
from scripts.core.files import replacing
from scripts.core.options import is_absent
from scripts.core.programs import run_program
from scripts.volumes.labels import stem
from scripts.volumes.reading import read_codes

logger = logging.getLogger(__name__)


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
            run_program([program, *options], log=output_dir / f"synthseg{_of_process()}.log")

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
        for volume in counted(volumes, "samseg", unit="volume"):
            with tempfile.TemporaryDirectory(dir=output_dir, prefix=".samseg-") as folder:
                options = ["--input", str(volume), "--output", folder, "--threads", _threads()]
                found = Path(folder) / "seg.mgz"
                run_program([program, *options], found, output_dir / f"{stem(volume)}_samseg.log")
                self._convert(found, self.label_map(volume, output_dir))

    def _convert(self, found: Path, label_map: Path) -> None:
        codes, affine = read_codes(found)
        with replacing(label_map) as temporary:
            nib.save(nib.Nifti1Image(codes.astype(np.int16), affine), temporary)


def _of_process() -> str:
    """What tells the files of several processes apart."""
    rank, processes = process_rank()
    return f"_{rank}" if processes > 1 else ""


def _threads() -> str:
    return str(torch.get_num_threads())


def chosen_way(segment_with: Any, segmentations: Any, ways: Collection[str], default: str | None = None) -> str | None:
    """The name of what segments volumes; None where segmentations are given, or nothing is to be segmented.

    Args:
        segment_with: what `--segment_with` says: one of the ways, or nothing.
        segmentations: what `--segmentations` gives, if anything.
        ways: the names that there are.
        default: a way that stands back where segmentations are given.

    Raises:
        BundleError: if there is no way of that name, or both were given.
    """
    named = None if is_absent(segment_with) else str(segment_with).strip()
    if named is not None and named not in ways:
        raise BundleError(f"--segment_with: there is no '{named}'; there are {', '.join(ways)}")
    if is_absent(segmentations) or named is None:
        return named
    if named != default:
        raise BundleError("--segmentations and --segment_with say both where volumes come from: give one of them")
    return None
