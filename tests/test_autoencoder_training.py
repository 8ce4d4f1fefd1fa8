# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One iteration of the autoencoder's adversarial training."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heads import head
from monai.networks.nets import PatchDiscriminator
from released import configuration, generative_network
from torch import Tensor, nn
from trained import same

from scripts.autoencoder.training import (
    AdversarialLoss,
    DrawPosteriorNoised,
    PosteriorAutoencoder,
    autoencoder_to_train,
    kl_to_standard_normal,
)
from scripts.core.errors import BundleError
from scripts.networks.weights import load_network
from scripts.training.optimisation import Optimisation
from scripts.training.step import TrainingStep


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def test_kl_is_that_of_torch_distributions() -> None:
    mean, std = torch.randn(3, 2, 4, 5, 6), torch.rand(3, 2, 4, 5, 6) + 0.05
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(mean, std), normal(torch.zeros(()), torch.ones(())))
    assert kl_to_standard_normal(mean, std).item() == pytest.approx(reference.sum().item() / 3, rel=1e-5)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.ones(2, 3)).item() == 0.0
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)).isfinite()


class Quadratic(nn.Module):
    """In the place of the perceptual loss."""

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        return (reconstruction - image).square().mean()


def discriminator() -> nn.Module:
    options = {"kernel_size": 4, "activation": None, "norm": "BATCH", "bias": False, "padding": 1}
    return PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1, **options)


class Stage:
    """What one iteration needs, with plain gradient descent: networks, the step, and an engine at an epoch."""

    def __init__(self, epoch: int, lr: float = 0.1, clip: float = 0.0, perceptual: Any = None, **weights: Any) -> None:
        config = configuration()
        self.autoencoder: Any = config.get_parsed_content("autoencoder_def")
        old: Any = SimpleNamespace(path="x", facts={}, state=generative_network(config, "autoencoder_def").state_dict())
        load_network(self.autoencoder, old, 1)
        self.opponent = discriminator()
        wrapped = PosteriorAutoencoder(self.autoencoder)
        self.generator, self.judge = (
            Optimisation(net, torch.optim.SGD(net.parameters(), lr), clip_gradients=clip)
            for net in (wrapped, self.opponent)
        )
        given = {"perceptual_weight": 0.0, "kl_weight": 1e-8, "adversarial_weight": 0.0, **weights}
        self.loss = AdversarialLoss(self.judge, perceptual, **given, warm_up_epochs=2)
        self.step = TrainingStep(self.generator, self.loss)
        self.engine: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=epoch, iteration=1))

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self.step(self.engine, batch)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 1, 16, 16, 16, generator=generator)
    return {"image": images, "noise": torch.randn(2, 3, 4, 4, 4, generator=generator)}


def test_one_iteration_minimises_the_weighted_sum(batch: dict[str, Tensor]) -> None:
    weights = {
        "perceptual_weight": 0.5,
        "kl_weight": 1e-3,
        "adversarial_weight": 0.25,
        "l1_weight": 2.0,
        "l2_weight": 4,
    }
    stage = Stage(3, perceptual=Quadratic(), **weights)
    network, opponent = copy.deepcopy(stage.autoencoder), copy.deepcopy(stage.opponent)
    output = stage(batch)

    images = batch["image"]
    mean, std = network.encode(images)
    reconstruction = network.decode(mean + std * batch["noise"])
    terms = {
        "l1": (reconstruction - images).abs().mean(),
        "l2": (reconstruction - images).square().mean(),
        "perceptual": (reconstruction - images).square().mean(),
        "kl": kl_to_standard_normal(mean, std),
        "adversarial": (opponent(reconstruction)[-1] - 1).square().mean(),
    }
    total = torch.stack([weights[f"{name}_weight"] * term for name, term in terms.items()]).sum()
    total.backward()
    opponent.zero_grad()
    real, fake = opponent(images)[-1], opponent(reconstruction.detach())[-1]
    judged = 0.5 * ((real - 1).square().mean() + fake.square().mean())
    judged.backward()

    expected = {"loss": total, **terms, "discriminator": judged}
    assert {name: output["losses"][name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    assert output["losses"].keys() - expected.keys() == {"gradient_norm", "discriminator_gradient_norm"}
    for ours, reference in ((stage.autoencoder, network), (stage.opponent, opponent)):
        for moved, parameter in zip(ours.parameters(), reference.parameters(), strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert torch.allclose(moved, parameter - 0.1 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "weight", "joins"), [(1, 0.1, False), (2, 0.1, False), (3, 0.1, True), (3, 0.0, False)]
)
def test_discriminator_rests_in_the_warm_up(epoch: int, weight: float, joins: bool, batch: dict[str, Tensor]) -> None:
    stage = Stage(epoch, adversarial_weight=weight)
    before = copy.deepcopy(stage.opponent.state_dict())
    losses = stage(batch)["losses"]
    assert {"adversarial", "discriminator"} <= losses.keys() if joins else "discriminator" not in losses
    assert same(before, stage.opponent.state_dict()) is not joins


def test_gradients_are_clipped(batch: dict[str, Tensor]) -> None:
    stage = Stage(1, lr=1.0, clip=1e-2, kl_weight=1.0)
    before = copy.deepcopy(stage.autoencoder.state_dict())
    stage(batch)
    after = stage.autoencoder.state_dict()
    moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    assert moved.item() == pytest.approx(1e-2, rel=1e-2)


def test_kl_and_perceptual_loss_are_in_float32_under_autocast(batch: dict[str, Tensor]) -> None:
    seen = []

    class Spying(Quadratic):
        def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
            seen.append((reconstruction.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(reconstruction, image)

    stage = Stage(1, perceptual=Spying(), perceptual_weight=1.0, kl_weight=1.0)
    stage.loss.amp = "bf16"
    losses = stage(batch)["losses"]
    assert seen == [(torch.float32, False)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean, std = Stage(1).autoencoder.encode(batch["image"])
    assert losses["kl"] == pytest.approx(kl_to_standard_normal(mean.float(), std.float()).item(), rel=1e-6)


def test_crops_that_the_network_cannot_halve() -> None:
    draw = DrawPosteriorNoised("image", channels=3, factor=4)
    assert draw({"image": torch.zeros(1, 8, 12, 16)})["noise"].shape == (3, 2, 3, 4)
    with pytest.raises(BundleError, match="multiple of 4: see --patch_shape"):
        draw({"image": torch.zeros(1, 8, 10, 16)})


@pytest.mark.parametrize("value", [-1.0, float("nan"), "foo", True])
def test_weights_that_are_none(value: Any) -> None:
    with pytest.raises(BundleError, match="--kl_weight must be a number of at least 0"):
        Stage(1, kl_weight=value)


def test_reconstruction_of_two_volumes_improves() -> None:
    grid = configuration().get_parsed_content("grid")
    images = torch.stack([head(grid, seed)[::2, ::3, ::2] for seed in range(2)])[:, None]
    stage = Stage(1)
    autoencoder = autoencoder_to_train(configuration().get_parsed_content("autoencoder_def"), -8.0)
    network = PosteriorAutoencoder(autoencoder)
    stage.step.optimisation = Optimisation(network, torch.optim.Adam(network.parameters(), 5e-3))
    losses = [stage({"image": images, "noise": torch.randn(2, 3, 4, 4, 4)})["losses"]["l1"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
