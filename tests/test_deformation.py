# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Maps and flows: against MONAI's warps, against closed forms, against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.networks.blocks import DVF2DDF, Warp
from torch import Tensor

from scripts.phantoms.deformation import (
    box_grid,
    compose,
    cosine_field,
    exponential,
    least_jacobian,
    smooth_coefficients,
    warp,
)
from scripts.phantoms.potential_flow import PotentialFlow

SHAPE = (24, 32, 20)
EXTENT = (120.0, 160.0, 100.0)


def smooth(seed: int, size: float) -> Tensor:
    """A smooth velocity in units of the box."""
    generator = torch.Generator().manual_seed(seed)
    return size * cosine_field(smooth_coefficients(3, EXTENT, 80.0, generator), SHAPE)


def in_voxels(displacement: Tensor) -> Tensor:
    return displacement * torch.tensor(displacement.shape[2:]).view(1, 3, 1, 1, 1) / 2.0


def inner(field: Tensor) -> Tensor:
    return field[:, :, 4:-4, 4:-4, 4:-4]


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
def test_warp_and_exponential_are_those_of_monai() -> None:
    velocity, volume = smooth(0, 0.05), smooth(1, 1.0)
    theirs = Warp(padding_mode="border")(volume, in_voxels(velocity))
    assert torch.allclose(warp(volume, velocity), theirs, atol=1e-4)
    theirs = DVF2DDF(num_steps=7, padding_mode="border")(in_voxels(velocity))
    assert float(in_voxels(velocity).abs().max()) > 0.5
    assert float(inner(in_voxels(exponential(velocity)) - theirs).abs().max()) < 0.03


def test_following_a_velocity_back_undoes_it() -> None:
    velocity = smooth(2, 0.05)
    around = compose(exponential(velocity), exponential(-velocity))
    assert float(inner(in_voxels(velocity)).abs().max()) > 1.5
    assert float(inner(in_voxels(around)).abs().max()) < 0.1


def test_jacobian_of_a_linear_map_is_exact() -> None:
    matrix = torch.tensor([[1.2, 0.1, 0.0], [-0.2, 0.9, 0.05], [0.0, 0.1, 0.8]])
    moved = torch.einsum("ij,njxyz->nixyz", matrix - torch.eye(3), box_grid(SHAPE))
    assert least_jacobian(moved) == pytest.approx(float(torch.linalg.det(matrix)), abs=1e-4)


def test_jacobian_agrees_with_central_differences_and_finds_folds() -> None:
    displacement = exponential(smooth(3, 0.08))
    steps = [2.0 / n for n in SHAPE]
    slopes = [np.stack(np.gradient(c, *steps)) for c in displacement[0].double().numpy()]
    determinant = np.linalg.det(np.moveaxis(np.stack(slopes) + np.eye(3)[:, :, None, None, None], (0, 1), (-2, -1)))
    assert least_jacobian(displacement) == pytest.approx(determinant.min(), abs=0.12)
    assert least_jacobian(displacement) > 0.0
    assert least_jacobian(8.0 * smooth(3, 0.08)) < 0.0
    one_voxel = torch.zeros(1, 3, *SHAPE)
    one_voxel[0, 0, 12, 16, 10] = 1.5 * 2.0 / SHAPE[0]  # central differences at this voxel see nothing
    assert least_jacobian(one_voxel) < 0.0


def test_cosine_field_is_the_same_at_any_resolution() -> None:
    coefficients = smooth_coefficients(1, EXTENT, 60.0, torch.Generator().manual_seed(0))
    fine = cosine_field(coefficients, [2 * n for n in SHAPE])
    coarse = cosine_field(coefficients, SHAPE)
    assert torch.allclose(torch.nn.functional.avg_pool3d(fine, 2), coarse, atol=0.1)
    many = [
        cosine_field(smooth_coefficients(1, EXTENT, 60.0, torch.Generator().manual_seed(s)), SHAPE) for s in range(40)
    ]
    assert float(torch.stack(many).square().mean()) == pytest.approx(1.0, abs=0.15)


def test_flow_of_a_source_in_a_ball() -> None:
    """From a uniform source within a to a sink spread over the ball of radius R: v = Q / 4 pi (1 / r^2 - r / R^3)."""
    n, h, a, big = 48, 2.0, 12.0, 42.0
    centres = box_grid((n, n, n))[0] * (n * h / 2)
    r = centres.norm(dim=0)
    inside, source = (r < big).float(), (r < a).float()
    flow = PotentialFlow(inside, (h, h, h), iterations=60)
    velocity = flow.velocity((source / source.sum() / h**3)[None])[0]
    outward = (velocity * centres).sum(dim=0) / r
    shell = (r > 18) & (r < 34)
    wanted = (1.0 / r**2 - r / big**3) / (4.0 * math.pi)
    assert float(((outward - wanted) / wanted)[shell].abs().mean()) < 0.03
    assert not velocity[:, inside == 0].any()
    assert float(flow.velocity(inside[None]).abs().max()) < 1e-3  # growth everywhere has nowhere to go


def test_flow_converges_in_few_steps() -> None:
    """The residual of Poisson's equation after the default number of iterations on each resolution."""
    inside = (box_grid((48, 64, 48))[0].norm(dim=0) < 0.9).float()
    rates = torch.randn(2, 48, 64, 48, generator=torch.Generator().manual_seed(0)) * inside
    rates -= inside * (rates.sum(dim=(1, 2, 3), keepdim=True) / inside.sum())
    flow = PotentialFlow(inside, (2.0, 2.0, 2.0))
    left = flow._operator(flow._potential(rates)) + rates
    assert float(left.norm() / rates.norm()) < 0.05
