# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What was asked for of a folder's volumes, as their sidecars or their table state it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.files import looks_there, parse_json
from scripts.core.tables import read_table
from scripts.volumes.folders import TABLE, VolumeFolder
from scripts.volumes.labels import QUANTITIES, stem


def requested_volumes(folder: VolumeFolder, conditions: Conditions) -> dict[str, dict[str, float]]:
    """What was asked for, in raw units: name of the volume -> name of the condition -> value.

    It stands in each volume's sidecar (`.json`), or in the row of `participants.tsv` whose `path` is the volume.

    Raises:
        BundleError: if a volume has neither, or was made without conditions, two volumes share a name, a value is no
            number, or none of the conditions is a volume.
    """
    if not any(c.name in QUANTITIES for c in conditions):
        raise BundleError(f"the conditions are no volumes: none of them is {' or '.join(QUANTITIES)}")
    names = [stem(path) for path in folder.paths]
    for name in names:
        if names.count(name) > 1:
            raise BundleError(f"two volumes in {folder.folder} are called {name}: segmentations are told by name")
    rows = table_rows(folder)
    return {name: _stated(path, rows.get(path), conditions) for name, path in zip(names, folder.paths)}


def table_rows(folder: VolumeFolder) -> dict[Path, dict[str, str]]:
    """The rows of a folder's `participants.tsv` by the volumes that they name; none where there is no such table."""
    assert folder.folder is not None
    table = folder.folder / TABLE
    rows = read_table(table) if looks_there(table) else []
    return {folder.folder / row["path"]: row for row in rows if "path" in row}


def stated_conditions(path: Path, row: Mapping[str, str] | None) -> Mapping[str, Any] | None:
    """What a volume's sidecar says of its conditions, else its row; None if it has neither.

    Raises:
        BundleError: if the sidecar says nothing of them, and there is no row.
    """
    sidecar = path.with_name(f"{stem(path)}.json")
    if not sidecar.is_file():
        return row
    try:
        stated = dict(parse_json(sidecar.read_text(encoding="utf-8"))["conditions"])
    except (ValueError, KeyError, TypeError) as error:
        if row is not None:
            return row
        raise BundleError(f"{sidecar} does not state the conditions of {path.name}") from error
    return stated


def _stated(path: Path, row: Mapping[str, str] | None, conditions: Conditions) -> dict[str, float]:
    stated = stated_conditions(path, row)
    if stated is None:
        name = f"{stem(path)}.json"
        raise BundleError(f"what was asked for of {path} is not known: it has no {name} and no row in {TABLE}")
    if not stated:
        raise BundleError(f"{path} was made without conditions: nothing was asked for")
    return {c.name: _raw(c, stated, path) for c in conditions if c.name in QUANTITIES}


def _raw(condition: Condition, stated: Mapping[str, Any], path: Path) -> float:
    for flag in (condition.raw, condition.name):
        value, _ = condition.from_cell(flag, stated.get(flag))
        if value is not None:
            return condition.denormalise(condition.parse(flag, value, f" of {path}"))
    raise BundleError(f"{path} has no value of {condition.raw}")
