# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where this bundle's own files are, whatever the working directory."""

from __future__ import annotations

from pathlib import Path

import scripts

PACKAGE = Path(scripts.__path__[0]).resolve()  # the folder of the Python package
ROOT = PACKAGE.parent  # of the bundle
CONFIGS = ROOT / "configs"
SHIPPED_MODELS = ROOT / "models"
INSTALLED = (ROOT / "__init__.py").is_file()
"""Whether the bundle lies in a package of Python's, where nothing is to be written."""
HERE = Path() if INSTALLED else ROOT  # where commands put what they make
MODELS = HERE / "models"  # what commands fetch
COMMAND = "brain-ldm"  # what an installed bundle is called by


def as_called(text: str) -> str:
    """A text with the command by which this bundle is called, in place of that of a clone."""
    return text.replace("python -m scripts", COMMAND) if INSTALLED else text


def shipped_models() -> str:
    """The folder of the models, templates and label maps that come with the bundle."""
    return str(SHIPPED_MODELS)
