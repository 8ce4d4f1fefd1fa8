# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `collection make`: shards of samples, by any number of processes that share a folder."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ignite.engine import Engine

from scripts.collection.acceptance import AcceptanceRule
from scripts.collection.claims import Claims, Lease
from scripts.collection.drawing import seed_of_try
from scripts.collection.folder import (
    CLAIMS,
    IDENTIFIER,
    Collection,
    read_map,
    refuse_other_facts,
    row_name,
    shard_name,
)
from scripts.collection.shards import LABEL_MAP, PICTURE, SIDECAR, VOLUME, Member, pack, write_manifest
from scripts.compute.devices import process_rank
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import fingerprints, make_folder
from scripts.core.options import is_absent, number, whole_number, yes_or_no
from scripts.measuring.labelling import MEASURED, Measures, label_map_of
from scripts.sampling.requests import SEED, SampleRequests
from scripts.sampling.saving import FILES, SampleSaver, sample_all

logger = logging.getLogger(__name__)

DRAWN_FACTS = ("law", "strata", "seed", "rows", "rows_per_shard", "conditions")
AGREEMENT = "facts"
POLL_S = 1.0


class ShardRequests(SampleRequests):
    """Requests of some rows of a collection at a time, each the first sample of the seed that it states.

    Args:
        conditions: of the model.
    """

    def __init__(self, conditions: Conditions) -> None:
        self.conditions, self.fixed_seed = conditions, None
        self.wanted: list[int] = []
        self.ask_for([], [])
        self.start()

    def take(self, rows: Sequence[Mapping[str, Any]], wanted: Sequence[int]) -> None:
        """Request those of some rows whose positions are `wanted`; an index is a position among the rows."""
        self.ask_for(rows, [f" in the row {row[IDENTIFIER]}" for row in rows], warn=False)
        self.wanted = list(wanted)

    def start(self) -> None:
        """See `SampleRequests`."""
        super().start()
        self.rows = list(self.wanted)


class MadeRow(NamedTuple):
    """A row that was made: its number and cells, its files' stem, its seed, which try it is and what was measured."""

    number: int
    cells: Mapping[str, str]
    stem: str
    seed: int
    tries: int
    accepted: bool
    measured: Measures


class ShardMaker:
    """Makes rows of a collection, by the evaluator and the saver that `sample` has.

    Args:
        collection: whose rows are made.
        requests: the evaluator's dataset.
        evaluator: samples.
        saver: one of its handlers.
        accept: see `AcceptanceRule`; needs a saver that labels.
        max_tries: how many samples are drawn of a row, at most; the last one stays, and the table says so.
        pictures: whether shards hold the pictures of the mid planes.

    Raises:
        BundleError: for an option that is none.
    """

    def __init__(
        self,
        collection: Collection,
        requests: ShardRequests,
        evaluator: Engine,
        saver: SampleSaver,
        accept: Any = None,
        max_tries: Any = 10,
        pictures: Any = False,
    ) -> None:
        self.collection, self.requests, self.evaluator, self.saver = collection, requests, evaluator, saver
        self.labeller = saver.labeller
        self.rule = AcceptanceRule(None if is_absent(accept) else accept, saver.conditions)
        if self.rule.stated and self.labeller is None:
            raise BundleError("--accept compares what is measured: give --labels 1 as well")
        self.max_tries = whole_number(max_tries, "max_tries", least=1) if self.rule.stated else 1
        self.pictures = yes_or_no(pictures, "pictures")

    def facts(self) -> dict[str, Any]:
        """What decides the bytes of every shard, but for the versions of libraries and the kind of machine."""
        drawn = self.collection.drawn
        self.collection.check_conditions(self.saver.conditions)
        return {
            **{name: drawn[name] for name in DRAWN_FACTS},
            "table_sha256": drawn["sha256"],
            **self.saver.facts,
            "labels": None if self.labeller is None else self.labeller.facts(),
            "accept": self.rule.stated,
            "max_tries": self.max_tries,
            "pictures": self.pictures,
        }

    def samples(self, indices: Sequence[int], folder: Path) -> list[MadeRow]:
        """Sample rows into a folder, each anew until it is accepted or has had its tries; what is there stays.

        Raises:
            BundleError: if a sample cannot be made or written.
        """
        self.saver.folder = make_folder(folder)
        cells = self.collection.rows(indices)
        made: dict[int, MadeRow] = {}
        for tried in range(self.max_tries):
            pending = [position for position in range(len(cells)) if position not in made]
            if not pending:
                break
            seeds = [seed_of_try(int(row[SEED]), tried) for row in cells]
            self.requests.take([{**row, SEED: str(seed)} for row, seed in zip(cells, seeds)], pending)
            sample_all(self.evaluator, self.requests, self.saver)
            for position in pending:
                row = self._made(indices[position], cells[position], seeds[position], position, tried + 1)
                if row.accepted or row.tries == self.max_tries:
                    made[position] = row
        return [made[position] for position in range(len(cells))]

    def _made(self, index: int, cells: Mapping[str, str], seed: int, position: int, tries: int) -> MadeRow:
        stem = self.saver.stem(seed, position)
        measured = read_map(Path(f"{stem}.json"))[MEASURED] if self.labeller else None
        accepted = self.rule.accepts(self.asked(position), measured)
        return MadeRow(index, cells, stem, seed, tries, accepted, measured)

    def asked(self, position: int) -> dict[str, Any]:
        """The conditions of a row that is requested now, in both units."""
        return self.saver.conditions.in_both_units(self.requests.vectors[position])

    def members(self, row: MadeRow) -> Iterator[Member]:
        """The files of a row as a shard holds them."""
        name = row_name(row.number)
        files = {VOLUME: Path(f"{row.stem}.nii.gz")}
        if self.pictures:
            files[PICTURE] = Path(f"{row.stem}.png")
        if self.labeller:
            files[LABEL_MAP] = label_map_of(row.stem)
        yield Member(f"{name}.{SIDECAR}", self._sidecar(row, files))
        for ending, path in sorted(files.items()):
            yield Member(f"{name}.{ending}", path)

    def _sidecar(self, row: MadeRow, files: Mapping[str, Path]) -> bytes:
        """That of the sample, with the row's place in the collection."""
        found = read_map(Path(f"{row.stem}.json"))
        name = row_name(row.number)
        content = {
            IDENTIFIER: name,
            **found,
            "index": row.number,
            **({"noise_of_index": 0} if row.number else {}),
            "tries": row.tries,
            "accepted": row.accepted,
            FILES: {f"{name}.{ending}": fingerprints([path])[path.name] for ending, path in files.items()},
        }
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()

    def row_of_manifest(self, row: MadeRow) -> dict[str, Any]:
        """What a manifest says of a row: its cells as drawn, which try was taken, and what was measured."""
        measured = {MEASURED: row.measured} if self.labeller else {}
        return {**row.cells, SEED: row.seed, "tries": row.tries, "accepted": row.accepted, **measured}

    def make(self, shard: int, lease: Lease) -> bool:
        """Make a shard; whether it is this process's, and not that of one who has taken it over.

        Raises:
            BundleError: if a row cannot be made or written.
        """
        folder, manifest = self.collection.work(shard), self.collection.manifest(shard)
        made = self.samples(self.collection.indices(shard), folder)
        if manifest.exists() or not lease.holds():
            return False
        tar = make_folder(self.collection.shards) / self.collection.tar(shard).name
        members = pack(tar, (member for row in made for member in self.members(row)))
        content = {"shard": shard, "facts": self.collection.facts, "rows": [*map(self.row_of_manifest, made)]}
        write_manifest(manifest, tar, {**content, "members": members})
        shutil.rmtree(folder, ignore_errors=True)
        return True


