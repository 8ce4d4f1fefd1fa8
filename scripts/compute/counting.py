# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How far a long loop is: a bar on a terminal; elsewhere an estimate after a few items, then a line a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
FIRST_S, EVERY_S = 10.0, 60.0


class Countable(Protocol[T_co]):
    """What has a length and can be gone through, as lists and PyTorch's loaders."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


def counted(items: Countable[T], what: str, unit: str = "it", disable: bool | None = None) -> Iterator[T]:
    """The items, one after the other, while it is shown how many are done.

    Args:
        items: of which there is a known number.
        what: is done with them, such as `segmenting`.
        unit: what one of them is, such as `volume`.
        disable: True shows nothing.
    """
    bar = tqdm(items, what, unit=unit, disable=disable)
    if disable or not bar.disable:
        yield from bar
        return
    began = time.monotonic()
    due = began + FIRST_S
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= due and done < len(items):
            left = timedelta(seconds=round((now - began) / done * (len(items) - done)))
            logger.info(f"{what}: {done} of {len(items)} {unit}s, about {left} left")
            due = now + EVERY_S
