# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The ranges of the conditions in a dataset: what 0 and 1 mean to a model that is trained on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.cells import read_number
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, parse_json, write_json

logger = logging.getLogger(__name__)

FILE = "conditions.json"


def learned_ranges(rows: Sequence[Mapping[str, Any]], conditions: Conditions) -> dict[str, float]:
    """Overrides of the configuration that let 0 and 1 be the least and the largest value in a training split.

    Conditions with codes, such as sex, keep their range, and so does one with fewer than two values.

    Args:
        rows: of the training split, with the raw values in the columns of the conditions' raw names.
        conditions: which.

    Returns:
        Ids of the configuration, such as `conditions::age::minimum`, with their values.
    """
    overrides: dict[str, float] = {}
    for condition in conditions:
        values = [] if condition.codes else _values(rows, condition)
        if not condition.codes and len(set(values)) < 2:
            logger.warning(f"{condition.raw} has fewer than two values in the training split: its range is not learned")
        elif values:
            overrides[f"conditions::{condition.name}::minimum"] = min(values)
            overrides[f"conditions::{condition.name}::maximum"] = max(values)
    return overrides


def _values(rows: Sequence[Mapping[str, Any]], condition: Condition) -> list[float]:
    numbers = (read_number(row.get(condition.raw)).value for row in rows)
    return [number for number in numbers if number is not None]


def check_learned_ranges(folder: str | os.PathLike, conditions: Conditions) -> None:
    """That a model is going to be trained with the ranges that were learned from its dataset, if any were.

    Raises:
        BundleError: naming the first that differs and what to add to the command.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    stated = read_ranges(path)
    for condition in conditions:
        for end in ("minimum", "maximum"):
            learned, used = stated.get(f"conditions::{condition.name}::{end}"), getattr(condition, end)
            if learned is not None and learned != used:
                raise BundleError(
                    f"the {end} of {condition.raw} in this dataset is {learned:g}, and {used:g} in the configuration: "
                    f"add '{path}' to the end of --config_file, in sampling too, or remove it to keep the configured"
                )


def read_ranges(path: Path) -> dict[str, float]:
    """The overrides in a file that `prepare.yaml` has written.

    Raises:
        BundleError: if it is damaged.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} does not hold ranges of conditions ({error}): prepare the dataset again") from error


def carry_over(dataset_dir: str | os.PathLike, latents_dir: str | os.PathLike) -> None:
    """Copy the learned ranges of a dataset, if it has any, to where its latents are; else remove those there.

    Raises:
        BundleError: if the dataset's are damaged, or cannot be written.
    """
    source, target = Path(dataset_dir) / FILE, Path(latents_dir) / FILE
    if source.is_file():
        write_json(make_folder(target.parent) / FILE, read_ranges(source))
    else:
        target.unlink(missing_ok=True)
