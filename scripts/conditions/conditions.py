# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The covariates that a model is conditioned on, in raw units and as the network sees them."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from scripts.core.cells import SEX_WORDS, is_missing, read_number, shown
from scripts.core.config import current_config
from scripts.core.errors import BundleError
from scripts.core.options import range_in_words, whole_number
from scripts.core.tables import read_table

logger = logging.getLogger(__name__)

RANGE = "is a range"
FARTHEST = (-2.0, 3.0)  # normalised: nobody extrapolates by two ranges, but years and millilitres are easily mixed up
NOT_NUMBERS = ("nan",)  # given as a flag, a slip and no missing value


@dataclass(frozen=True)
class Condition:
    """One covariate and its min-max normalisation.

    Attributes:
        name: flag and column of the normalised value, 0 at `minimum` and 1 at `maximum`.
        raw: flag and column of the value in raw units.
        unit: the raw unit; empty for a code.
        minimum, maximum: the training range in raw units.
        default: normalised value where a sample's request says nothing.
        codes: words that stand for raw values, such as `{"female": 0, "male": 1}`; an initial that only one
            of them has will do.
    """

    name: str
    raw: str
    unit: str
    minimum: float
    maximum: float
    default: float = 0.5
    codes: Mapping[str, float] = field(default_factory=dict)

    def normalise(self, raw: float) -> float:
        """Map raw units to 0..1; values outside the training range land outside 0..1."""
        return (raw - self.minimum) / (self.maximum - self.minimum)

    def denormalise(self, value: float) -> float:
        """Map 0..1 to raw units: the inverse of `normalise`."""
        return self.minimum + value * (self.maximum - self.minimum)

    def describe(self, raw: float) -> str:
        """A raw value as people write it: its word, millilitres for mm3, else the number with its unit."""
        word = next((word for word, code in self.codes.items() if code == raw), None)
        number = f"{raw / 1000:.4g} mL" if self.unit == "mm3" else f"{raw:.4g} {self.unit}".strip()
        return number if word is None else word

    def described(self) -> dict[str, Any]:
        """Its column in raw units, as the JSON file beside a BIDS table describes it."""
        levels = {"Levels": {word: f"{code:g} for the network" for word, code in self.codes.items()}}
        unit = {"Units": self.unit} if self.unit else {}
        return {"Description": f"condition '{self.name}'", **unit, **(levels if self.codes else {})}

    def in_words(self) -> str:
        """The training range for messages, such as `44 to 82 years`."""
        return range_in_words(self.minimum, self.maximum, self.unit)

    def parse(self, flag: str, value: Any, where: str = "") -> float:
        """A finite normalised value from what was given as `flag`, the name of either form.

        Raises:
            BundleError: if the value is no number (or, for a coded condition, none of its words),
                NaN or infinite.
        """
        raw = flag == self.raw
        number = self._code(value) if raw else None
        number = _number(value) if number is None else number
        normalised = self.normalise(number) if raw else number
        if not abs(normalised) <= torch.finfo(torch.float32).max:
            expected = f"one of {', '.join(self.codes)}" if raw and self.codes else "a finite number"
            raise BundleError(f"--{flag}{where} must be {expected}, got '{shown(value)}'")
        if not raw and self.name != self.raw and not FARTHEST[0] <= normalised <= FARTHEST[1]:
            raise BundleError(
                f"--{flag}{where} is {shown(value)}, but it is 0 to 1 over the training range, {self.in_words()}: "
                f"did you mean {self.raw}?"
            )
        return normalised

    def _code(self, value: Any) -> float | None:
        word = str(value).strip().lower()
        whole = [code for name, code in self.codes.items() if name.lower() == word]
        initial = [code for name, code in self.codes.items() if name[:1].lower() == word]
        other = [code for name, code in self.codes.items() if word in SEX_WORDS.get(name.lower(), ())]
        return next((codes[0] for codes in (whole, initial, other) if len(codes) == 1), None)

    def from_cell(self, flag: str, cell: Any) -> tuple[Any, str]:
        """What a cell of a column of either form says, for `parse`, and what to warn of; None where it says nothing.

        Words of codes are left as they are; numbers are read as `scripts.core.cells.read_number` does, and what is none
        is left for `parse` to refuse.
        """
        if is_missing(cell):
            return None, ""
        if flag == self.raw and self._code(cell) is not None:
            return cell, ""
        number = read_number(cell)
        if number.unreadable and not number.remark.startswith(RANGE):
            return cell, ""
        return number.value, number.remark


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


