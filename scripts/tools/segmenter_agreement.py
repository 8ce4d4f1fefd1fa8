# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.segmenter_agreement`: how well the shipped segmenter's volumes agree with held-out phantoms.

Each phantom is measured in its own look and in a random contrast. The table has Pearson's r, the mean difference and
the limits of agreement, mean +- 1.96 standard deviations of the differences (Bland and Altman 1986, Lancet 327:307).
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scripts.core.correlation import pearson
from scripts.core.paths import HERE
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import write_table
from scripts.measuring.segmenter import Segmenter, brain_volumes, load_segmenter, summarised
from scripts.measuring.segmenter_training import LOOKS, LoadSharesd, labelled_participants, random_contrast, targets_of
from scripts.volumes.datasets import split
from scripts.volumes.grid import Grid
from scripts.volumes.placing import place_of, world_grid

QUANTITIES = {
    "ventricles": "ventricular_vol_mm3",
    "brain": "brain_mm3",
    "brain, normalised": "brain_vol_mm3",
    "intracranial": "intracranial_mm3",
}


def measured(row: dict[str, Any], index: int, segmenter: Segmenter) -> dict[str, dict[str, float]]:
    """The volumes of one phantom in mm3, `true` and found in each of the `LOOKS`.

    Args:
        row: of `labelled_participants`.
        index: from which its random contrast follows.
        segmenter: what measures.
    """
    grid = world_grid(place_of(row["image"]), row["image"])
    paths: dict[Hashable, Any] = {name: row[name] for name in ("image", "labels")}
    item = LoadSharesd(grid, segmenter.spacing)(paths)
    shares = item["shares"].float()
    true = summarised(segmenter.volumes(targets_of(shares[None])[0], grid))
    torch.manual_seed(index)
    images = dict(zip(LOOKS, (item["image"], random_contrast(item["image"], shares))))
    step = segmenter.spacing
    working = Grid(item["image"].shape[1:], (-step, step, step), grid.origin)
    return {"true": true, **{look: brain_volumes(image, working, segmenter) for look, image in images.items()}}


def table(found: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, object]]:
    """One row a look and quantity, in mL."""
    rows: list[dict[str, object]] = []
    for look in LOOKS:
        for name, column in QUANTITIES.items():
            true, seen = (np.array([one[kind][column] for one in found]) / 1000.0 for kind in ("true", look))
            difference = seen - true
            low, high = (difference.mean() + sign * 1.96 * difference.std() for sign in (-1, 1))
            rows.append(
                {
                    "look": look,
                    "volume": name,
                    "phantoms": len(found),
                    "r": f"{pearson(true, seen):.4f}",
                    "bias_ml": f"{difference.mean():.2f}",
                    "limit_low_ml": f"{low:.2f}",
                    "limit_high_ml": f"{high:.2f}",
                }
            )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts segmenter_agreement", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dataset_dir", type=Path, default=HERE / "data" / "phantoms")
    parser.add_argument("--segmenter_path", default=None, help="weights (default those that ship)")
    parser.add_argument("--validation_fraction", default=0.15, help="as in the training")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "segmenter_agreement.tsv")
    flags = parser.parse_args()
    rows = split(labelled_participants(flags.dataset_dir), "validation", flags.validation_fraction)
    segmenter = load_segmenter(flags.segmenter_path)
    found = [measured(row, index, segmenter) for index, row in enumerate(tqdm(rows, unit="phantom"))]
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    write_table(flags.output, table(found))
    print(flags.output.read_text())


if __name__ == "__main__":
    with errors_in_one_line():
        main()
