# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Leases on parts of a work that any number of processes, of any machines, share by a folder alone.

A lease is a small file that its holder creates, which a file system lets one process do, and touches while it lives.
One that is not touched for a while is taken over. So is at once that of a process of this machine that is gone. No
locks of the file system are needed, and clocks need not agree: who waits sees by his own whether a file's time changes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from scripts.core.errors import BundleError
from scripts.core.files import make_folder, read_json, replacing

TOUCHES = 5
"""How often a lease is touched in the time after which it would be taken over."""


class Lease:
    """One part, held: it is touched until it is released, or was taken over.

    Args:
        path: of its file, which this process has just written.
        token: what tells this holder from others.
        seconds: after which it is taken over, if it is not touched.
    """

    def __init__(self, path: Path, token: str, seconds: float) -> None:
        self.path, self.token, self._pause = path, token, seconds / TOUCHES
        self._released = threading.Event()
        self._toucher = threading.Thread(target=self._touch, daemon=True)
        self._toucher.start()

    def holds(self) -> bool:
        """Whether nobody has taken it over."""
        return read_json(self.path).get("token") == self.token

    def release(self) -> None:
        """Let others take the part."""
        self._released.set()
        self._toucher.join()
        if self.holds():
            with suppress(OSError):
                self.path.unlink()

    def _touch(self) -> None:
        while not self._released.wait(self._pause):
            with suppress(OSError):  # of a disk that is away for a moment
                if self.holds():
                    os.utime(self.path)


class Claims:
    """The leases on the parts of one work.

    Args:
        folder: of their files; made with the first.
        seconds: after which a lease that is not touched is taken over.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._seen: dict[str, tuple[int, float]] = {}

    def take(self, name: str) -> Lease | None:
        """The lease on a part; None while another process holds it.

        Raises:
            BundleError: if the folder cannot be written.
        """
        path, token = make_folder(self.folder) / name, uuid.uuid4().hex
        owner = json.dumps({"machine": this_machine(), "process": os.getpid(), "token": token})
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(owner)
        except FileExistsError:
            if not self.is_stale(name):
                return None
            with replacing(path) as temporary:
                temporary.write_text(owner, encoding="utf-8")
            time.sleep(0.05)  # another who takes it over now writes before this reads: the last one has it
        except OSError as error:
            raise BundleError(f"cannot write {path}: {error.strerror or error}") from error
        lease = Lease(path, token, self.seconds)
        if lease.holds():
            return lease
        lease.release()
        return None

    def is_stale(self, name: str) -> bool:
        """Whether a part is free: its holder is gone, or has not touched it for so long while this process looked."""
        path = self.folder / name
        try:
            touched = path.stat().st_mtime_ns
        except OSError:
            return False  # released in this moment: the next look will see
        owner = read_json(path)
        if owner.get("machine") == this_machine() and not is_running(owner.get("process")):
            return True
        before, since = self._seen.get(name, (0, 0.0))
        if before != touched:
            self._seen[name] = touched, time.monotonic()
            return False
        return time.monotonic() - since > self.seconds


def this_machine() -> str:
    """What tells apart the places in which numbers of processes hold: machines, their starts, and containers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def is_running(process: object) -> bool:
    """Whether a process of this machine is there; True where that cannot be told."""
    if os.name != "posix" or not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
