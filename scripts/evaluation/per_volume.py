# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The base of measures that are one number of each volume."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from scripts.compute.counting import counted
from scripts.compute.kept import Values, complete, identity
from scripts.core.bootstrap import summarise
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet


class PerVolume(Measure):
    """A number of each volume: its mean over a set, which is to equal that over the real volumes.

    What was measured is kept: an interrupted run goes on where it stopped, and under torchrun each process measures its
    share.

    Args:
        values: where what was measured is kept.
        synthetic, real: the set; one of the two.
        seed: of the bootstrap.
        target: name of the measure of the real volumes; None if there is none.

    Attributes:
        metric: name of the figure.
        version: to count up when `value` gives other numbers.
    """

    metric: ClassVar[str]
    version: ClassVar[int] = 1

    def __init__(
        self,
        values: Values,
        synthetic: FeatureSet | None = None,
        real: FeatureSet | None = None,
        seed: Any = 0,
        target: str | None = None,
    ) -> None:
        (self.folder,) = (features.folder for features in (synthetic, real) if features is not None)
        self.inputs, self.values, self.target = [self.folder], values, target
        self.seed = whole_number(seed, "seed")

    @abstractmethod
    def value(self, volume: torch.Tensor) -> float:
        """The number of a volume (1, 1, X, Y, Z), float32, nominally 0..1; `self.folder.spacing` has its mm."""

    def settings(self) -> dict[str, Any]:
        """Plain data on which the numbers depend: with others, volumes are measured again."""
        return {}

    def update(self) -> None:
        """Measure the volumes that were not measured before, as one of several processes if there are any."""
        self._complete()

    def compute(self) -> Result:
        """The mean over all volumes."""
        self._complete(alone=True)
        found = np.array([self._known(index) for index in range(len(self.folder))])
        names = [self.folder.name(index) for index in range(len(self.folder))]
        return Result(
            [Row(self.metric, summarise(found, np.arange(len(found)), self.seed))],
            {"volumes": len(found), "seed": self.seed, **self.settings(), self.folder.flag: self.folder.summary()},
            [{"volume": name, self.metric: value} for name, value in zip(names, found.tolist())],
        )

    @property
    def _identity(self) -> str:
        return identity(self.metric, self, **self.settings())

    def _known(self, index: int) -> float | None:
        numbers = self.values.get(self._identity, self.folder.hashes[index])
        return None if numbers is None else numbers[0]

    def _complete(self, alone: bool = False) -> None:
        label = f"{self.metric} of {self.folder.flag}"

        def measure(missing: list[int]) -> None:
            for index in counted(missing, label, unit="volume"):
                self.values.add(self._identity, [self.folder.hashes[index]], [self.value(self.folder[index])])

        indices = range(len(self.folder))
        complete(label, indices, lambda index: self._known(index) is not None, measure, self.values, alone)
