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
"""The evaluation's report."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.atomic import make_folder, replacing, write_json
from scripts.bootstrap import Difference, Estimate, Summary, difference
from scripts.devices import process_rank
from scripts.errors import BundleError
from scripts.measures import Measure, Result, missing_flags
from scripts.tables import write_table

logger = logging.getLogger(__name__)

PACKAGES = ("monai", "numpy", "torch")
COLUMNS = (
    *("measure", "status", "metric", "count", "mean", "value", "standard_deviation", "confidence_low"),
    *("confidence_high", "target", "distance", "distance_low", "distance_high"),
)


def evaluate(metrics: Mapping[str, Measure], output_dir: str) -> None:
    """Compute the measures whose inputs were given, and write the report when all are done.

    Writes `evaluation.json`, `evaluation.tsv` with one row a metric, and the tables and pictures of the
    single measures. A measure that lacks an input is in the report as not requested. Under torchrun all
    processes share what measures prepare, the features; the first one does the rest.

    Args:
        metrics: name -> measure.
        output_dir: where to write.

    Raises:
        BundleError: if no measure has its inputs, or what a measure raises.
    """
    missing = {name: missing_flags(measure) for name, measure in metrics.items()}
    wanted = {name: measure for name, measure in metrics.items() if not missing[name]}
    if not wanted:
        raise BundleError(f"there is nothing to evaluate: give {_simplest(missing)}")
    folder = make_folder(output_dir)
    for measure in wanted.values():
        getattr(measure, "prepare", lambda: None)()
    if process_rank()[0] == 0:
        results = {name: measure.compute() for name, measure in wanted.items()}
        _report(folder, metrics, results, missing)


def _simplest(missing: Mapping[str, list[str]]) -> str:
    fewest = min(len(lacking) for lacking in missing.values())
    flags = sorted({f"--{flag} FOLDER" for lacking in missing.values() if len(lacking) == fewest for flag in lacking})
    return " or ".join(flags)


def _report(
    folder: Path, metrics: Mapping[str, Measure], results: Mapping[str, Result], missing: Mapping[str, list[str]]
) -> None:
    for name, result in results.items():
        _write_details(folder, name, result)
    distances = {name: _distances(metrics[name], result, results) for name, result in results.items()}
    entries = {name: _entry(results.get(name), distances.get(name, {}), missing[name]) for name in metrics}
    rows = [row for name, entry in entries.items() for row in _rows(name, entry)]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    write_table(folder / "evaluation.tsv", [{column: row.get(column) for column in columns} for row in rows])
    write_json(folder / "evaluation.json", {"measures": entries, "versions": {p: version(p) for p in PACKAGES}})
    _log(folder, results)


def _distances(measure: Measure, result: Result, results: Mapping[str, Result]) -> dict[str, Difference]:
    target = results.get(getattr(measure, "target", None) or "")
    if target is None:
        return {}
    both = {name: (found, target.summaries.get(name)) for name, found in result.summaries.items()}
    return {n: difference(a, b) for n, (a, b) in both.items() if isinstance(a, Summary) and isinstance(b, Summary)}


def _write_details(folder: Path, name: str, result: Result) -> None:
    if result.rows:
        write_table(folder / f"{name}.tsv", result.rows)
    if result.picture is not None:
        with replacing(folder / f"{name}.png") as temporary:
            result.picture.savefig(temporary, dpi=150)


def _rows(name: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    row = {"measure": name, "status": entry["status"]}
    return [{**row, "metric": metric, **values} for metric, values in entry.get("metrics", {}).items()] or [row]


def _entry(result: Result | None, distances: Mapping[str, Difference], missing: list[str]) -> dict[str, Any]:
    if result is None:
        return {"status": "not requested", "missing": [f"--{flag}" for flag in missing]}
    metrics = {name: _in_brief(summary, distances.get(name)) for name, summary in result.summaries.items()}
    return {"status": "computed", "metrics": metrics, **result.facts}


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


def _log(folder: Path, results: Mapping[str, Result]) -> None:
    for name, result in results.items():
        for metric, summary in result.summaries.items():
            value = summary.value if isinstance(summary, Estimate) else summary.mean
            logger.info(f"{name} {metric}: {value:.6g} over {summary.count}")
    logger.info(f"wrote {folder / 'evaluation.json'} and evaluation.tsv")
