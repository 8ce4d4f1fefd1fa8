# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`losses.jsonl` in the folder of a training: losses, learning rates and validations, a line of JSON each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ignite.engine import Engine, Events

from scripts.compute.processes import is_main
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, parse_json, replacing
from scripts.training.engine import losses_of
from scripts.training.optimisation import LearningRate
from scripts.training.validation import PREFIX

FILE = "losses.jsonl"


class LossRecord:
    """Handler that writes a line of `losses.jsonl` after each iteration, and one after each validation.

    A line has `iteration` and `epoch`, from 1, and `seconds`, those of the training so far, stops left out; one of an
    iteration has `losses` and `rates`, one of a validation `validation`: maps of names to numbers. Where a training
    goes on from a checkpoint, the lines of later iterations are taken out. Attach it after the handlers that resume,
    stop at infinite losses, and validate.

    Args:
        run_dir: folder of the training.
        rates: handlers whose rates to write.
    """

    def __init__(self, run_dir: str | os.PathLike, rates: Sequence[LearningRate]) -> None:
        self.path, self.rates = Path(run_dir) / FILE, rates

    def attach(self, engine: Engine) -> None:
        """Follow a trainer; only rank 0 writes."""
        if is_main():
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.write_losses)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.write_validation)
            engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.close)

    def start(self, engine: Engine) -> None:
        """Keep the lines of what is done, and go on after them."""
        kept = [line for line in read_lines(self.path) if line["iteration"] <= engine.state.iteration]
        make_folder(self.path.parent)
        with replacing(self.path) as temporary:
            temporary.write_text("".join(map(_as_text, kept)))
        self.since = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        self.file: TextIO = open(self.path, "a")  # noqa: SIM115

    def write_losses(self, engine: Engine) -> None:
        """The line of the iteration that has just ended."""
        rates = {rate.name: rate.rate for rate in self.rates}
        self._write(engine, losses=losses_of(engine.state.output), rates=rates)

    def write_validation(self, engine: Engine) -> None:
        """The line of the epoch's validation, if it had one."""
        found = {name: value for name, value in engine.state.metrics.items() if name.startswith(PREFIX)}
        if found:
            self._write(engine, validation=found)

    def _write(self, engine: Engine, **values: Any) -> None:
        seconds = round(time.monotonic() - self.since, 3)
        state = engine.state
        line = {"iteration": state.iteration, "epoch": state.epoch, "seconds": seconds, **values}
        try:
            self.file.write(_as_text(line))
            self.file.flush()
        except OSError as error:
            raise BundleError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """After the last line."""
        self.file.close()


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `losses.jsonl`, up to one that was cut short; none where there is no file."""
    if path.is_file():
        with open(path) as file:
            for line in file:
                if not line.endswith("\n"):
                    return
                yield parse_json(line)
