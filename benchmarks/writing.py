# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What writing a volume costs: ways to compress its NIfTI file, and volumes a second with several threads.

Compressors are Python's zlib and, where they are installed, isal and zlib-ng; times are the processor's, the least of
`--repeats`. The threads write whole samples as the bundle does, quantised, compressed and flushed, with their pictures.

    python -m benchmarks.writing --volumes dataset/sub-CSI1/anat/*_T1w.nii.gz output/*.nii.gz --json writing.json
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.measuring import machine
from scripts.compute.writer import BackgroundWriter
from scripts.core.files import write_json
from scripts.core.programs import errors_in_one_line
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import mid_planes, read_volume, write_picture, write_volume

LEVELS = {"zlib": (1, 6), "isal.isal_zlib": (0, 1, 2, 3), "zlib_ng.zlib_ng": (1, 2, 3, 6)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", nargs="+", required=True, help="NIfTI files, each measured by itself")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--written", type=int, default=8, help="volumes that each number of threads writes")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    with errors_in_one_line():
        rows = [measured(Path(path), options) for path in options.volumes]
    for row in rows:
        _print(row)
    if options.json:
        write_json(options.json, {"machine": machine(torch.device("cpu")), "volumes": rows})


def measured(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The compressors and the threads on one volume."""
    volume = read_volume(path)
    with tempfile.TemporaryDirectory() as folder:
        write_volume(Path(folder) / "raw.nii", volume, _grid(path, volume))
        raw = (Path(folder) / "raw.nii").read_bytes()
        whole = _least(lambda: write_volume(Path(folder) / "x.nii.gz", volume, _grid(path, volume)), options.repeats)
        speeds = {n: _volumes_per_second(Path(folder), path, volume, n, options.written) for n in options.threads}
    return {
        "file": path.name,
        "bytes": len(raw),
        "compressors": [
            row for name, levels in LEVELS.items() for row in _compressed(name, levels, raw, options.repeats)
        ],
        "write_volume_seconds": whole,
        "volumes_per_second": speeds,
    }


def _grid(path: Path, volume: np.ndarray) -> Grid:
    affine: Any = nib.load(path)
    return Grid(volume.shape, list(np.diag(affine.affine)[:3]), list(affine.affine[:3, 3]))


def _compressed(name: str, levels: Sequence[int], raw: bytes, repeats: int) -> list[dict[str, Any]]:
    try:
        module = zlib if name == "zlib" else importlib.import_module(name)
    except ImportError:
        return []
    rows = []
    for level in levels:
        size = len(module.compress(raw, level))
        seconds = _least(lambda level=level: module.compress(raw, level), repeats)  # type: ignore[misc]
        rows.append(
            {"compressor": f"{name.split('.')[0]} {level}", "seconds": seconds, "ratio": round(len(raw) / size, 3)}
        )
    return rows


def _least(call: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return round(min(seconds), 4)


def _volumes_per_second(folder: Path, path: Path, volume: np.ndarray, threads: int, count: int) -> float:
    writer, grid = BackgroundWriter(threads), _grid(path, volume)

    def write(number: int) -> None:
        write_volume(folder / f"{number}.nii.gz", volume, grid)
        write_picture(folder / f"{number}.png", mid_planes(volume))

    start = time.perf_counter()
    for number in range(count):
        writer.submit(write, number)
    writer.finish()
    return round(count / (time.perf_counter() - start), 2)


def _print(row: dict[str, Any]) -> None:
    print(f"{row['file']}: {row['bytes'] / 1e6:.2f} MB, write_volume {1000 * row['write_volume_seconds']:.0f} ms")
    for found in row["compressors"]:
        print(f"  {found['compressor']:12}{1000 * found['seconds']:8.0f} ms{found['ratio']:8.2f}")
    print(
        "  " + ", ".join(f"{threads} threads {speed} volumes/s" for threads, speed in row["volumes_per_second"].items())
    )


if __name__ == "__main__":
    main()
