# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading option values, which the command line hands over as text or numbers."""

from __future__ import annotations

import math
from typing import Any

from scripts.core.errors import BundleError

MOST = 2**63 - 1
YES = {"true", "yes", "on", "1", "1.0"}
NO = {"false", "no", "off", "0", "0.0", "none", "null"}
AUTO = "auto"
ABSENT = {"none", "null", ""}


def yes_or_no(value: Any, flag: str) -> bool:
    """A truth value from `1`, `0`, `true`, `False`, `yes` and the like.

    Raises:
        BundleError: for anything else, naming the flag.
    """
    text = str(value).strip().lower()
    if text not in YES | NO:
        raise BundleError(f"--{flag} must be 1 or 0, got '{value}'")
    return text in YES


def whole_number(value: Any, flag: str, least: int = 0) -> int:
    """An integer of at least `least` that 64 bits can hold.

    Raises:
        BundleError: for anything else, naming the flag.
    """
    try:
        number = int(str(value))
    except ValueError as error:
        raise BundleError(f"--{flag} must be a whole number, got '{value}'") from error
    if number < least:
        raise BundleError(f"--{flag} must be at least {least}, got {number}")
    if number > MOST:
        raise BundleError(f"--{flag} must be at most {MOST}, got {number}")
    return number


def checked_steps(value: Any, most: int) -> int:
    """The length of a trajectory, from 1 to `most`.

    Raises:
        BundleError: for anything else.
    """
    steps = whole_number(value, "num_inference_steps", least=1)
    if steps > most:
        raise BundleError(f"--num_inference_steps {steps} is more than the {most} steps of the schedule")
    return steps


def number(value: Any, flag: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number from `least` to `most`.

    Raises:
        BundleError: for anything else, naming the flag.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BundleError(f"--{flag} must be a finite number, got '{value}'")
    if found < least:
        raise BundleError(f"--{flag} must be at least {least:g}, got {found:g}")
    if found > most:
        raise BundleError(f"--{flag} must be at most {most:g}, got {found:g}")
    return found


def probability(value: Any, flag: str) -> float:
    """A number from 0 to 1.

    Raises:
        BundleError: for anything else, naming the flag.
    """
    try:
        return number(value, flag, 0.0, 1.0)
    except BundleError as error:
        raise BundleError(f"--{flag} must be from 0 to 1, got '{value}'") from error


def range_in_words(least: float, most: float, unit: str) -> str:
    """A range for messages, such as `44 to 82 years`."""
    return f"{least:.7g} to {most:.7g} {unit}".strip()


def is_absent(value: Any) -> bool:
    """Whether an option is left out: None, or the `null` that the command line hands over as text."""
    return str(value).strip().lower() in ABSENT
