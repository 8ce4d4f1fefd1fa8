# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Steps of the preparation that stand in for slow ones, or go wrong; the processes of a test import little else."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from scripts.preparation.registration import Registration
from scripts.preparation.steps import NoMatchError, Record


@dataclass(frozen=True)
class KnownPose:
    """In place of the registration: the scan lies on the template as its header says."""

    scale: float = 1.0

    columns: ClassVar[Mapping[str, str]] = {"similarity": "as if it had been fitted"}

    def __call__(self, record: Record) -> Record:
        return record.updated(found=Registration(np.eye(4), self.scale, 0.9)).with_measured(similarity=0.9)


@dataclass(frozen=True)
class LiesAt:
    """In place of the registration: the template is taken to the scan by this 4 x 4 matrix."""

    rigid: Sequence[Sequence[float]]

    columns: ClassVar[Mapping[str, str]] = {"similarity": "as if it had been fitted"}

    def __call__(self, record: Record) -> Record:
        return record.updated(found=Registration(np.array(self.rigid), 1.0, 0.9)).with_measured(similarity=0.9)


@dataclass(frozen=True)
class KilledOn:
    """Ends its process, as a machine without memory would, at the scan of this name."""

    name: str

    def __call__(self, record: Record) -> Record:
        if record.name == self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return record


@dataclass(frozen=True)
class FailsOn:
    """Fails as code with a mistake does, at the scan of this name."""

    name: str

    def __call__(self, record: Record) -> Record:
        if record.name == self.name:
            raise ZeroDivisionError("division by zero")
        return record


@dataclass(frozen=True)
class LostOn:
    """Matches nowhere, at the scan of this name."""

    name: str

    def __call__(self, record: Record) -> Record:
        if record.name == self.name:
            raise NoMatchError(
                "does not match (similarity 0.21 at 1.16 of its length): is it a T1-weighted head?", record
            )
        return record


@dataclass(frozen=True)
class Holds:
    """Changes nothing; it holds what a test gives it."""

    held: Any = None

    def __call__(self, record: Record) -> Record:
        return record


class Way:
    """Says what it does."""

    def __init__(self, strength: int) -> None:
        self.tool, self.strength = object(), strength

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength}


def pass_on(record: Record, *held: Any, **named: Any) -> Record:
    return record
