# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one training step of either stage, over batch sizes, precisions and what saves memory.

The step is that of the bundle's training configurations, discriminator and optimisers included, on random volumes and
latents of the configured size. `kept` is what the forward passes of a step keep for the gradients, weights included,
as PyTorch's hooks for saved tensors count it; it is the same on every machine. A table of what fits into 24, 48 and
80 GB follows from the measured peaks.

    python -m benchmarks.training_step --device cuda --batches 1 2 4 8 --json steps.json
    python -m benchmarks.training_step --size tiny --batches 1 2
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.measuring import GIB, SIZES, machine, measure
from scripts.autoencoder.perceptual import LPIPS
from scripts.compute.devices import compute_device
from scripts.core.errors import BundleError
from scripts.core.files import write_json
from scripts.core.paths import CONFIGS
from scripts.core.programs import errors_in_one_line

PRECISIONS = {"fp32": "0", "bf16": "bf16", "fp16": "fp16"}
BUDGETS_GB = (24, 48, 80)
OUT_OF_MEMORY = "out of memory"
USABLE = 0.93  # of a GPU's memory, the rest being the driver's, CUDA's and fragments


class Case(NamedTuple):
    """What is varied from one measurement to the next."""

    stage: str
    batch: int
    precision: str
    checkpointing: int
    channels_last: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    with errors_in_one_line():
        device = compute_device(options.device, options.tf32)
        print(machine(device), file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            perceptual = Path(folder) / "lpips.safetensors"
            save_file(LPIPS().state_dict(), perceptual)
            rows = _kept(options, device) if options.resume else []
            done = [tuple(row[name] for name in Case._fields) for row in rows]
            for case in tqdm([case for case in _cases(options) if case not in done], unit="case"):
                rows.append(_row(case, options, device, perceptual, rows))
                _write(rows, options, device)
    _print_table(rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="tiny only shows that it runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--stages", nargs="+", choices=sorted(BATCHES), default=sorted(BATCHES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="volumes or latents in a step")
    parser.add_argument("--precisions", nargs="+", choices=sorted(PRECISIONS), default=sorted(PRECISIONS))
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    parser.add_argument("--channels_last", nargs="+", type=int, choices=(0, 1), default=[0])
    parser.add_argument("--tf32", type=int, choices=(0, 1), default=1, help="0: float32 convolutions without TF32")
    parser.add_argument("--patch_shape", nargs=3, type=int, help="crops for the autoencoder; the whole grid by default")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are counted")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--resume", type=int, default=0, choices=(0, 1), help="1: go on with what that file holds")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1 or options.warmup < 0 or options.repeats < 1:
        parser.error("--batches and --repeats must be at least 1, --warmup at least 0")
    return options


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    varied = (options.stages, options.precisions, options.checkpointing, options.channels_last, options.batches)
    for stage, precision, checkpointing, channels_last, batch in product(*varied):
        yield Case(stage, batch, precision, checkpointing, channels_last)


def _write(rows: Sequence[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> None:
    """Write the report after each case, so that a stop loses one of them alone."""
    if options.json:
        report = {"size": options.size, "patch_shape": options.patch_shape, "machine": machine(device)}
        write_json(options.json, {**report, "steps": list(rows), "fits": fitting(rows)})


def _kept(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The steps of an earlier run that did not fail.

    Raises:
        BundleError: if that was on another machine, or of another size.
    """
    if not options.json or not Path(options.json).is_file():
        return []
    found = json.loads(Path(options.json).read_text())
    about = {"size": options.size, "patch_shape": options.patch_shape, "machine": machine(device)}
    if any(found[name] != value for name, value in about.items()):
        raise BundleError(f"{options.json} holds steps of another machine or size: give another file")
    return [row for row in found["steps"] if row["failed"] is None or row["failed"] == OUT_OF_MEMORY]


def _row(
    case: Case, options: argparse.Namespace, device: torch.device, perceptual: Path, done: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {**case._asdict(), "seconds": None, "peak_gib": None, "kept_gib": None, "failed": None}
    if _is_too_large(case, done):
        return {**row, "failed": OUT_OF_MEMORY}
    try:
        runs, kept = _run(case, options, device, perceptual)
        row |= {"seconds": [round(run.seconds, 4) for run in runs], "peak_gib": round(runs[-1].peak / GIB, 3)}
        row["kept_gib"] = round(kept / GIB, 3)
    except RuntimeError as error:  # memory, or a size that one of the GPU's kernels does not take
        row["failed"] = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0]
        print(f"{case}: {row['failed']}", file=sys.stderr)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _is_too_large(case: Case, done: Sequence[dict[str, Any]]) -> bool:
    """Whether a smaller batch of the same kind of step was out of memory."""
    smaller = [row for row in done if row["failed"] == OUT_OF_MEMORY and row["batch"] < case.batch]
    return any(case._replace(batch=row["batch"]) == tuple(row[name] for name in Case._fields) for row in smaller)


def _run(case: Case, options: argparse.Namespace, device: torch.device, perceptual: Path) -> tuple[list[Any], int]:
    config = _configuration(case, options, device, perceptual)
    step = config.get_parsed_content("train::step")
    batch = BATCHES[case.stage](config, case.batch, options.patch_shape)
    epoch = 1 + int(config.get("warm_up_epochs", 0))
    engine = SimpleNamespace(state=SimpleNamespace(device=device, epoch=epoch, iteration=1))

    def call() -> Tensor:
        return torch.tensor(step(engine, batch)["losses"]["loss"])

    runs = [measure(call, device) for _ in range(options.warmup + options.repeats)]
    return runs[options.warmup :], kept_for_gradients(call)


def kept_for_gradients(call: Callable[[], Tensor]) -> int:
    """Bytes that a call keeps for its backward passes, each piece of memory counted once."""
    pieces: dict[tuple[int, int], int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, _unchanged):
        call()
    return sum(pieces.values())


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _configuration(case: Case, options: argparse.Namespace, device: torch.device, perceptual: Path) -> ConfigParser:
    base, *overlays = SIZES[options.size]
    config = ConfigParser()
    config.read_config([str(CONFIGS / name) for name in (base, f"train_{case.stage}.yaml", *overlays)])
    config["device"], config["tf32"] = str(device), options.tf32
    config["amp"] = PRECISIONS[case.precision]
    config["gradient_checkpointing"], config["channels_last"] = case.checkpointing, case.channels_last
    config["perceptual_path"] = str(perceptual)
    return config


def _autoencoder_batch(config: ConfigParser, size: int, patch_shape: Sequence[int] | None) -> dict[str, Tensor]:
    shape = patch_shape or config.get_parsed_content("grid").shape
    factor = 2 ** (len(config.get_parsed_content("autoencoder_channels")) - 1)
    noise = torch.randn(size, config.get_parsed_content("latent_channels"), *(side // factor for side in shape))
    return {"image": torch.rand(size, 1, *shape), "noise": noise}


def _diffusion_batch(config: ConfigParser, size: int, patch_shape: Sequence[int] | None) -> dict[str, Tensor]:
    latent, noise = torch.randn(2, size, *config.get_parsed_content("latent_shape"))
    condition = torch.rand(size, len(config.get_parsed_content("conditions")))
    return {"image": latent, "noise": noise, "condition": condition, "timestep": torch.randint(1000, (size,))}


BATCHES: dict[str, Callable[[ConfigParser, int, Sequence[int] | None], dict[str, Tensor]]] = {
    "autoencoder": _autoencoder_batch,
    "diffusion": _diffusion_batch,
}


def fitting(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of step the largest measured batch whose peak fits each of the GPU sizes; None where none does."""
    kinds = dict.fromkeys(tuple(row[name] for name in Case._fields if name != "batch") for row in rows)
    names = [name for name in Case._fields if name != "batch"]
    found = []
    for kind in kinds:
        measured = [row for row in rows if tuple(row[name] for name in names) == kind and row["peak_gib"] is not None]
        largest = {
            f"{budget} GB": max(
                (row["batch"] for row in measured if row["peak_gib"] * GIB <= USABLE * budget * 1e9), default=None
            )
            for budget in BUDGETS_GB
        }
        found.append({**dict(zip(names, kind)), **largest})
    return found


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    budgets = [f"{budget} GB" for budget in BUDGETS_GB]
    print("| stage | precision | checkpointing | channels last | batch | s a step | s a sample | peak GiB | kept GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        kind = [row["stage"], row["precision"], row["checkpointing"], row["channels_last"], row["batch"]]
        middle = median(row["seconds"]) if row["seconds"] else None
        time = [f"{middle:.3f}", f"{middle / row['batch']:.3f}"] if middle is not None else [row["failed"], ""]
        memory = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("peak_gib", "kept_gib")]
        print("| " + " | ".join(map(str, [*kind, *time, *memory])) + " |")
    print(
        "\nLargest measured batch:\n\n| stage | precision | checkpointing | channels last | "
        + " | ".join(budgets)
        + " |"
    )
    print("|---|---|---|---|" + "---|" * len(budgets))
    for row in fitting(rows):
        print("| " + " | ".join(str("none" if value is None else value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
