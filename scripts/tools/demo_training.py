# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.demo_training`: the small model of configs/demo.yaml, from phantoms to weights and figures.

Each stage is one command of the bundle with the overlay of --config: phantoms, stage 1, its decoder by itself,
encoding, stage 2, the age network, samples, the paper's Figure 4 and the evaluation. Trainings go by the clock: each
ends when its minutes are over, with a learning rate that has fallen to 0 by then (`--max_minutes`). The autoencoder
starts on the first phantoms, and goes on with all of them once idle cores have made the others.

With --minutes the program stops in time, and the same command goes on where it stopped; with --fit 1 the stages'
minutes are parts of those that are left. What has been reached is in --deliver_dir, in few small files, each minute.
Where --work_dir was lost but --deliver_dir is there, the weights in it are taken over: a finished autoencoder is not
trained again, and the diffusion model goes on from its weights. `--set diffusion.batch_size=64` changes an option of a
stage.
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from safetensors import SafetensorError

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_json
from scripts.core.paths import MODELS, ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table, write_table
from scripts.core.verbs import merge, used_ids
from scripts.networks.weights import write_safetensors
from scripts.tools.curves import draw, losses, validations
from scripts.training.checkpointing import Checkpoints
from scripts.training.loss_record import FILE
from scripts.volumes.datasets import TABLE

logger = logging.getLogger(__name__)

BASE, DEMO, TINY = "configs/inference.json", "configs/demo.yaml", "configs/tiny.yaml"
EPOCH_LENGTH, EPOCHS = 100, 10**6  # the minutes end a training
GRACE_S, POLL_S, DELIVER_S = 30.0, 0.5, 60.0
HIGHRES3DNET, PERCEPTUAL = MODELS / "highres3dnet.pth", MODELS / "perceptual_vgg16.safetensors"
DELIVERED = (
    "evaluation/evaluation.html",
    "evaluation/evaluation.json",
    "evaluation/table_1.tsv",
    "evaluation/reconstruction.png",
    "figures/extrapolation.png",
    "side_by_side/models.png",
)
FIRST = "autoencoder_first.safetensors"  # before its decoder was trained by itself
NEEDED = {
    "phantoms": ("held_out/participants.tsv", ("latents", "diffusion", "brain_age", "evaluation")),
    "latents": ("latents", ("diffusion",)),
    "brain_age": ("runs/brain_age/brain_age.pt", ("evaluation",)),
    "samples": ("samples", ("figures", "evaluation")),
}
"""What a stage makes in the work folder, and which later stages read it."""

ON_DEVICE = {"device_augmentation": 1, "affine": 0, "intensity_shift": 0, "gamma": 0}
TRAININGS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "autoencoder": (("train_autoencoder",), "autoencoder", {"adversarial_weight": 0, "lr": 4.0e-4, **ON_DEVICE}),
    "decoder": (
        ("train_autoencoder", "finetune"),
        "autoencoder",
        {"freeze": "['encoder','quant_conv_*']", "warm_up_epochs": 0, "lr": 2.0e-4, **ON_DEVICE},
    ),
    "diffusion": (
        ("train_diffusion",),
        "diffusion",
        {"batch_size": 16, "lr": 4.0e-4, "ema_decay": 0.999, "condition_dropout": 0.1},
    ),
    "brain_age": (("train_brain_age",), "brain_age", {}),
}
"""Stage -> overlays, the network's name in the checkpoints, options."""

OTHER_MINUTES = {"phantoms": 0.5, "latents": 0.3, "samples": 0.4, "figures": 0.3, "evaluation": 0.7}
"""What stages without minutes of their own are taken to need where all are to fit."""


