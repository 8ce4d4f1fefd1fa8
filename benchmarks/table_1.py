# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Trains a model of each family on the same phantoms for the same minutes, and measures them alike, as Table 1.

At 4 mm, on a CPU: what a table of this size shows is that all of it runs, and how fast each family learns, not which
is best at full size. A model of two stages has half of the minutes for each. The same command goes on where it was
stopped.

    python -m benchmarks.table_1 --minutes 30 --folder runs/table_1

Writes table_1.tsv, heads/models.png with one row of heads a model, and evaluation/ into the folder. FID takes part
where the weights of HighRes3DNet are in models/.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import bundle_command, configuration, run
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, write_json
from scripts.core.paths import MODELS as WEIGHTS
from scripts.core.paths import ROOT
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table, write_table
from scripts.diffusion.targets import TARGETS
from scripts.training.loss_record import FILE, read_lines
from scripts.volumes.folders import TABLE

logger = logging.getLogger(__name__)

GRID = str(ROOT / "benchmarks" / "table_1.yaml")
FOREVER = {"max_epochs": 10**6, "validate_every": 0, "num_workers": 0, "seed": 1}
HIGHRES3DNET = WEIGHTS / "highres3dnet.pth"
AUTOENCODER = {
    "autoencoder_channels": [16, 32, 64],
    "autoencoder_def::num_res_blocks": 1,
    "autoencoder_def::norm_num_groups": 8,
}
UNET = {
    "network_def::num_res_blocks": 1,
    "network_def::norm_num_groups": 8,
}
LATENTS = {**AUTOENCODER, "network_def::channels": [64, 128]}  # their sides are multiples of what these channels need
LATENT = {
    **LATENTS,
    **UNET,
    "network_def::attention_levels": [False, True],
    "network_def::num_head_channels": [0, 64],
}
PIXEL = {**UNET, "network_def::channels": [16, 32, 64], "network_def::num_head_channels": 8}
L1_ALONE = {"lr": 1.0e-3, "lr_decay": "cosine", "perceptual_weight": 0, "adversarial_weight": 0}
GAN = {"generator_channels": [64, 32, 16, 8], "noise_size": 64}


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        family: its name in `families`.
        verb: the file that trains it.
        overlays: files of `configs/` besides.
        flags: of training and of sampling.
        training: of training alone.
        sampling: of sampling alone.
        weights: the flag that takes what was trained.
        runs: its training's folder, which rows of one training share.
    """

    family: str
    verb: str
    runs: str
    weights: str
    overlays: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_latent(self) -> bool:
        """Whether an autoencoder is trained first."""
        return self.family == "latent_diffusion"

    @property
    def is_conditional(self) -> bool:
        """Whether its samples have conditions."""
        return self.weights == "diffusion_path"


def models() -> dict[str, Model]:
    """The rows by name: LSGAN and VAE-GAN, latent diffusion by two samplers, pixel diffusion with each target."""
    gans = {
        name: Model(
            family,
            "train_gan.yaml",
            family,
            "generator_path",
            flags={**GAN, "family": family},
            training={"gan_discriminator_channels": [8, 16, 32]},
        )
        for name, family in (("LSGAN", "lsgan"), ("VAE-GAN", "vae_gan"))
    }
    step = {"lr": 1.0e-3, "lr_decay": "cosine", "ema_decay": 0.999, "batch_size": 4}
    latents = {
        name: Model(
            "latent_diffusion",
            "train_diffusion.yaml",
            "ldm",
            "diffusion_path",
            flags=LATENT,
            training={**step, "sample_every": 0},
            sampling=sampling,
        )
        for name, sampling in (("LDM-DDPM-1000", {"sampler": "ddpm"}), ("LDM-DDIM-50", {"sampler": "ddim"}))
    }
    pixels = {
        f"pixel-{target}": Model(
            "pixel_diffusion",
            "train_diffusion.yaml",
            f"pixel_{target}",
            "diffusion_path",
            ("pixel.yaml",),
            {**PIXEL, "target": target},
            {**step, "sample_every": 0},
        )
        for target in TARGETS
    }
    return {**gans, **latents, **pixels}


class Table:
    """The folder that the table is made in, a stage after the other.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, make_folder(Path(options.folder).resolve())
        given = {"train": options.train_dir, "held_out": options.held_out_dir}
        self.data = {name: Path(path).resolve() if path else self.folder / name for name, path in given.items()}
        known = configuration(["inference.json"])["families"]
        wanted = options.models or list(models())
        self.models = {name: model for name, model in models().items() if name in wanted and model.family in known}
        for name, path in given.items():
            if path and not (self.data[name] / TABLE).is_file():
                raise BundleError(f"--{name}_dir: there is no {TABLE} in {path}: give a prepared dataset")
        if unknown := [name for name in wanted if name not in models()]:
            raise BundleError(f"--models: there is no '{unknown[0]}'; there are {', '.join(models())}")

    def make(self) -> None:
        """All stages; what is done is not done again."""
        self._phantoms()
        for name, model in self.models.items():
            logger.info(f"{name}")
            self._train(model)
            self._sample(name, model)
        self._evaluate()
        self._write()

    def command(self, files: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
        """A command of the bundle on the coarse grid, on a CPU."""
        return bundle_command(["inference.json", *files, GRID], {"device": "cpu", **flags})

    def _phantoms(self) -> None:
        """Those that all train on, and those of another seed to compare with."""
        for seed, name, count in ((1, "train", self.options.phantoms), (2, "held_out", self.options.held_out)):
            if self.data[name] != self.folder / name:
                continue
            flags = {"num_phantoms": count, "seed": seed, "independent": 1, "output_dir": self.folder / name}
            run(
                self.command(["phantoms.yaml"], {**flags, "heads_dir": Path(self.options.heads_dir).resolve()}),
                self.folder / name,
            )

    def _train(self, model: Model) -> None:
        minutes, data = self.options.minutes, {"dataset_dir": self.data["train"]}
        if model.is_latent:
            minutes /= 2
            stage = {**FOREVER, **AUTOENCODER, **data, **L1_ALONE, "initial_log_variance": -8}
            self._train_for(minutes, "autoencoder", ["train_autoencoder.yaml"], stage)
            latents = self.folder / "latents"
            if not (latents / "encoding.json").is_file():
                flags = {**LATENTS, **data, **self._autoencoder(), "latents_dir": latents, "num_workers": 0}
                run(self.command(["encode_latents.yaml"], flags), latents)
            data = {"latents_dir": latents, **self._autoencoder()}
        flags = {**FOREVER, **model.flags, **model.training, **data}
        self._train_for(minutes, model.runs, [model.verb, *model.overlays], flags)

    def _train_for(self, minutes: float, name: str, files: Sequence[str], flags: Mapping[str, Any]) -> None:
        """One training until it has computed for so long, or one of fewer minutes gone on with."""
        folder, record = self.folder / "runs" / name, self.folder / "runs" / f"{name}.json"
        if record.is_file() and json.loads(record.read_text())["minutes"] >= minutes:
            return
        run(self.command(files, {**flags, "max_minutes": minutes, "run_dir": folder}), make_folder(folder))
        write_json(record, {"minutes": minutes})

    def _weights(self, runs: str) -> Path:
        return self.folder / "runs" / runs / f"{RESULTS.get(runs, 'diffusion')}.pt"

    def _autoencoder(self) -> dict[str, Any]:
        return {"autoencoder_path": self._weights("autoencoder"), "load_old": 0}

    def _sample(self, name: str, model: Model) -> None:
        """The samples of a row, with the conditions of the held-out phantoms, and what one costs."""
        folder, record = self._samples(name), self.folder / "samples" / f"{name}.json"
        if record.is_file():
            return
        flags = {**model.flags, **model.sampling, model.weights: self._weights(model.runs)}
        flags |= {"load_old": 0, **(self._autoencoder() if model.is_latent else {})}
        table = {"conditions_table": self.data["held_out"] / TABLE}
        flags |= {"num_inference_steps": self.options.steps} if self.options.steps and model.is_conditional else {}
        asked = table if model.is_conditional else {"num_samples": self.options.held_out}
        flags |= {**asked, "seed": 1, "output_dir": folder, "write_threads": 0}
        found = run(self.command(model.overlays, flags), make_folder(record.parent) / name)
        times = sorted(path.stat().st_mtime for path in folder.glob("*.json"))
        seconds = (times[-1] - times[0]) / max(1, len(times) - 1)
        write_json(record, {"seconds": round(seconds, 2), "peak_gib": found["peak_gib"]})

    def _samples(self, name: str) -> Path:
        return self.folder / "samples" / name

    def _evaluate(self) -> None:
        """All rows side by side against the held-out phantoms, and their first heads in one picture."""
        folders = {name: str(self._samples(name)) for name in self.models}
        real = self.data["held_out"]
        fid = (
            {"features": "highres3dnet", "feature_networks::highres3dnet::shrink": 1} if HIGHRES3DNET.is_file() else {}
        )
        flags = {"synthetic_dir": folders, "real_dir": real, "num_pairs": self.options.num_pairs, **fid}
        evaluation = self.folder / "evaluation"
        run(self.command(["evaluate.yaml"], {**flags, "output_dir": evaluation}), evaluation)
        rows = {"models": {**folders, "real": str(real)}, "count": min(8, self.options.held_out)}
        run(self.command(["side_by_side.yaml"], {**rows, "output_dir": self.folder / "heads"}), self.folder / "heads")

    def _write(self) -> None:
        """The evaluation's table of models, with iterations, and seconds and memory a sample."""
        lines: list[dict[str, Any]] = []
        for line in read_table(self.folder / "evaluation" / "table_1.tsv"):
            name = next((one for one in self.models if one in line.values()), "")
            lines.append({**line, **(self._cost(name) if name else dict.fromkeys(COSTS, ""))})
        write_table(self.folder / "table_1.tsv", lines)
        logger.info(f"wrote {self.folder / 'table_1.tsv'} and heads/models.png; the report: evaluation/evaluation.html")

    def _cost(self, name: str) -> dict[str, Any]:
        record = json.loads((self.folder / "samples" / f"{name}.json").read_text())
        done = trained(self.folder / "runs" / self.models[name].runs)
        return dict(zip(COSTS, (done["iteration"], record["seconds"], record["peak_gib"])))


RESULTS = {name: name for name in ("autoencoder", "lsgan", "vae_gan")}
COSTS = ("iterations", "seconds a sample", "peak GiB")


def trained(folder: Path) -> dict[str, Any]:
    """What a training's record of losses says last: `iteration`, 0 where there is none."""
    last = {"iteration": 0}
    for line in read_lines(folder / FILE):
        last = line
    return last


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the table with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of computing for each model (default 30)")
    parser.add_argument("--folder", default="runs/table_1")
    parser.add_argument("--heads_dir", default="dataset", help="the prepared example heads (default dataset)")
    for name, what in (("train", "train on"), ("held_out", "compare with")):
        parser.add_argument(f"--{name}_dir", help=f"a prepared dataset to {what}, at 4 mm, in the place of phantoms")
    parser.add_argument("--phantoms", type=int, default=100, help="to train on (default 100)")
    parser.add_argument("--held_out", type=int, default=24, help="to compare with, and samples of a model (default 24)")
    parser.add_argument("--num_pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, help="of every sampler, for a rehearsal (default their own)")
    parser.add_argument(
        "--models", nargs="+", help=f"some of: {'; '.join(models())} (default all whose family there is)"
    )
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or min(options.phantoms, options.held_out) < 3:
        parser.error("--minutes must be above 0, and --phantoms and --held_out at least 3")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with errors_in_one_line():
        Table(options).make()


if __name__ == "__main__":
    main()
