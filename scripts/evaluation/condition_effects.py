# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What each condition goes with in the brain's regions, in samples and in people: whether ageing looks like ageing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import scipy.stats

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.core.bootstrap import Estimate
from scripts.core.errors import BundleError
from scripts.core.inputs import Input
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.metrics.regions import REGIONS, OwnSegmenterChosen
from scripts.evaluation.segmentations import OWN
from scripts.evaluation.stated_conditions import stated_conditions, table_rows
from scripts.measuring.measured import MeasuredVolumes
from scripts.measuring.segmenter import BRAIN, Segmenter
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

LEAST = 20
"""Volumes of each set from which effects are estimated."""
LEVEL = 0.05
NOT_VOLUMES = ("ventricular_vol", "brain_vol")
"""Conditions that are volumes themselves: their effects are those of volumetry."""


class StatedVolumes(Input):
    """A folder of volumes with its conditions, but those that are volumes themselves.

    Args:
        folder: the volumes.
        conditions: which there are.
    """

    def __init__(self, folder: VolumeFolder, conditions: Conditions) -> None:
        self.folder, self.flag = folder, folder.flag
        self.conditions = [c for c in conditions if c.name not in NOT_VOLUMES]

    @cached_property
    def stated(self) -> np.ndarray:
        """(N, conditions) normalised values; NaN where one is not stated."""
        if not self.folder.requested:
            return np.empty((0, len(self.conditions)))
        rows = table_rows(self.folder)
        return np.array([self._of(path, rows.get(path)) for path in self.folder.paths])

    def _of(self, path: Any, row: Any) -> list[float]:
        try:
            stated = stated_conditions(path, row) or {}
            values = {flag: stated.get(flag) for c in self.conditions for flag in (c.name, c.raw)}
            found = []
            for c in self.conditions:
                cells = [(flag, c.from_cell(flag, values[flag])[0]) for flag in (c.raw, c.name)]
                known = [c.parse(flag, cell) for flag, cell in cells if cell is not None]
                found.append(known[0] if known else float("nan"))
        except BundleError:
            return [float("nan")] * len(self.conditions)
        return found

    @property
    def requested(self) -> bool:
        """Whether enough volumes state all of them, and one of them varies."""
        return self.folder.requested and not self.why_not

    @property
    def why_not(self) -> str:
        """Why conditions of a folder that was given cannot be told."""
        if not self.folder.requested:
            return ""
        known = self.stated[np.isfinite(self.stated).all(axis=1)]
        if self.conditions and len(known) >= LEAST and (np.ptp(known, axis=0) > 0).any():
            return ""
        names = " and ".join(c.raw for c in self.conditions) or "conditions that are no volumes"
        return f"--{self.flag} has {len(known)} volumes with {names}: their effects need {LEAST}, and different values"


class ConditionEffects(Measure):
    """Slopes of each region's volume on the conditions that are no volumes (age, sex), in samples and in people.

    The slopes are of one linear model a region, of the volume's logarithm on all of these conditions, so that an effect
    of sex is none of age: relative change of the region over the range of the condition.

    Args:
        synthetic, real: the volumes.
        segmenter, values: see `MeasuredVolumes`.
        conditions: which there are.
        segment_with: what was chosen to segment; it measures where that is `own`.
        seed: of the permutations.
        permutations: of the test.
    """

    says = (
        "Whether ageing looks like ageing, and men's heads like men's: how much each region changes over the range of "
        "a condition, in samples and in real people. `difference` is significant where its corrected p is below "
        f"{LEVEL:g}; a condition that the model ignores has slopes of 0 in samples."
    )
    pitfall = (
        "In people, conditions go with more than what a model is told: volumes that are conditions themselves are held "
        "by samples where people's follow age. Equal slopes need samples whose conditions are drawn as people's are."
    )

    def __init__(
        self,
        synthetic: FeatureSet,
        real: FeatureSet,
        segmenter: Callable[[], Segmenter],
        values: Values,
        conditions: Conditions,
        segment_with: Any = OWN,
        seed: Any = 0,
        permutations: Any = 1000,
    ) -> None:
        self.sets = [StatedVolumes(features.folder, conditions) for features in (synthetic, real)]
        self.inputs = [*self.sets, OwnSegmenterChosen(segment_with)]
        self.measured = [MeasuredVolumes(one.folder, segmenter, values) for one in self.sets]
        self.seed = whole_number(seed, "seed")
        self.permutations = whole_number(permutations, "permutations", least=100)

    def update(self) -> None:
        """Segment what is not segmented; under torchrun, each process its share."""
        for one in self.measured:
            one.complete()

    def compute(self) -> Result:
        """Compare."""
        (x, y), (u, v) = (self._known(*both) for both in zip(self.sets, self.measured))
        if min(len(x), len(u)) < LEAST:
            logger.warning(f"condition effects: {len(x)} samples and {len(u)} people are too few, it needs {LEAST}")
            return Result([], {"synthetic_volumes": len(x), "people": len(u)})
        moved = np.flatnonzero((np.ptp(x, axis=0) > 0) & (np.ptp(u, axis=0) > 0))
        x, u, names = x[:, moved], u[:, moved], [self.sets[0].conditions[i].name for i in moved]
        p = different_effects(x, y, u, v, self.permutations, self.seed)
        cells = [(i, j) for i in range(len(names)) for j in range(len(REGIONS))]
        rows = [
            _row(data, i, j, f"{names[i]} in {kind}")
            for i, j in cells
            for kind, data in (("synthetic", (x, y)), ("people", (u, v)))
        ]
        slopes = [row.found.value for row in rows]
        table = [
            {"condition": names[i], "region": REGIONS[j], "synthetic": one, "people": other, "p_corrected": p[i, j]}
            for (i, j), one, other in zip(cells, slopes[::2], slopes[1::2])
        ]
        share = float((p < LEVEL).mean()) if p.size else float("nan")
        rows.append(Row("different_effects", Estimate(share, p.size), headline=False))
        facts = {"synthetic_volumes": len(x), "people": len(u), "conditions": names, "permutations": self.permutations}
        return Result(rows, {**facts, "seed": self.seed}, table)

    def _known(self, stated: StatedVolumes, measured: MeasuredVolumes) -> tuple[np.ndarray, np.ndarray]:
        """Conditions (N, C) and logarithms of region volumes (N, R) of who has both."""
        measured.complete(alone=True)
        known = [measured.known(index) or {} for index in range(len(measured.folder))]
        volumes = np.array([[one[name] for name in REGIONS] for one in known])
        brain = volumes[:, [REGIONS.index(name) for name in BRAIN]].sum(axis=1) > 1.0
        there = brain & np.isfinite(stated.stated).all(axis=1)
        if not there.all():
            logger.warning(
                f"condition effects: {(~there).sum()} volumes of --{stated.flag} have no brain or conditions"
            )
        return stated.stated[there], np.log(np.maximum(volumes[there], 1.0))


