# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Three-dimensional convolutions with fewer multiplications: equal to the plain ones but for rounding.

`winograd` computes four neighbouring outputs along z of a 3 x 3 x 3 convolution from six products a tap in the place of
twelve (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308): half the arithmetic. `doubled` is nearest upsampling by
two and then a 3 x 3 x 3 convolution. The three taps meet only two voxels along each axis, so that each of the eight
phases of the result is a 2 x 2 x 2 convolution of the small map (Shi et al. 2016, arXiv:1609.07009): 8/27 of it.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 4
CHUNK = 2**22  # numbers of the input at a time, so that what is in between stays in a cache
A, B = (
    2 / 3,
    3 / 2,
)  # evaluated at 0, +-A, +-B and infinity: errors twice those of the plain sum, at 1 and 2 three times


def winograd_weights(weight: Tensor) -> Tensor:
    """What `winograd` takes, (6, O, I, 3, 3, 1), from the weights of a convolution, (O, I, 3, 3, 3)."""
    at_a, at_b = 2 * A**2 * (A**2 - B**2), 2 * B**2 * (B**2 - A**2)
    rows = [[1 / (A * B) ** 2, 0.0, 0.0]]
    rows += [[1 / norm, p / norm, p**2 / norm] for p, norm in ((A, at_a), (-A, at_a), (B, at_b), (-B, at_b))]
    matrix = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device=weight.device)
    transformed = [torch.einsum("c,oiabc->oiab", row.to(weight), weight)[..., None] for row in matrix]
    return torch.stack(transformed).permute(0, 1, 3, 4, 5, 2).contiguous().permute(0, 1, 5, 2, 3, 4)


def winograd(
    x: Tensor, weights: Tensor, bias: Tensor | None, padding: tuple[int, int] = (1, 1), out: Tensor | None = None
) -> Tensor:
    """A 3 x 3 x 3 convolution.

    Args:
        x: (N, I, X, Y, Z), Z a multiple of 4; zeros follow before and after it along z.
        weights: of `winograd_weights`.
        bias: (O,) or None.
        padding: zeros before and after along x and along y.
        out: where the result goes.

    Returns:
        (N, O, X', Y', Z), channels last in memory.
    """
    rows, columns = (side + 2 * zeros - 2 for side, zeros in zip(x.shape[2:4], padding))
    if out is None:
        out = channels_last((len(x), weights.shape[1], rows, columns, x.shape[4]), x)
    at_a_time = max(1, math.ceil(CHUNK * columns / x.numel()))
    for start in range(0, columns, at_a_time):
        stop = min(start + at_a_time, columns)
        first, last = max(0, start - padding[1]), min(x.shape[3], stop + 2 - padding[1])
        zeros = (first - (start - padding[1]), stop + 2 - padding[1] - last)
        points = _to_points(x[:, :, :, first:last], zeros)
        parts = [F.conv3d(point, weight, padding=(padding[0], 0, 0)) for point, weight in zip(points, weights)]
        _from_points([part.permute(0, 2, 3, 4, 1) for part in parts], bias, out[:, :, :, start:stop])
    return out


def channels_last(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """An empty tensor (N, C, X, Y, Z) with the channels last in memory, of `like`'s type and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def _to_points(x: Tensor, zeros: tuple[int, int]) -> list[Tensor]:
    padded = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 1, 1, *zeros))
    stop = x.shape[-1] - TILE + 1
    d = [padded[:, :, :, k : k + stop : TILE] for k in range(TILE + 2)]
    first = d[4].add(d[0], alpha=(A * B) ** 2).sub_(d[2], alpha=A**2 + B**2)
    last = d[5].add(d[1], alpha=(A * B) ** 2).sub_(d[3], alpha=A**2 + B**2)
    pairs = []
    for point, other in ((A, B), (B, A)):
        even, odd = d[4].sub(d[2], alpha=other**2), d[3].sub(d[1], alpha=other**2)
        pairs += [even.add(odd, alpha=point), even.sub_(odd, alpha=point)]
    return [part.permute(0, 4, 1, 2, 3) for part in (first, *pairs, last)]


def _from_points(parts: list[Tensor], bias: Tensor | None, out: Tensor) -> None:
    first, plus_a, minus_a, plus_b, minus_b, last = parts
    sum_a, sum_b = plus_a + minus_a, plus_b + minus_b
    difference_a, difference_b = plus_a.sub_(minus_a), plus_b.sub_(minus_b)
    outputs = (
        first.add_(sum_a).add_(sum_b),
        (A * difference_a).add_(difference_b, alpha=B),
        sum_a.mul_(A**2).add_(sum_b, alpha=B**2),
        last.add_(difference_a, alpha=A**3).add_(difference_b, alpha=B**3),
    )
    y = out.permute(0, 2, 3, 4, 1).unflatten(3, (-1, TILE))
    for k, output in enumerate(outputs):
        torch.add(output, 0.0 if bias is None else bias, out=y[:, :, :, :, k])


def doubled_weights(weight: Tensor) -> Tensor:
    """What `doubled` takes, (8, O, I, 2, 2, 2), from the weights of a convolution, (O, I, 3, 3, 3)."""
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).to(weight)
    matrices = torch.stack([first, first.flip(0, 1)])  # of the even and of the odd outputs: 2 taps from 3
    phases = torch.einsum("pai,qbj,rck,mnijk->pqrmnabc", matrices, matrices, matrices, weight).flatten(0, 2)
    return phases.permute(0, 1, 3, 4, 5, 2).contiguous().permute(0, 1, 5, 2, 3, 4)


def doubled(x: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Nearest upsampling by two along y and z, and along x of all rows but the first and last, then the convolution.

    Args:
        x: (N, I, X + 2, Y, Z): with the rows before and after those that are upsampled, zeros at the map's ends.
        weights: of `doubled_weights`.
        bias: (O,) or None.
        out: where the result goes.

    Returns:
        (N, O, 2 X, 2 Y, 2 Z), channels last in memory.
    """
    padded = F.pad(x, (1, 1, 1, 1))
    *_, rows, columns, depth = padded.shape
    if out is None:
        out = channels_last((len(x), weights.shape[1], *(2 * (side - 2) for side in padded.shape[2:])), x)
    for (p, q, r), weight in zip(product((0, 1), repeat=3), weights, strict=True):
        window = padded[:, :, p : rows - 1 + p, q : columns - 1 + q, r : depth - 1 + r]
        out[:, :, p::2, q::2, r::2] = F.conv3d(window, weight, bias)
    return out
