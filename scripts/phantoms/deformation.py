# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Smooth invertible maps of space, held as displacements on a regular grid, and what they do to volumes.

A displacement u of shape (1, 3, X, Y, Z) stands for the map y -> y + u(y) from the deformed head back to the original,
which is what resampling needs. Lengths are in units of the box that the grid fills, whose faces lie at -1 and 1 along
each axis: that makes a displacement of one resolution usable at any other. Channels run along x, y, z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_STEP = 0.25


def box_grid(shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Positions of the voxel centres in units of the box: (1, 3, X, Y, Z), float32."""
    axes = [(torch.arange(n, dtype=torch.float32, device=device) + 0.5) * (2.0 / n) - 1.0 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def sample(volume: Tensor, positions: Tensor, mode: str = "bilinear", beyond: str = "border") -> Tensor:
    """Values of a volume at given positions.

    Args:
        volume: (1, C, x, y, z), any resolution.
        positions: (1, 3, X, Y, Z) in units of the box.
        mode: `bilinear` (which in 3D is trilinear) or `nearest`.
        beyond: what is beyond the box: `border`, the values at its rim, or `zeros`.

    Returns:
        (1, C, X, Y, Z).
    """
    grid = positions.flip(1).permute(0, 2, 3, 4, 1)
    parts = _parts(positions)
    cut = grid.reshape(parts, -1, *grid.shape[2:])
    spread = volume.expand(parts, -1, -1, -1, -1)
    found = F.grid_sample(spread, cut, mode=mode, padding_mode=beyond, align_corners=False)
    return torch.cat(tuple(found), dim=1)[None] if parts > 1 else found


def _parts(positions: Tensor) -> int:
    """Slabs to cut the output into: on a CPU, PyTorch shares only the batch axis out among its threads."""
    return math.gcd(positions.shape[2], torch.get_num_threads()) if positions.device.type == "cpu" else 1


def warp(volume: Tensor, displacement: Tensor, mode: str = "bilinear") -> Tensor:
    """A volume under a map: (1, C, x, y, z) becomes (1, C, X, Y, Z), the displacement's grid."""
    return sample(volume, box_grid(displacement.shape[2:], displacement.device) + displacement, mode)


def compose(before: Tensor, after: Tensor) -> Tensor:
    """The displacement of deforming by `before` first and then by `after`: y -> before(after(y))."""
    return after + warp(before, after)


def exponential(velocity: Tensor) -> Tensor:
    """The displacement after following a stationary velocity field for one unit of time.

    Scaling and squaring (Arsigny et al. 2006): a step so small that its map is nearly the identity, composed with
    itself. The step is at most a quarter of a voxel.

    Args:
        velocity: (1, 3, X, Y, Z), units of the box a unit of time. The map of -velocity is the inverse.
    """
    voxels = velocity.new_tensor(velocity.shape[2:]).view(1, 3, 1, 1, 1) / 2.0
    fastest = float((velocity * voxels).abs().amax())
    squarings = max(1, math.ceil(math.log2(max(fastest, MAX_STEP) / MAX_STEP)))
    displacement = velocity / 2.0**squarings
    for _ in range(squarings):
        displacement = compose(displacement, displacement)
    return displacement


def least_jacobian(displacement: Tensor) -> float:
    """Smallest Jacobian determinant of a map at the corners of the cells between its voxels.

    Within such a cell the map is trilinear. At each of its 8 corners the derivatives are the differences along the 3
    edges that meet there: all positive means that no cell is folded or inside out there, which central differences
    would miss (Liu et al. 2022, arXiv 2212.06060).
    """
    edges = [_edges(displacement[0], axis) for axis in range(3)]
    corners = itertools.product((0, 1), repeat=3)
    return min(float(_determinant([_corner(edges[i], i, corner) for i in range(3)]).amin()) for corner in corners)


def _edges(displacement: Tensor, axis: int) -> Tensor:
    """Derivative of the map along an axis, between neighbours: (3, ...), one fewer along that axis."""
    n = displacement.shape[axis + 1]
    slope = displacement.diff(dim=axis + 1) * (n / 2.0)
    slope[axis] += 1.0
    return slope


def _corner(edge: Tensor, axis: int, corner: tuple[int, ...]) -> Tensor:
    """The edges along `axis` that meet in the given corner of each cell."""
    for other in range(3):
        if other != axis:
            edge = edge.narrow(other + 1, corner[other], edge.shape[other + 1] - 1)
    return edge


def _determinant(columns: Sequence[Tensor]) -> Tensor:
    a, b, c = columns
    return (
        a[0] * (b[1] * c[2] - b[2] * c[1])
        + a[1] * (b[2] * c[0] - b[0] * c[2])
        + a[2] * (b[0] * c[1] - b[1] * c[0])
    )  # fmt: skip


def cosine_field(coefficients: Tensor, shape: Sequence[int]) -> Tensor:
    """A smooth field from its lowest cosine modes, the same at any resolution.

    Args:
        coefficients: (C, k, l, m), of the modes cos(pi i (x + 1) / 2) along each axis of the box.
        shape: of the grid.

    Returns:
        (1, C, X, Y, Z).
    """
    x, y, z = (_modes(n, k).to(coefficients) for n, k in zip(shape, coefficients.shape[1:]))
    return torch.einsum("cklm,xk,yl,zm->cxyz", coefficients, x, y, z)[None]


def _modes(n: int, number: int) -> Tensor:
    centres = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.cos(math.pi * centres[:, None] * torch.arange(number, dtype=torch.float64))


def smooth_coefficients(
    channels: int, extent: Sequence[float], wavelength: float, generator: torch.Generator
) -> Tensor:
    """Random cosine coefficients of a field of unit variance that varies over `wavelength` mm and more.

    Args:
        channels: of the field.
        extent: of the box in mm.
        wavelength: where the Gaussian spectrum has fallen to exp(-1/2).
        generator: on the CPU.

    Returns:
        (channels, k, l, m), float32.
    """
    sizes = [max(2, math.ceil(4.0 * length / wavelength) + 1) for length in extent]
    per_axis = [torch.arange(n) * (wavelength / (2.0 * length)) for n, length in zip(sizes, extent)]
    squared = sum(f.square().view([-1 if i == axis else 1 for i in range(3)]) for axis, f in enumerate(per_axis))
    weight = torch.exp(-0.5 * torch.as_tensor(squared))
    halves = [torch.where(torch.arange(n) > 0, 0.5, 1.0) for n in sizes]
    variance = torch.einsum("xyz,x,y,z->", weight.square(), *halves)
    return torch.randn(channels, *sizes, generator=generator) * weight / variance.sqrt()
