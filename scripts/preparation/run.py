# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The `prepare` verb: raw T1-weighted scans and what is known of them in, a dataset on the bundle grid out."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.compute.devices import process_rank
from scripts.compute.ownership import OutputFolder
from scripts.compute.pool import results
from scripts.compute.processes import arrive
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import read_json
from scripts.core.options import is_absent, whole_number, yes_or_no
from scripts.preparation.covariates import Columns, CovariateReader
from scripts.preparation.exclusions import Exclusions
from scripts.preparation.prepared_dataset import FAILURES, PreparedDataset, ScanToPrepare, Splits, Tables, by_reason
from scripts.preparation.prepared_scan import (
    FAILED,
    KEPT,
    MEASURED,
    PREPARED,
    Outcome,
    PreparedFiles,
    ScanPreparer,
    Work,
    write_failure,
)
from scripts.preparation.selection import Selection
from scripts.preparation.sources import Source, find_sources
from scripts.preparation.steps import Step, TargetSpace

logger = logging.getLogger(__name__)

SHARD = re.compile(r"(\d+)/(\d+)")
LINES = 50


class Preparation:
    """Prepares scans, each independently of the others, in any number of processes on any number of machines.

    Args:
        space: the template and the grid.
        steps: name -> step, in their order.
        conditions: the covariates to carry over into the dataset's table.
        input_dir, input_table, selection: see `scripts.preparation.sources.find_sources`.
        dataset_dir: folder to write.
        columns, words, plausible: see `scripts.preparation.covariates.CovariateReader`.
        splits: fractions of the subjects; see `scripts.preparation.prepared_dataset.Splits`.
        split_seed: for another division.
        exclude: file with names of scans or participants to leave out of the tables; see
            `scripts.preparation.exclusions`.
        learn_ranges: whether to write the conditions' ranges in the training split.
        num_workers: processes besides this one; 0 works in this one.
        shard: `3/20` for the third of twenty parts; None for all, or under torchrun the part of this process.
        assemble: only write the tables, from what is there.
        overwrite: prepare again what is already prepared.

    Raises:
        BundleError: if the input or the options cannot be used.
    """

    def __init__(
        self,
        space: TargetSpace,
        steps: Mapping[str, Step],
        conditions: Conditions,
        input_dir: str | os.PathLike | None,
        input_table: str | os.PathLike | None,
        dataset_dir: str | os.PathLike,
        columns: Columns,
        words: Mapping[str, Mapping[Any, Any]] | None = None,
        plausible: Mapping[str, Sequence[float]] | None = None,
        splits: Mapping[str, Any] | None = None,
        split_seed: Any = 0,
        exclude: str | os.PathLike | None = None,
        learn_ranges: Any = False,
        num_workers: Any = 0,
        shard: Any = None,
        assemble: Any = False,
        overwrite: Any = False,
        selection: Selection | None = None,
    ) -> None:
        self.part, self.parts = _part(shard)
        inputs = {"input_dir": input_dir, "input_table": input_table}
        self.output = OutputFolder(dataset_dir, "dataset_dir", "prepare", inputs, part=(self.part, self.parts))
        self.num_workers = whole_number(num_workers, "num_workers")
        self.only_assemble = yes_or_no(assemble, "assemble")
        division = Splits(
            splits or {"train": 1.0, "validation": 0.0, "test": 0.0}, whole_number(split_seed, "split_seed")
        )
        sources = find_sources(input_dir, input_table, selection)
        covariates = CovariateReader(conditions, columns, words, plausible, sources)
        self.scans = [_known(source, covariates) for source in sources]
        covariates.warn()
        exclusions = Exclusions(exclude)
        exclusions.check([source.name for source in sources], [source.participant for source in sources])
        self.output.check()
        for step in steps.values():
            if not self.only_assemble and hasattr(step, "check"):
                step.check()
        self.dataset_dir = self.output.claim()
        self.preparer = ScanPreparer(space, steps, self.dataset_dir, yes_or_no(overwrite, "overwrite"))
        ranges, origin = yes_or_no(learn_ranges, "learn_ranges"), Path(str(input_dir or input_table))
        self.dataset = PreparedDataset(
            self.dataset_dir, self.preparer, conditions, division, exclusions, ranges, origin, covariates.used
        )

    def run(self) -> None:
        """Prepare this process's share, and write the dataset's tables if nothing is left to do by others.

        Raises:
            BundleError: after all good scans are written, if any scan failed; at once if there is no room on the disk.
        """
        try:
            self._run()
        finally:
            self.output.release()

    def _run(self) -> None:
        share, where = self.scans[self.part - 1 :: self.parts], self.dataset_dir / "logs"
        self._say_what_differs(self.scans if self.only_assemble else share)
        failed = [] if self.only_assemble else self._prepare(share)
        if self.only_assemble or self.dataset.is_complete(self.scans):
            share, where = self.scans, self.dataset_dir / FAILURES
            failed = self._conclude(self.dataset.assemble(self.scans))
        else:
            logger.info("other parts are not finished: the last one writes the tables, or --assemble 1")
        arrive("prepared")
        _raise_if(failed, len(share), where)

    def _say_what_differs(self, scans: Sequence[ScanToPrepare]) -> None:
        """What an earlier run has left that other settings have made, and what becomes of it, before anything is done.

        Raises:
            BundleError: if tables alone are to be written, and there is nothing that these settings have made.
        """
        again, measured, good = Counter[str](), 0, 0
        for scan in scans:
            files = PreparedFiles(self.dataset_dir, scan.source)
            known = read_json(files.sidecar)
            differing = self.preparer.differing(files, known) if known else []
            again.update([", ".join(differing)] if differing else [])
            measured += bool(known) and not differing and not self.preparer.is_measured(known, scan.lacking)
            good += bool(known) and not differing
        others = "; ".join(f"{count} with other {what}" for what, count in again.most_common())
        if self.only_assemble and again and not good:
            raise BundleError(
                f"no scan in {self.dataset_dir} was prepared by these settings ({others}): nothing is written; give "
                "--assemble 1 with the options of the preparation"
            )
        if again:
            logger.warning(f"scans there were prepared {others}: they are {self._fate('prepared again')}")
        if measured:
            logger.info(f"of {measured} prepared scans the volumes alone are {self._fate('measured')}")

    def _fate(self, what: str) -> str:
        return "left out of the tables" if self.only_assemble else what

    def _conclude(self, tables: Tables) -> list[dict[str, Any]]:
        left_out = f", {len(tables.excluded)} of them excluded from the table" if tables.excluded else ""
        if tables.further:
            logger.info(
                f"columns of the input that are no conditions are kept as they are: {', '.join(tables.further)}"
            )
        logger.info(f"{len(tables.rows)} scans prepared in {self.dataset_dir}{left_out}; look at quality.html there")
        if tables.missing:
            count, first = len(tables.missing), tables.missing[0]
            others = "or by other settings: they are not in the tables"
            logger.warning(f"{count} scans are not prepared yet, {first} the first, {others}")
        return tables.failures

    def _prepare(self, scans: Sequence[ScanToPrepare]) -> list[dict[str, Any]]:
        """The failures among some scans, after all of them were tried."""
        failed = [_noted(scan.source, *scan.fault) for scan in scans if scan.fault]
        work = [Work(scan.source, scan.lacking) for scan in scans if not scan.fault]
        progress = _Progress(len(work))
        for failure in failed:
            progress.say(f"failed: {failure['participant_id']}: {failure['message']}")
        for position, outcome in results(self.preparer, work, self.num_workers, self._died):
            source = work[position].source
            progress.advance(source, outcome)
            if outcome.no_room:
                raise BundleError(
                    f"{outcome.message}: make room; what is prepared is kept, and the same command goes on"
                )
            if outcome.state == FAILED:
                failed.append(_noted(source, outcome.reason, outcome.message))
        progress.close()
        return failed

    def _died(self, work: Work, how: str) -> Outcome:
        outcome = Outcome(FAILED, "its process died", f"the process that prepared it ended with {how}")
        write_failure(PreparedFiles(self.dataset_dir, work.source), work.source, outcome)
        return outcome


