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

from scripts.bootstrap import Summary
from scripts.volume_folders import VolumeFolder

Metric = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Result:
    """What a measure found.

    Attributes:
        summaries: name of a metric -> its values in brief.
        facts: plain data for the report: how many of what, the metrics' settings, the intensity range.
        rows: a table of the single values, written as `<name of the measure>.tsv` if there are any.
        picture: written as `<name of the measure>.png` if there is one.
    """

    summaries: dict[str, Summary]
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    picture: Figure | None = None


class Measure(Protocol):
    """One entry of the evaluation's map of measures."""

    @property
    def folders(self) -> Sequence[VolumeFolder]:
        """What it needs; it is skipped unless all of them were given."""
        ...

    def compute(self) -> Result:
        """Read the folders and measure; shows its progress."""
        ...


def missing_flags(measure: Measure) -> list[str]:
    """The flags of the folders that a measure needs and that were not given."""
    return [folder.flag for folder in measure.folders if not folder.requested]


def settings(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """The plain settings of MONAI metrics (kernel size, weights, data range and the like), for the report."""
    return {name: {k: v for k, v in vars(m).items() if _plain(v) and k[0] != "_"} for name, m in metrics.items()}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str))
