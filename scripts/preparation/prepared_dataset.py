# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The tables of a prepared dataset, put together from what lies beside each scan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.compute.provenance import BIDS, bundle_version
from scripts.conditions.conditions import Conditions
from scripts.conditions.ranges import FILE as RANGES
from scripts.conditions.ranges import learned_ranges
from scripts.core.cells import present
from scripts.core.errors import BundleError
from scripts.core.files import read_json, write_json, write_text
from scripts.core.options import number
from scripts.core.tables import MISSING, write_table
from scripts.preparation.exclusions import Exclusions
from scripts.preparation.prepared_scan import PreparedFiles, ScanPreparer
from scripts.preparation.quality_page import scan_name, write_page
from scripts.preparation.sources import Source
from scripts.volumes.datasets import SPLITS, TABLE, place

logger = logging.getLogger(__name__)

FAILURES = "failures.tsv"
OWN_COLUMNS = ("participant_id", "session_id", "session", "ses", "path", "split", "labels", "measured_volumes")
"""Of the input, which this dataset's table states in its own way."""
IGNORED = ("conditions.json", "failures.tsv", "figures", "logs", "*.html", "*_xfm.txt")


@dataclass(frozen=True)
class ScanToPrepare:
    """What is known of one scan of the input: where it comes from, and its conditions or why they cannot be read."""

    source: Source
    covariates: Mapping[str, str]
    fault: tuple[str, str] | None = None

    @property
    def lacking(self) -> tuple[str, ...]:
        """Raw names of the conditions that no table states."""
        return tuple(name for name, value in self.covariates.items() if value == MISSING)


@dataclass(frozen=True)
class Tables:
    """What the tables of a dataset say.

    Attributes:
        rows: of all prepared scans.
        excluded: names of those that are to be left out.
        failures: one a scan that could not be prepared.
        missing: names of scans that are not there yet.
        further: columns of the input that were carried over.
    """

    rows: list[dict[str, Any]]
    excluded: set[str]
    failures: list[dict[str, Any]]
    missing: list[str]
    further: list[str] = field(default_factory=list)


class Splits:
    """Which subjects are trained on, validated on and tested on.

    A subject's place follows from a hash of its name alone, so that further subjects move none; all its scans are in
    the same split. A column `split` of the input is kept. The one exception: where the hashes leave no one for the
    validation, the subject with the lowest is.

    Args:
        fractions: `train`, `validation` and `test`, which together are 1.
        seed: for another division.

    Raises:
        BundleError: for other names, or fractions that are not 1 together.
    """

    def __init__(self, fractions: Mapping[str, Any], seed: int = 0) -> None:
        if set(fractions) != set(SPLITS):
            raise BundleError(f"`splits` needs the fractions of {', '.join(SPLITS)}, got {', '.join(fractions)}")
        self.fractions = {name: number(fractions[name], f"splits::{name}", 0.0, 1.0) for name in SPLITS}
        self.seed = seed
        if abs(sum(self.fractions.values()) - 1.0) > 1e-6:
            raise BundleError(f"the fractions of `splits` are {sum(self.fractions.values()):g} together, not 1")

    def of(self, sources: Sequence[Source]) -> dict[str, str]:
        """Subject -> split."""
        stated = _stated(sources)
        places = {s.subject: place(s.subject, self.seed) for s in sources}
        found = {name: stated.get(name) or self._at(where) for name, where in places.items()}
        wanted = self.fractions["validation"] > 0.0 and len(found) > 1 and not stated
        if wanted and "validation" not in found.values():
            found[min(places, key=lambda name: places[name])] = "validation"
        return found

    def _at(self, where: float) -> str:
        validation = self.fractions["validation"]
        if where < validation:
            return "validation"
        return "test" if where < validation + self.fractions["test"] else "train"


