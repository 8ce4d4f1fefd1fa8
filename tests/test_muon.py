# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Muon: against the singular value decomposition, and against PyTorch's own Muon and Adam where those can go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from scripts.training.muon import Muon, orthogonalised

STEPS = 5


@pytest.mark.parametrize("shape", [(16, 432), (432, 16), (64, 64), (3, 1)])
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_keeps_singular_vectors_and_evens_out_their_values(shape: tuple[int, int], size: float) -> None:
    matrix = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    after = u.T @ orthogonalised(matrix) @ v.T
    values = after.diagonal()[before > 0.05 * before[0]]
    assert 0.65 < values.min() and values.max() < 1.25
    torch.testing.assert_close(after, torch.diag(after.diagonal()), atol=2e-3, rtol=0.0)


def walked(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Where a parameter is after some steps with the same gradients each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameter.detach()


def test_matrices_step_as_in_pytorch() -> None:
    ours, theirs = (nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
    own = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")  # in bfloat16
    torch.testing.assert_close(walked(Muon([ours], lr=1e-2), ours), walked(own, theirs), atol=3e-4, rtol=0.05)


def test_biases_step_as_by_adam() -> None:
    ours, theirs = (nn.Parameter(torch.zeros(7)) for _ in range(2))
    adam = torch.optim.Adam([theirs], lr=5e-3, betas=(0.9, 0.99))
    torch.testing.assert_close(walked(Muon([ours], lr=1e-2, adam_factor=0.5), ours), walked(adam, theirs))


def test_convolutions_step_as_matrices_of_outputs_and_inputs_in_any_layout() -> None:
    shape = (6, 4, 3, 3, 3)
    plain = nn.Parameter(torch.zeros(shape))
    last = nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last_3d))
    flat = nn.Parameter(torch.zeros(6, 108))
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(shape, generator=generator)
    for parameter in (plain, last, flat):
        parameter.grad = gradient.clone().view(parameter.shape).contiguous()
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(last, plain)
    torch.testing.assert_close(flat.view(shape), plain)


def test_goes_on_exactly_from_its_state() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Flatten(), nn.Linear(32, 2))
    frozen = next(network.parameters()).requires_grad_(False)
    optimizer, x, start = Muon(network.parameters(), lr=0.01), torch.randn(2, 1, 4, 4, 4), frozen.clone()

    def step(net: nn.Module, by: Muon) -> None:
        by.zero_grad()
        net(x).square().sum().backward()
        by.step()

    step(network, optimizer)
    other = copy.deepcopy(network)
    again = Muon(other.parameters(), lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, by in ((network, optimizer), (other, again)):
        step(net, by)
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), other.parameters(), strict=True))
    assert torch.equal(frozen, start)
