# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The covariates of phantoms: drawn from a population, or uniformly from the training range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.cells import read_number, shown
from scripts.core.errors import BundleError
from scripts.core.option_types import OptionType
from scripts.core.options import yes_or_no

TRIES = 1000


@dataclass(frozen=True)
class Covariates:
    """What a phantom is asked to be, in raw units; the fields but the last are the model's conditions by raw name.

    Attributes:
        sex: code of the conditions, 0 for female and 1 for male.
        age_years: age.
        ventricular_vol_mm3: lateral ventricles, as they are.
        brain_vol_mm3: grey and white matter, times the reference head's intracranial volume over the phantom's.
        intracranial_mm3: all within the skull.
    """

    sex: float
    age_years: float
    ventricular_vol_mm3: float
    brain_vol_mm3: float
    intracranial_mm3: float


RAW = tuple(field.name for field in fields(Covariates))
VOLUME, AGE = OptionType("number", above=0.0, most=1.0e7), OptionType("number", 0.0, 120.0)
POSSIBLE = {"age_years": AGE, **dict.fromkeys(RAW[2:], VOLUME)}
"""Raw name -> what a person can have, if only as a phantom."""


class Population:
    """A joint distribution of the covariates.

    Age is normal, sex a coin. The logarithm of the ventricles and the normalised brain are linear in age and sex with
    normal, correlated remainders; the intracranial volume is normal, its mean by sex. Whatever falls outside the range
    of a condition is drawn again.

    Args:
        conditions: the ranges.
        male: share of men.
        age: `mean` and `sd`, years.
        ventricles: `median` in mm3 at the mean age, halfway between the sexes; `per_year`, `male_over_female` and
            `sd`, of the logarithm.
        brain: `mean` in mm3 at the mean age, halfway between the sexes; `per_year`, `male_over_female` and `sd`, mm3.
        correlation: of the two remainders.
        intracranial: mean of `female` and `male`, and `sd`, mm3.
        independent: draw sex, age and the two volumes uniformly from the conditions' ranges instead, each by itself.

    Raises:
        BundleError: if a condition that phantoms need is missing.
    """

    def __init__(
        self,
        conditions: Conditions,
        male: float,
        age: Mapping[str, float],
        ventricles: Mapping[str, float],
        brain: Mapping[str, float],
        correlation: float,
        intracranial: Mapping[str, float],
        independent: Any = False,
    ) -> None:
        known: dict[str, Condition] = {c.raw: c for c in conditions}
        missing = [name for name in RAW[:-1] if name not in known]
        if missing:
            raise BundleError(f"phantoms need the condition {missing[0]}: the conditions are {', '.join(known)}")
        self.ranges = {name: (known[name].minimum, known[name].maximum) for name in RAW[:-1]}
        self.independent = yes_or_no(independent, "independent")
        self.male, self.age, self.correlation = male, age, correlation
        self.ventricles, self.brain, self.intracranial = ventricles, brain, intracranial

    def settings(self) -> dict[str, Any]:
        """The distribution as plain data."""
        names = ("ranges", "male", "age", "ventricles", "brain", "correlation", "intracranial", "independent")
        return {name: getattr(self, name) for name in names}

    def draw(self, generator: torch.Generator, fixed: Mapping[str, float] | None = None) -> Covariates:
        """One person.

        Args:
            generator: on the CPU.
            fixed: raw name -> value of what is not to be drawn. The others are drawn for that age and sex.

        Raises:
            BundleError: if nobody within the ranges is found.
        """
        fixed = fixed or {}
        for _ in range(TRIES):
            drawn = self._independent(generator, fixed) if self.independent else self._joint(generator, fixed)
            if self._is_inside(drawn, fixed):
                return replace(drawn, **{name: value for name, value in fixed.items() if name in RAW})
        raise BundleError(
            "the population of phantoms lies outside the ranges of the conditions: see configs/phantoms.yaml"
        )

    def _independent(self, generator: torch.Generator, fixed: Mapping[str, float]) -> Covariates:
        uniform = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        values = [low + u * (high - low) for u, (low, high) in zip(uniform, self.ranges.values())]
        sex = fixed.get("sex", float(uniform[0] < 0.5))
        return Covariates(sex, values[1], values[2], values[3], self._intracranial(sex, generator))

    def _joint(self, generator: torch.Generator, fixed: Mapping[str, float]) -> Covariates:
        a, b, c = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
        uniform = float(torch.rand(1, generator=generator, dtype=torch.float64))
        sex = fixed.get("sex", float(uniform < self.male))
        years = fixed.get("age_years", self.age["mean"] + self.age["sd"] * a)
        c = self.correlation * b + math.sqrt(1.0 - self.correlation**2) * c
        ventricles = math.log(self.ventricles["median"]) + self._expected(self.ventricles, years, sex, b)
        brain = self.brain["mean"] + self._expected(self.brain, years, sex, c)
        return Covariates(sex, years, math.exp(ventricles), brain, self._intracranial(sex, generator))

    def _expected(self, of: Mapping[str, float], years: float, sex: float, remainder: float) -> float:
        return of["per_year"] * (years - self.age["mean"]) + of["male_over_female"] * (sex - 0.5) + of["sd"] * remainder

    def _intracranial(self, sex: float, generator: torch.Generator) -> float:
        mean = self.intracranial["male" if sex > 0.5 else "female"]
        z = float(torch.randn(1, generator=generator, dtype=torch.float64).clamp(-2.5, 2.5))
        return mean + self.intracranial["sd"] * z

    def _is_inside(self, drawn: Covariates, fixed: Mapping[str, float]) -> bool:
        return all(
            low <= getattr(drawn, name) <= high for name, (low, high) in self.ranges.items() if name not in fixed
        )


def as_raw(conditions: Conditions, request: Mapping[str, Any], where: str = "") -> dict[str, float]:
    """Raw name -> value of the conditions that a request states, in either unit.

    Args:
        conditions: which there are.
        request: flags or the row of a table.
        where: words for messages.

    Raises:
        BundleError: as `Conditions.from_request`, and for what no head can have.
    """
    given = conditions.in_table(request, where)
    stated = {c.raw for c in conditions if c.name in given or c.raw in given}
    vector = conditions.from_request(given, where, warn=False)
    values = {c.raw: c.denormalise(v) for c, v in zip(conditions, vector.double().tolist(), strict=True)}
    exact = {name: given[name] for name in stated if isinstance(given.get(name), (int, float))}
    found: dict[str, Any] = {name: exact.get(name, values[name]) for name in stated}
    inside = read_number(request.get(RAW[-1]))
    if inside.remark or inside.value is not None:
        found[RAW[-1]] = shown(request[RAW[-1]]) if inside.value is None else inside.value
    for name in found.keys() & POSSIBLE.keys():
        POSSIBLE[name].check(found[name], f"{name}{where}")
    return {name: float(value) for name, value in found.items()}
