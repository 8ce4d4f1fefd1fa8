# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What every measure of the evaluation has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from matplotlib.figure import Figure

from scripts.bootstrap import Difference, Estimate, Summary
from scripts.errors import BundleError

Metric = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Result:
    """What a measure found.

    Attributes:
        summaries: name of a metric -> its values in brief, or the one number that it is.
        facts: plain data for the report: how many of what, the metrics' settings, the intensity range.
        distances: name of a metric -> how far it lies from the value that it should have, where the measure knows.
        rows: a table of the single values, written as `<name of the measure>.tsv` if there are any.
        picture: written as `<name of the measure>.png` if there is one.
    """

    summaries: dict[str, Summary | Estimate]
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    picture: Figure | None = None
    distances: dict[str, Difference] = field(default_factory=dict)


class Input(Protocol):
    """Something that a flag gives: a folder, a table, the choice of networks.

    It may say in `why_not` why it does without what it was meant to take by itself, and in `warnings` what was warned
    of when it was made.
    """

    @property
    def flag(self) -> str:
        """The flag's name."""
        ...

    @property
    def requested(self) -> bool:
        """Whether the flag was given."""
        ...


class Measure(Protocol):
    """One entry of the evaluation's map of measures.

    It may have more attributes: `check()`, which is called before anything is computed and raises a `BundleError` if it
    sees that the inputs cannot be used (an input may have one too); `prepare()`, which under torchrun every process
    calls before the first one computes and reports alone; `target`, the name of the measure whose means its own should
    equal; and for the report, in a sentence or two, `says` and `pitfall`, what it is for and how it misleads, and
    `shows`, what is in its picture.
    """

    @property
    def inputs(self) -> Sequence[Input]:
        """What it needs; it is skipped unless all of them were given."""
        ...

    def compute(self) -> Result:
        """Read the folders and measure; shows its progress."""
        ...


def missing_flags(measure: Measure) -> list[str]:
    """The flags that a measure needs and that were not given."""
    return [needed.flag for needed in measure.inputs if not needed.requested]


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
