# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: written whole, skipped when damaged, refused when of something else."""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from processes import run_python
from torch import nn

from scripts.core.errors import BundleError
from scripts.training import checkpointing
from scripts.training import engine as training_engine
from scripts.training.checkpointing import (
    Checkpoints,
    Progress,
    Resume,
    SaveCheckpoints,
    save,
    training_seed,
    why_damaged,
)
from scripts.training.engine import Facts, FiniteLosses, StopOnSignal, TimeLimit, check_options, epoch_length
from scripts.training.optimisation import LearningRate
from scripts.training.repeatable import Stream


class Run:
    """A training of one number by one in each iteration, with all that belongs to its checkpoints."""

    def __init__(self, folder: Path, metric: str | None = None, **options: Any) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.checkpoints = Checkpoints(folder, keep=options.pop("keep", 2))
        self.seed = training_seed(options.pop("seed", None), self.checkpoints)
        objects = {"network": self.network, "facts": Facts(size=options.pop("size", 1))}
        self.saver = SaveCheckpoints(
            self.checkpoints, objects, self.seed, "final.pt", ["network"], metric=metric, **options
        )
        self.engine = Engine(self._step)
        for handler in (Resume(self.checkpoints, objects, self.seed), FiniteLosses(self.checkpoints)):
            handler.attach(self.engine)

    def _step(self, engine: Engine, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            self.network.weight += 1.0
        return {"losses": {"loss": 0.0}}

    def __call__(self, epochs: int = 3, length: int = 4) -> None:
        self.saver.attach(self.engine)
        self.engine.run(range(1000), max_epochs=epochs, epoch_length=length)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt") if not path.name.startswith("."))


def weight(path: Path) -> float:
    return torch.load(path, weights_only=True)["network"]["weight"].item()


def stop_at(run: Run, iteration: int) -> None:
    @run.engine.on(Events.ITERATION_STARTED(once=iteration))
    def stop() -> None:
        raise KeyboardInterrupt


def test_last_ones_are_kept(tmp_path: Path) -> None:
    Run(tmp_path, every=3, keep=3)()
    assert names(tmp_path) == [*(f"checkpoint_iteration={n}.pt" for n in (12, 6, 9)), "final.pt"]
    assert [weight(path) for path in Checkpoints(tmp_path).paths()] == [6.0, 9.0, 12.0]


def test_one_an_epoch_unless_told_otherwise(tmp_path: Path) -> None:
    Run(tmp_path, keep=9)(epochs=3, length=4)
    assert [path.stem.split("=")[1] for path in Checkpoints(tmp_path).paths()] == ["4", "8", "12"]


@pytest.mark.parametrize("stopped", [5, 6, 9, 12])
def test_stopped_run_goes_on_in_the_middle_of_an_epoch(stopped: int, tmp_path: Path) -> None:
    run = Run(tmp_path, every=2)
    stop_at(run, stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    again = Run(tmp_path, every=2)
    seen: list[tuple[int, int]] = []
    again.engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append((e.state.epoch, e.state.iteration))
    )
    again()
    assert seen == [(1 + (n - 1) // 4, n) for n in range((stopped - 1) // 2 * 2 + 1, 13)]
    assert weight(tmp_path / "final.pt") == 12.0


def test_checkpoint_says_how_it_came_about(tmp_path: Path) -> None:
    Run(tmp_path, seed=7)()
    content = torch.load(tmp_path / "checkpoint_iteration=12.pt", weights_only=True)
    assert content["trainer"] == {"epoch": 3, "iteration": 12, "seed": 7, "best": float("-inf")}
    assert content["code"]["torch"] == torch.__version__.split("+")[0] or content["code"]["torch"] == torch.__version__
    assert len(content["code"]["scripts_sha256"]) == 64


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "text"])
def test_damaged_newest_is_skipped_with_a_warning(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path)()
    newest = tmp_path / "checkpoint_iteration=12.pt"
    content = bytearray(newest.read_bytes())
    at = content.index(torch.tensor(12.0).numpy().tobytes())  # the weight itself, which no parser would miss
    content[at + 2] ^= 1
    harmed: dict[str, bytes] = {
        "cut": bytes(content[: len(content) // 2]),
        "flipped": bytes(content),
        "empty": b"",
        "text": b"no checkpoint",
    }
    newest.write_bytes(harmed[harm])
    with caplog.at_level(logging.WARNING):
        Run(tmp_path)(epochs=4)
    assert f"{newest} is damaged" in caplog.text and "going back" in caplog.text
    assert weight(tmp_path / "final.pt") == 16.0


def test_without_any_whole_checkpoint_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_iteration=8.pt").write_bytes(b"cut")
    with pytest.raises(BundleError, match="no checkpoint in .* is whole: remove them"):
        Run(tmp_path)
    (tmp_path / "checkpoint_iteration=8.pt").rename(tmp_path / "checkpoint_iteration=final.pt")
    Run(tmp_path)()
    assert weight(tmp_path / "final.pt") == 12.0


@pytest.mark.parametrize("at", range(12))
def test_no_damage_to_the_directory_of_the_file_escapes(at: int, tmp_path: Path) -> None:
    """One flipped bit in the last part of the file, where the names and sizes of its records stand."""
    save({"network": {"weight": torch.ones(3)}}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[-200 + 16 * at] ^= 1 << (at % 8)
    (tmp_path / "x.pt").write_bytes(content)
    reason = why_damaged(tmp_path / "x.pt")
    if reason is None:  # it was a bit that says nothing of the content, such as the time
        assert torch.load(tmp_path / "x.pt", weights_only=True)["network"]["weight"].tolist() == [1.0] * 3


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.lock()
    other = ["-c", f"from scripts.training.checkpointing import Checkpoints; Checkpoints('{tmp_path}').lock()"]
    done = run_python(*other)
    assert done.returncode != 0 and "another training is at work" in done.stderr
    run.checkpoints.lock()
    assert run_python(*other).returncode != 0, "taken twice is taken"
    run.checkpoints.unlock()
    assert run_python(*other).returncode == 0


def test_folder_is_taken_before_anything_is_written(tmp_path: Path) -> None:
    """A second training must not take back the validations that the first has written since its checkpoint."""
    run = Run(tmp_path)
    Resume(run.checkpoints, {}, run.seed)(run.engine)
    other = ["-c", f"from scripts.training.checkpointing import Checkpoints; Checkpoints('{tmp_path}').lock()"]
    assert "another training is at work" in run_python(*other).stderr
    run.checkpoints.unlock()


def test_another_version_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path)(epochs=2)
    path = tmp_path / "checkpoint_iteration=8.pt"
    content = torch.load(path, weights_only=True)
    with caplog.at_level("WARNING"):
        Run(tmp_path)(epochs=2)
        assert "going on with" not in caplog.text
        save({**content, "code": {**content["code"], "torch": "1.0", "scripts_sha256": "0"}}, path)
        Run(tmp_path)(epochs=2)
    assert f"going on with torch {content['code']['torch']}, which was 1.0" in caplog.text
    assert "going on with another state of this code" in caplog.text


def test_what_a_killed_training_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".123456789abc-checkpoint_iteration=4.pt").write_bytes(b"half")
    Run(tmp_path)()
    assert not list(tmp_path.glob(".*.pt"))


def test_validation_that_was_interrupted_is_had_again(tmp_path: Path) -> None:
    """The checkpoint of an epoch is from after its validation; the best of an earlier training in the folder is not."""
    save({"facts": {"best": 99.0}}, tmp_path / "best.pt")
    (tmp_path / "losses.jsonl").touch()
    measured: list[int] = []

    def attach(run: Run, fails: bool) -> None:
        @run.engine.on(Events.EPOCH_COMPLETED)
        def measure(engine: Engine) -> None:
            if fails and engine.state.epoch == 2:
                raise KeyboardInterrupt
            measured.append(engine.state.iteration)
            engine.state.metrics["psnr"] = float(engine.state.iteration)

    first = Run(tmp_path, metric="psnr")
    attach(first, fails=True)
    with pytest.raises(KeyboardInterrupt):
        first()
    assert weight(tmp_path / "best.pt") == 4.0
    second = Run(tmp_path, metric="psnr")
    attach(second, fails=False)
    second()
    assert measured == [4, 8, 12] and weight(tmp_path / "best.pt") == 12.0


def test_whole_files_pass(tmp_path: Path) -> None:
    save({"a": torch.ones(3)}, tmp_path / "x.pt")
    assert why_damaged(tmp_path / "x.pt") is None
    assert why_damaged(tmp_path / "missing.pt") is not None


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file can grow beyond 500 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_one_error_and_loses_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    Run(tmp_path)()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    request.getfixturevalue("little_room")
    with pytest.raises(BundleError, match="cannot write .*checkpoint_iteration=16.pt"):
        Run(tmp_path)(epochs=4)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_best_is_the_one_of_the_best_metric(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 1.0, 0.5])

    def measure(engine: Engine) -> None:
        engine.state.metrics["val_loss"] = next(values)

    run = Run(tmp_path, metric="-val_loss")
    run.engine.add_event_handler(Events.EPOCH_COMPLETED, measure)
    run(epochs=3)
    assert weight(tmp_path / "best.pt") == 8.0
    again = Run(tmp_path, metric="-val_loss")
    again.engine.add_event_handler(Events.EPOCH_COMPLETED, measure)
    again(epochs=4)
    assert weight(tmp_path / "best.pt") == 8.0, "a later one that is as good does not replace it"
    again = Run(tmp_path, metric="-val_loss")
    again.engine.add_event_handler(Events.EPOCH_COMPLETED, measure)
    again(epochs=5)
    assert weight(tmp_path / "best.pt") == 20.0


def test_facts_that_differ_are_named(tmp_path: Path) -> None:
    Run(tmp_path, size=1)()
    with pytest.raises(BundleError, match="trained with size 1, now it is 2"):
        Run(tmp_path, size=2)(epochs=4)


def test_another_network_is_refused(tmp_path: Path) -> None:
    Run(tmp_path)()
    run = Run(tmp_path)
    resume = Resume(run.checkpoints, {"network": nn.Linear(2, 1, bias=False)}, run.seed)
    run.engine.state.epoch_length = 4
    with pytest.raises(BundleError, match="its network does not fit: size mismatch"):
        resume(run.engine)
    run.checkpoints.unlock()
    with pytest.raises(BundleError, match="it holds no other"):
        Resume(Checkpoints(tmp_path), {"other": nn.Linear(1, 1)}, run.seed)(run.engine)


def test_names_of_earlier_versions_are_known(tmp_path: Path) -> None:
    state = {"weight": torch.full((1, 1), 2.0)}
    content = {"generator_step": state, "discriminator_step": state, "trainer": {"iteration": 3, "seed": 1}}
    save(content, tmp_path / "checkpoint_iteration=3.pt")
    objects = {name: nn.Linear(1, 1, bias=False) for name in ("optimisation", "discriminator_optimisation")}
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.STARTED, Resume(Checkpoints(tmp_path), objects, seed=1))
    engine.run([0], max_epochs=3, epoch_length=1)
    assert [linear.weight.item() for linear in objects.values()] == [2.0, 2.0] and engine.state.iteration == 3


