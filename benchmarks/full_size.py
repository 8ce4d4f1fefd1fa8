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
"""Times the released model's networks as this bundle builds them against those of monai-generative.

Two cases: one call of the diffusion UNet on one latent, and the decoding of one latent to a volume. Both
packages' networks get the same random weights, and their calls alternate in one process. The ratio is the
median over the rounds of ours to theirs, so that a machine whose load changes favours neither. Sizes come
from configs/inference.json.

    python -m benchmarks.full_size --size full --repeats 3 --json step.json --cases step
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import monai
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from scripts.atomic import write_json
from scripts.checkpoints import Checkpoint, load_network
from scripts.devices import compute_device
from scripts.errors import BundleError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from generative.networks import nets as generative_nets

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIZES = {"full": ["inference.json"], "tiny": ["inference.json", "tiny.yaml"]}
GIB = 2**30

Calls = dict[str, Callable[[], Tensor]]


class Measured(NamedTuple):
    """One timed call: wall-clock seconds, peak memory in bytes, and what it returned, on the CPU."""

    seconds: float
    peak: int
    output: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    try:
        device = compute_device(options.device)
        rows = [_row(name, CASES[name], options, device) for name in options.cases]
        _print_table(rows)
        if options.json:
            write_json(options.json, {"size": options.size, "machine": machine(device), "cases": rows})
    except BundleError as error:
        sys.exit(f"error: {error}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="tiny only shows that it runs")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=sorted(CASES, reverse=True))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--warmup", type=int, default=1, help="calls of each network that are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each network that are counted")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args(arguments)
    if options.warmup < 0 or options.repeats < 1:
        parser.error("--warmup must be at least 0 and --repeats at least 1")
    return options


def _row(
    name: str, build: Callable[[ConfigParser, torch.device], Calls], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    config = ConfigParser()
    config.read_config([str(CONFIGS / file) for file in SIZES[options.size]])
    runs = alternate(build(config, device), options.warmup, options.repeats, device)
    ours, theirs = runs["monai"], runs["monai-generative"]
    seconds = {package: [round(run.seconds, 4) for run in series] for package, series in runs.items()}
    return {
        "case": name,
        "seconds": seconds,
        "median_seconds": {package: median(series) for package, series in seconds.items()},
        "ratio": round(median(a.seconds / b.seconds for a, b in zip(ours, theirs)), 4),
        "max_relative_difference": relative_difference(ours[-1].output, theirs[-1].output),
        "peak_gib": {package: round(max(run.peak for run in series) / GIB, 3) for package, series in runs.items()},
    }


@torch.no_grad()
def alternate(calls: Calls, warmup: int, repeats: int, device: torch.device) -> dict[str, list[Measured]]:
    """Call each in turn, `warmup + repeats` times, and keep the last `repeats` measurements of each."""
    runs: dict[str, list[Measured]] = {package: [] for package in calls}
    for number in range(warmup + repeats):
        for package, call in calls.items():
            runs[package].append(measure(call, device))
            print(f"{number + 1}/{warmup + repeats} {package} {runs[package][-1].seconds:.2f} s", file=sys.stderr)
    return {package: series[warmup:] for package, series in runs.items()}


def measure(call: Callable[[], Tensor], device: torch.device) -> Measured:
    """Time one call.

    The peak is of the GPU memory that PyTorch allocated, or on a CPU of the whole process (Linux: since the
    start of this call), the weights of both networks included.
    """
    _reset_peak(device)
    start = time.perf_counter()
    output = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return Measured(seconds, _peak(device), output.float().cpu())


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): sets the peak back to what is resident


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    return float((output - reference).abs().max() / reference.abs().max())


def step_calls(config: ConfigParser, device: torch.device) -> Calls:
    """One step: both packages' UNets on the same noisy latent, timestep and conditions."""
    ours, theirs = both_networks(config, "network_def", generative_nets.DiffusionModelUNet, device)
    conditions = len(config.get_parsed_content("conditions"))
    channels, *space = config.get_parsed_content("latent_shape")
    noisy = torch.randn(1, channels + conditions, *space).to(device)
    context = torch.rand(1, 1, conditions).to(device)
    timesteps = torch.tensor([500], device=device)
    return _named(ours, theirs, lambda network: network(x=noisy, timesteps=timesteps, context=context))


def decode_calls(config: ConfigParser, device: torch.device) -> Calls:
    """One decode: both packages' autoencoders on the same latent."""
    ours, theirs = both_networks(config, "autoencoder_def", generative_nets.AutoencoderKL, device)
    latent = torch.randn(1, *config.get_parsed_content("latent_shape")).to(device)
    return _named(ours, theirs, lambda network: network.decode(latent))


def _named(ours: nn.Module, theirs: nn.Module, call: Callable[[Any], Tensor]) -> Calls:
    return {"monai": lambda: call(ours), "monai-generative": lambda: call(theirs)}


CASES: dict[str, Callable[[ConfigParser, torch.device], Calls]] = {"step": step_calls, "decode": decode_calls}


def both_networks(
    config: ConfigParser, key: str, generative_class: Callable[..., nn.Module], device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """The bundle's network and monai-generative's, of one configuration and with the same random weights."""
    ours = config.get_parsed_content(key)
    entry = config.ref_resolver.get_item(key).get_config()
    arguments = {name: value for name, value in entry.items() if not name.startswith("_")}
    arguments["num_channels"] = arguments.pop("channels")
    theirs = generative_class(**arguments).eval()
    fill_with_random_values(theirs)
    load_network(ours, Checkpoint(Path("random weights"), theirs.state_dict()), load_old=1, device=device)
    return ours, theirs.to(device)


def fill_with_random_values(network: nn.Module) -> None:
    """Give every parameter random values: the constructors set output convolutions to zero."""
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        else:
            nn.init.normal_(parameter, std=0.5)


def machine(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine and of versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = {"torch": torch.__version__, "monai": monai.__version__}
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), **versions}


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'case':8}{'network':18}{'seconds':>10}{'ratio':>8}{'peak GiB':>10}{'max rel. difference':>21}")
    for row in rows:
        for package, seconds in row["median_seconds"].items():
            ours = package == "monai"
            ratio = f"{row['ratio']:.3f}" if ours else "1"
            difference = f"{row['max_relative_difference']:.1e}" if ours else "-"
            peak = row["peak_gib"][package]
            print(f"{row['case']:8}{package:18}{seconds:>10.3f}{ratio:>8}{peak:>10.2f}{difference:>21}")


if __name__ == "__main__":
    main()
