# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What to sample: one row a volume, from flags or from a table."""

from __future__ import annotations

import difflib
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scripts.compute.devices import process_rank, sent
from scripts.conditions.conditions import Conditions, flags_or_table
from scripts.core.cells import present, shown
from scripts.core.config import current_config
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.core.verbs import refuse_other_conditions

SEED_LIMIT = 2**31
SEED = "seed"
NEAR = 0.78  # from this similarity on, one name may be meant for another
CODES = 1  # what tells the draw of a row's codes from that of its noise

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
            of the flags. A cell that says nothing is the default. A row's `seed` stands for that of the run: its noise
            is that of the seed's first sample. Other columns are kept.

    A condition with codes, such as sex, that is not stated is drawn from the row's seed.

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
        self.conditions = conditions
        self.own_seeds: list[int | None] = [None] * len(rows)
        self.about: list[dict[str, str]] = [{} for _ in rows]
        if table is None:
            self.requested = [conditions.with_unknown_codes(rows[0])] * len(rows)
        else:
            conditions.columns_in(rows[0], table)
            further = further_columns(rows[0], conditions, table)
            if not conditions:
                refuse_other_conditions(rows[0], current_config(), f"the column {{}} of {table}")
                logger.warning(f"the model has no conditions: {table} only says that there are {len(rows)} samples")
            where = [f" in row {number} of {table}" for number in range(1, len(rows) + 1)]
            self.ask_for(rows, where, further)
        self.start()

    def ask_for(
        self, rows: Sequence[Mapping[str, Any]], where: Sequence[str], further: Sequence[str] = (), warn: bool = True
    ) -> None:
        """Request one sample a row of a table, instead of what was requested before.

        Args:
            rows: from column to text.
            where: words on each for messages.
            further: columns that are kept for the sidecars.
            warn: whether to warn of values outside the training range.

        Raises:
            BundleError: for a value or a seed that is none.
        """
        stated = [self.conditions.in_table(row, said) for row, said in zip(rows, where)]
        self.requested = [self.conditions.with_unknown_codes(row, said, warn) for row, said in zip(stated, where)]
        self.own_seeds = [_seed_of(row, said) for row, said in zip(rows, where)]
        self.about = [{name: row[name] for name in further if present(row, name)} for row in rows]

    def start(self) -> None:
        """Begin a run over all rows: with a new seed, unless one was given."""
        self.seed = secrets.randbelow(SEED_LIMIT) if self.fixed_seed is None else self.fixed_seed
        self.rows = list(range(len(self.requested)))
        self.vectors = [self._drawn(index, vector) for index, vector in enumerate(self.requested)]

    def seed_of(self, index: int) -> int:
        """The seed of a row: its own, where the table has a column `seed`, else that of the run."""
        own = self.own_seeds[index] if index < len(self.own_seeds) else None
        return self.seed if own is None else own

    def noise_of(self, index: int) -> int:
        """The sample of that seed whose noise a row starts from: its own; the first, where it has a seed of its own."""
        return 0 if index < len(self.own_seeds) and self.own_seeds[index] is not None else index

    def request_of(self, index: int) -> dict[str, Any]:
        """What a sidecar says of a row besides its seed and conditions."""
        about = self.about[index] if index < len(self.about) else {}
        return {
            **({"request": about} if about else {}),
            **({"noise_of_index": self.noise_of(index)} if self.noise_of(index) != index else {}),
        }

    def unknown_codes(self) -> list[str]:
        """Raw names of the conditions, such as sex, that are drawn for some row, since it does not state them."""
        unknown = torch.stack(self.requested).isnan().any(dim=0).tolist() if self.requested else []
        return [c.raw for c, drawn in zip(self.conditions, unknown) if drawn]

    def _drawn(self, index: int, vector: Tensor) -> Tensor:
        """The vector with a code, drawn from the row's seed, in place of each NaN."""
        if not vector.isnan().any():
            return vector
        generator = np.random.default_rng([self.seed_of(index), self.noise_of(index), CODES])
        drawn = [c.normalise(generator.choice([*c.codes.values()])) if c.codes else math.nan for c in self.conditions]
        return torch.where(vector.isnan(), torch.tensor(drawn, dtype=vector.dtype), vector)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row number `index`, its `condition` of shape (conditions,), the run's `seed`, and `noise`.

        `noise` is the index that the row's starting noise belongs to: its own.
        """
        index = self.rows[position]
        seed, noise = self.seed_of(index), self.noise_of(index)
        return {"index": index, "noise": noise, "seed": seed, "condition": self.vectors[index]}


def _seed_of(row: Mapping[str, Any], where: str) -> int | None:
    cell = present(row, "seed")
    try:
        return whole_number(cell, "seed") if cell else None
    except BundleError as error:
        raise BundleError(f"{error}{where}") from error


def further_columns(row: Mapping[str, Any], conditions: Conditions, table: str) -> list[str]:
    """Columns of a table of requests that are no conditions: they are kept in sidecars and in the table of samples.

    Raises:
        BundleError: for one that is nearly a condition or the seed, or that is a flag of the whole run.
    """
    config = current_config()
    flags = {name for name, value in config.items() if not isinstance(value, (dict, list))} | {"sampler"}
    known, kept = [*conditions.flags(), SEED], []
    for column in row:
        near = difflib.get_close_matches(column.lower(), known, 1, NEAR)
        if column in known:
            continue
        if near and not column.endswith(f"_{near[0]}"):  # such as the phantoms' `requested_brain_vol_mm3`
            raise BundleError(f"the table {table} has a column '{shown(column)}': did you mean '{near[0]}'? Rename it")
        if (flag := column.lower().replace("-", "_")) in flags:
            raise BundleError(
                f"the table {table} has a column '{shown(column)}', but --{flag} is of the whole run: give it on the "
                "command line, or rename the column"
            )
        kept.append(column)
    if kept:
        logger.info(
            f"columns of {table} that are no conditions are kept in the sidecars: {', '.join(map(shown, kept))}"
        )
    return kept


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
