# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python tests/hostile.py`: some hundred bad inputs, generated, and what becomes of each.

Each option of each verb gets values below, above and beside what it may be, of another type, and a misspelt name; each
file of a small pipeline is cut, flipped, emptied, or replaced by something of another kind, and the verb that reads it
is run. An input is taken well if it ends in one line, or in success where what was damaged can be made again, and all
that the run was only to read is as it was. Prints a line for each that is not, and counts.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from scripts.compute.ownership import release_all  # noqa: E402
from scripts.core.command_help import option_names  # noqa: E402
from scripts.core.errors import explain  # noqa: E402
from scripts.core.option_types import OPTIONS, OptionType  # noqa: E402
from scripts.core.verbs import condition_flags, merge, verbs  # noqa: E402

OLD = ROOT / "tests" / "data" / "version_2_0_0"
TINY = ROOT / "configs" / "tiny.yaml"


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: for the report.
        verb: which is run.
        flags: its options.
        damage: what is done to a copy of the small pipeline's files before.
        refused: whether it must fail; else it may also succeed.
    """

    name: str
    verb: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    damage: Callable[[Path], None] | None = None
    refused: bool = True


def wrong_values(option: OptionType) -> Iterator[Any]:
    """Values that an option may not have: beyond its bounds and at those it excludes, of other types, empty."""
    kind = option.kind
    if kind in ("number", "whole"):
        for bound, beyond in ((option.least, -1), (option.most, 1)):
            yield from [] if abs(bound) == float("inf") else [bound + beyond]
        yield from (bound for bound in (option.above, option.below) if abs(bound) != float("inf"))
        yield from ("x", "nan", float("inf"), [1, 2], {"a": 1}, "")
    elif kind == "share":
        yield from (-0.01, 1.01, "half", "nan", [0.5])
    elif kind == "yes_no":
        yield from (2, "perhaps", [1], "")
    elif kind in ("path", "paths"):
        yield from ("", "  ", 7, "a\0b", "a#b")
    elif kind in ("numbers", "wholes"):
        yield from ("x", 3, [], ["a", "b", "c"], [float("nan")] * 3, [-(10**9)] * 3 if kind == "wholes" else {"a": 1})
    elif kind == "names":
        yield from ([3], [""])
    elif kind == "map":
        yield from ("x", 3, [1])
    elif kind == "text" and not option.optional:
        yield from ("", ["a"])


def option_cases() -> Iterator[Case]:
    """Every option, wrong in every way and misspelt, each time in the next of the verbs that have it."""
    takers: dict[str, list[str]] = {}
    for verb in verbs():
        config = merge(verbs()[verb])
        names = set(option_names(verb)) - set(condition_flags(config))
        nested = {name for name in OPTIONS if "::" in name and "*" not in name and name.split("::")[0] in config}
        for name in sorted((names | nested) & OPTIONS.keys()):
            takers.setdefault(name, []).append(verb)
    for number, (name, takes) in enumerate(takers.items()):
        given = [(f"--{name} {value!r}", {name: value}) for value in wrong_values(OPTIONS[name])]
        for turn, (words, flags) in enumerate([*given, (f"--{name}x", {f"{name}x": 1})], start=number):
            verb = takes[turn % len(takes)]
            yield Case(f"{verb} {words}", verb, flags)


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not what it was\n")


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {one.__name__[1:]: one for one in (_cut, _flipped, _emptied, _text, _nested, _folder)}
TRAINED = {"autoencoder_path": "{0}/autoencoder/autoencoder.pt", "diffusion_path": "{0}/diffusion/diffusion.pt"}
SAMPLING = {"output_dir": "{0}/samples", "num_samples": 2, "seed": 1, "num_inference_steps": 5, **TRAINED}
SAMPLING |= {"gender": 1.0, "age": 0.7, "ventricular_vol": 0.7, "brain_vol": 0.5, "load_old": 0}
SMALL = {"max_epochs": 1, "epoch_length": 1, "batch_size": 1, "seed": 1, "validation_fraction": 0.5, "num_workers": 0}
ENCODING = {"dataset_dir": "{0}/dataset", "latents_dir": "{0}/latents", "num_workers": 0, "load_old": 0}
ENCODING |= {"autoencoder_path": TRAINED["autoencoder_path"]}
DIFFUSION = {"latents_dir": "{0}/latents", "run_dir": "{0}/run", "sample_every": 0, **SMALL, **ENCODING}
DIFFUSION.pop("dataset_dir")
EVALUATION = {"synthetic_dir": "{0}/samples", "real_dir": "{0}/dataset", "output_dir": "{0}/evaluated", "num_pairs": 2}
READERS: dict[str, list[tuple[str, Mapping[str, Any]]]] = {
    "samples/sample_seed-1_000000.nii.gz": [("sample", SAMPLING), ("evaluate", EVALUATION)],
    "samples/sample_seed-1_000000.json": [("sample", SAMPLING), ("evaluate", EVALUATION)],
    "autoencoder/autoencoder.pt": [("sample", SAMPLING), ("encode_latents", ENCODING)],
    "diffusion/diffusion.pt": [("sample", SAMPLING)],
    "dataset/participants.tsv": [("encode_latents", ENCODING), ("evaluate", EVALUATION)],
    "dataset/sub-1/anat/sub-1_space-MNI152_T1w.nii.gz": [("encode_latents", ENCODING), ("evaluate", EVALUATION)],
    "latents/posteriors.npy": [("encode_latents", ENCODING), ("train diffusion", DIFFUSION)],
    "latents/encoded.npy": [("encode_latents", ENCODING), ("train diffusion", DIFFUSION)],
    "latents/encoding.json": [("encode_latents", ENCODING), ("train diffusion", DIFFUSION)],
    "latents/participants.tsv": [("encode_latents", ENCODING), ("train diffusion", DIFFUSION)],
}


def file_cases() -> Iterator[Case]:
    """Every file of the small pipeline, damaged in every way, before each verb that reads it."""
    for name, readers in READERS.items():
        for word, damage in DAMAGES.items():
            for verb, flags in readers:
                yield Case(f"{verb} with {name} {word}", verb, flags, partial(_harm, name, damage), False)


def _harm(name: str, damage: Callable[[Path], None], old: Path) -> None:
    damage(old / name)


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        line: what the command line would show; None for a traceback, empty for success.
        lost: files that the run was only to read and that are not as they were.
    """

    line: str | None
    lost: tuple[str, ...] = ()

    def faults(self, case: Case) -> list[str]:
        """What is wrong about it; empty if nothing is."""
        found = ["a traceback"] if self.line is None else []
        found += ["taken"] if case.refused and self.line == "" else []
        found += ["several lines"] if self.line and "\n" in self.line else []
        return [*found, *(f"lost {name}" for name in self.lost)]


