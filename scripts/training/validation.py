# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluations during a training, which leave the training as it was."""

from __future__ import annotations

import logging
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from scripts.compute.processes import all_lists, is_main, rank, world_size
from scripts.core.files import make_folder
from scripts.core.options import whole_number
from scripts.core.tables import read_table, write_table

logger = logging.getLogger(__name__)

TABLE = "validation.tsv"
PREFIX = "val_"

Network = nn.Module | Callable[[], nn.Module]


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """A block without gradients, the network in evaluation mode, after which all is as it was.

    Restored are the mode of each module and the random states of Python, NumPy, and PyTorch on the CPU and on
    the network's GPU, so that a training draws the same numbers whether or not it is validated.
    """
    training = [module for module in network.modules() if module.training]
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    network.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module in training:
            module.training = True


class Evaluation(ABC):
    """Handler that evaluates a network after each `every`-th epoch, and after the last.

    Its values go into `engine.state.metrics`, where they stay until the next epoch starts, and into a row of
    `validation.tsv` in the run folder. Attach it before the handlers that read them, and after the one that resumes.

    Args:
        network: the bare network, without `DistributedDataParallel`, or what returns it, such as that of averaged
            weights.
        run_dir: where to write.
        every: epochs between two evaluations; 0 for none.
    """

    flag = "validate_every"

    def __init__(self, network: Network, run_dir: str | os.PathLike, every: Any = 1) -> None:
        self.network = network
        self.run_dir = Path(run_dir)
        self.every = whole_number(every, self.flag)

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        if self.every > 0:
            engine.add_event_handler(Events.STARTED, self._forget_later_rows)
            engine.add_event_handler(Events.EPOCH_STARTED, self._forget_values)
            engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._due), self)

    def _due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.every == 0 or epoch == engine.state.max_epochs

    def _forget_values(self, engine: Engine) -> None:
        for name in [name for name in engine.state.metrics if name.startswith(PREFIX)]:
            del engine.state.metrics[name]

    def _forget_later_rows(self, engine: Engine) -> None:
        if is_main() and (self.run_dir / TABLE).is_file():
            rows = read_table(self.run_dir / TABLE, ("iteration",))
            kept = [row for row in rows if int(row["iteration"]) <= engine.state.iteration]
            if not kept:
                (self.run_dir / TABLE).unlink()
            elif len(kept) < len(rows):
                write_table(self.run_dir / TABLE, kept)

    def __call__(self, engine: Engine) -> None:
        """Evaluate now."""
        network = self.network if isinstance(self.network, nn.Module) else self.network()
        with undisturbed(network):
            values = self.evaluate(network, engine.state.iteration)
        values = {PREFIX + name: value for name, value in values.items()}
        engine.state.metrics.update(values)
        if values and is_main():
            self._write_row({"epoch": engine.state.epoch, "iteration": engine.state.iteration}, values)

    def _write_row(self, when: Mapping[str, int], values: Mapping[str, float]) -> None:
        table = make_folder(self.run_dir) / TABLE
        rows: list[Mapping[str, object]] = [*read_table(table)] if table.is_file() else []
        write_table(table, [*rows, {**when, **{name: f"{value:.7g}" for name, value in values.items()}}])
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info(f"validation after epoch {when['epoch']}: {shown}")

    @abstractmethod
    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        """Values by name, the same in every process; the network is in evaluation mode."""


def in_order(numbered: list[tuple[int, Any]]) -> list[Any]:
    """What is numbered in any process, gathered from all of them and sorted by the numbers."""
    return [value for _, value in sorted(all_lists(numbered), key=_number)]


def _number(numbered: tuple[int, Any]) -> int:
    return numbered[0]


class HeldOut(Evaluation):
    """An evaluation over the rows of a data set, each on its own, shared out to the processes.

    The sums are taken in the order of the rows, so that the number of processes does not change them.

    Args:
        network, run_dir, every: see `Evaluation`.
        dataset: map-style, its items dictionaries; transforms without randomness.
        limit: largest number of rows, the first ones; None for all.
        num_workers: processes that read rows ahead.
    """

    def __init__(
        self,
        network: Network,
        dataset: Dataset,
        run_dir: str | os.PathLike,
        every: Any = 1,
        limit: Any = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(network, run_dir, every)
        self.dataset = dataset
        self.num_workers = num_workers
        length = len(dataset) if isinstance(dataset, Sized) else 0
        self.length = length if limit is None else min(length, whole_number(limit, "validation_limit", least=1))

    def attach(self, engine: Engine) -> None:
        """Follow a trainer; without rows, say so and do nothing."""
        if self.length > 0:
            super().attach(engine)
        else:
            logger.info("no rows are held out for validation, so there is none")

    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        """Measure every row, then summarise."""
        device = next(network.parameters()).device
        rows = [(index, self.measure(network, device, index, item)) for index, item in self._own_rows()]
        return self.summarise(in_order(rows), iteration)

    def _own_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        indices = range(self.length)[rank() :: world_size()]
        # The loader draws a seed for its processes: from a generator of its own.
        workers: dict[str, Any] = {"num_workers": self.num_workers, "generator": torch.Generator()}
        return zip(indices, DataLoader(Subset(self.dataset, list(indices)), batch_size=None, **workers))

    @abstractmethod
    def measure(self, network: nn.Module, device: torch.device, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        """Plain numbers and arrays of one row."""

    @abstractmethod
    def summarise(self, rows: Sequence[Mapping[str, Any]], iteration: int) -> dict[str, float]:
        """Values by name of what `measure` found in all rows, in their order."""
