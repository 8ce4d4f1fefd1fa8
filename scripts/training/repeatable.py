# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The order of the training data and all random numbers, as functions of the seed and of how far the training is.

Nothing random is carried from one iteration to the next. The stream of samples is one permutation of the dataset after
the other; the sample at each position of the stream has a random state of its own, and so has each iteration. A
training that was stopped draws the same numbers when it goes on, and one in several processes draws those of one
process with the whole batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.transforms import Randomizable
from torch.utils.data import Dataset, Sampler

from scripts.compute import processes

SAMPLES, ITERATIONS = 0, 1


def derived_seed(seed: int, kind: int, number: int) -> int:
    """A seed of 32 bits for one sample or one iteration, from NumPy's `SeedSequence`."""
    return int(np.random.SeedSequence([seed, kind, number]).generate_state(1)[0])


class Stream(Sampler[list[tuple[int, int]]]):
    """Batch sampler without an end, from any iteration on.

    Iteration i takes positions i * N to (i + 1) * N - 1 of the stream, where N is the batch size times the number of
    processes, and each process its own part of them. Each position is one key `(index in the dataset, position)`. A
    batch may reach from one pass over the dataset into the next, so that all batches are full.

    Args:
        dataset: what is sampled.
        batch_size: of one process.
        seed: of the order.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = len(dataset), batch_size, seed
        self.first_iteration = 0
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        """Iterations in one pass over the dataset, rounded up."""
        return -(-self.size // (self.batch_size * processes.world_size()))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in count(self.first_iteration):
            first = (iteration * processes.world_size() + processes.rank()) * self.batch_size
            yield [(self.index(position), position) for position in range(first, first + self.batch_size)]

    def index(self, position: int) -> int:
        """Which item of the dataset stands at a position of the stream."""
        number, place = divmod(position, self.size)
        return int(self._order(number)[place])

    def _permutation(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).permutation(self.size)


class RepeatableDataset(Dataset):
    """A dataset whose random transforms depend on nothing but the seed and the position in the stream.

    Args:
        dataset: a MONAI dataset with its `transform`, or any whose randomness is torch's own.
        seed: of the random numbers.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The item of a key of `Stream`; torch's random state outside is left as it was."""
        index, position = key
        seed = derived_seed(self.seed, SAMPLES, position)
        transform = getattr(self.dataset, "transform", None)
        if isinstance(transform, Randomizable):
            transform.set_random_state(seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset[index]


def training_loader(dataset: Any, batch_size: int, seed: int, num_workers: int = 0) -> DataLoader:
    """A loader of the endless stream of training batches, for one of the processes.

    Args:
        dataset: MONAI dataset.
        batch_size: samples of this process in one iteration.
        seed: of order and augmentation.
        num_workers: processes that load; the batches do not depend on it.
    """
    stream = Stream(dataset, batch_size, seed)
    pinned = torch.cuda.is_available()
    return DataLoader(
        RepeatableDataset(dataset, seed), batch_sampler=stream, num_workers=num_workers, pin_memory=pinned
    )


class Repeatable:
    """Handler that starts the stream at the engine's iteration, and each iteration from a random state of its own.

    The state is that of Python, NumPy and PyTorch, on all devices, and alike in all processes: what differs from sample
    to sample comes with the batch.

    Args:
        loader: from `training_loader`.
        seed: of the training.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.loader, self.seed = loader, seed

    def attach(self, engine: Engine) -> None:
        """Follow a MONAI trainer; to be attached after the handler that resumes it."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_STARTED, self.seed_iteration)

    def start(self, engine: Engine) -> None:
        """Go on where the engine is."""
        self.loader.batch_sampler.first_iteration = engine.state.iteration

    def seed_iteration(self, engine: Engine) -> None:
        """Set the random states of the iteration that begins."""
        seed = derived_seed(self.seed, ITERATIONS, engine.state.iteration)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
