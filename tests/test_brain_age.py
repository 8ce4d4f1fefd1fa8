# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The brain age network and its training: what it is, that it learns, and that it goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import ROWS, head, refused, write_dataset
from torch import nn
from trained import content, difference

from scripts.conditions.conditions import Conditions
from scripts.core.tables import read_table, write_table
from scripts.measuring.brain_age import AGE, BrainAgeNetwork, network_of, random_rigid, read_ages
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

TRAIN = "configs/train_brain_age.yaml"


def bright_heads(folder: Path, grid: Grid, number: int) -> Path:
    """A dataset in which a head is the brighter the older it is, its last quarter held out."""
    rows = []
    for index in range(number):
        age = 44 + 38 * (index * 0.618 % 1.0)
        volume = head(grid, index % 4).numpy() * (0.3 + (age - 44) / 38)
        path = Path(f"sub-{index}.nii.gz")
        folder.mkdir(exist_ok=True)
        write_volume(folder / path, volume, grid)
        split = "validation" if index >= 3 * number // 4 else "train"
        rows.append({"participant_id": f"sub-{index}", "path": path, "split": split, "age_years": f"{age:.2f}"})
    write_table(folder / "participants.tsv", rows)
    return folder


def by_hand(shape: tuple[int, int, int]) -> int:
    """Number of weights of the network, from its description."""
    count, inputs, sides = 0, 1, shape
    for outputs in (8, 16, 32, 64, 128):
        count += 27 * inputs * outputs + outputs + 27 * outputs * outputs + outputs + 2 * outputs
        inputs, sides = outputs, (sides[0] // 2, sides[1] // 2, sides[2] // 2)
    return count + 128 * sides[0] * sides[1] * sides[2] + 1


@pytest.mark.parametrize("shape", [(160, 224, 160), (80, 112, 80), (182, 218, 182), (32, 48, 35)])
def test_number_of_weights(shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = BrainAgeNetwork(shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == by_hand(shape)


def test_layers_are_in_the_papers_order() -> None:
    network = BrainAgeNetwork((32, 48, 32), mean=60.0, deviation=8.0)
    kinds = [type(layer) for block in network.blocks for layer in block]  # type: ignore[union-attr, attr-defined]
    assert kinds == 5 * [nn.Conv3d, nn.ReLU, nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.MaxPool3d]
    ages = network(torch.rand(3, 1, 32, 48, 32))
    assert ages.shape == (3,) and ages.dtype == torch.float32
    nn.init.zeros_(network.linear.weight)
    nn.init.constant_(network.linear.bias, 0.5)
    assert network(torch.rand(2, 1, 32, 48, 32)).tolist() == [64.0, 64.0]
    assert "needs 32 voxels a side, got (32, 31, 32)" in refused(BrainAgeNetwork, (32, 31, 32))


@pytest.mark.slow
def test_it_learns_what_brightness_tells(grid: Grid, tmp_path: Path, run_here: RunHere) -> None:
    dataset, run_dir = bright_heads(tmp_path / "dataset", grid, 32), tmp_path / "run"
    flags = {"max_epochs": 10, "lr": 3.0e-3, "lr_decay_factor": 0.7, "batch_size": 4, "augment": 0.0}
    run_here([BASE, TRAIN, TINY], dataset_dir=str(dataset), run_dir=str(run_dir), seed=1, cache_rate=1.0, **flags)
    rows = read_table(run_dir / "validation.tsv", ("epoch", "iteration", "val_mae", "val_r"))
    guess = 38 / 4  # the error of the middle age, for ages spread evenly
    assert float(rows[-1]["val_r"]) > 0.7 and min(float(row["val_mae"]) for row in rows) < 0.8 * guess
    best = content(run_dir / "best.pt")["facts"]["best"]
    assert best == pytest.approx(-min(float(row["val_mae"]) for row in rows), rel=1e-5)
    facts = content(run_dir / "brain_age.pt")["facts"]
    ages = [float(row["age_years"]) for row in read_table(dataset / "participants.tsv")[:24]]
    assert facts["shape"] == [32, 48, 32] and facts["spacing"] == pytest.approx([5.0, 14 / 3, 5.0])
    assert facts["age_mean"] == pytest.approx(np.mean(ages)) and facts["age_deviation"] == pytest.approx(np.std(ages))
    assert len(set(facts["trained_on"])) == 24
    network_of(facts).load_state_dict(content(run_dir / "brain_age.pt")["brain_age"])


def test_resumed_training_ends_in_the_same_weights(grid: Grid, tmp_path: Path, run_here: RunHere) -> None:
    dataset = write_dataset(tmp_path / "dataset", grid)
    common: dict[str, Any] = {"dataset_dir": str(dataset), "seed": 1, "augment": 1.0, "checkpoint_every": 1}
    common |= {"epoch_length": 2, "keep_checkpoints": 9, "max_epochs": 2, "ema_decay": 0.9}
    run_here([BASE, TRAIN, TINY], run_dir=str(tmp_path / "whole"), **common)
    run_here([BASE, TRAIN, TINY], run_dir=str(tmp_path / "parts"), **common)
    for path in (tmp_path / "parts").glob("*.pt"):
        if path.name not in ("checkpoint_iteration=1.pt", "best.pt"):
            path.unlink()
    run_here([BASE, TRAIN, TINY], run_dir=str(tmp_path / "parts"), **common)
    whole, parts = (content(tmp_path / name / "checkpoint_iteration=4.pt") for name in ("whole", "parts"))
    for name in ("brain_age", "brain_age_ema", "optimisation", "facts", "trainer"):
        assert difference(whole[name], parts[name]) == 0.0, name
    assert len(read_table(tmp_path / "parts" / "validation.tsv")) == 2


def test_rows_without_age_are_named(grid: Grid, conditions: Conditions, tmp_path: Path) -> None:
    rows = [{**row} for row in ROWS]
    rows[2]["age_years"] = "n/a"
    folder = write_dataset(tmp_path / "dataset", grid, rows)
    assert "participant sub-2" in refused(read_ages, folder, conditions)
    without = Conditions(gender=conditions.as_dict()["gender"])
    assert f"there is no condition '{AGE}'" in refused(read_ages, folder, without)


def test_other_conditions_may_be_unknown(grid: Grid, conditions: Conditions, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{**row, "brain_vol_mm3": "n/a"} for row in ROWS]
    found = read_ages(write_dataset(tmp_path / "dataset", grid, rows), conditions)
    assert [float(row["age"]) for row in found] == [50.0, 60.0, 70.0, 80.0]


def test_one_age_teaches_nothing(grid: Grid, tmp_path: Path, run_here: RunHere) -> None:
    rows: list[dict[str, object]] = [{**row, "age_years": 60} for row in ROWS]
    folder = write_dataset(tmp_path / "dataset", grid, rows)
    flags = {"dataset_dir": str(folder), "run_dir": str(tmp_path / "run")}
    assert "training scans are of the age 60: there is nothing to learn" in refused(
        run_here, [BASE, TRAIN, TINY], **flags
    )


def test_bad_scan_is_refused_before_the_first_step(grid: Grid, tmp_path: Path, run_here: RunHere) -> None:
    folder = write_dataset(tmp_path / "dataset", grid)
    finer = Grid((40, 56, 40), [s * 0.8 for s in grid.spacing], grid.origin)
    path = folder / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    write_volume(path, head(finer, 0).numpy(), finer)
    flags = {"dataset_dir": str(folder), "run_dir": str(tmp_path / "run"), "resample_to_grid": False}
    told = refused(run_here, [BASE, TRAIN, TINY], **flags)
    assert f"the volume {path} has shape (40, 56, 40), not (32, 48, 32)" in told
    assert not (tmp_path / "run").exists()


def test_augmentation_moves_and_can_be_switched_off() -> None:
    volume = torch.zeros(1, 16, 16, 16)
    volume[0, 8, 8, 8] = 1.0
    still, moved = random_rigid(0.0, 5, 10), random_rigid(1.0, 3, 0)
    assert torch.equal(torch.as_tensor(still({"image": volume})["image"]), volume)
    moved.set_random_state(seed=1)
    mass = torch.as_tensor(moved({"image": volume})["image"])[0]
    centre = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij")).mul(mass).flatten(1).sum(1)
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-4)
    distance = (centre - 8.0).abs()
    assert 0.0 < distance.max() <= 3.0 + 1e-4
    assert "--rotation must be at most 180" in refused(random_rigid, 0.5, 1, 270)
    assert "--augment must be from 0 to 1" in refused(random_rigid, 2, 1, 1)
