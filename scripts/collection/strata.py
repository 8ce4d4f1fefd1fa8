# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Strata: how often rows fall into each part of a condition's range, whatever the law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scripts.collection.laws import pick
from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.options import number

EXAMPLE = "{'age_years':[44,54,64,74,82]} or {'ventricular_vol_mm3':{'edges':[8000,30000,80000],'weights':[1,3]}}"


class Strata:
    """Parts of conditions' ranges with the shares of rows that fall into them, each condition by itself.

    Args:
        conditions: which there are.
        stated: raw name -> edges, for parts equally often; or `{edges, weights}`; or, of words, their weights. None for
            no strata.

    Raises:
        BundleError: for a name that is no condition, edges that do not rise, or weights that are none.
    """

    def __init__(self, conditions: Conditions, stated: Any = None) -> None:
        if not isinstance(stated, (Mapping, type(None))):
            raise BundleError(f"--strata must be a map such as {EXAMPLE}, got {stated!r}")
        by_name = {c.raw: (number, c) for number, c in enumerate(conditions)}
        self.stated = dict(stated or {})
        for name in self.stated:
            if name not in by_name:
                raise BundleError(
                    f"--strata: '{name}' is none of {', '.join(by_name) or 'the model, which has no conditions'}"
                )
        self._parts = [(by_name[name][0], *_parts(by_name[name][1], value)) for name, value in self.stated.items()]

    @property
    def dimensions(self) -> int:
        """How many uniform numbers decide a row's strata."""
        return len(self._parts)

    def chosen(self, uniforms: np.ndarray) -> np.ndarray:
        """The part (rows, strata) that each row shall fall into, of numbers (rows, strata) from 0 to 1."""
        columns = [pick(u, weights) for (_, _, weights), u in zip(self._parts, uniforms.T)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(uniforms), 0), int)

    def contain(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Whether rows of raw values (rows, conditions) fall into their parts (rows, strata)."""
        inside = np.ones(len(values), bool)
        for (column, bounds, _), part in zip(self._parts, chosen.T):
            inside &= (values[:, column] >= bounds[part, 0]) & (values[:, column] < bounds[part, 1])
        return inside

    def in_words(self, chosen: Sequence[int]) -> str:
        """A row's parts for messages."""
        return ", ".join(
            f"{name} from {bounds[part, 0]:g} to {bounds[part, 1]:g}"
            for name, (_, bounds, _), part in zip(self.stated, self._parts, chosen)
        )


def _parts(condition: Condition, stated: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (parts, 2), the upper one excluded, and weights (parts,)."""
    where = f"strata: {condition.raw}"
    if condition.codes:
        if not isinstance(stated, Mapping) or set(stated) != set(condition.codes):
            raise BundleError(f"--{where} must have a weight of each of {', '.join(condition.codes)}")
        codes = np.array([*condition.codes.values()], float)
        return np.stack([codes, np.nextafter(codes, np.inf)], axis=1), _weights(
            [*(stated[w] for w in condition.codes)], where
        )
    given = stated if isinstance(stated, Mapping) else {"edges": stated}
    edges = given.get("edges")
    if set(given) - {"edges", "weights"} or not isinstance(edges, (list, tuple)) or len(edges) < 2:
        raise BundleError(f"--{where} must be edges, or edges and weights, such as {EXAMPLE}")
    rising = np.array([number(edge, f"{where}: edges") for edge in edges])
    if (np.diff(rising) <= 0).any():
        raise BundleError(f"--{where}: the edges {list(edges)} do not rise")
    weights = given.get("weights", [1.0] * (len(rising) - 1))
    if not isinstance(weights, (list, tuple)) or len(weights) != len(rising) - 1:
        raise BundleError(f"--{where}: {len(rising)} edges make {len(rising) - 1} parts, which need as many weights")
    return np.stack([rising[:-1], rising[1:]], axis=1), _weights(weights, where)


def _weights(stated: Sequence[Any], where: str) -> np.ndarray:
    weights = np.array([number(one, f"{where}: weights", 0.0) for one in stated])
    if weights.sum() <= 0:
        raise BundleError(f"--{where}: all weights are 0")
    return weights
