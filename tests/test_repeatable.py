# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Data order and random numbers that follow from the seed and the iteration alone."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import CacheDataset, Dataset
from monai.transforms import Compose, Lambda, RandGaussianNoise, RandScaleIntensity
from torch import Tensor

from scripts.compute import processes
from scripts.training.repeatable import Repeatable, RepeatableDataset, Stream, derived_seed, training_loader

SIZE = 7


def batches(stream: Stream, count: int, first: int = 0) -> list[list[tuple[int, int]]]:
    stream.first_iteration = first
    return list(itertools.islice(stream, count))


def test_each_pass_is_a_permutation() -> None:
    keys = list(itertools.chain(*batches(Stream(range(SIZE), 3, seed=1), SIZE)))  # three passes in batches of three
    assert [position for _, position in keys] == list(range(3 * SIZE))
    passes = [[index for index, _ in keys[start : start + SIZE]] for start in (0, SIZE, 2 * SIZE)]
    assert all(sorted(one) == list(range(SIZE)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_all_batches_are_full_and_no_sample_is_preferred() -> None:
    stream = Stream(range(SIZE), 3, seed=1)
    drawn = batches(stream, 50)
    assert len(stream) == 3 and {len(batch) for batch in drawn} == {3}
    counts = Counter(index for batch in drawn for index, _ in batch)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_order_goes_on_from_any_iteration() -> None:
    whole = batches(Stream(range(SIZE), 2, seed=5), 20)
    assert batches(Stream(range(SIZE), 2, seed=5), 8, first=12) == whole[12:]
    assert batches(Stream(range(SIZE), 2, seed=6), 20) != whole


def test_processes_share_the_batch_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(Stream(range(SIZE), 4, seed=3), 9)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(batches(Stream(range(SIZE), 2, seed=3), 9))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def noisy_dataset(cached: bool = False) -> Any:
    """Items whose number is plain to see, with noise from MONAI's and from torch's random states."""
    steps: list[Any] = [Lambda(torch.as_tensor), RandScaleIntensity(0.01, prob=1.0), RandGaussianNoise(prob=0.5)]
    transform = Compose([*steps, Lambda(add_noise)])
    items = [torch.full((4,), 100.0 * (1 + number)) for number in range(SIZE)]
    return CacheDataset(items, transform, progress=False) if cached else Dataset(items, transform)


def add_noise(item: Tensor) -> Tensor:
    return item + 0.1 * torch.randn(4)


@pytest.mark.parametrize("cached", [False, True])
def test_an_item_depends_on_seed_and_position_alone(cached: bool) -> None:
    data = RepeatableDataset(noisy_dataset(cached), seed=1)
    item = data[(3, 17)]
    data[(2, 5)], torch.randn(3)
    assert torch.equal(data[(3, 17)], item)
    assert torch.equal(RepeatableDataset(noisy_dataset(cached), seed=1)[(3, 17)], item)
    for other in (data[(3, 18)], RepeatableDataset(noisy_dataset(cached), seed=2)[(3, 17)]):
        assert not torch.equal(other, item) and other.mean() == pytest.approx(400.0, rel=0.05)


def test_items_leave_the_random_state_alone() -> None:
    data = RepeatableDataset(noisy_dataset(), seed=1)
    torch.manual_seed(9)
    expected = torch.randn(2)
    torch.manual_seed(9)
    data[(0, 0)]
    assert torch.equal(torch.randn(2), expected)


def test_batches_do_not_depend_on_the_loading_processes() -> None:
    drawn = []
    for workers in (0, 2):
        loader = training_loader(noisy_dataset(), 3, seed=4, num_workers=workers)
        loader.batch_sampler.first_iteration = 2
        drawn.append(torch.stack(list(itertools.islice(loader, 5))))
    assert torch.equal(*drawn)


def test_seeds_differ_between_samples_and_iterations() -> None:
    seeds = {derived_seed(seed, kind, number) for seed in range(5) for kind in (0, 1) for number in range(200)}
    assert len(seeds) == 2000


def test_each_iteration_has_its_own_random_state() -> None:
    drawn: dict[int, tuple[float, ...]] = {}

    def draw(engine: Engine, batch: Any) -> None:
        drawn[engine.state.iteration] = (torch.rand(1).item(), float(np.random.rand()), random.random())

    loader: Any = SimpleNamespace(batch_sampler=SimpleNamespace(first_iteration=0))
    for epochs in (1, 2):  # the second run draws for iterations 1 to 4 what it would have without the first
        before = dict(drawn)
        torch.rand(epochs)
        engine = Engine(draw)
        Repeatable(loader, seed=3).attach(engine)
        engine.run([0, 0], max_epochs=epochs)
        assert {number: drawn[number] for number in before} == before
    assert len(drawn) == 4 and len(set(drawn.values())) == 4


def test_stream_starts_at_the_engines_iteration() -> None:
    loader: Any = SimpleNamespace(batch_sampler=SimpleNamespace(first_iteration=0))
    engine = Engine(lambda engine, batch: None)
    engine.state.iteration = 5
    Repeatable(loader, seed=3).start(engine)
    assert loader.batch_sampler.first_iteration == 5
