# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Training of the segmenter: phantoms in random contrasts, shares of tissues as targets."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandomizableTrait
from torch import Tensor, nn
from torch.utils.data import Dataset

from scripts.compute.precision import autocast
from scripts.conditions.conditions import Conditions
from scripts.core.cells import present
from scripts.core.correlation import pearson
from scripts.core.errors import BundleError
from scripts.core.files import looks_there
from scripts.core.options import number, probability
from scripts.measuring.segmenter import (
    BRAIN,
    CLASSES,
    INTRACRANIAL,
    NETWORK,
    ORIENTATION,
    PERCENTILES,
    VENTRICLES,
    divisible,
    normalised,
    thinned,
    working_voxel,
)
from scripts.training.engine import Facts
from scripts.training.optimisation import Batch
from scripts.training.step import Loss
from scripts.training.validation import HeldOut, Network
from scripts.volumes.datasets import TABLE, LoadVolumed, participants
from scripts.volumes.grid import Grid
from scripts.volumes.labels import LABELS
from scripts.volumes.placing import read_on_grid

LEVELS = 5
"""Most levels of the network: its volumes are multiples of 16 voxels."""
KNOTS = 6
"""Grey levels outside of the brain that are mapped to random ones; between them, linearly."""
FLUIDS = [INTRACRANIAL.index(name) for name in INTRACRANIAL if name not in BRAIN]
LOOKS = ("own", "random")
"""The contrasts in which held-out phantoms are measured: that of the phantom, and a random one."""


