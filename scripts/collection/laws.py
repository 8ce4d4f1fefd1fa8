# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Laws of the conditions: from uniform numbers to the raw values of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import ndtri

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import is_absent, number
from scripts.core.tables import TableRow, read_table

FEW = 1e-12  # what is kept off 0 and 1, of which the normal law has no quantiles
NEAREST = 1e-3  # standard deviations


class ConditionLaw(ABC):
    """What the conditions of a row are drawn from: a function of uniform numbers, so that a seed decides all rows."""

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """How many uniform numbers a row takes."""

    @abstractmethod
    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """Raw values (rows, conditions), a code for a word, of numbers (rows, dimensions) from 0 to 1."""

    def admits(self, values: np.ndarray) -> np.ndarray:
        """Which of the rows (rows, conditions) may stand; the others are drawn anew."""
        return np.ones(len(values), bool)

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the law is, as plain data: with the seed it decides every row."""


def pick(uniforms: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Numbers of entries with these shares, by uniform numbers."""
    edges = np.cumsum(shares) / np.sum(shares)
    return np.minimum(np.searchsorted(edges, uniforms, side="right"), len(edges) - 1)


class UniformLaw(ConditionLaw):
    """Each condition by itself: numbers uniform over the training range, codes equally often.

    Args:
        conditions: which, with their ranges.
    """

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = conditions

    @property
    def dimensions(self) -> int:
        """See `ConditionLaw`."""
        return len(self.conditions)

    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """See `ConditionLaw`."""
        columns = [self._column(c, u) for c, u in zip(self.conditions, uniforms.T)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(uniforms), 0))

    def _column(self, condition: Condition, uniforms: np.ndarray) -> np.ndarray:
        codes = np.array([*condition.codes.values()], float)
        return codes[pick(uniforms, np.ones(len(codes)))] if len(codes) else condition.denormalise(uniforms)  # type: ignore[arg-type,return-value]

    def facts(self) -> dict[str, Any]:
        """See `ConditionLaw`."""
        return {"law": "uniform"}


class PeopleLaw(ConditionLaw):
    """The joint law of a table of people, smoothed (Silverman 1986, Density Estimation, section 6.4).

    A row is a person, drawn with replacement, moved towards the mean of the people with the same codes by
    sqrt(1 - h²), plus normal noise of h² times their covariance: means and covariances stay. No row is a copy: what
    comes nearer to a person than a thousandth of a standard deviation in every condition is drawn anew.

    Args:
        conditions: columns of the table, in either form; rows that lack one are left out.
        table: path of a `.tsv` or `.csv`.
        jitter: h, above 0, to 1, at which nothing of single people is left.

    Raises:
        BundleError: if there is no table, a column is missing, nobody is complete, or jitter cannot make others of the
            people, since they differ in codes alone.
    """

    def __init__(self, conditions: Conditions, table: Any, jitter: Any = 0.2) -> None:
        if is_absent(table):
            raise BundleError("--law people needs a table of people: give --people_table FILE")
        self.path, self.conditions = Path(str(table)), conditions
        self.jitter = number(jitter, "jitter", 1e-3, 1.0)
        rows = read_table(self.path)
        conditions.columns_in(rows[0], str(self.path))
        self.people, self.left_out = _complete(rows, conditions, self.path)
        self._numbers = np.array([not c.codes for c in conditions], bool)
        self.spread = self.people.std(axis=0)
        if not (self._numbers & (self.spread > 0)).any():
            raise BundleError(
                f"the people of {self.path} differ in no number: rows drawn from them would be copies; give another law"
            )
        self._groups = self._grouped()
        self._tree = cKDTree(self._scaled(self.people))

    @property
    def dimensions(self) -> int:
        """See `ConditionLaw`: who, and the noise of each number."""
        return 1 + int(self._numbers.sum())

    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """See `ConditionLaw`."""
        who = pick(uniforms[:, 0], np.ones(len(self.people)))
        noise = ndtri(np.clip(uniforms[:, 1:], FEW, 1 - FEW))
        found = self.people[who]
        for members, mean, root in self._groups:
            own = members[who]
            kept = mean + np.sqrt(1 - self.jitter**2) * (found[own][:, self._numbers] - mean)
            found[np.ix_(own, self._numbers)] = kept + self.jitter * noise[own] @ root.T
        return found

    def admits(self, values: np.ndarray) -> np.ndarray:
        """See `ConditionLaw`."""
        return self.distances(values) > NEAREST

    def distances(self, values: np.ndarray) -> np.ndarray:
        """Of each row to the nearest person: the largest difference of a condition, in the people's deviations."""
        return self._tree.query(self._scaled(values), p=np.inf)[0]

    def facts(self) -> dict[str, Any]:
        """See `ConditionLaw`."""
        return {
            "law": "people",
            "people": len(self.people),
            "left_out": self.left_out,
            "table_sha256": file_hash(self.path),
            "jitter": self.jitter,
        }

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return values / np.where(self.spread > 0, self.spread, 1.0)

    def _grouped(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Members, means of the numbers and a root of their covariance, of the people with each set of codes."""
        codes, of_person = np.unique(self.people[:, ~self._numbers], axis=0, return_inverse=True)
        numbers, of_person = self.people[:, self._numbers], of_person.reshape(-1)
        means = np.stack([numbers[of_person == group].mean(axis=0) for group in range(len(codes))])
        pooled = np.atleast_2d(np.cov((numbers - means[of_person]).T, bias=True))
        least = 2 * (numbers.shape[1] + 1)
        found = []
        for group, mean in enumerate(means):
            members = of_person == group
            own = np.atleast_2d(np.cov(numbers[members].T, bias=True)) if members.sum() >= least else pooled
            values, vectors = np.linalg.eigh(own if own.any() else np.diag(self.spread[self._numbers] ** 2))
            found.append((members, mean, vectors * np.sqrt(values.clip(min=0.0))))
        return found


def _complete(rows: list[TableRow], conditions: Conditions, path: Path) -> tuple[np.ndarray, int]:
    """Raw values (people, conditions) of those who have all, and how many have not."""
    found = [_raw(conditions, row, f" in row {number} of {path}") for number, row in enumerate(rows, start=1)]
    complete = [values for values in found if None not in values]
    if not complete:
        raise BundleError(f"nobody in {path} has a value of every condition: complete the table")
    return np.array(complete, float), len(rows) - len(complete)


def _raw(conditions: Conditions, row: TableRow, where: str) -> list[float | None]:
    stated = conditions.in_table(row, where)
    names = [next((flag for flag in (c.name, c.raw) if flag in stated), None) for c in conditions]
    return [
        None if name is None else c.denormalise(c.parse(name, stated[name], where))
        for c, name in zip(conditions, names, strict=True)
    ]
