# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The parts of LSGAN and VAE-GAN: networks, gradients of each player, what keeps them together, and their collapse."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from monai.metrics import MultiScaleSSIMMetric
from released import configuration
from scipy.ndimage import shift
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trained import same

from scripts.core.errors import BundleError
from scripts.gan.augmentation import Augmentation, DrawNoisesd
from scripts.gan.diversity import SampleDiversity, ring
from scripts.gan.losses import LSGANLoss, VAEGANLoss
from scripts.gan.opponent import CROSS_ENTROPY, LEAST_SQUARES, Opponent, Steadying
from scripts.gan.volume_networks import VariationalGenerator, VolumeDiscriminator, VolumeEncoder, VolumeGenerator
from scripts.training.health import TrainingHealth, as_least_squares, collapse, opponents
from scripts.training.optimisation import Batch, Optimisation
from scripts.training.repeatable import training_loader
from scripts.training.step import TrainingStep

SHAPE, NOISE, WIDTHS = (16, 24, 16), 6, [4, 4, 8]
STILL = Augmentation(0.0, 0, 0.0)
GAN = "configs/train_gan.yaml"


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def players() -> tuple[VolumeEncoder, VolumeGenerator, VolumeDiscriminator]:
    encoder, generator = VolumeEncoder(NOISE, WIDTHS, SHAPE), VolumeGenerator(NOISE, [8, 8, 4], SHAPE)
    return encoder, generator, VolumeDiscriminator(WIDTHS, SHAPE)


def batch_of(augmentation: Augmentation = STILL, size: int = 2) -> dict[str, Tensor]:
    draw = DrawNoisesd("image", NOISE, augmentation)
    rows: list[Any] = [draw({"image": torch.rand(1, *SHAPE)}) for _ in range(size)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def sgd(network: nn.Module, **options: Any) -> Optimisation:
    return Optimisation(network, torch.optim.SGD(network.parameters(), 0.1), clip_gradients=0.0, **options)


class Game:
    """One iteration of either GAN, with plain gradient descent."""

    def __init__(self, vae: bool, augmentation: Augmentation = STILL, accumulate: int = 1, **steadying: Any) -> None:
        self.encoder, self.generator, self.discriminator = players()
        self.judge = sgd(self.discriminator, accumulate=accumulate)
        opponent = Opponent(self.judge, augmentation, Steadying(**steadying))
        self.network: nn.Module = VariationalGenerator(self.encoder, self.generator) if vae else self.generator
        self.loss: Any = VAEGANLoss(opponent, self.generator, 0.3, 0.1) if vae else LSGANLoss(opponent)
        self.opponent, self.step = opponent, TrainingStep(sgd(self.network, accumulate=accumulate), self.loss)

    def __call__(self, batch: Batch, iteration: int = 1) -> dict[str, float]:
        state = SimpleNamespace(device=torch.device("cpu"), epoch=1, iteration=iteration)
        return self.step(SimpleNamespace(state=state), batch)["losses"]  # type: ignore[arg-type]


def moved_by(before: nn.Module, after: nn.Module) -> list[Tensor]:
    """The gradients that a step of `sgd` has followed."""
    return [(a - b) / -0.1 for a, b in zip(after.parameters(), before.parameters(), strict=True)]


def agree(found: list[Tensor], expected: Any) -> bool:
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))


# Networks.


