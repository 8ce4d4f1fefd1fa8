# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The seed heads of the phantoms: real scans with the label maps that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.core.files import looks_there
from scripts.core.tables import read_table
from scripts.phantoms.potential_flow import PotentialFlow
from scripts.volumes.grid import Grid
from scripts.volumes.head_size import Volumes
from scripts.volumes.labels import LABELS
from scripts.volumes.placing import read_on_grid

VENTRICLES, GREY, WHITE = LABELS["lateral_ventricles"], LABELS["grey"], LABELS["white"]
INTRACRANIAL = tuple(range(2, 8))
TISSUES = ((5,), (6, 7), (2,), (3,), (4,))
WORKING_MM = 2.0
FADE_MM = 10.0


@dataclass(frozen=True)
class SeedHead:
    """A real head, ready to be deformed.

    Attributes:
        name: such as `sub-CSI1`.
        grid: the grid of `images` and `labels`.
        images: (1, 2, X, Y, Z): intensity 0..1, and the share of grey matter 0..1.
        labels: (1, 1, X, Y, Z), float32, values of `LABELS`.
        shares: (1, 5, x, y, z) on the working grid: shares of `TISSUES`, lateral ventricles, third and fourth, outer
            fluid, grey, white; their sum is 1 within the skull.
        flow: solver for flows within the skull, on the working grid.
        window: (1, 1, x, y, z): 0 at the skull and outside, 1 from 10 mm within.
        room: how much larger the intracranial space could be along each axis before it left the box, see `Pose`.
        volumes: of the head itself.
        levels: mean intensity of grey and of white matter.
    """

    name: str
    grid: Grid
    images: Tensor
    labels: Tensor
    shares: Tensor
    flow: PotentialFlow
    window: Tensor
    room: tuple[float, float, float]
    volumes: Volumes
    levels: tuple[float, float]


def count_volumes(labels: Tensor, grid: Grid) -> Volumes:
    """Volumes of a label map, by counting voxels.

    Args:
        labels: values of `LABELS`, any shape, on `grid`.
    """
    counts = torch.bincount(labels.flatten().long(), minlength=len(LABELS)).tolist()
    voxel = abs(float(np.prod(grid.spacing)))
    wanted = (counts[VENTRICLES], counts[GREY], counts[WHITE], sum(counts[i] for i in INTRACRANIAL))
    return Volumes(*(voxel * n for n in wanted))


