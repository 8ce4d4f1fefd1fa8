# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How many steps are enough: samplers and lengths of trajectories, by their distance to a long trajectory.

From the same noise and conditions, each sampler walks trajectories of each length; the table has the root mean square
difference of latents and of volumes (0..1) to those of the reference, `ddim:1000` unless `--reference` says otherwise.
With `--measure 1`, the bundle's own commands then sample `--measured` volumes in each way, with conditions spread over
their ranges, and evaluate them: FID to `--real_dir`, ventricles against what was asked for, and what `--evaluate_flags`
add (see configs/evaluate.yaml). Samples and features that are there already are kept, so that it goes on where it was
stopped. Writes steps.json, steps.tsv and steps.png.

    python -m benchmarks.steps --output_dir steps
    python -m benchmarks.steps --output_dir steps --steps 5 10 20 50 --reference unipc:100
    python -m benchmarks.steps --output_dir steps --measure 1 --measured 100 --real_dir dataset \
        --evaluate_flags "--features highres3dnet"
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from torch import Tensor
from tqdm import tqdm

from benchmarks.measuring import machine
from scripts.core.errors import BundleError, find_bundle_error
from scripts.core.files import make_folder, replacing, write_json
from scripts.core.paths import ROOT
from scripts.core.tables import write_table
from scripts.diffusion.samplers import choose_sampler
from scripts.sampling.requests import sample_generator

BASE = "configs/inference.json"
EVALUATE = "configs/evaluate.yaml"
DISTANCES = {"latent_rmse": "of latents", "volume_rmse": "of volumes, 0..1"}
MEASURES = ("fid", "volumetry")
DRAWN = re.compile(r"FID \([^)]*\)$|Pearson's r of ")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command-line arguments."""
    options = _options(arguments)
    try:
        folder = make_folder(options.output_dir)
        rows = distances(options)
        _write(folder, rows, options)
        if options.measure:
            measured = evaluated(options, folder)
            rows = [{**row, **measured.get(_name(row["sampler"], row["steps"]), {})} for row in rows]
            _write(folder, rows, options)
    except Exception as error:
        known = find_bundle_error(error)
        if known is None:
            raise
        sys.exit(f"error: {known}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", nargs="*", default=["configs/demo.yaml"], help="of the base configuration")
    parser.add_argument("--bundle_root", default=str(ROOT), help="where the weights are")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm", "unipc"], help="those without fresh noise")
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50, 100])
    parser.add_argument("--reference", default="ddim:1000", help="sampler:steps")
    parser.add_argument("--samples", type=int, default=2, help="pairs of noise and conditions")
    parser.add_argument("--target", help="of the diffusion model; by default that of the configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=0, help="1: evaluate samples as well")
    parser.add_argument("--measured", type=int, default=50, help="samples of each way that are evaluated")
    parser.add_argument("--real_dir", help="folder of real volumes, for the evaluation")
    parser.add_argument("--evaluate_flags", default="", help="further flags of the evaluation, in one word")
    parser.add_argument("--output_dir", default="steps")
    return parser.parse_args(arguments)


def _target(options: argparse.Namespace) -> dict[str, str]:
    return {} if options.target is None else {"target": options.target}


def _name(sampler: str, steps: int) -> str:
    return f"{sampler}-{steps}"


class Trajectories:
    """The bundle's family, with noise and conditions that each way of sampling starts from.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        config = ConfigParser(ConfigParser.load_config_files([str(ROOT / f) for f in (BASE, *options.overlay)]))
        config.update({"bundle_root": options.bundle_root, "device": options.device, **_target(options)})
        self.samplers = config.get_parsed_content("samplers")
        self.family = config.get_parsed_content("chosen_family")
        self.device = config.get_parsed_content("compute_device")
        shape = config.get_parsed_content("latent_shape")
        self.generators = [sample_generator(options.seed, i) for i in range(options.samples)]
        self.noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)
        conditions = torch.rand(
            len(self.noise), len(config.get_parsed_content("conditions")), generator=self.generators[0]
        )
        self.conditions = conditions.to(self.device)

    def walk(self, sampler: str, steps: int) -> tuple[Tensor, Tensor, float]:
        """Latents and volumes (clipped to 0..1) on the CPU, and the seconds that one sample's latent took."""
        self.family.sampler = choose_sampler(self.samplers, sampler, steps)
        start = time.perf_counter()
        latent = self.family.sample_clean(self.noise, self.conditions, self.generators).cpu()
        seconds = (time.perf_counter() - start) / len(latent)
        return latent, self.family.decode(latent.to(self.device)).cpu().clamp(0.0, 1.0), seconds


