# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How well the volumes of brain structures in the samples follow the volumes that were asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scripts.conditions.conditions import Conditions
from scripts.conditions.plausible import Plausible, why_impossible
from scripts.core.bootstrap import Estimate
from scripts.core.correlation import STATISTICS, correlations, in_words, pearson
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.segmentations import FEWEST, Segmentations, segmentation_of_each
from scripts.evaluation.stated_conditions import requested_volumes
from scripts.volumes.labels import QUANTITIES

logger = logging.getLogger(__name__)


class Volumetry(Measure):
    """Pearson's and Spearman's r and the slope of measured on requested volumes, with bootstrap intervals.

    Args:
        synthetic: the samples, with their sidecars or their table.
        segmentations: of these, or of several models.
        conditions: which are known; those called `ventricular_vol` and `brain_vol` are measured.
        seed: of the bootstrap.
        plausible: what a person can have; a volume that measures beyond is named in a warning, and not counted.
    """

    says = (
        "Whether samples have the ventricular and brain volumes that were asked for: correlation and slope of what a "
        "segmentation measures on what was requested (the paper's Figure 3, left)."
    )
    pitfall = (
        "r rises with the range of what was asked for, and does not notice a constant factor or offset: look at the "
        "slope too. A segmentation can fail on samples that are no brains."
    )
    shows = "Measured against requested volumes, one point a sample; the line is that of equal volumes."

    def __init__(
        self,
        synthetic: FeatureSet,
        segmentations: Segmentations,
        conditions: Conditions,
        seed: Any = 0,
        plausible: Plausible | None = None,
    ) -> None:
        self.synthetic = synthetic.folder
        self.segmentations, self.conditions = segmentations.of(self.synthetic), conditions
        self.inputs = [self.synthetic, self.segmentations]
        self.seed, self.plausible = whole_number(seed, "seed"), plausible

    def check(self) -> None:
        """Raise a `BundleError` if volumes, segmentations and requests do not belong together, or are too few."""
        requested, names = requested_volumes(self.synthetic, self.conditions), self.segmentations.names()
        if names is not None:
            self._segmentation_of_each(requested, names)

    def _segmentation_of_each(self, requested: Iterable[str], names: Iterable[str]) -> dict[str, str]:
        where = f"--{self.synthetic.flag} {self.synthetic.folder}"
        pairs = segmentation_of_each(list(requested), list(names), where)
        if len(pairs) < FEWEST:
            raise BundleError(f"--{self.synthetic.flag}: {len(pairs)} volumes are too few for a correlation")
        return pairs

    def update(self) -> None:
        """Let a tool segment what is to be segmented; under torchrun, each process its share."""
        self.segmentations.prepare()

    def compute(self) -> Result:
        """Measure and compare.

        Raises:
            BundleError: if volumes, segmentations and requests do not belong together, or are fewer than three.
        """
        table = self._compared()
        names = [c.name for c in self.conditions if c.name in QUANTITIES]
        rows, impossible = [], {}
        for name in names:
            requested, measured = _pairs(table, name)
            impossible[name] = len(table) - len(measured)
            found = self._correlations(name, requested, measured)
            rows += [Row(metric, one, name, headline=metric == "pearson") for metric, one in found.items()]
        facts = {
            **self.segmentations.facts(),
            "volumes": len(table),
            **{f"impossible {name}": count for name, count in impossible.items() if count},
            "seed": self.seed,
            self.synthetic.flag: str(self.synthetic.folder),
        }
        return Result(rows, facts, table, scatter(table, names))

    def _compared(self) -> list[dict[str, Any]]:
        requested = requested_volumes(self.synthetic, self.conditions)
        measured = self.segmentations.measured()
        pairs = self._segmentation_of_each(requested, measured)
        rows = []
        for name, wanted in requested.items():
            row: dict[str, Any] = {"volume": name, "segmentation": pairs[name]}
            for quantity, value in wanted.items():
                row[f"{quantity}_requested_mm3"] = value
                row[f"{quantity}_measured_mm3"] = self._possible(name, quantity, measured[pairs[name]][quantity])
            rows.append(row)
        return rows

    def _correlations(self, name: str, requested: np.ndarray, measured: np.ndarray) -> dict[str, Estimate]:
        if len(measured) >= FEWEST:
            return correlations(name, requested, measured, self.seed)
        logger.warning(f"{len(measured)} volumes have a {name} that a person can have: its correlation is not defined")
        return {metric: Estimate(float("nan"), len(measured)) for metric in STATISTICS}

    def _possible(self, name: str, quantity: str, value: float) -> float | None:
        raw = next(c.raw for c in self.conditions if c.name == quantity)
        why = why_impossible(raw, value, self.plausible)
        if why:
            logger.warning(f"{raw} of {name} was measured as {value:g} mm3: {why}; it is not counted")
        return None if why else value


def _pairs(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """What was requested and what was measured of a quantity, where that is a possible volume."""
    there = [row for row in rows if row[f"{name}_measured_mm3"] is not None]
    requested, measured = (np.array([row[f"{name}_{kind}_mm3"] for row in there]) for kind in ("requested", "measured"))
    return requested, measured


def scatter(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Measured against requested volumes in mL, one panel a quantity, with the line of identity."""
    figure = Figure(figsize=(4.5 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        x, y = (volumes / 1000 for volumes in _pairs(rows, name))
        if len(x):
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            axes.plot(ends, ends, color="0.7", linewidth=1)
        axes.scatter(x, y, s=8)
        axes.set_xlabel(f"{name} requested (mL)")
        axes.set_ylabel("measured (mL)")
        axes.set_title(in_words(pearson(x, y)), fontsize=9)
    return figure
