# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The configurations read as text, without PyTorch: which verbs and overlays there are, and which flags a verb uses."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scripts.core.errors import BundleError
from scripts.core.old_names import new_id
from scripts.core.paths import CONFIGS

BASE = CONFIGS / "inference.json"
SAMPLE = "sample"
SEPARATOR = "::"
REFERENCE = re.compile(r"[@%](\w+(?:::\w+)*)")
STARTS = ("run", "initialize", "finalize")
IDS_OF_STARTS = ("run_id", "init_id", "final_id")
OF_OVERLAYS = {"stage", "stage_weights", "facts"}
"""Plain ids that a training's file sets for the rest of the configuration: no options, and in no table of them."""


@functools.cache
def load_config(path: Path) -> Mapping[str, Any]:
    """The content of one JSON or YAML file.

    Raises:
        BundleError: if it cannot be read, or is no map.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BundleError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BundleError(f"the configuration {path} is no map of ids to values")
    return content


def overlays() -> dict[str, Path]:
    """Name -> file of all overlays in `configs/`."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def verbs() -> dict[str, list[Path]]:
    """Name -> files of the verbs: `sample` is the base alone, each overlay with a `run` of its own is one more.

    What several names begin with is a word of its own: `train diffusion`, beside `encode_latents`.
    """
    stems = {stem: path for stem, path in overlays().items() if "run" in load_config(path)}
    first = [stem.split("_")[0] for stem in stems]
    names = {stem: stem.replace("_", " ", 1) if first.count(stem.split("_")[0]) > 1 else stem for stem in stems}
    return {SAMPLE: [BASE], **{names[stem]: [BASE, path] for stem, path in stems.items()}}


def additions() -> dict[str, Path]:
    """Name -> file of the overlays that `--with` takes: those without a `run`."""
    return {stem: path for stem, path in overlays().items() if "run" not in load_config(path)}


def merge(files: Iterable[Path]) -> dict[str, Any]:
    """The configuration of several files, as MONAI merges them: the last wins, `a::b` is within `a`, `+a` extends.

    Raises:
        BundleError: where an id of a file fits nothing in what the files before it come to.
    """
    config: dict[str, Any] = {}
    for path in files:
        for key, value in copy.deepcopy(dict(load_config(path))).items():
            try:
                set_part(config, key, value)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                now = new_id(key.lstrip("+"))
                hint = f": it is {now} since version 2.1.0" if now else ""
                raise BundleError(
                    f"the configuration {path}: {key} fits nothing in the files before it{hint}"
                ) from error
    return config


def set_part(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of an id, which `+` extends, as MONAI does."""
    *outer, last = key.lstrip("+").replace("#", SEPARATOR).split(SEPARATOR)
    section: Any = config
    for word in outer:
        section = part_of(section, word)
    if key.startswith("+") and has_part(section, last):
        old = part_of(section, last)
        old.update(value) if isinstance(old, dict) else old.extend(value)
    else:
        section[int(last) if isinstance(section, list) else last] = value


def has_part(section: Any, word: str) -> bool:
    """Whether a map has an entry of this name; whether the name is a place of a list."""
    return (
        word in section
        if isinstance(section, dict)
        else isinstance(section, list) and word.isdigit() and int(word) < len(section)
    )


def part_of(section: Any, word: str) -> Any:
    """What stands in a map or a list under one word of an id."""
    return section[int(word) if isinstance(section, list) else word]


def references(value: Any) -> Iterator[str]:
    """The ids that a value of a configuration refers to."""
    if isinstance(value, str):
        yield from REFERENCE.findall(value.replace("#", SEPARATOR))
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from references(part)


def condition_flags(config: Mapping[str, Any]) -> list[str]:
    """Both flags of each condition, normalised and raw.

    Raises:
        BundleError: as `condition_entries`.
    """
    entries = condition_entries(config)
    return [flag for name, entry in entries.items() for flag in (name, str(entry.get("raw", name)))]


def condition_entries(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> the rest of its entry, of each condition.

    Raises:
        BundleError: if the configuration's `conditions` are no map, or have lost the `_target_` of the base's.
    """
    conditions = config["conditions"]
    if not isinstance(conditions, dict):
        raise BundleError("conditions must be a map of names to what is known of them: see docs/configuration.md")
    if "_target_" not in conditions:
        target = load_config(BASE)["conditions"]["_target_"]
        raise BundleError(
            "conditions has no _target_: +conditions adds to those of the base; a map in their place, if empty too, "
            f"begins with `_target_: {target}`"
        )
    return {name: entry for name, entry in conditions.items() if isinstance(entry, dict)}


def refuse_other_conditions(given: Iterable[str], config: Mapping[str, Any], written: str = "--{}") -> None:
    """Refuse flags or columns of the base's conditions that the configuration does not have.

    Args:
        given: names of flags, or of a table's columns.
        config: the merged configuration.
        written: how a name is written in the error.

    Raises:
        BundleError: naming the flag, and the conditions that there are.
    """
    known, entries = condition_flags(config), condition_entries(config)
    has = f"has the conditions {', '.join(entries)}" if entries else "has no conditions"
    for name in given:
        if name in condition_flags(load_config(BASE)) and name not in known:
            raise BundleError(f"{written.format(name)} has no effect here: the model {has}")


def used_ids(config: Mapping[str, Any], starts: Iterable[str] = STARTS) -> set[str]:
    """The ids that a run comes to: what `run` refers to, and what that refers to.

    The conditions' flags are among them where `conditions_table` is: what samples takes either.
    """
    used: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name in used:
            continue
        used.add(name)
        value: Any = config
        for word in name.split(SEPARATOR):
            value = part_of(value, word) if has_part(value, word) else value if value is not config else None
        waiting += references(value)
        waiting += condition_flags(config) if name == "conditions_table" else []
    return used
