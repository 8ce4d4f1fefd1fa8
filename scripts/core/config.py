# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a running expression may know of the configuration it stands in."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from monai.bundle import ConfigParser
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties

from scripts.core.command_help import describe_verb, documented_options
from scripts.core.errors import BundleError, is_bundle_command, is_monai_command
from scripts.core.flags import HELP, is_read, near_matches, read_flags, refuse_flags, refuse_old_id, with_args_file
from scripts.core.option_types import OPTIONS, SECTIONS, as_typed, check_option, check_sizes, type_of
from scripts.core.options import is_absent
from scripts.core.paths import CONFIGS
from scripts.core.quiet import log_above_bars
from scripts.core.verbs import (
    SAMPLE,
    SEPARATOR,
    condition_flags,
    load_config,
    merge,
    references,
    refuse_other_conditions,
    verbs,
)

OWN_WORDS = {"initialize", "run", "finalize", "imports", ConfigParser.meta_key}


def current_config() -> dict[str, Any]:
    """The merged configuration, overrides included, of the workflow that is now being evaluated.

    MONAI gives its expressions no handle on the configuration they stand in, so the parser is looked up
    on the call stack. Flags whose names are not fixed (one or two for each condition) are read this way.

    Raises:
        RuntimeError: if no configuration is being evaluated.
    """
    return _parser().get()


def build(name: str) -> Any:
    """A part of the configuration that is now being evaluated, built when it is asked for: a reference would be sooner.

    Raises:
        RuntimeError: if no configuration is being evaluated.
    """
    return _parser().ref_resolver.get_resolved_content(name)


def choose(name: str, entry: str, flag: str) -> Any:
    """Build one entry of a map of the configuration that is now being evaluated, and none of the others.

    Args:
        name: its key.
        entry: where an entry of any name stands, such as `@families::{name}`. MONAI takes it for text, and builds
            nothing; but what looks for the flags that a command has a use for sees a reference to the whole map.
        flag: that the name was given by.

    Raises:
        BundleError: for a name that is not in the map, with those that are.
        RuntimeError: if no configuration is being evaluated.
    """
    entry_of(name, entry, flag)
    return build(entry.strip("@").format(name=name))


def entry_of(name: str, entry: str, flag: str) -> Any:
    """What `choose` builds, as the configuration has it; arguments and errors as there."""
    entries: Mapping[str, Any] = current_config()[entry.strip("@").split(SEPARATOR)[0]]
    if name not in entries:
        near = difflib.get_close_matches(str(name), entries, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise BundleError(f"--{flag} must be one of {', '.join(entries)}, got '{name}'{hint}")
    return entries[name]


def _parser() -> ConfigParser:
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ConfigParser):
            found = frame.f_locals["self"]
        frame = frame.f_back
    if found is None:
        raise RuntimeError("no MONAI configuration is being evaluated: call this from an expression of a config")
    return found


def config_text() -> str:
    """The configuration that is running, overrides included, as JSON; `{}` outside of one."""
    try:
        return json.dumps(current_config(), default=str)
    except RuntimeError:
        return "{}"


def is_plain(value: Any) -> bool:
    """Whether an entry of a configuration is a number, a truth value or text, and neither a structure nor computed."""
    return isinstance(value, (bool, int, float, str)) and not str(value).startswith(("$", "@", "%"))


def check_flags(conditions: Any = None) -> None:
    """Refuse an override whose name nothing declares or reads: MONAI takes `--gendr 1` in silence.

    Known are the ids of the files in `configs/`, the properties that MONAI defines, ids that something
    in the merged configuration refers to, and the flags of the conditions. The same holds for what stands in a
    section, such as `train::dataloader`. What a component takes, and the entries of a map that something reads as a
    whole, such as `samplers`, are for that component to refuse. On MONAI's command line, a flag that only other
    configurations have a use for is refused as well; `python -m scripts` has done that before.

    Then values are compared with the table of types and ranges, `scripts.core.option_types`. Paths and words of the
    command line are taken as they were typed, and `null` becomes None.

    Args:
        conditions: what configurations of earlier versions give, and nothing needs.

    Raises:
        BundleError: naming the unknown flag and its nearest known names, or where a flag belongs; for the flag of a
            condition that the configuration does not have, and for `conditions` that are no map; for a
            value that is none of what its option may be.
    """
    log_above_bars()
    if is_monai_command():
        _check_command()
    config = current_config()
    declared, referred = _declared(), set(references(config))
    refuse_other_conditions(config, config)
    known = {_first(name) for name in declared | referred} | OWN_WORDS | set(condition_flags(config))
    for name in config:
        if name.lstrip("+") not in known:
            _refuse(name, {other: other for other in known})
    for name in _ids(config):
        if SEPARATOR in name and not (name in declared or is_read(name, referred)):
            _refuse(name, {other: other for other in known} | _beside(name, declared))
    _check_values()


