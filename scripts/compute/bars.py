# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Progress bars that more than a terminal can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

Listener = Callable[[int, int], None]
"""Is told how many steps of how many are done."""

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, every `StepBar` of this process tells a listener of each step."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class StepBar(tqdm):
    """A bar of `total` steps on a terminal, gone when it is full, that tells the listeners elsewhere too."""

    def __init__(self, total: int, desc: str) -> None:
        super().__init__(total=total, desc=desc, unit="step", leave=False, disable=None)
        self.done = 0
        self._tell()

    def update(self, n: Any = 1) -> Any:
        """Count steps."""
        self.done += n
        self._tell()
        return super().update(n)

    def _tell(self) -> None:
        for listener in _listeners:
            listener(self.done, self.total)
