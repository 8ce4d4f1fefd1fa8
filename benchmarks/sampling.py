# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Times sampling as the original does it, as MONAI core does, and as this bundle does, side by side in one process.

`original` is monai-generative's networks in float32 with its DDIM timesteps; `monai` MONAI core's networks as they
come, under autocast (--amp); `ours` the bundle's with --fast and --streaming. All have the same random weights. The
calls of the three alternate after warm-up, and medians are compared, so that a machine whose load changes favours none.

    python -m benchmarks.sampling --size full --device cuda --batches 1 2 4 8 16 32 --folder report
    python -m benchmarks.sampling --size full --device cpu --cases command --steps 50 --warmup 0 --repeats 1
    python -m benchmarks.sampling --size demo --cases steps unet decode --steps 10 20 50 --batches 1 2 4 --sides .4 .6 1
    python -m benchmarks.sampling --size tiny --repeats 1

The case `command` is the whole way from files of weights to a volume's file, each way in a process of its own, with the
resident memory of that process; it needs 2.3 GB of disk for weights of full size.

The folder gets `sampling.json`, `sampling.tsv` and `sampling.png`. Per cent are of the machine's own matrix
multiplication in the way's precision and of its copy, measured first; FLOP and bytes are those of MONAI's plain
network, each operator of which reads its inputs from memory and writes its output there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from monai.bundle import ConfigParser
from torch import Tensor, nn

from benchmarks.measuring import (
    GIB,
    SIZES,
    Measured,
    Work,
    counted,
    machine,
    measure,
    original_network,
    our_network,
    relative_difference,
)
from benchmarks.sampling_command import SamplingCommand
from scripts.compute.devices import compute_device
from scripts.compute.precision import half_precision
from scripts.core.files import make_folder, replacing, write_json
from scripts.core.paths import CONFIGS
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import write_table
from scripts.diffusion.denoiser import HybridInferer
from scripts.networks.cpu.acceleration import accelerate_autoencoder, accelerate_unet
from scripts.sampling.latent_diffusion import LatentDiffusion
from scripts.volumes.nifti import write_volume

WAYS = ("original", "monai", "ours")
CASES = ("unet", "steps", "decode", "encode", "write")
COMMAND = "command"
AXES = {"steps": "steps", "batch": "unet", "voxels": "decode"}
TITLES = {"steps": "trajectory", "unet": "UNet call"}

