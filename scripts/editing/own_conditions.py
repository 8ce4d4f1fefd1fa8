# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The conditions that a head has: as stated, from its dataset's table or its sidecar, measured, or the middle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.files import read_json
from scripts.core.tables import read_table
from scripts.volumes.datasets import TABLE
from scripts.volumes.scans import without_suffix

logger = logging.getLogger(__name__)

STATED, IN_TABLE, IN_SIDECAR, MEASURED, ASSUMED = "stated", "table", "sidecar", "measured", "assumed"
DEPTH = 5
"""So many folders above a prepared scan its dataset's table may lie."""


@dataclass(frozen=True)
class OwnConditions:
    """What a head has.

    Attributes:
        vector: (conditions,), normalised.
        sources: raw name -> where the value is from.
    """

    vector: Tensor
    sources: dict[str, str]


def table_row(scan: Path) -> Mapping[str, str]:
    """The row of a prepared scan in the table of its dataset; empty where there is none.

    Raises:
        BundleError: if the table is damaged.
    """
    for folder in list(scan.resolve().parents)[:DEPTH]:
        table = folder / TABLE
        if table.is_file():
            rows = [row for row in read_table(table) if row.get("path")]
            return next((row for row in rows if (folder / row["path"]).resolve() == scan.resolve()), {})
    return {}


def sidecar_of(scan: Path) -> Path:
    """The JSON file beside a volume."""
    return scan.with_name(f"{without_suffix(scan.name)}.json")


def find_own(
    scan: Path,
    conditions: Conditions,
    stated: Mapping[str, Any],
    measure: Callable[[], Mapping[str, float]],
    missing: str = "default",
) -> OwnConditions:
    """The conditions of a prepared scan, or of a sample.

    Args:
        scan: the volume's file.
        conditions: which.
        stated: what is stated of it, by flag or column, which counts before all else.
        measure: gives volumes by raw name; called where nothing else says them.
        missing: `default` takes the middle of the range for what is not known, and warns; `error` refuses.

    Raises:
        BundleError: for a value that cannot be read, or `error` where one is missing.
    """
    if missing not in ("default", "error"):
        raise BundleError(f"--missing_conditions must be default or error here, got '{missing}'")
    unknown = set(stated) - set(conditions.flags())
    if unknown:
        raise BundleError(f"--own has {sorted(unknown)[0]}, which is no condition: it may have {conditions.flags()}")
    said = read_json(sidecar_of(scan)).get("conditions")
    places: dict[str, Mapping[str, Any]] = {STATED: stated, IN_TABLE: table_row(scan)}
    places[IN_SIDECAR] = said if isinstance(said, Mapping) else {}
    found = {name: conditions.in_table(row, f" of {scan}") for name, row in places.items()}
    values, sources = [], {}
    for condition in conditions:
        value, source = _first(condition, found, scan)
        if source == ASSUMED and (number := measure().get(condition.raw)) is not None:
            value, source = condition.normalise(number), MEASURED
        if source == ASSUMED:
            _say_missing(condition, scan, missing)
        values.append(value)
        sources[condition.raw] = source
    return OwnConditions(torch.tensor(values, dtype=torch.float32), sources)


def _first(condition: Condition, found: Mapping[str, Mapping[str, Any]], scan: Path) -> tuple[float, str]:
    """The normalised value that the first place has which states one, and which that is."""
    for source, row in found.items():
        for flag in (condition.raw, condition.name):
            if row.get(flag) is not None:
                return condition.parse(flag, row[flag], f" of {scan}"), source
    return condition.default, ASSUMED


def _say_missing(condition: Condition, scan: Path, missing: str) -> None:
    middle = condition.describe(condition.denormalise(condition.default))
    if missing == "error":
        raise BundleError(
            f"{condition.raw} of {scan} is not known: state it by --own \"{{'{condition.raw}': ...}}\", or give "
            f"--missing_conditions default to take the middle, {middle}"
        )
    logger.warning(
        f"{condition.raw} of {scan} is not known: the middle of the range, {middle}, is taken for it; state it by "
        f"--own \"{{'{condition.raw}': ...}}\""
    )
