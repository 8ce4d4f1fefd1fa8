# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Finding the brain in a prepared scan, for the skull-stripped mode and for measuring agreement with the template."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to

from scripts.core.errors import BundleError
from scripts.core.programs import find_program, run_program
from scripts.preparation.registration import Template
from scripts.preparation.synthstrip import TARGET, brain_mask, load_strip_net
from scripts.preparation.warping import warped_onto
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume
from scripts.volumes.reading import Scan, read_image


class Stripper(ABC):
    """A way to find the brain in a prepared volume."""

    def check(self) -> None:  # noqa: B027 (most need no program)
        """Raise a `BundleError` if the program that it needs is not there; before the first scan."""

    @abstractmethod
    def mask(self, volume: np.ndarray, grid: Grid, scale: float = 1.0) -> np.ndarray:
        """The brain with its ventricles.

        Args:
            volume: a prepared scan, 0..1, of the grid's shape.
            grid: where it lies, in MNI152 mm.
            scale: length in the head over length in the template, as the registration found it.

        Returns:
            Boolean array of the grid's shape.

        Raises:
            BundleError: if the tool is not there, fails, or finds no brain.
        """


class SynthStrip(Stripper):
    """The network of Hoopes et al. (2022), with weights that `python -m scripts.preparation.synthstrip` fetches.

    Args:
        weights: the file.
        device: where to compute: `cpu`, `cuda`, or `cuda:1` and so on.
    """

    def __init__(self, weights: str | os.PathLike = TARGET, device: str = "cpu") -> None:
        self.net, self.device = load_strip_net(weights), torch.device(device)

    def mask(self, volume: np.ndarray, grid: Grid, scale: float = 1.0) -> np.ndarray:
        """See `Stripper`; the scale is not used."""
        return _checked(brain_mask(self.net, volume, grid, self.device))


class TemplateStripper(Stripper):
    """The template's brain mask, warped onto the scan by SyN (Avants et al. 2008); needs no other tool.

    Args:
        template: the head that scans are registered to.
        seed: of ANTs, above 0.
    """

    def __init__(self, template: Template, seed: int = 1) -> None:
        self.template, self.seed = template, seed

    def mask(self, volume: np.ndarray, grid: Grid, scale: float = 1.0) -> np.ndarray:
        """See `Stripper`."""
        scan = Scan(np.ascontiguousarray(volume, np.float32), grid.affine)
        (brain,) = warped_onto(scan, scale, self.template, [self.template.brain], self.seed)
        return _checked(brain > 0.5)


class CommandStripper(Stripper):
    """A program that writes a mask for a file, such as `mri_synthstrip` or `hd-bet`.

    Args:
        command: name of the program, or its path.
        arguments: of the program, in which `{image}` stands for the volume that it is given, `{mask}` for the mask
            that it should write, and `{folder}` for the folder of both.
        written: the name of the mask in this folder, if the program chooses it itself.
        source: where to get the program, for messages.
    """

    def __init__(self, command: str, arguments: Sequence[str], written: str = "mask.nii.gz", source: str = "") -> None:
        self.command, self.arguments, self.written = command, [str(a) for a in arguments], written
        self.source = source or "install it and put it on the PATH"

    def check(self) -> None:
        """See `Stripper`."""
        find_program(self.command, self.source)

    def mask(self, volume: np.ndarray, grid: Grid, scale: float = 1.0) -> np.ndarray:
        """See `Stripper`; the scale is not used."""
        program = find_program(self.command, self.source)
        with tempfile.TemporaryDirectory(prefix="stripping-") as folder:
            image, mask = Path(folder) / "image.nii.gz", Path(folder) / self.written
            write_volume(image, volume, grid, "float32")
            names = {"image": str(image), "mask": str(mask), "folder": folder}
            arguments = [argument.format(**names) for argument in self.arguments]
            run_program([program, *arguments], mask)
            return _checked(_read_mask(mask, grid))


def _read_mask(path: Path, grid: Grid) -> np.ndarray:
    found = read_image(path)
    inside = nib.Nifti1Image((found.data > 0.5).astype(np.float32), found.affine)
    return np.asarray(resample_from_to(inside, (grid.shape, grid.affine), order=0).dataobj) > 0.5


def _checked(mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        raise BundleError("the skull stripping found no brain in the scan")
    return mask
