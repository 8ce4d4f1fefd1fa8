# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Feature maps of which a few rows are computed at a time.

A map is anything with a shape, (1, C, X, Y, Z), and a method that gives any of its rows along x. Maps are put together
from one another, and a pass over the last one pulls slabs of rows through all between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.networks.cpu.convolution import channels_last

Convolution = Callable[[Tensor, Tensor], Tensor]  # of rows, and memory that the result may take


class Rows(Protocol):
    """A feature map, (1, C, X, Y, Z), of which some rows along x can be had at a time."""

    @property
    def shape(self) -> torch.Size:
        """(1, C, X, Y, Z)."""

    def rows(self, start: int, stop: int) -> Tensor:
        """(1, C, stop - start, Y, Z), channels last in memory; not to be written to."""


class Moments:
    """Mean and sum of squared deviations of each channel, over slabs, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, slab: Tensor) -> None:
        """Take in a slab (1, C, x, y, z)."""
        for row in slab.split(1, 2):
            self._add(row.permute(0, 2, 3, 4, 1).flatten(0, 3).float())

    def _add(self, voxels: Tensor) -> None:
        mean = voxels.mean(0)
        squares = (voxels - mean).square_().sum(0).double()
        new, total = len(voxels), self.count + len(voxels)
        step = mean.double() - self.mean.to(mean.device)
        self.mean = self.mean.to(mean.device) + step * (new / total)
        self.squares = self.squares.to(mean.device) + squares + step.square() * (self.count * new / total)
        self.count = total

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """What group normalisation multiplies with and adds, each (1, C, 1, 1, 1) float32."""
        means, squares = (x.view(norm.num_groups, -1) for x in (self.mean, self.squares))
        mean = means.mean(1, keepdim=True)
        variance = (squares / self.count + (means - mean).square()).mean(1, keepdim=True)
        scale = (variance + norm.eps).rsqrt().expand_as(means).flatten() * norm.weight.double()
        shift = norm.bias.double() - mean.expand_as(means).flatten() * scale
        return scale.float().view(1, -1, 1, 1, 1), shift.float().view(1, -1, 1, 1, 1)


@dataclass
class Stored:
    """A map in memory, with its moments where a pass has taken them."""

    tensor: Tensor
    moments: Moments | None = None

    @property
    def shape(self) -> torch.Size:
        """(1, C, X, Y, Z)."""
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """A view."""
        return self.tensor[:, :, start:stop]


@dataclass
class Computed:
    """A map that is computed from another, row by row."""

    source: Rows
    shape: torch.Size
    compute: Callable[[Tensor], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        """Of the same rows of the source."""
        return self.compute(self.source.rows(start, stop))


@dataclass
class Memory:
    """Room for slabs that is used again: to allocate and clear it anew takes about as long as the arithmetic."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0)

    def __call__(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """(1, C, x, Y, Z) of `like`'s type and device, channels last; what was there may be lost."""
        if self.tensor.dim() == 1 or self.tensor.shape[2] < shape[2]:
            self.tensor = channels_last(shape, like)
        return self.tensor[:, :, : shape[2]]


class Window:
    """Another map with each of its rows put through `compute`, once in a pass upwards: the latest rows are kept.

    Args:
        source: the other map.
        compute: of one row, whose shape and type it keeps.
    """

    def __init__(self, source: Rows, compute: Callable[[Tensor], Tensor]) -> None:
        self.source, self.compute, self.shape = source, compute, source.shape
        self.start = self.stop = 0
        self._memory = Memory()

    def rows(self, start: int, stop: int) -> Tensor:
        """Valid until the next call."""
        if not self.start <= start < self.stop:
            self.start = self.stop = start
        if stop > self.stop:
            self._read(start, min(stop + stop % 2, self.shape[2]))  # pairs of rows, as `Doubled` makes them
        return self._memory.tensor[:, :, start - self.start : stop - self.start]

    def _read(self, start: int, stop: int) -> None:
        new, kept = self.source.rows(self.stop, stop), self.stop - start
        again = self._memory.tensor[:, :, start - self.start : self.stop - self.start].clone() if kept else None
        latest = self._memory((*self.shape[:2], stop - start, *self.shape[3:]), new)
        if again is not None:
            latest[:, :, :kept] = again
        for number, row in enumerate(new.split(1, 2), kept):
            latest[:, :, number : number + 1] = self.compute(row)
        self.start, self.stop = start, stop


class Convolved:
    """A 3 x 3 x 3 convolution of a map with zeros around it.

    Args:
        source: the map.
        channels: of the result.
        convolve: of some rows with one more at either end.
    """

    def __init__(self, source: Rows, channels: int, convolve: Convolution) -> None:
        self.source, self._convolve, self._memory = source, convolve, Memory()
        self.shape = torch.Size((1, channels, *source.shape[2:]))

    def rows(self, start: int, stop: int) -> Tensor:
        """Valid until the next call."""
        slab = _with_zeros(self.source, start - 1, stop + 1)
        return self._convolve(slab, self._memory((*self.shape[:2], stop - start, *self.shape[3:]), slab))


class Doubled:
    """Nearest upsampling by two and a 3 x 3 x 3 convolution with zeros around the result.

    Args:
        source: what is upsampled.
        weight, bias: of the convolution.
        convolve: upsampling and convolution of some of the source's rows with one more at either end.
    """

    def __init__(self, source: Stored, weight: Tensor, bias: Tensor, convolve: Convolution) -> None:
        self.source, self.weight, self.bias = source, weight, bias
        self._convolve, self._memory = convolve, Memory()
        self.shape = torch.Size((1, len(weight), *(2 * side for side in source.shape[2:])))

    def rows(self, start: int, stop: int) -> Tensor:
        """Valid until the next call. They are computed in pairs, the pair that two slabs share twice."""
        first, last = start // 2, (stop + 1) // 2
        slab = _with_zeros(self.source, first - 1, last + 1)
        pairs = self._convolve(slab, self._memory((*self.shape[:2], 2 * (last - first), *self.shape[3:]), slab))
        return pairs[:, :, start - 2 * first : stop - 2 * first]


class Halved:
    """A 3 x 3 x 3 convolution of a map with stride 2, with zeros after the map alone.

    Args:
        source: the map.
        channels: of the result.
        convolve: of some rows, with zeros after them along y and z.
    """

    def __init__(self, source: Rows, channels: int, convolve: Callable[[Tensor], Tensor]) -> None:
        self.source, self._convolve = source, convolve
        self.shape = torch.Size((1, channels, *(side // 2 for side in source.shape[2:])))

    def rows(self, start: int, stop: int) -> Tensor:
        """From twice as many rows and one."""
        return self._convolve(F.pad(_with_zeros(self.source, 2 * start, 2 * stop + 1), (0, 1, 0, 1)))


@dataclass
class Sum:
    """Of two maps; the second one's rows may be written to."""

    one: Rows
    other: Rows

    @property
    def shape(self) -> torch.Size:
        """That of either."""
        return self.other.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Of both."""
        other = self.other.rows(start, stop)
        return other.add_(self.one.rows(start, stop))


@dataclass
class Tapped:
    """Another map; what is computed of its rows besides is kept in a tensor."""

    source: Rows
    compute: Callable[[Tensor], Tensor]
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        """The source's."""
        return self.source.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """The source's."""
        slab = self.source.rows(start, stop)
        self.tensor[:, :, start:stop] = self.compute(slab)
        return slab


def _with_zeros(source: Rows, start: int, stop: int) -> Tensor:
    end = source.shape[2]
    slab = source.rows(max(start, 0), min(stop, end))
    before, after = max(-start, 0), max(stop - end, 0)
    return F.pad(slab, (0, 0, 0, 0, before, after)) if before or after else slab
