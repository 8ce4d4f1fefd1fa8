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
"""What the commands of the benchmarks have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from monai.bundle import ConfigParser

from scripts.atomic import write_json
from scripts.errors import BundleError
from scripts.workflow import CONFIGS


def configuration(files: Sequence[str]) -> ConfigParser:
    """The bundle's configuration of these files of `configs/`."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / file) for file in files])
    return config


def report(measure: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], json: str | None) -> None:
    """Measure, print what was found, and write it to a file if one is named; an error ends in one line."""
    try:
        found = measure()
        show(found)
        if json:
            write_json(json, found)
    except BundleError as error:
        sys.exit(f"error: {error}")
