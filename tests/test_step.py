# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One iteration of any training."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts.training.ema import ExponentialMovingAverage
from scripts.training.optimisation import Batch, Optimisation
from scripts.training.step import Loss, TrainingStep


class Distance(Loss):
    """Mean squared distance of the outputs to `target`; tells what it was called with."""

    inputs = ("image", "target")

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, list[str]]] = []
        self.steps = True

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        self.calls.append(("loss", epoch, sorted(part)))
        return {"loss": (network(part["image"]) - part["target"]).square().mean()}

    def before_step(self, network: nn.Module, batch: Batch, iteration: int) -> dict[str, Tensor]:
        self.calls.append(("before", iteration, sorted(batch)))
        return {"weight": network(torch.ones(1, 1)).detach().squeeze()}

    def before_update(self, losses: Mapping[str, Tensor]) -> bool:
        self.calls.append(("update", int(losses["loss"]), []))
        return self.steps

    def after_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        self.calls.append(("after", epoch, sorted(batch)))
        return {"size": torch.tensor(float(len(batch["image"])))}


def one_step(loss: Distance) -> tuple[nn.Linear, ExponentialMovingAverage, dict[str, float]]:
    """A network that multiplies by 1, after a step, with its average and what was reported."""
    network = nn.Linear(1, 1, bias=False).eval()
    nn.init.ones_(network.weight)
    average = ExponentialMovingAverage(network, 0.9)
    optimisation = Optimisation(network, torch.optim.SGD(network.parameters(), 0.5), accumulate=2, clip_gradients=0.0)
    engine: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=3, iteration=7))
    batch = {"image": torch.ones(2, 1), "target": torch.full((2, 1), 3.0), "path": ["a", "b"]}
    return network, average, TrainingStep(optimisation, loss, average)(engine, batch)["losses"]


def test_step_minimises_follows_and_averages() -> None:
    network, average, losses = one_step(loss := Distance())
    assert losses == {"loss": 4.0, "gradient_norm": 4.0, "weight": 1.0, "size": 2.0}
    assert network.weight.item() == pytest.approx(3.0) and network.training
    assert average.updates == 1 and average.network.weight.item() == pytest.approx(3.0)  # type: ignore[union-attr, operator]
    names = ["image", "target"]
    told = [("before", 7, names), ("loss", 3, names), ("loss", 3, names), ("update", 4, []), ("after", 3, names)]
    assert loss.calls == told


def test_a_loss_may_leave_a_step_out() -> None:
    loss = Distance()
    loss.steps = False
    network, _, losses = one_step(loss)
    assert losses["gradient_norm"] == 0.0 and losses["loss"] == 4.0 and network.weight.item() == 1.0
