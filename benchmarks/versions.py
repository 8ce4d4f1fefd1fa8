# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a machine computes with: its GPU, versions, and what it does at best.

python -m benchmarks.versions --device cuda --json versions.json
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

from benchmarks.command import report
from benchmarks.measuring import machine
from benchmarks.sampling import measured_ceilings
from scripts.compute.devices import compute_device


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", help="file to write to")
    options = parser.parse_args(arguments)

    def found() -> dict[str, object]:
        device = compute_device(options.device)
        python = {"python": platform.python_version(), "cores": os.cpu_count()}
        return {**machine(device), **python, **measured_ceilings(device)}

    report(found, print, options.json)


if __name__ == "__main__":
    main()
