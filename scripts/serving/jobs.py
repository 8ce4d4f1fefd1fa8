# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the page has asked for: commands in a queue of bounded length, of which one runs at a time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.core.errors import BundleError
from scripts.serving.worker import Runner, StoppedError

MOST_WAITING = 24
KEPT = 50
"""How many jobs that have ended are remembered."""


class BusyError(BundleError):
    """There are as many jobs in the queue as it takes."""


@dataclass
class Job:
    """One command of the page.

    Attributes:
        kind: the verb, `sample` or `segment`.
        entry: of the gallery, which it fills.
        words: the command line behind `python -m scripts`.
        state: `waiting`, `running`, `done`, `failed` or `stopped`.
        error: the line that it ended in, if it failed.
        began, first, stepped: seconds of a clock at its beginning, its first step and its latest.
        seconds: that it took.
        steps: done, and of how many.
    """

    kind: str
    entry: str
    words: Sequence[str]
    number: int = 0
    state: str = "waiting"
    error: str = ""
    began: float = 0.0
    seconds: float = 0.0
    steps: tuple[int, int] = (0, 0)
    stepped: float = 0.0
    first: float = 0.0

    def about(self, rest: float | None = None) -> dict[str, Any]:
        """What the page shows of it.

        Args:
            rest: seconds that a job of its kind took after its last step, if that is known.
        """
        done, total = self.steps
        about = {name: getattr(self, name) for name in ("number", "kind", "entry", "state", "error")}
        running = self.state == "running"
        seconds = time.monotonic() - self.began if running else self.seconds
        left = None
        if running and 0 < done <= total and rest is not None:
            steps_left = (self.stepped - self.first) / max(1, done - 1) * (total - done)
            left = max(0.0, steps_left + rest - (time.monotonic() - self.stepped))
        return {**about, "step": done, "steps": total, "seconds": round(seconds, 1), "left": left and round(left, 1)}

    def note(self, steps: tuple[int, int]) -> None:
        """Take over how far it is."""
        if steps != self.steps:
            self.stepped = time.monotonic()
            self.first = self.stepped if steps[0] <= 1 else self.first
            self.steps = steps


class Jobs:
    """The queue.

    Args:
        runner: runs the commands.
        most_waiting: how many may wait.
    """

    def __init__(self, runner: Runner, most_waiting: int = MOST_WAITING) -> None:
        self.runner, self.most_waiting = runner, most_waiting
        self.waiting: deque[Job] = deque()
        self.ended: deque[Job] = deque(maxlen=KEPT)
        self.running: Job | None = None
        self._numbers = itertools.count(1)
        self._wake = asyncio.Event()
        self._after: dict[str, float] = {}

    def submit(self, job: Job) -> Job:
        """Put a job last; if its entry waits for the same already, that job.

        Raises:
            BusyError: if too many wait.
        """
        same = [other for other in self.unfinished() if (other.kind, other.entry) == (job.kind, job.entry)]
        if same:
            return same[0]
        self.check_room(1)
        job.number = next(self._numbers)
        self.waiting.append(job)
        self._wake.set()
        return job

    def check_room(self, count: int) -> None:
        """Whether so many more may wait.

        Raises:
            BusyError: if not.
        """
        if len(self.waiting) + count > self.most_waiting:
            raise BusyError(f"{len(self.waiting)} jobs wait already, and no more are taken: stop some, or wait")

    def unfinished(self) -> list[Job]:
        """What runs, and what waits."""
        return [*([self.running] if self.running else []), *self.waiting]

    def stop(self, number: int) -> bool:
        """End a job, or take it out of the queue; whether there is one of that number that has not ended."""
        job = next((job for job in self.unfinished() if job.number == number), None)
        if job is None:
            return False
        if job is self.running:
            self.runner.stop()
        else:
            self.waiting.remove(job)
            self._end(job, "stopped")
        return True

    def about(self) -> list[dict[str, Any]]:
        """All that are remembered, the newest last."""
        if self.running is not None:
            self.running.note(self.runner.progress())
        jobs = sorted([*self.ended, *self.unfinished()], key=lambda job: job.number)
        return [job.about(self._after.get(job.kind)) for job in jobs]

    def _end(self, job: Job, state: str, error: str = "") -> None:
        """Where it has not made its entry, what waits for that entry ends with it."""
        job.state, job.error = state, error
        self.ended.append(job)
        for other in [one for one in self.waiting if one.entry == job.entry] if state != "done" else []:
            self.waiting.remove(other)
            self._end(other, "stopped")

    async def work(self) -> None:
        """Run what is submitted, for ever."""
        while True:
            while self.waiting:
                self.running = job = self.waiting.popleft()
                await self._run(job)
            self._wake.clear()
            await self._wake.wait()

    async def _run(self, job: Job) -> None:
        job.state, job.began = "running", time.monotonic()
        watch = asyncio.create_task(self._watch(job))
        state, said = "done", ""
        try:
            await self.runner.run(job.words)
        except StoppedError:
            state = "stopped"
        except BundleError as error:
            state, said = "failed", str(error)
        finally:
            watch.cancel()
            job.seconds = time.monotonic() - job.began
            self.running = None
        if state == "done" and job.steps[1]:
            self._after[job.kind] = max(0.0, time.monotonic() - job.stepped)
        self._end(job, state, said)

    async def _watch(self, job: Job) -> None:
        while True:
            job.note(self.runner.progress())
            await asyncio.sleep(0.1)
