# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the commands of the benchmarks have in common."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.core.errors import BundleError
from scripts.core.files import write_json
from scripts.core.paths import CONFIGS, ROOT
from scripts.core.programs import errors_in_one_line

POLL_SECONDS = 0.2
GIB = 2**30


def configuration(files: Sequence[str]) -> ConfigParser:
    """The bundle's configuration of these files of `configs/`."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / file) for file in files])
    return config


def report(measure: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], json: str | None) -> None:
    """Measure, print what was found, and write it to a file if one is named; an error ends in one line."""
    with errors_in_one_line():
        found = measure()
        show(found)
        if json:
            write_json(json, found)


def bundle_command(files: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """`python -m monai.bundle run` with these files of `configs/` and flags."""
    paths = str([str(CONFIGS / name) for name in files])
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", paths, *given]


def run(command: Sequence[str], output: Path, kill_when: Any = None) -> dict[str, Any]:
    """Run a command to its end, or kill it with SIGKILL when something is true.

    Args:
        command: the words of it.
        output: what it says goes into a file of this name that ends in `.log`.
        kill_when: is called now and then.

    Returns:
        Seconds of the clock and of the CPU, and peak memory in GiB: what the system counts as resident.

    Raises:
        BundleError: if the command fails, or ends before it was to be killed.
    """
    start = time.perf_counter()
    with open(output.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while kill_when is not None and process.returncode is None:
            time.sleep(POLL_SECONDS)
            if kill_when():
                process.kill()
                break
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wanted = 0 if kill_when is None else -9
    if process.returncode != wanted:
        raise BundleError(f"the command ended with {process.returncode}, not {wanted}: {_last_line(Path(log.name))}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB, 2),
    }


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"see {log}")
