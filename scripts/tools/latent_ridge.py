# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.latent_ridge --latents_dir latents`: what cached latents know of each condition.

The posterior means are averaged over a coarse grid, and a ridge tells each condition from them, of scans left out in
turn. The table has Pearson's r and the slope of told on true values with 95 % intervals, and as floor the r that 95 %
of as many permutations of the condition stay below: what the encoder does not keep, no diffusion model can learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d

from scripts.autoencoder.latents import Posteriors
from scripts.core.cells import is_missing, read_number
from scripts.core.correlation import correlations, pearson
from scripts.core.errors import BundleError
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table
from scripts.measuring.ridge import predicted_from_others
from scripts.volumes.datasets import TABLE

COLUMNS = ("sex", "age_years", "ventricular_vol_mm3", "brain_vol_mm3")
CODES = {"female": 0.0, "male": 1.0}
POOLED = (4, 5, 4)
LEAST = 20


def pooled(latents_dir: str | Path, rows: Sequence[int]) -> np.ndarray:
    """Posterior means (N, d) of rows of a folder of latents, averaged over `POOLED` cells."""
    posteriors = Posteriors(latents_dir)
    means = (posteriors[row][0] for row in rows)
    return torch.stack([adaptive_avg_pool3d(mean, POOLED).flatten() for mean in means]).double().numpy()


def values_of(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    """A column's numbers, words for sex as 0 and 1; NaN where it says nothing."""
    return np.array([_value(row.get(column, "")) for row in rows])


def _value(cell: str) -> float:
    if cell in CODES:
        return CODES[cell]
    number = None if is_missing(cell) else read_number(cell).value
    return float("nan") if number is None else float(number)


def knowledge(
    features: np.ndarray, values: np.ndarray, people: Sequence[str], permutations: int, seed: int, name: str = ""
) -> dict[str, Any]:
    """How well a condition is told from latents of others, and the floor.

    Args:
        features: (N, d).
        values: (N,).
        people: whose latents they are: nobody is told from themselves.
        permutations: for the floor.
        seed: of folds, bootstrap and permutations.
        name: of the condition, for messages.
    """
    found = correlations(name, values, predicted_from_others(features, values, seed, people), seed)
    generator, floor = np.random.default_rng(seed), []
    for _ in range(permutations):
        moved = generator.permutation(values)
        floor.append(pearson(moved, predicted_from_others(features, moved, seed, people)))
    r, slope = found["pearson"], found["slope"]
    low, high = r.interval or (float("nan"),) * 2
    return {
        "condition": name,
        "scans": len(values),
        "r": round(r.value, 3),
        "r_low": round(low, 3),
        "r_high": round(high, 3),
        "slope": round(slope.value, 3),
        "floor": round(float(np.quantile(floor, 0.95)), 3),
    }


def table(latents_dir: str | Path, permutations: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """One row a condition that the latents' table has with enough, and different, values.

    Raises:
        BundleError: if there is none, or the folder cannot be used.
    """
    path = Path(str(latents_dir)) / TABLE
    if not path.is_file():
        raise BundleError(f"there is no {path}: give a folder that configs/encode_latents.yaml has made")
    rows = [row for row in read_table(path, ["row"]) if row.get("version", "0") in ("", "0")]
    known = {column: values_of(rows, column) for column in COLUMNS}
    usable = {c: v for c, v in known.items() if np.isfinite(v).sum() >= LEAST and np.ptp(v[np.isfinite(v)]) > 0}
    if not usable:
        raise BundleError(f"{path} has no {' or '.join(COLUMNS)} of {LEAST} scans or more, with different values")
    features = pooled(latents_dir, [int(row["row"]) for row in rows])
    people = [row.get("participant_id") or row["row"] for row in rows]
    found = []
    for column, values in usable.items():
        there = np.flatnonzero(np.isfinite(values))
        whose = [people[i] for i in there]
        found.append(knowledge(features[there], values[there], whose, permutations, seed, column))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table with command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts latent_ridge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--latents_dir", default="latents", help="of configs/encode_latents.yaml (default latents/)")
    parser.add_argument("--permutations", type=int, default=20, help="for the floor (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, bootstrap and permutations (default 0)")
    given = parser.parse_args(arguments)
    if given.permutations < 1 or given.seed < 0:
        parser.error("--permutations must be 1 or more, and --seed 0 or more")
    with errors_in_one_line():
        rows = table(given.latents_dir, given.permutations, given.seed)
        print("\t".join(rows[0]))
        for row in rows:
            print("\t".join(map(str, row.values())))


if __name__ == "__main__":
    main()
