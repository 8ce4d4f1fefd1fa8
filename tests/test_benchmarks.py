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
"""The benchmark programs, at tiny size: that they run and compare equals. Their timings are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from heads import head, write_dataset
from monai.bundle import ConfigParser

from scripts.errors import BundleError
from scripts.grid import Grid
from scripts.volumes import read_volume

pytest.importorskip("generative")

from benchmarks.evaluation import SIZES, make_volumes  # noqa: E402
from benchmarks.evaluation import run as measured_run  # noqa: E402
from benchmarks.training_step import fitting  # noqa: E402


def run(*arguments: object, module: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_original_and_ours_give_the_same_and_are_timed_alike(tmp_path: Path) -> None:
    words = "--size tiny --device cpu --warmup 0 --repeats 1 --batches 1 2 --steps 2 --streaming 1 2"
    done = run(*words.split(), "--folder", tmp_path, module="benchmarks.sampling")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "sampling.json").read_text())
    assert report["machine"]["torch"] == torch.__version__ and min(report["ceilings"].values()) > 0
    rows = {(row["case"], row["batch"], row["steps"], row["way"]): row for row in report["rows"]}
    denoised = [("unet", b, None) for b in (1, 2)] + [("steps", b, 2) for b in (1, 2)]
    coded = [(case, 1, None) for case in ("decode", "encode")]
    wanted = {(*what, way) for what in denoised for way in ("original", "monai", "ours")}
    wanted |= {
        (*what, way) for what in coded for way in ("original", "monai", "ours, streaming 1", "ours, streaming 2")
    }
    assert set(rows) == wanted | {("write", 1, None, "ours")}
    for (case, *_), row in rows.items():
        assert len(row["seconds"]) == 1 and row["peak_gib"] > 0
        assert case == "write" or (row["relative_error"] < 1e-5 and row["tflop"] > 0 and row["times_original"] > 0)
    assert rows["steps", 2, 2, "ours"]["tflop"] == pytest.approx(4 * rows["unet", 1, None, "ours"]["tflop"], abs=5e-4)
    assert len((tmp_path / "sampling.tsv").read_text().splitlines()) == 1 + len(rows)
    assert (tmp_path / "sampling.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_refuses_what_it_cannot_do() -> None:
    assert "--repeats, --batches" in run("--size", "tiny", "--repeats", 0, module="benchmarks.sampling").stderr
    done = run("--size", "tiny", "--device", "gpu", module="benchmarks.sampling")
    assert done.returncode != 0 and done.stderr.splitlines()[-1].startswith("error: --device must be")


def test_loading_of_latents(tmp_path: Path) -> None:
    given = ("--size", "tiny", "--latents", 10, "--workers", 0, 1, "--repeats", 1, "--network", "tiny", "--cold")
    done = run(*given, "--folder", tmp_path, "--json", tmp_path / "x.json", module="benchmarks.loading")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["latents"] == 10 and report["latent_shape"] == [3, 8, 12, 8] and report["step_seconds"] > 0
    assert [row["workers"] for row in report["loading"]] == [0, 1]
    for row in report["loading"]:
        assert {way: len(series) for way, series in row["samples_per_second"].items()} == {"array": 1, "files": 1}
        assert row["ratio"] > 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[-2:]] == [["1", "array"], ["1", "files"]]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_training_steps(tmp_path: Path) -> None:
    words = "--size tiny --device cpu --precisions fp32 --batches 2 --repeats 1 --warmup 0"
    done = run(*words.split(), "--json", tmp_path / "x.json", module="benchmarks.training_step")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    kinds = [(stage, checkpointing) for stage in ("autoencoder", "diffusion") for checkpointing in (0, 1)]
    assert [(row["stage"], row["checkpointing"]) for row in report["steps"]] == kinds
    assert all(row["peak_gib"] > 0 and len(row["seconds"]) == 1 for row in report["steps"])
    kept = {(row["stage"], row["checkpointing"]): row["kept_gib"] for row in report["steps"]}
    assert all(kept[stage, 1] < kept[stage, 0] for stage in ("autoencoder", "diffusion"))
    assert [(row["stage"], row["checkpointing"]) for row in report["fits"]] == kinds
    assert "| diffusion | fp32 | 1 | 0 | 2 |" in done.stdout


def test_what_fits_into_a_gpu() -> None:
    row = {"stage": "diffusion", "precision": "bf16", "checkpointing": 0, "channels_last": 0}
    rows = [{**row, "batch": batch, "peak_gib": peak} for batch, peak in ((1, 12.0), (2, 20.0), (4, 36.0), (8, None))]
    assert fitting(rows) == [{**row, "24 GB": 2, "48 GB": 4, "80 GB": 4}]
    assert fitting(rows[2:])[0]["24 GB"] is None


@pytest.mark.network
def test_evaluation_that_is_killed_computes_nothing_twice(tmp_path: Path) -> None:
    given = ("--size", "tiny", "--volumes", 4, "--training", 3, "--num_pairs", 3, "--dataset", tmp_path / "heads")
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / f"configs/{n}") for n in SIZES["tiny"]]))
    write_dataset(tmp_path / "heads", config.get_parsed_content("grid"))
    done = run(*given, "--keep", tmp_path / "work", "--json", tmp_path / "x.json", module="benchmarks.evaluation")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["features"] == 11 and report["killed"]["features"] >= 5 and report["values_twice"] == 0
    assert report["features_not_recomputed"] == report["killed"]["features"]
    assert report["values_not_recomputed"] == report["killed"]["values"] >= 3 * 3 * 2
    assert (tmp_path / "work" / "output" / "evaluation.html").is_file()


def test_the_evaluation_s_volumes_differ_and_follow_from_the_seed(tmp_path: Path) -> None:
    grid = Grid([12, 14, 10], [-2.0, 2.0, 2.0], [0.0, 0.0, 0.0])
    heads = [head(grid, 1).numpy()]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_volumes(tmp_path / name, heads, 2, grid, seed, blur_mm=1.0)
    a, b, c = ([read_volume(path) for path in sorted((tmp_path / name).iterdir())] for name in "abc")
    assert all((first == second).all() for first, second in zip(a, b)) and 0.0 <= a[0].min() < a[0].max() <= 1.0
    assert (a[0] != a[1]).any() and (a[0] != c[0]).any()


def test_a_command_is_killed_or_must_succeed(tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert measured_run(sleeping, tmp_path / "output", kill_when=tmp_path.is_dir)["peak_gib"] > 0
    for code, when in (("raise SystemExit(3)", None), ("raise SystemExit(3)", (tmp_path / "gone").is_dir)):
        with pytest.raises(BundleError, match="ended with 3"):
            measured_run([sys.executable, "-c", code], tmp_path / "output", kill_when=when)
