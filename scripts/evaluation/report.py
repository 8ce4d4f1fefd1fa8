# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation's report as JSON and as tables."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.compute.provenance import bundle_version
from scripts.core.bootstrap import difference
from scripts.core.errors import BundleError
from scripts.core.files import parse_json, replacing, write_json
from scripts.core.tables import write_table
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.names import row_name, written
from scripts.evaluation.samples import REAL, Samples
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

JSON = "evaluation.json"
TABLE_1 = "table_1"
COMPUTED, NOT_REQUESTED = "computed", "not requested"
REAL_FLAG = "real_dir"
FLOOR, HALVES = "floor", "halves"
"""Kinds of a distance between features: what real volumes have, and what compares with it."""
PACKAGES = ("monai", "numpy", "torch")


@dataclass
class Measured:
    """A measure of the report.

    Attributes:
        name: of the measure in the configuration.
        measure: what measures.
        model: whose samples it measures; empty where there is one unnamed model; None if it is of no model's samples.
        result: what it found; None if it was not asked for.
        seconds: what that took.
    """

    name: str
    measure: Measure
    model: str | None = None
    result: Result | None = None
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The measure's name as it is written, with its model's."""
        return f"{written(self.name)} {self.model or ''}".strip()


@dataclass
class Line:
    """A line of the table of models.

    Attributes:
        model: a model, or `real`.
        volumes: how many it has.
        rows: name of a column -> the figure in it.
    """

    model: str
    volumes: int | None
    rows: dict[str, Row]


@dataclass
class Report:
    """All that an evaluation found.

    Attributes:
        measures: by their keys in the report.
        samples: the models' volumes.
        flags: what was asked for.
        warnings: what was warned of meanwhile.
    """

    measures: dict[str, Measured]
    samples: Samples
    flags: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def computed(self) -> Iterator[tuple[str, Measured, Result]]:
        """Key, measure and result of those that were asked for."""
        for key, entry in self.measures.items():
            if entry.result is not None:
                yield key, entry, entry.result

    def rows(self, entry: Measured) -> list[Row]:
        """The figures of a measure, with its name and model, and with the difference to those of its target."""
        if entry.result is None:
            return []
        target = self.measures.get(entry.measure.target or "")
        wanted = {row.what: row.found for row in target.result.rows} if target and target.result else {}
        return [
            replace(
                row,
                measure=entry.name,
                model=entry.model or "",
                difference=difference(row.found, wanted[row.what]) if row.what in wanted else row.difference,
            )
            for row in entry.result.rows
        ]

    def all_rows(self) -> list[Row]:
        """The figures of all measures."""
        return [row for entry in self.measures.values() for row in self.rows(entry)]

    def about_measures(self) -> dict[str, dict[str, Any]]:
        """Key -> model, whether the measure was computed and else why not, and how it was measured."""
        return {key: self._about(entry) for key, entry in self.measures.items()}

    def _about(self, entry: Measured) -> dict[str, Any]:
        model = {"model": entry.model} if entry.model else {}
        if entry.result is not None:
            return {**model, "status": COMPUTED, **entry.result.facts}
        missing = [f"--{flag}" for flag in entry.measure.missing_flags()]
        reasons = [needed.why_not for needed in entry.measure.inputs if needed.why_not]
        return {**model, "status": NOT_REQUESTED, "missing": missing, **({"why": reasons} if reasons else {})}

    def folder(self, flag: str) -> VolumeFolder | None:
        """The volumes that a flag gives to a measure; None if it was not given."""
        inputs = (needed for entry in self.measures.values() for needed in entry.measure.inputs)
        return next((f for f in inputs if isinstance(f, VolumeFolder) and f.flag == flag and f.requested), None)

    def table_1(self) -> list[Line]:
        """One line a model and one of the real volumes, as the paper's Table 1: the headlines of all measures.

        Distances by feature networks come first. What is measured of no model's samples stands in the line of the real
        volumes, and so does the floor of a distance, under the halves that compare with it, if it is the same for all.
        """
        lines = []
        for model, features in self.samples.sets.items():
            rows = [row for entry in self.measures.values() if entry.model == model for row in self.rows(entry)]
            found = _columns(rows)
            if found:
                lines.append(Line(model or "synthetic", len(features.folder), found))
        rows = [row for entry in self.measures.values() if entry.model is None for row in self.rows(entry)]
        real = {**_floors(lines), **_columns(rows)}
        folder = self.folder(REAL_FLAG)
        return [*lines, Line(REAL, len(folder) if folder else None, real)] if real else lines


def _columns(rows: Sequence[Row]) -> dict[str, Row]:
    headlines = [row for row in rows if row.headline]
    return {row_name(row): row for row in sorted(headlines, key=lambda row: not row.network)}


def _floors(lines: Sequence[Line]) -> dict[str, Row]:
    floors = [{row_name(replace(r, kind=HALVES)): r for r in line.rows.values() if r.kind == FLOOR} for line in lines]
    columns = dict.fromkeys(name for found in floors for name in found)
    same = {name for name in columns if len({found[name].found if name in found else None for found in floors}) == 1}
    return {name: floors[0][name] for name in columns if name in same}


def left_by_earlier(folder: Path, report: Report) -> list[Path]:
    """The tables and pictures of an earlier evaluation in the folder that this one is not going to replace.

    Which they are is in its `evaluation.json`; all else in the folder is not its own.
    """
    replaced = {path.name for path in _files(folder, report)}
    names = [f"{name}.{ending}" for name in _computed_before(folder / JSON) for ending in ("tsv", "png")]
    paths = [folder / name for name in (f"{TABLE_1}.tsv", *names) if (folder / JSON).is_file()]
    return [path for path in paths if path.parent == folder and path.name not in replaced and path.is_file()]


def remove(paths: Sequence[Path]) -> None:
    """Remove what `left_by_earlier` found, once the new report is written.

    Raises:
        BundleError: if one cannot be removed.
    """
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise BundleError(f"cannot remove {path} of an earlier evaluation: {error.strerror}") from error
        logger.info(f"removed {path}, which an earlier evaluation has left")


def _computed_before(path: Path) -> list[str]:
    """The measures that an earlier evaluation computed."""
    try:
        measures = parse_json(path.read_text(encoding="utf-8"))["measures"]
        return [str(key) for key, entry in measures.items() if entry["status"] == COMPUTED]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # there is none, or it is no evaluation's


def _files(folder: Path, report: Report) -> list[Path]:
    """The tables and pictures of single measures, and the table of models, that a report has."""
    found = [folder / f"{key}.tsv" for key, _, result in report.computed() if result.table]
    found += [folder / f"{key}.png" for key, _, result in report.computed() if result.picture is not None]
    return [*found, folder / f"{TABLE_1}.tsv"] if report.table_1() else found


def write_report(folder: Path, report: Report) -> None:
    """Write `evaluation.json`, `evaluation.tsv`, `table_1.tsv`, and the tables and pictures of single measures."""
    for key, _, result in report.computed():
        if result.table:
            write_table(folder / f"{key}.tsv", result.table)
        if result.picture is not None:
            with replacing(folder / f"{key}.png") as temporary:
                result.picture.savefig(temporary, dpi=150)
    rows, table_1 = [plain_row(row) for row in report.all_rows()], [_plain_line(line) for line in report.table_1()]
    write_table(folder / "evaluation.tsv", [*({**row, "status": COMPUTED} for row in rows), *_not_requested(report)])
    if table_1:
        write_table(folder / f"{TABLE_1}.tsv", table_1)
    content = {"rows": [_without_gaps(row) for row in rows], "measures": report.about_measures(), "table_1": table_1}
    write_json(folder / JSON, {**content, **about(report)})
    for row in report.all_rows():
        logger.info(f"{f'{written(row.measure)} {row.model}'.strip()}: {_in_a_line(row)}")


def about(report: Report) -> dict[str, Any]:
    """What was asked for, what was warned of, how long it took and with what."""
    return {
        "flags": {name: _plain(value) for name, value in report.flags.items()},
        "warnings": report.warnings,
        "seconds": {key: round(entry.seconds, 1) for key, entry, _ in report.computed()},
        "versions": {"bundle": bundle_version(), "python": platform.python_version(), **_packages()},
    }


def _packages() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def plain_row(row: Row) -> dict[str, Any]:
    """A figure as plain data, None or empty where it lacks something; what is not finite is text."""
    low, high = row.found.interval or (None, None)
    to = row.difference
    distance_low, distance_high = to.interval if to and to.interval else (None, None)
    return {
        "measure": row.measure,
        "model": row.model,
        "name": row_name(row),
        "metric": row.metric,
        "quantity": row.quantity,
        "network": row.network,
        "kind": row.kind,
        "count": row.found.count,
        "value": _finite(row.found.value),
        "standard_deviation": _finite(row.found.standard_deviation),
        "confidence_low": _finite(low),
        "confidence_high": _finite(high),
        "target": _finite(to.target) if to else None,
        "distance": _finite(to.value) if to else None,
        "distance_low": _finite(distance_low),
        "distance_high": _finite(distance_high),
    }


def _not_requested(report: Report) -> list[dict[str, Any]]:
    missing = (entry for entry in report.measures.values() if entry.result is None)
    return [{"measure": entry.name, "model": entry.model, "status": NOT_REQUESTED} for entry in missing]


def _without_gaps(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value not in (None, "")}


def _plain_line(line: Line) -> dict[str, Any]:
    """A line of the table of models: each figure, and after it the ends of its interval or else its spread."""
    cells: dict[str, Any] = {"model": line.model, "volumes": line.volumes}
    for name, row in line.rows.items():
        cells[name] = _finite(row.found.value)
        if row.found.interval is not None:
            cells[f"{name}, low"], cells[f"{name}, high"] = map(_finite, row.found.interval)
        elif row.found.standard_deviation is not None:
            cells[f"{name}, SD"] = _finite(row.found.standard_deviation)
    return cells


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _in_a_line(row: Row) -> str:
    spread = row.found.standard_deviation
    around = "" if spread is None else f" (standard deviation {spread:.3g})"
    beside = "" if row.difference is None else f", beside {row.difference.target:.6g}"
    return f"{row_name(row)} {row.found.value:.6g}{around} over {row.found.count}{beside}"
