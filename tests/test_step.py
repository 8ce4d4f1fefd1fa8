# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One iteration of any training."""

from __future__ import annotations

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

    def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
        self.calls.append(("loss", epoch, sorted(part)))
        return {"loss": (network(part["image"]) - part["target"]).square().mean()}

    def after_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        self.calls.append(("after", epoch, sorted(batch)))
        return {"size": torch.tensor(float(len(batch["image"])))}


def test_step_minimises_follows_and_averages() -> None:
    network, loss = nn.Linear(1, 1, bias=False).eval(), Distance()
    nn.init.ones_(network.weight)
    average = ExponentialMovingAverage(network, 0.9)
    optimisation = Optimisation(network, torch.optim.SGD(network.parameters(), 0.5), accumulate=2, clip_gradients=0.0)
    engine: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=3))
    batch = {"image": torch.ones(2, 1), "target": torch.full((2, 1), 3.0), "path": ["a", "b"]}
    losses = TrainingStep(optimisation, loss, average)(engine, batch)["losses"]
    assert losses == {"loss": 4.0, "gradient_norm": 4.0, "size": 2.0}
    assert network.weight.item() == pytest.approx(3.0) and network.training
    assert average.updates == 1 and average.network.weight.item() == pytest.approx(3.0)  # type: ignore[union-attr, operator]
    names = ["image", "target"]
    assert loss.calls == [("loss", 3, names), ("loss", 3, names), ("after", 3, names)]