def _state(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def unpack(folder: Path) -> Path:
    """A copy of the small pipeline's files that version 2.0.0 made."""
    old = Path(shutil.copytree(OLD, folder / "old"))
    for packed in old.rglob("*.pt.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    return old


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in this process, in an empty folder."""
    from monai.bundle import create_workflow

    files = [*verbs()[case.verb], TINY]
    given = {"output_dir": str(folder / "out"), "run_dir": str(folder / "run"), "export_dir": str(folder / "export")}
    if case.damage is not None:
        old = unpack(folder)
        case.damage(old)
        files.append(old / "small.yaml")
        given = {}
    flags = {name: v.format(folder / "old") if isinstance(v, str) else v for name, v in case.flags.items()}
    given |= {"bundle_root": str(folder / "bundle"), "device": "cpu", **flags}
    written = [str(given[name]) for name in ("output_dir", "run_dir", "latents_dir") if name in given]
    before, line = _state(folder), ""
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            words = [str(file) for file in files]
            if case.verb == "serve":
                stack.enter_context(mock.patch("uvicorn.Server.run"))  # a page that is served has been taken
            workflow = create_workflow(config_file=words, workflow_type="inference", logging_file=False, **given)
            workflow.run()
            workflow.finalize()
    except Exception as error:
        line = explain(error)  # type: ignore[assignment]
    finally:
        release_all()  # as the end of a process does
    after = _state(folder)
    lost = [n for n, one in before.items() if after.get(n) != one and not str(folder / n).startswith(tuple(written))]
    return Outcome(line, tuple(lost))


def main() -> int:
    """The program: runs all cases, or those whose name has a word, and reports."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", default="", help="a word that a case's name has")
    parser.add_argument("--all", action="store_true", help="print those that are taken well, too")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    cases = [case for case in (*option_cases(), *file_cases()) if options.only in case.name]
    bad = 0
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(case, Path(folder))
        faults = outcome.faults(case)
        bad += bool(faults)
        if faults or options.all:
            print(f"{case.name}: {', '.join(faults) or 'well'}: {outcome.line}", flush=True)
    print(f"{len(cases)} cases, {bad} not taken well")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
