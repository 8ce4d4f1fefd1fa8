# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The segmenter: which share of each voxel is fluid, grey or white matter or ventricle, and the volumes of these.

A UNet that was trained on phantoms with random contrasts (docs/segmenter.md), in the manner of SynthSeg (Billot et al.
2023, Medical Image Analysis 86:102789). It works at 2 mm and tells shares, so that the volume of a structure is a sum
over voxels and no voxel has to be decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from monai.transforms import DivisiblePad, ScaleIntensityRangePercentiles
from torch import Tensor, nn

from scripts.compute.devices import volume_layout
from scripts.compute.precision import autocast, half_precision
from scripts.core.errors import BundleError
from scripts.core.paths import SHIPPED_MODELS
from scripts.networks.weights import load_network, read_checkpoint
from scripts.volumes.grid import Grid
from scripts.volumes.head_size import normalised_brain
from scripts.volumes.labels import LABELS

NETWORK = "segmenter"
SHIPPED = SHIPPED_MODELS / "segmenter" / "segmenter.safetensors"
INTRACRANIAL = tuple(name for name, label in LABELS.items() if label > LABELS["scalp_and_skull"])
CLASSES = ("outside", *INTRACRANIAL)
"""What the network tells apart, in the order of its channels: the phantoms' labels, all outside of the skull in one."""
BRAIN = ("grey", "white")
VENTRICLES = "lateral_ventricles"
CODES = {
    "outside": (0, 0),
    "outer_fluid": (24, 24),
    "grey": (3, 42),
    "white": (2, 41),
    "lateral_ventricles": (4, 43),
    "third_ventricle": (14, 14),
    "fourth_ventricle": (15, 15),
}
"""FreeSurfer's codes of each class, left and right; all grey and white matter has those of the cerebrum."""
ORIENTATION = (-1, 1, 1)
"""Signs of the steps along x, y, z of the grid that the network knows: the bundle's."""
PERCENTILES = (0.5, 99.5)
DIVISOR = 16
"""What the sides of the network's volumes are multiples of: it halves them up to four times."""
COLUMNS = ("ventricular_vol_mm3", "brain_vol_mm3", "brain_mm3", "intracranial_mm3", "grey_mm3", "white_mm3")
"""What `brain_volumes` measures."""
FACTS = ("network", "classes", "features", "spacing", "orientation", "percentiles")


def network_of(facts: Mapping[str, Any]) -> nn.Module:
    """MONAI's `UNet` that the facts of a checkpoint describe, as PyTorch initialises it.

    From (B, 1, x, y, z), 0..1, to logits (B, classes, x, y, z). Its first convolution halves the grid already, so that
    no features of single voxels are held: that is what makes it fast.
    """
    return UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=len(facts["classes"]),
        channels=list(facts["features"]),
        strides=[2] * (len(facts["features"]) - 1),
        norm=("instance", {"affine": True}),
    )


# The network's grid.


def working_shape(grid: Grid, spacing: float) -> tuple[int, int, int]:
    """Voxels along x, y, z that cover a grid at another spacing in mm."""
    x, y, z = (max(1, round(n * abs(step) / spacing)) for n, step in zip(grid.shape, grid.spacing))
    return x, y, z


def working_voxel(grid: Grid, spacing: float) -> float:
    """Volume in mm3 of a voxel of `working_shape`."""
    return abs(math.prod(grid.spacing)) * math.prod(grid.shape) / math.prod(working_shape(grid, spacing))


def oriented(volumes: Tensor, grid: Grid) -> Tensor:
    """Volumes (C, X, Y, Z) with their axes turned to the network's orientation, or from it back."""
    return volumes.flip([axis + 1 for axis in range(3) if grid.spacing[axis] * ORIENTATION[axis] < 0])


def thinned(volumes: Tensor, grid: Grid, spacing: float) -> Tensor:
    """Volumes (C, X, Y, Z) on a grid -> (C, x, y, z) float32 at the working spacing, in the network's orientation.

    Each voxel is the mean of those that it covers; of a coarser grid, it is interpolated.
    """
    shape = working_shape(grid, spacing)
    finer = all(n <= m for n, m in zip(shape, grid.shape))
    return F.interpolate(oriented(volumes, grid)[None].float(), shape, mode="area" if finer else "trilinear")[0]


