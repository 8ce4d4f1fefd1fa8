# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The small model's training as a whole: what it does in which order, in how many runs, with what it finds."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripts.core.tables import read_table, write_table
from scripts.tools import demo_training
from scripts.tools.demo_training import Machine, OutOfTimeError, main

VERBS: list[str | None] = ["phantoms", "phantoms", "train_autoencoder", "encode_latents", "train_diffusion"]
VERBS += ["train_brain_age", None, "figures", "side_by_side", "evaluate"]


def wait_for(until: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    return until()


def make_machine(folder: Path, *words: str, minutes: float = float("inf")) -> Machine:
    deadline = time.monotonic() + 60.0 * minutes
    return Machine(folder, folder, demo_training._parser().parse_args(list(words)), deadline, {"done": []})


class Commands:
    """Stands in for the bundle's commands: writes what they would, and runs out of time where it is told to."""

    def __init__(self) -> None:
        self.ran: list[tuple[str | None, dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []
        self.stop_at: int | None = None

    def __call__(self, machine: Machine, verb: str | None, flags: Mapping[str, Any], *args: Any, **more: Any) -> bool:
        if len(self.ran) == self.stop_at:
            raise OutOfTimeError
        self.options.append(more)
        self.ran.append((verb, dict(flags)))
        folder = Path(flags.get("run_dir") or flags.get("output_dir") or flags["latents_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "participants.tsv").touch()
        if "run_dir" in flags:
            network = str(verb).removeprefix("train_")
            torch.save({network: {"weight": torch.ones(2)}, "facts": {}}, folder / f"{network}.pt")
        until = more.get("until")
        return until is None or not wait_for(until)

    def verbs(self) -> list[str | None]:
        return [verb for verb, _ in self.ran]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(Machine, "run", lambda machine, *args, **more: made(machine, *args, **more))
    monkeypatch.setattr(demo_training, "losses", lambda run: {})
    monkeypatch.setattr(demo_training, "draw", lambda *args: None)
    return made


def run(folder: Path, *more: str) -> None:
    write_table(folder / "participants.tsv", [{"participant_id": name} for name in ("sub-2", "sub-1")])
    main(
        [
            "--heads_dir",
            str(folder),
            "--work_dir",
            str(folder / "work"),
            "--deliver_dir",
            str(folder / "kept"),
            "--samples",
            "5",
            *more,
        ]
    )


def test_stages_in_their_order(commands: Commands, tmp_path: Path) -> None:
    run(tmp_path, "--autoencoder_minutes", "0.5")
    assert commands.verbs() == VERBS
    assert commands.ran[2][1]["max_minutes"] == 0.5 and commands.ran[4][1]["max_minutes"] == 9.0
    kept = tmp_path / "kept" / "autoencoder.safetensors"
    assert kept.is_file() and all(commands.ran[n][1]["autoencoder_path"] == kept for n in (3, 4, 6))
    rows = read_table(tmp_path / "work" / "conditions.tsv", ("gender", "age", "ventricular_vol", "brain_vol"))
    assert len(rows) == 5 and {row["gender"] for row in rows} <= {"0", "1"}


def test_goes_on_where_the_minutes_ended(commands: Commands, tmp_path: Path) -> None:
    commands.stop_at = 4
    run(tmp_path)
    assert commands.verbs() == VERBS[:4]
    commands.stop_at = None
    run(tmp_path)
    assert commands.verbs() == VERBS, "nothing is timed or done again"
    run(tmp_path)
    assert commands.verbs() == VERBS


def test_goes_on_from_the_kept_weights_alone(commands: Commands, tmp_path: Path) -> None:
    commands.stop_at = 4
    run(tmp_path)
    shutil.rmtree(tmp_path / "work")
    shutil.copyfile(tmp_path / "kept" / "autoencoder.safetensors", tmp_path / "kept" / "diffusion.safetensors")
    commands.stop_at, commands.ran = None, []
    run(tmp_path)
    assert commands.verbs() == ["phantoms", "phantoms", "encode_latents", *VERBS[4:]]
    assert commands.ran[3][1]["pretrained"] == tmp_path / "kept" / "diffusion.safetensors"


def test_pieces_that_cannot_be_written(commands: Commands, tmp_path: Path) -> None:
    for size, told in (("0", "must be above 0"), ("-1", "must be above 0"), ("0.000001", "more than 100 pieces")):
        with pytest.raises(SystemExit, match=f"error: --part_mb.*{told}"):
            run(tmp_path, "--part_mb", size)


def content_of(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file, whose metadata is in another order each time it is written."""
    end = 8 + int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:end]), weights[end:]


def test_goes_on_from_pieces_of_the_kept_weights(commands: Commands, tmp_path: Path) -> None:
    kept, (first, second) = tmp_path / "kept", (f"autoencoder.safetensors.0{n}" for n in (0, 1))
    run(tmp_path)
    whole = (kept / "autoencoder.safetensors").read_bytes()
    content = content_of(whole)
    run(tmp_path, "--part_mb", str(0.6 * len(whole) / 1e6))
    assert (kept / first).is_file() and (kept / second).is_file()
    shutil.rmtree(tmp_path / "work")
    (kept / "autoencoder.safetensors").unlink()
    run(tmp_path)
    assert content_of((kept / "autoencoder.safetensors").read_bytes()) == content


def test_pieces_of_large_weights(commands: Commands, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run(tmp_path)
    whole = (kept / "autoencoder.safetensors").read_bytes()
    assert not list(kept.glob("*.safetensors.*")), "nothing is cut where nobody asked for it"
    for size, number in ((0.3 * len(whole), 4), (0.6 * len(whole), 2), (2.0 * len(whole), 0)):
        run(tmp_path, "--part_mb", str(size / 1e6))
        pieces = [piece.read_bytes() for piece in sorted(kept.glob("autoencoder.safetensors.*"))]
        assert len(pieces) == number and all(len(piece) <= size for piece in pieces)
        joined = b"".join(pieces)
        assert content_of(joined) == content_of(whole) if number else not joined


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
    machine = make_machine(tmp_path)
    with pytest.raises(demo_training.BundleError, match="ended with exit code 3"):
        machine.call([sys.executable, "-c", "raise SystemExit(3)"])
    machine.deadline = time.monotonic() + demo_training.GRACE_S + 0.5
    with pytest.raises(OutOfTimeError):
        machine.call([sys.executable, "-c", "import time; time.sleep(60)"])


def test_the_autoencoder_starts_on_the_first_phantoms_and_goes_on_with_all(commands: Commands, tmp_path: Path) -> None:
    run(tmp_path, "--phantoms", "9", "--first", "4", "--decoder_minutes", "1", "--brain_age_minutes", "0")
    ran = [flags for verb, flags in commands.ran if verb == "phantoms"]
    made = [(Path(flags["output_dir"]).name, flags["num_phantoms"]) for flags in ran]
    assert all(flags["heads"] == ["sub-1", "sub-2"] for flags in ran), (
        "those that are there, in the order of the labels"
    )
    assert made == [("phantoms", 4), ("phantoms", 9), ("held_out", 40)]
    trained = [(flags, more) for (verb, flags), more in zip(commands.ran, commands.options) if verb == VERBS[2]]
    first, again, decoder = trained
    assert "until" in first[1] and first[0] == again[0] and again[1]["until"] is None, "one training, stopped once"
    assert decoder[1]["fine_tuning"] and decoder[0]["freeze"] and decoder[0]["run_dir"] != first[0]["run_dir"]
    kept = tmp_path / "kept"
    assert decoder[0]["pretrained"] == kept / demo_training.FIRST
    assert (kept / "autoencoder.safetensors").is_file() and "train_brain_age" not in commands.verbs()


def test_a_model_of_one_s_own_and_options_of_a_stage(commands: Commands, tmp_path: Path) -> None:
    run(tmp_path, "--until", "diffusion", "--set", "diffusion.batch_size=64", "autoencoder.lr=1e-3")
    assert commands.verbs() == VERBS[:5]
    assert (commands.ran[2][1]["lr"], commands.ran[4][1]["batch_size"]) == ("1e-3", "64")
    for wrong in ("batch_size=64", "diffusion.batch_size", "unet.lr=1"):
        with pytest.raises(SystemExit, match="--set takes STAGE.OPTION=VALUE"):
            run(tmp_path, "--set", wrong)


def test_the_minutes_of_stages_that_are_to_fit(tmp_path: Path) -> None:
    words = ["--fit", "1", "--minutes", "9", "--autoencoder_minutes", "30", "--diffusion_minutes", "10"]
    machine = make_machine(tmp_path, *words, "--brain_age_minutes", "0", minutes=9)
    first, second = machine.minutes("autoencoder"), machine.minutes("diffusion")
    assert first == pytest.approx(3 * second, rel=0.01) and 7.5 < first + second < 8.5 - 0.3
    machine.deadline -= 300.0
    assert machine.minutes("autoencoder") == first, "a training that goes on has the minutes that it began with"
    machine = make_machine(tmp_path, *words[4:])
    assert (machine.minutes("autoencoder"), machine.minutes("diffusion")) == (30.0, 10.0)


def test_weights_of_a_training_that_is_going_on(tmp_path: Path) -> None:
    machine, run_dir = make_machine(tmp_path), tmp_path / "runs" / "diffusion"
    run_dir.mkdir(parents=True)
    for n in (100, 200):
        content = {"diffusion": {"weight": torch.full((2,), n)}, "facts": {}}
        torch.save(content, run_dir / f"checkpoint_iteration={n}.pt")
    demo_training.deliver_weights(machine)
    assert load_file(tmp_path / "diffusion.safetensors")["weight"].tolist() == [200.0, 200.0]
