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
"""The evaluation's report as one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from scripts.measures import Result
from scripts.report import Measured, Report, about
from scripts.report_pictures import histogram, png, volumes_picture
from scripts.samples import FLAG, REAL
from scripts.volume_folders import VolumeFolder

PAGE = "evaluation.html"
STYLE = """
body { font: 15px/1.45 Georgia, serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #111; }
p, ul, figcaption { max-width: 62em; overflow-wrap: anywhere; }
nav { font: .88em Helvetica, Arial, sans-serif; } nav a { margin-right: 1.2em; white-space: nowrap; }
h1, h2, h3, th, caption { font-family: Helvetica, Arial, sans-serif; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; border-top: 1px solid #999; padding-top: .7em; margin-top: 2em; }
h2::first-letter { text-transform: uppercase; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0 1.2em; font-size: .88em; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; padding-bottom: .3em; }
th, td { padding: .2em .7em .2em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { border-bottom: 1px solid #333; vertical-align: bottom; } td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; } td small { display: block; color: #444; }
img { max-width: 100%; height: auto; } figure { margin: 1em 0; break-inside: avoid; }
figcaption { font-size: .85em; color: #444; }
.warning { border-left: 4px solid #b00; padding-left: 1.5em; }
.pitfall { border-left: 4px solid #c90; padding-left: .8em; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } table, img { break-inside: avoid; } }
"""
HEADER = ("metric", "value", "95 % interval", "spread", "floor or target", "distance to it", "its 95 % interval", "n")
NAMES = {"fid": "FID", "kid": "KID", "ms_ssim": "MS-SSIM", "four_g_r_ssim": "4-G-R-SSIM", "pearson": "Pearson's r"}
ENDS = ("_low", "_high", "_sd")
"""Of columns that stand below another's figure."""
UNDEFINED = "not defined"
READING = (
    "n counts the volumes or pairs, for figures over random choices (halves, floor) the choices. Intervals are "
    "bootstraps over volumes, those of shares Wilson's. The spread is the standard deviation of single values, or over "
    "the choices."
)


def html(report: Report) -> str:
    """The page: tables, pictures and what they mean."""
    volumes = _volumes(report)  # first, since reading them may warn
    parts = [_models(report), _warnings(report), _summary(report), volumes]
    parts += [_section(key, entry, result, report) for key, entry, result in report.computed()]
    body, links = _linked("\n".join([*parts, _missing(report), _about(report)]))
    size = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    head = f"<meta charset='utf-8'>{size}<title>Evaluation</title><style>{STYLE}</style>"
    text = f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head>\n<body><h1>Evaluation of brain MRI samples</h1>\n"
    return f"{text}{links}{body}\n</body></html>\n"


def _linked(body: str) -> tuple[str, str]:
    """A page whose headings have a number to link to, and the links."""
    first, *sections = body.split("<h2>")
    numbered = (f"<h2 id='part-{number}'>{section}" for number, section in enumerate(sections))
    titles = (section.partition("</h2>")[0] for section in sections)
    links = "\n".join(f"<a href='#part-{number}'>{title}</a>" for number, title in enumerate(titles))
    return first + "".join(numbered), f"<nav>{links}</nav>"


def _models(report: Report) -> str:
    rows = report.table_1()
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.endswith(ENDS)]
    if not rows:
        return ""
    cells = [[_with_interval(row, column) for column in columns] for row in rows]
    note = (
        "One row a model, as Table 1 of Pinaya et al. 2022. For FID lower is better, down to the floor; similarities "
        "are to equal those of the real volumes. The name of a column has that of the feature network: columns of "
        "different networks do not compare. <i>halves</i> is the distance at the number of volumes of the floor, and "
        "<i>floor</i>, which stands in the row of the real volumes too, that of real volumes to real ones. Below a "
        "figure is its 95 % interval, or after ± its standard deviation over random halves. Pearson's r is that of "
        "measured with requested volumes of structures."
    )
    return f"<h2>Models</h2><p>{note}</p>{_table(list(map(_heading, columns)), cells)}"


def _heading(column: str) -> str:
    """The name of a metric, or of a column of the table of models, as it is written."""
    for key, name in NAMES.items():
        if column == key or column.startswith(f"{key}_"):
            return f"{name} {_words(column[len(key) + 1 :])}".strip()
        if column.endswith(f"_{key}"):
            return f"{_words(column.removesuffix(key))}{name}"
    return _words(column)


def _with_interval(row: Mapping[str, Any], column: str) -> str:
    value, low, high, spread = (_number(row.get(f"{column}{end}")) for end in ("", *ENDS))
    below = f"{low} to {high}" if low else f"± {spread}" if spread else ""
    return f"{value}<small>{below}</small>" if below else value


def _warnings(report: Report) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in report.warnings)
    return f"<h2>Warnings</h2><ul class='warning'>{items}</ul>" if items else ""


def _summary(report: Report) -> str:
    groups: dict[str, list[list[str]]] = {}
    for key, entry in report.entries().items():
        for metric, found in entry.get("metrics", {}).items():
            row = [_title(report.measures[key]), *_cells(metric, found)]
            groups.setdefault(_network(entry, metric), []).append(row)
    networks = _networks(report)
    tables = []
    for name, rows in groups.items():
        caption = f"By the feature network {name}" if name else "Without a feature network"
        tables.append(_measured(("measure", *HEADER), rows, caption) + _described(networks.get(name)))
    return f"<h2>Summary</h2><p>{READING}</p>" + "".join(tables)


def _network(entry: Mapping[str, Any], metric: str) -> str:
    """The network that gave a metric's figure, which begins its name; empty if there is none."""
    owners = [name for name in entry.get("networks", {}) if metric == name or metric.startswith(f"{name}_")]
    return max(owners, key=len, default="")


def _networks(report: Report) -> dict[str, dict[str, Any]]:
    return {name: facts for entry in report.entries().values() for name, facts in entry.get("networks", {}).items()}


def _described(network: Mapping[str, Any] | None) -> str:
    if not network:
        return ""
    facts = "; ".join(f"{_words(name)}: {escape(str(value))}" for name, value in network.items())
    return f"<p><small>{facts}.</small></p>"


def _cells(metric: str, found: Mapping[str, Any]) -> list[str]:
    return [
        escape(metric),
        _number(found.get("value", found.get("mean"))),
        _interval(found, "confidence"),
        _number(found.get("standard_deviation")),
        _number(found.get("target")),
        _number(found.get("distance")),
        _interval(found, "distance"),
        _number(found.get("count")),
    ]


def _interval(found: Mapping[str, Any], name: str) -> str:
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if value == "nan":
        return UNDEFINED
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _volumes(report: Report) -> str:
    folders = {model or "synthetic": features.folder for model, features in report.samples.sets.items()}
    others = {f.flag: f for e in report.measures.values() for f in e.measure.inputs if isinstance(f, VolumeFolder)}
    if "real_dir" in others:
        folders[REAL] = others["real_dir"]
    asked = {label: folder for label, folder in folders.items() if folder.requested}
    if not asked:
        return ""
    note = "Middle sagittal, coronal and axial planes, evenly spread over each folder; intensities from 0 to 1."
    return f"<h2>Volumes</h2>{_figure(volumes_picture(asked), note)}"


def _section(key: str, entry: Measured, result: Result, report: Report) -> str:
    facts = report.entries()[key]
    title = _title(entry)
    parts = [f"<h2>{escape(f'{_heading(entry.name)} {entry.model}'.strip())}</h2>"]
    for name, style in (("says", ""), ("pitfall", " class='pitfall'")):
        text = getattr(entry.measure, name, None)
        parts += [f"<p{style}>{escape(text)}</p>"] if text else []
    for name, group in _by_network(facts).items():
        caption = f"{title}, network {escape(name)}" if name else title
        parts.append(_measured(HEADER, [_cells(metric, found) for metric, found in group], caption))
    if entry.name == "synthetic_pairs":
        parts += [_figure(picture, note) for picture, note in _histograms(entry, result, report)]
    if result.picture is not None:
        parts.append(_figure(png(result.picture), getattr(entry.measure, "shows", f"{key}.png")))
    plain = {k: v for k, v in facts.items() if k not in ("metrics", "status", "networks")}
    return "".join(parts) + _facts(plain, "How it was measured")


def _title(entry: Measured) -> str:
    return escape(f"{_words(entry.name)} {entry.model}".strip())


def _measured(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of figures without the columns that are empty in all rows."""
    filled = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return _table([header[place] for place in filled], [[row[place] for place in filled] for row in rows], caption)


def _by_network(facts: Mapping[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    groups: dict[str, list[tuple[str, Any]]] = {}
    for metric, found in facts["metrics"].items():
        groups.setdefault(_network(facts, metric), []).append((metric, found))
    return groups


def _histograms(entry: Measured, result: Result, report: Report) -> Iterable[tuple[bytes, str]]:
    sets = {entry.model or "synthetic": result.rows}
    real = report.measures.get("real_pairs")
    if real is not None and real.result is not None:
        sets[REAL] = real.result.rows
    for name in result.summaries:
        yield histogram(name, sets), f"{_heading(name)} of the pairs within each set."


def _missing(report: Report) -> str:
    entries = {key: entry for key, entry in report.entries().items() if "missing" in entry}
    rows = [
        [_title(report.measures[key]), escape(", ".join(entry["missing"])), escape("; ".join(entry.get("why", ())))]
        for key, entry in entries.items()
    ]
    return f"<h2>Not requested</h2>{_table(('measure', 'needs', ''), rows, last='text')}" if rows else ""


def _about(report: Report) -> str:
    facts = about(report)
    parts = [_facts(facts[name], _words(name)) for name in ("flags", "versions", "seconds")]
    models = {model: str(features.folder.folder) for model, features in report.samples.sets.items() if model}
    return "<h2>Flags, versions and time</h2>" + _facts(models, f"Folders of --{FLAG}") + "".join(parts)


def _facts(facts: Mapping[str, Any], caption: str) -> str:
    rows = [[escape(str(name)), escape(_in_words(value))] for name, value in facts.items() if value not in (None, {})]
    return _table(("", ""), rows, caption, last="text") if rows else ""


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_in_words(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _words(key: str) -> str:
    return escape(key.replace("_", " "))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", last: str = "") -> str:
    """A table; captions, header and cells are HTML already. The last column may be of a class of its own."""
    title = f"<caption>{caption}</caption>" if caption else ""
    top = "".join(f"<th>{name}</th>" for name in header)
    kinds = [""] * (len(header) - 1) + [f" class='{last}'" if last else ""]
    cells = ("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) for row in rows)
    head = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<div class='wide'><table>{title}{head}<tbody>{lines}</tbody></table></div>"


def _figure(picture: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
    return f"<figure><img src='{source}' alt='{escape(caption)}'><figcaption>{escape(caption)}</figcaption></figure>"