def normalised(volume: Tensor) -> Tensor:
    """Intensities of a volume (1, x, y, z) scaled to 0..1 between two percentiles, and cut off beyond."""
    if volume.min() == volume.max():
        return torch.zeros_like(volume)
    return torch.as_tensor(ScaleIntensityRangePercentiles(*PERCENTILES, 0.0, 1.0, clip=True)(volume))


def divisible(volumes: Tensor) -> Tensor:
    """Volumes (C, x, y, z) continued by zeros until the network can halve every side."""
    return torch.as_tensor(DivisiblePad(DIVISOR, method="end")(volumes))


# Application.


class Segmenter:
    """A trained network, applied.

    Args:
        network: of `network_of`.
        facts: of its checkpoint.
        device: where to compute.
        amp: precision; see `scripts.compute.precision.half_precision`.
        sha256: of the weights' file.
    """

    def __init__(
        self,
        network: nn.Module,
        facts: Mapping[str, Any],
        device: torch.device | str = "cpu",
        amp: Any = False,
        sha256: str = "",
    ) -> None:
        self.device, self.amp = torch.device(device), False if half_precision(amp) is None else amp
        self.network: nn.Module = network.to(self.device, memory_format=volume_layout(self.device)).eval()  # type: ignore[call-overload]
        self.spacing, self.sha256 = float(facts["spacing"]), sha256

    def shares(self, volume: Tensor | np.ndarray, grid: Grid) -> Tensor:
        """Which share of each voxel of the working grid is of which class.

        The mean over the volume and its mirror image, so that left and right are treated alike.

        Args:
            volume: (1, X, Y, Z) or (X, Y, Z) on the grid; the head upright, T1-weighted.
            grid: where its voxels lie, in the world of MNI152.

        Returns:
            (classes, x, y, z) float32 on the CPU, 0..1, of sum 1.

        Raises:
            BundleError: if the volume is not of the grid's shape, or not finite.
        """
        image = normalised(thinned(_checked(volume, grid).to(self.device), grid, self.spacing))
        return (self._applied(image) + self._applied(image.flip(1)).flip(1)).cpu() / 2.0

    @torch.no_grad()
    def _applied(self, image: Tensor) -> Tensor:
        x, y, z = image.shape[1:]
        padded = divisible(image)[None].to(memory_format=volume_layout(self.device))
        with autocast(self.device, self.amp):
            found = self.network(padded)
        return found[0, :, :x, :y, :z].float().softmax(dim=0)

    def volumes(self, shares: Tensor, grid: Grid) -> dict[str, float]:
        """Volume in mm3 of each class but what is outside, by its name.

        Args:
            shares: from `shares`.
            grid: of the volume.
        """
        sums = shares.double().sum(dim=(1, 2, 3)) * working_voxel(grid, self.spacing)
        return {name: float(total) for name, total in zip(CLASSES, sums) if name in INTRACRANIAL}

    def labels(self, shares: Tensor, grid: Grid) -> np.ndarray:
        """The likeliest class of each voxel of a grid in FreeSurfer's codes, uint8 (X, Y, Z).

        Left and right of what has two codes are divided by the grid's mid plane.

        Args:
            shares: from `shares`.
            grid: of the volume.
        """
        fine = F.interpolate(shares[None], grid.shape, mode="trilinear")[0]
        classes = oriented(fine.argmax(dim=0, keepdim=True), grid)[0]
        left, right = torch.tensor(list(CODES.values()), dtype=torch.uint8).T
        middle = (torch.arange(grid.shape[0]) + 0.5 - grid.shape[0] / 2) * grid.spacing[0]
        return torch.where((middle < 0.0)[:, None, None], left[classes], right[classes]).numpy()