@dataclass
class Machine:
    """What the stages share: where they write, how much, and until when.

    Attributes:
        work_dir: phantoms, runs, latents, samples.
        deliver_dir: what is to be kept: weights in float16, curves, evaluation, `plan.json`.
        options: the command line.
        deadline: of `time.monotonic()`.
        plan: of each training, its `minutes`; and the stages that are `done`.
        delivered: when, by `time.monotonic()`.
        rest: what is made in the background, if anything is.
    """

    work_dir: Path
    deliver_dir: Path
    options: argparse.Namespace
    deadline: float
    plan: dict[str, Any] = field(default_factory=dict)
    delivered: float = 0.0
    rest: Future[None] | None = None

    def run(
        self,
        verb: str | None,
        flags: Mapping[str, Any],
        processes: int = 1,
        fine_tuning: bool = False,
        until: Callable[[], bool] | None = None,
    ) -> bool:
        """One command of the bundle with the overlay; it is told to stop shortly before the deadline.

        Args:
            verb: its own overlay; None samples.
            flags: its options.
            processes: in how many.
            fine_tuning: whether it starts from given weights.
            until: stop it when this becomes true.

        Returns:
            Whether it came to its end, and was not stopped by `until`.

        Raises:
            OutOfTimeError: if it had to be stopped for want of time.
            BundleError: if it failed.
        """
        verbs = [f"configs/{verb}.yaml"] if verb else []
        last = [*(["configs/finetune.yaml"] if fine_tuning else []), *([TINY] if self.options.rehearse else [])]
        files = [BASE, *verbs, self.options.config, *last]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        used = used_ids(merge(ROOT / file for file in files))
        halved_twice = self.options.rehearse and "autoencoder_channels" in used  # as the tiny grid can be
        smaller = {"autoencoder_channels": [8, 16]} if halved_twice else {}
        given = [str(part) for name, value in {**flags, **smaller}.items() for part in (f"--{name}", value)]
        command = ["-m", "monai.bundle", "run", "--config_file", str(files), *given]
        return self.call([sys.executable, *(launcher if processes > 1 else []), *command], until)

    def call(self, command: Sequence[str], until: Callable[[], bool] | None = None) -> bool:
        """As `run`, any command."""
        if self.left() <= 0:
            raise OutOfTimeError
        several = "torch.distributed.run" in command
        kind = ["nice", "-n", "10"] if several and shutil.which("nice") else []
        one_thread = {"OMP_NUM_THREADS": "1"} if several else {}
        process = subprocess.Popen([*kind, *command], cwd=ROOT, env={**os.environ, **one_thread})
        while process.poll() is None:
            time.sleep(POLL_S)
            if self.left() <= 0 or (until is not None and until()):
                process.send_signal(signal.SIGTERM)
                process.wait()
                if self.left() <= 0:
                    raise OutOfTimeError
                return False
            if not several and time.monotonic() - self.delivered > DELIVER_S:
                self.deliver_what_there_is()
        if process.returncode:
            raise BundleError(
                f"{' '.join(command[2:8])} ... ended with exit code {process.returncode}: its message is above"
            )
        return True

    def deliver_what_there_is(self) -> None:
        """The weights so far; where they cannot be written, as on a full disk, the training goes on."""
        try:
            deliver_weights(self)
        except (BundleError, SafetensorError) as error:
            logger.error(f"weights were not delivered: {error}")

    def minutes(self, stage: str) -> float:
        """Of a training: those of its option, or with --fit its part of those that are left, as first planned."""
        if stage not in self.plan:
            own = {name: getattr(self.options, f"{name}_minutes") for name in TRAININGS}
            parts = {**OTHER_MINUTES, **own}
            later = sum(parts[name] for name in STAGES if name not in self.plan["done"])
            left = self.left() / 60.0 if self.options.fit else later
            self.plan[stage] = {"minutes": round(max(0.01, min(left * own[stage] / later, 1.0e6)), 3)}
            self.keep_plan()
        return self.plan[stage]["minutes"]

    def chosen(self, stage: str) -> dict[str, str]:
        """What --set says of a stage."""
        pairs = [word.partition("=")[::2] for word in self.options.set]
        return {name.partition(".")[2]: value for name, value in pairs if name.partition(".")[0] == stage}

    def wait_for_rest(self) -> None:
        """Until what is made in the background is there; where that fails, go on with what was made."""
        rest, self.rest = self.rest, None
        try:
            if rest is not None:
                rest.result()
        except BundleError as error:
            logger.error(f"not all phantoms were made: {error}")

    def left(self) -> float:
        """Seconds until the last moment at which a command can be told to stop."""
        return self.deadline - GRACE_S - time.monotonic()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """On a signal: as if the minutes were over."""
        self.deadline = time.monotonic()

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
    if wrong := [word for word in options.set if word.partition(".")[0] not in STAGES or "=" not in word]:
        sys.exit(f"error: --set takes STAGE.OPTION=VALUE, with a stage of {', '.join(STAGES)}, not {wrong[0]}")
    if options.fit and not options.minutes:
        sys.exit("error: --fit 1 needs --minutes")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    deadline = time.monotonic() + 60.0 * options.minutes if options.minutes else float("inf")
    machine = Machine(make_folder(options.work_dir), make_folder(options.deliver_dir), options, deadline)
    signal.signal(signal.SIGTERM, machine.stop)
    kept = machine.deliver_dir / "plan.json"
    machine.plan = json.loads(kept.read_text()) if kept.is_file() else {"done": []}
    with errors_in_one_line():
        for network in ("autoencoder", "diffusion"):
            _join_parts(machine.deliver_dir / f"{network}.safetensors")
        try:
            try:
                train(machine)
            finally:
                machine.deadline = time.monotonic()  # for what is made in the background
                deliver(machine)
            logger.info(f"all stages up to {options.until} are done: {machine.deliver_dir}")
        except OutOfTimeError:
            logger.info("stopped in time: the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts demo_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work_dir", default="runs/demo", help="phantoms, runs, latents, samples (default runs/demo)")
    parser.add_argument("--deliver_dir", default="runs/demo/delivered", help="weights, curves and the evaluation")
    parser.add_argument("--config", default=DEMO, help=f"overlay of the model (default {DEMO})")
    parser.add_argument("--minutes", type=float, help="after which to stop; the same command then goes on")
    parser.add_argument("--until", choices=list(STAGES), default=list(STAGES)[-1], help="stage after which to stop")
    parser.add_argument("--fit", type=int, choices=(0, 1), default=0, help="1: all stages within --minutes")
    parser.add_argument("--set", nargs="+", default=[], metavar="STAGE.OPTION=VALUE", help="other options of a stage")
    parser.add_argument("--heads_dir", default="dataset", help="prepared example heads, whole (default dataset)")
    parser.add_argument("--perceptual_path", default=PERCEPTUAL, help="used where it is (make perceptual-weights)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that make phantoms (default: all cores)")
    parser.add_argument("--phantoms", type=int, default=480, help="to train on (default 480)")
    parser.add_argument("--first", type=int, default=480, help="on which the autoencoder starts (default: all)")
    parser.add_argument("--held_out", type=int, default=40, help="phantoms of another seed (default 40)")
    parser.add_argument("--samples", type=int, default=200, help="with conditions drawn independently (default 200)")
    parser.add_argument("--pairs", type=int, default=100, help="of the evaluation's MS-SSIM (default 100)")
    parser.add_argument("--autoencoder_minutes", type=float, default=8.0)
    parser.add_argument("--decoder_minutes", type=float, default=0.0, help="with adversarial loss; 0: none (default)")
    parser.add_argument("--diffusion_minutes", type=float, default=9.0)
    parser.add_argument("--brain_age_minutes", type=float, default=1.0, help="0: none")
    parser.add_argument(
        "--part_mb", type=float, help="beside weights that are larger, pieces NAME.00, NAME.01 ..., which `cat` joins"
    )
    parser.add_argument("--device", default="cuda", help="of the networks (default cuda)")
    parser.add_argument("--rehearse", action="store_true", help="all of it with configs/tiny.yaml, on a CPU too")
    return parser


