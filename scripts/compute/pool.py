# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Work on many items in several processes, of which each may die without the others noticing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from scripts.core.errors import BundleError

KILLED = 9  # SIGKILL, which Windows has not
TRIES = 3
T = TypeVar("T")
R = TypeVar("R")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def results(
    task: Callable[[T], R], items: Sequence[T], num_workers: int, died: Callable[[T, str], R]
) -> Iterator[tuple[int, R]]:
    """What a task makes of each item, as it is finished, with the item's position.

    Each process works on one item at a time, in one thread, and ends when this one does. Where one dies, another takes
    its place and its item is tried once more; where that dies too, the item fails alone. Where no process starts, that
    is tried again as well.

    Args:
        task: must not raise; with processes, it, its items and results are pickled.
        items: what to work on.
        num_workers: processes besides this one; 0 works in this one.
        died: what stands for the result of an item whose process died, from the item and words on how it died.

    Raises:
        BundleError: if no process can start.
    """
    if num_workers == 0:
        yield from ((number, task(item)) for number, item in enumerate(items))
        return
    waiting, deaths = dict(enumerate(items)), Counter[int]()
    for attempt in range(1, TRIES + 1):
        try:
            for number, result, code in _outcomes(task, waiting, num_workers):
                deaths[number] += result is None
                if result is not None or deaths[number] > 1:
                    item = waiting.pop(number)
                    yield number, died(item, how_it_ended(code)) if result is None else result[0]
        except BrokenProcessPool as error:
            if attempt == TRIES:
                raise BundleError(
                    "no process of --num_workers could start: is there too little memory for so many?"
                ) from error
        if not waiting:
            return
    yield from ((number, died(item, "as it started")) for number, item in waiting.items())


def _outcomes(
    task: Callable[[T], R], waiting: Mapping[int, T], num_workers: int
) -> Iterator[tuple[int, tuple[R] | None, int | None]]:
    """Of each item its number and result, or None and its process's exit code: then it is tried again, at the end."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of the libraries loaded here
    pool = ProcessPool(min(num_workers, len(waiting)) or 1, initializer=begin_worker, context=context)
    try:
        with _one_thread():
            futures: dict[Future[R], int] = {pool.schedule(task, (item,)): n for n, item in waiting.items()}
            for future in as_completed(futures):
                number = futures.pop(future)
                try:
                    yield number, (future.result(),), None
                except ProcessExpired as error:
                    yield number, None, error.exitcode
    finally:
        pool.stop()
        pool.join()


def how_it_ended(code: int | None) -> str:
    """The exit code of a process that died, in words."""
    if code is not None and code < 0:
        memory = " (is there too little memory for so many processes?)" if -code == KILLED else ""
        return f"signal {signal.Signals(-code).name}{memory}"
    return f"exit code {code}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """While processes start, now or in place of dead ones: what they inherit makes their libraries use one thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def begin_worker() -> None:
    """In each process of a pool, first: a terminal's Ctrl-C reaches all, and the process that started them decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """So that what a killed command leaves does not write beside the same command, run again at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
