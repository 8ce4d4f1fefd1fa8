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
"""Work on many items in several processes, of which each may die without the others noticing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from scripts.errors import BundleError

T = TypeVar("T")
R = TypeVar("R")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def results(
    task: Callable[[T], R], items: Sequence[T], num_workers: int, died: Callable[[T, str], R]
) -> Iterator[tuple[int, R]]:
    """What a task makes of each item, as it is finished, with the item's position.

    Each process works on one item at a time, in one thread, and ends when this one does. Where one dies, its item
    fails alone and another process takes its place.

    Args:
        task: must not raise; with processes, it, its items and results are pickled.
        items: what to work on.
        num_workers: processes besides this one; 0 works in this one.
        died: what stands for the result of an item whose process died, from the item and words on how it died.

    Raises:
        BundleError: if a process cannot start.
    """
    if num_workers == 0:
        yield from ((number, task(item)) for number, item in enumerate(items))
        return
    pool = _Pool(task, items, died)
    try:
        yield from pool.run(min(num_workers, len(items)))
    finally:
        pool.stop()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    item: int | None = None


class _Pool(Generic[T, R]):
    def __init__(self, task: Callable[[T], R], items: Sequence[T], died: Callable[[T, str], R]) -> None:
        self.task, self.items, self.died = task, items, died
        self.next = 0
        self.workers: list[_Worker] = []

    def run(self, number: int) -> Iterator[tuple[int, R]]:
        for _ in range(number):
            self._start()
        while self.workers:
            ready = wait([worker.connection for worker in self.workers])
            for worker in [w for w in self.workers if w.connection in ready]:
                yield from self._heard(worker)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the threads of the libraries loaded here
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, self.task), daemon=True)
        with _one_thread():
            process.start()
        there.close()
        self.workers.append(_Worker(process, here))

    def _heard(self, worker: _Worker) -> Iterator[tuple[int, R]]:
        try:
            result = worker.connection.recv()
        except (EOFError, ConnectionError):
            yield from self._lost(worker)
            return
        if worker.item is not None:
            yield worker.item, result
        self._hand_out(worker)

    def _hand_out(self, worker: _Worker) -> None:
        """The next item, or the end; the first message of a process only says that it has started."""
        if self.next == len(self.items):
            self.workers.remove(worker)
            worker.connection.close()
            worker.process.join()
            return
        worker.item, self.next = self.next, self.next + 1
        try:
            worker.connection.send(self.items[worker.item])
        except ConnectionError:
            pass  # it has died: the next look at its connection finds out

    def _lost(self, worker: _Worker) -> Iterator[tuple[int, R]]:
        worker.process.join()
        self.workers.remove(worker)
        worker.connection.close()
        how = _how(worker.process.exitcode)
        if worker.item is None:
            raise BundleError(f"a process of --num_workers could not start: it ended with {how}")
        if self.next < len(self.items):
            self._start()
        yield worker.item, self.died(self.items[worker.item], how)

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        memory = " (is there too little memory for so many processes?)" if -code == signal.SIGKILL else ""
        return f"signal {signal.Signals(-code).name}{memory}"
    return f"exit code {code}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """While processes start: what they inherit makes their libraries use one thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _end_with_parent() -> None:
    """So that what a killed command leaves does not write beside the same command, run again at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(connection: Connection, task: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(task(item))