def labelled_participants(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a dataset of phantoms with `image` and `labels` (paths), `participant_id` and `split`.

    Raises:
        BundleError: as `scripts.volumes.datasets.participants`, or if a row has no label map.
    """
    table = Path(str(folder)) / TABLE
    rows = participants(str(folder), Conditions())
    return [
        {**{name: row[name] for name in ("image", "participant_id", "split")}, **_labels(row, table)} for row in rows
    ]


def _labels(row: Mapping[str, Any], table: Path) -> dict[str, str]:
    path = present(row["row"], "labels")
    if not path or not looks_there(table.parent / path):
        raise BundleError(
            f"participant {row['participant_id']} in {table} has no label map (column 'labels'): make a dataset of "
            "phantoms with configs/phantoms.yaml"
        )
    return {"labels": str(table.parent / path)}


def segmenter_facts(features: Sequence[int], spacing: Any, rows: Sequence[Mapping[str, Any]]) -> Facts:
    """What a checkpoint says of its network and of what it takes.

    Args:
        features: channels of the network's levels.
        spacing: of the network's grid in mm.
        rows: of the training.

    Raises:
        BundleError: for other numbers of channels, or a spacing that is none.
    """
    channels = [int(n) for n in features]
    if not 2 <= len(channels) <= LEVELS or min(channels) < 1:
        raise BundleError(f"--segmenter_features must be 2 to {LEVELS} numbers above 0, got {list(features)}")
    return Facts(
        network=NETWORK,
        classes=list(CLASSES),
        features=channels,
        spacing=number(spacing, "segmenter_spacing", 0.1),
        orientation=list(ORIENTATION),
        percentiles=list(PERCENTILES),
        trained_on=len(rows),
    )


# Data.


class LoadSharesd(MapTransform):
    """Dictionary transform: image and label map from paths to tensors on the network's grid.

    `image` becomes (1, x, y, z) float32 0..1; `labels` becomes `shares`, (classes - 1, x, y, z) float16: which share of
    each voxel is of which class within the skull. The rest is outside.

    Args:
        grid: of the volumes.
        spacing: of the network's grid in mm.
        resample: see `LoadVolumed`.
    """

    def __init__(self, grid: Grid, spacing: Any, resample: Any = False) -> None:
        super().__init__(["image", "labels"])
        self.grid, self.spacing = grid, number(spacing, "segmenter_spacing", 0.1)
        self.load_image = LoadVolumed("image", grid, resample)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with tensors in place of the paths.

        Raises:
            BundleError: if a file is unreadable, or the label map holds other labels than a phantom's.
        """
        loaded = self.load_image(data)
        image = divisible(thinned(loaded["image"], self.grid, self.spacing))
        labels = torch.as_tensor(read_on_grid(loaded.pop("labels"), self.grid, mode="nearest"))
        whole = labels.byte()
        if not torch.equal(whole.float(), labels) or whole.max() >= len(LABELS):
            raise BundleError(f"{data['labels']} holds other labels than those of phantoms, 0 to {len(LABELS) - 1}")
        return {**loaded, "image": image, "shares": self._shares(whole)}

    def _shares(self, labels: Tensor) -> Tensor:
        thin = [thinned((labels == LABELS[name])[None], self.grid, self.spacing) for name in INTRACRANIAL]
        return divisible(torch.cat(thin)).half()


class RandomContrastd(MapTransform, RandomizableTrait):
    """Dictionary transform that draws the contrast of an image anew, in the manner of SynthSeg (Billot et al. 2023).

    Each class within the skull has a random mean, and noise of a random strength; voxels are mixtures by their shares.
    The fluids look alike in half of the images. Outside, the grey levels of the image are mapped to random ones, so
    that scalp, skull and air keep their shape; in one image of ten there is nothing outside. Drawn with torch's random
    state.

    Args:
        prob: of an image to be changed.
    """

    def __init__(self, prob: Any = 0.5) -> None:
        super().__init__(["image", "shares"])
        self.prob = probability(prob, "random_contrast")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with another `image` (1, x, y, z), 0..1, and `shares` in float32."""
        image, shares = (torch.as_tensor(data[key]).float() for key in ("image", "shares"))
        changed = torch.rand(()) < self.prob
        return {**data, "image": random_contrast(image, shares) if changed else image, "shares": shares}


def random_contrast(image: Tensor, shares: Tensor) -> Tensor:
    """See `RandomContrastd`."""
    means, noise = torch.rand(len(shares)), 0.08 * torch.rand(len(shares))
    if torch.rand(()) < 0.5:
        means[FLUIDS] = means[FLUIDS[0]] + 0.05 * torch.randn(len(FLUIDS))
    outside = 1.0 - shares.sum(dim=0, keepdim=True)
    inside = torch.einsum("c,cxyz->xyz", means, shares) + torch.einsum("c,cxyz->xyz", noise, shares) * torch.randn(
        shares.shape[1:]
    )
    return (inside[None] + outside * _random_levels(image)).clamp(0.0, 1.0)


def _random_levels(image: Tensor) -> Tensor:
    """Grey levels (0..1) mapped by a random continuous function; air is dark in most cases."""
    if torch.rand(()) < 0.1:
        return torch.zeros_like(image)
    levels = torch.rand(KNOTS + 1)
    if torch.rand(()) < 0.8:
        levels[0] *= 0.1
    place = (image.clamp(0.0, 1.0) * (KNOTS - 1)).clamp(max=KNOTS - 1)
    below = place.long()
    return torch.lerp(levels[below], levels[below + 1], place - below)


class Normalised(MapTransform):
    """Dictionary transform that scales `image` as the segmenter does with what it is given."""

    def __init__(self) -> None:
        super().__init__("image")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its image scaled."""
        return {**data, "image": normalised(torch.as_tensor(data["image"]))}


# Training.


def targets_of(shares: Tensor) -> Tensor:
    """Shares of all classes (B, classes, x, y, z), from those within the skull (B, classes - 1, x, y, z)."""
    inside = shares.float().clamp(0.0, 1.0)
    outside = (1.0 - inside.sum(dim=1, keepdim=True)).clamp(min=0.0)
    both = torch.cat([outside, inside], dim=1)
    return both / both.sum(dim=1, keepdim=True)


def volume_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean relative error of the volumes of ventricles, brain and the skull's inside: the absolute logarithm of ratios.

    Args:
        probabilities, targets: shares of all classes, (B, classes, x, y, z). A structure that a phantom lacks does not
            count.
    """
    found, true = (_structures(shares.sum(dim=(2, 3, 4))) for shares in (probabilities, targets))
    there = true > 0.0
    errors = (found.clamp(min=1.0) / true.clamp(min=1.0)).log().abs()
    return torch.where(there, errors, 0.0).sum() / there.sum().clamp(min=1)


def _structures(sums: Tensor) -> Tensor:
    brain = [CLASSES.index(name) for name in BRAIN]
    ventricles = CLASSES.index(VENTRICLES)
    return torch.stack([sums[:, ventricles], sums[:, brain].sum(1), sums[:, 1:].sum(1)])


class SegmenterLoss(Loss):
    """The cross-entropy with the shares as targets, and `volume_error`.

    The former is least where the network's probabilities are the shares, so that their sums are unbiased volumes over
    all phantoms; the latter is for the volumes of each.

    A batch holds `image` (B, 1, x, y, z) and `shares` (B, classes - 1, x, y, z).

    Args:
        amp: precision of the network.
        volume_weight: of `volume_error`.

    Raises:
        BundleError: if the weight is negative.
    """

    inputs = ("image", "shares")

    def __init__(self, amp: Any = False, volume_weight: Any = 0.0) -> None:
        self.amp, self.volume_weight = amp, number(volume_weight, "volume_weight", 0.0)

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The `cross_entropy`, the `volume_error`, and their weighted sum, `loss`."""
        with autocast(part["image"].device, self.amp):
            logits = network(part["image"]).float()
        targets = targets_of(part["shares"])
        entropy, error = nn.functional.cross_entropy(logits, targets), volume_error(logits.softmax(1), targets)
        return {"loss": entropy + self.volume_weight * error, "cross_entropy": entropy, "volume_error": error}


class SegmenterValidation(HeldOut):
    """How well volumes agree on held-out phantoms, in their own look and in a random contrast.

    For each look there are the `loss`, and of ventricles and brain Pearson's `r`, the mean difference `bias` and its
    standard deviation `sd`, in mL: the limits of agreement are bias +- 1.96 sd (Bland and Altman 1986). `loss` is the
    mean of both.

    Args:
        network, dataset, run_dir, every, limit, num_workers: see `HeldOut`; items as `LoadSharesd` makes them.
        grid: of the volumes.
        spacing: of the network's grid in mm.
        amp: precision of the network.
    """

    def __init__(
        self,
        network: Network,
        dataset: Dataset,
        run_dir: str | os.PathLike,
        grid: Grid,
        spacing: Any,
        every: Any = 1,
        limit: Any = None,
        num_workers: int = 0,
        amp: Any = False,
    ) -> None:
        super().__init__(network, dataset, run_dir, every, limit, num_workers)
        self.ml = working_voxel(grid, number(spacing, "segmenter_spacing", 0.1)) / 1000.0
        self.amp = amp

    def measure(self, network: nn.Module, device: torch.device, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        """Losses, and volumes in mL, true and found, of one phantom in both looks."""
        image, shares = torch.as_tensor(item["image"]), torch.as_tensor(item["shares"]).float()
        torch.manual_seed(index)
        found = {}
        for look, volume in zip(LOOKS, (image, random_contrast(image, shares))):
            with autocast(device, self.amp):
                logits = network(normalised(volume)[None].to(device)).float().cpu()
            targets = targets_of(shares[None])
            found[f"{look}_loss"] = float(nn.functional.cross_entropy(logits, targets))
            found |= {f"{look}_{name}": v for name, v in self._volumes(logits.softmax(1)[0]).items()}
        return found | {f"true_{name}": v for name, v in self._volumes(targets[0]).items()}

    def _volumes(self, shares: Tensor) -> dict[str, float]:
        sums = dict(zip(CLASSES, (shares.double().sum(dim=(1, 2, 3)) * self.ml).tolist()))
        return {"ventricles": sums[VENTRICLES], "brain": sum(sums[name] for name in BRAIN)}

    def summarise(self, rows: Sequence[Mapping[str, Any]], iteration: int) -> dict[str, float]:
        """See the class; r only where it is defined."""
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        found = {"loss": float(np.mean([columns[f"{look}_loss"].mean() for look in LOOKS]))}
        for look in LOOKS:
            found[f"{look}_loss"] = float(columns[f"{look}_loss"].mean())
            for name in ("ventricles", "brain"):
                found |= _agreement(f"{look}_{name}", columns[f"true_{name}"], columns[f"{look}_{name}"])
        return found


def _agreement(name: str, true: np.ndarray, found: np.ndarray) -> dict[str, float]:
    r = pearson(true, found)
    values = {f"{name}_bias": float((found - true).mean()), f"{name}_sd": float((found - true).std())}
    return values | ({f"{name}_r": r} if math.isfinite(r) else {})