def test_full_size_networks_are_of_the_size_that_is_stated() -> None:
    config = configuration([GAN])
    shape, size = config["grid"]["shape"], config["noise_size"]
    with torch.device("meta"):
        generator = VolumeGenerator(size, config["generator_channels"], shape)
    discriminator = VolumeDiscriminator(config["gan_discriminator_channels"], shape)
    for network, given, millions, teraflop in (
        (generator, torch.empty(1, size, device="meta"), 50.7, 0.31),
        (discriminator, torch.zeros(1, 1, *shape), 7.0, 0.05),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(given)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
        assert counter.get_total_flops() / 1e12 == pytest.approx(teraflop, rel=0.1)


def test_volumes_and_maps_have_their_shapes_and_ranges() -> None:
    encoder, generator, discriminator = players()
    volumes = generator(10.0 * torch.randn(3, NOISE))
    assert volumes.shape == (3, 1, *SHAPE) and 0.0 <= volumes.min() < volumes.max() <= 1.0
    logits, features = discriminator(volumes)
    assert logits.shape == (3, 1) and features.shape == (3, 8, 2, 3, 2)
    mean, std = encoder(volumes)
    assert mean.shape == std.shape == (3, NOISE) and std.min() > 0.0
    with torch.autocast("cpu", torch.bfloat16):
        assert generator(torch.randn(1, NOISE)).dtype == encoder(volumes)[1].dtype == torch.float32


def test_weights_of_the_discriminator_have_a_spectral_norm_of_one() -> None:
    discriminator = players()[2].train()
    for layer in discriminator.normalised:
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(7.0)
    for _ in range(50):
        discriminator(torch.rand(1, 1, *SHAPE))
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in discriminator.eval().normalised]
    assert norms == pytest.approx([1.0] * 4, rel=1e-2)
    before = copy.deepcopy(discriminator.state_dict())
    discriminator(torch.rand(1, 1, *SHAPE))
    assert same(before, discriminator.state_dict()), "in evaluation nothing is iterated"


def test_discriminator_normalises_in_float32_under_autocast() -> None:
    discriminator, volumes = players()[2].eval(), torch.rand(1, 1, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        half = discriminator(volumes)[0]
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), discriminator(volumes)[0], atol=0.05)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: VolumeGenerator(4, [8, 4, 4, 4, 4, 4], SHAPE), "multiples of 32, where the grid is (16, 24, 16)"),
        (lambda: VolumeGenerator(4, [8], SHAPE), "doubles at least once"),
        (lambda: VolumeDiscriminator([4, 4], SHAPE), "at least 3"),
        (lambda: VolumeEncoder(4, [4] * 5, SHAPE), "can be halved"),
        (lambda: Steadying(r1=-1), "--r1 must be at least 0"),
        (lambda: Steadying(r1_every=0), "--r1_every must be at least 1"),
        (lambda: Steadying(balance=2), "--balance must be at most 1"),
        (lambda: Steadying(instance_noise="x"), "--instance_noise must be a finite number"),
        (lambda: Augmentation(flip=2), "--flip must be from 0 to 1"),
        (lambda: Augmentation(shift=0.5), "--shift must be a whole number"),
        (lambda: VAEGANLoss(None, nn.Identity(), 0.0, 0.1), "--feature_weight must be at least 1e-06"),  # type: ignore[arg-type]
    ],
)
def test_options_that_cannot_be(build: Any, told: str) -> None:
    with pytest.raises(BundleError) as caught:
        build()
    assert told in str(caught.value)


# What each player follows.


