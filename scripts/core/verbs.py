# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The configurations read as text, without PyTorch: which verbs and overlays there are, and which flags a verb uses."""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts.core.errors import BundleError
from scripts.core.paths import CONFIGS

BASE = CONFIGS / "inference.json"
SAMPLE = "sample"
SEPARATOR = "::"
REFERENCE = re.compile(r"[@%](\w+(?:::\w+)*)")
FLAG = re.compile(r"--?([A-Za-z_+][^=]*)(?:=(.*))?", re.DOTALL)
STARTS = ("run", "initialize", "finalize")
IDS_OF_STARTS = ("run_id", "init_id", "final_id")
FOR_MONAI = {
    *STARTS,
    *IDS_OF_STARTS,
    *("config_file", "args_file", "meta_file", "logging_file", "tracking", "workflow_type", "properties_path"),
    *("bundle_root", "device", "dataset_dir", "output_dir", "imports", "_meta_"),
    *("tracking_uri", "experiment_name", "run_name", "save_execute_config"),
}
"""What MONAI itself takes or reads, whatever a configuration refers to."""
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
                _set(config, key, value)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise BundleError(f"the configuration {path}: {key} fits nothing in the files before it") from error
    return config


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.lstrip("+").replace("#", SEPARATOR).split(SEPARATOR)
    section: Any = config
    for word in outer:
        section = _inside(section, word)
    if key.startswith("+") and _has(section, last):
        old = _inside(section, last)
        old.update(value) if isinstance(old, dict) else old.extend(value)
    else:
        section[int(last) if isinstance(section, list) else last] = value


def _has(section: Any, word: str) -> bool:
    return word in section if isinstance(section, dict) else isinstance(section, list) and word.isdigit()


def _inside(section: Any, word: str) -> Any:
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
            value = _inside(value, word) if _has(value, word) else value if value is not config else None
        waiting += references(value)
        waiting += condition_flags(config) if name == "conditions_table" else []
    return used


def is_read(name: str, referred: Iterable[str]) -> bool:
    """Whether something refers to an id, to what is in it, or to a section around it."""
    return any(f"{one}::".startswith(f"{name}::") or f"{name}::".startswith(f"{one}::") for one in referred)


def read_flags(arguments: Sequence[str]) -> dict[str, str | None]:
    """Name -> text of the flags on a command line, as `fire` reads them: `--a-b=1`, `--a_b 1`, `-a_b 1` are one."""
    flags: dict[str, str | None] = {}
    for token, following in zip(arguments, [*arguments[1:], "--end"]):
        if found := FLAG.fullmatch(token):
            value = found[2] if found[2] is not None else None if FLAG.fullmatch(following) else following
            flags[found[1].replace("-", "_").lstrip("+").replace("#", SEPARATOR)] = value
    return flags


def with_args_file(flags: Mapping[str, str | None]) -> dict[str, str | None]:
    """Flags, and those in the file that `--args_file` names."""
    path = Path(flags.get("args_file") or "")
    return {**{key: str(value) for key, value in load_config(path).items()}, **flags} if path.is_file() else {**flags}


def near_matches(name: str, known: Collection[str], mark: str = "", written: Mapping[str, str] | None = None) -> str:
    """`: did you mean a or b?` with what is near among the known names; empty if nothing is.

    Args:
        name: what was given.
        known: what may have been meant.
        mark: what a name is written behind, such as `--`.
        written: known name -> how it is written, if not as itself.
    """
    near = difflib.get_close_matches(name, sorted(known), 2, 0.7)
    return f": did you mean {' or '.join(mark + (written or {}).get(one, one) for one in near)}?" if near else ""


def refuse_foreign_flags(flags: Mapping[str, str | None], files: Iterable[Path], config: Mapping[str, Any]) -> None:
    """Refuse flags that only other verbs have a use for.

    Args:
        flags: as `read_flags` gives them.
        files: those that were merged; an id that stands in a verb's own file is known as its option.
        config: the merged configuration, with or without the flags.

    Raises:
        BundleError: naming the verbs that the flag belongs to.
    """
    known = used_ids(config, [flags.get(one) or start for one, start in zip(IDS_OF_STARTS, STARTS)]) | FOR_MONAI
    own = [load_config(path) for path in files if path.name != BASE.name]
    known |= {key.lstrip("+") for content in own if "run" in content for key in content}
    for name in flags:
        if not is_read(name, known) and (others := [verb for verb in verbs() if is_read(name, used_by(verb))]):
            raise BundleError(f"--{name} has no effect here: it is an option of `{'`, `'.join(others)}`")


@functools.cache
def used_by(verb: str) -> frozenset[str]:
    """The ids that a verb comes to."""
    return frozenset(used_ids(merge(verbs()[verb])))
