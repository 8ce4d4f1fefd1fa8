# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""All that one GPU is wanted for, in the minutes that there are: tests, sampling, the small model, training steps.

    python -m benchmarks.gpu_report --minutes 9.5 --folder runs/gpu
    python -m benchmarks.gpu_report --minutes 9.5 --folder runs/gpu --stages demo
    python -m benchmarks.gpu_report --minutes 3 --folder runs/rehearsal --device cpu --size tiny

Each stage is a process of its own and has a share of the minutes; what one does not need, the later ones get. Results
are written as soon as they are there: `results.jsonl`, a line each, `report.md`, tables of them, and what each stage
writes in its folder. --deliver gets those two, the weights in pieces below --part_mb, and all else that is small in one
archive: few files, for where few can be taken along. The program stops by itself half a minute before the end. The same
command goes on where it was stopped: first with stages that were not tried yet, then with those that failed.

Needs the repository and the packages that sampling and training import; the demo training also the prepared example
heads, of --packed (`benchmarks.gpu_pack`) or of dataset/. While the other stages compute on the GPU, idle cores make
its phantoms (--meanwhile).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_json, write_text
from scripts.core.paths import MODELS, ROOT
from scripts.core.programs import errors_in_one_line

logger = logging.getLogger(__name__)

END_S, LEAST_S, POLL_S, DELIVER_S, PATIENCE_S = 30.0, 30.0, 0.5, 30.0, 15.0
DEMO_GRACE_S = 30.0  # scripts.tools.demo_training.GRACE_S, without importing PyTorch
HEADS, PERCEPTUAL = "dataset", "perceptual_vgg16.safetensors"  # names of what benchmarks.gpu_pack packs
STOPPED = "stopped in time"  # what a stage says that ended well, but before all of it was done
LARGEST = 2**20  # bytes of a file in the archive
ARCHIVED = (".json", ".jsonl", ".tsv", ".png", ".log", ".html", ".md")
TEST = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)")

Rows = list[dict[str, Any]]


class Stage(NamedTuple):
    """A part of the report.

    Attributes:
        share: of the minutes; a weight.
        command: words after `python`, of the options and of the minutes that it has.
        results: what it has found so far, read from the folder.
    """

    share: float
    command: Callable[[argparse.Namespace, float], list[str]]
    results: Callable[[Path], Rows]


