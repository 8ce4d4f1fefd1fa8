# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Values of conditions that are stated as changes of what a head has: `+10`, `-5`, `*1.5`, `/2`; or several of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.cells import is_missing, shown
from scripts.core.errors import BundleError
from scripts.core.options import number

CHANGE = re.compile(r"\s*([+*/-])\s*(.*?)\s*", re.DOTALL)
FAR = 1.0
"""How far beyond its range, in ranges, a condition is taken; beyond that, a model says nothing at all."""
MOST_VALUES = 100


def values_of(stated: Any) -> list[Any]:
    """The values of a flag or cell: those of a list, or of text with commas, or the one."""
    parts = stated if isinstance(stated, (list, tuple)) else str(stated).strip().strip("[]()").split(",")
    return [one.strip().strip("'\"") if isinstance(one, str) else one for one in parts]


def changed(condition: Condition, flag: str, value: Any, own: float, where: str = "") -> float:
    """The normalised value that is meant.

    Args:
        condition: which.
        flag: the name of either form that `value` was given as, which tells its units.
        value: a number or word, or a change of what the head has: a sign, one of `+-*/`, and a number.
        own: what the head has, normalised.
        where: words for messages.

    Raises:
        BundleError: if it cannot be read, changes what is no number, or lies far outside the range.
    """
    sign = CHANGE.fullmatch(str(value))
    if sign is None:
        found = condition.parse(flag, value, where)
    elif condition.codes:
        raise BundleError(f"--{flag}{where} is one of {', '.join(condition.codes)}, which '{shown(value)}' is not")
    else:
        found = _moved(condition, flag, sign[1], number(sign[2], flag), own)
    if not -FAR <= found <= 1.0 + FAR:
        raise BundleError(
            f"--{flag} {shown(value)}{where} comes to {condition.describe(condition.denormalise(found))}, far outside "
            f"of the training range ({condition.in_words()}): a model knows nothing there"
        )
    return found


def _moved(condition: Condition, flag: str, sign: str, amount: float, own: float) -> float:
    if sign == "/" and amount == 0.0:
        raise BundleError(f"--{flag} /0: nothing can be divided by 0")
    raw = flag == condition.raw
    before = condition.denormalise(own) if raw else own
    after = {"+": before + amount, "-": before - amount, "*": before * amount}.get(sign)
    after = before / amount if after is None else after
    return condition.normalise(after) if raw else after


def targets_of(conditions: Conditions, stated: Mapping[str, Any], own: Tensor, where: str = "") -> list[Tensor]:
    """The vectors that a head with some conditions shall have: one, or as many as a list has values.

    Args:
        conditions: all that the model has.
        stated: flag or column -> value, change, or several of either; what is missing says nothing.
        own: what the head has, (conditions,).
        where: words for messages.

    Returns:
        Vectors (conditions,), float32. A condition with one value has it in all.

    Raises:
        BundleError: if nothing is stated, a condition in both forms, lists differ in length, or as `changed`.
    """
    given = {flag: values_of(stated[flag]) for flag in conditions.flags() if not _says_nothing(stated.get(flag))}
    if not given:
        raise BundleError(f"nothing is to change{where}: give a condition, such as --{conditions.flags()[-1]} '*1.1'")
    counts = {len(values) for values in given.values()} - {1}
    if len(counts) > 1 or max(counts, default=1) > MOST_VALUES:
        raise BundleError(
            f"--{' and --'.join(given)}{where}: lists of values must be of one length, and no longer than {MOST_VALUES}"
        )
    vectors = [own.clone() for _ in range(max(counts, default=1))]
    for place, condition in enumerate(conditions):
        flags = [flag for flag in (condition.name, condition.raw) if flag in given]
        if len(flags) > 1:
            raise BundleError(f"--{flags[0]} and --{flags[1]} state the same condition{where}: give one of them")
        for flag in flags:
            values = _repeated(given[flag], len(vectors))
            for vector, value in zip(vectors, values, strict=True):
                vector[place] = changed(condition, flag, value, float(own[place]), where)
    return vectors


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and is_missing(value))


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    return [*values] if len(values) == count else [values[0]] * count


def outside_in_words(conditions: Conditions, vector: Tensor) -> list[str]:
    """What of a vector lies outside of its training range, in words."""
    pairs = zip(conditions, vector.tolist(), strict=True)
    return [
        f"{c.raw} {c.describe(c.denormalise(value))} is outside of the training range ({c.in_words()})"
        for c, value in pairs
        if not -torch.finfo(torch.float32).eps <= value <= 1.0 + torch.finfo(torch.float32).eps
    ]
