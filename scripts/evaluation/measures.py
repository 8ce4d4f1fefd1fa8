# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What every measure of the evaluation has in common, and the rows that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure

from scripts.core.bootstrap import Difference, Estimate
from scripts.core.errors import BundleError
from scripts.core.inputs import Input

Metric = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One figure of an evaluation.

    Attributes:
        metric: what was measured, such as `ms_ssim` or `pearson`.
        found: the figure, with its spread and interval.
        quantity: of what, where a metric is of several, such as `brain_vol`.
        network: the feature network that it depends on.
        kind: what tells figures of one metric apart, such as `halves` and `floor`.
        difference: how far it lies from the value that it should have, where that is known.
        headline: whether it has a column in the table of models.
        measure, model: whose it is; the evaluation fills them in.
    """

    metric: str
    found: Estimate
    quantity: str = ""
    network: str = ""
    kind: str = ""
    difference: Difference | None = None
    headline: bool = True
    measure: str = ""
    model: str = ""

    @property
    def what(self) -> tuple[str, str, str, str]:
        """What it is a figure of: equal for the rows of two measures that are to be compared."""
        return self.metric, self.quantity, self.network, self.kind


@dataclass(frozen=True)
class Result:
    """What a measure found.

    Attributes:
        rows: its figures.
        facts: plain data for the report: how many of what, the metrics' settings, the intensity range.
        table: the single values, written as `<name of the measure>.tsv` if there are any.
        picture: written as `<name of the measure>.png` if there is one.
    """

    rows: list[Row]
    facts: dict[str, Any]
    table: list[dict[str, Any]] = field(default_factory=list)
    picture: Figure | None = None


class Measure(ABC):
    """One entry of the evaluation's map of measures.

    As a metric of torchmetrics it has `update`, which takes in what is to be measured, one item at a time, and
    `compute`, which sums it up. What lies between the two is on disk: each process updates its share, and an
    interrupted evaluation goes on where it stopped.

    Attributes:
        inputs: what it needs; it is skipped unless all of them were given.
        target: name of the measure whose figures its own should equal, if there is one. The page then draws the
            distributions of both.
        says, pitfall: for the report, in a sentence or two: what it is for, and how it misleads.
        shows: what is in its picture.
    """

    inputs: Sequence[Input] = ()
    target: str | None = None
    says: str = ""
    pitfall: str = ""
    shows: str = ""

    def missing_flags(self) -> list[str]:
        """The flags that it needs and that were not given."""
        return [needed.flag for needed in self.inputs if not needed.requested]

    def check(self) -> None:  # noqa: B027 (not every measure has something to look at)
        """Raise a `BundleError` if it sees that the inputs cannot be used; before anything is computed."""

    def update(self) -> None:  # noqa: B027 (not every measure takes long)
        """Compute and keep what was not kept before; under torchrun all processes call it, and each does its share."""

    @abstractmethod
    def compute(self) -> Result:
        """Sum up, and first compute what `update` has not; the first process alone calls it."""


def settings(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """The plain settings of MONAI metrics (kernel size, weights, data range and the like), for the report."""
    return {name: {k: v for k, v in vars(m).items() if _plain(v) and k[0] != "_"} for name, m in metrics.items()}


def check_entries(flag: str, entries: Mapping[str, Any], needed: Sequence[str] = ()) -> None:
    """Raise a `BundleError` for an entry of a configuration's map that is plain data, as a misspelt flag makes it.

    Args:
        flag: the map's id.
        entries: what stands in it.
        needed: attributes that an entry must have, unless it is a function that makes one.
    """
    for name, entry in entries.items():
        if entry is None or _plain(entry) or isinstance(entry, (Mapping, list, tuple)):
            others = ", ".join(other for other in entries if other != name)
            raise BundleError(
                f"--{flag}::{name} {entry}: an entry of {flag} is an object with _target_, and no value; the others "
                f"are {others}: is the name misspelt?"
            )
        lacking = [] if callable(entry) else [attribute for attribute in needed if not hasattr(entry, attribute)]
        if lacking:
            raise BundleError(f"--{flag}::{name} is a {type(entry).__name__}, which has no '{lacking[0]}'")


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str))
