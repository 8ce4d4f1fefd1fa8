# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Bad inputs by the hundred (`hostile.py`): a few of each kind here, all of them among the slow tests."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hostile import SAMPLING, Case, file_cases, option_cases, run, unpack

OPTION_CASES, FILE_CASES = list(option_cases()), list(file_cases())
FEW = random.Random(1).sample(OPTION_CASES, 12)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_some_bad_options(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path).faults(case) == []


def test_there_are_some_hundred_cases() -> None:
    assert len(OPTION_CASES) > 400 and len(FILE_CASES) > 100


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_bad_options_and_damaged_files(part: int, tmp_path: Path) -> None:
    faults = {}
    for number, case in enumerate((*OPTION_CASES, *FILE_CASES)[part::8]):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = run(case, folder)
        faults[case.name] = outcome.faults(case), outcome.line
        shutil.rmtree(folder)
    assert {name: fault for name, fault in faults.items() if fault[0]} == {}


# Killed at any moment, the next run ends as one that was left in peace.

KILLED: dict[str, tuple[str, str]] = {
    "sample": (
        "sample",
        " ".join(f"--{n} {v}" for n, v in SAMPLING.items()).replace("{0}/samples", "{0}/out"),
    ),
    "prepare": ("prepare", "--input_dir {0}/raw --dataset_dir {0}/out --segment_with own"),
    "encode_latents": (
        "encode_latents",
        "--dataset_dir {0}/dataset --latents_dir {0}/out --autoencoder_path {0}/autoencoder/autoencoder.pt "
        "--load_old 0 --num_workers 0 --latent_versions 3",
    ),
    "segment": ("segment", "--volumes_dir {0}/dataset --output_dir {0}/out"),
    "train diffusion": (
        "train diffusion",
        "--latents_dir {0}/latents --run_dir {0}/out --autoencoder_path {0}/autoencoder/autoencoder.pt --load_old 0 "
        "--max_epochs 3 --epoch_length 2 --batch_size 1 --seed 1 --validation_fraction 0.5 --num_workers 0 "
        "--sample_every 1 --num_inference_steps 2",
    ),
    "evaluate": (
        "evaluate",
        "--synthetic_dir {0}/samples --real_dir {0}/dataset --output_dir {0}/out --num_pairs 3 --segment_with none",
    ),
}
UNLIKE = (".tsv", ".jsonl", "events", ".html", "evaluation.json")
"""Files that hold times and paths, or values in the order in which they were measured."""


def _command(name: str, old: Path) -> list[str]:
    verb, flags = KILLED[name]
    small = [] if name == "segment" else ["--with", "tiny", str(old / "small.yaml")]  # its network has one size
    return [sys.executable, "-m", "scripts", *verb.split(), *small, "--device", "cpu", *flags.format(old).split()]


def _results(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".made_by", ".lock")))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments(name: str, tmp_path: Path) -> None:
    """Three kills with SIGKILL, each a random time after the start, then once in peace."""
    whole, killed = (unpack(_made(tmp_path / one)) for one in ("whole", "killed"))
    since = time.monotonic()
    subprocess.run(_command(name, whole), cwd=ROOT, check=True, capture_output=True)
    longest, draw = time.monotonic() - since, random.Random(name)
    for _ in range(3):
        process = subprocess.Popen(
            _command(name, killed),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(longest * draw.uniform(0.3, 1.0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(_command(name, killed), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = _results(whole / "out"), _results(killed / "out")
    assert not [path for path in found if Path(path).name.startswith(".") and path != ".bidsignore"]
    same = {path for path in expected if not any(word in path for word in UNLIKE)}
    assert {path for path in found if not any(word in path for word in UNLIKE)} == same
    for path in same:
        if path.endswith((".nii.gz", ".npy", ".png", ".jpg")):
            assert found[path] == expected[path], path


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
