# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Steps of the preparation that are off unless they are asked for: super-resolution, bias field, skull stripping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.core.options import is_absent, whole_number, yes_or_no
from scripts.preparation.bias_field import without_bias_field
from scripts.preparation.skull_stripping import Stripper, TemplateStripper
from scripts.preparation.steps import Record, TargetSpace, step_settings
from scripts.volumes.scans import Scan


class SuperResolve:
    """Replaces the scan by one of finer, isotropic voxels in the same place.

    Args:
        method: name of one in `methods`; None leaves the scan as it is.
        methods: name -> a callable from `scripts.volumes.scans.Scan` to `Scan`.

    Raises:
        BundleError: if there is no such method.
    """

    def __init__(self, method: Any, methods: Mapping[str, Callable[[Scan], Scan]]) -> None:
        self.method = _chosen(method, methods, "super_resolution")
        self.function = None if self.method is None else methods[self.method]

    def __call__(self, record: Record) -> Record:
        """The record with its scan, if the method is on.

        Raises:
            BundleError: if the method fails.
        """
        return record if self.function is None else record.updated(scan=self.function(record.scan))

    def settings(self) -> dict[str, Any]:
        """The method and its own settings."""
        if self.function is None:
            return {"method": None}
        return {"method": self.method, **step_settings(self.function)}


class CorrectBiasField:
    """Divides the scan by its bias field; see `scripts.preparation.bias_field.without_bias_field`.

    Args:
        enabled: whether to.
        seed: of ANTs, above 0.
    """

    def __init__(self, enabled: Any, seed: Any = 1) -> None:
        self.enabled, self.seed = yes_or_no(enabled, "bias_field"), whole_number(seed, "seed", least=1)

    def __call__(self, record: Record) -> Record:
        """The record with its scan corrected, if the step is on."""
        return record.updated(scan=without_bias_field(record.scan, self.seed)) if self.enabled else record


class StripSkull:
    """Sets all but the brain to 0.

    Args:
        space: the grid.
        stripper: name of one in `strippers`; None leaves the skull on.
        strippers: name -> what makes a `scripts.preparation.skull_stripping.Stripper`; it is called in each process.

    Raises:
        BundleError: if there is no such stripper.
    """

    def __init__(self, space: TargetSpace, stripper: Any, strippers: Mapping[str, Callable[[], Stripper]]) -> None:
        self.space, self.name = space, _chosen(stripper, strippers, "skull_strip")
        self.make = None if self.name is None else strippers[self.name]

    @cached_property
    def stripper(self) -> Stripper | None:
        """The stripper, made once."""
        return None if self.make is None else self.make()

    def __call__(self, record: Record) -> Record:
        """The record with its volume stripped, if a stripper is chosen.

        Raises:
            BundleError: if the stripper fails or finds no brain.
        """
        if self.stripper is None:
            return record
        brain = self.stripper.mask(record.on_grid(), self.space.grid, record.registered().scale)
        return record.updated(volume=record.on_grid() * brain, skull_stripped=True)

    def settings(self) -> dict[str, Any]:
        """The stripper, and the hash of its weights if it has some."""
        weights = getattr(self.make, "keywords", {}).get("weights")
        there = weights is not None and Path(str(weights)).is_file()
        return {"stripper": self.name, **({"weights_sha256": file_hash(weights)} if there else {})}  # type: ignore[arg-type]


def template_stripper(space: TargetSpace, seed: int = 1) -> Stripper:
    """The stripper that needs nothing but the template."""
    return TemplateStripper(space.template, seed)


def _chosen(name: Any, known: Mapping[str, Any], flag: str) -> str | None:
    if is_absent(name):
        return None
    if str(name) not in known:
        raise BundleError(f"--{flag}: there is no '{name}'; there are {', '.join(known)}")
    return str(name)
