# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing, memory, networks with random weights, and what a report says of a machine."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import monai.config
import monai.utils
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scripts.compute.devices import gpu_versions
from scripts.networks.patching import OnCubes
from scripts.networks.weights import Checkpoint, load_network

monai.config.IgniteInfo = monai.utils.IgniteInfo  # where monai-generative 0.2.3 looks for it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from generative.networks import nets as generative_nets
    from generative.networks import schedulers as generative_schedulers

SIZES = {
    "full": ["inference.json"],
    "demo": ["inference.json", "demo.yaml"],
    "tiny": ["inference.json", "tiny.yaml"],
}


class PatchedGenerative(OnCubes, generative_nets.AutoencoderKL):
    """monai-generative's autoencoder as the small model uses MONAI's."""


GENERATIVE: dict[str, type[nn.Module]] = {
    "DiffusionModelUNet": generative_nets.DiffusionModelUNet,
    "AutoencoderKL": generative_nets.AutoencoderKL,
    "scripts.networks.patching.PatchedAutoencoderKL": PatchedGenerative,
}
"""MONAI's networks in the configurations -> monai-generative's."""
GIB = 2**30


class Measured(NamedTuple):
    """One timed call.

    Attributes:
        seconds: on the wall; on a GPU between two events of its own clock.
        cpu_seconds: of this process's threads, which other programs on the machine change less.
        peak: bytes at the worst moment, weights included.
        growth: bytes at the worst moment above those at the start.
        output: what it returned, on the CPU.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    growth: int
    output: Tensor


def measure(call: Callable[[], Tensor], device: torch.device) -> Measured:
    """Time one call.

    Memory is the GPU's that PyTorch allocated, or on a CPU that of the whole process (Linux: since the start of this
    call).
    """
    before = _reset_peak(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    start, cpu_start = time.perf_counter(), time.process_time()
    if events:
        events[0].record()
    output = call()
    if events:
        events[1].record()
        torch.cuda.synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if events:
        seconds = events[0].elapsed_time(events[1]) / 1000
    peak = _peak(device)
    return Measured(seconds, cpu_seconds, peak, peak - before, output.float().cpu())


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): sets the peak back to what is resident
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Work(NamedTuple):
    """What a call has to do.

    Attributes:
        flop: floating-point operations.
        bytes: that its operators read and write, each of them for itself.
    """

    flop: float = 0.0
    bytes: float = 0.0

    def times(self, number: int) -> Work:
        """Of as many calls."""
        return Work(self.flop * number, self.bytes * number)


class Traffic(TorchDispatchMode):
    """Counts the bytes of what operators take and give, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, output)) if isinstance(x, Tensor))
        return output


@torch.no_grad()
def counted(call: Callable[[], Any]) -> Work:
    """The work of one call, on tensors without values (`torch.device("meta")`) or with them."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        call()
    return Work(counter.get_total_flops(), traffic.bytes)


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    return float((output - reference).abs().max() / reference.abs().max())


def original_network(config: ConfigParser, key: str, device: torch.device) -> nn.Module:
    """monai-generative's network of one of the bundle's configurations, with random weights."""
    network = bare_original_network(config, key)
    fill_with_random_values(network)
    return network.to(device)


def bare_original_network(config: ConfigParser, key: str) -> nn.Module:
    """The same as monai-generative initialises it."""
    entry = config.ref_resolver.get_item(key) and config.get_parsed_content(key, instantiate=False).get_config()
    arguments = {name: value for name, value in entry.items() if not name.startswith("_")}
    arguments["num_channels"] = arguments.pop("channels")
    return GENERATIVE[entry["_target_"]](**arguments).eval()


def original_scheduler(name: str, entry: Mapping[str, Any]) -> Any:
    """monai-generative's scheduler of that name, of one of the bundle's schedules."""
    given = {key: value for key, value in entry.items() if not key.startswith("_")}
    return getattr(generative_schedulers, name)(**given)


def our_network(config: ConfigParser, key: str, original: nn.Module, device: torch.device) -> nn.Module:
    """The bundle's network of that configuration, with the original's weights."""
    state = {name: tensor.cpu() for name, tensor in original.state_dict().items()}
    network = ConfigParser(config.get()).get_parsed_content(key)
    return load_network(network, Checkpoint(Path("random weights"), state), load_old=1, device=device)


def fill_with_random_values(network: nn.Module) -> None:
    """Give every parameter random values: the constructors set output convolutions to zero."""
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        else:
            nn.init.normal_(parameter, std=0.5)


def machine(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine and of versions."""
    versions: dict[str, Any] = {"torch": torch.__version__, "monai": monai.__version__}
    name = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        versions |= gpu_versions(device)
        name = versions.pop("gpu")
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), **versions}


def answers(device: torch.device) -> bool:
    """Whether a device still computes: after some errors of CUDA a process cannot use its GPU any more."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False
