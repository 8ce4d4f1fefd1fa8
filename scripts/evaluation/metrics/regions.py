# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the regions of the samples' brains are as large, and vary as much, as those of real ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scripts.compute.counting import counted
from scripts.compute.kept import Values
from scripts.core.bootstrap import Estimate, bootstrapped
from scripts.core.inputs import Input
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.effects import SMALL, cohens_d, corrected_p, wasserstein
from scripts.evaluation.metrics.feature_distance import halves_and_floor, random_halves
from scripts.evaluation.metrics.features import FeatureSet
from scripts.evaluation.names import written
from scripts.evaluation.segmentations import OWN
from scripts.measuring.measured import MeasuredVolumes
from scripts.measuring.segmenter import BRAIN, INTRACRANIAL, Segmenter

logger = logging.getLogger(__name__)

REGIONS = INTRACRANIAL
"""What the bundle's segmenter measures inside the skull."""
LEVEL = 0.05
LEAST_BRAIN_MM3 = 1.0
MOST = 1000
"""Volumes a side of an assignment, whose time grows with their cube."""


class Regions(Measure):
    """Effect sizes of region volumes between synthetic and real heads, and one distance over all regions.

    As the studies that compared generators of brain MRI by regional volumes did (MRIAnatEval, arXiv 2409.08463;
    WASABI, arXiv 2504.21771).

    Args:
        synthetic, real: the volumes.
        segmenter: makes the bundle's own segmenter, which measures both.
        values: where its volumes are kept.
        segment_with: what was chosen to segment; it measures where that is `own`.
        resamplings: random choices for `halves` and `floor`.
        permutations: of the test of each region.
        seed: of all that is drawn.
    """

    says = (
        "Whether brain regions are as large in samples as in real heads: Cohen's d of each region, the share of "
        f"regions with |d| below {SMALL:g}, and the Wasserstein distance over all regions at once, in standard "
        "deviations of the real volumes. Read the share and the distance of halves against their floors."
    )
    pitfall = (
        "Sets must be alike in age and sex, or their difference is measured too. A segmentation that pulls every head "
        "towards the ones that it learnt from hides differences."
    )
    shows = (
        f"Cohen's d of each region with its 95 % interval; between the lines |d| is below {SMALL:g}. Filled: different "
        f"with a corrected p below {LEVEL:g}."
    )

    def __init__(
        self,
        synthetic: FeatureSet,
        real: FeatureSet,
        segmenter: Callable[[], Segmenter],
        values: Values,
        segment_with: Any = OWN,
        resamplings: Any = 20,
        permutations: Any = 2000,
        seed: Any = 0,
    ) -> None:
        self.inputs = [synthetic.folder, real.folder, OwnSegmenterChosen(segment_with)]
        self.sets = [MeasuredVolumes(features.folder, segmenter, values) for features in (synthetic, real)]
        self.resamplings = whole_number(resamplings, "resamplings", least=2)
        self.permutations = whole_number(permutations, "permutations", least=100)
        self.seed = whole_number(seed, "seed")

    def update(self) -> None:
        """Segment what is not segmented; under torchrun, each process its share."""
        for one in self.sets:
            one.complete()

    def compute(self) -> Result:
        """Compare."""
        synthetic, real = (_matrix(one) for one in self.sets)
        d = cohens_d(synthetic, real)
        p = corrected_p(synthetic, real, self.permutations, self.seed)
        intervals = [self._interval(*region) for region in zip(synthetic.T, real.T)]
        count = min(len(synthetic), len(real))
        table = [
            {
                "region": name,
                "synthetic_mean_mm3": synthetic[:, i].mean(),
                "real_mean_mm3": real[:, i].mean(),
                "cohens_d": d[i],
                "d_low": interval[0] if interval else None,
                "d_high": interval[1] if interval else None,
                "p_corrected": p[i],
            }
            for i, (name, interval) in enumerate(zip(REGIONS, intervals))
        ]
        rows = [
            Row("cohens_d", Estimate(float(d[i]), count, interval=intervals[i]), name, headline=False)
            for i, name in enumerate(REGIONS)
        ]
        facts = {
            "segmentations": OWN,
            "weights_sha256": self.sets[0].segmenter.sha256,
            "synthetic_volumes": len(synthetic),
            "real_volumes": len(real),
            "permutations": self.permutations,
            "seed": self.seed,
        }
        return Result([*rows, *self._of_halves(synthetic, real)], facts, table, forest(REGIONS, d, intervals, p))

    def _interval(self, synthetic: np.ndarray, real: np.ndarray) -> tuple[float, float] | None:
        return bootstrapped([synthetic, real], lambda a, b, axis=-1: cohens_d(a, b, axis), self.seed)

    def _of_halves(self, synthetic: np.ndarray, real: np.ndarray) -> list[Row]:
        half = min(len(synthetic), len(real), 2 * MOST) // 2
        if half < 2:
            logger.warning("regions: a floor needs four volumes of each set")
            return []
        spread = real.std(axis=0, ddof=1)
        synthetic, real = (found / np.where(spread > 0, spread, 1.0) for found in (synthetic, real))
        generator, found = np.random.default_rng(self.seed), []
        for _ in counted(range(self.resamplings), "resampling regions"):
            chosen, first, second = random_halves(synthetic, real, half, generator)
            found.append([_differences(chosen, first), _differences(first, second)])
        by_metric = zip(("similar_regions", "region_distance"), np.moveaxis(np.array(found), 2, 0))
        return [row for metric, values in by_metric for row in halves_and_floor(partial(Row, metric), values)]


class OwnSegmenterChosen(Input):
    """Whether the bundle's own segmenter was chosen.

    Args:
        segment_with: what was chosen.
    """

    flag = "segment_with"

    def __init__(self, segment_with: Any) -> None:
        self._chosen = str(segment_with)

    @property
    def requested(self) -> bool:
        """Whether it was."""
        return self._chosen == OWN


def _matrix(measured: MeasuredVolumes) -> np.ndarray:
    measured.complete(alone=True)
    known = [measured.known(index) or {} for index in range(len(measured.folder))]
    volumes = np.array([[one[region] for region in REGIONS] for one in known])
    brains = volumes[:, [REGIONS.index(name) for name in BRAIN]].sum(axis=1) >= LEAST_BRAIN_MM3
    if not brains.all():
        first = measured.folder.paths[int(np.argmin(brains))]
        logger.warning(f"regions: {(~brains).sum()} volumes show no brain and are left out, {first} the first")
    return volumes[brains]


def _differences(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    return float((np.abs(cohens_d(first, second)) < SMALL).mean()), wasserstein(first, second)


def forest(
    names: Sequence[str], d: np.ndarray, intervals: Sequence[tuple[float, float] | None], p: np.ndarray
) -> Figure:
    """Effect sizes with their intervals, a line a region, the largest on top."""
    figure = Figure(figsize=(6.0, 1.2 + 0.3 * len(names)), layout="constrained")
    axes, order = figure.subplots(), np.argsort(np.nan_to_num(d))
    axes.axvspan(-SMALL, SMALL, color="0.93")
    axes.axvline(0.0, color="0.6", linewidth=1)
    for place, region in enumerate(order):
        low, high = intervals[region] or (d[region], d[region])
        axes.plot([low, high], [place, place], color="tab:blue", linewidth=1.5)
        face = "tab:blue" if p[region] < LEVEL else "white"
        axes.plot(d[region], place, "o", color="tab:blue", markerfacecolor=face)
    axes.set_yticks(range(len(names)), [written(names[region]) for region in order])
    axes.set_xlabel("Cohen's d, samples less real heads")
    return figure
