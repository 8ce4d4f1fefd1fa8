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
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties

from scripts.errors import BundleError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
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


def check_flags(conditions: Iterable[str] = ()) -> None:
    """Refuse an override whose name nothing declares or reads: MONAI takes `--gendr 1` in silence.

    Known are the ids of the files in `configs/`, the properties that MONAI defines, ids that something
    in the merged configuration refers to, and the flags of the conditions.

    Raises:
        BundleError: naming the unknown flag and its nearest known names.
    """
    config = current_config()
    known = _declared() | _referred(config) | OWN_WORDS | set(conditions)
    for name in config:
        if name.lstrip("+") not in known:
            near = difflib.get_close_matches(name, sorted(known), 2, 0.7)
            hint = f": did you mean --{' or --'.join(near)}?" if near else ": see docs/configuration.md"
            raise BundleError(f"unknown flag --{name}{hint}")


def _declared() -> set[str]:
    files = [f for f in sorted(CONFIGS.iterdir()) if f.suffix in (".json", ".yaml") and f.stem != "metadata"]
    ids = {key.lstrip("+").split("::")[0].split("#")[0] for f in files for key in ConfigParser.load_config_file(f)}
    properties = {**TrainProperties, **InferProperties, **MetaProperties}
    return ids | {str(p["id"]).split("::")[0] for p in properties.values()}


def _referred(config: Any) -> set[str]:
    if isinstance(config, dict):
        return set().union(*(_referred(value) for value in config.values()))
    if isinstance(config, (list, tuple)):
        return set().union(*(_referred(value) for value in config))
    return set(re.findall(r"[@%](\w+)", config)) if isinstance(config, str) else set()
