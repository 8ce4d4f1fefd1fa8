# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Convolutions with fewer multiplications, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.networks.cpu.convolution import doubled, doubled_weights, winograd, winograd_weights


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


@pytest.mark.parametrize("shape", [(2, 5, 6, 7, 8), (1, 16, 1, 1, 4), (1, 3, 4, 9, 20)])
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_winograd_is_the_convolution(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.networks.cpu.convolution.CHUNK", chunk)
    x, weight, bias = random(*shape), random(4, shape[1], 3, 3, 3), random(4)
    reference = F.conv3d(x.double(), weight.double(), bias.double(), padding=1)
    assert error(winograd(x, winograd_weights(weight), bias), reference) < 2e-6
    if shape[2] > 2:
        inner = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
        assert error(winograd(x, winograd_weights(weight), None, (0, 1)), inner) < 2e-6


def test_winograd_rounds_little_more_than_the_plain_sum() -> None:
    x, weight = random(1, 256, 6, 8, 20), random(16, 256, 3, 3, 3)
    reference = F.conv3d(x.double(), weight.double(), padding=1)
    plain = error(F.conv3d(x, weight, padding=1), reference)
    assert error(winograd(x, winograd_weights(weight), None), reference) < max(4 * plain, 1e-6)


def test_doubling_is_upsampling_and_convolution() -> None:
    x, weight, bias = random(2, 5, 3, 4, 6), random(4, 5, 3, 3, 3), random(4)
    large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    reference = F.conv3d(large, weight.double(), bias.double(), padding=1)
    output = doubled(F.pad(x, (0, 0, 0, 0, 1, 1)), doubled_weights(weight), bias)
    assert error(output, reference) < 1e-6
