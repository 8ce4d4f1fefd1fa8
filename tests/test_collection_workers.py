# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes that make one collection, of which some are killed and one hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from collecting import draw, flags, make
from conftest import RunHere
from processes import Command

from scripts.core.files import read_json

ROWS, KILLED = 18, 3


def holds_a_shard(process: int | None, folder: Path) -> bool:
    """Whether a process has begun to make a shard."""
    return any(read_json(path).get("process") == process for path in folder.glob("claims/shard-*"))


def wait_for(process: int | None, folder: Path, seconds: float = 240) -> bool:
    """Wait until a process has a shard, or all shards are done; whether it has one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds_a_shard(process, folder):
            return True
        if len(list(folder.glob("shards/*.json"))) == ROWS // 2:
            return False
        time.sleep(0.02)
    raise AssertionError("no shard was begun")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_workers_that_are_killed_or_hang_cost_no_row(run_here: RunHere, bundle_copy: Path, tmp_path: Path) -> None:
    quiet, folder = tmp_path / "quiet", tmp_path / "set"
    for one in (quiet, folder):
        draw(run_here, one, num_rows=ROWS, rows_per_shard=2)
    make(run_here, bundle_copy, quiet, labels=1)
    given = {"collection_dir": folder, "labels": 1, "lease_minutes": 0.05, "device": "cpu", **flags(bundle_copy)}
    words = ["-m", "scripts", "collection", "make", "--with", "tiny"]
    words += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    with ExitStack() as stack:
        hanging, steady = (stack.enter_context(Command(words)) for _ in range(2))
        assert wait_for(hanging.process.pid, folder)
        os.kill(hanging.process.pid or 0, signal.SIGSTOP)
        killed = 0
        for _ in range(KILLED):
            victim = stack.enter_context(Command(words))
            killed += wait_for(victim.process.pid, folder)
            victim.kill()
        assert killed, "a process was killed while it made a shard"
        done = steady.finish(timeout=300)
        assert done.returncode == 0, done.stderr
        os.kill(hanging.process.pid or 0, signal.SIGCONT)
        woken = hanging.finish(timeout=300)
        assert woken.returncode == 0, woken.stderr
    make(run_here, bundle_copy, folder, labels=1)  # what was left by one that was killed last
    shards = [{path.name: path.read_bytes() for path in sorted((one / "shards").iterdir())} for one in (folder, quiet)]
    assert shards[0].keys() == shards[1].keys() and shards[0] == shards[1]
    rows = [row for path in sorted(folder.glob("shards/*.json")) for row in json.loads(path.read_text())["rows"]]
    assert [row["participant_id"] for row in rows] == [f"sub-{index:06d}" for index in range(ROWS)]
