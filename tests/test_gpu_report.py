# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The report of a GPU that is lent for minutes: who gets how many, what stays of what was stopped, and what travels."""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from processes import run_interpreter
from safetensors.torch import load_file, save_file

pytest.importorskip("generative")

from benchmarks import gpu_pack, gpu_report, sampling, training_step, versions  # noqa: E402
from benchmarks.gpu_report import Stage  # noqa: E402
from scripts.core.errors import BundleError  # noqa: E402
from scripts.tools import demo_training  # noqa: E402

LOST = "torch.AcceleratorError: CUDA error: unspecified launch failure"
FAST = "import sys; sys.exit(print('all of it'))"
FAILS = f"import sys; sys.exit({LOST!r})"
HANGS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *given: sys.exit(0))
for n in range(10**6):
    with open({rows!r}, "a") as file:
        print(n, file=file, flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """Those of the report, to be filled by a test; the end of the minutes is near."""
    made: dict[str, Stage] = {}
    monkeypatch.setattr(gpu_report, "STAGES", made)
    for name, seconds in (("END_S", 0.0), ("LEAST_S", 0.1), ("POLL_S", 0.02), ("PATIENCE_S", 5.0)):
        monkeypatch.setattr(gpu_report, name, seconds)
    return made


def stage(code: str, share: float = 1.0, rows: Callable[[Path], gpu_report.Rows] = lambda folder: []) -> Stage:
    return Stage(share, lambda options, minutes: ["-c", code], rows)


def report(folder: Path, minutes: float = 1.0, *more: str) -> dict[str, str]:
    gpu_report.main(["--minutes", str(minutes), "--folder", str(folder), "--meanwhile", "0", *more])
    return json.loads((folder / "state.json").read_text())


def counted(folder: Path) -> gpu_report.Rows:
    path = folder / "rows.txt"
    return [{"row": int(line)} for line in path.read_text().split()] if path.is_file() else []


def test_a_stage_that_fails_does_not_end_the_others_and_is_tried_again_last(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    stages |= {"lost": stage(FAILS), "fast": stage(FAST)}
    with pytest.raises(SystemExit, match="failed: lost"):
        report(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state == {"lost": f"exit code 1: {LOST}", "fast": "done"}
    assert LOST in (tmp_path / "report.md").read_text()
    stages |= {"lost": stage(FAST), "fast": stage(FAILS), "new": stage(FAST)}
    assert report(tmp_path) == {"lost": "done", "fast": "done", "new": "done"}, "what is done is not done again"


def test_what_a_stage_leaves_over_the_others_get_and_what_was_stopped_is_kept(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    given: dict[str, float] = {}

    def words(name: str, code: str) -> Callable[[argparse.Namespace, float], list[str]]:
        def command(options: argparse.Namespace, minutes: float) -> list[str]:
            given[name] = minutes
            return ["-c", code]

        return command

    hangs = HANGS.format(rows=str(tmp_path / "rows.txt"))
    stages["fast"] = Stage(3.0, words("fast", FAST), lambda folder: [])
    stages["hangs"] = Stage(1.0, words("hangs", hangs), counted)
    begun = time.monotonic()
    assert report(tmp_path, 0.05) == {"fast": "done", "hangs": "stopped"}
    assert time.monotonic() - begun < 30.0
    assert given["fast"] == pytest.approx(0.75 * 0.05, rel=0.2) and given["hangs"] > 0.25 * 0.05
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = [row["row"] for row in kept if row.get("stage") == "hangs" and "row" in row]
    assert rows and rows == list(range(len(rows)))
    assert "| row |" in (tmp_path / "report.md").read_text()
    assert report(tmp_path, 0.05)["hangs"] == "stopped", "and the same command goes on with it"


def test_minutes_that_are_too_few_do_nothing(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "END_S", 30.0)
    stages["fast"] = stage(FAST)
    assert report(tmp_path, 0.4) == {}
    monkeypatch.setattr(gpu_report, "END_S", 0.0)
    assert report(tmp_path, 0.4) == {"fast": "done"}


def test_a_process_that_does_not_listen_is_ended_with_its_children(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "PATIENCE_S", 0.2)
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    deaf += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    deaf += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(600)"
    stages["deaf"] = stage(deaf)
    assert report(tmp_path, 0.05) == {"deaf": "stopped"}
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_a_full_disk_ends_nothing(stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages |= {"first": stage(FAST), "second": stage(FAST)}
    write = gpu_report.write_text
    written: list[Path] = []

    def fill(path: Path, text: str) -> None:
        written.append(path)
        if len(written) > 2:
            raise BundleError(f"cannot write {path}: No space left on device")
        write(path, text)

    monkeypatch.setattr(gpu_report, "write_text", fill)
    assert report(tmp_path) == {"first": "done", "second": "done"}
    assert (tmp_path / "report.md").is_file() and len(written) > 2


def test_a_stage_that_says_that_it_was_stopped_is_not_done(stages: dict[str, Stage], tmp_path: Path) -> None:
    stages["early"] = stage(f"print('{gpu_report.STOPPED} before the end'); print('a table')")
    assert report(tmp_path) == {"early": "stopped"}
    stages["early"] = stage(FAST)
    assert report(tmp_path) == {"early": "done"}


def test_few_files_are_taken_along(stages: dict[str, Stage], tmp_path: Path) -> None:
    stages["fast"] = stage(FAST)
    (tmp_path / "demo_delivered").mkdir()
    for name in ("autoencoder", "autoencoder_first", "diffusion"):
        (tmp_path / "demo_delivered" / f"{name}.safetensors").write_bytes(b"w" * 10)
    for piece in ("00", "01"):
        (tmp_path / "demo_delivered" / f"diffusion.safetensors.{piece}").write_bytes(b"w" * 5)
    (tmp_path / "demo_delivered" / "diffusion.png").touch()
    report(tmp_path, 1.0, "--deliver", str(tmp_path / "out"))
    pieces = [f"diffusion.safetensors.{n}" for n in ("00", "01")]
    names = {"results.jsonl", "report.md", "rest.tar.gz", "autoencoder.safetensors", *pieces}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with tarfile.open(tmp_path / "out" / "rest.tar.gz") as archive:
        packed = set(archive.getnames())
    assert {"state.json", "fast.log", "demo_delivered/diffusion.png"} <= packed
    assert not any("safetensors" in name for name in packed)


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_stages_commands_are_those_that_there_are(size: str, tmp_path: Path) -> None:
    words = ["--minutes", "9", "--folder", str(tmp_path), "--size", size, "--set", "autoencoder.lr=1e-3"]
    options = gpu_report._options(words)
    commands = {name: one.command(options, 2.0) for name, one in gpu_report.STAGES.items()}
    assert sampling._options(commands["sampling"][2:]).minutes == 2.0
    compiled = sampling._options(commands["compiled"][2:])
    assert (compiled.compile, compiled.fast, compiled.warmup) == (1, "0", 3) and compiled.folder != str(tmp_path)
    assert training_step._options(commands["steps"][2:]).resume == 1
    demo = demo_training._parser().parse_args(commands["demo"][2:])
    assert demo.minutes == pytest.approx(2.25) and gpu_report.DEMO_GRACE_S == demo_training.GRACE_S
    assert "autoencoder.lr=1e-3" in demo.set and demo.fit == 1
    assert all((ROOT / one).is_file() for one in commands["tests"] if one.endswith(".py"))
    for module in (sampling, training_step, demo_training, versions):
        assert module.__doc__


def test_results_of_the_stages_are_read_while_they_are_written(tmp_path: Path) -> None:
    run = tmp_path / "demo" / "runs" / "diffusion"
    run.mkdir(parents=True)
    lines = [{"iteration": n, "epoch": 1, "seconds": 0.5 * n, "losses": {"loss": 1.0 / n}} for n in (1, 2)]
    (run / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 3, "ep')
    assert gpu_report._results("demo", tmp_path) == [
        {"training": "diffusion", "iterations": 2, "seconds": 1.0, "loss": 0.5}
    ]
    (tmp_path / "tests.log").write_text("tests/test_x.py::test_a[cuda] PASSED [ 50%]\ntests/test_x.py::test_b FAILED")
    outcomes = [row["outcome"] for row in gpu_report._results("tests", tmp_path)]
    assert outcomes == ["passed", "failed"]
    (tmp_path / "steps.json").write_text('{"steps": [')
    assert "cannot be read" in gpu_report._results("steps", tmp_path)[0]["failed"]


# Packing.


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset of three heads of 1, 2 and 3 MiB and a network, and wheels that need no network."""
    rows = ["participant_id\tpath"]
    for size in (3, 1, 2):
        path = tmp_path / "heads" / f"sub-{size}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"h" * size * gpu_pack.MIB)
        rows.append(f"sub-{size}\t{path.name}")
    (tmp_path / "heads" / "participants.tsv").write_text("\n".join(rows) + "\n")
    save_file({"weight": torch.full((2**18,), 0.1)}, tmp_path / "network.safetensors")

    def fetch(folder: Path, python: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "monai.whl").write_bytes(b"w" * gpu_pack.MIB)

    monkeypatch.setattr(gpu_pack, "fetch_wheels", fetch)
    return tmp_path


def pack(folder: Path, room_mib: float) -> tuple[set[str], bool]:
    limit = gpu_pack.size_of(gpu_pack.travelling()) / gpu_pack.MIB + room_mib
    where = ["--folder", str(folder / ".gpu"), "--heads_dir", str(folder / "heads")]
    where += ["--perceptual_path", str(folder / "network.safetensors")]
    gpu_pack.main([*where, "--limit_mib", str(limit)])
    packed = gpu_pack.files_in(folder / ".gpu")
    assert gpu_pack.size_of(packed) <= room_mib * gpu_pack.MIB
    return {path.name for path in packed if path.name.startswith("sub-")}, (
        folder / ".gpu" / gpu_report.PERCEPTUAL
    ).is_file()


@pytest.mark.parametrize(
    ("room", "heads", "network"),
    [(9.0, {"sub-1.nii.gz", "sub-2.nii.gz", "sub-3.nii.gz"}, True), (5.2, {"sub-1.nii.gz", "sub-2.nii.gz"}, False)],
)
def test_as_many_heads_are_packed_as_fit(room: float, heads: set[str], network: bool, packing: Path) -> None:
    assert pack(packing, room) == (heads, network)
    table = (packing / ".gpu" / "dataset" / "participants.tsv").read_text()
    assert all((name in table) is (name in heads) for name in ("sub-1.nii.gz", "sub-2.nii.gz", "sub-3.nii.gz"))
    if network:
        assert load_file(packing / ".gpu" / gpu_report.PERCEPTUAL)["weight"].dtype is torch.float16


def test_no_room_for_any_head(packing: Path) -> None:
    with pytest.raises(SystemExit, match="no head of .* fits"):
        pack(packing, 2.5)


def test_wheels_are_of_the_locked_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(BundleError, match="pip did not get all wheels"):
        gpu_pack.fetch_wheels(tmp_path, "3.12")
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert set(gpu_pack.locked()) <= {*ran[0], *lock} and all(word in lock for word in gpu_pack.locked())


@pytest.mark.slow
def test_rehearsal_of_all_stages_at_tiny_size(tmp_path: Path) -> None:
    """On a CPU, from an empty folder, in as many runs as it takes; then nothing is left to do."""
    from synthetic_head import write_heads

    heads, labels = write_heads(tmp_path)
    (tmp_path / ".gpu").mkdir()
    heads.rename(tmp_path / ".gpu" / "dataset")
    words = ["-m", "benchmarks.gpu_report", "--minutes", "3", "--folder", tmp_path / "work", "--size", "tiny"]
    short = [f"{name}.max_minutes=0.05" for name in ("autoencoder", "decoder", "diffusion")]
    words += ["--device", "cpu", "--packed", tmp_path / ".gpu", "--set", f"phantoms.labels_dir={labels}", *short]
    for _ in range(8):
        done = run_interpreter(*words, cwd=ROOT)
        assert done.returncode == 0, done.stderr + done.stdout
        state = json.loads((tmp_path / "work" / "state.json").read_text())
        if set(state.values()) == {"done"} and len(state) == len(gpu_report.STAGES):
            break
    assert set(state.values()) == {"done"} and list(state) == list(gpu_report.STAGES), state
    delivered = {path.name for path in (tmp_path / "work" / "delivered").iterdir()}
    networks = {"autoencoder.safetensors", "diffusion.safetensors"}
    assert delivered == {"results.jsonl", "report.md", "rest.tar.gz", *networks}
    rows = [json.loads(line) for line in (tmp_path / "work" / "results.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == set(gpu_report.STAGES) and not any(row.get("failed") for row in rows)
    assert "| training | iterations |" in done.stdout
