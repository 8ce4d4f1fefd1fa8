# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `collection draw`: the table of all rows, before any of them is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from scripts.collection.folder import DRAWN, IDENTIFIER, ROWS, Collection, refuse_other_facts, row_name
from scripts.collection.laws import ConditionLaw
from scripts.collection.strata import Strata
from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, write_json
from scripts.core.options import whole_number
from scripts.core.tables import write_table
from scripts.sampling.requests import SEED

logger = logging.getLogger(__name__)

ROUNDS = 2000
"""How often a row is drawn anew before the law is said not to give such rows."""
SEED_BITS = 53
"""What any reader of JSON holds exactly."""
DECIDES_STRATA, DECIDES_SEEDS = 1, 2
"""What tells the streams of random numbers of strata and of seeds from those of values."""


class Drawing:
    """The rows of a collection: their conditions by a law, and a seed for each.

    Row i depends on the law, the strata, the seed and i alone, so that a longer table begins with the shorter one.

    Args:
        collection: where the table goes.
        conditions: what a row states.
        law: what the conditions are drawn from.
        strata: raw name -> parts of its range; see `Strata`.
        num_rows: how many.
        seed: of the table.
        rows_per_shard: how many rows are made, and checked, together.

    Raises:
        BundleError: for numbers or strata that are none.
    """

    def __init__(
        self,
        collection: Collection,
        conditions: Conditions,
        law: ConditionLaw,
        strata: Any = None,
        num_rows: Any = 100_000,
        seed: Any = 0,
        rows_per_shard: Any = 1000,
    ) -> None:
        self.collection, self.conditions, self.law = collection, conditions, law
        self.strata = Strata(conditions, strata)
        self.num_rows = whole_number(num_rows, "num_rows", least=1)
        self.seed = whole_number(0 if seed is None else seed, "seed")
        self.rows_per_shard = whole_number(rows_per_shard, "rows_per_shard", least=1)

    def facts(self) -> dict[str, Any]:
        """What decides the table."""
        return {
            "law": self.law.facts(),
            "strata": self.strata.stated,
            "seed": self.seed,
            "rows": self.num_rows,
            "rows_per_shard": self.rows_per_shard,
            "conditions": self.conditions.as_dict(),
        }

    def is_new(self) -> bool:
        """Whether there is no such table yet.

        Raises:
            BundleError: if there is another one.
        """
        if not self.collection.is_drawn:
            return True
        facts = self.facts()
        found = {name: self.collection.drawn.get(name) for name in facts}
        refuse_other_facts(found, facts, self.collection.path, "drawn")
        logger.info(f"{self.collection.path / ROWS} has these {self.num_rows} rows already")
        return False

    def run(self) -> None:
        """Draw the rows and write `rows.tsv`, then `rows.json`, which says what they are.

        Raises:
            BundleError: if the law does not give rows of a stratum, or they cannot be written.
        """
        values, seeds = self.values(), row_seeds(self.seed, self.num_rows)
        path = self.collection.path / ROWS
        write_table(path, [self._row(index, row, seed) for index, (row, seed) in enumerate(zip(values, seeds))])
        columns = {c.raw: _described(c, column) for c, column in zip(self.conditions, values.T)}
        for name, column in columns.items():
            if column.get("Outside"):
                logger.warning(
                    f"{column['Outside']} of {self.num_rows} rows are outside the training range of {name} "
                    f"({column['TrainingRange'][0]:g} to {column['TrainingRange'][1]:g} {column['Units']}): the model "
                    "extrapolates there"
                )
        write_json(self.collection.path / DRAWN, {**self.facts(), "columns": columns, "sha256": file_hash(path)})
        logger.info(f"drew {self.num_rows} rows, for {self.collection.num_shards} shards: {path}")

    def values(self) -> np.ndarray:
        """Raw values (rows, conditions), codes for words.

        Raises:
            BundleError: for a row that the law does not give in `ROUNDS` tries.
        """
        found = np.full((self.num_rows, len(self.conditions)), np.nan)
        chosen = self.strata.chosen(self._uniforms(self.strata.dimensions, DECIDES_STRATA))
        pending = np.arange(self.num_rows)
        for attempt in range(ROUNDS):
            values = self.law.values(self._uniforms(self.law.dimensions, 0, attempt)[pending])
            good = self.law.admits(values) & self.strata.contain(values, chosen[pending])
            found[pending[good]] = values[good]
            pending = pending[~good]
            if not len(pending):
                return found
        raise BundleError(
            f"the law gives no row such as row {pending[0]} in {ROUNDS} tries ("
            f"{self.strata.in_words(chosen[pending[0]]) or 'all are near copies'}): give other strata, or another law"
        )

    def _uniforms(self, dimensions: int, *stream: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *stream]).random((self.num_rows, dimensions))

    def _row(self, index: int, values: np.ndarray, seed: int) -> dict[str, Any]:
        stated = {c.raw: _written(c, value) for c, value in zip(self.conditions, values)}
        return {IDENTIFIER: row_name(index), **stated, SEED: seed}


def row_seeds(seed: int, count: int) -> list[int]:
    """A seed for each row, none twice.

    Args:
        seed: of the table.
        count: of rows.
    """
    drawn = np.random.default_rng([seed, DECIDES_SEEDS]).integers(0, 2**SEED_BITS, count)
    if len(np.unique(drawn)) < count:
        raise BundleError(f"two rows of --seed {seed} would share a seed: give another")
    return [int(one) for one in drawn]


def seed_of_try(seed: int, tried: int) -> int:
    """The seed of a row that is drawn anew: its own at first, then one that follows from it and the number of tries."""
    if tried == 0:
        return seed
    state = np.random.SeedSequence([seed, tried]).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(64 - SEED_BITS))


def _written(condition: Condition, value: float) -> str:
    word = next((word for word, code in condition.codes.items() if code == value), None)
    return word if word is not None else f"{value:.7g}"


def _described(condition: Condition, values: np.ndarray) -> Mapping[str, Any]:
    """What `rows.json` says of a column, in the words of BIDS, with what was drawn."""
    if condition.codes:
        counts = {word: int((values == code).sum()) for word, code in condition.codes.items()}
        return {"Description": f"condition '{condition.name}'", "Levels": {w: f"{n} rows" for w, n in counts.items()}}
    low, high = condition.minimum, condition.maximum
    return {
        "Description": f"condition '{condition.name}'",
        "Units": condition.unit,
        "TrainingRange": [low, high],
        "Drawn": [float(f"{end:.7g}") for end in (values.min(), values.max())],
        "Mean": float(f"{values.mean():.7g}"),
        "StandardDeviation": float(f"{values.std():.7g}"),
        "Outside": int(((values < low) | (values > high)).sum()),
    }