@dataclass
class Report:
    """What is found, where it is written, and until when.

    Attributes:
        options: the command line.
        folder: of all stages.
        deadline: of `time.monotonic()`.
        state: stage -> `done`, `stopped`, or why it failed.
        delivered: when, by `time.monotonic()`.
        written: the rows that were written last.
    """

    options: argparse.Namespace
    folder: Path
    deadline: float
    state: dict[str, str] = field(default_factory=dict)
    delivered: float = 0.0
    written: Rows | None = None

    def left(self) -> float:
        """Seconds until the program stops by itself."""
        return self.deadline - END_S - time.monotonic()

    def order(self) -> list[str]:
        """The stages that are not done: those that were stopped or not tried, and then those that failed."""
        waiting = [name for name in self.options.stages if self.state.get(name) != "done"]
        return sorted(waiting, key=lambda name: self.state.get(name, "stopped") != "stopped")

    def rows(self) -> Rows:
        """All results so far, and how each stage ended."""
        found = [{"stage": name, **row} for name in self.options.stages for row in _results(name, self.folder)]
        return [*found, *({"stage": name, "state": state} for name, state in self.state.items())]

    def write(self) -> None:
        """Write what there is; a disk that is full is said and does not end the measurements."""
        rows = self.rows()
        if rows == self.written:
            return
        try:
            write_json(self.folder / "state.json", self.state)
            write_text(self.folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(self.folder / "report.md", tables(rows))
            self.written = rows
        except BundleError as error:
            logger.error(error)

    def deliver(self) -> None:
        """Copy to the folder of what is taken along: report, archive, weights."""
        self.delivered = time.monotonic()
        try:
            target = make_folder(self.options.deliver or self.folder / "delivered")
            for path in [self.folder / "results.jsonl", self.folder / "report.md", *weights(self.folder)]:
                if path.is_file():
                    with replacing(target / path.name) as temporary:
                        shutil.copyfile(path, temporary)
            with replacing(target / "rest.tar.gz") as temporary, tarfile.open(temporary, "w:gz") as archive:
                for path in archived(self.folder, target):
                    archive.add(path, path.relative_to(self.folder))
        except (BundleError, OSError) as error:
            logger.error(error)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages with command-line arguments."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, _leave)
    deadline = time.monotonic() + 60.0 * options.minutes
    with errors_in_one_line():
        folder = make_folder(options.folder)
        report = Report(options, folder, deadline)
        if (folder / "state.json").is_file():
            report.state = json.loads((folder / "state.json").read_text())
        phantoms = _begin_phantoms(report)
        try:
            _run_all(report, phantoms)
        finally:
            _end(phantoms)
            report.write()
            report.deliver()
            print(tables(report.rows()))
        failed = [name for name in options.stages if report.state.get(name, "stopped") not in ("done", "stopped")]
        if failed:
            raise BundleError(f"failed: {', '.join(failed)}; see {folder}/NAME.log. The same command tries again")
    left = report.order()
    logger.info(f"not done yet: {', '.join(left)}; the same command goes on" if left else "all stages are done")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="that there are, the last half for the end")
    parser.add_argument("--folder", required=True, help="of all that is measured and trained")
    parser.add_argument("--deliver", help="folder of the few files to take along (default: delivered, in --folder)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that it runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", default="configs/demo.yaml", help="overlay of the model that is trained")
    parser.add_argument("--packed", default=".gpu", help="what benchmarks.gpu_pack has packed (default .gpu)")
    parser.add_argument("--phantoms", type=int, help="to train on (default 480; tiny: 8)")
    parser.add_argument("--set", nargs="+", default=[], help="as demo_training takes it, of its stages")
    parser.add_argument("--part_mb", type=float, default=15.0, help="of the weights' pieces (default 15)")
    idle = max(0, (os.cpu_count() or 1) - 6)
    parser.add_argument("--meanwhile", type=int, default=idle, help="processes that make phantoms before the training")
    options = parser.parse_args(arguments)
    if not options.minutes > 0.0:
        parser.error("--minutes must be above 0")
    options.phantoms = options.phantoms or (8 if options.size == "tiny" else 480)
    options.folder, options.packed = Path(options.folder).resolve(), Path(options.packed).resolve()
    return options


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit("stopped by a signal: what was measured is kept, and the same command goes on")


def _run_all(report: Report, phantoms: subprocess.Popen | None) -> None:
    waiting = report.order()
    while waiting and report.left() > 0:
        name, *waiting = waiting
        share = STAGES[name].share / sum(STAGES[one].share for one in [name, *waiting])
        if name == "demo":
            _end(phantoms)
        report.state[name] = _run(name, report, min(report.left(), max(LEAST_S, share * report.left())))
        report.write()


def _run(name: str, report: Report, seconds: float) -> str:
    """One stage in a process of its own; what `Report.state` says of it."""
    logger.info(f"{name}: {seconds:.0f} s")
    until = time.monotonic() + seconds
    command = [sys.executable, *STAGES[name].command(report.options, seconds / 60.0)]
    log = report.folder / f"{name}.log"
    before = log.stat().st_size if log.is_file() else 0
    process = _start(command, log)
    try:
        while process.poll() is None and time.monotonic() < until:
            time.sleep(POLL_S)
            report.write()
            if time.monotonic() - report.delivered > DELIVER_S:
                report.deliver()
        if process.poll() is None:
            return "stopped"
    finally:
        _end(process)
    if process.returncode:
        return f"exit code {process.returncode}: {last_line(log)}"
    return "stopped" if STOPPED.encode() in log.read_bytes()[before:] else "done"


