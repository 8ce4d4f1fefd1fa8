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
from scripts.bootstrap import Summary
from scripts.errors import BundleError
from scripts.measures import Measure, Result, missing_flags
from scripts.tables import write_table

logger = logging.getLogger(__name__)

PACKAGES = ("monai", "numpy", "torch")


def evaluate(metrics: Mapping[str, Measure], output_dir: str) -> None:
    """Compute the measures whose folders were given, and write the report when all are done.

    Writes `evaluation.json`, `evaluation.tsv` with one row a metric, and the tables and pictures of the
    single measures. A measure that lacks a folder is in the report as not requested.

    Args:
        metrics: name -> measure.
        output_dir: where to write.

    Raises:
        BundleError: if no measure has its folders, or what a measure raises.
    """
    missing = {name: missing_flags(measure) for name, measure in metrics.items()}
    if all(missing.values()):
        flags = sorted({flag for lacking in missing.values() for flag in lacking})
        raise BundleError(f"there is nothing to evaluate: give {' or '.join(f'--{flag} FOLDER' for flag in flags)}")
    folder = make_folder(output_dir)
    results = {name: measure.compute() for name, measure in metrics.items() if not missing[name]}
    for name, result in results.items():
        _write_details(folder, name, result)
    write_table(folder / "evaluation.tsv", [row for name in metrics for row in _rows(name, results.get(name))])
    entries = {name: _entry(results.get(name), missing[name]) for name in metrics}
    write_json(folder / "evaluation.json", {"measures": entries, "versions": {p: version(p) for p in PACKAGES}})
    _log(folder, results)


def _write_details(folder: Path, name: str, result: Result) -> None:
    if result.rows:
        write_table(folder / f"{name}.tsv", result.rows)
    if result.picture is not None:
        with replacing(folder / f"{name}.png") as temporary:
            result.picture.savefig(temporary, dpi=150)


def _rows(name: str, result: Result | None) -> list[dict[str, Any]]:
    if result is None:
        return [{"measure": name, "status": "not requested"}]
    return [
        {"measure": name, "status": "computed", "metric": metric, **_in_brief(summary)}
        for metric, summary in result.summaries.items()
    ]


def _entry(result: Result | None, missing: list[str]) -> dict[str, Any]:
    if result is None:
        return {"status": "not requested", "missing": [f"--{flag}" for flag in missing]}
    metrics = {name: _in_brief(summary) for name, summary in result.summaries.items()}
    return {"status": "computed", "metrics": metrics, **result.facts}


def _in_brief(summary: Summary) -> dict[str, Any]:
    low, high = summary.interval or (None, None)
    return {
        "count": summary.count,
        "mean": _finite(summary.mean),
        "standard_deviation": _finite(summary.standard_deviation),
        "confidence_low": _finite(low),
        "confidence_high": _finite(high),
    }


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _log(folder: Path, results: Mapping[str, Result]) -> None:
    for name, result in results.items():
        for metric, summary in result.summaries.items():
            logger.info(f"{name} {metric}: {summary.mean:.6g} over {summary.count}")
    logger.info(f"wrote {folder / 'evaluation.json'} and evaluation.tsv")
