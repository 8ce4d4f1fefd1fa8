# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`brain-ldm VERB`, or `python -m brain_ldm VERB`: what `python -m scripts VERB` is in a clone, from any folder."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run the command line of the bundle that this package is, or lies in."""
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "scripts").is_dir() else here.parent))
    from scripts.core.command_line import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