def _start(command: Sequence[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _end(process: subprocess.Popen | None) -> None:
    """Ask a process to end, which tells those that it has started, and then end all that are left of them."""
    if process is None:
        return
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _begin_phantoms(report: Report) -> subprocess.Popen | None:
    """In the background, by idle cores; none without a stage before the training, or without heads to make them of."""
    order = [*report.order(), "demo"]
    heads = _packed(report.options, HEADS, ROOT / "dataset")
    if order[0] == "demo" or report.state.get("demo") or report.options.meanwhile < 1 or not heads.is_dir():
        return None
    words = [*_demo(report.options, 1.0e6), "--until", "phantoms", "--processes", str(report.options.meanwhile)]
    return _start([sys.executable, *words], report.folder / "phantoms.log")


def last_line(log: Path) -> str:
    """What a command said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    return lines[-1].strip()[:200]


def weights(folder: Path) -> Iterator[Path]:
    """What a training has made so far: files of weights, or the pieces of those that are cut."""
    for path in sorted((folder / "demo_delivered").glob("*.safetensors")):
        pieces = sorted(path.parent.glob(f"{path.name}.[0-9][0-9]"))
        yield from pieces or ([path] if not path.stem.endswith("_first") else [])


def archived(folder: Path, delivered: Path) -> Iterator[Path]:
    """The small files of all stages, but those of single samples and phantoms."""
    wanted = [folder, folder / "sampling", folder / "compiled", folder / "demo_delivered"]
    for one in (path for part in wanted for path in sorted(part.glob("*"))):
        if one.suffix in ARCHIVED and one.stat().st_size <= LARGEST and one.parent != delivered:
            yield one


# The stages: commands of their own.


def _versions(options: argparse.Namespace, minutes: float) -> list[str]:
    return ["-m", "benchmarks.versions", "--device", options.device, "--json", _in(options, "versions.json")]


def _tests(options: argparse.Namespace, minutes: float) -> list[str]:
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    alone = ["--collect-only"] if options.device == "cpu" else []
    return ["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", *alone, *files]


def _sampling(options: argparse.Namespace, minutes: float, *more: str, folder: str = "sampling") -> list[str]:
    counts = {"full": ["1", "4", "--steps", "50"], "tiny": ["1", "2", "--steps", "2"]}[options.size]
    words = ["--cases", "unet", "steps", "decode", "--ways", "original", "ours", "--batches", *counts, "--fast", "0"]
    where = ["--device", options.device, "--size", options.size, "--folder", _in(options, folder), "--resume", "1"]
    return ["-m", "benchmarks.sampling", *words, *where, "--minutes", f"{minutes:.3f}", *more]


def _compiled(options: argparse.Namespace, minutes: float) -> list[str]:
    return _sampling(options, minutes, "--compile", "1", "--warmup", "3", folder="compiled")


def _demo(options: argparse.Namespace, minutes: float) -> list[str]:
    shares = ["--autoencoder_minutes", "3", "--decoder_minutes", "1", "--diffusion_minutes", "3"]
    tiny = ["--rehearse", "--processes", "1", "--held_out", "3", "--samples", "2", "--pairs", "2", "--first", "4"]
    full = ["--held_out", "24", "--samples", "32", "--pairs", "48", "--first", "64"]
    given = ["--set", *([] if options.size == "tiny" else ["diffusion.batch_size=64"]), *options.set]
    where = ["--work_dir", _in(options, "demo"), "--deliver_dir", _in(options, "demo_delivered")]
    where += ["--config", options.config, "--device", options.device]
    where += ["--heads_dir", str(_packed(options, HEADS, ROOT / "dataset"))]
    where += ["--perceptual_path", str(_packed(options, PERCEPTUAL, MODELS / PERCEPTUAL))]
    own_end = (DEMO_GRACE_S - PATIENCE_S) / 60.0  # it stops by itself, a little before it would be stopped
    limits = ["--minutes", f"{minutes + own_end:.3f}", "--fit", "1", "--brain_age_minutes", "0"]
    common = ["--phantoms", str(options.phantoms), "--part_mb", f"{options.part_mb:g}", *(given if given[1:] else [])]
    sizes = tiny if options.size == "tiny" else full
    return ["-m", "scripts.tools.demo_training", *where, *limits, *shares, *sizes, *common]


def _steps(options: argparse.Namespace, minutes: float) -> list[str]:
    words = ["--batches", "1", "4", "--precisions", "bf16"] if options.size == "full" else ["--precisions", "fp32"]
    where = ["--device", options.device, "--size", options.size, "--json", _in(options, "steps.json"), "--resume", "1"]
    return ["-m", "benchmarks.training_step", "--repeats", "3", *words, *where]


def _in(options: argparse.Namespace, name: str) -> str:
    return str(options.folder / name)


def _packed(options: argparse.Namespace, name: str, otherwise: Path) -> Path:
    return options.packed / name if (options.packed / name).exists() else otherwise


# What the stages have found.


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _version_rows(folder: Path) -> Rows:
    return [{"what": name, "is": value} for name, value in _read_json(folder / "versions.json").items()]


def _test_rows(folder: Path) -> Rows:
    log = folder / "tests.log"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found = {match[1]: match[2] for line in lines if (match := TEST.match(line))}  # of the newest run
    return [{"test": name, "outcome": outcome.lower()} for name, outcome in found.items()]


def _sampling_rows(folder: Path, name: str = "sampling") -> Rows:
    shown = ("case", "way", "batch", "steps", "times_original", "peak_gib", "percent_of_matmul", "relative_error")
    rows = _read_json(folder / name / "sampling.json").get("rows", [])
    return [
        {**{key: row.get(key) for key in shown}, "seconds": _median(row), "failed": row.get("failed")} for row in rows
    ]


def _compiled_rows(folder: Path) -> Rows:
    return _sampling_rows(folder, "compiled")


def _step_rows(folder: Path) -> Rows:
    shown = ("stage", "batch", "precision", "checkpointing", "peak_gib", "kept_gib", "failed")
    rows = _read_json(folder / "steps.json").get("steps", [])
    renamed = [{("network" if key == "stage" else key): row.get(key) for key in shown} for row in rows]
    return [{**short, "seconds": _median(row)} for short, row in zip(renamed, rows)]


def _demo_rows(folder: Path) -> Rows:
    rows: Rows = []
    for path in sorted((folder / "demo" / "runs").glob("*/losses.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        last = next((line for line in reversed(lines) if "losses" in line), None)
        if last is not None:
            validated: dict[str, float] = next(
                (line["validation"] for line in reversed(lines) if "validation" in line), {}
            )
            counted = {"training": path.parent.name, "iterations": last["iteration"], "seconds": last["seconds"]}
            rows.append({**counted, **{k: float(f"{v:.4g}") for k, v in {**last["losses"], **validated}.items()}})
    measured = _read_json(folder / "demo_delivered" / "evaluation.json").get("rows", [])
    return rows + [{key: row[key] for key in ("name", "model", "value") if key in row} for row in measured]


def _median(row: Mapping[str, Any]) -> float | None:
    return round(median(row["seconds"]), 5) if row.get("seconds") else None


def _results(name: str, folder: Path) -> Rows:
    """Of a stage; nothing where its file is being written or was cut short."""
    try:
        return STAGES[name].results(folder)
    except (OSError, ValueError, KeyError) as error:
        return [{"failed": f"its results cannot be read: {error}"}]


def tables(rows: Rows) -> str:
    """A table in Markdown for each stage and kind of row: those with the same columns."""
    kinds: dict[tuple[str, tuple[str, ...]], Rows] = {}
    for row in rows:
        columns = tuple(key for key, value in row.items() if key != "stage" and value is not None)
        kinds.setdefault((row["stage"], columns), []).append(row)
    parts = []
    for (stage, columns), some in kinds.items():
        head = f"\n{stage}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        parts.append(head + "".join(f"| {' | '.join(_cell(row[key]) for key in columns)} |\n" for row in some))
    return "".join(parts).lstrip("\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


STAGES: dict[str, Stage] = {
    "versions": Stage(0.3, _versions, _version_rows),
    "tests": Stage(2.0, _tests, _test_rows),
    "sampling": Stage(1.5, _sampling, _sampling_rows),
    "compiled": Stage(2.0, _compiled, _compiled_rows),
    "demo": Stage(8.0, _demo, _demo_rows),
    "steps": Stage(1.5, _steps, _step_rows),
}


if __name__ == "__main__":
    main()