class Conditions(Sequence[Condition]):
    """The ordered map of conditions: the one place that says which there are, and their ranges.

    Network sizes, flags, and table columns follow from it, so that a new covariate is one more entry.

    Args:
        entries: name -> the other fields of `Condition`, in the order of the network's channels.

    Raises:
        BundleError: if an entry is incomplete, its range empty, or two conditions share a flag.
    """

    def __init__(self, **entries: Mapping[str, Any]) -> None:
        self._entries = [_condition(name, entry) for name, entry in entries.items()]
        flags = self.flags()
        for flag in flags:
            if flags.count(flag) > 1:
                raise BundleError(f"the flag '{flag}' belongs to two conditions: give each its own name and raw name")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return self._entries[index]

    def __iter__(self) -> Iterator[Condition]:
        return iter(self._entries)

    def flags(self) -> list[str]:
        """Every flag or column that states a condition: normalised and raw names."""
        return [flag for entry in self._entries for flag in (entry.name, entry.raw)]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The map as plain data, for checkpoints and sidecars."""
        return {c.name: {"raw": c.raw, "unit": c.unit, "minimum": c.minimum, "maximum": c.maximum} for c in self}

    def from_request(self, request: Mapping[str, Any], where: str = "", warn: bool = True) -> torch.Tensor:
        """The network's vector for one sample, defaults filling what the request leaves out.

        Args:
            request: values by flag or column name, each condition in at most one of its two forms;
                other keys are ignored, as are values that are None or `n/a`.
            where: words for messages, such as ` in row 3 of x.tsv`.
            warn: whether to warn of values outside the training range.

        Returns:
            Float32 tensor of shape (conditions,), nominally 0..1.

        Raises:
            BundleError: for both forms of one condition, or a value that `Condition.parse` refuses.
        """
        return torch.tensor([self._requested(c, request, where, warn) for c in self], dtype=torch.float32)

    def in_table(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The conditions that a row of a table states, by column, after a warning of those with a remark.

        Args:
            row: of a table of requests, participants or volumes.
            where: words for messages.
        """
        found = {}
        for condition in self:
            for flag in (condition.name, condition.raw):
                value, remark = condition.from_cell(flag, row.get(flag))
                if remark:
                    logger.warning(f"{flag}{where} is '{shown(row[flag])}', which {remark}")
                if value is not None:
                    found[flag] = value
        return found

    def _requested(self, condition: Condition, request: Mapping[str, Any], where: str, warn: bool) -> float:
        given = [flag for flag in (condition.name, condition.raw) if not _absent(request.get(flag))]
        if len(given) > 1:
            raise BundleError(f"--{given[0]} and --{given[1]} state the same condition{where}: give one of them")
        if not given:
            return condition.default
        value = condition.parse(given[0], request[given[0]], where)
        if warn and not 0.0 <= value <= 1.0:
            logger.warning(
                f"--{given[0]} {request[given[0]]}{where} is outside the training range "
                f"({condition.in_words()}, 0 to 1 normalised): the model extrapolates"
            )
        return value

    def with_unknown_codes(self, request: Mapping[str, Any], where: str = "", warn: bool = True) -> torch.Tensor:
        """As `from_request`, with NaN for conditions with codes that the request leaves out: half a sex is none."""
        vector = self.from_request(request, where, warn)
        for i, c in enumerate(self):
            if c.codes and _absent(request.get(c.name)) and _absent(request.get(c.raw)):
                vector[i] = math.nan
        return vector

    def from_row(self, row: Mapping[str, Any], where: str, missing: str = "error", warn: bool = True) -> torch.Tensor:
        """The network's vector for one training scan from its row in raw units or normalised.

        Args:
            row: a row of a participants table.
            where: words for messages, such as `participant 7 of x.tsv`.
            missing: what to do where a value is `n/a`: `error`; `default` to train with the default; or
                `random`, for which the vector holds NaN and training draws a new value each time, so that the
                network learns that the condition says nothing of this scan.
            warn: whether to warn of values outside the training range.

        Returns:
            Float32 tensor of shape (conditions,).

        Raises:
            BundleError: as `from_request`, for a missing value with `error`, or for another `missing`; for a column
                that the table has twice.
        """
        if missing not in ("error", "default", "random"):
            raise BundleError(f"--missing_conditions must be error, default or random, got '{missing}'")
        stated = self.in_table(row, f" of {where}")
        vector = self.from_request(stated, f" of {where}", warn)
        for i, c in enumerate(self):
            absent = c.name not in stated and c.raw not in stated
            if absent and missing == "random":
                vector[i] = float("nan")
            if absent and missing == "error":
                raise BundleError(
                    f"{where} has no value of '{c.raw}' (or '{c.name}'): complete the table; in training, "
                    f"--missing_conditions default takes {c.denormalise(c.default):g} {c.unit}".rstrip()
                )
        return vector

    def columns_in(self, header: Collection[str], table: str) -> None:
        """Check that a table has, for every condition, a column of either form.

        Raises:
            BundleError: naming the column that is not there and the nearest one that is.
        """
        for c in self:
            if c.name not in header and c.raw not in header:
                near = difflib.get_close_matches(c.raw, [*header], 1) or difflib.get_close_matches(c.name, [*header], 1)
                hint = f" (did you mean its column '{near[0]}'?)" if near else ""
                raise BundleError(f"the table {table} has no column '{c.raw}' or '{c.name}'{hint}")

    def in_both_units(self, vector: torch.Tensor) -> dict[str, Any]:
        """Name -> value and raw name -> value in raw units or its word, for one vector of shape (conditions,)."""
        values: dict[str, Any] = {}
        for c, value in zip(self, vector.tolist(), strict=True):
            raw = float(f"{c.denormalise(value):.7g}")
            values[c.name] = round(value, 6)
            values[c.raw] = next((word for word, code in c.codes.items() if code == raw), raw)
        return values


