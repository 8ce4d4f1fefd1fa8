# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How old the samples look to a line through volumes and contrasts of tissues, without a network of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.compute.kept import Values
from scripts.conditions.conditions import Conditions
from scripts.core.bootstrap import Estimate, difference, summarise
from scripts.core.correlation import correlations
from scripts.core.errors import BundleError
from scripts.core.inputs import Input
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.metrics.predicted_age import ages_in, scatter
from scripts.evaluation.metrics.regions import OwnSegmenterChosen
from scripts.evaluation.segmentations import FEWEST, OWN
from scripts.evaluation.stated_conditions import table_rows
from scripts.measuring.brain_age import AGE
from scripts.measuring.measured import MeasuredVolumes
from scripts.measuring.ridge import Ridge, fit_ridge, predicted_from_others
from scripts.measuring.segmenter import Segmenter
from scripts.measuring.tissue import ageing_features
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

LEAST_PEOPLE = 20
"""From which a line is learnt: fewer tell little, and of how little they tell even less."""
PEOPLE, SYNTHETIC = "people", "synthetic"


class AgedVolumes(Input):
    """A folder of volumes, of which enough have an age.

    Args:
        folder: the volumes.
        conditions: of which age alone is read.
        least: how many must have one; their ages must differ where these are more than one.
    """

    def __init__(self, folder: VolumeFolder, conditions: Conditions, least: int) -> None:
        self.folder, self.flag, self.conditions, self.least = folder, folder.flag, conditions, least

    @cached_property
    def ages(self) -> dict[Path, float]:
        """Volumes with an age, and their ages in years."""
        if not self.folder.requested or not any(c.name == AGE for c in self.conditions):
            return {}
        try:
            found = ages_in(self.folder, self.conditions)
        except BundleError as error:
            logger.info(f"no age is told from tissue: {error}")
            return {}
        return {path: age for path, age in found.items() if age is not None}

    @property
    def requested(self) -> bool:
        """Whether there are enough."""
        return self.folder.requested and not self.why_not

    @property
    def why_not(self) -> str:
        """Why a folder that was given has none to tell ages of or to learn them from."""
        enough = len(self.ages) >= self.least and len(set(self.ages.values())) >= min(self.least, 2)
        if enough or not self.folder.requested:
            return ""
        return f"--{self.flag} has {len(self.ages)} volumes with known ages, and tissue age needs {self.least}, unlike"


def people_with_ages(training: VolumeFolder, real: VolumeFolder, conditions: Conditions) -> AgedVolumes:
    """Whom to learn ages from: the real volumes, which are measured anyway; where too few have one, the training's."""
    both = [AgedVolumes(folder, conditions, LEAST_PEOPLE) for folder in (real, training)]
    return next((one for one in both if one.requested), both[0])


class Aged(NamedTuple):
    """Volumes that show a brain: paths, features (N, d) and ages in years (N,)."""

    paths: list[Path]
    features: np.ndarray
    ages: np.ndarray

    def lines(self, kind: str, told: np.ndarray) -> list[dict[str, Any]]:
        """A line of the table for each, with the years (N,) that it is told to be."""
        years = zip(self.paths, self.ages.tolist(), told.tolist())
        return [{"volume": p.name, "set": kind, "age_years": a, "predicted_years": round(b, 3)} for p, a, b in years]


