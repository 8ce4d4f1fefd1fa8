# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Writing in other threads while the device computes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore, Lock
from typing import Any

import torch
from torch import Tensor

from scripts.core.options import whole_number


class BackgroundWriter:
    """Calls functions in other threads, of which a bounded number wait.

    A call that fails is the last: those that wait are dropped, those that have begun are finished, and the next
    `submit` or `finish` raises its error.

    Args:
        threads: how many calls run at the same time, and how many more may wait; 0 calls at once, in this thread.

    Raises:
        BundleError: unless `threads` is a whole number.
    """

    def __init__(self, threads: Any = 2) -> None:
        self.threads = whole_number(threads, "write_threads")
        self._pool: ThreadPoolExecutor | None = None
        self._room = BoundedSemaphore(max(1, 2 * self.threads))
        self._lock = Lock()
        self._error: BaseException | None = None

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call the function as soon as a thread is free; return at once if there is room for it to wait.

        Raises:
            BaseException: what an earlier call raised.
        """
        if self.threads == 0:
            return function(*arguments)
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            return self.finish()
        self._pool = self._pool or ThreadPoolExecutor(self.threads, "writer")
        self._pool.submit(self._call, function, arguments)

    def _call(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            if self._error is None:
                function(*arguments)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
        finally:
            self._room.release()

    def finish(self) -> None:
        """Wait for all calls.

        Raises:
            BaseException: the first error of a call since this was last called.
        """
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pool, error, self._error = None, self._error, None
        if error is not None:
            raise error


class HostCopy:
    """A copy of a tensor on its way to the host's memory, which does not hold up the thread that asks for it.

    Args:
        tensor: on any device. One on the CPU is not copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the CPU, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