def load_heads(
    grid: Grid,
    dataset_dir: str | Path,
    labels_dir: str | Path,
    names: Sequence[str] | str | None = None,
    device: torch.device | str = "cpu",
) -> list[SeedHead]:
    """The seed heads of the given names, or all that have label maps; see `load_head`.

    Raises:
        BundleError: if there is none, or one cannot be loaded.
    """
    wanted = head_names(labels_dir) if names is None else [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise BundleError(f"there are no label maps of seed heads in {labels_dir}")
    return [load_head(name, dataset_dir, labels_dir, grid, device) for name in wanted]


def load_head(
    name: str, dataset_dir: str | Path, labels_dir: str | Path, grid: Grid, device: torch.device | str = "cpu"
) -> SeedHead:
    """Read a prepared scan and its label map, and bring both onto the grid.

    Args:
        name: participant of the scan, of which `labels_dir` must hold a label map.
        dataset_dir: what `make example-data` made.
        labels_dir: holds `NAME_dseg.nii.gz`.
        grid: where phantoms shall lie.
        device: where to compute.

    Raises:
        BundleError: if the head is not known, its scan not there, or a file unusable.
    """
    labels_path = Path(labels_dir) / f"{name}_dseg.nii.gz"
    if not labels_path.is_file():
        known = ", ".join(head_names(labels_dir)) or "none"
        raise BundleError(f"there is no seed head '{name}': {labels_dir} has label maps of {known}")
    labels = read_on_grid(labels_path, grid, mode="nearest")
    if not set(np.unique(labels)) <= set(LABELS.values()):
        raise BundleError(f"{labels_path} holds other labels than 0 to {len(LABELS) - 1}: make it again")
    image = read_on_grid(_scan_of(name, Path(dataset_dir)), grid)
    return build_head(name, torch.as_tensor(image), torch.as_tensor(labels), grid, device)


def head_names(labels_dir: str | Path) -> list[str]:
    """Participants of whom a folder holds label maps, sorted."""
    return sorted(path.name.removesuffix("_dseg.nii.gz") for path in Path(labels_dir).glob("*_dseg.nii.gz"))


def _scan_of(name: str, dataset_dir: Path) -> Path:
    table = dataset_dir / "participants.tsv"
    rows = read_table(table, ["participant_id", "path"]) if looks_there(table) else []
    paths = [dataset_dir / row["path"] for row in rows if row["participant_id"] == name]
    if not paths or not paths[0].is_file():
        raise BundleError(f"the scan of the seed head {name} is not in {dataset_dir}: run `make example-data` first")
    return paths[0]


def build_head(name: str, image: Tensor, labels: Tensor, grid: Grid, device: torch.device | str = "cpu") -> SeedHead:
    """A seed head from its intensities (0..1) and labels, both of the grid's shape.

    Raises:
        BundleError: if a tissue is missing, or the intracranial space is empty.
    """
    labels = labels.to(device, torch.float32)[None, None]
    image = image.to(device, torch.float32)[None, None]
    volumes = count_volumes(labels, grid)
    if not min(volumes.ventricles, volumes.grey, volumes.white) > 0.0:
        raise BundleError(f"the label map of {name} lacks the lateral ventricles, grey or white matter")
    factor = _thinning(grid)
    working_spacing = [abs(s) * f for s, f in zip(grid.spacing, factor)]
    shares = F.avg_pool3d(torch.cat([_is_one_of(labels, tissue) for tissue in TISSUES], dim=1), factor)
    inside = _largest_piece(shares.sum(dim=1)[0] > 0.5)
    depth = ndimage.distance_transform_edt(inside.numpy(), sampling=working_spacing)
    window = torch.as_tensor(np.clip(depth / FADE_MM, 0.0, 1.0), dtype=torch.float32, device=labels.device)
    return SeedHead(
        name,
        grid,
        torch.cat([image, _smoothed(_is_one_of(labels, (GREY,)))], dim=1),
        labels,
        shares,
        PotentialFlow(inside.to(labels.device), working_spacing),
        (window * window * (3.0 - 2.0 * window))[None, None],
        _room(labels),
        volumes,
        (_level(image[labels == GREY]), _level(image[labels == WHITE])),
    )


def _level(values: Tensor) -> float:
    """The mean to six places, which does not depend on the number of threads."""
    return round(float(values.double().mean()), 6)


def _room(labels: Tensor) -> tuple[float, float, float]:
    """In z the box's bottom, where the neck is cut, stays where it is; in x and y its centre does."""
    where = torch.nonzero(_is_one_of(labels, INTRACRANIAL)[0, 0])
    size = torch.tensor(labels.shape[2:], device=where.device)
    low, high = where.amin(dim=0) / size * 2.0 - 1.0, (where.amax(dim=0) + 1) / size * 2.0 - 1.0
    x, y, z = (1.0 / torch.maximum(-low, high)).tolist()
    return x, y, 2.0 / (float(high[2]) + 1.0)


def _thinning(grid: Grid) -> list[int]:
    """Voxels of the grid in one of the working grid, along each axis, such that none is left over."""
    fits = [max(1, round(WORKING_MM / abs(s))) for s in grid.spacing]
    return [f if n % f == 0 else 1 for f, n in zip(fits, grid.shape)]


def _is_one_of(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    return torch.isin(labels, torch.tensor(values, dtype=labels.dtype, device=labels.device)).float()


def _largest_piece(mask: Tensor) -> Tensor:
    pieces, _ = ndimage.label(mask.cpu().numpy())
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return torch.from_numpy(pieces == sizes.argmax()) & mask.cpu()


def _smoothed(mask: Tensor) -> Tensor:
    """A mask blurred by the weights 1/4, 1/2, 1/4 along each axis: the edge of a tissue as a scanner sees it."""
    for axis in range(3):
        weights = torch.tensor([0.25, 0.5, 0.25], device=mask.device).view(
            [1, 1, *(3 if i == axis else 1 for i in range(3))]
        )
        mask = F.conv3d(mask, weights, padding=tuple(1 if i == axis else 0 for i in range(3)))
    return mask
