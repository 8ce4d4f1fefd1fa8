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

The folder gets `sampling.json` and `sampling.tsv`, written after each case, and at last `sampling.png`. A call that
fails is a row that says why, and the others go on; with --resume 1 the same command measures what is missing. Per cent
are of the machine's own matrix multiplication in the way's precision and of its copy, measured first; FLOP and bytes
are those of MONAI's plain network, each operator of which reads its inputs from memory and writes its output there.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from benchmarks.measuring import (
    GIB,
    SIZES,
    Measured,
    Work,
    answers,
    counted,
    machine,
    measure,
    original_network,
    our_network,
    relative_difference,
)
from benchmarks.sampling_command import SamplingCommand
from benchmarks.sampling_report import Report
from scripts.compute.devices import compute_device
from scripts.compute.precision import half_precision
from scripts.core.errors import BundleError
from scripts.core.files import make_folder
from scripts.core.paths import CONFIGS
from scripts.core.programs import errors_in_one_line
from scripts.diffusion.denoiser import HybridInferer
from scripts.networks.cpu.acceleration import AUTO, accelerate_autoencoder, accelerate_unet, is_fast
from scripts.sampling.latent_diffusion import LatentDiffusion
from scripts.volumes.nifti import write_volume

WAYS = ("original", "monai", "ours")
CASES = ("unet", "steps", "decode", "encode", "write")
COMMAND = "command"

Calls = dict[str, Callable[[], Tensor]]
Measurements = dict[str, Callable[[], Measured]]
Runs = dict[str, list[Measured] | str]
"""Way -> its measurements, or why it failed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    with errors_in_one_line():
        device = compute_device(options.device, options.tf32)
        options.fast = int(is_fast(options.fast, device))
        if options.amp == "auto":
            options.amp = "bf16" if device.type == "cuda" else "0"
        if options.decoder_amp is None:
            options.decoder_amp = options.amp
        about = {"machine": machine(device), "options": vars(options)}
        print(about["machine"], file=sys.stderr, flush=True)
        ceilings = measured_ceilings(device)
        report = Report(make_folder(options.folder), {**about, "ceilings": ceilings}, bool(options.resume))
        try:
            _measure_all(report, options, device, ceilings)
        finally:
            report.finish()


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
    parser.add_argument("--tf32", type=int, default=1, choices=(0, 1), help="0: float32 convolutions without TF32")
    parser.add_argument("--fast", default=AUTO, help="of ours: 0, 1, or auto, which is 1 on a CPU")
    parser.add_argument("--streaming", nargs="+", default=["auto"], help="of ours: one or several of 0, 1, 2, auto")
    parser.add_argument("--compile", type=int, default=0, choices=(0, 1), help="of ours: PyTorch's compiler")
    parser.add_argument("--warmup", type=int, default=1, help="calls of each that are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are counted")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs")
    parser.add_argument("--minutes", type=float, help="begin no case that might take longer")
    parser.add_argument("--resume", type=int, default=0, choices=(0, 1), help="1: go on with what the folder holds")
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
    found, allowed = {}, torch.backends.cuda.matmul.allow_tf32
    kinds = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "tf32": (torch.float32, True)}
    for name, (dtype, tf32) in kinds.items():
        if tf32 and device.type != "cuda":
            continue
        torch.backends.cuda.matmul.allow_tf32 = tf32
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        runs = [measure(lambda matrix=matrix: (matrix @ matrix)[:1], device) for _ in range(4)]  # type: ignore[misc]
        found[f"matmul_{name}_tflops"] = 2 * side**3 / min(run.seconds for run in runs) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.ones(numbers, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = [measure(lambda: target.copy_(source)[:1], device) for _ in range(4)]
    found["copy_gbs"] = 2 * numbers / min(run.seconds for run in runs) / 1e9
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _measure_all(
    report: Report, options: argparse.Namespace, device: torch.device, ceilings: Mapping[str, float]
) -> None:
    """Every case that is not in the report yet, as long as the minutes last.

    Raises:
        BundleError: if the GPU does not answer any more, or the report cannot be written.
    """
    minutes = math.inf if options.minutes is None else options.minutes
    until, longest = time.monotonic() + 60.0 * minutes, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for about, measure_case in _cases(options, device, Path(folder), ceilings):
            begun = time.monotonic()
            if report.has(about):
                continue
            if begun + longest > until:
                print(f"stopped in time before {about}: --resume 1 goes on", file=sys.stderr)
                return
            report.add([{**about, **row} for row in measure_case()])
            longest = max(longest, time.monotonic() - begun)
            if not answers(device):
                raise BundleError(f"the GPU does not answer any more; what was measured is in {report.folder}")


def _cases(
    options: argparse.Namespace, device: torch.device, folder: Path, ceilings: Mapping[str, float]
) -> Iterator[tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]]:
    """What each case is of, and what measures it."""
    for size in options.size:
        for side in options.sides:
            bench = Bench(_configuration(size, side), options, device, folder, size)
            for case in options.cases:
                for batch, steps in bench.variations(case):
                    about = {"size": size, "case": case, "batch": batch, "steps": steps, "voxels": bench.voxels}
                    yield about, partial(_rows, bench, case, batch, steps, ceilings)


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


def _rows(
    bench: Bench, case: str, batch: int, steps: int | None, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each way; of one that failed, why."""
    options = bench.options
    try:
        runs = alternate(bench.measurements(case, batch, steps), options.warmup, options.repeats)
        work = bench.work(case, batch, steps)
    except Exception as error:  # of any library that builds or compiles a network
        runs, work = {way: _reason(error) for way in options.ways}, Work()
    amp = options.decoder_amp if case in ("decode", "encode") else options.amp
    good = {way: series for way, series in runs.items() if not isinstance(series, str)}
    failed = {way: {"seconds": [], "failed": reason} for way, reason in runs.items() if isinstance(reason, str)}
    figures = {way: _figures(series, good, work, ceilings, way, amp, options.tf32) for way, series in good.items()}
    return [{"way": way, **{**figures, **failed}[way]} for way in runs]