def _check_values() -> None:
    """Compare the values of the running configuration with the table of options, and put the words as typed in."""
    parser, defaults = _parser(), _defaults()
    if is_bundle_command():
        stated = set(condition_flags(parser.config))
        for name, text in read_flags(sys.argv[1:]).items():
            typed = None if text is None or name not in parser.config else as_typed(name, text, name in stated)
            if typed is not None and typed != parser.config[name]:
                _put(parser, name, typed)
    for name, value in list(_values(parser.config)):
        section = _first(name)
        if section in SECTIONS and SEPARATOR in name and type_of(name) is None and not isinstance(value, Mapping):
            _refuse(name, _beside(name, {*defaults, *OPTIONS}))
        check_option(name, value, defaults.get(name))
        known = OPTIONS.get(name)
        if known is not None and known.optional and isinstance(value, str) and is_absent(value):
            _put(parser, name, None)
    check_sizes(parser.config)


def _put(parser: ConfigParser, name: str, value: Any) -> None:
    """Another value for a plain top-level id that nothing has been built from yet."""
    parser.config[name] = value
    item = parser.ref_resolver.items.get(name)
    if item is not None:
        item.update_config(value)


def _values(config: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """The ids of a configuration with their values, those within maps and components too."""
    for key, value in config.items():
        if not str(key).startswith("_"):
            name = f"{section}{key}"
            yield name, value
            if isinstance(value, Mapping):
                yield from _values(value, name + SEPARATOR)


@functools.cache
def _defaults() -> dict[str, Any]:
    """The plain values that the files in `configs/` give to ids, by id."""
    files = [f for f in sorted(CONFIGS.iterdir()) if f.suffix in (".json", ".yaml") and f.stem != "metadata"]
    found = [(name, value) for f in files for name, value in _values(load_config(f))]
    return {name.lstrip("+"): value for name, value in found if not isinstance(value, Mapping)}


def _check_command() -> None:
    """Refuse flags of MONAI's command line that have no use, as `python -m scripts` does; `--help` is answered."""
    flags = with_args_file(read_flags(sys.argv[1:]))
    files = _files_of(flags.pop("config_file", None))
    if any(flags.pop(name, "") is None for name in HELP):
        print(describe_verb(_verb_of(files), files), end="")
        sys.exit()
    if "conditions" in merge(files):  # not where a path is written in some way that is not understood here
        refuse_flags(flags, files, documented_options(files))


def _verb_of(files: Sequence[Path]) -> str:
    """The verb that a list of configurations makes."""
    stems = {path.stem for path in files}
    return next((verb for verb, own in verbs().items() if verb != SAMPLE and own[-1].stem in stems), SAMPLE)


def _files_of(text: str | None) -> list[Path]:
    """The files of a `--config_file`: one, several with commas, or a list as Python writes it."""
    names = (text or "").strip("[]() ").split(",")
    return [path for path in (Path(name.strip(" '\"")) for name in names) if path.is_file()]


def _refuse(name: str, known: Mapping[str, str]) -> NoReturn:
    """Raise with the names that are near, from a map of what may have been meant to how it is written."""
    refuse_old_id(name)
    hint = near_matches(name.split(SEPARATOR)[-1], known, "--", known) or ": see docs/configuration.md"
    raise BundleError(f"unknown flag --{name}{hint}")


def _declared() -> set[str]:
    files = [f for f in sorted(CONFIGS.iterdir()) if f.suffix in (".json", ".yaml") and f.stem != "metadata"]
    ids = {name for f in files for name in _ids(load_config(f))}
    properties = (TrainProperties, InferProperties, MetaProperties)
    return ids | {str(p["id"]) for one in properties for p in one.values()}


def _ids(config: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """The ids of a configuration, and those within its sections: maps that are no component."""
    for key, value in config.items():
        name = section + str(key).lstrip("+").replace("#", SEPARATOR)
        if str(key).startswith("_"):
            continue
        yield name
        if isinstance(value, Mapping) and "_target_" not in value:
            yield from _ids(value, name + SEPARATOR)


def _beside(name: str, declared: Iterable[str]) -> dict[str, str]:
    """The declared ids of a section that another id is in, by their last words."""
    section = name.rpartition(SEPARATOR)[0] + SEPARATOR
    return {one[len(section) :]: one for one in declared if one.startswith(section)}


def _first(name: str) -> str:
    return name.split(SEPARATOR)[0]
