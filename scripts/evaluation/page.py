# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation's report as one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scripts.core.pages import render
from scripts.evaluation.measures import Result, Row
from scripts.evaluation.names import row_name, written
from scripts.evaluation.report import REAL_FLAG, Line, Measured, Report, about
from scripts.evaluation.report_pictures import histogram, png, volumes_picture
from scripts.evaluation.samples import FLAG, REAL

PAGE = TEMPLATE = "evaluation.html"
HEADER = ("metric", "value", "95 % interval", "spread", "floor or target", "distance to it", "its 95 % interval", "n")
UNDEFINED = "not defined"
VOLUMES = "Middle sagittal, coronal and axial planes, evenly spread over each folder; intensities from 0 to 1."

Cell = str | dict[str, str]
Table = dict[str, Any]


def html(report: Report) -> str:
    """The page: tables, pictures and what they mean."""
    volumes = _volumes(report)  # first, since reading them may warn
    sections = [_section(entry, result, report) for _, entry, result in report.computed()]
    content: dict[str, Any] = {
        "models": _models(report.table_1()),
        "warnings": report.warnings,
        "summary": _summary(report),
        "volumes": volumes,
        "sections": sections,
        "missing": _missing(report),
        "about": _about(report),
    }
    titles = ("Models", "Warnings", "Summary", "Volumes", *(s["title"] for s in sections), "Not requested")
    shown = [title for title in titles if content.get({"Not requested": "missing"}.get(title, title.lower()), True)]
    anchors = {title: f"part-{number}" for number, title in enumerate([*shown, "Flags, versions and time"])}
    return render(TEMPLATE, anchors=anchors, **content)


def _models(lines: Sequence[Line]) -> Table | None:
    if not lines:
        return None
    columns = list(dict.fromkeys(name for line in lines for name in line.rows))
    rows = [[line.model, number(line.volumes), *(_in_brief(line.rows.get(name)) for name in columns)] for line in lines]
    return {"header": ["model", "volumes", *columns], "rows": rows}


def _in_brief(row: Row | None) -> Cell:
    """A figure, and below it its interval or else its spread."""
    if row is None:
        return ""
    value, interval, spread = number(row.found.value), _interval(row.found.interval), row.found.standard_deviation
    below = interval or (f"± {number(spread)}" if spread is not None else "")
    return {"value": value, "below": below} if below else value


def _summary(report: Report) -> list[Table]:
    groups: dict[str, list[list[str]]] = {}
    for entry in report.measures.values():
        for row in report.rows(entry):
            groups.setdefault(row.network, []).append([entry.title, *_cells(row)])
    networks = _networks(report)
    return [
        {
            **_measured(("measure", *HEADER), rows),
            "caption": f"By the feature network {written(name)}" if name else "Without a feature network",
            "network": "; ".join(f"{written(fact)}: {value}" for fact, value in networks.get(name, {}).items()),
        }
        for name, rows in groups.items()
    ]


def _networks(report: Report) -> dict[str, dict[str, Any]]:
    """Feature network -> what it is, as the measures that use it say."""
    networks = (result.facts.get("networks", {}) for _, _, result in report.computed())
    return {name: facts for found in networks for name, facts in found.items()}


def _measured(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of figures without the columns that are empty in all rows."""
    filled = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return {"header": [header[place] for place in filled], "rows": [[row[place] for place in filled] for row in rows]}


def _cells(row: Row) -> list[str]:
    to = row.difference
    return [
        row_name(row),
        number(row.found.value),
        _interval(row.found.interval),
        number(row.found.standard_deviation),
        number(to.target if to else None),
        number(to.value if to else None),
        _interval(to.interval if to else None),
        number(row.found.count),
    ]


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def number(value: float | None) -> str:
    """A figure for a cell: four digits, nothing for None, and words for NaN."""
    if value is None:
        return ""
    if value != value:
        return UNDEFINED
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _volumes(report: Report) -> dict[str, Any] | None:
    folders = {model or "synthetic": features.folder for model, features in report.samples.sets.items()}
    asked = {label: folder for label, folder in folders.items() if folder.requested}
    real = report.folder(REAL_FLAG)
    if real is not None:
        asked[REAL] = real
    if not asked:
        return None
    data, paths = volumes_picture(asked)
    return {**_picture(data, VOLUMES), "volumes": [str(path.absolute()) for path in paths]}


def _section(entry: Measured, result: Result, report: Report) -> dict[str, Any]:
    groups: dict[str, list[list[str]]] = {}
    for row in report.rows(entry):
        groups.setdefault(row.network, []).append(_cells(row))
    captions = {name: f"{entry.title}, network {written(name)}" if name else entry.title for name in groups}
    title = f"{written(entry.name)[0].upper()}{written(entry.name)[1:]} {entry.model or ''}".strip()
    return {
        "title": title,
        "says": entry.measure.says,
        "pitfall": entry.measure.pitfall,
        "groups": [{**_measured(HEADER, rows), "caption": captions[name]} for name, rows in groups.items()],
        "pictures": list(_pictures(entry, result, report)),
        "facts": _facts({name: value for name, value in result.facts.items() if name != "networks"}),
    }


def _pictures(entry: Measured, result: Result, report: Report) -> Iterator[dict[str, str]]:
    """The distributions of single values beside those of the target, where there is one, and the measure's picture."""
    target = report.measures.get(entry.measure.target or "")
    if target is not None:
        sets = {entry.model or "synthetic": result.table}
        if target.result is not None:
            sets[REAL] = target.result.table
        for row in result.rows:
            yield _picture(histogram(row.metric, sets), f"{row_name(row)} of the pairs within each set.")
    if result.picture is not None:
        yield _picture(png(result.picture), entry.measure.shows)


def _picture(data: bytes, shows: str) -> dict[str, str]:
    return {"data": base64.b64encode(data).decode("ascii"), "shows": shows}


def _missing(report: Report) -> list[list[str]]:
    entries = {key: about for key, about in report.about_measures().items() if "missing" in about}
    return [
        [report.measures[key].title, ", ".join(about["missing"]), "; ".join(about.get("why", ()))]
        for key, about in entries.items()
    ]


def _about(report: Report) -> dict[str, list[list[str]]]:
    models = {model: str(features.folder.folder) for model, features in report.samples.sets.items() if model}
    facts = about(report)
    tables = {f"Folders of --{FLAG}": models, **{name: facts[name] for name in ("flags", "versions", "seconds")}}
    return {caption: _facts(found) for caption, found in tables.items()}


def _facts(facts: Mapping[str, Any]) -> list[list[str]]:
    return [[str(name), _fact(value)] for name, value in facts.items() if value not in (None, {})]


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_fact(item)}" for name, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_fact(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
