# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The moving average of weights, against its sum written out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.core.errors import BundleError
from scripts.training.ema import ExponentialMovingAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def train_step(trained: nn.Module) -> None:
    """Moves every weight and the buffers of the normalisation."""
    trained.train()(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("decay", [0.25, 0.999])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_average_is_the_sum_of_the_weights(decay: float, count: int) -> None:
    trained = network()
    average, seen = ExponentialMovingAverage(trained, decay), []
    for _ in range(count):
        train_step(trained)
        average.update()
        seen.append(trained[0].weight.detach().double().numpy().copy())  # type: ignore[index, union-attr]
    kept = np.array([0.0, *(min(decay, (1 + n) / (10 + n)) for n in range(1, count))])
    shares = [(1 - kept[k]) * np.prod(kept[k + 1 :]) for k in range(count)]
    assert sum(shares) == pytest.approx(1.0)
    expected = np.tensordot(shares, np.stack(seen), axes=1)
    averaged = average.network[0].weight.double().numpy()  # type: ignore[index, union-attr]
    assert np.allclose(averaged, expected, atol=1e-5)


def test_buffers_are_the_networks() -> None:
    trained = network()
    average = ExponentialMovingAverage(trained, 0.9)
    for _ in range(3):
        train_step(trained)
        average.update()
    ours, theirs = dict(average.network.named_buffers()), dict(trained.named_buffers())
    assert int(ours["1.num_batches_tracked"]) == 3
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_averaged_network_is_apart_from_the_trained_one() -> None:
    trained = network()
    average = ExponentialMovingAverage(trained, 0.9)
    average.update()
    train_step(trained)
    assert not equal(average.network, trained)
    assert trained.training and not average.network.training
    assert all(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in average.network.parameters())


def test_network_whose_blocks_recompute_their_activations() -> None:
    trained = network()
    trained[0].forward = partial(checkpoint, trained[0].forward, use_reentrant=False)  # type: ignore[index, union-attr]
    average = ExponentialMovingAverage(trained, 0.9)
    given = torch.randn(2, 3)
    before = average.network(given)
    train_step(trained)
    assert torch.equal(average.network(given), before)


def test_saved_average_continues_and_loads_into_the_network(tmp_path: Path) -> None:
    def averages(resume_at: int | None) -> ExponentialMovingAverage:
        trained = network()
        average = ExponentialMovingAverage(trained, 0.99)
        for step in range(6):
            if step == resume_at:
                torch.save(average.state_dict(), tmp_path / "average.pt")
                average = ExponentialMovingAverage(trained, 0.99)
                average.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
            train_step(trained)
            average.update()
        return average

    whole, resumed = averages(None), averages(3)
    assert equal(whole.network, resumed.network)
    assert resumed.state_dict()["updates"] == 6
    fresh = network()
    fresh.load_state_dict(whole.state_dict()["weights"])
    assert equal(fresh, whole.network)


@pytest.mark.parametrize("decay", [-0.1, 1.5, "x"])
def test_impossible_decays(decay: Any) -> None:
    with pytest.raises(BundleError, match="--ema_decay must be"):
        ExponentialMovingAverage(network(), decay)
