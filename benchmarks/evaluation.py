# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Times the evaluation of two folders, and shows that a run that was killed goes on where it stopped.

Makes volumes out of prepared scans (random affine maps, mirror images, contrast, noise; the synthetic ones are
blurred as well), evaluates them with the command line, kills the process with SIGKILL when the pairs and half of the
features are there, runs the same command again, and counts what was not computed a second time. The volumes say
nothing of any model.

    python -m benchmarks.evaluation --dataset dataset --volumes 60 --num_pairs 200
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from benchmarks.command import bundle_command, configuration, report, run
from scripts.volumes.folders import find_volumes
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import read_volume, write_volume

SIZES = {"coarse": ["inference.json", "coarse.yaml"], "tiny": ["inference.json", "tiny.yaml"]}
SETS = {"synthetic": 1, "real": 2, "training": 3}
"""Name of each folder -> its part of the seeds."""
BLUR_MM = 1.5


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    report(partial(_measure_in_a_folder, options), _print_report, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="coarse", help="of the volumes")
    parser.add_argument("--dataset", default="dataset", help="folder of prepared scans to make the volumes of")
    parser.add_argument("--volumes", type=int, default=60, help="in each of the folders synthetic and real")
    parser.add_argument("--training", type=int, default=10, help="in the folder training, for the privacy distances")
    parser.add_argument("--num_pairs", type=int, default=200)
    parser.add_argument("--features", default="highres3dnet")
    parser.add_argument("--shrink", type=int, default=2, help="of highres3dnet")
    parser.add_argument("--kill_at", type=float, default=0.5, help="fraction of the features, which follow the pairs")
    parser.add_argument("--folder", help="where to make the temporary folder")
    parser.add_argument("--keep", help="folder to work in instead, which stays")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    if min(options.volumes, options.training) < 2 or options.num_pairs < 2 or not 0.0 < options.kill_at < 1.0:
        parser.error("--volumes, --training and --num_pairs must be at least 2, and --kill_at between 0 and 1")
    return options


def _measure_in_a_folder(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return _measure(options, Path(options.keep or folder))


def _measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    grid = configuration(SIZES[options.size]).get_parsed_content("grid")
    heads = [_on(grid, read_volume(path)) for path in find_volumes(Path(options.dataset), "dataset")]
    for name, part in SETS.items():
        count = options.training if name == "training" else options.volumes
        make_volumes(work / name, heads, count, grid, part, BLUR_MM if name == "synthetic" else 0.0)
    command = _command(options, work)
    enough = options.kill_at * (2 * options.volumes + options.training)
    killed = run(command, work / "output", kill_when=lambda: len(_stamps(work)) >= enough)
    before = _stamps(work)
    lines = _lines(work)
    finished = run(command, work / "output")
    again = run(command, work / "output")
    after = _lines(work)
    return {
        "shape": list(grid.shape),
        "volumes": options.volumes,
        "num_pairs": options.num_pairs,
        "network": options.features,
        "threads": torch.get_num_threads(),
        "killed": {**killed, "features": len(before), "values": len(lines)},
        "finished": finished,
        "again": again,
        "features_not_recomputed": sum(_stamps(work).get(path) == stamp for path, stamp in before.items()),
        "values_not_recomputed": sum(after[index] == line for index, line in enumerate(lines)),
        "features": len(_stamps(work)),
        "values": len(after),
        "values_twice": len(after) - len({line.rsplit("\t", 1)[0] for line in after}),
    }


def _on(grid: Grid, head: np.ndarray) -> np.ndarray:
    factors = [wanted / there for wanted, there in zip(grid.shape, head.shape)]
    blurred = ndimage.gaussian_filter(head, [max(0.0, 0.4 / factor - 0.4) for factor in factors])
    return np.clip(ndimage.zoom(blurred, factors, order=1), 0.0, 1.0)


def make_volumes(
    folder: Path, heads: Sequence[np.ndarray], count: int, grid: Grid, seed: int, blur_mm: float = 0.0
) -> None:
    """Write changed heads: turned, scaled, moved, perhaps mirrored, of another contrast, blurred, with noise.

    Args:
        folder: where; made if need be. Volumes that are there are left.
        heads: (X, Y, Z) intensities 0..1 on the grid, taken in turn.
        count: how many.
        grid: of the volumes.
        seed: volumes of another seed are others.
        blur_mm: standard deviation of the blur.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spacing = np.abs(grid.spacing)
    for index in range(count):
        path = folder / f"{folder.name}-{index:03d}.nii.gz"
        if not path.is_file():
            changed = _changed(heads[index % len(heads)], np.random.default_rng([seed, index]))
            write_volume(path, np.clip(ndimage.gaussian_filter(changed, blur_mm / spacing), 0.0, 1.0), grid)


def _changed(head: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    centre = (np.array(head.shape) - 1) / 2
    matrix = np.eye(3) + generator.normal(scale=0.04, size=(3, 3))
    offset = centre - matrix @ centre + generator.normal(scale=0.5, size=3)
    changed = np.clip(ndimage.affine_transform(head, matrix, offset, order=1), 0.0, 1.0)
    changed = changed[::-1] if generator.random() < 0.5 else changed
    noise = generator.normal(scale=0.01, size=head.shape) * (changed > 0.02)
    return changed ** generator.uniform(0.9, 1.1) + noise


def _command(options: argparse.Namespace, work: Path) -> list[str]:
    flags: dict[str, Any] = {
        "synthetic_dir": work / "synthetic",
        "real_dir": work / "real",
        "training_dir": work / "training",
        "features": options.features,
        "feature_networks::highres3dnet::shrink": options.shrink,
        "num_pairs": options.num_pairs,
        "output_dir": work / "output",
        "device": "cpu",
    }
    return bundle_command(["inference.json", "evaluate.yaml", SIZES[options.size][1]], flags)


def _stamps(work: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (work / "output" / "features").glob("*/*.npy")}


def _lines(work: Path) -> list[str]:
    files = sorted((work / "output" / "values").glob("rank-*.tsv"))
    return [line for path in files for line in path.read_text().split("\n")[:-1]]


def _print_report(report: dict[str, Any]) -> None:
    print(f"{'run':10}{'seconds':>10}{'CPU seconds':>13}{'peak GiB':>10}")
    for name in ("killed", "finished", "again"):
        print(f"{name:10}{report[name]['seconds']:>10}{report[name]['cpu_seconds']:>13}{report[name]['peak_gib']:>10}")
    for what in ("features", "values"):
        kept, there = report[f"{what}_not_recomputed"], report["killed"][what]
        print(f"{what}: {there} when killed, {kept} of them not computed again, {report[what]} in the end")
    print(f"values computed twice: {report['values_twice']}")


if __name__ == "__main__":
    main()
