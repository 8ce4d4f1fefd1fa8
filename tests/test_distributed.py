# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How the processes of one training find each other, and only each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.compute import processes
from scripts.compute.processes import PATIENCE, meet
from scripts.core.errors import BundleError


def all_meet(store: dist.Store, ranks: list[int]) -> set[str]:
    """The names that processes come to, started in that order."""
    with ThreadPoolExecutor(len(ranks)) as processes:
        return set(processes.map(meet, [store] * len(ranks), ranks, [len(ranks)] * len(ranks), [30.0] * len(ranks)))


def test_each_start_has_one_name_of_its_own() -> None:
    """Whatever an earlier start, of another number of processes even, has left in the store."""
    store = dist.HashStore()
    starts = [all_meet(store, ranks) for ranks in ([1, 2, 0], [0, 1, 2], [2, 1, 0], [1, 0], [3, 2, 1, 0], [0])]
    assert all(len(names) == 1 for names in starts)
    assert len(set.union(*starts)) == len(starts)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_stays_alone_says_so(rank: int) -> None:
    with pytest.raises(BundleError, match="have not turned up"):
        meet(dist.HashStore(), rank, 2, patience=0.2)


@pytest.mark.parametrize(("device", "backend", "own"), [("cuda:1", "nccl", "cuda:1"), ("cpu", "gloo", None)])
def test_a_group_knows_its_device_and_waits_longer_than_a_validation(
    device: str, backend: str, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(processes, "meet", lambda *args: "name")
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **options: given.update(options, backend=kind))
    processes.start(torch.device(device))
    assert (given["backend"], given["timeout"], str(given["device_id"])) == (backend, PATIENCE, str(own))
