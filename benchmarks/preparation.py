# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans prepared in an hour, by one process and by several, on the same scans, one after the other.

Without --input_dir the scans are the template, turned and shifted by its header, at 1 mm and with the bundle's noise
floor: as much work as a real scan. Each process count prepares as many scans for each process, so that the time for
starting them weighs alike; the ratio says how the preparation scales.

    python -m benchmarks.preparation --scans 2 --workers 1 2
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from scipy.spatial.transform import Rotation

from scripts.core.paths import CONFIGS, MODELS, ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import write_table
from scripts.preparation.sources import find_sources

TEMPLATE = MODELS / "template" / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"
FILES = ("inference.json", "prepare.yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    with errors_in_one_line(), tempfile.TemporaryDirectory() as folder:
        rows = [_timed(options, workers, Path(folder) / str(workers)) for workers in options.workers]
    report = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "runs": rows, "ratio": _ratio(rows)}
    for row in rows:
        print(f"{row['processes']} processes: {row['scans']} scans in {row['seconds']:.0f} s, {row['an_hour']:.0f}/h")
    print(f"{rows[-1]['processes']} processes do {report['ratio']:.2f} times as much as {rows[0]['processes']}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=4) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=int, default=2, help="for each process")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--input_dir", type=Path, help="a BIDS dataset in place of made-up poses")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    if options.scans < 1 or min(options.workers) < 1:
        parser.error("--scans and --workers must be at least 1")
    return options


def _timed(options: argparse.Namespace, workers: int, folder: Path) -> dict[str, Any]:
    number = options.scans * workers
    table = _listed(options.input_dir, number, folder) if options.input_dir else write_poses(folder, number)
    start = time.perf_counter()
    prepare(table, folder / "dataset", workers)
    seconds = time.perf_counter() - start
    return {"processes": workers, "scans": number, "seconds": seconds, "an_hour": 3600 * number / seconds}


def prepare(table: Path, dataset_dir: Path, workers: int) -> None:
    """Prepare the scans of a table with the bundle's own configuration."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / file) for file in FILES])
    flags = {"bundle_root": str(ROOT), "input_table": str(table), "dataset_dir": str(dataset_dir)}
    config.update({**flags, "num_workers": workers})
    config.get_parsed_content("prepare").run()


def _ratio(rows: Sequence[dict[str, Any]]) -> float:
    return rows[-1]["an_hour"] / rows[0]["an_hour"]


def _listed(input_dir: Path, number: int, folder: Path) -> Path:
    """A table of some scans of a dataset, from its beginning again where it has fewer."""
    found = find_sources(input_dir, None)
    paths = [found[i % len(found)].path.resolve() for i in range(number)]
    return _table(folder, paths)


def write_poses(folder: Path, number: int) -> Path:
    """The template in poses of its own, as a table."""
    image: Any = nib.load(TEMPLATE)
    generator = np.random.default_rng(0)
    data = np.asarray(image.dataobj) + 0.01 * generator.random(image.shape)
    paths = []
    for i in range(number):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_euler("xyz", generator.uniform(-15, 15, 3), degrees=True).as_matrix()
        pose[:3, 3] = generator.uniform(-20, 20, 3)
        paths.append(folder / f"{i}.nii.gz")
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data.astype(np.float32), pose @ image.affine), paths[-1])
    return _table(folder, paths)


def _table(folder: Path, paths: Sequence[Path]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "scans.tsv", [{"participant_id": f"sub-{i}", "path": str(p)} for i, p in enumerate(paths)])
    return folder / "scans.tsv"


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)
    main()
