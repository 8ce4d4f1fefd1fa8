# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The evaluation's report as JSON and as tables."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.atomic import replacing, write_json
from scripts.bootstrap import Difference, Estimate, Summary, difference
from scripts.errors import BundleError
from scripts.measures import Measure, Result
from scripts.paths import CONFIGS
from scripts.samples import REAL, Samples
from scripts.tables import write_table

logger = logging.getLogger(__name__)

JSON = "evaluation.json"
TABLE_1 = "table_1"
COMPUTED = "computed"
PACKAGES = ("monai", "numpy", "torch")
FLOOR = re.compile(r"(fid_.+)_floor((?:_sd)?)")
"""Columns of the floor in the table of models."""
COLUMNS = (
    *("measure", "model", "status", "metric", "count", "mean", "value", "standard_deviation", "confidence_low"),
    *("confidence_high", "target", "distance", "distance_low", "distance_high"),
)


@dataclass
class Measured:
    """A measure of the report.

    Attributes:
        name: of the measure in the configuration.
        model: whose samples it measures; empty where there is one unnamed model, or none.
        measure: what measures.
        result: what it found; None if it was not asked for.
        seconds: what that took.
    """

    name: str
    model: str
    measure: Measure
    result: Result | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """All that an evaluation found.

    Attributes:
        measures: by their keys in the report.
        missing: key -> flags that the measure lacks.
        samples: the models' volumes.
        flags: what was asked for.
        warnings: what was warned of meanwhile.
    """

    measures: dict[str, Measured]
    missing: dict[str, list[str]]
    samples: Samples
    flags: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def computed(self) -> Iterator[tuple[str, Measured, Result]]:
        """Key, measure and result of those that were asked for."""
        for key, entry in self.measures.items():
            if entry.result is not None:
                yield key, entry, entry.result

    def entries(self) -> dict[str, dict[str, Any]]:
        """Key -> what the JSON says of the measure."""
        return {key: self._entry(key, entry) for key, entry in self.measures.items()}

    def _entry(self, key: str, entry: Measured) -> dict[str, Any]:
        model = {"model": entry.model} if entry.model else {}
        if entry.result is None:
            missing = [f"--{flag}" for flag in self.missing[key]]
            reasons = [why for needed in entry.measure.inputs for why in [getattr(needed, "why_not", "")] if why]
            return {**model, "status": "not requested", "missing": missing, **({"why": reasons} if reasons else {})}
        distances = self.distances(entry, entry.result)
        metrics = {name: _in_brief(found, distances.get(name)) for name, found in entry.result.summaries.items()}
        return {**model, "status": COMPUTED, "metrics": metrics, **entry.result.facts}

    def distances(self, entry: Measured, result: Result) -> dict[str, Difference]:
        """Name of a metric -> how far it lies from its floor or target, where it has one."""
        target = self.measures.get(getattr(entry.measure, "target", None) or "")
        if target is None or target.result is None:
            return result.distances
        both = {name: (found, target.result.summaries.get(name)) for name, found in result.summaries.items()}
        found = {n: difference(a, b) for n, (a, b) in both.items() if isinstance(a, Summary) and isinstance(b, Summary)}
        return {**result.distances, **found}

    def table_1(self) -> list[dict[str, Any]]:
        """One row a model and one of the real volumes: FID of each network, MS-SSIM and 4-G-R-SSIM.

        As the paper's Table 1. A network has three columns: the distance of all volumes, that of as many as the
        floor has, and the floor, each of the last two with its standard deviation (`_sd`). Where volumes of structures
        were measured, Pearson's r with what was asked for follows.
        """
        entries = self.entries()
        rows = [self._model_row(model, entries) for model in self.samples.sets]
        rows = [row for row in rows if len(row) > 1]
        pairs = entries.get("real_pairs", {})
        real = {**_floors(rows), **_similarities(pairs)}
        volumes = {"volumes": pairs["real_dir"]["volumes"]} if "real_dir" in pairs else {}
        return [*rows, {"model": REAL, **volumes, **real}] if real else rows

    def _model_row(self, model: str, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        names = ("fid", "synthetic_pairs", "volumetry")
        fid, pairs, volumetry = (entries.get(f"{name}_{model}" if model else name, {}) for name in names)
        found = {**_distances(fid), **_similarities(pairs), **_similarities(volumetry, "_pearson")}
        volumes = {"volumes": len(self.samples.sets[model].folder)} if found else {}
        return {"model": model or "synthetic", **volumes, **found}


def _distances(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, metric in entry.get("metrics", {}).items():
        found[f"fid_{name}"] = _value(metric)
        if "standard_deviation" in metric:
            found[f"fid_{name}_sd"] = metric["standard_deviation"]
    return found


def _floors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What stands for the real volumes in the columns of halves: the floor, where all models have the same."""
    columns = dict.fromkeys(name for row in rows for name in row if FLOOR.fullmatch(name))
    found = {name: {row.get(name) for row in rows} for name in columns}
    return {FLOOR.sub(r"\1_halves\2", name): floors.pop() for name, floors in found.items() if len(floors) == 1}


def _similarities(entry: Mapping[str, Any], ending: str = "") -> dict[str, Any]:
    found = {}
    for name, metric in entry.get("metrics", {}).items():
        if name.endswith(ending):
            found[name] = _value(metric)
            found.update({f"{name}_{end}": metric[f"confidence_{end}"] for end in ("low", "high")})
    return found


def _value(metric: Mapping[str, Any]) -> Any:
    return metric.get("value", metric.get("mean"))


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
        measures = json.loads(path.read_text(encoding="utf-8"))["measures"]
        return [str(key) for key, entry in measures.items() if entry["status"] == COMPUTED]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # there is none, or it is no evaluation's


def _files(folder: Path, report: Report) -> list[Path]:
    """The tables and pictures of single measures, and the table of models, that a report has."""
    found = [folder / f"{key}.tsv" for key, _, result in report.computed() if result.rows]
    found += [folder / f"{key}.png" for key, _, result in report.computed() if result.picture is not None]
    return [*found, folder / f"{TABLE_1}.tsv"] if report.table_1() else found


def write_report(folder: Path, report: Report) -> None:
    """Write `evaluation.json`, `evaluation.tsv`, `table_1.tsv`, and the tables and pictures of single measures."""
    for key, _, result in report.computed():
        if result.rows:
            write_table(folder / f"{key}.tsv", result.rows)
        if result.picture is not None:
            with replacing(folder / f"{key}.png") as temporary:
                result.picture.savefig(temporary, dpi=150)
    entries, table_1 = report.entries(), report.table_1()
    rows = [row for key, entry in entries.items() for row in _rows(key, entry)]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    write_table(folder / "evaluation.tsv", [{column: row.get(column) for column in columns} for row in rows])
    if table_1:
        write_table(folder / f"{TABLE_1}.tsv", table_1)
    write_json(folder / JSON, {"measures": entries, "table_1": table_1, **about(report)})
    _log(report)


def about(report: Report) -> dict[str, Any]:
    """What was asked for, what was warned of, how long it took and with what."""
    return {
        "flags": {name: _plain(value) for name, value in report.flags.items()},
        "warnings": report.warnings,
        "seconds": {key: round(entry.seconds, 1) for key, entry, _ in report.computed()},
        "versions": {"bundle": _bundle_version(), "python": platform.python_version(), **_packages()},
    }


def _packages() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def _bundle_version() -> str:
    return str(json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))["version"])


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _rows(key: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    row = {"measure": key, "status": entry["status"]}
    if "model" in entry:
        row.update(measure=key.removesuffix(f"_{entry['model']}"), model=entry["model"])
    return [{**row, "metric": metric, **values} for metric, values in entry.get("metrics", {}).items()] or [row]


def _in_brief(summary: Summary | Estimate, distance: Difference | None) -> dict[str, Any]:
    brief: dict[str, Any] = {"count": summary.count}
    if isinstance(summary, Estimate):
        brief["value"] = _finite(summary.value)
    else:
        brief["mean"] = _finite(summary.mean)
        brief["standard_deviation"] = _finite(summary.standard_deviation)
    brief.update(zip(("confidence_low", "confidence_high"), map(_finite, summary.interval or (None, None))))
    if distance is not None:
        brief.update(target=_finite(distance.target), distance=_finite(distance.value))
        brief.update(zip(("distance_low", "distance_high"), map(_finite, distance.interval or (None, None))))
    return brief


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _log(report: Report) -> None:
    for key, entry, result in report.computed():
        distances = report.distances(entry, result)
        for metric, summary in result.summaries.items():
            logger.info(f"{key} {metric}: {_told(summary)}{_beside(distances.get(metric))}")


def _told(summary: Summary | Estimate) -> str:
    if isinstance(summary, Estimate):
        return f"{summary.value:.6g} over {summary.count}"
    spread = "" if summary.standard_deviation is None else f" (standard deviation {summary.standard_deviation:.3g})"
    return f"{summary.mean:.6g}{spread} over {summary.count}"


def _beside(distance: Difference | None) -> str:
    return "" if distance is None else f", beside {distance.target:.6g}"
