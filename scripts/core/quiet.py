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
"""Which warnings of other packages a command shows."""

from __future__ import annotations

import sys
import warnings

from scripts.core.errors import is_bundle_command

OF_NO_USE = (
    ("parsing config_file", UserWarning),  # MONAI, at every start: whoever writes a configuration may run code
    ("This DataLoader will create", UserWarning),  # PyTorch, where --num_workers exceeds the cores
    (r"(?!scripts\b)", FutureWarning),  # of the developers of packages among each other
)
"""Beginning of the message as a pattern, and category."""


def hide_foreign_warnings() -> None:
    """In a process of the command line, hide what no user can act on; Python's `-W` and PYTHONWARNINGS win over it."""
    if is_bundle_command() and not sys.warnoptions:
        for message, category in OF_NO_USE:
            warnings.filterwarnings("ignore", message, category)