def distances(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each sampler and number of steps: the distances to the reference."""
    trajectories = Trajectories(options)
    sampler, _, steps = options.reference.partition(":")
    latent, volume, seconds = trajectories.walk(sampler, steps)
    reference = {"sampler": sampler, "steps": int(steps), "seconds": round(seconds, 3), "reference": "yes"}
    rows = [{**reference, "latent_rmse": 0.0, "volume_rmse": 0.0}]
    for way in tqdm([(s, n) for s in options.samplers for n in options.steps], "samplers", disable=None):
        if way == (sampler, int(steps)):
            continue
        own_latent, own_volume, seconds = trajectories.walk(*way)
        found = {"latent_rmse": _rmse(own_latent, latent), "volume_rmse": _rmse(own_volume, volume)}
        rows.append({"sampler": way[0], "steps": way[1], "seconds": round(seconds, 3), "reference": "no", **found})
    return rows


def _rmse(found: Tensor, reference: Tensor) -> float:
    return float(f"{(found - reference).square().mean().sqrt().item():.4g}")


def evaluated(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Sample in each way and evaluate: name of the way -> measure and metric -> value."""
    table = folder / "conditions.tsv"
    _write_conditions(table, options)
    folders = {}
    for sampler, steps in [(s, n) for s in options.samplers for n in options.steps]:
        way = folders[_name(sampler, steps)] = folder / "samples" / _name(sampler, steps)
        flags = {"sampler": sampler, "num_inference_steps": steps, **_target(options), "seed": options.seed}
        _run(options, [], {**flags, "conditions_table": table, "output_dir": way})
    given = {"synthetic_dir": {name: str(path) for name, path in folders.items()}, "output_dir": folder / "evaluation"}
    real = {"real_dir": options.real_dir} if options.real_dir else {}
    _run(options, [EVALUATE], {**given, **real}, shlex.split(options.evaluate_flags))
    return read_measures(folder / "evaluation" / "evaluation.json")


def _write_conditions(path: Path, options: argparse.Namespace) -> None:
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / f) for f in (BASE, *options.overlay)]))
    conditions = list(config.get_parsed_content("conditions"))
    values = torch.quasirandom.SobolEngine(len(conditions), scramble=True, seed=options.seed).draw(options.measured)
    columns = {c.name: values[:, i].round() if c.codes else values[:, i] for i, c in enumerate(conditions)}
    rows = zip(*(column.tolist() for column in columns.values()))
    write_table(path, [{name: f"{value:.4f}" for name, value in zip(columns, row)} for row in rows])


def _run(options: argparse.Namespace, verb: list[str], flags: dict[str, Any], further: Sequence[str] = ()) -> None:
    files = [str(ROOT / name) for name in (BASE, *verb, *options.overlay)]
    common = {"bundle_root": options.bundle_root, "device": options.device}
    words = [word for name, value in {**common, **flags}.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(files),
        *words,
        *further,
    ]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise BundleError(f"the command ended with {done.returncode}: {shlex.join(command[3:])}")


def read_measures(path: Path) -> dict[str, dict[str, Any]]:
    """Model -> name of a figure -> value, of FID and of the volumes of structures, from the evaluation's report."""
    found: dict[str, dict[str, Any]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["measure"] in MEASURES:
            found.setdefault(row.get("model", ""), {})[row["name"]] = row["value"]
    return found


def _write(folder: Path, rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    write_table(folder / "steps.tsv", rows)
    given = {name: value for name, value in vars(options).items() if name not in ("bundle_root", "output_dir")}
    write_json(
        folder / "steps.json", {"options": given, "machine": machine(torch.device(options.device)), "steps": rows}
    )
    with replacing(folder / "steps.png") as temporary:
        figure_of(rows).savefig(temporary, format="png", dpi=120)
    print((folder / "steps.tsv").read_text())


def figure_of(rows: Sequence[dict[str, Any]]) -> Figure:
    """One panel for each distance and each measure: a line for each sampler over its numbers of steps."""
    measures = [key for key in dict.fromkeys(key for row in rows for key in row) if DRAWN.match(key)]
    titles = {**{key: f"distance {text}" for key, text in DISTANCES.items()}, **{key: key for key in measures}}
    columns = min(3, len(titles))
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-len(titles) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(titles) // columns), columns, squeeze=False).ravel()
    for axis, (key, title) in zip(axes, titles.items()):
        axis.set(title=title, xlabel="steps", xscale="log", yscale="log" if key in DISTANCES else "linear")
        _draw(axis, rows, key)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    axes[0].legend()
    return figure


def _steps(row: dict[str, Any]) -> int:
    return int(row["steps"])


def _draw(axis: Any, rows: Sequence[dict[str, Any]], key: str) -> None:
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == sampler and row.get(key) not in (None, 0.0)]
        own.sort(key=_steps)
        if own:
            axis.plot([row["steps"] for row in own], [row[key] for row in own], marker="o", label=sampler)
    ticks = sorted({row["steps"] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