def train(machine: Machine) -> None:
    """All stages that are not done yet, up to the one that --until names."""
    for name in list(STAGES)[: list(STAGES).index(machine.options.until) + 1]:
        if name not in machine.plan["done"] or not _is_there(name, machine):
            logger.info("stage %s", name)
            STAGES[name](machine)
            machine.plan["done"] = [*(one for one in machine.plan["done"] if one != name), name]
            machine.keep_plan()
    machine.wait_for_rest()


def _is_there(stage: str, machine: Machine) -> bool:
    """Whether what a finished stage made is still there, or not needed any more."""
    made, later = NEEDED.get(stage, ("", ()))
    needed = any(one not in machine.plan["done"] for one in later)
    return not needed or (machine.work_dir / made).exists()


def make_phantoms(machine: Machine) -> None:
    """The first of those to train on; the others, and those of another seed, are made in the background."""
    first = min(machine.options.first, machine.options.phantoms)
    _make(machine, first, 1, "phantoms")
    machine.rest = ThreadPoolExecutor(1).submit(_make_rest, machine)
    if first == machine.options.phantoms:
        machine.wait_for_rest()


def _make_rest(machine: Machine) -> None:
    if machine.options.first < machine.options.phantoms:
        _make(machine, machine.options.phantoms, 1, "phantoms")
    _make(machine, machine.options.held_out, 2, "held_out")  # last: where it is, nothing is missing


