# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The law of a small file: a Gaussian copula of means, spreads, shares, correlations and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import ndtr, ndtri

from scripts.collection.laws import FEW, ConditionLaw, pick
from scripts.conditions.conditions import Condition, Conditions
from scripts.core.errors import BundleError
from scripts.core.options import is_absent, number
from scripts.core.tables import read_text

CORRELATIONS = "correlations"
KEYS = {"mean", "sd", "median", "log_sd", "range"}
LEAST_MASS = 1e-6


class FileLaw(ConditionLaw):
    """Correlated normal numbers, each brought to its condition's own law (a Gaussian copula).

    Args:
        conditions: all of them are in the file, by their raw names.
        path: a YAML or JSON file. An entry is `{mean, sd, range}`, a normal law cut off at its range; `{median, log_sd,
            range}`, the same of the logarithm; or, of words, their shares, such as `{female: 0.5, male: 0.5}`.
            `correlations` holds, by two names, those of the normal numbers; those not stated are 0.

    Raises:
        BundleError: if the file cannot be read, lacks a condition or has another, a range is upside down or has nothing
            of the law, a spread is not above 0, or the correlations are those of no law.
    """

    def __init__(self, conditions: Conditions, path: Any) -> None:
        if is_absent(path):
            raise BundleError("--law file needs a file with means, spreads and correlations: give --law_file FILE")
        self.path, self.conditions = Path(str(path)), conditions
        self.content = _read(self.path)
        names = [c.raw for c in conditions]
        for name in names:
            if name not in self.content:
                raise BundleError(f"{self.path} has no law of {name}: it states {', '.join(map(str, self.content))}")
        for name in self.content:
            if name not in (*names, CORRELATIONS):
                raise BundleError(f"{self.path} states {name}, but the conditions are {', '.join(names)}")
        self._margins = [_margin(c, self.content[c.raw], f"{c.raw} in {self.path}") for c in conditions]
        self._root = np.linalg.cholesky(self._correlations(names)) if names else np.zeros((0, 0))

    @property
    def dimensions(self) -> int:
        """See `ConditionLaw`."""
        return len(self.conditions)

    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """See `ConditionLaw`."""
        correlated = ndtr(ndtri(np.clip(uniforms, FEW, 1 - FEW)) @ self._root.T)
        columns = [margin(u) for margin, u in zip(self._margins, correlated.T)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(uniforms), 0))

    def facts(self) -> dict[str, Any]:
        """See `ConditionLaw`."""
        return {"law": "file", "content": self.content}

    def _correlations(self, names: list[str]) -> np.ndarray:
        matrix = np.eye(len(names))
        stated = self.content.get(CORRELATIONS) or {}
        where = f"{CORRELATIONS} of {self.path}"
        for one, others in stated.items() if isinstance(stated, Mapping) else [(stated, None)]:
            if one not in names or not isinstance(others, Mapping):
                raise BundleError(
                    f"{where}: '{one}' must be one of {', '.join(names)}, with a map of others to numbers"
                )
            for other, value in others.items():
                if other not in names or other == one:
                    raise BundleError(f"{where}: '{other}' of {one} must be another of {', '.join(names)}")
                first, second = names.index(one), names.index(other)
                found = _number(value, f"{where}: {one} with {other}", -1.0, 1.0)
                if matrix[first, second] not in (0.0, found):
                    raise BundleError(f"{where}: {one} with {other} is stated twice, with other values")
                matrix[first, second] = matrix[second, first] = found
        least = float(np.linalg.eigvalsh(matrix).min()) if names else 1.0
        if least < 1e-9:
            raise BundleError(
                f"{where} cannot be together: their matrix has the eigenvalue {least:.3g}, and all have to be above 0; "
                "bring them nearer to 0"
            )
        return matrix


