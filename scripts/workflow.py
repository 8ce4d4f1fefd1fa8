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
"""What a running expression may know of the configuration it stands in."""

from __future__ import annotations

import difflib
import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from monai.bundle import ConfigParser
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties

from scripts.errors import BundleError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SEPARATOR = "::"
REFERENCE = re.compile(r"[@%](\w+(?:::\w+)*)")
OWN_WORDS = {"initialize", "run", "finalize", "imports", ConfigParser.meta_key}


def current_config() -> dict[str, Any]:
    """The merged configuration, overrides included, of the workflow that is now being evaluated.

    MONAI gives its expressions no handle on the configuration they stand in, so the parser is looked up
    on the call stack. Flags whose names are not fixed (one or two for each condition) are read this way.

    Raises:
        RuntimeError: if no configuration is being evaluated.
    """
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ConfigParser):
            found = frame.f_locals["self"]
        frame = frame.f_back
    if found is None:
        raise RuntimeError("no MONAI configuration is being evaluated: call this from an expression of a config")
    return found.get()


def config_text() -> str:
    """The configuration that is running, overrides included, as JSON; `{}` outside of one."""
    try:
        return json.dumps(current_config(), default=str)
    except RuntimeError:
        return "{}"


def check_flags(conditions: Iterable[str] = ()) -> None:
    """Refuse an override whose name nothing declares or reads: MONAI takes `--gendr 1` in silence.

    Known are the ids of the files in `configs/`, the properties that MONAI defines, ids that something
    in the merged configuration refers to, and the flags of the conditions. The same holds for what stands in a
    section, such as `train::dataloader`. What a component takes, and the entries of a map that something reads as a
    whole, such as `samplers`, are for that component to refuse.

    Raises:
        BundleError: naming the unknown flag and its nearest known names.
    """
    config = current_config()
    declared, referred = _declared(), _referred(config)
    known = {_first(name) for name in declared | referred} | OWN_WORDS | set(conditions)
    for name in config:
        if name.lstrip("+") not in known:
            _refuse(name, {other: other for other in known})
    for name in _ids(config):
        if SEPARATOR in name and not (name in declared or _is_read(name, referred)):
            _refuse(name, {other: other for other in known} | _beside(name, declared))


def _refuse(name: str, known: Mapping[str, str]) -> NoReturn:
    """Raise with the names that are near, from a map of what may have been meant to how it is written."""
    near = difflib.get_close_matches(name.split(SEPARATOR)[-1], sorted(known), 2, 0.7)
    hint = f": did you mean --{' or --'.join(known[one] for one in near)}?" if near else ": see docs/configuration.md"
    raise BundleError(f"unknown flag --{name}{hint}")


def _declared() -> set[str]:
    files = [f for f in sorted(CONFIGS.iterdir()) if f.suffix in (".json", ".yaml") and f.stem != "metadata"]
    ids = {name for f in files for name in _ids(_load(f))}
    properties = (TrainProperties, InferProperties, MetaProperties)
    return ids | {str(p["id"]) for one in properties for p in one.values()}


@functools.cache
def _load(path: Path) -> dict[str, Any]:
    """By libyaml, where PyYAML has it: MONAI's way takes a second for all the files together, at each command."""
    text, loader = path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return json.loads(text) if path.suffix == ".json" else yaml.load(text, loader)


def _ids(config: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """The ids of a configuration, and those within its sections: maps that are no component."""
    for key, value in config.items():
        name = section + str(key).lstrip("+").replace("#", SEPARATOR)
        if str(key).startswith("_"):
            continue
        yield name
        if isinstance(value, Mapping) and "_target_" not in value:
            yield from _ids(value, name + SEPARATOR)


def _referred(config: Any) -> set[str]:
    if isinstance(config, dict):
        return set().union(*(_referred(value) for value in config.values()))
    if isinstance(config, (list, tuple)):
        return set().union(*(_referred(value) for value in config))
    return set(REFERENCE.findall(config.replace("#", SEPARATOR))) if isinstance(config, str) else set()


def _is_read(name: str, referred: Iterable[str]) -> bool:
    """Whether something refers to an id, to what is in it, or to a section around it."""
    return any(f"{one}::".startswith(f"{name}::") or f"{name}::".startswith(f"{one}::") for one in referred)


def _beside(name: str, declared: Iterable[str]) -> dict[str, str]:
    """The declared ids of a section that another id is in, by their last words."""
    section = name.rpartition(SEPARATOR)[0] + SEPARATOR
    return {one[len(section) :]: one for one in declared if one.startswith(section)}


def _first(name: str) -> str:
    return name.split(SEPARATOR)[0]
