# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Flags of a command line: how they are read, and which of them a list of configurations has no use for."""

from __future__ import annotations

import copy
import difflib
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts.core.errors import BundleError
from scripts.core.old_names import new_id
from scripts.core.verbs import (
    BASE,
    IDS_OF_STARTS,
    SEPARATOR,
    STARTS,
    condition_flags,
    has_part,
    load_config,
    merge,
    part_of,
    references,
    refuse_other_conditions,
    set_part,
    used_ids,
    verbs,
)

FLAG = re.compile(r"--?([A-Za-z_+][^=]*)(?:=(.*))?", re.DOTALL)
HELP = ("help", "h")
FOR_MONAI = {
    *STARTS,
    *IDS_OF_STARTS,
    *("config_file", "args_file", "meta_file", "logging_file", "tracking", "workflow_type", "properties_path"),
    *("bundle_root", "device", "dataset_dir", "output_dir", "imports", "_meta_"),
    *("tracking_uri", "experiment_name", "run_name", "save_execute_config"),
}
"""What MONAI itself takes or reads, whatever a configuration refers to."""
WORKFLOW_TYPES = ("train", "training", "infer", "inference", "eval", "evaluation")
"""What MONAI takes for --workflow_type."""


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


def refuse_flags(flags: Mapping[str, str | None], files: Sequence[Path], options: Collection[str] = ()) -> None:
    """Refuse flags that a list of configurations has no use for.

    Args:
        flags: as `read_flags` gives them.
        files: those that are merged.
        options: ids that are documented as options, whose values are looked at elsewhere.

    Raises:
        BundleError: for a name that there is not, in a section as well, that is another verb's option or that of an
            earlier version; for a section that is given no section, and for a value that does nothing, refers to
            nothing, or that MONAI does not take.
    """
    config = copy.deepcopy(merge(files))
    workflow_type = flags.get("workflow_type")
    if workflow_type is not None and workflow_type.lower() not in WORKFLOW_TYPES:
        raise BundleError(f"--workflow_type must be one of {', '.join(WORKFLOW_TYPES)}, got '{workflow_type}'")
    for name in flags:
        if not _stands(name, config):
            refuse_old_id(name)
    refuse_other_conditions(flags, config)
    refuse_foreign_flags(flags, files, config)
    _refuse_unknown_flags(flags, config)
    for name, text in flags.items():
        _override(config, name, text, options)
    for name, text in flags.items():
        _refuse_loose_reference(name, text or "", config)


def refuse_old_id(name: str) -> None:
    """Refuse an id of version 2.0.0 that has moved.

    Raises:
        BundleError: naming the id that took its place.
    """
    if now := new_id(name):
        raise BundleError(f"--{name} is of version 2.0.0: it is --{now} now")


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
            plain = [one for one in known if not isinstance(config.get(one), (dict, list))]
            hint = near_matches(name, plain, "--")
            raise BundleError(f"--{name} has no effect here{hint or ':'} it is an option of `{'`, `'.join(others)}`")


@functools.cache
def used_by(verb: str) -> frozenset[str]:
    """The ids that a verb comes to."""
    return frozenset(used_ids(merge(verbs()[verb])))


def is_read(name: str, referred: Iterable[str]) -> bool:
    """Whether something refers to an id, to what is in it, or to a section around it."""
    return any(f"{one}::".startswith(f"{name}::") or f"{name}::".startswith(f"{one}::") for one in referred)


def refuse_unknown_part(name: str, parts: Collection[str], others: Iterable[str] = ()) -> None:
    """Refuse a name within a section.

    Args:
        name: with what it is within.
        parts: what the section has.
        others: ids that may have been meant instead.

    Raises:
        BundleError: naming what is near, or the parts.
    """
    outer, _, last = name.rpartition(SEPARATOR)
    known = {**{one: one for one in others}, **{one: f"{outer}{SEPARATOR}{one}" for one in parts}}
    there = f": {outer} has {', '.join(list(parts)[:8]) or 'no parts'}" if outer else ""
    raise BundleError(f"unknown flag --{name}{near_matches(last, known, '--', known) or there}")


def _refuse_unknown_flags(flags: Mapping[str, str | None], config: Mapping[str, Any]) -> None:
    own = used_ids(config) | FOR_MONAI
    known = own | set(config) | set(condition_flags(config)) | set(references(list(flags.values())))
    first = {one.split(SEPARATOR)[0] for one in known}
    for name in flags:
        if name.split(SEPARATOR)[0] not in first:
            hint = near_matches(name, own, "--") or near_matches(name, known, "--") or ": --help lists them"
            raise BundleError(f"unknown flag --{name}{hint}")


def _override(config: dict[str, Any], name: str, text: str | None, options: Collection[str]) -> None:
    """Set what a flag says, as MONAI does, where that changes anything."""
    value, words, section = _value(text), name.split(SEPARATOR), config
    for depth, word in enumerate(words):
        if not has_part(section, word):
            if depth < len(words) - 1 or not _may_be_new(section, name, value, config):
                refuse_unknown_part(
                    SEPARATOR.join(words[: max(depth + 1, 2)]), _parts(section) if depth else (), config
                )
            break
        section = part_of(section, word)
    else:
        if isinstance(section, dict) and _is_plain(value) and name not in options:
            part = next((key for key in section if not key.startswith("_")), "...")
            raise BundleError(
                f"--{name} {text}: that is a section of the configuration: give a map, or a part of it, such as "
                f"--{name}{SEPARATOR}{part}"
            )
    if name in STARTS and _is_plain(value):
        raise BundleError(f"--{name} {text} does nothing: it takes expressions, such as \"['$@dataset']\"")
    set_part(config, name, value)


def _stands(name: str, config: Any) -> bool:
    """Whether a configuration has an id."""
    for word in name.split(SEPARATOR):
        if not has_part(config, word):
            return False
        config = part_of(config, word)
    return True


def _parts(section: Any) -> list[str]:
    """The names of a map's entries, the numbers of a list's; none of anything else."""
    if isinstance(section, list):
        return [str(number) for number in range(len(section))]
    return [key for key in section if not key.startswith("_")] if isinstance(section, dict) else []


def _value(text: str | None) -> Any:
    """A flag's value, nearly as `fire` reads it: maps, lists and numbers; text where it is none of them."""
    try:
        return True if text is None else None if text == "None" else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_plain(value: Any) -> bool:
    """Whether a value is neither a structure, nor absent, nor refers to the configuration."""
    return not isinstance(value, (dict, list)) and not str(value).startswith(("$", "@", "%")) and value is not None


def _may_be_new(section: Any, name: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a map may get an entry of this name: a map of maps gets no plain one that nothing reads."""
    if section is config or not isinstance(section, dict) or not _is_plain(value):
        return isinstance(section, dict)
    maps = [isinstance(entry, dict) for key, entry in section.items() if not key.startswith("_")]
    of_maps = all(maps) if "_target_" in section else any(maps)  # a component knows what else it takes
    return not maps or not of_maps or name in set(references(config))


def _refuse_loose_reference(name: str, text: str, config: Mapping[str, Any]) -> None:
    """Refuse a value that refers to an id that there is not; what is in a file, MONAI looks up."""
    if text.startswith(("$", "@", "%")) and not re.search(r"\.(json|ya?ml)\b", text):
        for one in references(text):
            if one.split(SEPARATOR)[0] not in config:
                raise BundleError(f"--{name} {text}: the configuration has no {one}")
