# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Times the loading of latents for training against a training step, and against a file for each latent.

Writes latents of random numbers into a temporary folder, in the format of scripts/autoencoder/latents.py and as one
safetensors file each, and draws all of them in batches, in random order, as training does. The two ways alternate in
one process; the ratio is the median over the rounds. With the time of a training step, given or measured, it says how
many times faster than the training the loading is. Sizes come from configs/inference.json.

    python -m benchmarks.loading --latents 2000 --workers 0 1 2 --step_seconds 0.022
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from benchmarks.command import configuration, report
from benchmarks.measuring import SIZES, fill_with_random_values
from scripts.autoencoder.encoding import moments
from scripts.autoencoder.latents import ENCODED, ENCODING, POSTERIORS, SamplePosteriord, array_sha256, latents
from scripts.compute.devices import compute_device
from scripts.compute.precision import autocast
from scripts.conditions.conditions import Conditions
from scripts.core.files import write_json
from scripts.core.tables import write_table
from scripts.volumes.datasets import TABLE

ARRAY, FILES = "array", "files"
WAYS = (ARRAY, FILES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    report(partial(_measure_in_a_folder, options), _print_report, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="of the latents")
    parser.add_argument("--latents", type=int, default=2000, help="how many (134 kB and 269 kB each at full size)")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        help="array: scripts/autoencoder/latents.py; files: a safetensors file for each latent",
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes that load")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--cold", action="store_true", help="drop the latents from the page cache before each round")
    parser.add_argument("--step_seconds", type=float, help="time of a training step of one batch")
    parser.add_argument("--network", choices=sorted(SIZES), help="measure the step of this network instead")
    parser.add_argument("--device", default="cpu", help="of the measured step: cpu, cuda or cuda:N")
    parser.add_argument("--folder", help="where to make the temporary folder")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    if min(options.latents, options.batch_size, options.repeats) < 1 or min(options.workers) < 0:
        parser.error("--latents, --batch_size and --repeats must be at least 1, and --workers at least 0")
    return options


