# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Warnings in words: each once, again if it worsens or comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from scripts.training.health import TrainingHealth, latent_scale, opponents, posterior

HEALTHY = {"val_kl_per_value": 6.0, "val_latent_sigma": 0.01, "val_latent_std": 1.1}


@pytest.fixture(autouse=True)
def listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "scripts.training.health")


def train(health: TrainingHealth, losses: Iterable[Mapping[str, float]]) -> None:
    """A training whose iterations have these losses."""
    engine = Engine(lambda engine, batch: {"losses": batch})
    engine.state.metrics = {}
    health.attach(engine)
    engine.run(list(losses), max_epochs=1)


def validate(health: TrainingHealth, *values: Mapping[str, float]) -> None:
    """The end of an epoch for each of the validations."""
    for metrics in values:
        health.after_epoch(SimpleNamespace(state=SimpleNamespace(metrics=dict(metrics))))  # type: ignore[arg-type]


def test_good_training_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    health = TrainingHealth("l1", window=10)
    train(health, [{"l1": 0.1 / (1 + i), "discriminator": 0.2, "adversarial": 0.4} for i in range(40)])
    validate(health, HEALTHY, {**HEALTHY, "val_psnr": 30.0, "val_loss": 0.1}, {"val_psnr": 29.5, "val_loss": 0.105})
    assert caplog.messages == []


def test_collapsed_posterior_is_told_once_and_again_after_recovery(caplog: pytest.LogCaptureFixture) -> None:
    collapsed = {"val_kl_per_value": 0.004, "val_latent_sigma": 0.99, "val_latent_std": 0.08}
    health = TrainingHealth()
    validate(health, collapsed, collapsed, {}, collapsed)
    (told,) = caplog.messages
    assert "collapsed" in told and "0.004 nats" in told and "--kl_weight" in told
    validate(health, HEALTHY, collapsed)
    assert len(caplog.messages) == 2