class _Progress:
    """A bar on a terminal, else now and then a line: scans an hour and the time left, not counting what was there."""

    def __init__(self, total: int) -> None:
        self.total, self.since = total, time.monotonic()
        self.counts = dict.fromkeys((PREPARED, MEASURED, KEPT, FAILED), 0)
        self.bar = tqdm(
            total=total, desc="preparing", unit="scan", disable=None, bar_format="{l_bar}{bar}| {n}/{total}{postfix}"
        )

    def say(self, line: str) -> None:
        tqdm.write(line)

    def advance(self, source: Source, outcome: Outcome) -> None:
        self.counts[outcome.state] += 1
        for warning in outcome.warnings:
            self.say(f"warning: {source.name}: {warning}")
        if outcome.state == FAILED:
            self.say(f"failed: {source.name}: {outcome.message}")
        self.bar.set_postfix_str(self._pace(), refresh=False)
        self.bar.update()
        done = sum(self.counts.values())
        if not sys.stderr.isatty() and (done * LINES // self.total > (done - 1) * LINES // self.total):
            logger.info(f"{done} of {self.total} scans: {self._pace()}")

    def _pace(self) -> str:
        done, computed = sum(self.counts.values()), sum(self.counts.values()) - self.counts[KEPT]
        seconds = (time.monotonic() - self.since) / max(1, computed)
        left = timedelta(seconds=round(seconds * (self.total - done)))
        counted = ", ".join(f"{count} {state}" for state, count in self.counts.items() if count)
        return f"{counted}, {3600 / max(seconds, 1e-3):.0f} scans/h, {left} left" if computed else counted

    def close(self) -> None:
        self.bar.close()


def _part(shard: Any) -> tuple[int, int]:
    """This process's part, from 1, and how many there are."""
    rank, processes = process_rank()
    if is_absent(shard):
        return rank + 1, processes
    match = SHARD.fullmatch(str(shard).strip())
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise BundleError(f"--shard must be like 3/20, from 1/20 to 20/20, got '{shard}'")
    if processes > 1:
        raise BundleError("--shard and torchrun both say which part to prepare: use one of them")
    return part, parts


def _known(source: Source, covariates: CovariateReader) -> ScanToPrepare:
    return ScanToPrepare(source, {}, source.fault) if source.fault else ScanToPrepare(source, covariates.of(source))


def _noted(source: Source, reason: str, message: str) -> dict[str, Any]:
    return {"participant_id": source.participant, "reason": reason, "message": message}


def _raise_if(failures: Sequence[Mapping[str, Any]], total: int, where: Path) -> None:
    if not failures:
        return
    names = list(dict.fromkeys(str(failure["participant_id"]) for failure in failures))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    counted = by_reason([str(failure["reason"]) for failure in failures])
    raise BundleError(f"{len(failures)} of {total} scans failed: {counted} ({', '.join(names[:5])}{more}); see {where}")
