# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.demo_training`: the small model of configs/demo.yaml, from phantoms to weights and figures.

Each stage is one command of the bundle with the demo overlay: phantoms, stage 1, encoding, stage 2, the age network,
samples, the paper's Figure 4 and the evaluation. Trainings are planned by the clock: a few iterations are timed first,
and the number that fits the stage's minutes is then trained with a learning rate that falls to 0 by its end.

With --minutes the program stops in time, and the same command goes on where it stopped. What has been reached is in
--deliver_dir, in few small files. Where --work_dir was lost but --deliver_dir is there, the weights in it are taken
over: a finished autoencoder is not trained again, and the diffusion model goes on from its weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_json
from scripts.core.paths import MODELS, ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import write_table
from scripts.core.verbs import merge, used_ids
from scripts.networks.weights import write_safetensors
from scripts.tools.curves import draw, losses, validations
from scripts.training.loss_record import FILE

logger = logging.getLogger(__name__)

BASE, DEMO, TINY = "configs/inference.json", "configs/demo.yaml", "configs/tiny.yaml"
PROBED = 20
EPOCHS = 20
GRACE_S = 30.0
HIGHRES3DNET = MODELS / "highres3dnet.pth"
DELIVERED = (
    "evaluation/evaluation.html",
    "evaluation/evaluation.json",
    "evaluation/table_1.tsv",
    "evaluation/reconstruction.png",
    "figures/extrapolation.png",
    "side_by_side/models.png",
)
NEEDED = {
    "phantoms": ("held_out/participants.tsv", ("latents", "diffusion", "brain_age", "evaluation")),
    "latents": ("latents", ("diffusion",)),
    "brain_age": ("runs/brain_age/brain_age.pt", ("evaluation",)),
    "samples": ("samples", ("figures", "evaluation")),
}
"""What a stage makes in the work folder, and which later stages read it."""

TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoencoder": ("train_autoencoder", {"adversarial_weight": 0, "channels_last": 1, "lr": 4.0e-4}),
    "diffusion": (
        "train_diffusion",
        {"batch_size": 16, "lr": 4.0e-4, "ema_decay": 0.999, "condition_dropout": 0.1},
    ),
    "brain_age": ("train_brain_age", {}),
}


@dataclass
class Machine:
    """What the stages share: where they write, how much, and until when.

    Attributes:
        work_dir: phantoms, runs, latents, samples.
        deliver_dir: what is to be kept: weights in float16, curves, evaluation, `plan.json`.
        options: the command line.
        deadline: of `time.monotonic()`.
        plan: of each training, the iterations that fit its minutes; and the stages that are done.
    """

    work_dir: Path
    deliver_dir: Path
    options: argparse.Namespace
    deadline: float
    plan: dict[str, Any] = field(default_factory=dict)

    def run(self, verb: str | None, flags: Mapping[str, Any], processes: int = 1) -> None:
        """One command of the bundle with the demo overlay; it is told to stop shortly before the deadline.

        Raises:
            OutOfTimeError: if it had to be stopped.
            BundleError: if it failed.
        """
        verbs = [f"configs/{verb}.yaml"] if verb else []
        files = [BASE, *verbs, DEMO, *([TINY] if self.options.rehearse else [])]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        used = used_ids(merge(ROOT / file for file in files))
        halved_twice = self.options.rehearse and "autoencoder_channels" in used  # as the tiny grid can be
        smaller = {"autoencoder_channels": [8, 16]} if halved_twice else {}
        given = [str(part) for name, value in {**flags, **smaller}.items() for part in (f"--{name}", value)]
        command = ["-m", "monai.bundle", "run", "--config_file", str(files), *given]
        self.call([sys.executable, *(launcher if processes > 1 else []), *command])

    def call(self, command: Sequence[str]) -> None:
        """As `run`, any command."""
        if self.left() <= 0:
            raise OutOfTimeError
        one_thread = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **one_thread})
        try:
            code = process.wait(self.left())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise OutOfTimeError from None
        if code:
            raise BundleError(f"{' '.join(command[2:8])} ... ended with exit code {code}: its message is above")

    def left(self) -> float:
        """Seconds until the last moment at which a command can be told to stop."""
        return self.deadline - GRACE_S - time.monotonic()

    def keep_plan(self) -> None:
        """Write down what is planned and done."""
        write_json(self.deliver_dir / "plan.json", self.plan)


