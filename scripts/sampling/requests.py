# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What to sample: one row a volume, from flags or from a table."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scripts.compute.devices import process_rank, sent
from scripts.conditions.conditions import Conditions, flags_or_table
from scripts.core.config import current_config
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.core.verbs import refuse_other_conditions

SEED_LIMIT = 2**31

logger = logging.getLogger(__name__)


class SampleRequests(Dataset):
    """The volumes to sample, each with its conditions and its own random seed.

    Sample i of seed s depends on its conditions, i and s alone: neither on the batch size nor on the number
    of processes.

    Args:
        conditions: their flags are read from the configuration that this object stands in.
        num_samples: how many volumes share the flags' conditions; None is 1.
        seed: of the whole run; None takes a new one for every run.
        table: path of a table with one volume a row and each condition in a column of either form, instead
            of the flags.

    Raises:
        BundleError: for a bad flag or table, a table together with flags, `num_samples` with a table, or
            several processes without a seed.
    """

    def __init__(
        self,
        conditions: Conditions,
        num_samples: Any = None,
        seed: Any = None,
        table: str | None = None,
    ) -> None:
        self.fixed_seed = None if seed is None else whole_number(seed, "seed")
        if self.fixed_seed is None and process_rank()[1] > 1:
            raise BundleError("several processes sample one run: give --seed, so that they share it")
        rows = flags_or_table(conditions.flags(), table, "num_samples", num_samples)
        if table is None:
            self.vectors = [conditions.from_request(rows[0])] * len(rows)
        else:
            conditions.columns_in(list(rows[0]), table)
            if not conditions:
                refuse_other_conditions(rows[0], current_config(), f"the column {{}} of {table}")
                logger.warning(f"the model has no conditions: {table} only says that there are {len(rows)} samples")
            self.vectors = [conditions.from_row(row, f"row {n} of {table}") for n, row in enumerate(rows, start=1)]
        self.start()

    def start(self) -> None:
        """Begin a run over all rows: with a new seed, unless one was given."""
        self.seed = secrets.randbelow(SEED_LIMIT) if self.fixed_seed is None else self.fixed_seed
        self.rows = list(range(len(self.vectors)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row number `index`, its `condition` of shape (conditions,), the run's `seed`, and `noise`.

        `noise` is the index that the row's starting noise belongs to: its own.
        """
        index = self.rows[position]
        return {"index": index, "noise": index, "seed": self.seed, "condition": self.vectors[index]}


def prepare_noise(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, *, shape: Sequence[int], **kwargs: Any
) -> tuple[Tensor, None, tuple, dict[str, Any]]:
    """MONAI's `prepare_batch` of an evaluator that samples: the starting noise, and what the family needs besides.

    Args:
        batch: of `SampleRequests`.
        device: of the noise and of the conditions.
        non_blocking: as MONAI gives it; copies to a GPU never wait.
        shape: of the noise of one sample.
        kwargs: what MONAI gives besides is not used.
    """
    pairs = zip(batch["seed"].tolist(), batch["noise"].tolist(), strict=True)
    generators = [sample_generator(seed, index) for seed, index in pairs]
    noise = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    condition = sent(batch["condition"], device)
    return sent(noise, device), None, (), {"condition": condition, "generators": generators}


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random stream, on the CPU, of sample `index` of a run with that seed."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