def _stated(sources: Sequence[Source]) -> dict[str, str]:
    """Subject -> the split that the input states.

    Raises:
        BundleError: for another word, or if a subject is in two splits.
    """
    stated: dict[str, str] = {}
    for source in sources:
        word = present(source.row, "split")
        if not word:
            continue
        if word not in SPLITS:
            raise BundleError(f"the column `split` has '{word}' for {source.name}: use {', '.join(SPLITS)}")
        if stated.setdefault(source.subject, word) != word:
            raise BundleError(f"the column `split` has {source.subject} both in {stated[source.subject]} and in {word}")
    return stated


class PreparedDataset:
    """The tables of a dataset; per-scan files are the truth, and any process can write the tables from them.

    Args:
        dataset_dir: the dataset.
        preparer: what made its scans; those of other settings are not counted in.
        conditions: the covariates.
        splits: which subject is in which split.
        exclusions: scans that a person has found bad; they stay on the quality page, but not in the table.
        learn_ranges: whether to write the conditions' ranges in the training split.
        origin: path of the raw data, for provenance.
        used: columns of the input that are not carried over: the conditions are read from them.
    """

    def __init__(
        self,
        dataset_dir: Path,
        preparer: ScanPreparer,
        conditions: Conditions,
        splits: Splits,
        exclusions: Exclusions,
        learn_ranges: bool,
        origin: Path,
        used: Collection[str] = (),
    ) -> None:
        self.dataset_dir, self.preparer, self.conditions = dataset_dir, preparer, conditions
        self.splits, self.exclusions = splits, exclusions
        self.learn_ranges, self.origin, self.used = learn_ranges, origin, {*used, *OWN_COLUMNS}

    def is_complete(self, scans: Sequence[ScanToPrepare]) -> bool:
        """Whether every scan of the input is prepared, or noted as failed."""
        return all(scan.fault or self._is_settled(scan.source) for scan in scans)

    def _is_settled(self, source: Source) -> bool:
        files = PreparedFiles(self.dataset_dir, source)
        return files.failure.is_file() or files.sidecar.is_file()

    def assemble(self, scans: Sequence[ScanToPrepare]) -> Tables:
        """Write the tables of all scans of the input that are there; one kind of process may do so after another.

        Raises:
            BundleError: if a table cannot be written.
        """
        found = self.tables(scans)
        kept = [row for row in found.rows if scan_name(row["path"]) not in found.excluded]
        if kept:
            write_table(self.dataset_dir / TABLE, kept)
            write_json(self.dataset_dir / "participants.json", self._columns(kept))
            write_json(self.dataset_dir / "dataset_description.json", self._description())
            write_text(self.dataset_dir / ".bidsignore", "".join(f"{line}\n" for line in IGNORED))
        elif not found.missing:
            (self.dataset_dir / TABLE).unlink(missing_ok=True)  # all have failed or are excluded
        if not any(step.get("stripper") for step in self.preparer.recipe["steps"].values()):
            _warn_of_mixture(kept)
        self._write_failures(found.failures)
        self._write_ranges(kept)
        full = [{**failure, "reason": failure["message"]} for failure in found.failures]
        write_page(self.dataset_dir, found.rows, full, excluded=self.exclusions)
        return found

    def tables(self, scans: Sequence[ScanToPrepare]) -> Tables:
        """What the tables say, read from the scans' own files."""
        with_sessions = any(scan.source.session for scan in scans)
        further = self._further_columns(scans)
        tables = Tables([], set(), [], [], further)
        prepared = list[tuple[ScanToPrepare, PreparedFiles, dict[str, Any]]]()
        for scan in scans:
            files = PreparedFiles(self.dataset_dir, scan.source)
            noted = _failure(scan) if scan.fault else read_json(files.failure)
            known = None if noted else self.preparer.known(files, scan.lacking)
            if noted:
                said = {key: noted.get(key) for key in ("participant_id", "path", "reason", "message")}
                tables.failures.append({**said, "scan": scan.source.name})
            elif known:
                prepared.append((scan, files, known))
                if self.exclusions.reason(scan.source.name, scan.source.participant):
                    tables.excluded.add(scan.source.name)
            else:
                tables.missing.append(scan.source.name)
        sources = [scan.source for scan, _, _ in prepared]
        taken = [source for source in sources if source.name not in tables.excluded]
        of_subject = {**self.splits.of(sources), **self.splits.of(taken)}
        for one in prepared:
            row = self._row(*one, of_subject, with_sessions)
            stated = one[0].source.row
            tables.rows.append({**row, **{name: present(stated, name) for name in further if name not in row}})
        return tables

    def _further_columns(self, scans: Sequence[ScanToPrepare]) -> list[str]:
        """Columns of the input that say more than the conditions, and are kept as they are."""
        columns = dict.fromkeys(name for scan in scans for name in scan.source.row)
        taken = {name for step in self.preparer.steps.values() for name in getattr(step, "columns", {})}
        return [name for name in columns if name and name not in self.used | taken]

    def _row(
        self,
        scan: ScanToPrepare,
        files: PreparedFiles,
        known: Mapping[str, Any],
        of_subject: Mapping[str, str],
        with_sessions: bool,
    ) -> dict[str, Any]:
        source = scan.source
        return {
            "participant_id": source.participant,
            **({"session_id": source.session or MISSING} if with_sessions else {}),
            "path": files.volume.relative_to(self.dataset_dir).as_posix(),
            **scan.covariates,
            **{name: f"{value:.10g}" for name, value in known["covariates"].items() if name in scan.lacking},
            "split": of_subject[source.subject],
            **known["measured"],
        }

    def _write_failures(self, failures: Sequence[Mapping[str, Any]]) -> None:
        table = self.dataset_dir / FAILURES
        if failures:
            write_table(table, failures)
        else:
            table.unlink(missing_ok=True)

    def _write_ranges(self, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self.dataset_dir / RANGES
        if self.learn_ranges and rows:
            write_json(path, learned_ranges([row for row in rows if row["split"] == "train"], self.conditions))
            logger.info(f"the ranges of the conditions are in {path}: add it to --config_file to train with them")
        elif not self.learn_ranges:
            path.unlink(missing_ok=True)

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "session_id": {"Description": "session of the scan"},
            "path": {"Description": "the prepared scan, relative to this table"},
            "split": {"Description": "decided by a hash of the participant", "Levels": dict.fromkeys(SPLITS, "")},
        }
        for condition in self.conditions:
            described[condition.raw] = condition.described()
        for step in self.preparer.steps.values():
            for column, words in getattr(step, "columns", {}).items():
                described[column] = {"Description": words}
        there = {name for row in rows for name in row}
        return {name: words for name, words in described.items() if name in there}

    def _description(self) -> dict[str, Any]:
        steps = " > ".join(self.preparer.steps)
        maker = {"Name": "configs/prepare.yaml", "Version": bundle_version(), "Description": steps}
        return {
            "Name": "T1-weighted heads on the bundle grid",
            "BIDSVersion": BIDS,
            "DatasetType": "derivative",
            "GeneratedBy": [maker],
            "SourceDatasets": [{"URL": self.origin.resolve().as_uri()}],
            "SpatialReference": self.preparer.recipe["template"],
        }


def _warn_of_mixture(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say that some scans have a skull and others do not: a model would learn both."""
    stripped = [row for row in rows if row.get("skull") == "stripped"]
    if 0 < len(stripped) < len(rows):
        logger.warning(
            f"{len(stripped)} of {len(rows)} scans are skull-stripped, {stripped[0]['participant_id']} the first, and "
            "the others are not: exclude them (--exclude), or strip all (--skull_strip)"
        )


def _failure(scan: ScanToPrepare) -> dict[str, Any]:
    reason, message = scan.fault or ("", "")
    source = scan.source
    return {"participant_id": source.participant, "path": str(source.path), "reason": reason, "message": message}


def by_reason(reasons: Sequence[str]) -> str:
    """Failures counted by reason, the commonest first, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
