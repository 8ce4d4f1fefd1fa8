# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether samples obey: what moves, and what does not, where one condition is moved and the noise stays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.core.bootstrap import Estimate, bootstrapped
from scripts.core.errors import BundleError
from scripts.core.files import parse_json
from scripts.core.inputs import Input
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.metrics.regions import OwnSegmenterChosen
from scripts.evaluation.metrics.tissue_age import features_of, people_with_ages
from scripts.evaluation.names import written
from scripts.evaluation.segmentations import MEASURED, OWN
from scripts.measuring.brain_age import AGE
from scripts.measuring.measured import MeasuredVolumes
from scripts.measuring.ridge import fit_ridge
from scripts.measuring.segmenter import Segmenter
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.labels import stem

logger = logging.getLogger(__name__)

SAME = 1e-5
"""Difference of normalised conditions below which they are one."""


@dataclass
class MovedHead:
    """Samples of one noise.

    Attributes:
        base: place of the first in its folder.
        moves: name of a condition -> places of samples in which it alone differs, and by how much.
        back: places of samples that are asked for as the first is.
    """

    base: int
    moves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    back: list[int] = field(default_factory=list)


class MovedSamples(Input):
    """Samples of which several share their noise, so that conditions alone tell them apart.

    Args:
        folder: samples with sidecars.
        conditions: which there are.
    """

    def __init__(self, folder: VolumeFolder, conditions: Conditions) -> None:
        self.folder, self.flag, self.conditions = folder, folder.flag, conditions

    @cached_property
    def heads(self) -> list[MovedHead]:
        """Those of whom one condition is moved."""
        if not self.folder.requested or not self.conditions:
            return []
        noises: dict[tuple[Any, Any], list[tuple[int, np.ndarray]]] = {}
        for place, path in enumerate(self.folder.paths):
            told = _told(path, [c.name for c in self.conditions])
            if told is not None:
                noises.setdefault(told[0], []).append((place, told[1]))
        heads = [moved_head(samples, [c.name for c in self.conditions]) for samples in noises.values()]
        return [head for head in heads if head.moves]

    @property
    def requested(self) -> bool:
        """Whether there are some."""
        return bool(self.heads)

    @property
    def why_not(self) -> str:
        """Why samples say nothing of it."""
        if self.requested or not self.folder.requested:
            return ""
        return f"no samples of --{self.flag} share their noise: configs/obedience.yaml makes such"