class NoConditions(Conditions):
    """Those of a model that has none: empty, and what is given for the configured ones is refused.

    Args:
        configured: whose flags and columns a request may state by mistake.
        model: what has no conditions, in words.
    """

    def __init__(self, configured: Conditions, model: str) -> None:
        self.configured, self.model = configured, model
        super().__init__()

    def flags(self) -> list[str]:
        """Every flag or column that is refused."""
        return self.configured.flags()

    def from_request(self, request: Mapping[str, Any], where: str = "", warn: bool = True) -> torch.Tensor:
        """A vector of shape (0,).

        Raises:
            BundleError: if the request states a condition.
        """
        for flag in self.flags():
            if not _absent(request.get(flag)):
                raise BundleError(f"--{flag} {request[flag]}{where}: {self.model} has no conditions: leave it out")
        return super().from_request(request, where, warn)

    def columns_in(self, header: Collection[str], table: str) -> None:
        """Check that a table of requests has a column of no condition.

        Raises:
            BundleError: naming the column that it has.
        """
        for flag in self.flags():
            if flag in header:
                raise BundleError(f"the table {table} has the column '{flag}', but {self.model} has no conditions")


def flags_or_table(
    flags: Iterable[str], table: str | None, count_flag: str, count: Any = None, default: int = 1
) -> list[Mapping[str, Any]]:
    """What is asked for: the same for all, from flags of the configuration that is being evaluated, or a table's rows.

    Args:
        flags: names of the flags.
        table: path of a table, or None.
        count_flag, count: the flag that says how many, where there is no table, and its value.
        default: how many where `count` is None.

    Raises:
        BundleError: for an empty flag, a bad count or table, or a table together with flags.
    """
    config = current_config()
    given = {flag: config[flag] for flag in flags if config.get(flag) is not None}
    for flag, value in given.items():
        if str(value).strip() == "":
            raise BundleError(f"--{flag} is empty: give a value, or leave it out for the default")
    if table is None:
        return [given] * whole_number(default if count is None else count, count_flag, least=1)
    for flag in (*given, *([] if count is None else [count_flag])):
        raise BundleError(f"--conditions_table has a row for each, with its conditions: leave out --{flag}")
    return list(read_table(table))


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and is_missing(value) and value.strip().lower() not in NOT_NUMBERS)


def _condition(name: str, entry: Mapping[str, Any]) -> Condition:
    try:
        condition = Condition(name=name, **entry)
    except TypeError as error:
        raise BundleError(f"the condition '{name}' is not well described: {error}") from error
    if not condition.minimum < condition.maximum:
        raise BundleError(f"the condition '{name}' has an empty range: {condition.in_words()}")
    return condition
