# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether samples are copies of volumes that the model was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

from scripts.compute.kept import Values
from scripts.core.bootstrap import Estimate, bootstrapped, summarise
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.alignment import Alignment
from scripts.evaluation.metrics.copies import CopySearch, Likest, nearest
from scripts.evaluation.metrics.features import FeatureSet
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.pictures import pair_figure

logger = logging.getLogger(__name__)

CLOSE = 0.05
DRAWN = 6


def quantiles(distances: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """For each distance the fraction of the held-out distances that are not larger, 0..1."""
    return np.searchsorted(np.sort(held_out), distances, side="right") / len(held_out)


class Privacy(Measure):
    """Distance of each synthetic volume to its nearest training volume, against that of held-out real volumes.

    A model that copies gives samples nearer to training volumes than new people are. For each network the
    result has rows of the metric `distance`, of the kinds

    - `synthetic`, `held_out`: the distances of both, on average;
    - `ratio`: the median of the first over that of the second; near 1 for a model that does not copy;
    - `close`: the fraction of synthetic volumes nearer than the nearest 5 % of the held-out ones; 0.05 is
      expected of a model that does not copy;

    and, where volumes are aligned, from the highest SSIM of each volume with the training volumes nearest to it in
    feature space, each laid on it, rows of the metric `ssim`, of the kinds

    - `synthetic`, `held_out`: these similarities, on average;
    - `close`: the fraction of synthetic volumes more alike than the most alike 5 % of the held-out ones.

    The table lists all synthetic volumes, the nearest to training first.

    Args:
        synthetic, training, held_out: features of the samples, of the volumes trained on, and of real volumes of
            other people; files of the last that are among the second, byte by byte, are left out.
        seed: of the bootstrap.
        alignment: how two volumes are laid on each other; None to look at features alone.
        candidates: with how many training volumes each is aligned.
        values: where similarities are kept; needed with `alignment`.
    """

    says = (
        "Whether samples are copies: the distance of each to its nearest training volume, against the same distance "
        "of real volumes of other people. A ratio of about 1 and a close share of about 0.05 are expected without "
        "copying."
    )
    pitfall = (
        "A blurred or average-looking sample is near to everything, and a copy that was changed can be far: look at "
        "the closest pairs. A set that passes is not thereby proven private."
    )
    shows = (
        "Left the samples nearest to a training volume by features and those most alike by SSIM, in turn; right, to "
        "each, the training volume that it is most alike, turned and shifted onto it."
    )

    def __init__(
        self,
        synthetic: FeatureSet,
        training: FeatureSet,
        held_out: FeatureSet,
        seed: Any = 0,
        alignment: Alignment | None = None,
        candidates: Any = 3,
        values: Values | None = None,
    ) -> None:
        self.synthetic, self.training, self.held_out = synthetic, training, held_out
        self.inputs = [synthetic.folder, training.folder, held_out.folder, synthetic.networks]
        self.seed = whole_number(seed, "seed")
        self.search = None
        if alignment is not None and values is not None:
            most = whole_number(candidates, "metrics::privacy::candidates", least=1)
            self.search = CopySearch(alignment, values, training.folder, most)

    def check(self) -> None:
        """Raise a `BundleError` if too few volumes were held out, or the volumes are not on one grid."""
        if self.search is not None:
            for folder in (self.synthetic.folder, self.held_out.folder):
                self.search.check(folder)
        _ = self.others

    def update(self) -> None:
        """Compute features and similarities that are missing, as one of several processes if there are any."""
        self.check()
        for features in (self.synthetic, self.training, self.held_out):
            features.extract()
        if self.search is not None:
            for name in self.synthetic.networks.chosen:
                for volumes in self._sets(name):
                    self.search.update(*volumes)

    def _sets(self, name: str) -> list[tuple[VolumeFolder, list[int], np.ndarray, np.ndarray]]:
        training = self.training.matrix(name)
        everything = list(range(len(self.synthetic.folder)))
        return [
            (self.synthetic.folder, everything, self.synthetic.matrix(name), training),
            (self.held_out.folder, self.others, self.held_out.matrix(name)[self.others], training),
        ]

    @cached_property
    def others(self) -> list[int]:
        """Positions of the held-out volumes that are not among those trained on.

        Raises:
            BundleError: if they are fewer than two.
        """
        known = set(self.training.hashes)
        others = [index for index, digest in enumerate(self.held_out.hashes) if digest not in known]
        folder = self.held_out.folder
        if len(others) < len(folder):
            logger.warning(f"{len(folder) - len(others)} volumes of {folder.folder} are training volumes: left out")
        if len(others) < 2:
            raise BundleError(
                f"--{folder.flag}: {folder.folder} has {len(others)} volumes that were not trained on; the distance "
                f"to training volumes needs two or more to compare with; give volumes of other people"
            )
        return others

    def compute(self) -> Result:
        """Measure with every network that was asked for."""
        rows: list[Row] = []
        table: list[dict[str, Any]] = []
        picture = None
        for name in self.synthetic.networks.chosen:
            (folder, everything, features, training), held_out = self._sets(name)
            positions, distances = (column[:, 0] for column in nearest(features, training))
            usual = nearest(held_out[2], training)[1][:, 0]
            self._warn_of_equals(name, int((usual == 0.0).sum()))
            rows += _of_distances(name, distances, usual, self.seed)
            found = self._lines(name, positions, distances, quantiles(distances, usual))
            if self.search is not None:
                likest = self.search.likest(folder, everything, features, training)
                usual = np.array([near.aligned.ssim for near in self.search.likest(*held_out)])
                rows += _of_similarities(name, likest, usual, self.seed)
                for line, near, rank in zip(found, likest, quantiles(-_similarities(likest), -usual)):
                    line.update(self._alike(near), ssim_held_out_quantile=float(rank))
                picture = picture or self._picture(found, likest)
            table += [found[index] for index in np.argsort(distances, kind="stable")]
        return Result(rows, self._facts(len(self.others)), table, picture)

    def _warn_of_equals(self, network: str, equals: int) -> None:
        """A scan that was stored again, as without compression, has the features of a training file, not its hash."""
        if equals:
            logger.warning(
                f"{equals} volumes of {self.held_out.folder.folder} have the very features ({network}) of a training "
                "volume: probably they are training volumes in other files, which hide copies; remove them from "
                f"--{self.held_out.folder.flag}"
            )

    def _facts(self, held_out: int) -> dict[str, Any]:
        return {
            "networks": {name: network.facts() for name, network in self.synthetic.networks.chosen.items()},
            "synthetic_volumes": len(self.synthetic.folder),
            "training_volumes": len(self.training.folder),
            "held_out_volumes": held_out,
            "synthetic_dir": self.synthetic.folder.summary(),
            "training_dir": self.training.folder.summary(),
            "real_dir": self.held_out.folder.summary(),
            "alignment": None if self.search is None else self.search.facts(),
            "seed": self.seed,
        }

    def _lines(
        self, name: str, positions: np.ndarray, distances: np.ndarray, ranks: np.ndarray
    ) -> list[dict[str, Any]]:
        return [
            {
                "network": name,
                "volume": self.synthetic.folder.name(index),
                "nearest": self.training.folder.name(int(positions[index])),
                "distance": float(distances[index]),
                "held_out_quantile": float(ranks[index]),
            }
            for index in range(len(distances))
        ]

    def _alike(self, near: Likest) -> dict[str, Any]:
        assert self.search is not None
        motion = near.aligned.motion
        return {
            "likest": self.training.folder.name(near.position),
            "ssim": near.aligned.ssim,
            "mirrored": int(motion.mirrored),
            "rotation_degrees": round(motion.angle, 1),
            "shift_mm": " ".join(str(round(step, 1) + 0.0) for step in motion.shift),
        }

    def _picture(self, rows: list[dict[str, Any]], likest: list[Likest]) -> Figure:
        assert self.search is not None
        by_distance = np.argsort([row["distance"] for row in rows], kind="stable")
        by_similarity = np.argsort(-_similarities(likest), kind="stable")
        order = [int(index) for both in zip(by_distance, by_similarity) for index in both]
        drawn = list(dict.fromkeys(order))[:DRAWN]
        planes = [self.search.planes(self.synthetic.folder, index, likest[index]) for index in drawn]
        labels = [(f"{rows[i]['volume']}\ndistance {rows[i]['distance']:.3g}", _label(rows[i])) for i in drawn]
        return pair_figure(labels, *zip(*planes))


def _label(row: Mapping[str, Any]) -> str:
    mirrored = "mirrored, " if row["mirrored"] else ""
    moved = f"{mirrored}turned {row['rotation_degrees']} degrees, shifted {row['shift_mm']} mm"
    return f"{row['likest']}\n{moved}: SSIM {row['ssim']:.3f}"


def _of_distances(network: str, distances: np.ndarray, usual: np.ndarray, seed: int) -> list[Row]:
    interval = bootstrapped([distances, usual], _ratio_of_medians, seed)
    ratio = Estimate(float(_ratio_of_medians(distances, usual)), len(distances), interval=interval)
    close = _share(distances < np.quantile(usual, CLOSE))
    found = {**_means(distances, usual, seed), "ratio": ratio, "close": close}
    return [Row("distance", one, network=network, kind=kind, headline=False) for kind, one in found.items()]


def _of_similarities(network: str, likest: list[Likest], usual: np.ndarray, seed: int) -> list[Row]:
    similar = _similarities(likest)
    found = {**_means(similar, usual, seed), "close": _share(similar > np.quantile(usual, 1 - CLOSE))}
    return [Row("ssim", one, network=network, kind=kind, headline=False) for kind, one in found.items()]


def _means(synthetic: np.ndarray, held_out: np.ndarray, seed: int) -> dict[str, Estimate]:
    sets = {"synthetic": synthetic, "held_out": held_out}
    return {kind: summarise(values, np.arange(len(values)), seed) for kind, values in sets.items()}


def _similarities(likest: list[Likest]) -> np.ndarray:
    return np.array([near.aligned.ssim for near in likest])


def _share(close: np.ndarray) -> Estimate:
    low, high = binomtest(int(close.sum()), len(close)).proportion_ci(method="wilson")
    return Estimate(float(close.mean()), len(close), interval=(low, high))


def _ratio_of_medians(distances: np.ndarray, usual: np.ndarray, axis: int = -1) -> np.ndarray:
    middle = np.median(usual, axis)
    return np.median(distances, axis) / np.where(middle > 0.0, middle, np.nan)
