# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Velocity fields that make tissues grow and shrink at prescribed rates inside a closed skull.

The divergence of a velocity field is the rate at which volume grows. Prescribing it tissue by tissue and asking for the
smoothest flow, v = grad u, leaves Poisson's equation, with no flow through the skull (Neumann). Where nothing is
prescribed, tissue moves without changing its volume. After the simulators of atrophy of Karacali and Davatzikos (2006,
IEEE TMI 25:649-652) and of Khanal, Ayache and Pennec (2017, Front. Neurosci. 11:132), who prescribe the same
divergence; here the flow is a potential flow instead of an elastic one, which has a fast solver.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 16
ITERATIONS = 20


class PotentialFlow:
    """Solver for the flows inside one closed region.

    Args:
        inside: (X, Y, Z), 1 in the region and 0 elsewhere; one connected piece.
        spacing: mm from one cell to the next along each axis.
        iterations: of conjugate gradients on each resolution.
    """

    def __init__(self, inside: Tensor, spacing: Sequence[float], iterations: int = ITERATIONS) -> None:
        self.inside = (inside > 0).float()
        self.spacing = tuple(abs(float(h)) for h in spacing)
        self.iterations = iterations
        self.open = [_pairs(self.inside, axis).prod(dim=0) for axis in range(3)]
        self.coarser: PotentialFlow | None = None
        if all(n % 2 == 0 and n // 2 >= SMALLEST for n in inside.shape):
            coarse = F.max_pool3d(self.inside[None, None], 2)[0, 0]
            self.coarser = PotentialFlow(coarse, [2 * h for h in self.spacing], iterations)

    def velocity(self, rates: Tensor) -> Tensor:
        """The flow whose divergence is `rates`, less their mean over the region.

        Args:
            rates: (N, X, Y, Z), growth of volume a unit of time. Taken as 0 outside.

        Returns:
            (N, 3, X, Y, Z), mm a unit of time; 0 outside the region.
        """
        rates = rates * self.inside
        rates = rates - self.inside * (total(rates)[:, None, None, None] / self.inside.sum())
        potential = self._potential(rates)
        return torch.stack([self._along(potential, axis) for axis in range(3)], dim=1)

    def _potential(self, rates: Tensor) -> Tensor:
        """u with div grad u = rates, by conjugate gradients from the solution on the coarser grid."""
        start = torch.zeros_like(rates)
        if self.coarser is not None:
            coarse = self.coarser._potential(F.avg_pool3d(rates[:, None], 2)[:, 0])
            start = F.interpolate(coarse[:, None], scale_factor=2, mode="trilinear")[:, 0] * self.inside
        return self._improved(start, -rates)

    def _improved(self, u: Tensor, wanted: Tensor) -> Tensor:
        residual = wanted - self._operator(u)
        direction, power = residual, _dot(residual, residual)
        for _ in range(self.iterations):
            image = self._operator(direction)
            step = power / _dot(direction, image).clamp_min(1e-30)
            u, residual = torch.addcmul(u, step, direction), torch.addcmul(residual, -step, image)
            before, power = power, _dot(residual, residual)
            direction = torch.addcmul(residual, power / before.clamp_min(1e-30), direction)
        return u

    def _operator(self, u: Tensor) -> Tensor:
        """-div grad u, with closed faces at the region's rim."""
        out = torch.zeros_like(u)
        for axis, (gate, h) in enumerate(zip(self.open, self.spacing)):
            flux = u.diff(dim=axis + 1).mul_(gate / h**2)
            n = flux.shape[axis + 1]
            out.narrow(axis + 1, 0, n).sub_(flux)
            out.narrow(axis + 1, 1, n).add_(flux)
        return out

    def _along(self, u: Tensor, axis: int) -> Tensor:
        """Velocity along an axis at the cells: the mean of that at their two faces."""
        flux = u.diff(dim=axis + 1) * (self.open[axis] / self.spacing[axis])
        pad = [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = 1
        return _pairs(F.pad(flux, pad), axis + 1).mean(dim=0)


def _pairs(values: Tensor, axis: int) -> Tensor:
    n = values.shape[axis] - 1
    return torch.stack([values.narrow(axis, 0, n), values.narrow(axis, 1, n)])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return total(a * b)[:, None, None, None]


def total(values: Tensor) -> Tensor:
    """Sum over the last three axes, one after the other: so the result does not depend on the number of threads."""
    return values.sum(dim=-1).sum(dim=-1).sum(dim=-1)
