# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Both trainings with what watches them: validation, figures, TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunHere
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import Pipeline, content, same

from scripts.core.tables import read_table
from scripts.training.loss_record import read_lines
from scripts.volumes.pictures import figures_of


@pytest.fixture(scope="module")
def done(trained_folder: Path, run_here: RunHere) -> Pipeline:
    """Both stages trained for two epochs. Tests must not change it."""
    return Pipeline(trained_folder, run_here)


def scalars(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir)).Reload()


def test_autoencoder_is_validated_after_each_epoch(done: Pipeline) -> None:
    rows = read_table(done.autoencoder / "validation.tsv")
    assert [(row["epoch"], row["iteration"]) for row in rows] == [("1", "2"), ("2", "4")]
    psnr = [float(row["val_psnr"]) for row in rows]
    assert content(done.autoencoder / "best.pt")["facts"]["best"] == pytest.approx(max(psnr), rel=1e-5)
    assert [e.step for e in scalars(done.autoencoder).Scalars("val_psnr")] == [2, 4]
    record = [line for line in read_lines(done.autoencoder / "losses.jsonl") if "validation" in line]
    assert [line["validation"]["val_psnr"] for line in record] == pytest.approx(psnr, rel=1e-5)
    assert figures_of(done.autoencoder, 4).keys() == {"reconstruction"}
    assert scalars(done.autoencoder).Tags()["images"] == ["reconstruction"]


def test_diffusion_is_validated_after_each_epoch(done: Pipeline) -> None:
    rows = read_table(done.diffusion / "validation.tsv")
    loss = [float(row["val_loss"]) for row in rows]
    assert len(loss) == 2 and 0.1 < min(loss) < 2.0
    assert content(done.diffusion / "best.pt")["facts"]["best"] == pytest.approx(-min(loss), rel=1e-5)
    assert figures_of(done.diffusion, int(rows[1]["iteration"])) == {}


def test_training_is_the_same_without_validation(done: Pipeline, tmp_path: Path) -> None:
    done.train_diffusion(run_dir=str(tmp_path / "diffusion"), validate_every=0, sample_every=0)
    done.train_autoencoder(run_dir=str(tmp_path / "autoencoder"), validate_every=0)
    for name in ("autoencoder", "diffusion"):
        alone = content(tmp_path / name / f"{name}.pt")[name]
        assert same(alone, content(done.folder / name / f"{name}.pt")[name])
        assert not (tmp_path / name / "validation.tsv").exists()


def test_samples_of_the_averaged_weights_are_drawn(done: Pipeline, tmp_path: Path) -> None:
    flags = {"sample_every": 2, "num_inference_steps": 2, "ema_decay": 0.9, "validate_every": 0}
    done.train_diffusion(run_dir=str(tmp_path), **flags)
    (iteration,) = (int(path.stem.split("-")[1]) for path in (tmp_path / "figures").iterdir())
    assert figures_of(tmp_path, iteration).keys() == {"samples"}
    expected = content(done.diffusion / "diffusion.pt")["diffusion"]
    assert same(content(tmp_path / "diffusion.pt")["diffusion"], expected)
