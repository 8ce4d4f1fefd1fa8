# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The same heads with one condition moved, and moved back: what shows whether a model obeys its conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.options import number, whole_number
from scripts.sampling.requests import SampleRequests


class MovedRequests(SampleRequests):
    """For each of several noises one head, the head with each condition moved to each level, and the head once more.

    The samples of a head differ by one condition from its first, so that `scripts.evaluation.obedience` can tell what
    that condition does. Conditions that no flag states begin in the middle, and sex as the seed draws it; a condition
    with codes is moved to each other code.

    Args:
        conditions, seed: see `SampleRequests`.
        num_heads: how many noises.
        levels: to which the conditions are moved, from 0 to 1 over the training range.
        unused: flags of sampling that this has no use for, with their values.

    Raises:
        BundleError: for a model without conditions, a bad number, or a flag without effect.
    """

    def __init__(
        self,
        conditions: Conditions,
        num_heads: Any = 6,
        levels: Sequence[Any] = (0.0, 1.0),
        seed: Any = 0,
        unused: Mapping[str, Any] | None = None,
    ) -> None:
        for flag in [flag for flag, value in (unused or {}).items() if value is not None]:
            raise BundleError(f"--{flag} does not go with obedience, whose samples --num_heads and --levels state")
        self.noises: list[int] = []
        super().__init__(conditions, None, seed)
        if not conditions:
            raise BundleError("the model has no conditions: there is nothing to obey")
        heads = whole_number(num_heads, "num_heads", least=1)
        to = [number(level, "levels") for level in levels]
        base, self.requested = self.requested[0], []
        for head in range(heads):
            self.noises.append(head)
            start = self._drawn(len(self.requested), base)
            rows = [start, *_moves(start, conditions, to), start]
            self.noises += [head] * (len(rows) - 1)
            self.requested += rows
        self.own_seeds, self.about = [None] * len(self.requested), [{} for _ in self.requested]
        self.start()

    def noise_of(self, index: int) -> int:
        """That of the sample's head."""
        return self.noises[index] if index < len(self.noises) else index


def _moves(start: Tensor, conditions: Conditions, levels: Sequence[float]) -> list[Tensor]:
    """The vector with each condition moved to each level where it is not yet."""
    moved = []
    for index, condition in enumerate(conditions):
        for level in _levels(condition, levels):
            if abs(level - float(start[index])) > 1e-6:
                vector = start.clone()
                vector[index] = level
                moved.append(vector)
    return moved


def _levels(condition: Condition, levels: Sequence[float]) -> list[float]:
    return [condition.normalise(code) for code in condition.codes.values()] if condition.codes else list(levels)
