# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed, and trainings in several processes, against one that runs through in one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, ROOT, TINY, RunHere
from processes import Finished, run_interpreter, run_ranks
from trained import AUTOENCODER, DIFFUSION, Pipeline, content, difference

from scripts.tools.curves import losses

LAST = "checkpoint_iteration=6.pt"
STAGES = {"autoencoder": [AUTOENCODER], "diffusion": [DIFFUSION], "pixel": [DIFFUSION, "configs/pixel.yaml"]}
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def done(trained_folder: Path, run_here: RunHere) -> Pipeline:
    return Pipeline(trained_folder, run_here)


def flags_of(stage: str, done: Pipeline, run_dir: Path, **more: Any) -> dict[str, Any]:
    """Of a training of six iterations in which everything random and everything that has a state takes part."""
    common = {"max_epochs": 3, "epoch_length": 2, "checkpoint_every": 1, "keep_checkpoints": 9, "device": "cpu"}
    if stage == "autoencoder":
        own = {**done.autoencoder_flags(), "affine": 1.0, "discriminator::norm": "INSTANCE", "discriminator_lr": 1.0e-4}
    elif stage == "pixel":
        own = {"dataset_dir": str(done.dataset), "seed": 1, "ema_decay": 0.9}
    else:
        own = {**done.diffusion_flags(), "ema_decay": 0.9, "condition_dropout": 0.2}
    return {**own, **common, "lr": 1.0e-4, "run_dir": str(run_dir), **more}


def command(stage: str, flags: dict[str, Any]) -> list[str]:
    """What follows `python`."""
    files = str([BASE, *STAGES[stage], TINY])
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return ["-m", "monai.bundle", "run", "--config_file", files, *given]


def torchrun(processes: int, *more: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *more)


def two_by_torchrun(words: list[str]) -> list[Finished]:
    return [run_interpreter(*torchrun(2), *words, timeout=PATIENCE_S)]


def two_by_environment(words: list[str]) -> list[Finished]:
    return run_ranks(2, *words, timeout=PATIENCE_S)


def wait_for(pattern: str, folder: Path, exit_code: Callable[[], int | None]) -> None:
    since = time.monotonic()
    while not list(folder.glob(pattern)):
        assert exit_code() is None and time.monotonic() - since < PATIENCE_S, "it ended, or hangs"
        time.sleep(0.01)


def uninterrupted(stage: str, done: Pipeline, folder: Path, run_here: RunHere, **more: Any) -> dict[str, Any]:
    run_here([BASE, *STAGES[stage], TINY], **flags_of(stage, done, folder, **more))
    return content(folder / LAST)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", pytest.param("pixel", marks=pytest.mark.slow)])
def test_killed_training_ends_in_the_same_weights(
    stage: str, done: Pipeline, run_here: RunHere, tmp_path: Path
) -> None:
    """Killed at a random iteration and run again by the same command: every bit of every state agrees."""
    expected = uninterrupted(stage, done, tmp_path / "whole", run_here)
    folder, iteration = tmp_path / "killed", random.SystemRandom().randint(1, 4)
    flags = flags_of(stage, done, folder, num_workers=1)
    words = [sys.executable, *command(stage, flags)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(f"checkpoint_iteration={iteration}.pt", folder, process.poll)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / LAST).exists(), "it was faster than the kill"
    run_here([BASE, *STAGES[stage], TINY], **flags)
    resumed = content(folder / LAST)
    for name in expected.keys() - {"config", "code"}:
        assert difference(expected[name], resumed[name]) == 0.0, f"{name}, killed after iteration {iteration}"


@pytest.mark.parametrize(
    ("stage", "start"),
    [
        pytest.param("autoencoder", two_by_torchrun, marks=pytest.mark.slow),
        ("diffusion", two_by_environment),
    ],
)
def test_two_processes_are_one_with_the_whole_batch(
    stage: str, start: Callable[[list[str]], list[Finished]], done: Pipeline, run_here: RunHere, tmp_path: Path
) -> None:
    expected = uninterrupted(stage, done, tmp_path / "one", run_here, batch_size=2)
    flags = flags_of(stage, done, tmp_path / "two", batch_size=1, log_every=1)
    finished = start(command(stage, flags))
    texts = [text for ran in finished for text in (ran.stdout, ran.stderr)]
    assert all(ran.returncode == 0 for ran in finished), [text[-3000:] for text in texts]
    found = content(tmp_path / "two" / LAST)
    for name in expected.keys() - {"config", "code"}:
        assert difference(without_best(expected[name]), without_best(found[name])) < 1e-5, name
    of_one, of_two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert of_one.keys() == of_two.keys()
    for name in of_one.keys() - {"gradient_norm", "discriminator_gradient_norm"}:
        iterations, values = of_one[name]
        assert len(iterations) == len(of_two[name][0]) and values == pytest.approx(
            of_two[name][1], rel=1e-5, abs=1e-5
        ), name
    lines = [line for text in texts for line in text.splitlines() if " iteration " in line]
    assert len(lines) == 6, "one process speaks, with the means of both"


@pytest.mark.slow
def test_training_goes_on_after_a_worker_was_killed(done: Pipeline, run_here: RunHere, tmp_path: Path) -> None:
    expected = uninterrupted("diffusion", done, tmp_path / "one", run_here, batch_size=2)
    folder = tmp_path / "two"
    flags = flags_of("diffusion", done, folder, batch_size=1)
    launcher = torchrun(2, "--max-restarts=2", "--monitor-interval=0.1")
    launched = [sys.executable, *launcher, *command("diffusion", flags)]
    process = subprocess.Popen(launched, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for("checkpoint_iteration=2.pt", folder, process.poll)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    told, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told[-3000:]
    assert f"resumed {folder}" in told
    found = content(folder / LAST)
    for name in expected.keys() - {"config", "code"}:
        assert difference(without_best(expected[name]), without_best(found[name])) < 1e-5, name


def without_best(state: Any) -> Any:
    """How far a training is, without the validation's decibels, whose last digits differ with the order of sums."""
    return {name: value for name, value in state.items() if name != "best"} if "best" in state else state


def children(pid: int) -> list[int]:
    """The worker processes of a launcher."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return sorted(found)


def test_configuration_in_the_checkpoint_is_the_one_that_ran(done: Pipeline) -> None:
    config = json.loads(content(done.diffusion / "checkpoint_iteration=4.pt")["config"])
    assert config["latents_dir"] == str(done.latents) and config["batch_size"] == 2
