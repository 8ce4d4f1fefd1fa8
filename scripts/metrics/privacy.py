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
"""Whether samples are copies of volumes that the model was trained on."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from scripts.bootstrap import Estimate, Summary, bootstrapped, summarise
from scripts.errors import BundleError
from scripts.measures import Result
from scripts.metrics.features import FeatureSet
from scripts.options import whole_number

logger = logging.getLogger(__name__)

CLOSE = 0.05
BLOCK = 1024


def nearest(features: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest training volume of each volume in Euclidean distance, block by block.

    Args:
        features: (N, d).
        training: (M, d).

    Returns:
        (N,) positions in `training` and (N,) distances.
    """
    blocks = [cdist(features[i : i + BLOCK], training) for i in range(0, len(features), BLOCK)]
    return np.concatenate([b.argmin(axis=1) for b in blocks]), np.concatenate([b.min(axis=1) for b in blocks])


def quantiles(distances: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """For each distance the fraction of the held-out distances that are not larger, 0..1."""
    return np.searchsorted(np.sort(held_out), distances, side="right") / len(held_out)


class Privacy:
    """Distance of each synthetic volume to its nearest training volume, against that of held-out real volumes.

    A model that copies gives samples nearer to training volumes than new people are. For a network `n` the result
    has

    - `n_synthetic`, `n_held_out`: the distances of both, on average;
    - `n_ratio`: the median of the first over that of the second; near 1 for a model that does not copy;
    - `n_close`: the fraction of synthetic volumes nearer than the nearest 5 % of the held-out ones; 0.05 is
      expected of a model that does not copy.

    The table lists all synthetic volumes, the nearest to training first.

    Args:
        synthetic, training, held_out: features of the samples, of the volumes trained on, and of real volumes of
            other people; files of the last that are among the second, byte by byte, are left out.
        seed: of the bootstrap.
    """

    def __init__(self, synthetic: FeatureSet, training: FeatureSet, held_out: FeatureSet, seed: Any = 0) -> None:
        self.synthetic, self.training, self.held_out = synthetic, training, held_out
        self.inputs = [synthetic.folder, training.folder, held_out.folder, synthetic.networks]
        self.seed = whole_number(seed, "seed")

    def prepare(self) -> None:
        """Compute the features that are missing, as one of several processes if there are any."""
        self._others()
        for features in (self.synthetic, self.training, self.held_out):
            features.extract()

    def _others(self) -> list[int]:
        known = set(self.training.hashes)
        others = [index for index, digest in enumerate(self.held_out.hashes) if digest not in known]
        folder = self.held_out.folder
        if len(others) < len(folder):
            logger.warning(f"{len(folder) - len(others)} volumes of {folder.folder} are training volumes: left out")
        if len(others) < 2:
            raise BundleError(
                f"--{folder.flag}: {folder.folder} has {len(others)} volumes that were not trained on; the distance "
                f"to training volumes needs two or more to compare with"
            )
        return others

    def compute(self) -> Result:
        """Measure with every network that was asked for."""
        others = self._others()
        summaries: dict[str, Summary | Estimate] = {}
        rows: list[dict[str, Any]] = []
        for name in self.synthetic.networks.chosen:
            training = self.training.matrix(name)
            positions, distances = nearest(self.synthetic.matrix(name), training)
            usual = nearest(self.held_out.matrix(name)[others], training)[1]
            summaries.update(self._summaries(name, distances, usual))
            rows += self._rows(name, positions, distances, quantiles(distances, usual))
        facts = {
            "networks": {name: network.facts() for name, network in self.synthetic.networks.chosen.items()},
            "synthetic_volumes": len(self.synthetic.folder),
            "training_volumes": len(self.training.folder),
            "held_out_volumes": len(others),
            "seed": self.seed,
        }
        return Result(summaries, facts, rows)

    def _summaries(self, name: str, distances: np.ndarray, usual: np.ndarray) -> dict[str, Summary | Estimate]:
        limit = np.quantile(usual, CLOSE)
        close = distances < limit
        return {
            f"{name}_synthetic": summarise(distances, np.arange(len(distances)), self.seed),
            f"{name}_held_out": summarise(usual, np.arange(len(usual)), self.seed),
            f"{name}_ratio": Estimate(_ratio(np.median(distances), np.median(usual)), len(distances)),
            f"{name}_close": Estimate(
                float(close.mean()), len(close), bootstrapped(close, lambda drawn: float(drawn.mean()), self.seed)
            ),
        }

    def _rows(self, name: str, positions: np.ndarray, distances: np.ndarray, ranks: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "network": name,
                "volume": self.synthetic.folder.name(int(index)),
                "nearest": self.training.folder.name(int(positions[index])),
                "distance": float(distances[index]),
                "held_out_quantile": float(ranks[index]),
            }
            for index in np.argsort(distances, kind="stable")
        ]


def _ratio(distance: float, usual: float) -> float:
    return float(distance / usual) if usual > 0.0 else float("nan")