def test_standard_normal_posterior_is_collapsed_and_a_usual_one_not() -> None:
    noise = torch.randn(4, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for scale, sigma, expected in ((0.05, 1.0, 1), (1.0, 0.01, 0), (0.3, 0.08, 0), (0.3, 0.3, 1)):
        mean = scale * noise
        kl = 0.5 * (mean.square() + sigma**2 - 2 * torch.tensor(sigma).log() - 1).mean().item()
        values = {"val_kl_per_value": kl, "val_latent_sigma": sigma, "val_latent_std": mean.std().item()}
        assert len(list(posterior(values))) == expected


def test_exploding_latents_are_told_again_when_worse(caplog: pytest.LogCaptureFixture) -> None:
    def of(std: float) -> dict[str, float]:
        return {"val_kl_per_value": 0.5 * std**2 + 4.0, "val_latent_sigma": 0.01, "val_latent_std": std}

    validate(TrainingHealth(), of(5.0), of(12.0), of(13.0), of(30.0))
    kl, scale = ([told for told in caplog.messages if told.startswith(words)] for words in ("the KL", "the posterior"))
    assert len(kl) == 1 and "454 nats" in kl[0] and "Raise --kl_weight" in kl[0]
    assert ["of 12," in scale[0], "of 30," in scale[1], len(scale)] == [True, True, 2]


def test_small_means_ask_for_a_lower_weight(caplog: pytest.LogCaptureFixture) -> None:
    validate(TrainingHealth(), {**HEALTHY, "val_latent_std": 0.05})
    assert "0.05" in caplog.text and "lower --kl_weight" in caplog.text


@pytest.mark.parametrize(
    ("discriminator", "adversarial", "words"),
    [
        (0.001, 0.98, "tells every fake"),
        (0.6, 0.3, "worse than by guessing"),
        (0.2501, 0.2495, "only guesses"),
        (0.2, 0.4, ""),
        (0.01, 0.3, ""),
        (0.25, 0.3, ""),
    ],
)
def test_losses_of_the_discriminator(discriminator: float, adversarial: float, words: str) -> None:
    found = list(opponents({"discriminator": discriminator, "adversarial": adversarial}))
    assert [words in finding.words for finding in found] == [True] * bool(words)
    assert not list(opponents({"l1": 0.1}))


def test_losses_are_those_of_discriminators_that_win_or_guess() -> None:
    from monai.losses import PatchAdversarialLoss

    loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def losses(real: float, fake: float) -> dict[str, float]:
        real_logits, fake_logits = torch.full((1, 1, 4, 4, 4), real), torch.full((1, 1, 4, 4, 4), fake)
        both = loss(real_logits, True, True) + loss(fake_logits, False, True)
        return {"discriminator": 0.5 * both.item(), "adversarial": loss(fake_logits, True, False).item()}

    assert ["every" in finding.words for finding in opponents(losses(1.0, 0.0))] == [True]
    assert ["guesses" in finding.words for finding in opponents(losses(0.5, 0.5))] == [True]
    assert not list(opponents(losses(0.7, 0.3)))


def test_discriminator_is_judged_over_whole_windows(caplog: pytest.LogCaptureFixture) -> None:
    warm_up: list[dict[str, float]] = [{"l1": 0.1}] * 15
    wins = [{"l1": 0.1, "discriminator": 0.001, "adversarial": 0.99}]
    half = [{"l1": 0.1, "discriminator": 0.5, "adversarial": 0.5}]  # which over the whole window looks like guessing
    train(TrainingHealth("l1", window=10), [*warm_up, *half * 5])
    assert caplog.messages == []
    train(TrainingHealth("l1", window=10), [*warm_up, *wins * 35])
    assert len(caplog.messages) == 1


def test_rising_loss(caplog: pytest.LogCaptureFixture) -> None:
    falls, rises = [1.0 / (1 + i) for i in range(30)], [0.1 + 0.01 * i for i in range(30)]
    train(TrainingHealth(window=10), [{"loss": loss} for loss in falls])
    assert caplog.messages == []
    train(TrainingHealth(window=10), [{"loss": loss} for loss in [*falls, *rises]])
    assert [told.split(" in the last 10")[0][-5:] for told in caplog.messages] == ["0.145", "0.245"]  # 0.345 is no news
    assert "0.03972 at its lowest" in caplog.text


def test_single_outlier_does_not_alarm(caplog: pytest.LogCaptureFixture) -> None:
    train(TrainingHealth(window=100), [{"loss": 10.0 if i == 150 else 1.0} for i in range(300)])
    assert caplog.messages == []


def test_validation_that_gets_worse(caplog: pytest.LogCaptureFixture) -> None:
    validate(TrainingHealth(), *({"val_loss": loss, "val_psnr": 30.0} for loss in (0.2, 0.1, 0.105, 0.12, 0.12)))
    (told,) = caplog.messages
    assert "the validation loss rises: 0.12, and it was 0.1." in told
    validate(TrainingHealth(), *({"val_psnr": psnr} for psnr in (25.0, 30.0, 28.5)))
    assert "28.50 dB, and it was 30.00 dB" in caplog.messages[1]


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (0.6, False), (3.0, True), (0.2, True)])
def test_scale_of_the_first_latents(scale: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    def step(engine: Engine, batch: Any) -> dict[str, Any]:
        return {"losses": {"loss": 1.0}}

    engine, health = Engine(step), TrainingHealth(latents="image")
    engine.state.metrics = {}
    health.attach(engine)
    torch.manual_seed(0)
    engine.run([{"image": scale * torch.randn(2, 3, 4, 4, 4)} for _ in range(30)], max_epochs=1)
    assert len(caplog.messages) == int(warned) == len(list(latent_scale(scale)))
    for told in caplog.messages:
        assert float(told.split("deviation of ")[1].split(",")[0]) == pytest.approx(scale, rel=0.05)