def test_lsgan_is_least_squares_with_the_discriminator_first() -> None:
    game, batch = Game(vae=False), batch_of()
    generator, discriminator = copy.deepcopy(game.generator), copy.deepcopy(game.discriminator).train()
    losses = game(batch)
    assert not torch.equal(batch["opponent_noise"], batch["prior_noise"])
    real = discriminator(batch["image"])[0]
    fake = discriminator(generator(batch["opponent_noise"]).detach())[0]
    judged = 0.5 * ((real - 1).square().mean() + fake.square().mean())
    gradients = torch.autograd.grad(judged, list(discriminator.parameters()))
    assert agree(moved_by(discriminator, game.discriminator), gradients)
    fooled = (game.discriminator.eval()(generator(batch["prior_noise"]))[0] - 1).square().mean()
    assert agree(moved_by(generator, game.generator), torch.autograd.grad(fooled, list(generator.parameters())))
    expected = {"loss": fooled.item(), "adversarial": fooled.item(), "discriminator": judged.item()}
    assert {name: losses[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_vae_gan_has_larsens_three_sets_of_gradients() -> None:
    game, batch = Game(vae=True), batch_of()
    before: Any = copy.deepcopy(game.network)
    discriminator = copy.deepcopy(game.discriminator).train()
    losses = game(batch)
    encoder, decoder = before.encoder, before.generator
    cross_entropy = F.binary_cross_entropy_with_logits

    mean, std = encoder(batch["image"])
    reconstructions = decoder(mean + std * batch["posterior_noise"])
    kinds = [batch["image"], reconstructions.detach(), decoder(batch["opponent_noise"]).detach()]
    labels = [torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(2, 1)]
    pairs = zip(kinds, labels, strict=True)
    judged = torch.stack([cross_entropy(discriminator(kind)[0], label) for kind, label in pairs]).mean()
    gradients = torch.autograd.grad(judged, list(discriminator.parameters()))
    assert agree(moved_by(discriminator, game.discriminator), gradients)

    judge = game.discriminator.eval()
    features = (judge(reconstructions)[1] - judge(batch["image"])[1]).square().mean()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    ).mean()
    of_encoder = torch.autograd.grad(0.1 * kl + features, list(encoder.parameters()), retain_graph=True)
    assert agree(moved_by(encoder, game.encoder), of_encoder), "KL and feature error, without GAN"
    fakes = torch.cat([reconstructions, decoder(batch["prior_noise"])])
    gan = cross_entropy(judge(fakes)[0], torch.zeros(4, 1))
    of_decoder = torch.autograd.grad(0.3 * features - 0.7 * gan, list(decoder.parameters()))
    assert agree(moved_by(decoder, game.generator), of_decoder)
    expected = {"features": features, "kl": kl, "discriminator": judged, "loss": 0.1 * kl + 0.3 * features - 0.7 * gan}
    assert {name: losses[name] for name in expected} == pytest.approx(
        {name: torch.as_tensor(value).item() for name, value in expected.items()}, rel=1e-3
    )


def test_gan_term_leaves_no_gradient_in_the_encoder_and_features_none_in_the_discriminator() -> None:
    game, batch = Game(vae=True), batch_of()
    _, fakes, _, _ = game.network(batch["image"], batch["posterior_noise"], batch["prior_noise"])
    logits, _ = game.opponent.judge(fakes, batch, 0)
    CROSS_ENTROPY(logits, 0.0).backward()
    assert all(p.grad is None for p in (*game.encoder.parameters(), *game.discriminator.parameters()))
    assert all(p.grad is not None for p in game.generator.parameters())
    reconstructions, _, _, _ = game.network(batch["image"], batch["posterior_noise"], batch["prior_noise"])
    game.loss._feature_error(batch["image"], reconstructions, batch).backward()
    assert all(p.grad is None for p in game.discriminator.parameters())
    assert all(p.grad is not None for p in game.encoder.layers.parameters())


@pytest.mark.parametrize("vae", [False, True])
def test_parts_of_a_batch_make_the_step_of_the_whole(vae: bool) -> None:
    """But for the power iteration, which goes on at each part: here it has converged."""
    augmentation, steadying = Augmentation(0.5, 2, 0.1), {"instance_noise": 0.1, "r1": 1.0, "r1_every": 1}
    games = []
    for accumulate in (1, 2):
        torch.manual_seed(1)
        game = Game(vae, augmentation, accumulate, **steadying)
        for _ in range(30):
            game.discriminator.train()(torch.zeros(1, 1, *SHAPE))
        games.append(game)
    batch = batch_of(augmentation)
    whole, parts = (game(batch) for game in games)
    assert whole == pytest.approx(parts, rel=1e-2, abs=1e-4)


# How real and fake are moved.


def test_augmentation_is_that_of_scipy_and_passes_gradients() -> None:
    volumes = torch.rand(2, 1, *SHAPE, requires_grad=True)
    draws = torch.tensor([[0.0, 2.0, -1.0, 0.0, 1.1], [1.0, 0.0, 0.0, 3.0, 0.9]])
    moved = Augmentation.apply(volumes, draws)
    first, second = volumes.detach()[:, 0].numpy()
    assert np.allclose(moved[0, 0].detach(), 1.1 * shift(first, (2, -1, 0), order=0), atol=1e-6)
    assert np.allclose(moved[1, 0].detach(), 0.9 * shift(second[::-1], (0, 0, 3), order=0), atol=1e-6)
    moved.sum().backward()
    assert volumes.grad is not None and volumes.grad[0].max() == pytest.approx(1.1)


def test_draws_are_within_their_ranges_and_follow_the_seed() -> None:
    augmentation = Augmentation(0.5, 2, 0.1)
    draws = torch.stack([augmentation.draw() for _ in range(200)])
    assert set(draws[:, 0].tolist()) == {0.0, 1.0} and set(draws[:, 1:4].flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert 0.9 <= draws[:, 4].min() < 0.92 and 1.08 < draws[:, 4].max() <= 1.1
    assert torch.equal(STILL.draw(), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))


def test_real_and_fake_of_a_sample_are_moved_alike() -> None:
    game, batch = Game(vae=False, augmentation=Augmentation(1.0, 3, 0.2)), batch_of(Augmentation(1.0, 3, 0.2))
    seen: list[Tensor] = []
    game.discriminator.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for parameter in game.generator.parameters():
            parameter.zero_()  # a grey volume, 0.5 everywhere
    game(batch)
    moved = Augmentation.apply(torch.full_like(batch["image"], 0.5), batch["augmentation"])
    assert len(seen) == 3 and torch.equal(seen[0], Augmentation.apply(batch["image"], batch["augmentation"]))
    assert torch.equal(seen[1], moved)


def test_a_cache_of_volumes_keeps_no_noise() -> None:
    rows = [{"image": torch.rand(1, 4, 4, 4)}]
    dataset = CacheDataset(rows, DrawNoisesd("image", 3, Augmentation()), cache_rate=1.0, progress=False)
    first, second = (batch["prior_noise"] for batch, _ in zip(training_loader(dataset, 1, 1), range(2)))
    again = next(iter(training_loader(dataset, 1, 1)))["prior_noise"]
    assert not torch.equal(first, second) and torch.equal(first, again)


# What keeps the players together.


class Linear(nn.Module):
    """A discriminator whose gradient at any volume is its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(math.prod(SHAPE)))

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        return (volumes.flatten(1) @ self.weight)[:, None], volumes


def test_penalty_is_that_of_the_gradient_and_comes_at_its_iterations() -> None:
    judge, batch = Linear(), batch_of()
    opponent = Opponent(sgd(judge), STILL, Steadying(r1=4.0, r1_every=3))
    for iteration in (1, 2):
        assert "r1" not in opponent.step(batch, lambda part: [part["image"]], LEAST_SQUARES, iteration)
    weight = judge.weight.detach().clone()
    losses = opponent.step(batch, lambda part: [part["image"]], LEAST_SQUARES, 3)
    assert losses["r1"].item() == pytest.approx(weight.square().sum().item(), rel=1e-5)
    logits = batch["image"].flatten(1) @ weight
    adversarial = ((2 * logits - 1)[:, None] * batch["image"].flatten(1)).mean(0)  # of ((x - 1)^2 + x^2) / 2
    assert torch.allclose((weight - judge.weight) / 0.1, adversarial + 4.0 * 3 * weight, rtol=1e-3, atol=1e-3)


def test_noise_on_volumes_is_each_samples_own() -> None:
    opponent = Opponent(sgd(Linear()), STILL, Steadying(instance_noise=0.2))
    volumes = torch.full((4, 1, *SHAPE), 0.5)
    seeds = torch.tensor([3, 8])
    noisy = opponent._noisy(volumes, seeds, 1)
    assert (noisy - volumes).std().item() == pytest.approx(0.2, rel=0.05)
    assert len({one.sum().item() for one in noisy}) == 4, "two samples of two kinds"
    assert torch.equal(opponent._noisy(volumes[:1], seeds[1:], 1)[0], noisy[1]), "whatever the batch"
    assert not torch.equal(opponent._noisy(volumes, seeds, 2), noisy)


@pytest.mark.parametrize(
    ("real", "fake", "steps", "rests"),
    [(0.7, 0.7, True, False), (0.2, 0.7, False, False), (0.7, 1.2, True, True), (0.2, 1.2, True, False)],
)
def test_balance_rests_the_player_that_is_ahead(real: float, fake: float, steps: bool, rests: bool) -> None:
    opponent = Opponent(sgd(Linear()), STILL, Steadying(balance=0.5))
    losses = {"real": torch.tensor(real), "fake": torch.tensor(fake)}
    assert opponent._decide(losses, CROSS_ENTROPY.chance) is steps and opponent.resting is rests


@pytest.mark.parametrize("resting", ["generator", "discriminator"])
@pytest.mark.parametrize("vae", [False, True])
def test_who_rests_keeps_its_weights(vae: bool, resting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    game = Game(vae)

    def decide(losses: Any, chance: float) -> bool:
        game.opponent.resting = resting == "generator"
        return resting != "discriminator"

    monkeypatch.setattr(game.opponent, "_decide", decide)
    networks = {name: getattr(game, name) for name in ("encoder", "generator", "discriminator")}
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    game(batch_of())
    kept = {name for name, n in networks.items() if all(map(torch.equal, before[name], n.parameters()))}
    assert kept == ({resting} if vae else {resting, "encoder"})


# Collapse.


def diversity(folder: Path, network: nn.Module, volumes: list[Tensor]) -> dict[str, float]:
    metric = MultiScaleSSIMMetric(3, kernel_size=3, weights=(0.5, 0.5), data_range=1.0)
    real: Any = [{"image": volume} for volume in volumes]
    return SampleDiversity(network, folder, NOISE, metric, real, count=4).evaluate(network, 3)


def test_similarity_of_samples_is_measured_beside_that_of_real_volumes(tmp_path: Path) -> None:
    generator = players()[1].eval()
    volumes = [torch.rand(1, *SHAPE) for _ in range(3)]
    with torch.no_grad():
        found = diversity(tmp_path, generator, volumes)
        metric = MultiScaleSSIMMetric(3, kernel_size=3, weights=(0.5, 0.5), data_range=1.0)
        pairs = [metric(volumes[i][None], volumes[j][None]).item() for i, j in ((0, 1), (1, 2), (2, 0))]
        assert found["ms_ssim_real"] == pytest.approx(np.mean(pairs), rel=1e-5)
        nn.init.zeros_(generator.linear.weight)
        assert diversity(tmp_path, generator, volumes[:1]) == {"ms_ssim": pytest.approx(1.0)}
    assert 0.0 < found["ms_ssim"] < 1.0 and len(list((tmp_path / "figures").glob("samples_*.png"))) == 1
    assert ring(2) == [(0, 1)] and len(ring(5)) == 5


@pytest.mark.parametrize(
    ("found", "real", "told"),
    [(0.96, 0.94, True), (0.78, 0.65, True), (0.94, None, False), (0.96, None, True), (0.7, 0.65, False)],
)
def test_collapse_is_said_in_words(
    found: float, real: float | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"val_ms_ssim": found} | ({} if real is None else {"val_ms_ssim_real": real})
    assert len(list(collapse(values))) == told
    caplog.set_level(logging.WARNING, "scripts.training.health")
    health = TrainingHealth()
    for _ in range(2):
        health.after_epoch(SimpleNamespace(state=SimpleNamespace(metrics=dict(values))))  # type: ignore[arg-type]
    assert len(caplog.messages) == told and all("collapsed" in message for message in caplog.messages)


def test_cross_entropies_are_judged_as_the_least_squares_that_they_stand_for() -> None:
    assert as_least_squares(math.log(2.0)) == pytest.approx(0.25)
    for p, words in ((0.999, "every fake"), (0.5, "guesses"), (0.2, "worse than by guessing")):
        means = {"discriminator": -math.log(p), "adversarial": -math.log(1.0 - p)}
        assert [words in finding.words for finding in opponents(means, True, "--lr")] == [True]
        least = {name: as_least_squares(value) for name, value in means.items()}
        assert [words in finding.words for finding in opponents(least)] == [True]