def _reason(error: Exception) -> str:
    print(f"failed: {error!r}", file=sys.stderr, flush=True)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _figures(
    series: Sequence[Measured],
    runs: Mapping[str, Sequence[Measured]],
    work: Work,
    ceilings: Mapping[str, float],
    way: str,
    amp: str,
    tf32: int,
) -> dict[str, Any]:
    seconds = median(run.seconds for run in series)
    half = way != "original" and half_precision(amp) is not None
    float32 = "tf32" if tf32 and "matmul_tf32_tflops" in ceilings else "fp32"
    ceiling = ceilings[f"matmul_{'bf16' if half else float32}_tflops"]
    gigabytes = work.bytes / 1e9 / (2 if half else 1)
    reference = runs.get("original")
    error = relative_difference(series[-1].output, reference[-1].output) if reference else None
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
        "relative_error": error if error is None or math.isfinite(error) else None,
        "failed": None if error is None or math.isfinite(error) else "the output is not finite",
    }


@torch.no_grad()
def alternate(measurements: Measurements, warmup: int, repeats: int) -> Runs:
    """Measure each in turn, `warmup + repeats` times, and keep the last `repeats` of each that never fails."""
    runs: dict[str, list[Measured]] = {way: [] for way in measurements}
    failed: dict[str, str] = {}
    for number in range(warmup + repeats):
        for way in [way for way in runs if way not in failed]:
            try:
                run = measurements[way]()
            except Exception as error:  # memory, or what a compiler cannot do: the other ways go on
                failed[way] = _reason(error)
                continue
            runs[way].append(run)
            said = f"{run.seconds:.2f} s, {run.cpu_seconds:.2f} CPU s, {run.growth / GIB:.2f} GiB more"
            print(f"{number + 1}/{warmup + repeats} {way} {said}", file=sys.stderr, flush=True)
    return {way: failed.get(way, series[warmup:]) for way, series in runs.items()}


class Bench:
    """The calls that are timed, on networks that are made when first needed and let go when the others are."""

    def __init__(
        self, config: ConfigParser, options: argparse.Namespace, device: torch.device, folder: Path, size: str
    ) -> None:
        self.config, self.options, self.device = config, options, device
        self.folder, self.size = folder, size
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
        if case == COMMAND:
            return self.command.calls(self.ways("autoencoder_def"), steps or 1)
        calls = self.calls(case, batch, steps)
        return {way: partial(measure, call, self.device) for way, call in calls.items()}

    @cached_property
    def command(self) -> SamplingCommand:
        """The whole commands, with their files of weights."""
        return SamplingCommand(self.config, self.size, self.options, self.folder)

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


if __name__ == "__main__":
    main()
