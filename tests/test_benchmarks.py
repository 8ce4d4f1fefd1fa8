# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs, at tiny size: that they run and compare equals. Their timings are not looked at."""

from __future__ import annotations

import errno
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from heads import head, write_dataset
from monai.bundle import ConfigParser
from PIL import Image
from preparing import save
from processes import Finished, run_python
from scipy.ndimage import gaussian_filter

from scripts.core.errors import BundleError
from scripts.core.tables import read_table
from scripts.diffusion.schedules import target_of
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import read_volume, write_volume
from scripts.volumes.scans import Scan

pytest.importorskip("generative")

from benchmarks import sampling, similarity, steps, training_step, writing  # noqa: E402
from benchmarks.command import run as measured_run  # noqa: E402
from benchmarks.evaluation import SIZES, make_volumes  # noqa: E402
from benchmarks.hard_heads import KINDS, Head  # noqa: E402
from benchmarks.measuring import Measured, Work, counted  # noqa: E402
from benchmarks.preparation import main as time_preparation  # noqa: E402


def run(*arguments: object, module: str) -> Finished:
    return run_python("-m", module, *arguments, timeout=300)


@pytest.mark.slow
def test_what_a_collection_costs_besides_its_samples(tmp_path: Path) -> None:
    words = "--rows 1 2500 --left 0.4 --packed 3 --member_bytes 10"
    done = run(*words.split(), "--json", tmp_path / "figures.json", module="benchmarks.collection")
    assert done.returncode == 0, done.stderr
    starts = json.loads((tmp_path / "figures.json").read_text())["starts"]
    assert [(row["shards"], row["done"]) for row in starts] == [(1, 0), (3, 2)]


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
    assert all(row["percent_of_copy"] > 0 for (case, *_), row in rows.items() if case != "write")
    assert rows["steps", 2, 2, "ours"]["tflop"] == pytest.approx(4 * rows["unet", 1, None, "ours"]["tflop"], abs=5e-4)
    assert len((tmp_path / "sampling.tsv").read_text().splitlines()) == 1 + len(rows)
    assert (tmp_path / "sampling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_volumes_of_several_sizes(tmp_path: Path) -> None:
    words = "--size tiny --device cpu --warmup 0 --repeats 1 --cases decode --ways original ours --sides 0.5 1"
    done = run(*words.split(), "--folder", tmp_path, module="benchmarks.sampling")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    assert [row["way"] for row in rows] == 2 * ["original", "ours"]
    (small, large) = sorted({row["voxels"] for row in rows})
    assert small < large and rows[0]["voxels"] == small and rows[0]["tflop"] < rows[-1]["tflop"]


class FakeCalls:
    """Stand in for the networks of `benchmarks.sampling`: each call gives ones, or fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: dict[tuple[str, str], Exception] = {}
        self.measured: list[tuple[str, int]] = []
        monkeypatch.setattr(sampling.Bench, "measurements", lambda bench, *what: self.measurements(*what))
        monkeypatch.setattr(sampling.Bench, "work", lambda *given: Work(1.0, 1.0))
        ceilings = {"matmul_fp32_tflops": 1.0, "matmul_bf16_tflops": 1.0, "copy_gbs": 1.0}
        monkeypatch.setattr(sampling, "measured_ceilings", lambda device: ceilings)

    def measurements(self, case: str, batch: int, steps: int | None) -> dict[str, Any]:
        self.measured.append((case, batch))
        return {way: partial(self.measure, case, way) for way in ("original", "ours")}

    def measure(self, case: str, way: str) -> Measured:
        if (case, way) in self.failing:
            raise self.failing[case, way]
        return Measured(0.5, 0.5, 2**30, 2**20, torch.ones(2))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> FakeCalls:
    return FakeCalls(monkeypatch)


def sample_tiny(folder: Path, *more: str) -> list[dict[str, Any]]:
    words = "--size tiny --device cpu --warmup 0 --repeats 2 --cases unet decode --batches 1 4"
    sampling.main([*words.split(), "--ways", "original", "ours", "--folder", str(folder), *more])
    return json.loads((folder / "sampling.json").read_text())["rows"]


def test_sampling_that_fails_in_one_case_goes_on_with_the_others(
    calls: FakeCalls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.failing = {("unet", "ours"): torch.OutOfMemoryError("out of memory\nof 80 GiB")}
    rows = sample_tiny(tmp_path)
    assert [(row["case"], row["way"], row["failed"]) for row in rows] == [
        *2 * [("unet", "original", None), ("unet", "ours", "out of memory")],
        *[("decode", "original", None), ("decode", "ours", None)],
    ]
    assert "out of memory" in capsys.readouterr().out
    calls.failing, calls.measured = {}, []
    assert not any(row["failed"] for row in sample_tiny(tmp_path, "--resume", "1"))
    assert calls.measured == [("unet", 1), ("unet", 4)], "what had not failed is not measured again"
    with pytest.raises(SystemExit, match="another machine or other options"):
        sample_tiny(tmp_path, "--resume", "1", "--fast", "0")


def test_sampling_keeps_what_it_has_when_the_gpu_is_gone_or_the_time_over(
    calls: FakeCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "answers", lambda device: len(calls.measured) < 2)
    with pytest.raises(SystemExit, match="does not answer"):
        sample_tiny(tmp_path)
    report = json.loads((tmp_path / "sampling.json").read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 1, 4, 4] and (tmp_path / "sampling.png").is_file()
    assert sample_tiny(tmp_path, "--resume", "1", "--minutes", "-1") == report["rows"]
    monkeypatch.setattr(sampling, "answers", lambda device: True)
    assert [row["case"] for row in sample_tiny(tmp_path, "--resume", "1")][-1] == "decode"


def test_sampling_on_a_full_disk_loses_nothing(
    calls: FakeCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = sample_tiny(tmp_path, "--cases", "unet")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit, match="No space left"):
        sample_tiny(tmp_path, "--resume", "1")
    assert json.loads((tmp_path / "sampling.json").read_text())["rows"] == written


def test_work_is_counted() -> None:
    layer, x = torch.nn.Linear(3, 5, bias=False), torch.ones(2, 3)
    assert counted(lambda: layer(x)) == (2 * 2 * 3 * 5, 4 * (2 * 3 + 3 * 5 + 2 * 5))
    assert counted(lambda: x.view(3, 2).relu()).times(2) == (0, 2 * 4 * (6 + 6))


@pytest.mark.slow
def test_whole_commands_are_compared_in_processes_of_their_own(tmp_path: Path) -> None:
    words = "--size tiny --device cpu --warmup 0 --repeats 1 --cases command --ways original ours --steps 2"
    done = run(*words.split(), "--folder", tmp_path, module="benchmarks.sampling")
    assert done.returncode == 0, done.stderr
    original, ours = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    assert (original["way"], ours["way"], ours["case"], ours["steps"]) == ("original", "ours", "command", 2)
    assert ours["relative_error"] < 1e-5 and ours["cpu_seconds"] > 0 and 0.1 < ours["peak_gib"] < 4
    assert ours["times_original"] == pytest.approx(original["seconds"][0] / ours["seconds"][0], abs=1e-3)
    assert ours["tflop"] > 0


def test_the_benchmark_refuses_what_it_cannot_do() -> None:
    assert "--sides must" in run("--size", "tiny", "--sides", 2, module="benchmarks.sampling").stderr
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


@pytest.mark.slow
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
    assert training_step.fitting(rows) == [{**row, "24 GB": 2, "48 GB": 4, "80 GB": 4}]
    assert training_step.fitting(rows[2:])[0]["24 GB"] is None


@pytest.mark.parametrize(
    ("error", "ran", "told"),
    [(torch.OutOfMemoryError("of 80 GiB"), 1, "out of memory"), (RuntimeError("no kernel\nin C++"), 2, "no kernel")],
)
def test_steps_that_fail_lose_nothing(
    error: RuntimeError, ran: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before stays, and a batch larger than one that was out of memory is not tried."""
    tried: list[int] = []

    def fail(case: training_step.Case, *given: Any) -> Any:
        tried.append(case.batch)
        raise error

    monkeypatch.setattr(training_step, "_run", fail)
    words = "--size tiny --device cpu --stages diffusion --precisions fp32 --checkpointing 0 --batches 2 4"
    training_step.main([*words.split(), "--json", str(tmp_path / "x.json")])
    report = json.loads((tmp_path / "x.json").read_text())
    assert [row["failed"] for row in report["steps"]] == [told, told] and len(tried) == ran
    assert report["fits"][0]["80 GB"] is None


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


# Steps and writing, in this process.


@pytest.mark.slow
def test_steps_against_their_distance_to_a_long_trajectory(bundle_copy: Path, tmp_path: Path) -> None:
    words = "--overlay configs/tiny.yaml --samplers ddim unipc --steps 3 9 --reference ddim:60 --samples 1"
    steps.main([*words.split(), "--bundle_root", str(bundle_copy), "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        ("ddim", 60),
        *(("ddim", 3), ("ddim", 9), ("unipc", 3), ("unipc", 9)),
    ]
    distance = {(row["sampler"], row["steps"]): row["latent_rmse"] for row in rows}
    assert distance["ddim", 60] == 0.0 < distance["ddim", 9]
    assert all(0.0 < row["volume_rmse"] < 1.0 for row in rows[1:])
    assert read_table(tmp_path / "steps.tsv", ["sampler", "steps", "seconds", "volume_rmse"])[0]["reference"] == "yes"
    with Image.open(tmp_path / "steps.png") as image:
        assert image.width > image.height > 200


@pytest.mark.parametrize(("given", "target"), [([], "velocity"), (["--target", "sample"], "sample")])
def test_steps_are_of_the_target_of_the_overlay(
    bundle_copy: Path, tmp_path: Path, given: list[str], target: str
) -> None:
    overlay = tmp_path / "velocity.yaml"
    overlay.write_text("target: velocity\n")
    words = ["--overlay", "configs/tiny.yaml", str(overlay), "--samples", "1", "--bundle_root", str(bundle_copy)]
    trajectories = steps.Trajectories(steps._options([*words, *given]))
    assert target_of(trajectories.samplers["ddim"]().schedule) == target


@pytest.mark.slow
def test_samples_of_each_number_of_steps_are_evaluated(bundle_copy: Path, tmp_path: Path) -> None:
    words = "--overlay configs/tiny.yaml --samplers unipc --steps 2 3 --reference ddim:4 --samples 1"
    given = [*words.split(), "--measure", "1", "--measured", "4", "--evaluate_flags", "--num_pairs 2"]
    steps.main([*given, "--bundle_root", str(bundle_copy), "--output_dir", str(tmp_path)])
    reference, *rows = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert "Pearson's r of ventricular volume" not in reference and [row["steps"] for row in rows] == [2, 3]
    assert all("Pearson's r of ventricular volume" in row for row in rows)
    assert len(list((tmp_path / "samples" / "unipc-3").glob("*.nii.gz"))) == 4


def test_measures_are_found_in_an_evaluation(tmp_path: Path) -> None:
    rows = [
        {"measure": "fid", "model": "unipc-20", "name": "FID (net)", "value": 2.5},
        {"measure": "volumetry", "model": "unipc-20", "name": "Pearson's r of ventricular volume", "value": 0.9},
        {"measure": "real_pairs", "name": "MS-SSIM", "value": 0.6},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    found = steps.read_measures(tmp_path / "evaluation.json")
    assert found == {"unipc-20": {"FID (net)": 2.5, "Pearson's r of ventricular volume": 0.9}}
    table = [{"sampler": "unipc", "steps": 20, "latent_rmse": 0.1, "volume_rmse": 0.2, **found["unipc-20"]}]
    assert [axis.get_title() for axis in steps.figure_of(table).axes if axis.lines] == [
        *(f"distance {text}" for text in steps.DISTANCES.values()),
        *found["unipc-20"],
    ]


def test_similarities_are_those_of_monai_and_of_the_formulae(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.nii.gz" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        volume = gaussian_filter(np.random.default_rng(seed).random((32, 40, 32)), 2.0)
        nib.save(nib.Nifti1Image(((volume - volume.min()) / np.ptp(volume)).astype(np.float32), np.eye(4)), path)
    similarity.main(["--volumes", *map(str, paths), "--repeats", "1", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert [*found] == ["MS-SSIM", "SSIM", "4-G-R-SSIM"]
    assert all(row["difference"] < 3e-5 for row in found.values())  # float32 in MONAI's SSIM: 1.1e-5


def test_writing_is_measured(tmp_path: Path) -> None:
    grid = Grid([12, 14, 10], [-2.0, 2.0, 2.0], [0.0, 0.0, 0.0])
    write_volume(tmp_path / "x.nii.gz", head(grid, 1).numpy(), grid)
    given = ["--volumes", tmp_path / "x.nii.gz", "--repeats", 1, "--threads", 0, 2, "--written", 2]
    writing.main([*map(str, given), "--json", str(tmp_path / "x.json")])
    (row,) = json.loads((tmp_path / "x.json").read_text())["volumes"]
    ratios = {found["compressor"]: found["ratio"] for found in row["compressors"]}
    assert ratios["zlib 6"] >= ratios["zlib 1"] > 1.0
    assert set(row["volumes_per_second"]) == {"0", "2"} and row["bytes"] == 352 + 12 * 14 * 10


def test_preparation_is_timed_for_each_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[int, int]] = []

    def prepare(table: Path, dataset_dir: Path, workers: int) -> None:
        rows = read_table(table)
        assert all(Path(row["path"]).is_file() for row in rows)
        calls.append((workers, len(rows)))

    monkeypatch.setattr("benchmarks.preparation.prepare", prepare)
    save(tmp_path / "raw/sub-1/anat/sub-1_T1w.nii.gz", np.ones((4, 4, 4), np.float32), np.eye(4))
    flags = ["--scans", "2", "--workers", "1", "3", "--input_dir", str(tmp_path / "raw"), "--json", str(tmp_path / "x")]
    time_preparation(flags)
    assert calls == [(1, 2), (3, 6)]
    report = json.loads((tmp_path / "x").read_text())
    one, three = report["runs"]
    assert report["ratio"] == pytest.approx(three["an_hour"] / one["an_hour"])
    assert "3 processes: 6 scans" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_hard_heads_keep_a_known_place(kind: str) -> None:
    """A bright voxel in the brain is where the head's map says, whatever is done to the head."""
    affine, truth = np.diag([6.0, 6.0, 6.0, 1.0]), np.eye(4)
    affine[:3, 3], truth[:3, 3] = (-90, -120, -80), (5, 3, -4)
    data = np.full((30, 36, 30), 0.5, np.float32)
    data[15, 10, 12] = 1.0
    scan = Scan(data, affine)
    place = (affine @ [15, 10, 12, 1])[:3] - truth[:3, 3]
    changed = KINDS[kind](Head(scan, truth, Scan(np.full(data.shape, 3.0), affine)))
    brightest = np.unravel_index(changed.scan.data.argmax(), changed.scan.data.shape)
    assert changed.at(place.tolist()) == pytest.approx((changed.scan.affine @ [*brightest, 1])[:3], abs=1e-6)
