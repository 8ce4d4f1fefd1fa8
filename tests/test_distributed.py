# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How the processes of one training find each other, and only each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from scripts.compute.processes import meet
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