def _row(data: tuple[np.ndarray, np.ndarray], condition: int, region: int, kind: str) -> Row:
    """A slope with its 95 % interval by Student's t."""
    conditions, volumes = data
    model = np.concatenate([conditions, np.ones((len(conditions), 1))], axis=1)
    slopes, errors = least_squares(model, volumes[:, [region]])
    reach = scipy.stats.t.ppf(0.975, len(model) - model.shape[1]) * errors[condition, 0]
    slope = float(slopes[condition, 0])
    found = Estimate(slope, len(model), interval=(float(slope - reach), float(slope + reach)))
    return Row("effect", found, REGIONS[region], kind=kind, headline=False)


def least_squares(model: np.ndarray, volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and their standard errors, both (P, R), of a linear model (N, P) of volumes (N, R)."""
    inverse = np.linalg.pinv(model)
    weights = inverse @ volumes
    freedom = len(model) - model.shape[1]
    spread = np.sqrt(((volumes - model @ weights) ** 2).sum(axis=0) / freedom)
    return weights, np.sqrt((inverse**2).sum(axis=1))[:, None] * spread


def different_effects(
    x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray, permutations: int, seed: int
) -> np.ndarray:
    """P-values of differences of slopes between two sets, corrected for the number of slopes.

    The statistic is Student's t of the difference in a model of both sets. Residuals of the model with equal slopes are
    permuted (Freedman and Lane 1983), and each t is compared with the largest |t| of all (Westfall and Young 1993).

    Args:
        x, y: conditions (N, C) and volumes (N, R) of one set.
        u, v: of the other, (M, C) and (M, R).
        permutations, seed: how often, and of which choice.

    Returns:
        (C, R), at least 1 / (permutations + 1).
    """
    conditions, volumes = np.concatenate([x, u]), np.concatenate([y, v])
    group = np.repeat([1.0, 0.0], [len(x), len(u)])[:, None]
    equal = np.concatenate([np.ones_like(group), group, conditions], axis=1)
    model = np.concatenate([equal, group * conditions], axis=1)
    fitted = equal @ np.linalg.lstsq(equal, volumes, rcond=None)[0]
    found, generator = np.abs(difference_t(model, volumes, x.shape[1])), np.random.default_rng(seed)
    largest = np.zeros(permutations)
    for number in range(permutations):
        moved = fitted + (volumes - fitted)[generator.permutation(len(volumes))]
        largest[number] = np.abs(difference_t(model, moved, x.shape[1])).max(initial=0.0)
    reached = (largest[:, None, None] >= found * (1 - 1e-12)).sum(axis=0)
    return (reached + 1) / (permutations + 1)


def difference_t(model: np.ndarray, volumes: np.ndarray, last: int) -> np.ndarray:
    """Student's t of the last coefficients of a linear model: (last, R) of a model (N, P) and volumes (N, R)."""
    weights, errors = (found[-last:] for found in least_squares(model, volumes))
    return weights / np.where(errors > 0.0, errors, np.inf)
