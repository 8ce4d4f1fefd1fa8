# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The process beside the server in which commands run, one at a time, as a shell would run them."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from scripts.compute.bars import listening
from scripts.compute.ownership import release_all
from scripts.compute.pool import begin_worker, how_it_ended
from scripts.core.command_line import main
from scripts.core.errors import BundleError, explain
from scripts.core.paths import PACKAGE

LIBRARIES = ("monai.bundle", "monai.engines", "monai.networks.nets", "scripts.sampling.saving")
"""What a command imports first, and a new process therefore imports before it is asked to run one."""

_shared: dict[str, Any] = {}
"""In the worker: where it puts its progress."""


class StoppedError(BundleError):
    """A command was ended before its time, as asked."""


class Runner(Protocol):
    """What runs commands for the page."""

    def progress(self) -> tuple[int, int]:
        """Steps done, and of how many, of the command that runs; (0, 0) where it has not said yet."""

    async def run(self, words: Sequence[str]) -> None:
        """Run one command to its end.

        Raises:
            StoppedError: if `stop` ended it.
            BundleError: with the one line that the command ended in, or how its process died.
        """

    def stop(self) -> None:
        """End the command that runs, at once."""

    def close(self) -> None:
        """End all of it."""


class WorkerProcess:
    """A `Runner` whose commands run in one process: it stays, so that only the first pays for the imports.

    A command that is stopped takes the process with it, and another starts; so does one that the system ends for want
    of memory, which leaves the server as it was.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._steps = context.RawArray("q", 2)
        self._pool = ProcessPool(1, initializer=_begin, initargs=(self._steps,), context=context)
        self._pool.schedule(_nothing)  # so that the process starts now
        self._running: Future[str | None] | None = None

    def progress(self) -> tuple[int, int]:
        """See `Runner`."""
        return self._steps[0], self._steps[1]

    async def run(self, words: Sequence[str]) -> None:
        """See `Runner`."""
        self._steps[:] = [0, 0]
        self._running = running = self._pool.schedule(run_command, (list(words),))
        try:
            said = await asyncio.wrap_future(running)
        except asyncio.CancelledError as error:
            if not running.cancelled():  # it is the server that ends
                raise
            raise StoppedError("stopped") from error
        except ProcessExpired as error:
            raise BundleError(f"the process of the command died: {how_it_ended(error.exitcode)}") from error
        finally:
            self._running = None
        if said is not None:
            raise BundleError(said)

    def stop(self) -> None:
        """See `Runner`."""
        if self._running is not None:
            self._running.cancel()

    def close(self) -> None:
        """See `Runner`."""
        self._pool.stop()
        self._pool.join()


def _begin(steps: Any) -> None:
    begin_worker()
    _shared["steps"] = steps
    for name in LIBRARIES:
        importlib.import_module(name)


def _nothing() -> None:
    return None


def _note(done: int, total: int) -> None:
    if "steps" in _shared:
        _shared["steps"][:] = [done, total]


def run_command(words: Sequence[str]) -> str | None:
    """Run `python -m scripts WORDS` in this process.

    Returns:
        The line of the error that it ended in, None if it did not.
    """
    sys.argv = [str(PACKAGE / "__main__.py"), *words]  # by which the options' types are looked up as on a shell's line
    try:
        with listening(_note):
            code = main(words)
    except BaseException as error:  # of any kind: the process is there for the next command
        return explain(error) or f"{type(error).__name__}: {error}"
    finally:
        release_all()
    return None if code == 0 else f"the command was not understood: {' '.join(words)}"