class OutOfTimeError(Exception):
    """The minutes are over; the same command goes on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with command-line arguments."""
    options = _parser().parse_args(arguments)
    if options.part_mb is not None and options.part_mb <= 0.0:
        sys.exit(f"error: --part_mb must be above 0, got {options.part_mb:g}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    deadline = time.monotonic() + 60.0 * options.minutes if options.minutes else float("inf")
    machine = Machine(make_folder(options.work_dir), make_folder(options.deliver_dir), options, deadline)
    kept = machine.deliver_dir / "plan.json"
    machine.plan = json.loads(kept.read_text()) if kept.is_file() else {"done": []}
    with errors_in_one_line():
        for network in ("autoencoder", "diffusion"):
            _join_parts(machine.deliver_dir / f"{network}.safetensors")
        try:
            try:
                train(machine)
            finally:
                deliver(machine)
            logger.info(f"all stages are done: {machine.deliver_dir}")
        except OutOfTimeError:
            logger.info("the minutes are over: the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="runs/demo", help="phantoms, runs, latents, samples (default runs/demo)")
    parser.add_argument("--deliver_dir", default="runs/demo/delivered", help="weights, curves and the evaluation")
    parser.add_argument("--minutes", type=float, help="after which to stop; the same command then goes on")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that make phantoms (default: all cores)")
    parser.add_argument("--phantoms", type=int, default=480, help="to train on (default 480)")
    parser.add_argument("--held_out", type=int, default=40, help="phantoms of another seed (default 40)")
    parser.add_argument("--samples", type=int, default=200, help="with conditions drawn independently (default 200)")
    parser.add_argument("--autoencoder_minutes", type=float, default=8.0)
    parser.add_argument("--diffusion_minutes", type=float, default=9.0)
    parser.add_argument("--brain_age_minutes", type=float, default=1.0)
    parser.add_argument(
        "--part_mb", type=float, help="beside weights that are larger, pieces NAME.00, NAME.01 ..., which `cat` joins"
    )
    parser.add_argument("--device", default="cuda", help="of the networks (default cuda)")
    parser.add_argument("--rehearse", action="store_true", help="all of it with configs/tiny.yaml, on a CPU too")
    return parser


def train(machine: Machine) -> None:
    """All stages that are not done yet."""
    stages: dict[str, Callable[[Machine], None]] = {
        "phantoms": make_phantoms,
        "autoencoder": train_autoencoder,
        "latents": encode,
        "diffusion": train_diffusion,
        "brain_age": train_brain_age,
        "samples": sample,
        "figures": draw_figures,
        "evaluation": evaluate,
    }
    for name, stage in stages.items():
        if name not in machine.plan["done"] or not _is_there(name, machine):
            logger.info("stage %s", name)
            stage(machine)
            machine.plan["done"] = [*(one for one in machine.plan["done"] if one != name), name]
            machine.keep_plan()


def _is_there(stage: str, machine: Machine) -> bool:
    """Whether what a finished stage made is still there, or not needed any more."""
    made, later = NEEDED.get(stage, ("", ()))
    needed = any(one not in machine.plan["done"] for one in later)
    return not needed or (machine.work_dir / made).exists()


def make_phantoms(machine: Machine) -> None:
    """Those to train on, and those of another seed."""
    for seed, name, number in ((1, "phantoms", machine.options.phantoms), (2, "held_out", machine.options.held_out)):
        flags = {"num_phantoms": number, "seed": seed, "independent": 1, "device": "cpu"}
        folder = {"output_dir": machine.work_dir / name}
        machine.run("phantoms", {**flags, **folder}, machine.options.processes)


def train_autoencoder(machine: Machine) -> None:
    """Stage 1. Its weights are shipped in float16, and everything after it uses them as shipped."""
    _train(machine, "autoencoder", {"dataset_dir": machine.work_dir / "phantoms"})
    _ship(machine, "autoencoder")


def encode(machine: Machine) -> None:
    """The latents of all phantoms."""
    folders = {"dataset_dir": machine.work_dir / "phantoms", "latents_dir": machine.work_dir / "latents"}
    machine.run("encode_latents", {**folders, **_autoencoder(machine), "device": machine.options.device})


def train_diffusion(machine: Machine) -> None:
    """Stage 2."""
    flags: dict[str, Any] = {"latents_dir": machine.work_dir / "latents", **_autoencoder(machine)}
    shipped, run = machine.deliver_dir / "diffusion.safetensors", machine.work_dir / "runs" / "diffusion"
    if shipped.is_file() and not run.exists():
        flags["pretrained"] = shipped
    _train(machine, "diffusion", flags)
    _ship(machine, "diffusion")


def train_brain_age(machine: Machine) -> None:
    """The network that tells a phantom's age."""
    _train(machine, "brain_age", {"dataset_dir": machine.work_dir / "phantoms"})


def sample(machine: Machine) -> None:
    """Volumes whose conditions are drawn independently, uniformly between 0 and 1."""
    parser = ConfigParser.load_config_files([str(ROOT / BASE), str(ROOT / DEMO)])
    conditions: Conditions = ConfigParser(parser).get_parsed_content("conditions")
    table, random = machine.work_dir / "conditions.tsv", np.random.default_rng(12345)
    rows = [{one.name: random.random() for one in conditions} for _ in range(machine.options.samples)]
    write_table(table, [{**row, "gender": round(row["gender"])} for row in rows])
    flags = {"conditions_table": table, "output_dir": machine.work_dir / "samples", "batch_size": 4, "seed": 1000}
    machine.run(None, {**flags, **_networks(machine), "device": machine.options.device})


def draw_figures(machine: Machine) -> None:
    """Samples beyond the range of training, as in the paper's Figure 4, and eight of the samples beside each other."""
    folder, beside = machine.work_dir / "figures", machine.work_dir / "side_by_side"
    columns = [{"ventricular_vol": value} for value in (-0.5, 0.0, 1.0, 1.5, 1.9)]
    cells = {"figure": "extrapolation", "rows": [{}], "columns": columns, "seed": 500}
    machine.run("figures", {**cells, "output_dir": folder, **_networks(machine), "device": machine.options.device})
    models = {"demo": str(machine.work_dir / "samples")}
    machine.run("side_by_side", {"models": models, "count": min(8, machine.options.samples), "output_dir": beside})


def evaluate(machine: Machine) -> None:
    """Samples against held-out phantoms and the phantoms trained on; reconstructions of the held-out ones.

    FID, KID and the search for copies take part where HighRes3DNet's weights are there, as no network may be.
    """
    folders = {
        "synthetic_dir": machine.work_dir / "samples",
        "real_dir": machine.work_dir / "held_out",
        "reconstruct_dir": machine.work_dir / "held_out",
        "output_dir": machine.work_dir / "evaluation",
        "brain_age_path": machine.work_dir / "runs" / "brain_age" / "brain_age.pt",
    }
    copies = {"features": "highres3dnet", "training_dir": machine.work_dir / "phantoms"}
    searched = {**copies, "feature_networks::highres3dnet::shrink": 4} if HIGHRES3DNET.is_file() else {}
    flags = {"num_pairs": 100, **_autoencoder(machine), "device": machine.options.device}
    machine.run("evaluate", {**folders, **searched, **flags})


def _train(machine: Machine, name: str, flags: Mapping[str, Any]) -> None:
    """One training, of as many iterations as fit its minutes."""
    verb, own = TRAININGS[name]
    options: dict[str, Any] = {**own, **flags, "lr_decay": "cosine", "seed": 1, **_computing(machine)}
    run, probe = (machine.work_dir / folder / name for folder in ("runs", "probes"))
    if name not in machine.plan:
        every = {"max_epochs": 2, "epoch_length": PROBED, "checkpoint_every": PROBED, "validate_every": 0}
        shutil.rmtree(probe, ignore_errors=True)
        machine.run(verb, {**options, **every, "run_dir": probe})
        first, last = ((probe / f"checkpoint_iteration={n * PROBED}.pt").stat().st_mtime for n in (1, 2))
        seconds = (last - first) / PROBED
        minutes = getattr(machine.options, f"{name}_minutes")
        machine.plan[name] = {"seconds_an_iteration": seconds, "epoch_length": max(1, int(3 * minutes / seconds))}
        machine.keep_plan()
    planned = {"max_epochs": EPOCHS, "epoch_length": machine.plan[name]["epoch_length"], "validation_limit": 8}
    machine.run(verb, {**options, **planned, "run_dir": run})


def _computing(machine: Machine) -> dict[str, Any]:
    """bfloat16 on a GPU; on a CPU float32, as some of these compute bfloat16 wrongly where volumes are tiny."""
    gpu = machine.options.device != "cpu"
    return {
        "device": machine.options.device,
        "amp": int(gpu),
        "num_workers": machine.options.processes // 2 if gpu else 0,
    }


def _ship(machine: Machine, network: str) -> None:
    result = machine.work_dir / "runs" / network / f"{network}.pt"
    if result.is_file():
        shipped = machine.deliver_dir / f"{network}.safetensors"
        write_safetensors(shipped, result, network)
        for old in _parts(shipped):
            old.unlink()
        if machine.options.part_mb:
            _write_parts(shipped, int(machine.options.part_mb * 1e6))


def _parts(file: Path) -> list[Path]:
    """The pieces of a file, in their order."""
    return sorted(file.parent.glob(f"{file.name}.[0-9][0-9]"))


def _write_parts(file: Path, size: int) -> None:
    """Pieces of at most `size` bytes, NAME.00, NAME.01 ..., of a larger file."""
    content = file.read_bytes()
    if len(content) > 100 * size:
        raise BundleError(f"--part_mb: {file} would be more than 100 pieces")
    for number, start in enumerate(range(0, len(content) if len(content) > size else 0, size)):
        with replacing(file.with_name(f"{file.name}.{number:02d}")) as temporary:
            temporary.write_bytes(content[start : start + size])


def _join_parts(file: Path) -> None:
    """The file of its pieces, where they alone are there."""
    parts = _parts(file)
    if parts and not file.is_file():
        with replacing(file) as temporary:
            temporary.write_bytes(b"".join(part.read_bytes() for part in parts))


def _autoencoder(machine: Machine) -> dict[str, Any]:
    return {"autoencoder_path": machine.deliver_dir / "autoencoder.safetensors", "load_old": 0}


def _networks(machine: Machine) -> dict[str, Any]:
    return {**_autoencoder(machine), "diffusion_path": machine.deliver_dir / "diffusion.safetensors"}


def deliver(machine: Machine) -> None:
    """What there is now: weights, curves, figures of the evaluation."""
    for network in ("autoencoder", "diffusion"):
        run = machine.work_dir / "runs" / network
        if run.is_dir():
            _ship(machine, network)
        if (run / FILE).is_file():
            draw(losses(run), validations(run), machine.deliver_dir / f"{network}.png")
    for name in DELIVERED:
        made = machine.work_dir / name
        if made.is_file():
            shutil.copyfile(made, machine.deliver_dir / made.name)


if __name__ == "__main__":
    main()