class TissueAge(Measure):
    """Age of samples as a ridge tells it that was fitted on real people, against the age that was asked for.

    Features are those of `ageing_features`. Of people and of samples there are the mean absolute error (years),
    Pearson's and Spearman's r, and the slope of told on stated age. People are told from others, by cross-validation.

    Args:
        synthetic: samples with their sidecars or their table.
        training, real: of people; see `people_with_ages`.
        segmenter, values: see `MeasuredVolumes`.
        conditions: one of them is `age`.
        segment_with: what was chosen to segment; it measures where that is `own`.
        seed: of folds and bootstrap.
    """

    says = (
        "Whether samples look the age that was asked for, to a line through volumes and contrasts of tissues that was "
        "fitted on real people: it needs no network. People are told from other people, which says how good the line "
        "is; the slope of samples should be that of people."
    )
    pitfall = (
        "The line errs towards the middle of its people's ages, so that a slope below 1 is expected; and it knows how "
        "these people were scanned. Where it tells people badly (r below about 0.7), it says little of samples."
    )
    shows = "Told against stated age in years, one point a volume; the line is that of equal ages."

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
        self.people = people_with_ages(training, real, conditions)
        self.samples = AgedVolumes(synthetic.folder, conditions, 1)
        self.inputs = [self.samples, self.people, OwnSegmenterChosen(segment_with)]
        self._segmenter, self.values = segmenter, values
        self.seed = whole_number(seed, "seed")

    @cached_property
    def sets(self) -> dict[str, tuple[MeasuredVolumes, np.ndarray]]:
        """`people` and `synthetic`: volumes with an age, and their ages in years (N,)."""
        return {
            kind: (self._measured(one.folder.part(list(one.ages))), np.array([*one.ages.values()]))
            for kind, one in ((PEOPLE, self.people), (SYNTHETIC, self.samples))
        }

    def _measured(self, folder: VolumeFolder) -> MeasuredVolumes:
        return MeasuredVolumes(folder, self._segmenter, self.values, tissue=True)

    def check(self) -> None:
        """Raise a `BundleError` if people lie on another grid; a warning says which samples have no age."""
        self.people.folder.check_same_grid(self.samples.folder)
        for one in (self.people, self.samples):
            if len(one.ages) < len(one.folder):
                without = len(one.folder) - len(one.ages)
                logger.warning(f"--{one.flag}: {without} volumes have no age: tissue age leaves them out")

    def update(self) -> None:
        """Segment what is not segmented; under torchrun, each process its share."""
        for measured, _ in self.sets.values():
            measured.complete()

    def compute(self) -> Result:
        """Fit on people, tell samples."""
        shown = {kind: self._shown(measured, ages) for kind, (measured, ages) in self.sets.items()}
        people, samples = shown[PEOPLE], shown[SYNTHETIC]
        if len(people.ages) < LEAST_PEOPLE:
            logger.warning(f"tissue age: {len(people.ages)} volumes of --{self.people.flag} are too few to learn from")
            return Result([], {"people_volumes": len(people.ages)})
        line = fit_ridge(people.features, people.ages)
        groups = participants_of(self.people.folder, people.paths)
        told = {PEOPLE: predicted_from_others(people.features, people.ages, self.seed, groups)}
        if samples.paths:
            told[SYNTHETIC] = line(samples.features)
        found = {kind: agreement(kind, shown[kind].ages, years, self.seed) for kind, years in told.items()}
        table = [row for kind, years in told.items() for row in shown[kind].lines(kind, years)]
        return Result(_rows(found), self._facts(line, shown), table, scatter(table))

    def _shown(self, measured: MeasuredVolumes, ages: np.ndarray) -> Aged:
        """Those that show a brain; a warning says how many do not."""
        folder, features = measured.folder, features_of(measured)
        shown = np.isfinite(features).all(axis=1)
        if not shown.all():
            first = folder.paths[int(np.argmin(shown))]
            logger.warning(f"tissue age: {(~shown).sum()} volumes show no brain and are left out, {first} the first")
        return Aged([folder.paths[i] for i in np.flatnonzero(shown)], features[shown], ages[shown])

    def _facts(self, line: Ridge, shown: dict[str, Aged]) -> dict[str, Any]:
        return {
            "learnt_from": f"--{self.people.flag} {self.people.folder.folder}",
            **{f"{kind}_volumes": len(one.paths) for kind, one in shown.items()},
            "features": len(line.weights),
            "penalty": line.penalty,
            "weights_sha256": self.sets[PEOPLE][0].segmenter.sha256,
            "seed": self.seed,
        }


def features_of(measured: MeasuredVolumes) -> np.ndarray:
    """`ageing_features` of each volume, (N, d), measured where that is not done."""
    measured.complete(alone=True)
    if not len(measured.folder):
        return np.empty((0, 0))
    both = [(measured.known(index), measured.tissue(index)) for index in range(len(measured.folder))]
    return np.array([ageing_features(volumes or {}, tissue or {}) for volumes, tissue in both])


def participants_of(folder: VolumeFolder, paths: list[Path]) -> list[str]:
    """Whose volume each is, where the folder's table says so: no two folds have volumes of one person."""
    rows = table_rows(folder)
    return [rows.get(path, {}).get("participant_id") or str(path) for path in paths]


def agreement(kind: str, stated: np.ndarray, told: np.ndarray, seed: int) -> dict[str, Estimate]:
    """Mean absolute error in years, and the correlations and slope of told on stated age where they are defined."""
    error = summarise(np.abs(told - stated), np.arange(len(told)), seed)
    if len(told) < FEWEST:
        logger.warning(f"{len(told)} {kind} volumes are too few for a correlation of ages")
        return {"mae": error}
    return {"mae": error, **correlations(f"{kind}_age", stated, told, seed)}


def _rows(found: dict[str, dict[str, Estimate]]) -> list[Row]:
    """Figures of samples with their difference to those of people, and those of people."""
    people = found[PEOPLE]
    return [
        Row(
            metric,
            one,
            AGE,
            kind=kind,
            difference=difference(one, people[metric]) if kind == SYNTHETIC and metric in people else None,
            headline=False,
        )
        for kind, estimates in found.items()
        for metric, one in estimates.items()
    ]
