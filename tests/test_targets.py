# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of targets: each row's equations, numerically, wherever its schedule has a noise level."""

from __future__ import annotations

import math

import pytest
import torch
from released import configuration
from torch import Tensor

from scripts.diffusion.schedules import signal_and_noise
from scripts.diffusion.targets import FLOW, TARGETS, Target

LEVELS = [0.001, 0.1, 0.3, 0.5, 0.8, 0.999]


def level(row: Target, s: float) -> tuple[float, float]:
    """a and s on the row's schedule."""
    return (1.0 - s if row.schedule == FLOW else math.sqrt(1.0 - s * s)), s


def pair() -> Tensor:
    """Clean volumes and noise, (2, 1, 1, 4, 4, 4) in float64."""
    return torch.randn(2, 1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("s", LEVELS)
def test_the_determinant_is_that_of_the_two_equations(name: str, s: float) -> None:
    row = TARGETS[name]
    a, s = level(row, s)
    p, q, d = row.coefficients(a, s)
    assert d == pytest.approx(a * q - s * p, rel=1e-12)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("s", LEVELS)
def test_an_output_and_its_noisy_volume_give_both_back(name: str, s: float) -> None:
    row, (clean, noise) = TARGETS[name], pair()
    a, s = level(row, s)
    noisy, output = a * clean + s * noise, row.output(clean, noise, a, s)
    of_noisy, of_output = row.clean_factors(a, s)
    assert torch.allclose(row.clean(output, noisy, a, s), clean, atol=1e-9)
    assert torch.allclose(row.noise(output, noisy, a, s), noise, atol=1e-9)
    assert torch.allclose(of_noisy * noisy + of_output * output, clean, atol=1e-9)


@pytest.mark.parametrize("name", TARGETS)
def test_both_come_back_at_every_timestep_of_the_pixel_schedule(name: str) -> None:
    """Whose noisiest level has less signal, a = 0.006, than that of the latent one."""
    config = configuration(["configs/pixel.yaml"], target=name)
    schedule, row = config.get_parsed_content("schedule"), TARGETS[name]
    clean, noise = pair()
    for a, s in signal_and_noise(schedule, range(1, 1000)):
        noisy, output = a * clean + s * noise, row.output(clean, noise, a, s)
        assert (row.clean(output, noisy, a, s) - clean).abs().max() < 1e-5
        assert (row.noise(output, noisy, a, s) - noise).abs().max() < 1e-5


@pytest.mark.parametrize("name", TARGETS)
def test_the_weight_makes_the_loss_one_of_the_clean_volume(name: str) -> None:
    """min(R, cap) times the error of the clean volume, whatever the network puts out."""
    row, (clean, noise) = TARGETS[name], pair()
    for s in LEVELS:
        a, s = level(row, s)
        wrong = row.output(clean, noise, a, s) + 0.3
        error = (row.clean(wrong, a * clean + s * noise, a, s) - clean).square().mean()
        weight = row.min_snr_weight(torch.tensor(a).double(), torch.tensor(s).double(), 5.0)
        assert float(weight) * 0.09 == pytest.approx(min((a / s) ** 2, 5.0) * float(error), rel=1e-5)