def test_seed_goes_with_the_training(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first()
    assert Run(tmp_path).seed == first.seed
    assert Run(tmp_path, seed=first.seed).seed == first.seed
    with pytest.raises(BundleError, match=f"holds a training of seed {first.seed}"):
        Run(tmp_path, seed=first.seed + 1)
    for wrong in ("x", 1.5, -1):
        with pytest.raises(BundleError, match="--seed"):
            Run(tmp_path / "new", seed=wrong)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    run = Run(tmp_path)
    StopOnSignal(run.saver).attach(run.engine)
    run.engine.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(BundleError, match=f"stopped by {number.name} after iteration 6"):
        run()
    assert signal.getsignal(number) == before
    assert [path.stem for path in Checkpoints(tmp_path).paths()] == ["checkpoint_iteration=4", "checkpoint_iteration=6"]
    Run(tmp_path)()
    assert weight(tmp_path / "final.pt") == 12.0


def test_order_of_the_data_that_changes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def progress(size: int) -> Progress:
        loader = SimpleNamespace(batch_sampler=Stream(range(size), 2, seed=1))
        state = SimpleNamespace(iteration=4, epoch=2, epoch_length=2)
        return Progress(SimpleNamespace(state=state, data_loader=loader), 1)  # type: ignore[arg-type]

    saved = progress(5).state_dict()
    assert saved["samples"] == 5 and saved["batch"] == 2
    progress(5).load_state_dict(saved)
    assert caplog.text == ""
    progress(7).load_state_dict(saved)
    assert "going on with 7 samples in the dataset, which were 5" in caplog.text


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_epochs", 0), ("max_epochs", "x"), ("max_epochs", 1.5), ("epoch_length", 0), ("epoch_length", -3)]
    + [("batch_size", 0), ("num_workers", -1), ("num_workers", "x"), ("log_every", 0), ("lr", 0), ("lr", "abc")],
)
def test_numbers_that_a_training_cannot_use(flag: str, value: Any) -> None:
    whole = {"max_epochs": 2, "epoch_length": None, "batch_size": 1, "num_workers": 0, "log_every": 20}
    check_options({"lr": 1e-4}, whole)
    given = ({"lr": value}, whole) if flag == "lr" else ({"lr": 1e-4}, {**whole, flag: value})
    with pytest.raises(BundleError, match=f"--{flag} must be"):
        check_options(*given)


