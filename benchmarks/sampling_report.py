# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The report of `benchmarks.sampling`: written after each case, continued where it was stopped, drawn and printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from scripts.core.errors import BundleError
from scripts.core.files import replacing, write_json
from scripts.core.tables import write_table

AXES = {"steps": "steps", "batch": "unet", "voxels": "decode"}
TITLES = {"steps": "trajectory", "unet": "UNet call"}
WHICH = ("size", "case", "batch", "steps", "voxels")
CHOICES = ("size", "cases", "batches", "steps", "sides", "folder", "minutes", "resume")
"""Options that choose what is measured, and not how."""


class Report:
    """Rows of measurements in a folder: `sampling.json` and `sampling.tsv` at any time, `sampling.png` at the end.

    Args:
        folder: where to.
        about: `machine`, `ceilings` and `options`, which the file states beside the rows.
        resume: whether to go on with the rows that are there; failed ones are measured again.

    Raises:
        BundleError: if those are of another machine or of other options.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], resume: bool = False) -> None:
        self.folder, self.about = folder, about
        self.rows: list[dict[str, Any]] = []
        if resume and (folder / "sampling.json").is_file():
            found = json.loads((folder / "sampling.json").read_text())
            if _how(found) != _how(json.loads(json.dumps(about))):
                raise BundleError(f"{folder} holds measurements of another machine or other options: give another one")
            failed = {_which(row) for row in found["rows"] if row["failed"]}
            self.rows = [row for row in found["rows"] if _which(row) not in failed]

    def has(self, about: Mapping[str, Any]) -> bool:
        """Whether a case is there already: its size, case, batch, steps and voxels."""
        return _which(about) in map(_which, self.rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of one more case.

        Raises:
            BundleError: if they cannot be written; what was written before is kept.
        """
        self.rows += rows
        write_json(self.folder / "sampling.json", {**self.about, "rows": self.rows})
        write_table(self.folder / "sampling.tsv", [{**row, "seconds": _median(row)} for row in self.rows])

    def finish(self) -> None:
        """Print all of it as a table, and draw what was measured."""
        print_table(self.rows)
        measured = [row for row in self.rows if row["seconds"]]
        if measured:
            with replacing(self.folder / "sampling.png") as path:
                plot(measured).savefig(path, dpi=120, format="png")


def _which(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in WHICH)


def _how(report: Mapping[str, Any]) -> tuple[Any, Any]:
    return report["machine"], {name: value for name, value in report["options"].items() if name not in CHOICES}


def _median(row: Mapping[str, Any]) -> float | None:
    return median(row["seconds"]) if row["seconds"] else None


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of the parts, and how they grow with steps, batch and volume."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    parts, *axes = figure.subplots(1, 1 + len(AXES))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    colours = {way: f"C{number}" for number, way in enumerate(ways)}
    largest = max(row["voxels"] for row in rows)
    least = {(row["case"], row["way"]): row for row in reversed(rows) if row["voxels"] == largest}
    cases = list(dict.fromkeys(case for case, _ in reversed(least)))
    for number, way in enumerate(ways):
        heights = [median(least[case, way]["seconds"]) if (case, way) in least else 0.0 for case in cases]
        places = [place + number * 0.8 / len(ways) for place in range(len(cases))]
        parts.bar(places, heights, 0.8 / len(ways), label=way, color=colours[way], align="edge")
    parts.set_xticks([place + 0.4 for place in range(len(cases))], cases, rotation=30)
    parts.set(yscale="log", ylabel="seconds", title="parts")
    for axis, (name, case) in zip(axes, AXES.items()):
        for way in ways:
            points = sorted((r[name], median(r["seconds"])) for r in _alone(rows, name, case, way))
            axis.plot(*zip(*points), "o-", color=colours[way], label=way) if points else None
        axis.set(
            xscale="log", yscale="log", xlabel=name, ylabel="seconds", title=f"{TITLES.get(case, case)} over {name}"
        )
        axis.xaxis.set_major_locator(FixedLocator(sorted({row[name] for row in rows if row[name] is not None})))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    parts.legend(fontsize=7)
    return figure


def _alone(rows: Sequence[Mapping[str, Any]], name: str, case: str, way: str) -> list[Mapping[str, Any]]:
    # Only `name` varies: the networks are those of the first size, the batch the smallest, the volume the largest.
    found = [row for row in rows if (row["size"], row["case"], row["way"]) == (rows[0]["size"], case, way)]
    fixed = {"batch": min, "voxels": max}
    kept = {key: choose(row[key] for row in found) for key, choose in fixed.items() if key != name and found}
    return [row for row in found if all(row[key] == value for key, value in kept.items())]


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as Markdown; what failed, with its reason."""
    names = ["size", "voxels", "case", "batch", "steps", "way", "seconds", "cpu_seconds", "times_original", "peak_gib"]
    names += ["growth_gib", "percent_of_matmul", "percent_of_copy", "relative_error", "failed"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        shown = {**row, "seconds": _median(row)}
        cells = ["" if shown.get(name) is None else shown[name] for name in names]
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
