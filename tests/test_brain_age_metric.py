# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Brain age in the evaluation: which volumes are compared, and what is said of a network that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, RunHere
from heads import refused
from PIL import Image
from torch import nn

from scripts.core.tables import read_table, write_table
from scripts.evaluation.pairs import PairSimilarity
from scripts.measuring.brain_age import BrainAgeNetwork, fingerprint
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

EVALUATE = "configs/evaluate.yaml"
GRID = Grid((32, 32, 32), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
AGES = (50.0, 60.0, 70.0, 80.0)


def network_of_brightness() -> BrainAgeNetwork:
    """Predicts 100 times the intensity of a constant volume: the first kernel's centre is passed on by every block."""
    network = BrainAgeNetwork(GRID.shape).eval()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data[0, 0, 1, 1, 1] = 1.0
        if isinstance(module, nn.BatchNorm3d):
            nn.init.constant_(module.weight, (1.0 + module.eps) ** 0.5)
    network.linear.weight.data[0, 0] = 100.0
    return network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the training writes it, of a network that was trained on `sub-0`."""
    path = tmp_path_factory.mktemp("network") / "brain_age.pt"
    trained: dict[str, Any] = {"age_mean": 0.0, "age_deviation": 1.0, "age_range": [44.0, 82.0]}
    trained |= {"trained_on": [fingerprint("sub-0", AGES[0])], "channels": [8, 16, 32, 64, 128]}
    facts = {"network": "brain_age", "shape": [32, 32, 32], "spacing": [2.0, 2.0, 2.0], **trained}
    torch.save({"brain_age": network_of_brightness().state_dict(), "facts": facts}, path)
    return path


def volume(path: Path, apparent_age: float, grid: Grid = GRID) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, np.full(grid.shape, apparent_age / 100, np.float32), grid, "float32")


def samples(folder: Path, ages: Any = AGES, error: float = 2.0) -> str:
    """Samples that look `error` years older than was asked for."""
    for index, age in enumerate(ages):
        path = folder / f"sample_seed-1_{index:06d}.nii.gz"
        volume(path, 60.0 if age is None else age + error)
        path.with_name(f"{path.name.split('.')[0]}.json").write_text(json.dumps({"conditions": {"age_years": age}}))
    return str(folder)


def people(folder: Path, ages: Any = AGES) -> str:
    """A dataset of people who look their age."""
    rows = [
        {"participant_id": f"sub-{i}", "path": f"sub-{i}.nii.gz", "age_years": "n/a" if age is None else age}
        for i, age in enumerate(ages)
    ]
    for row, age in zip(rows, ages):
        volume(folder / str(row["path"]), 60.0 if age is None else age)
    write_table(folder / "participants.tsv", rows)
    return str(folder)


def evaluated(run_here: RunHere, output: Path, checkpoint: Path, **flags: Any) -> dict[str, Any]:
    given = {"brain_age_path": str(checkpoint), "output_dir": str(output), "num_pairs": 1, "pair_metrics": {}}
    run_here([BASE, EVALUATE], **given, **flags)
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    return {f"{row['kind']}_{row['metric']}": row for row in rows if row["measure"] == "brain_age"}


def test_ages_of_samples_and_of_people_held_out(checkpoint: Path, run_here: RunHere, tmp_path: Path) -> None:
    flags = {"synthetic_dir": samples(tmp_path / "samples"), "real_dir": people(tmp_path / "people")}
    metrics = evaluated(run_here, tmp_path / "report", checkpoint, **flags)
    assert metrics["synthetic_mae"]["value"] == pytest.approx(2.0, abs=1e-3)
    assert metrics["synthetic_pearson"]["value"] == pytest.approx(1.0)
    assert metrics["synthetic_slope"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["real_mae"]["count"] == 3, "the network was trained on the first"
    assert metrics["real_mae"]["value"] == pytest.approx(0.0, abs=1e-3)
    rows = read_table(tmp_path / "report" / "brain_age.tsv")
    assert [row["set"] for row in rows] == ["synthetic"] * 4 + ["real"] * 3
    assert [float(row["predicted_years"]) for row in rows[:4]] == pytest.approx([52, 62, 72, 82], abs=0.01)
    with Image.open(tmp_path / "report" / "brain_age.png") as picture:
        assert picture.size == (1350, 630) and np.asarray(picture.convert("L")).std() > 5


def test_finer_volumes_are_averaged_onto_the_networks_grid(checkpoint: Path, run_here: RunHere, tmp_path: Path) -> None:
    folder, fine = Path(samples(tmp_path / "samples", error=0.0)), Grid((64, 64, 64), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    stripes = np.where(np.arange(64) % 2, 0.1, -0.1).astype(np.float32)[:, None, None]
    for index, age in enumerate(AGES):
        striped = np.broadcast_to(age / 100 + stripes, fine.shape)
        write_volume(folder / f"sample_seed-1_{index:06d}.nii.gz", striped, fine, "float32")
    found = evaluated(run_here, tmp_path / "report", checkpoint, synthetic_dir=str(folder))
    assert found["synthetic_mae"]["value"] == pytest.approx(0.0, abs=1e-3)


def test_ages_are_kept(checkpoint: Path, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"synthetic_dir": samples(tmp_path / "samples")}
    first = evaluated(run_here, tmp_path / "report", checkpoint, **flags)
    monkeypatch.setattr(BrainAgeNetwork, "forward", None)
    assert evaluated(run_here, tmp_path / "report", checkpoint, **flags) == first


def test_people_alone(checkpoint: Path, run_here: RunHere, tmp_path: Path) -> None:
    found = evaluated(run_here, tmp_path / "report", checkpoint, real_dir=people(tmp_path / "people"))
    assert found.keys() == {f"real_{name}" for name in ("mae", "pearson", "spearman", "slope")}


def test_people_without_age_are_left_out(
    checkpoint: Path, run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"synthetic_dir": samples(tmp_path / "samples"), "real_dir": people(tmp_path / "people", [None, None])}
    found = evaluated(run_here, tmp_path / "report", checkpoint, **flags)
    assert {name.split("_")[0] for name in found} == {"synthetic"}
    assert "--real_dir: 2 of 2 volumes have no age: brain age leaves them out" in caplog.text


def test_one_age_has_no_correlation(
    checkpoint: Path, run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluated(run_here, tmp_path / "report", checkpoint, synthetic_dir=samples(tmp_path / "same", [60.0] * 3))
    assert found["synthetic_pearson"]["value"] == "nan"
    assert found["synthetic_mae"]["value"] == pytest.approx(2.0, abs=1e-3)
    assert "every volume has the same synthetic_age: its correlation is not defined" in caplog.text


def test_what_cannot_be_compared(checkpoint: Path, run_here: RunHere, tmp_path: Path) -> None:
    def line(path: Path, folder: str) -> str:
        return refused(evaluated, run_here, tmp_path / "report", path, synthetic_dir=folder)

    good = samples(tmp_path / "samples")
    assert "train one with configs/train_brain_age.yaml" in line(tmp_path / "none.pt", good)
    other = tmp_path / "other.pt"
    torch.save({"autoencoder": nn.Linear(2, 2).state_dict(), "facts": {}}, other)
    assert "holds no weights of the brain_age" in line(other, good)
    bare = tmp_path / "bare.pt"
    torch.save(network_of_brightness().state_dict(), bare)
    assert "is of no brain age network (it has no shape)" in line(bare, good)
    assert "no volume has an age to compare with" in line(checkpoint, samples(tmp_path / "ageless", [None, None]))
    for index in range(2):
        volume(tmp_path / "large" / f"{index}.nii.gz", 50.0, Grid((33, 32, 32), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0)))
    assert "has (33, 32, 32) voxels of 2 x 2 x 2 mm, the brain age network was trained on (32, 32, 32)" in line(
        checkpoint, str(tmp_path / "large")
    )


def test_what_cannot_be_compared_is_told_before_anything_is_measured(
    checkpoint: Path, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairSimilarity, "update", lambda self: pytest.fail("pairs are measured first"))
    ageless = samples(tmp_path / "ageless", [None, None])
    line = refused(evaluated, run_here, tmp_path / "report", checkpoint, synthetic_dir=ageless)
    assert "no volume has an age to compare with" in line