@pytest.mark.parametrize(("given", "length"), [(None, None), ("null", None), (100, 100), ("100", 100)])
def test_length_of_an_epoch_as_the_command_line_hands_it_over(given: Any, length: int | None) -> None:
    assert epoch_length(given) == length
    with pytest.raises(BundleError, match="--epoch_length must be at least 1"):
        epoch_length(0)


def test_loss_that_is_not_finite_names_all_there_is_to_know(tmp_path: Path) -> None:
    run = Run(tmp_path)

    @run.engine.on(Events.ITERATION_STARTED(once=6))
    def spoil(engine: Engine) -> None:
        run.engine._process_function = lambda e, b: {"losses": {"l1": 0.5, "kl": float("nan")}}
        engine.state.batch = {"participant_id": ["sub-1", "sub-2"], "path": ["sub-1/a.nii.gz", "sub-2/b.nii.gz"]}

    with pytest.raises(BundleError) as caught:
        run()
    told = str(caught.value)
    assert "'kl' is nan at iteration 6, on sub-1/a.nii.gz, sub-2/b.nii.gz" in told
    assert f"The last good checkpoint is {tmp_path / 'checkpoint_iteration=4.pt'}" in told


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of the trainings: its last entry is what it shows."""
    shown = [0.0]
    for module in (training_engine, checkpointing):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: shown[-1]))
    return shown


class TimedRun(Run):
    """Takes ten seconds an iteration, tells the rates it had, and how often an epoch ended."""

    def __init__(self, folder: Path, seconds: list[float], limit: Any, **options: Any) -> None:
        super().__init__(folder, **options)
        self.rates: list[float] = []
        self.epochs = 0
        rate = LearningRate(torch.optim.SGD(self.network.parameters(), 1.0), 1.0, "cosine")
        for handler in (TimeLimit(limit), rate):
            handler.attach(self.engine)
        self.engine.add_event_handler(Events.ITERATION_STARTED, lambda: self.rates.append(rate.rate))
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seconds.append(seconds[-1] + 10.0))
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self._count)
        self.seconds = seconds

    def _count(self) -> None:
        self.epochs += 1


@pytest.mark.parametrize("length", [4, 3, 100])
def test_training_ends_when_its_minutes_are_over(length: int, tmp_path: Path, seconds: list[float]) -> None:
    """Wherever the epoch is: with a last validation and checkpoint, and with a rate that has fallen to 0."""
    run = TimedRun(tmp_path, seconds, 1.0)
    run(epochs=1000, length=length)
    done = run.engine.state.iteration
    assert done == 7 and run.epochs == -(-done // length)  # the clock moves on after the limit has looked at it
    assert names(tmp_path)[-1] == "final.pt" and weight(tmp_path / "final.pt") == done
    assert Checkpoints(tmp_path).paths()[-1].name == f"checkpoint_iteration={done}.pt"
    shares = [max(0, n - 1) / 6 for n in range(done)]
    assert run.rates == pytest.approx([0.5 + 0.5 * math.cos(math.pi * share) for share in shares], abs=0.01)


def test_minutes_of_all_runs_count(tmp_path: Path, seconds: list[float]) -> None:
    run = TimedRun(tmp_path, seconds, 1.0, every=1)
    stop_at(run, 4)
    with pytest.raises(KeyboardInterrupt):
        run(epochs=1000, length=100)
    seconds.append(5000.0)
    for minutes, total in ((1.0, 7), (1.0, 7), (1.5, 10)):
        again = TimedRun(tmp_path, seconds, minutes, every=1)
        again(epochs=1000, length=100)
        assert again.engine.state.iteration == total and weight(tmp_path / "final.pt") == total


def test_checkpoints_by_the_clock(tmp_path: Path, seconds: list[float]) -> None:
    TimedRun(tmp_path, seconds, None, keep=9, every=100, minutes=0.4)(epochs=1, length=10)
    assert [path.stem.split("=")[1] for path in Checkpoints(tmp_path).paths()] == ["3", "6", "9", "10"]


@pytest.mark.parametrize("minutes", [0, -1, "soon", float("nan")])
def test_minutes_that_are_none(minutes: Any) -> None:
    with pytest.raises(BundleError, match="--max_minutes must be"):
        TimeLimit(minutes)