def _make(machine: Machine, number: int, seed: int, name: str) -> None:
    flags = {"num_phantoms": number, "seed": seed, "independent": 1, "device": "cpu"}
    heads = Path(machine.options.heads_dir).resolve()
    names = sorted(row["participant_id"] for row in read_table(heads / TABLE, ("participant_id",)))
    where = {"heads_dir": heads, "heads": names, "output_dir": machine.work_dir / name}
    chosen = machine.chosen("phantoms")
    machine.run("phantoms", {**flags, **where, **chosen}, min(machine.options.processes, max(1, number)))


def train_autoencoder(machine: Machine) -> None:
    """Stage 1. Its weights are shipped in float16, and everything after it uses them as shipped."""
    data = {"dataset_dir": machine.work_dir / "phantoms", **_perceptual(machine, "decoder")}
    if machine.rest is not None and _train(machine, "autoencoder", data, machine.rest.done):
        return
    machine.wait_for_rest()
    _train(machine, "autoencoder", data)


def train_decoder(machine: Machine) -> None:
    """The decoder by itself, against a discriminator, and with the perceptual loss where its network is there."""
    if machine.options.decoder_minutes > 0.0:
        pretrained = {"pretrained": machine.deliver_dir / FIRST, "dataset_dir": machine.work_dir / "phantoms"}
        if not (machine.deliver_dir / FIRST).is_file():
            shutil.copyfile(machine.deliver_dir / "autoencoder.safetensors", machine.deliver_dir / FIRST)
        _train(machine, "decoder", {**pretrained, **_perceptual(machine)})


def _perceptual(machine: Machine, *instead: str) -> dict[str, Any]:
    """No perceptual loss where its network is not there, or where another stage is there for it."""
    left_to = any(getattr(machine.options, f"{stage}_minutes") > 0.0 for stage in instead)
    path = Path(machine.options.perceptual_path).resolve()
    return {"perceptual_path": path} if path.is_file() and not left_to else {"perceptual_weight": 0}


def encode(machine: Machine) -> None:
    """The latents of all phantoms."""
    machine.wait_for_rest()
    folders = {"dataset_dir": machine.work_dir / "phantoms", "latents_dir": machine.work_dir / "latents"}
    computing = {**_computing(machine), **machine.chosen("latents")}
    machine.run("encode_latents", {**folders, **_autoencoder(machine), **computing})


def train_diffusion(machine: Machine) -> None:
    """Stage 2."""
    flags: dict[str, Any] = {"latents_dir": machine.work_dir / "latents", **_autoencoder(machine)}
    shipped, run = machine.deliver_dir / "diffusion.safetensors", machine.work_dir / "runs" / "diffusion"
    if shipped.is_file() and not run.exists():
        flags["pretrained"] = shipped
    _train(machine, "diffusion", flags)


def train_brain_age(machine: Machine) -> None:
    """The network that tells a phantom's age."""
    if machine.options.brain_age_minutes > 0.0:
        _train(machine, "brain_age", {"dataset_dir": machine.work_dir / "phantoms"})