def _measure_in_a_folder(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return _measure(options, Path(folder))


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = configuration(SIZES[options.size])
    conditions, shape = config.get_parsed_content("conditions"), config.get_parsed_content("latent_shape")
    write_array(folder, options.latents, shape, conditions)
    start = time.perf_counter()
    rows = latents(str(folder), conditions, latent_shape=shape)
    opening = {ARRAY: time.perf_counter() - start}
    if FILES in options.ways:
        write_files(folder, options.latents)
        opening[FILES] = scale_of_files_seconds(folder, options.latents)
    loading = [_row(folder, rows, workers, options) for workers in options.workers]
    report = {"latents": len(rows), "latent_shape": shape, "batch_size": options.batch_size, "cold": options.cold}
    return {**report, "cores": os.cpu_count(), "opening_seconds": opening, "loading": loading, **_step(options)}


def _row(folder: Path, rows: Sequence[dict[str, Any]], workers: int, options: argparse.Namespace) -> dict[str, Any]:
    draws: dict[str, Callable] = {ARRAY: SamplePosteriord("image", str(folder), 1.0), FILES: SampleFile(folder)}
    rates: dict[str, list[float]] = {way: [] for way in options.ways}
    for _ in range(options.repeats):
        for way, series in rates.items():
            if options.cold:
                forget(folder)
            series.append(round(samples_per_second(rows, draws[way], workers, options.batch_size), 1))
            print(f"{workers} workers, {way}: {series[-1]} samples a second", file=sys.stderr)
    ratio = median(a / b for a, b in zip(rates[ARRAY], rates[FILES])) if len(rates) == len(WAYS) else None
    return {"workers": workers, "samples_per_second": rates, "ratio": ratio}


def samples_per_second(rows: Sequence[dict[str, Any]], draw: Callable, workers: int, batch_size: int) -> float:
    """Draw all rows once, and divide their number by the time from the first batch's request to the last batch.

    The start of the processes is in it, as in each epoch of a training.
    """
    loader: Any = DataLoader(Dataset(rows, draw), batch_size=batch_size, shuffle=True, num_workers=workers)
    start = time.perf_counter()
    seen = sum(len(batch["image"]) for batch in loader)
    return seen / (time.perf_counter() - start)


class SampleFile:
    """Draws a latent from a safetensors file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The row with a sample (C, x, y, z), float32, under `image`."""
        tensors = load_file(_file(self.folder, data["image"]))
        return {**data, "image": tensors["mean"] + tensors["std"] * torch.randn_like(tensors["mean"])}


def _file(folder: Path, row: int) -> Path:
    return folder / "files" / f"{row % 100:02d}" / f"{row}.safetensors"


def write_array(folder: Path, rows: int, shape: Sequence[int], conditions: Conditions) -> None:
    """A folder of latents as encoding leaves it, of random numbers."""
    generator, whole = np.random.default_rng(0), (rows, 2, *shape)
    array = np.lib.format.open_memmap(folder / POSTERIORS, mode="w+", dtype=np.float16, shape=whole)
    for row in range(rows):
        array[row] = generator.random(whole[1:], np.float32)
    array.flush()
    encoded = generator.integers(0, 256, (rows, 2, 32), np.uint8)
    np.save(folder / ENCODED, encoded)
    names = [{"participant_id": f"sub-{row:06d}", "version": 0, "row": row} for row in range(rows)]
    write_table(folder / TABLE, [{**name, **{c.name: 0.5 for c in conditions}} for name in names])
    about = {"rows": rows, "encoded_sha256": array_sha256(encoded), "moments": moments(array[:10])}
    write_json(folder / ENCODING, about)


def write_files(folder: Path, rows: int) -> None:
    """The same latents as safetensors files of float32."""
    array = np.load(folder / POSTERIORS, mmap_mode="r")
    for row in range(rows):
        mean, std = torch.from_numpy(array[row].astype(np.float32))
        _file(folder, row).parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": mean.contiguous(), "std": std.contiguous()}, _file(folder, row))


def scale_of_files_seconds(folder: Path, rows: int) -> float:
    """Time to find the latents' scale where it is not stored: a pass over all files."""
    start, sums = time.perf_counter(), np.zeros(2)
    for row in range(rows):
        tensors = load_file(_file(folder, row))
        mean, std = tensors["mean"].double(), tensors["std"].double()
        sums += [mean.sum().item(), (mean.square() + std.square()).sum().item()]
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Drop the files from the operating system's page cache (Linux)."""
    for path in _all_files(folder):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def _all_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _step(options: argparse.Namespace) -> dict[str, Any]:
    if options.network is None:
        return {"step_seconds": options.step_seconds, "network": None, "device": None}
    device = compute_device(options.device)
    seconds = training_step_seconds(options.network, options.batch_size, device, options.repeats)
    return {"step_seconds": seconds, "network": options.network, "device": str(device)}


def training_step_seconds(size: str, batch_size: int, device: torch.device, repeats: int) -> float:
    """Median time of a step of the diffusion UNet after a first one; in bfloat16 on a GPU."""
    config = configuration(SIZES[size])
    network, conditions = (
        config.get_parsed_content("network_def").to(device),
        len(config.get_parsed_content("conditions")),
    )
    fill_with_random_values(network)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5)
    channels, *space = config.get_parsed_content("latent_shape")
    noisy = torch.randn(batch_size, channels + conditions, *space, device=device)
    context = torch.rand(batch_size, 1, conditions, device=device)
    timesteps = torch.full((batch_size,), 500, device=device)

    def step() -> float:
        start = time.perf_counter()
        with autocast(device, device.type == "cuda"):
            predicted = network(x=noisy, timesteps=timesteps, context=context)
        optimizer.zero_grad()
        predicted.float().square().mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return median([step() for _ in range(repeats + 1)][1:])


def _print_report(report: Mapping[str, Any]) -> None:
    opening = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in report["opening_seconds"].items())
    print(f"{report['latents']} latents of {report['latent_shape']}; time to open: {opening}")
    step = report["step_seconds"]
    if step:
        print(
            f"a training step of {report['batch_size']} takes {step:.4f} s: {report['batch_size'] / step:.1f} samples/s"
        )
    print(f"{'workers':8}{'way':8}{'samples/s':>11}{'ratio':>8}{'times the step':>16}")
    for row in report["loading"]:
        for way, series in row["samples_per_second"].items():
            ratio = f"{row['ratio']:.1f}" if way == ARRAY and row["ratio"] else "-"
            faster = f"{median(series) * step / report['batch_size']:.1f}" if step else "-"
            print(f"{row['workers']:<8}{way:8}{median(series):>11.1f}{ratio:>8}{faster:>16}")


if __name__ == "__main__":
    main()