Calls = dict[str, Callable[[], Tensor]]
Measurements = dict[str, Callable[[], Measured]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    with errors_in_one_line():
        device = compute_device(options.device)
        folder = make_folder(options.folder)
        ceilings = measured_ceilings(device)
        rows = [row for size in options.size for row in _rows(size, options, device, ceilings)]
        report = {"machine": machine(device), "ceilings": ceilings, "options": vars(options), "rows": rows}
        write_json(folder / "sampling.json", report)
        write_table(folder / "sampling.tsv", [{**row, "seconds": median(row["seconds"])} for row in rows])
        with replacing(folder / "sampling.png") as path:
            plot(rows).savefig(path, dpi=120, format="png")
    _print_table(rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", nargs="+", choices=sorted(SIZES), default=["full"], help="tiny only shows that it runs"
    )
    parser.add_argument("--cases", nargs="+", choices=(*CASES, COMMAND), default=CASES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1], help="latents in a UNet call and in a trajectory"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[2], help="lengths of the trajectories of DDIM")
    parser.add_argument(
        "--sides", nargs="+", type=float, default=[1.0], help="volumes: fractions of the grid's sides, in whole latents"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--amp", default="auto", help="of monai and ours: 0, bf16 or fp16; auto is bf16 on a GPU, else 0"
    )
    parser.add_argument("--decoder_amp", help="of monai's and ours' autoencoder, where it is another")
    parser.add_argument("--fast", type=int, default=1, choices=(0, 1), help="of ours")
    parser.add_argument("--streaming", nargs="+", default=["auto"], help="of ours: one or several of 0, 1, 2, auto")
    parser.add_argument("--compile", type=int, default=0, choices=(0, 1), help="of ours: PyTorch's compiler")
    parser.add_argument("--warmup", type=int, default=1, help="calls of each that are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are counted")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs")
    parser.add_argument("--folder", default="benchmark", help="where the report goes")
    options = parser.parse_args(arguments)
    if options.warmup < 0 or min(options.repeats, *options.batches, *options.steps) < 1:
        parser.error("--warmup must be at least 0, --repeats, --batches and --steps at least 1")
    if not 0 < min(options.sides) <= max(options.sides) <= 1 or (COMMAND in options.cases and options.sides != [1.0]):
        parser.error("--sides must be above 0 and at most 1; --cases command takes whole volumes alone")
    return options


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """What the machine does at best: TFLOP/s of a matrix multiplication for each precision, GB/s of a copy."""
    side, numbers = (8192, 2**30) if device.type == "cuda" else (1536, 2**26)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        runs = [measure(lambda matrix=matrix: (matrix @ matrix)[:1], device) for _ in range(4)]  # type: ignore[misc]
        found[f"matmul_{name}_tflops"] = 2 * side**3 / min(run.seconds for run in runs) / 1e12
    source = torch.ones(numbers, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = [measure(lambda: target.copy_(source)[:1], device) for _ in range(4)]
    found["copy_gbs"] = 2 * numbers / min(run.seconds for run in runs) / 1e9
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _rows(
    size: str, options: argparse.Namespace, device: torch.device, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    if options.amp == "auto":
        options.amp = "bf16" if device.type == "cuda" else "0"
    if options.decoder_amp is None:
        options.decoder_amp = options.amp
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        bench = Bench(_configuration(size, side), options, device)
        with tempfile.TemporaryDirectory() as folder:
            rows += _measured(size, bench, Path(folder), options, ceilings)
    return rows


def _configuration(size: str, side: float) -> ConfigParser:
    """Of a size, on a grid whose sides are a fraction of its own, in whole latents on every level of the UNet."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / file) for file in SIZES[size]])
    if side < 1.0:
        levels = len(config.get_parsed_content("network_def::channels"))
        unit = config.get_parsed_content("latent_factor") * 2 ** (levels - 1)
        shape = config.get_parsed_content("grid").shape
        config["grid::shape"] = [max(1, round(side * n / unit)) * unit for n in shape]
    return config


def _measured(
    size: str, bench: Bench, folder: Path, options: argparse.Namespace, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    varied = [(case, batch, steps) for case in options.cases for batch, steps in bench.variations(case)]
    command = SamplingCommand(bench.config, size, options, folder) if COMMAND in options.cases else None
    rows: list[dict[str, Any]] = []
    for case, batch, steps in varied:
        if command is not None and case == COMMAND:
            measurements = command.calls(bench.ways("autoencoder_def"), steps or 1)
        else:
            measurements = bench.measurements(case, batch, steps)
        runs = alternate(measurements, options.warmup, options.repeats)
        work = bench.work(case, batch, steps)
        amp = options.decoder_amp if case in ("decode", "encode") else options.amp
        about = {"size": size, "case": case, "batch": batch, "steps": steps, "voxels": bench.voxels}
        for way, series in runs.items():
            rows.append({**about, "way": way, **_figures(series, runs, work, ceilings, way, amp)})
    return rows


def _figures(
    series: Sequence[Measured],
    runs: Mapping[str, Sequence[Measured]],
    work: Work,
    ceilings: Mapping[str, float],
    way: str,
    amp: str,
) -> dict[str, Any]:
    seconds = median(run.seconds for run in series)
    half = way != "original" and half_precision(amp) is not None
    ceiling = ceilings["matmul_bf16_tflops" if half else "matmul_fp32_tflops"]
    gigabytes = work.bytes / 1e9 / (2 if half else 1)
    reference = runs.get("original")
    return {
        "seconds": [round(run.seconds, 5) for run in series],
        "cpu_seconds": round(median(run.cpu_seconds for run in series), 4),
        "times_original": round(median(a.seconds / b.seconds for a, b in zip(reference, series)), 3)
        if reference
        else None,
        "peak_gib": round(max(run.peak for run in series) / GIB, 3),
        "growth_gib": round(max(run.growth for run in series) / GIB, 3),
        "tflop": round(work.flop / 1e12, 4),
        "percent_of_matmul": round(100 * work.flop / 1e12 / seconds / ceiling, 1),
        "gigabytes": round(gigabytes, 4),
        "percent_of_copy": round(100 * gigabytes / seconds / ceilings["copy_gbs"], 1),
        "relative_error": relative_difference(series[-1].output, reference[-1].output) if reference else None,
    }


@torch.no_grad()
def alternate(measurements: Measurements, warmup: int, repeats: int) -> dict[str, list[Measured]]:
    """Measure each in turn, `warmup + repeats` times, and keep the last `repeats` of each."""
    runs: dict[str, list[Measured]] = {way: [] for way in measurements}
    for number in range(warmup + repeats):
        for way, measurement in measurements.items():
            run = measurement()
            runs[way].append(run)
            said = f"{run.seconds:.2f} s, {run.cpu_seconds:.2f} CPU s, {run.growth / GIB:.2f} GiB more"
            print(f"{number + 1}/{warmup + repeats} {way} {said}", file=sys.stderr, flush=True)
    return {way: series[warmup:] for way, series in runs.items()}


class Bench:
    """The calls that are timed, on networks that are made when first needed and let go when the others are."""

    def __init__(self, config: ConfigParser, options: argparse.Namespace, device: torch.device) -> None:
        self.config, self.options, self.device = config, options, device
        self.conditions = len(config.get_parsed_content("conditions"))
        self.latent_shape = config.get_parsed_content("latent_shape")
        self.grid = config.get_parsed_content("grid")
        self.image = [1, *self.grid.shape]
        self.voxels = int(torch.Size(self.grid.shape).numel())
        self._made: tuple[str, dict[str, nn.Module]] = ("", {})
        self._work: dict[str, Work] = {}

    def variations(self, case: str) -> list[tuple[int, int | None]]:
        """Batch and number of steps of each measurement of a case."""
        if case in ("decode", "encode", "write"):
            return [(1, None)]
        if case == COMMAND:
            return [(1, n) for n in self.options.steps]
        return [(b, n) for b in self.options.batches for n in (self.options.steps if case == "steps" else [None])]

    def measurements(self, case: str, batch: int, steps: int | None) -> Measurements:
        """Way -> measurement of a call."""
        calls = self.calls(case, batch, steps)
        return {way: partial(measure, call, self.device) for way, call in calls.items()}

    def calls(self, case: str, batch: int, steps: int | None) -> Calls:
        """Way -> call."""
        torch.manual_seed(self.options.seed)
        if case == "write":
            return self._write()
        networks = self._networks("network_def" if case in ("unet", "steps") else "autoencoder_def")
        if case in ("unet", "steps"):
            return self._denoise(networks, batch, steps)
        x = torch.rand(1, *(self.latent_shape if case == "decode" else self.image), device=self.device)
        return {way: self._autoencode(network, case, x, way) for way, network in networks.items()}

    def work(self, case: str, batch: int, steps: int | None) -> Work:
        """Of one call of MONAI's plain network in float32."""
        if case == "write":
            return Work()
        if case == COMMAND:
            return Work(*map(sum, zip(self.work("steps", batch, steps), self.work("decode", batch, None))))
        part = "unet" if case == "steps" else case
        if part not in self._work:
            self._work[part] = self._count(part)
        return self._work[part].times(batch * (steps or 1))

    def _count(self, part: str) -> Work:
        with torch.device("meta"):
            key = "network_def" if part == "unet" else "autoencoder_def"
            network: Any = ConfigParser(self.config.get()).get_parsed_content(key)
            if part == "unet":
                channels, *space = self.latent_shape
                x, context = torch.empty(1, channels + self.conditions, *space), torch.empty(1, 1, self.conditions)
                return counted(partial(network, x, torch.empty(1), context))
            method = network.decode if part == "decode" else network.encode
            return counted(partial(method, torch.empty(1, *(self.latent_shape if part == "decode" else self.image))))

    def _networks(self, key: str) -> dict[str, nn.Module]:
        if self._made[0] == key:
            return self._made[1]
        self._made = ("", {})
        torch.manual_seed(self.options.seed)
        original = original_network(self.config, key, self.device)
        made: dict[str, nn.Module] = {}
        for way in self.ways(key):
            network = original if way == "original" else our_network(self.config, key, original, self.device)
            made[way] = self._ours(network, key, way) if way.startswith("ours") else network
        self._made = key, made
        return made

    def ways(self, key: str) -> list[str]:
        """What is compared, of the UNet (`network_def`) or where the autoencoder is in it (`autoencoder_def`)."""
        several = key == "autoencoder_def" and len(self.options.streaming) > 1
        ours = [f"ours, streaming {s}" for s in self.options.streaming] if several else ["ours"]
        return [name for way in self.options.ways for name in (ours if way == "ours" else [way])]

    def _ours(self, network: Any, key: str, way: str) -> Any:
        options = self.options
        if key == "network_def":
            return accelerate_unet(network, bool(options.fast), options.amp, options.compile)
        streaming = way.rpartition(" ")[2] if " " in way else options.streaming[0]
        return accelerate_autoencoder(network, streaming, bool(options.fast))

    def _family(self, way: str, unet: nn.Module, autoencoder: nn.Module, steps: int | None = None) -> LatentDiffusion:
        config = ConfigParser({**self.config.get(), "num_inference_steps": steps})
        amp = "0" if way == "original" else self.options.amp
        decoder_amp = "0" if way == "original" else self.options.decoder_amp
        sampler = config.get_parsed_content("chosen_sampler")
        return LatentDiffusion(unet, autoencoder, HybridInferer(amp), sampler, decoder_amp=decoder_amp)

    def _denoise(self, networks: Mapping[str, nn.Module], batch: int, steps: int | None) -> Calls:
        noise = torch.randn(batch, *self.latent_shape, device=self.device)
        condition = torch.rand(batch, self.conditions, device=self.device)
        times = torch.full((batch,), 500, device=self.device)

        def call(way: str, network: nn.Module) -> Callable[[], Tensor]:
            family = self._family(way, network, nn.Identity(), steps)
            if steps is None:
                return lambda: family.hybrid.denoise(network, noise, times, condition)
            return lambda: family.sample_clean(noise, condition, [])

        return {way: call(way, network) for way, network in networks.items()}

    def _autoencode(self, network: Any, case: str, x: Tensor, way: str) -> Callable[[], Tensor]:
        family = self._family(way, nn.Identity(), network)
        if case == "decode":
            return lambda: family.decode(x)
        amp = None if way == "original" else half_precision(self.options.decoder_amp)

        def encode() -> Tensor:
            with torch.autocast(self.device.type, amp or torch.bfloat16, enabled=amp is not None):
                return network.encode(x)[0]

        return encode

    def _write(self) -> Calls:
        volume = torch.rand(self.grid.shape)

        def write() -> Tensor:
            with tempfile.TemporaryDirectory() as folder:
                write_volume(str(Path(folder) / "x.nii.gz"), volume.numpy(), self.grid, "uint8")
            return volume[:1]

        return {"ours": write}


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of the parts, and how they grow with steps, batch and volume."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    parts, *axes = figure.subplots(1, 1 + len(AXES))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    colours = {way: f"C{number}" for number, way in enumerate(ways)}
    largest = max(row["voxels"] for row in rows)
    least = {(row["case"], row["way"]): row for row in reversed(rows) if row["voxels"] == largest}
    cases = list(dict.fromkeys(case for case, _ in reversed(least)))
    for number, way in enumerate(ways):
        heights = [median(least[case, way]["seconds"]) if (case, way) in least else 0.0 for case in cases]
        places = [place + number * 0.8 / len(ways) for place in range(len(cases))]
        parts.bar(places, heights, 0.8 / len(ways), label=way, color=colours[way], align="edge")
    parts.set_xticks([place + 0.4 for place in range(len(cases))], cases, rotation=30)
    parts.set(yscale="log", ylabel="seconds", title="parts")
    for axis, (name, case) in zip(axes, AXES.items()):
        for way in ways:
            points = sorted((r[name], median(r["seconds"])) for r in _alone(rows, name, case, way))
            axis.plot(*zip(*points), "o-", color=colours[way], label=way) if points else None
        axis.set(
            xscale="log", yscale="log", xlabel=name, ylabel="seconds", title=f"{TITLES.get(case, case)} over {name}"
        )
        axis.xaxis.set_major_locator(FixedLocator(sorted({row[name] for row in rows if row[name] is not None})))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    parts.legend(fontsize=7)
    return figure


def _alone(rows: Sequence[Mapping[str, Any]], name: str, case: str, way: str) -> list[Mapping[str, Any]]:
    # Only `name` varies: the networks are those of the first size, the batch the smallest, the volume the largest.
    found = [row for row in rows if (row["size"], row["case"], row["way"]) == (rows[0]["size"], case, way)]
    fixed = {"batch": min, "voxels": max}
    kept = {key: choose(row[key] for row in found) for key, choose in fixed.items() if key != name and found}
    return [row for row in found if all(row[key] == value for key, value in kept.items())]


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    names = ["size", "voxels", "case", "batch", "steps", "way", "seconds", "cpu_seconds", "times_original", "peak_gib"]
    names += ["growth_gib", "percent_of_matmul", "percent_of_copy", "relative_error"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        shown = {**row, "seconds": median(row["seconds"])}
        cells = ["" if shown[name] is None else shown[name] for name in names]
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
