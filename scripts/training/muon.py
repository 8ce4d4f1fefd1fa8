# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""An optimiser that moves all directions of a layer's weights alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Jordan's Newton-Schulz iteration: takes singular values to about 1
ITERATIONS = 5
MATCHING_ADAM = 0.2  # root mean square of Adam's steps, in units of the rate
EPS = 1.0e-8


class Muon(Optimizer):
    """Momentum orthogonalised for weights, Adam for biases and scales.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a layer's weights, as
    a matrix of outputs and inputs, by the orthogonal matrix next to it, nearly: directions of which the gradient has
    little learn as fast as those of which it has much. Steps are scaled to the size of Adam's, so that rates for Adam
    are a start (Liu et al. 2025, https://arxiv.org/abs/2502.16982). PyTorch's own Muon takes matrices alone, and
    neither convolutions nor biases.

    Args:
        params: the network's; those of two dimensions and more are weights, with the outputs first.
        lr: the rate.
        momentum: of the weights; with Nesterov's look ahead.
        adam_factor: rate of Adam, in units of `lr`.
        betas: of Adam.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1.0e-3,
        momentum: float = 0.95,
        adam_factor: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "adam_factor": adam_factor, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step once; returns the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rule = self._orthogonalised if parameter.dim() > 1 else self._adam
                    parameter.sub_(rule(parameter.grad, self.state[parameter], group))
        return loss

    def _orthogonalised(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        average = _kept(state, "momentum", gradient)
        average.lerp_(gradient, 1.0 - group["momentum"])
        ahead = gradient.lerp(average, group["momentum"]).flatten(1)
        scale = group["lr"] * MATCHING_ADAM * math.sqrt(max(ahead.shape))
        return scale * orthogonalised(ahead).view(gradient.shape)

    def _adam(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        mean, square = _kept(state, "exp_avg", gradient), _kept(state, "exp_avg_sq", gradient)
        state["step"] = state.get("step", 0) + 1
        mean.lerp_(gradient, 1.0 - group["betas"][0])
        square.lerp_(gradient.square(), 1.0 - group["betas"][1])
        means, squares = (1.0 - beta ** state["step"] for beta in group["betas"])
        return group["lr"] * group["adam_factor"] * (mean / means) / ((square / squares).sqrt() + EPS)


def _kept(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of the given one, and with singular values of about 1 (0.7 to 1.2).

    Those of less than a thousandth of its norm stay smaller. Computed in the matrix's own precision.

    Args:
        matrix: (m, n).
    """
    a, b, c = POLYNOMIAL
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + EPS)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
