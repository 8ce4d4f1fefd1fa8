# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The small model's training as a whole: what it does in which order, in how many runs, with what it finds."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.core.tables import read_table
from scripts.tools import demo_training
from scripts.tools.demo_training import EPOCHS, PROBED, Machine, OutOfTimeError, main

VERBS: list[str | None] = [
    "phantoms",
    "phantoms",
    "train_autoencoder",
    "train_autoencoder",
    "encode_latents",
    "train_diffusion",
]
VERBS += ["train_diffusion", "train_brain_age", "train_brain_age", None, "figures", "side_by_side", "evaluate"]


class Commands:
    """Stands in for the bundle's commands: writes what they would, and runs out of time where it is told to."""

    def __init__(self) -> None:
        self.ran: list[tuple[str | None, dict[str, Any]]] = []
        self.stop_at: int | None = None

    def __call__(self, machine: Machine, verb: str | None, flags: Mapping[str, Any], processes: int = 1) -> None:
        if len(self.ran) == self.stop_at:
            raise OutOfTimeError
        self.ran.append((verb, dict(flags)))
        folder = Path(flags.get("run_dir") or flags.get("output_dir") or flags["latents_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "participants.tsv").touch()
        if "run_dir" in flags:
            network = str(verb).removeprefix("train_")
            torch.save({network: {"weight": torch.ones(2)}, "facts": {}}, folder / f"{network}.pt")
            for n in (1, 2):
                checkpoint = folder / f"checkpoint_iteration={n * PROBED}.pt"
                checkpoint.touch()
                os.utime(checkpoint, (5.0 * n, 5.0 * n))

    def verbs(self) -> list[str | None]:
        return [verb for verb, _ in self.ran]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(Machine, "run", lambda machine, *args: made(machine, *args))
    monkeypatch.setattr(demo_training, "losses", lambda run: {})
    monkeypatch.setattr(demo_training, "draw", lambda *args: None)
    return made


def run(folder: Path, *more: str) -> None:
    main(["--work_dir", str(folder / "work"), "--deliver_dir", str(folder / "kept"), "--samples", "5", *more])


def test_stages_in_their_order(commands: Commands, tmp_path: Path) -> None:
    run(tmp_path, "--autoencoder_minutes", "0.5")
    assert commands.verbs() == VERBS
    planned = commands.ran[3][1]
    assert (planned["max_epochs"], planned["epoch_length"]) == (EPOCHS, 6), "30 s of iterations that take 0.25 s"
    kept = tmp_path / "kept" / "autoencoder.safetensors"
    assert kept.is_file() and all(commands.ran[n][1]["autoencoder_path"] == kept for n in (4, 6, 9))
    rows = read_table(tmp_path / "work" / "conditions.tsv", ("gender", "age", "ventricular_vol", "brain_vol"))
    assert len(rows) == 5 and {row["gender"] for row in rows} <= {"0", "1"}


def test_goes_on_where_the_minutes_ended(commands: Commands, tmp_path: Path) -> None:
    commands.stop_at = 6
    run(tmp_path)
    assert commands.verbs() == VERBS[:6]
    commands.stop_at = None
    run(tmp_path)
    assert commands.verbs() == VERBS, "nothing is timed or done again"
    run(tmp_path)
    assert commands.verbs() == VERBS


def test_goes_on_from_the_kept_weights_alone(commands: Commands, tmp_path: Path) -> None:
    commands.stop_at = 6
    run(tmp_path)
    shutil.rmtree(tmp_path / "work")
    shutil.copyfile(tmp_path / "kept" / "autoencoder.safetensors", tmp_path / "kept" / "diffusion.safetensors")
    commands.stop_at, commands.ran = None, []
    run(tmp_path)
    assert commands.verbs() == ["phantoms", "phantoms", "encode_latents", *VERBS[6:]]
    assert commands.ran[3][1]["pretrained"] == tmp_path / "kept" / "diffusion.safetensors"


def test_pieces_that_cannot_be_written(commands: Commands, tmp_path: Path) -> None:
    for size, told in (("0", "must be above 0"), ("-1", "must be above 0"), ("0.000001", "more than 100 pieces")):
        with pytest.raises(SystemExit, match=f"error: --part_mb.*{told}"):
            run(tmp_path, "--part_mb", size)


def test_goes_on_from_pieces_of_the_kept_weights(commands: Commands, tmp_path: Path) -> None:
    kept, (first, second) = tmp_path / "kept", (f"autoencoder.safetensors.0{n}" for n in (0, 1))
    run(tmp_path)
    whole = (kept / "autoencoder.safetensors").read_bytes()
    run(tmp_path, "--part_mb", str(0.6 * len(whole) / 1e6))
    assert (kept / first).is_file() and (kept / second).is_file()
    shutil.rmtree(tmp_path / "work")
    (kept / "autoencoder.safetensors").unlink()
    run(tmp_path)
    assert (kept / "autoencoder.safetensors").read_bytes() == whole


def test_pieces_of_large_weights(commands: Commands, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run(tmp_path)
    whole = (kept / "autoencoder.safetensors").read_bytes()
    assert not list(kept.glob("*.safetensors.*")), "nothing is cut where nobody asked for it"
    for size, number in ((0.3 * len(whole), 4), (0.6 * len(whole), 2), (2.0 * len(whole), 0)):
        run(tmp_path, "--part_mb", str(size / 1e6))
        pieces = [piece.read_bytes() for piece in sorted(kept.glob("autoencoder.safetensors.*"))]
        assert len(pieces) == number and all(len(piece) <= size for piece in pieces)
        assert b"".join(pieces) == (whole if number else b"")


@pytest.mark.parametrize("there", [True, False])
def test_search_for_copies_needs_weights(
    there: bool, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "highres3dnet.pth"
    monkeypatch.setattr(demo_training, "HIGHRES3DNET", weights)
    if there:
        weights.touch()
    run(tmp_path)
    evaluation = commands.ran[-1][1]
    assert (evaluation.get("training_dir"), evaluation.get("features")) == (
        (tmp_path / "work" / "phantoms", "highres3dnet") if there else (None, None)
    )


def test_command_that_fails(tmp_path: Path) -> None:
    machine = Machine(tmp_path, tmp_path, demo_training._parser().parse_args([]), float("inf"))
    with pytest.raises(demo_training.BundleError, match="ended with exit code 3"):
        machine.call([sys.executable, "-c", "raise SystemExit(3)"])
    machine.deadline = time.monotonic() + demo_training.GRACE_S + 0.5
    with pytest.raises(OutOfTimeError):
        machine.call([sys.executable, "-c", "import time; time.sleep(60)"])
