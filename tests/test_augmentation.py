# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device that trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.ndimage import shift
from torch import Tensor, nn

from scripts.core.errors import BundleError
from scripts.training.augmentation import SEEDS, DeviceAugmentation, DrawSeedd, augmentation_on_device, cubic_basis
from scripts.training.optimisation import Batch, Optimisation
from scripts.training.step import Loss, TrainingStep


@pytest.fixture(scope="module")
def volumes() -> Tensor:
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (16, 20, 12)), indexing="ij")
    ball = torch.exp(-3 * (x**2 + y**2 + z**2))
    return torch.stack([ball, ball.roll(2, 0)])[:, None]


def test_the_basis_is_scipy_s() -> None:
    basis = cubic_basis(20, 6.0).numpy()
    knots = np.arange(-3, basis.shape[1] + 1) * 6.0
    expected = BSpline.design_matrix(np.arange(20.0), knots, 3).toarray()
    assert np.allclose(basis, expected, atol=1e-6) and np.allclose(basis.sum(axis=1), 1.0)


def test_each_volume_follows_from_its_seed_alone(volumes: Tensor) -> None:
    augment, seeds = DeviceAugmentation(1, control=8.0), torch.tensor([5, 9])
    both = augment(volumes, seeds)
    assert both.shape == volumes.shape and 0.0 <= both.min() < both.max() <= 1.0
    assert torch.equal(augment(volumes[1:], seeds[1:]), both[1:])
    same = augment(volumes[:1].expand(2, -1, -1, -1, -1), torch.tensor([5, 6]))
    assert torch.equal(same[0], both[0]) and not torch.allclose(same[0], same[1], atol=0.01)


def test_nothing_happens_at_strength_0() -> None:
    assert augmentation_on_device(0, shift=1.0) is None and augmentation_on_device("0.5") is not None
    with pytest.raises(BundleError, match="--device_augmentation must be at least 0"):
        DeviceAugmentation(-1)


def test_a_shift_alone_is_scipy_s(volumes: Tensor) -> None:
    moving = DeviceAugmentation(1, deformation=0.0, gain=0.0, gamma=0.0, noise=0.0)
    drawn = torch.Generator().manual_seed(3)
    points = [cubic_basis(side, 40.0).shape[1] for side in volumes.shape[2:]]
    torch.randn(3, *points, generator=drawn)
    by = 2.0 * torch.randn(3, generator=drawn)
    expected = shift(volumes[0, 0].numpy(), -by.numpy(), order=1, mode="grid-constant")
    assert np.allclose(moving(volumes[:1], torch.tensor([3]))[0, 0], expected, atol=1e-4)


def test_the_step_learns_from_augmented_images() -> None:
    """The batch brings a seed for each sample; the loss sees what was made of the images by it."""
    seen: list[Tensor] = []

    class Mean(Loss):
        inputs = ("image",)

        def __call__(self, network: nn.Module, part: Batch, epoch: int) -> dict[str, Tensor]:
            seen.append(part["image"])
            return {"loss": network(part["image"]).mean()}

    network = nn.Linear(1, 1)
    optimisation = Optimisation(network, torch.optim.SGD(network.parameters(), 0.1))
    engine: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=1, iteration=1))
    batch = [DrawSeedd("image")({"image": torch.ones(1)}) for _ in range(2)]
    assert batch[0][SEEDS] != batch[1][SEEDS]
    given = {name: torch.stack([one[name] for one in batch]) for name in ("image", SEEDS)}
    TrainingStep(optimisation, Mean(), augment=lambda images, seeds: images + seeds[:, None] % 7)(engine, given)
    assert torch.equal(seen[0], given["image"] + given[SEEDS][:, None] % 7)
