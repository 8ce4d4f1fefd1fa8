# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The record of a training's losses, rates and validations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.core.errors import BundleError
from scripts.training.loss_record import LossRecord, read_lines
from scripts.training.optimisation import LearningRate
from scripts.training.validation import Evaluation


class Validated(Evaluation):
    """One value."""

    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        return {"loss": 1.0 / iteration}


def step(engine: Engine, batch: Any) -> dict[str, Any]:
    return {"losses": {"loss": float(engine.state.iteration), "kl": 0.5}}


def train(folder: Path, epochs: int = 4, resumed_at: int = 0, stop_at: int | None = None) -> list[dict[str, Any]]:
    """Epochs of three iterations, each second one validated, with a rate that falls; the lines that it leaves."""
    engine = Engine(step)
    engine.state.metrics = {}

    @engine.on(Events.STARTED)
    def resume() -> None:
        engine.state.iteration, engine.state.epoch = resumed_at, resumed_at // 3

    if stop_at is not None:

        @engine.on(Events.ITERATION_STARTED(once=stop_at))
        def stop() -> None:
            raise KeyboardInterrupt

    rate = LearningRate(torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0), 0.5, "cosine", name="lr")
    for handler in (rate, Validated(nn.Linear(1, 1), folder, every=2), LossRecord(folder, [rate])):
        handler.attach(engine)
    engine.run([0] * 99, max_epochs=epochs, epoch_length=3)
    return list(read_lines(folder / "losses.jsonl"))


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_line_an_iteration_and_one_a_validation(tmp_path: Path) -> None:
    lines = train(tmp_path)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    first, validation = lines[0], lines[6]
    assert {**first, "seconds": 0} == {
        "iteration": 1,
        "epoch": 1,
        "seconds": 0,
        "losses": {"loss": 1.0, "kl": 0.5},
        "rates": {"lr": 0.5},
    }
    assert {**validation, "seconds": 0} == {"iteration": 6, "epoch": 2, "seconds": 0, "validation": {"val_loss": 1 / 6}}
    assert 0.0 < lines[9]["rates"]["lr"] < 0.5
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


@pytest.mark.parametrize("resumed_at", [0, 4, 6])
def test_resumed_training_leaves_the_lines_of_an_unbroken_one(resumed_at: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop_at=9)
    with open(tmp_path / "parts" / "losses.jsonl", "a") as file:
        file.write('{"iteration": 9, "lo')
    assert without_time(train(tmp_path / "parts", resumed_at=resumed_at)) == without_time(whole)


def test_seconds_go_on_after_a_stop(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=5)
    path = tmp_path / "losses.jsonl"
    path.write_text(
        path.read_text().replace(
            '"iteration": 4, "epoch": 2, "seconds": 0', '"iteration": 4, "epoch": 2, "seconds": 70'
        )
    )
    assert [line["seconds"] >= 70 for line in train(tmp_path, resumed_at=4)] == [False] * 3 + [True] * 11


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write"):
        LossRecord(tmp_path / "file", []).start(Engine(step))