def _checked(volume: Tensor | np.ndarray, grid: Grid) -> Tensor:
    found = torch.as_tensor(volume)
    found = found[None] if found.ndim == 3 else found
    if tuple(found.shape) != (1, *grid.shape):
        raise BundleError(f"the volume to segment has shape {tuple(found.shape)}, its grid {(1, *grid.shape)}")
    if not found.isfinite().all():
        raise BundleError("the volume to segment holds NaN or infinite values: prepare the scan again")
    return found.float()


def load_segmenter(path: Any = None, device: torch.device | str = "cpu", amp: Any = False) -> Segmenter:
    """The segmenter of a weights file.

    Args:
        path: `segmenter.pt` of train_segmenter.yaml, or a safetensors file; None for the one that ships.
        device, amp: see `Segmenter`.

    Raises:
        BundleError: if the file is missing, damaged, or not of a segmenter that this code can apply.
    """
    file = SHIPPED if path is None else Path(str(path))
    if not file.is_file():
        raise BundleError(f"there are no weights of a segmenter at {file}: train one with configs/train_segmenter.yaml")
    checkpoint = read_checkpoint(file, NETWORK)
    check_facts(checkpoint.facts, file)
    network = load_network(network_of(checkpoint.facts), checkpoint)
    return Segmenter(network, checkpoint.facts, device, amp, checkpoint.sha256)


def check_facts(facts: Mapping[str, Any], file: Path) -> None:
    """Raise a `BundleError` unless a file's facts are those of a segmenter, and what it knows is as here."""
    network, lacking = facts.get("network"), [name for name in FACTS if name not in facts]
    if lacking or network != NETWORK:
        what = f"it is of the network '{network}'" if network != NETWORK else f"it has no '{lacking[0]}'"
        raise BundleError(f"{file} is of no segmenter ({what}): train one with configs/train_segmenter.yaml")
    for name, value in (("classes", list(CLASSES)), ("orientation", [*ORIENTATION]), ("percentiles", [*PERCENTILES])):
        if list(facts[name]) != value:
            raise BundleError(f"{file} is of another segmenter: its {name} are {facts[name]}, these here {value}")


@cache
def shipped_segmenter(device: str = "cpu") -> Segmenter:
    """The segmenter in models/segmenter/, read once."""
    return load_segmenter(device=device)


def brain_volumes(
    volume: Tensor | np.ndarray,
    grid: Grid,
    segmenter: Segmenter | None = None,
    reference_mm3: float | None = None,
) -> dict[str, float]:
    """Volumes of a head, in the names of the conditions and of the phantoms' table.

    Args:
        volume: (1, X, Y, Z) or (X, Y, Z) on the grid, T1-weighted.
        grid: where its voxels lie.
        segmenter: what measures; None for the one that ships, on the CPU.
        reference_mm3: intracranial volume to which the brain is normalised; None for that of the phantoms.

    Returns:
        In mm3: `ventricular_vol_mm3`, the lateral ventricles with their inferior horns; `brain_mm3`, grey and white
        matter with cerebellum and brain stem; `intracranial_mm3`, these and all fluid; `brain_vol_mm3`, the brain
        normalised for head size; and `grey_mm3`, `white_mm3`.

    Raises:
        BundleError: if the volume is not of the grid's shape, not finite, or shows no brain.
    """
    segmenter = segmenter or shipped_segmenter()
    return summarised(segmenter.volumes(segmenter.shares(volume, grid), grid), reference_mm3)


def summarised(volumes: Mapping[str, float], reference_mm3: float | None = None) -> dict[str, float]:
    """What `brain_volumes` returns, of the volumes of all classes.

    Raises:
        BundleError: if there is no brain.
    """
    brain = sum(volumes[name] for name in BRAIN)
    intracranial = sum(volumes[name] for name in INTRACRANIAL)
    if brain < 1.0:
        raise BundleError("the segmenter finds no brain in the volume: is it a head, upright and on the grid?")
    normal = normalised_brain(brain, intracranial, reference_mm3)
    found = (volumes[VENTRICLES], normal, brain, intracranial, volumes["grey"], volumes["white"])
    return dict(zip(COLUMNS, found))