class CutNormal:
    """Quantiles of a normal law, or of its exponential, within a range.

    Args:
        centre, spread: mean and standard deviation; of the logarithm if `exponential`.
        low, high: the range, in the same terms.
        exponential: whether the values are those of the exponential.
    """

    def __init__(self, centre: float, spread: float, low: float, high: float, exponential: bool) -> None:
        self.centre, self.spread, self.exponential = centre, spread, exponential
        self.low, self.high = (float(ndtr((end - centre) / spread)) for end in (low, high))

    def __call__(self, uniforms: np.ndarray) -> np.ndarray:
        """Values (n,) of numbers (n,) from 0 to 1."""
        inside = np.clip(self.low + uniforms * (self.high - self.low), FEW, 1 - FEW)
        values = self.centre + self.spread * ndtri(inside)
        return np.exp(values) if self.exponential else values


class WordShares:
    """Codes of words with given shares.

    Args:
        codes: one a word.
        shares: of each, at least 0.
    """

    def __init__(self, codes: np.ndarray, shares: np.ndarray) -> None:
        self.codes, self.shares = codes, shares

    def __call__(self, uniforms: np.ndarray) -> np.ndarray:
        """Codes (n,) of numbers (n,) from 0 to 1."""
        return self.codes[pick(uniforms, self.shares)]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path, "law"))
    except (yaml.YAMLError, RecursionError) as error:
        raise BundleError(f"the law {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"the law {path} must be a map of conditions, such as age_years: {{mean: 64, sd: 8}}")
    return content


def _margin(condition: Condition, stated: Any, where: str) -> CutNormal | WordShares:
    if not isinstance(stated, Mapping):
        raise BundleError(f"{where} must be a map, such as {{mean: 64, sd: 8, range: [44, 82]}}, got {stated!r}")
    return _shares(condition, stated, where) if condition.codes else _normal(stated, where)


def _shares(condition: Condition, stated: Mapping[str, Any], where: str) -> WordShares:
    if set(stated) != set(condition.codes):
        raise BundleError(f"{where} must have a share of each of {', '.join(condition.codes)}")
    shares = np.array([_number(stated[word], f"{where}: {word}", 0.0, math.inf) for word in condition.codes])
    if shares.sum() <= 0:
        raise BundleError(f"{where}: all shares are 0")
    return WordShares(np.array([*condition.codes.values()], float), shares)


def _normal(stated: Mapping[str, Any], where: str) -> CutNormal:
    exponential = "median" in stated
    centre_name, spread_name = ("median", "log_sd") if exponential else ("mean", "sd")
    unknown = set(stated) - {centre_name, spread_name, "range"}
    if unknown or centre_name not in stated or spread_name not in stated:
        raise BundleError(
            f"{where} must state mean and sd, or median and log_sd, and perhaps range; it has {', '.join(stated)}"
        )
    centre = _number(stated[centre_name], f"{where}: {centre_name}", 1e-12 if exponential else -math.inf)
    spread = _number(stated[spread_name], f"{where}: {spread_name}", 1e-12)
    ends = stated.get("range", [0.0 if exponential else -math.inf, math.inf])
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise BundleError(f"{where}: range must be two numbers, got {ends!r}")
    low, high = ends if "range" not in stated else (_number(end, f"{where}: range") for end in ends)
    if low >= high:
        raise BundleError(f"{where}: the range {low:g} to {high:g} is upside down or empty: the lower end comes first")
    if exponential:
        centre, low, high = (
            math.log(centre),
            math.log(low) if low > 0 else -math.inf,
            math.log(high) if high > 0 else -math.inf,
        )
    margin = CutNormal(centre, spread, low, high, exponential)
    if margin.high - margin.low < LEAST_MASS:
        raise BundleError(f"{where}: its law has nothing within the range {ends[0]:g} to {ends[1]:g}: is a unit wrong?")
    return margin


def _number(value: Any, where: str, least: float = -math.inf, most: float = math.inf) -> float:
    try:
        return number(value, where, least, most)
    except BundleError as error:
        raise BundleError(str(error).removeprefix("--")) from error
