# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.preparation.quality_page`: one HTML page over a prepared dataset, by which bad scans are found and
excluded.

The page is written beside the dataset's tables and reads only what lies in the folder: it needs no network and no
server. Pictures are loaded when they are scrolled to, so that tens of thousands of scans are no burden.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.core.cells import is_missing
from scripts.core.files import write_text
from scripts.core.pages import render
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table
from scripts.preparation.checks import THICK_MM
from scripts.preparation.exclusions import Exclusions
from scripts.preparation.quality_pictures import THUMBNAILS
from scripts.preparation.registration import LIKELY_SCALES

FIGURES = "figures"
PAGE = "quality.html"
TEMPLATE = "quality.html"
FINE = {
    "field_of_view": "whole",
    "orientation": "upright",
    "header": "none",
    "sides": "usual",
    "contrast": "T1w",
    "air": "dark",
    "skull": "on",
}
"""Columns whose value, if it is another than this, makes a flag."""
USUAL = {"head_scale": LIKELY_SCALES, "largest_voxel_mm": (0.0, THICK_MM)}
"""Columns whose number, if it lies beyond, makes a flag."""
HIDDEN = ("path", "participant_id", "session_id")
NUMBERS = re.compile(r"-?\d+(\.\d+)?")


def write_page(
    dataset_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]] = (),
    score: str = "similarity",
    low_score: float = 0.4,
    excluded: Exclusions | None = None,
) -> Path:
    """Write `quality.html` into a prepared dataset.

    Args:
        dataset_dir: the dataset, with `figures/<name>.jpg` and `figures/thumbnails/<name>.jpg`.
        rows: of its table of scans, each with `participant_id` and `path`; their other columns are shown.
        failures: of the scans that could not be prepared: `participant_id`, `path` and `reason`; a `message`, and the
            `scan` whose picture lies in figures/, where there are such.
        score: the column by which the page is sorted at first, worst on top.
        low_score: below this a scan is flagged.
        excluded: what is excluded already, which the page begins with.

    Returns:
        The page's path.
    """
    listed = excluded or Exclusions(None)
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in HIDDEN]
    scans = [_scan(row, columns, score, low_score, listed) for row in rows]
    data = {"columns": columns, "score": score, "scans": scans, "figures": FIGURES, "thumbnails": THUMBNAILS}
    page = render(
        TEMPLATE,
        data=data,
        count=len(scans) + len(failures),
        reasons=_counted([str(row["reason"]) for row in failures]),
        failures=[_failure(dataset_dir, row) for row in failures],
    )
    write_text(dataset_dir / PAGE, page)
    return dataset_dir / PAGE


def scan_name(path: str) -> str:
    """The name of a scan, such as `sub-01_ses-2`, from the path of its prepared volume."""
    return re.split(r"_space-|_T1w|\.nii", Path(path).name)[0]


def flags(row: Mapping[str, Any], score: str = "similarity", low_score: float = 0.4) -> list[str]:
    """What about a prepared scan asks for a look, in words; empty if nothing does."""
    found = [f"{_words(name)}: {row[name]}" for name, fine in FINE.items() if _is_other(row.get(name), fine)]
    found += [f"{_words(name)}: {row[name]}" for name, usual in USUAL.items() if _is_beyond(row.get(name), usual)]
    value = _number(row.get(score))
    return [*found, f"low {_words(score)}"] if isinstance(value, float) and value < low_score else found


def _is_other(value: Any, fine: str) -> bool:
    return not is_missing(value) and str(value) != fine


def _is_beyond(value: Any, usual: tuple[float, float]) -> bool:
    number = _number(value)
    return isinstance(number, float) and not usual[0] <= number <= usual[1]


def _scan(
    row: Mapping[str, Any], columns: Sequence[str], score: str, low_score: float, excluded: Exclusions
) -> dict[str, Any]:
    participant, name = str(row["participant_id"]), scan_name(str(row["path"]))
    scan = {"name": name, "values": [_number(row.get(column)) for column in columns]}
    reason = excluded.reason(name, participant)
    return {**scan, "flags": flags(row, score, low_score), **({"excluded": reason} if reason else {})}


def _number(value: Any) -> float | str | None:
    """A finite number where the cell holds one, None where it is empty, else its text."""
    if is_missing(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(value)


def _words(column: str) -> str:
    return column.replace("_", " ")


def _counted(reasons: Sequence[str]) -> list[tuple[int, str]]:
    """How many scans have each reason, as it is; those that differ in file and numbers alone are counted together."""
    kinds = [NUMBERS.sub("#", _without_path(reason)) for reason in reasons]
    first = {kind: _without_path(reason) for kind, reason in reversed(list(zip(kinds, reasons)))}
    counts = Counter(kinds).most_common()
    return [(count, first[kind] + (", and the like" if count > 1 else "")) for kind, count in counts]


def _without_path(reason: str) -> str:
    return re.sub(r"^\S*[/\\.]\S*: ", "", reason)


def _failure(dataset_dir: Path, row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Participant, file, why in full, and the picture's name, empty where there is none, of one scan that failed."""
    picture = f"{row.get('scan') or ''}.jpg"
    there = (dataset_dir / FIGURES / THUMBNAILS / picture).is_file()
    why = str(row.get("message") or row["reason"])
    return str(row["participant_id"]), str(row["path"]), why, picture if there else ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts quality_page", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_dir", type=Path, default=Path("dataset"), help="the prepared dataset")
    parser.add_argument("--exclude", type=Path, help="a list of scans that the page begins with as excluded")
    parser.add_argument("--score", default="similarity", help="the column to sort by at first")
    flags = parser.parse_args()
    rows = read_table(flags.dataset_dir / "participants.tsv", ["participant_id", "path"])
    failed = flags.dataset_dir / "failures.tsv"
    failures = read_table(failed, ["participant_id", "path", "reason"]) if failed.is_file() else []
    print(write_page(flags.dataset_dir, rows, failures, flags.score, excluded=Exclusions(flags.exclude)))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