def _told(path: Path, names: Sequence[str]) -> tuple[tuple[Any, Any], np.ndarray] | None:
    """Seed and number of a sample's noise, and its normalised conditions; None where a sidecar does not say them."""
    sidecar = path.with_name(f"{stem(path)}.json")
    try:
        found = parse_json(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
        vector = np.array([float(found["conditions"][name]) for name in names])
        return (found["seed"], found.get("noise_of_index", found["index"])), vector
    except (ValueError, KeyError, TypeError):
        return None


def moved_head(samples: Sequence[tuple[int, np.ndarray]], names: Sequence[str]) -> MovedHead:
    """The first sample of a noise, and what the others are to it.

    Args:
        samples: place and normalised conditions (C,) of each.
        names: of the conditions.
    """
    (base, start), *others = samples
    head = MovedHead(base)
    for place, vector in others:
        moved = np.flatnonzero(np.abs(vector - start) > SAME)
        if len(moved) == 0:
            head.back.append(place)
        elif len(moved) == 1:
            step = float((vector - start)[moved[0]])
            head.moves.setdefault(names[moved[0]], []).append((place, step))
    return head


class Obedience(Measure):
    """Slope of each measured condition on each moved one, over heads of which one condition is moved.

    Measured are ventricles and brain by the segmenter and, where enough people have an age, age by `TissueAge`'s line.
    All are in units of their conditions' ranges: a model that obeys has 1 where a condition moves what it names, and
    elsewhere what the two have in common.

    Args:
        synthetic, training, real, segmenter, values, conditions, segment_with: see `TissueAge`.
        seed: of the bootstrap, which draws heads.
    """

    says = (
        "What conditions do, where one is moved and the noise stays: the slope of each measured quantity on each "
        "condition, both from 0 to 1 over the training range. 1 on the diagonal and 0 elsewhere is full obedience. "
        "`return` is the mean absolute difference between a head and the one that was moved back; 0 is the same head."
    )
    pitfall = (
        "What measures errs towards its middle, so that slopes of a perfect model can be below 1: compare age with the "
        "slope of people under age by tissue. A slope is a mean: a condition that works at one end only has half of it."
    )
    shows = (
        "Slopes, a column for each condition that was moved and a row for each quantity that was measured, with 95 % "
        "intervals over heads. Blue follows, red goes against; the framed cells should be 1, the others 0."
    )

    def __init__(
        self,
        synthetic: FeatureSet,
        training: VolumeFolder,
        real: VolumeFolder,
        segmenter: Callable[[], Segmenter],
        values: Values,
        conditions: Conditions,
        segment_with: Any = OWN,
        seed: Any = 0,
    ) -> None:
        self.samples = MovedSamples(synthetic.folder, conditions)
        self.people = people_with_ages(training, real, conditions)
        self.inputs = [synthetic.folder, self.samples, OwnSegmenterChosen(segment_with)]
        self.conditions, self.seed = conditions, whole_number(seed, "seed")
        self._segmenter, self.values = segmenter, values

    @cached_property
    def measured(self) -> MeasuredVolumes:
        """The samples."""
        return MeasuredVolumes(self.samples.folder, self._segmenter, self.values, tissue=True)

    @cached_property
    def learnt_from(self) -> MeasuredVolumes | None:
        """People with an age; None where there are too few."""
        if not self.people.requested:
            return None
        return MeasuredVolumes(
            self.people.folder.part(list(self.people.ages)), self._segmenter, self.values, tissue=True
        )

    def update(self) -> None:
        """Segment what is not segmented; under torchrun, each process its share."""
        for one in (self.measured, self.learnt_from):
            if one is not None:
                one.complete()

    def compute(self) -> Result:
        """Slopes and correlations."""
        found, heads = self._normalised(), self.samples.heads
        if len(heads) < 3:
            logger.warning(f"obedience: {len(heads)} heads are too few for intervals, which need three")
        moved = [c.name for c in self.conditions if any(c.name in head.moves for head in heads)]
        cells = {(quantity, name): self._cell(values, name) for name in moved for quantity, values in found.items()}
        rows = [
            Row(metric, one, quantity, kind=f"{name} moved", headline=False)
            for (quantity, name), both in cells.items()
            for metric, one in zip(("slope", "pearson"), both)
        ]
        table = [
            {"measured": quantity, "moved": name, "slope": slope.value, "pearson": r.value, "heads": r.count}
            for (quantity, name), (slope, r) in cells.items()
        ]
        facts = {"heads": len(heads), "measured": list(found), "moved": moved, "seed": self.seed}
        slopes = {cell: slope for cell, (slope, _) in cells.items()}
        return Result([*rows, *self._returned()], facts, table, matrix_figure(slopes, list(found), moved))

    def _cell(self, values: np.ndarray, name: str) -> tuple[Estimate, Estimate]:
        pairs = [steps_of(values, head.base, head.moves.get(name, [])) for head in self.samples.heads]
        return slope_over_heads(pairs, self.seed)

    def _normalised(self) -> dict[str, np.ndarray]:
        """Name of a condition -> what is measured of each sample, 0 to 1 over its range; NaN without a brain."""
        self.measured.complete(alone=True)
        rows, found = self.measured.rows(), {}
        for condition in self.conditions:
            if condition.name in MEASURED:
                column = MEASURED[condition.name]
                found[condition.name] = np.array([condition.normalise(row[column]) for row in rows])
            elif condition.name == AGE and self.learnt_from is not None:
                people, ages = features_of(self.learnt_from), np.array([*self.people.ages.values()])
                shown = np.isfinite(people).all(axis=1)
                told = fit_ridge(people[shown], ages[shown])(features_of(self.measured))
                found[AGE] = np.array([condition.normalise(years) for years in told.tolist()])
        if not found:
            raise BundleError("obedience: none of the conditions can be measured")
        return found

    def _returned(self) -> list[Row]:
        pairs = [(head.base, place) for head in self.samples.heads for place in head.back]
        found = [self._difference(*pair) for pair in pairs]
        return [Row("return", Estimate(float(np.mean(found)), len(found)), headline=False)] if found else []

    def _difference(self, first: int, second: int) -> float:
        folder = self.samples.folder
        same = folder.hashes[first] == folder.hashes[second]
        return 0.0 if same else float((folder[first] - folder[second]).abs().mean())


def steps_of(values: np.ndarray, base: int, moves: Sequence[tuple[int, float]]) -> np.ndarray:
    """By how much a condition was moved, and by how much a quantity: (moves, 2), without those that are not known."""
    found = np.array([(step, values[place] - values[base]) for place, step in moves]).reshape(-1, 2)
    return found[np.isfinite(found).all(axis=1)]


def slope_over_heads(pairs: Sequence[np.ndarray], seed: int) -> tuple[Estimate, Estimate]:
    """Slope through each head's own first sample, and the correlation of the two changes; intervals draw heads.

    Args:
        pairs: of each head, from `steps_of`.
        seed: of the bootstrap.
    """
    sums = np.array([_sums(one) for one in pairs if len(one)]).reshape(-1, 3)
    heads = np.arange(len(sums))
    if not len(heads):
        return Estimate(float("nan"), 0), Estimate(float("nan"), 0)

    def slope(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        xx, xy, _ = np.moveaxis(sums[drawn].sum(axis=drawn.ndim - 1), -1, 0)
        return xy / xx

    def r(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        xx, xy, yy = np.moveaxis(sums[drawn].sum(axis=drawn.ndim - 1), -1, 0)
        return np.where(yy > 0.0, xy / np.sqrt(np.where(yy > 0.0, xx * yy, 1.0)), np.nan)

    of_slope, of_r = (
        Estimate(float(of(heads)), len(heads), interval=bootstrapped([heads], of, seed)) for of in (slope, r)
    )
    return of_slope, of_r


def _sums(one: np.ndarray) -> tuple[float, float, float]:
    x, y = one.T
    return float((x * x).sum()), float((x * y).sum()), float((y * y).sum())


def matrix_figure(slopes: Mapping[tuple[str, str], Estimate], measured: Sequence[str], moved: Sequence[str]) -> Figure:
    """Slopes as a matrix, measured quantities below each other, moved conditions beside each other."""
    figure = Figure(figsize=(1.8 + 1.35 * len(moved), 1.1 + 0.85 * len(measured)), layout="constrained")
    axes = figure.subplots()
    values = np.array([[slopes[row, column].value for column in moved] for row in measured])
    axes.imshow(values, cmap="RdBu", vmin=-1.25, vmax=1.25, aspect="auto")
    for i, row in enumerate(measured):
        for j, column in enumerate(moved):
            one = slopes[row, column]
            interval = "" if one.interval is None else f"\n{one.interval[0]:.2f} to {one.interval[1]:.2f}"
            dark = "white" if abs(one.value) > 0.8 else "black"
            axes.text(j, i, f"{one.value:.2f}{interval}", ha="center", va="center", fontsize=8, color=dark)
            if row == column:
                frame = Rectangle((j - 0.49, i - 0.49), 0.98, 0.98, fill=False, edgecolor="black", linewidth=2)
                axes.add_patch(frame)
    axes.set_xticks(range(len(moved)), [written(name) for name in moved], fontsize=8)
    axes.set_yticks(range(len(measured)), [written(name) for name in measured], fontsize=8)
    axes.set_xlabel("moved")
    axes.set_ylabel("measured")
    return figure
