# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A network that tells age from a volume (Cole et al. 2017), and its training."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import RandAffined
from torch import Tensor, nn

from scripts.compute.precision import autocast
from scripts.conditions.conditions import Condition, Conditions
from scripts.core.correlation import pearson
from scripts.core.errors import BundleError
from scripts.core.options import number, probability
from scripts.training.engine import Facts
from scripts.training.optimisation import Batch
from scripts.training.step import Loss
from scripts.training.validation import HeldOut
from scripts.volumes.datasets import TABLE, participants
from scripts.volumes.grid import Grid

CHANNELS = (8, 16, 32, 64, 128)
AGE = "age"
"""The name of the condition that is age."""


class BrainAgeNetwork(nn.Module):
    """The network of Cole et al. (2017, NeuroImage 163): five blocks of convolutions and one linear layer.

    A block is a convolution of 3^3, ReLU, another convolution, batch normalisation, ReLU, and the maximum of each 2^3.

    Args:
        shape: voxels along x, y, z.
        mean, deviation: of the ages in training, in years. The linear layer gives standard deviations from the mean,
            so that it starts in the middle of the ages.
        channels: of the blocks.

    Raises:
        BundleError: if a side is too short to be halved by every block.
    """

    def __init__(
        self, shape: Sequence[int], mean: float = 0.0, deviation: float = 1.0, channels: Sequence[int] = CHANNELS
    ) -> None:
        super().__init__()
        if min(shape) < 2 ** len(channels):
            raise BundleError(f"the brain age network needs {2 ** len(channels)} voxels a side, got {tuple(shape)}")
        self.mean, self.deviation = float(mean), float(deviation)
        self.blocks = nn.Sequential(*(_block(a, b) for a, b in zip((1, *channels), channels)))
        self.linear = nn.Linear(channels[-1] * math.prod(side // 2 ** len(channels) for side in shape), 1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Ages in years, (B,), of volumes (B, 1, X, Y, Z) with intensities 0..1."""
        found = self.linear(self.blocks(volumes).flatten(1)).squeeze(1).float()
        return self.mean + self.deviation * found


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(outputs, outputs, 3, padding=1),
        nn.BatchNorm3d(outputs),
        nn.ReLU(),
        nn.MaxPool3d(2),
    )


def network_of(facts: Mapping[str, Any]) -> BrainAgeNetwork:
    """The network that the facts of a checkpoint describe, as PyTorch initialises it."""
    return BrainAgeNetwork(facts["shape"], facts["age_mean"], facts["age_deviation"], facts["channels"])


# Data.


def age_condition(conditions: Conditions) -> Condition:
    """The condition `age`.

    Raises:
        BundleError: if there is none.
    """
    found = next((c for c in conditions if c.name == AGE), None)
    if found is None:
        raise BundleError(f"there is no condition '{AGE}', which brain age needs: see `conditions` in inference.json")
    return found


def age_of(row: Mapping[str, Any], condition: Condition, where: str) -> float | None:
    """Age in years as a row or a sidecar states it, in either form; None where it does not.

    Raises:
        BundleError: if it is no number.
    """
    for flag in (condition.raw, condition.name):
        value, _ = condition.from_cell(flag, row.get(flag))
        if value is not None:
            return round(condition.denormalise(condition.parse(flag, value, where)), 6)
    return None


def read_ages(folder: str | os.PathLike, conditions: Conditions) -> list[dict[str, Any]]:
    """The rows of a prepared dataset with `image` (a path), `age` (float32, in years), `participant_id` and `split`.

    Args:
        folder: holds `participants.tsv`.
        conditions: of which age alone is read.

    Raises:
        BundleError: as `scripts.volumes.datasets.participants`, or if a row has no age.
    """
    condition = age_condition(conditions)
    table = Path(str(folder)) / TABLE
    rows = participants(str(folder), Conditions(age=conditions.as_dict()[AGE]), missing="default")
    return [_aged(row, condition, table) for row in rows]


def _aged(row: Mapping[str, Any], condition: Condition, table: Path) -> dict[str, Any]:
    where = f"participant {row['participant_id']} in {table}"
    age = age_of(row["row"], condition, f" of {where}")
    if age is None:
        raise BundleError(f"{where} has no value of '{condition.raw}': leave the row out, or complete it")
    kept = {name: row[name] for name in ("image", "participant_id", "split")}
    return {**kept, "age": np.float32(age)}


def fingerprint(participant_id: str, age: float) -> str:
    """16 hexadecimal digits that stand for a participant at an age."""
    return hashlib.sha256(f"{participant_id} {age:.3f}".encode()).hexdigest()[:16]


def brain_age_facts(grid: Grid, rows: Sequence[Mapping[str, Any]], channels: Sequence[int] = CHANNELS) -> Facts:
    """What a checkpoint says of its network: grid, channels, ages, and fingerprints of who was trained on.

    Args:
        grid: of the volumes.
        rows: of the training, from `read_ages`.
        channels: of the network's blocks.

    Raises:
        BundleError: if all are of the same age.
    """
    ages = np.array([row["age"] for row in rows], np.float64)
    if np.ptp(ages) == 0.0:
        raise BundleError(f"all {len(ages)} training scans are of the age {ages[0]:g}: there is nothing to learn")
    return Facts(
        network="brain_age",
        shape=list(grid.shape),
        spacing=[abs(step) for step in grid.spacing],
        channels=list(channels),
        age_mean=float(ages.mean()),
        age_deviation=float(ages.std()),
        age_range=[float(ages.min()), float(ages.max())],
        trained_on=sorted(fingerprint(row["participant_id"], row["age"]) for row in rows),
    )


def random_rigid(prob: Any, shift: Any, rotation: Any) -> RandAffined:
    """The augmentation: shifts along and rotations about every axis, trilinear, zeros from outside.

    Args:
        prob: of a volume to be moved at all.
        shift: largest one, in voxels.
        rotation: largest one, in degrees.

    Raises:
        BundleError: if one is out of range.
    """
    voxels, angle = number(shift, "shift", 0.0), math.radians(number(rotation, "rotation", 0.0, 180.0))
    return RandAffined(
        keys="image",
        prob=probability(prob, "augment"),
        translate_range=[voxels] * 3,
        rotate_range=[angle] * 3,
        mode="bilinear",
        padding_mode="zeros",
    )


# Training.


class BrainAgeLoss(Loss):
    """L1 of ages, in standard deviations of those in training.

    A batch holds `image` (B, 1, X, Y, Z) with intensities 0..1, and `age` (B,) in years.

    Args:
        deviation: standard deviation of the ages in training, in years.
        amp: precision of the network.
    """

    inputs = ("image", "age")

    def __init__(self, deviation: float, amp: Any = False) -> None:
        self.deviation, self.amp = deviation, amp

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        """The `loss`, and `mae` in years."""
        with autocast(part["image"].device, self.amp):
            found = network(part["image"])
        mae = nn.functional.l1_loss(found, part["age"])
        return {"loss": mae / self.deviation, "mae": mae}


class BrainAgeValidation(HeldOut):
    """Mean absolute error (`mae`, years) and Pearson's `r` of the ages of held-out volumes; r only where it is defined.

    Args:
        amp: precision of the network.
        held_out: see `HeldOut`; items hold `image` and `age`.
    """

    def __init__(self, *, amp: Any = False, **held_out: Any) -> None:
        super().__init__(**held_out)
        self.amp = amp

    def measure(self, network: nn.Module, device: torch.device, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        """Age and predicted age of one volume."""
        with autocast(device, self.amp):
            found = network(torch.as_tensor(item["image"])[None].to(device))
        return {"age": float(item["age"]), "predicted": found.item()}

    def summarise(self, rows: Sequence[Mapping[str, Any]], iteration: int) -> dict[str, float]:
        """`mae`, and `r`."""
        age, predicted = (np.array([row[name] for row in rows]) for name in ("age", "predicted"))
        r = pearson(age, predicted)
        return {"mae": float(np.abs(predicted - age).mean())} | ({"r": r} if math.isfinite(r) else {})
