# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How long a collection will take, and how many bytes: from a few of its volumes, made here."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.collection.folder import Collection
from scripts.collection.making import Making, ShardMaker
from scripts.core.options import whole_number, yes_or_no

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """What is left of a collection.

    Attributes:
        rows, shards: not done yet.
        seconds: of one row, by one process.
        row_bytes: of one row in a shard.
    """

    rows: int
    shards: int
    seconds: float
    row_bytes: float

    def hours(self, workers: int) -> float:
        """Of so many processes: they share out whole shards."""
        rounds = -(-self.shards // workers)
        return rounds * self.seconds * self.rows / max(1, self.shards) / 3600

    def in_words(self, workers: int) -> str:
        """One line."""
        return (
            f"{self.rows} rows in {self.shards} shards are left: {self.seconds:.3g} s and "
            f"{self.row_bytes / 1e6:.3g} MB a row, {self.rows * self.row_bytes / 1e9:.3g} GB in all; "
            f"{self.hours(1):.3g} hours of one process as this one, "
            f"{self.hours(workers):.3g} hours of {workers} ({-(-self.shards // workers)} shards each)"
        )


def make_or_forecast(making: Making, dry_run: Any = False, rows: Any = 3, workers: Any = 1) -> None:
    """The verb `collection make`: make what is left, or, for a dry run, say how long that will take.

    Args:
        making: the work of this process.
        dry_run: whether to make a few rows only.
        rows, workers: see `forecast`.
    """
    if yes_or_no(dry_run, "dry_run"):
        forecast(making.maker, rows, workers)
    else:
        making.run()


def forecast(maker: ShardMaker, rows: Any = 3, workers: Any = 1) -> Forecast:
    """Make a few rows of the first shard that is not done, in a temporary folder, and say what all will take.

    The first row, which loads the networks, is timed only where it is the only one.

    Args:
        maker: of the collection.
        rows: how many to make.
        workers: of how many processes to tell.
    """
    collection, maker_rows = maker.collection, whole_number(rows, "dry_rows", least=1)
    missing = collection.missing()
    chosen = list(_indices(collection, missing))[:maker_rows]
    maker.facts()
    with tempfile.TemporaryDirectory(dir=collection.path, prefix=".dry-") as folder:
        first = maker.samples(chosen[:1], Path(folder)) if len(chosen) > 1 else []
        began = time.perf_counter()
        made = maker.samples(chosen[len(first) :], Path(folder))
        seconds = (time.perf_counter() - began) / max(1, len(made))
        sizes = [_size(member.content) for row in made for member in maker.members(row)]
    left = sum(len(collection.indices(shard)) for shard in missing)
    found = Forecast(left, len(missing), seconds, sum(sizes) / max(1, len(made)))
    logger.info(found.in_words(whole_number(workers, "workers", least=1)))
    return found


def _indices(collection: Collection, shards: list[int]) -> range:
    return collection.indices(shards[0]) if shards else range(0)


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)