def sample(machine: Machine) -> None:
    """Volumes whose conditions are drawn independently, uniformly between 0 and 1."""
    parser = ConfigParser.load_config_files([str(ROOT / BASE), str(ROOT / machine.options.config)])
    conditions: Conditions = ConfigParser(parser).get_parsed_content("conditions")
    table, random = machine.work_dir / "conditions.tsv", np.random.default_rng(12345)
    rows = [{one.name: random.random() for one in conditions} for _ in range(machine.options.samples)]
    write_table(table, [{**row, "gender": round(row["gender"])} for row in rows])
    flags = {"conditions_table": table, "output_dir": machine.work_dir / "samples", "batch_size": 4, "seed": 1000}
    machine.run(None, {**flags, **_networks(machine), **_precision(machine), **machine.chosen("samples")})


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
    }
    if machine.options.brain_age_minutes > 0.0:
        folders["brain_age_path"] = machine.work_dir / "runs" / "brain_age" / "brain_age.pt"
    copies = {"features": "highres3dnet", "training_dir": machine.work_dir / "phantoms"}
    searched = {**copies, "feature_networks::highres3dnet::shrink": 4} if HIGHRES3DNET.is_file() else {}
    flags = {"num_pairs": machine.options.pairs, **_autoencoder(machine), "device": machine.options.device}
    machine.run("evaluate", {**folders, **searched, **flags, **machine.chosen("evaluation")})


STAGES: dict[str, Callable[[Machine], None]] = {
    "phantoms": make_phantoms,
    "autoencoder": train_autoencoder,
    "decoder": train_decoder,
    "latents": encode,
    "diffusion": train_diffusion,
    "brain_age": train_brain_age,
    "samples": sample,
    "figures": draw_figures,
    "evaluation": evaluate,
}


def _train(machine: Machine, name: str, flags: Mapping[str, Any], until: Callable[[], bool] | None = None) -> bool:
    """One training, until its minutes are over; whether they are."""
    (verb, *fine_tuning), _, own = TRAININGS[name]
    limits = {"max_minutes": machine.minutes(name), "checkpoint_minutes": 1, "max_epochs": EPOCHS}
    seldom = {"epoch_length": EPOCH_LENGTH, "checkpoint_every": EPOCHS, "validate_every": EPOCHS, "validation_limit": 8}
    options = {**own, **flags, **limits, **seldom, "lr_decay": "cosine", "seed": 1, **_computing(machine)}
    given = {**options, "run_dir": machine.work_dir / "runs" / name, **machine.chosen(name)}
    ended = machine.run(verb, given, fine_tuning=bool(fine_tuning), until=until)
    deliver_weights(machine)
    return ended


def _precision(machine: Machine) -> dict[str, Any]:
    """bfloat16 on a GPU; on a CPU float32, as some of these compute bfloat16 wrongly where volumes are tiny."""
    return {"device": machine.options.device, "amp": int(machine.options.device != "cpu")}


def _computing(machine: Machine) -> dict[str, Any]:
    loading = min(8, machine.options.processes // 2) if machine.options.device != "cpu" else 0
    return {**_precision(machine), "num_workers": loading}


def deliver_weights(machine: Machine) -> None:
    """The newest weights of each network that ships, of a training that has ended or is going on."""
    machine.delivered = time.monotonic()
    newest: dict[str, Path] = {}
    for stage in ("autoencoder", "decoder", "diffusion"):
        network, run = TRAININGS[stage][1], machine.work_dir / "runs" / stage
        found = [path for path in (*Checkpoints(run).paths(), run / f"{network}.pt") if path.is_file()]
        newest |= {network: max(found, key=lambda path: path.stat().st_mtime)} if found else {}
    for network, checkpoint in newest.items():
        _ship(machine, checkpoint, network)


def _ship(machine: Machine, checkpoint: Path, network: str) -> None:
    shipped = machine.deliver_dir / f"{network}.safetensors"
    write_safetensors(shipped, checkpoint, network)
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
    deliver_weights(machine)
    for stage in TRAININGS:
        run = machine.work_dir / "runs" / stage
        if (run / FILE).is_file():
            draw(losses(run), validations(run), machine.deliver_dir / f"{stage}.png")
    for name in DELIVERED:
        made = machine.work_dir / name
        if made.is_file():
            shutil.copyfile(made, machine.deliver_dir / made.name)


if __name__ == "__main__":
    main()
