# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One iteration of the diffusion model's training."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from released import configuration
from torch import Tensor

from scripts.diffusion.objective import DiffusionObjective
from scripts.diffusion.training import DenoisingLoss
from scripts.training.ema import ExponentialMovingAverage
from scripts.training.optimisation import Optimisation
from scripts.training.step import TrainingStep

ENGINE: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=1, iteration=1))


class Stage:
    """The tiny UNet with every weight random, and what trains it by plain gradient descent."""

    def __init__(self, decay: float | None = None, amp: Any = False, accumulate: int = 1, **objective: Any) -> None:
        config = configuration()
        self.network: Any = config.get_parsed_content("network_def").train()
        torch.manual_seed(3)
        for parameter in self.network.parameters():  # fresh output layers are zero, and would hide mistakes
            torch.nn.init.normal_(parameter, std=0.05)
        self.schedule = config.get_parsed_content("schedule")
        self.objective = DiffusionObjective(self.schedule, **objective)
        optimizer = torch.optim.SGD(self.network.parameters(), 0.1)
        self.optimisation = Optimisation(self.network, optimizer, amp, accumulate, clip_gradients=0.0)
        self.average = None if decay is None else ExponentialMovingAverage(self.network, decay)
        self.inferer = config.get_parsed_content("hybrid_inferer")
        self.step = TrainingStep(self.optimisation, DenoisingLoss(self.inferer, self.objective), self.average)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self.step(ENGINE, batch)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latent, noise = torch.randn(2, 4, 3, 4, 8, 4, generator=generator)
    condition = torch.rand(4, 4, generator=generator)
    return {"image": latent, "noise": noise, "condition": condition, "timestep": torch.tensor([3, 250, 600, 999])}


def test_one_iteration_minimises_the_error_of_the_noise(batch: dict[str, Tensor]) -> None:
    stage = Stage()
    reference = copy.deepcopy(stage.network)
    losses = stage(batch)["losses"]

    noisy = stage.schedule.add_noise(batch["image"], batch["noise"], batch["timestep"])
    condition = batch["condition"]
    x = torch.cat([noisy, condition[:, :, None, None, None].expand(-1, -1, 4, 8, 4)], dim=1)
    output = reference(x=x, timesteps=batch["timestep"], context=condition[:, None])
    loss = torch.nn.functional.mse_loss(output, batch["noise"])
    loss.backward()
    assert losses["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for moved, parameter in zip(stage.network.parameters(), reference.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(moved, parameter - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_make_the_same_step(batch: dict[str, Tensor]) -> None:
    whole, parted = Stage(), Stage(accumulate=4)
    assert whole(batch)["losses"] == pytest.approx(parted(batch)["losses"], rel=1e-4)
    for a, b in zip(whole.network.parameters(), parted.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_weights_of_the_objective_weigh(batch: dict[str, Tensor]) -> None:
    stage = Stage(min_snr_gamma=5.0)
    plain = Stage()(batch)["losses"]["loss"]
    assert stage(batch)["losses"]["loss"] < plain  # only the first timestep's ratio is above 5


def last_bias(network: Any) -> Tensor:
    return network.out[2].conv.bias


def test_average_follows_the_weights(batch: dict[str, Tensor]) -> None:
    stage = Stage(decay=0.5)
    assert stage.average is not None
    seen = []
    for _ in range(3):
        stage(batch)
        seen.append(last_bias(stage.network).detach().clone())
    first = seen[0]
    second = first + (1 - 2 / 11) * (seen[1] - first)
    expected = second + (1 - 3 / 12) * (seen[2] - second)
    assert torch.allclose(last_bias(stage.average.network), expected, atol=1e-6)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_comes_close(amp: str, batch: dict[str, Tensor]) -> None:
    exact, half = Stage(), Stage(amp=amp)
    half.inferer.amp = amp
    assert half(batch)["losses"]["loss"] == pytest.approx(exact(batch)["losses"]["loss"], rel=2e-2)
    assert all(parameter.dtype == torch.float32 for parameter in half.network.parameters())
