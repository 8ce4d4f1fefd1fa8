# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where this bundle's own files are, whatever the working directory."""

from __future__ import annotations

from pathlib import Path

import scripts

PACKAGE = Path(scripts.__path__[0]).resolve()  # the folder of the Python package
ROOT = PACKAGE.parent  # of the bundle
CONFIGS = ROOT / "configs"
MODELS = ROOT / "models"  # what ships, and what commands fetch