class Making:
    """The work of one process on a collection.

    Args:
        collection: which.
        maker: makes its shards.
        lease_minutes: after how long a shard is taken over whose process gives no sign of life.
        max_minutes: after which no other shard is begun; None for no limit.

    Raises:
        BundleError: for a time that is none, or under torchrun, which ends all processes when one fails.
    """

    def __init__(
        self, collection: Collection, maker: ShardMaker, lease_minutes: Any = 10, max_minutes: Any = None
    ) -> None:
        if process_rank()[1] > 1:
            raise BundleError(
                "collection make shares out by its folder: start it several times, on one machine or many, without "
                "torchrun"
            )
        self.collection, self.maker = collection, maker
        self.lease_s = 60 * number(lease_minutes, "lease_minutes", 0.01)
        self.limit_s = math.inf if is_absent(max_minutes) else 60 * number(max_minutes, "max_minutes", 0.0)
        self.claims = Claims(collection.path / CLAIMS, self.lease_s)

    def agree(self) -> None:
        """State the facts of all shards if this process is the first, else compare them.

        Raises:
            BundleError: naming the first fact that differs.
        """
        facts = self.maker.facts()
        while not self.collection.facts:
            if lease := self.claims.take(AGREEMENT):
                if not self.collection.facts:
                    self.collection.write_facts(facts)
                lease.release()
            else:
                time.sleep(POLL_S)
        refuse_other_facts(self.collection.facts, facts, self.collection.path, "made")

    def run(self) -> None:
        """Make shards until none is left, or others are at work on all that are left.

        Raises:
            BundleError: if the folder was made with other facts, or a row cannot be made or written.
        """
        self.agree()
        began, made = time.monotonic(), 0
        while missing := self.collection.missing():
            if time.monotonic() - began > self.limit_s:
                logger.info(f"--max_minutes is over: {len(missing)} shards are left")
                return
            claimed = self._claim(missing)
            if claimed is None:
                logger.info(f"made {made} shards; others are at work on the {len(missing)} that are left")
                return
            made += self._make(*claimed)
        shutil.rmtree(self.collection.path / CLAIMS, ignore_errors=True)
        logger.info(f"made {made} shards: all {self.collection.num_shards} are done")

    def _claim(self, missing: Sequence[int]) -> tuple[int, Lease] | None:
        """A shard that is free, or becomes so in the time after which a silent process's is taken over."""
        began = time.monotonic()
        while True:
            for shard in missing:
                lease = None if self.collection.manifest(shard).exists() else self.claims.take(shard_name(shard))
                if lease is not None:
                    return shard, lease
            missing = [shard for shard in missing if not self.collection.manifest(shard).exists()]
            if not missing or time.monotonic() - began > 1.5 * self.lease_s:
                return None
            time.sleep(min(POLL_S, self.lease_s / 5))

    def _make(self, shard: int, lease: Lease) -> bool:
        began, name = time.monotonic(), shard_name(shard)
        try:
            if self.collection.manifest(shard).exists():
                return False
            if self.maker.make(shard, lease):
                count, seconds = len(self.collection.indices(shard)), time.monotonic() - began
                logger.info(f"{name} is done: {count} rows in {seconds / 60:.1f} minutes")
                return True
        except BundleError:
            if lease.holds():
                raise
        finally:
            lease.release()
        logger.warning(f"{name} was taken over by another process: this one had given no sign of life")
        return False
