# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The steps from a raw scan to a volume on the grid: each takes one record and returns it changed."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import numpy as np
from scipy import ndimage

from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.preparation.registration import Registration, Template, blurred, load_template, register, resample
from scripts.volumes.grid import Grid
from scripts.volumes.scans import Scan, ScanError, canonical

DEEP_MM = 8.0
TILTED_DEGREES = 60.0
SCALES = (0.7, 1.12)
"""Lengths of heads over the template's that are prepared."""
PLAIN = (bool, int, float, str, type(None))
FORMER_PATHS = (
    "scripts.preparation_steps.Reorient",
    "scripts.preparation_steps.FromDarkest",
    "scripts.preparation_steps.Register",
    "scripts.preparation_steps.Resample",
    "scripts.preparation_steps.ScaleIntensities",
    "scripts.optional_steps.SuperResolve",
    "scripts.optional_steps.CorrectBiasField",
    "scripts.optional_steps.StripSkull",
    "scripts.check_step.CheckScan",
    "scripts.covariate_volumes.MeasureVolumes",
)
"""What the sidecars of version 2.0.0 call this package's steps."""


@dataclass(frozen=True)
class Record:
    """One scan on its way through the steps.

    Attributes:
        name: what its results are called.
        scan: the scan, in its own millimetres.
        original: the scan as it was read.
        lacking: raw names of the conditions that no table states of it.
        row: what the tables say of it, by column.
        raw: the file that was read.
        found: how the scan lies on the template, once it is registered.
        volume: intensities on the grid, once it is resampled; 0 to 1, once it is scaled.
        labels: a label map in the template's millimetres, if a step made one.
        skull_stripped: whether what is not brain was removed, by a step or before.
        measured: columns for the dataset's table.
        covariates: raw name of a condition -> its measured value.
        warnings: what the user should look at.
    """

    name: str
    scan: Scan
    original: Scan
    lacking: tuple[str, ...] = ()
    row: Mapping[str, str] = field(default_factory=dict)
    raw: Path = Path()
    found: Registration | None = None
    volume: np.ndarray | None = None
    labels: Scan | None = None
    skull_stripped: bool = False
    measured: Mapping[str, Any] = field(default_factory=dict)
    covariates: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def updated(self, **changes: Any) -> Record:
        """The record with other attributes."""
        return dataclasses.replace(self, **changes)

    def with_measured(self, **columns: Any) -> Record:
        """The record with further columns."""
        return self.updated(measured={**self.measured, **columns})

    def warned(self, condition: bool, message: str) -> Record:
        """The record, with a further warning if the condition holds."""
        return self.updated(warnings=(*self.warnings, message)) if condition else self

    def registered(self) -> Registration:
        """How the scan lies on the template.

        Raises:
            ScanError: if no step has registered it.
        """
        if self.found is None:
            raise ScanError("wrong steps", "`steps` uses the registration of a scan before it is registered")
        return self.found

    def on_grid(self) -> np.ndarray:
        """The volume.

        Raises:
            ScanError: if no step has resampled it.
        """
        if self.volume is None:
            raise ScanError("wrong steps", "`steps` uses the volume on the grid before the scan is resampled")
        return self.volume


class NoMatchError(ScanError):
    """A scan that lies on the template nowhere.

    Args:
        message: why it is thought so.
        record: the scan, with the place where the search ended.
    """

    def __init__(self, message: str, record: Record) -> None:
        super().__init__("no match", message)
        self.record = record


Step = Callable[[Record], Record]


class TargetSpace:
    """Where scans shall lie: the template and the grid, both in MNI152 millimetres.

    Args:
        grid: of the volumes.
        template, template_brain: the head to register to, and its brain mask.
    """

    def __init__(self, grid: Grid, template: str | os.PathLike, template_brain: str | os.PathLike) -> None:
        self.grid, self.files = grid, {"template": template, "template_brain": template_brain}

    @cached_property
    def template(self) -> Template:
        """The template, read once."""
        return load_template(self.files["template"], self.files["template_brain"])

    @cached_property
    def brain(self) -> np.ndarray:
        """The template's brain on the grid, boolean."""
        return self.template.brain_on(self.grid.shape, self.grid.affine)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Plain data for the sidecars; what decides where a prepared volume lies."""
        files = {name: {"name": Path(path).name, "sha256": file_hash(path)} for name, path in self.files.items()}
        return {**files, "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()}}

    def __getstate__(self) -> dict[str, Any]:
        return {"grid": self.grid, "files": self.files}


def step_settings(step: Any) -> dict[str, Any]:
    """Plain data that decide what a step does: its numbers and words.

    A step that has more to say has a method `settings`. Of a step from outside this package all counts that it holds:
    lists and mappings too, and what has such a method itself; only a `TargetSpace` does not, whose facts stand in the
    sidecars already.

    Raises:
        BundleError: if a step from outside holds something else, and has no such method.
    """
    stated = getattr(step, "settings", None)
    if stated is not None:
        return json.loads(json.dumps(_told(stated(), step, "settings()")))
    made = _made(step)
    if not _is_outside(made):
        return _plain(_held(step))
    if isinstance(step, MethodType) and not isinstance(step.__self__, type):
        return step_settings(step.__self__)
    if made is step:  # a function, which its path and its version tell
        return _plain(_held(step))
    held = {name: value for name, value in _held(step).items() if not isinstance(value, TargetSpace)}
    return json.loads(json.dumps({name: _told(value, step, name) for name, value in held.items()}))


def step_identity(step: Any) -> dict[str, Any]:
    """What the sidecars say of a step, under its name in `steps`; a scan of which they say another is prepared again.

    It is the step's settings and its `version`, an attribute of the class or function, 1 where there is none: whoever
    changes what a step does counts it up. The import path counts for a step from outside this package alone.
    """
    made = _made(step)
    path = {"step": _path(made)} if _is_outside(made) else {}
    return {"version": getattr(made, "version", 1), **path, **step_settings(step)}


def recognised(steps: Any) -> dict[str, Any]:
    """The steps of a sidecar as `step_identity` has them, whichever version wrote it; empty if they are none.

    Version 2.0.0 wrote import paths of this package's steps and no versions.
    """
    if not isinstance(steps, Mapping) or not all(isinstance(step, Mapping) for step in steps.values()):
        return {}
    return {
        name: {"version": 1, **{k: v for k, v in step.items() if k != "step" or v not in FORMER_PATHS}}
        for name, step in steps.items()
    }


def _made(step: Any) -> Any:
    """The function or class that a step is of."""
    return step.func if isinstance(step, functools.partial) else step if hasattr(step, "__qualname__") else type(step)


def _path(made: Any) -> str:
    return f"{made.__module__}.{made.__qualname__}"


def _is_outside(made: Any) -> bool:
    return made.__module__.partition(".")[0] != __name__.partition(".")[0]


def _held(step: Any) -> dict[str, Any]:
    """What a step was given; a property that it keeps follows from the rest."""
    if isinstance(step, functools.partial):
        return {**({"args": step.args} if step.args else {}), **step.keywords}
    if dataclasses.is_dataclass(step):
        return {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    held = getattr(step, "__dict__", {})
    return {n: value for n, value in held.items() if not isinstance(getattr(type(step), n, None), cached_property)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, PLAIN)}


def _told(value: Any, step: Any, name: str) -> Any:
    """A value that a step holds under some name, as what JSON can say."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, (list, tuple)):
        return [_told(one, step, name) for one in value]
    if isinstance(value, Mapping):
        return {str(_told(key, step, name)): _told(one, step, name) for key, one in value.items()}
    if callable(getattr(value, "settings", None)) and not isinstance(value, type):
        return {"class": type(value).__name__, **step_identity(value)}
    raise BundleError(
        f"the step {_path(_made(step))}: a rerun would not notice another `{name}`, since a sidecar cannot hold a "
        f"{type(value).__name__}; give the step a method settings() that returns what its result depends on, as "
        "numbers, words, lists and mappings"
    )


@dataclass(frozen=True)
class Reorient:
    """Permutes and flips the axes so that they run nearest to right, front and up; no voxel changes its value."""

    def __call__(self, record: Record) -> Record:
        """The record with its scan turned."""
        return record.updated(scan=canonical(record.scan))


@dataclass(frozen=True)
class FromDarkest:
    """Makes the scan's darkest value 0, what lies below it included: offsets and single voxels far off have no say.

    Args:
        percentile: 0..100, of all voxels, that counts as the darkest.
    """

    percentile: float = 0.1

    def __call__(self, record: Record) -> Record:
        """The record with its scan from 0 up."""
        scan = record.scan
        lowest = np.float32(np.percentile(scan.data, self.percentile))
        return record.updated(scan=Scan(np.maximum(scan.data - lowest, 0.0), scan.affine))


@dataclass(frozen=True)
class Register:
    """Finds the rigid motion onto the template; see `scripts.preparation.registration.register`.

    Args:
        space: the template.
        seed: of the points at which ANTs samples its metric, above 0.
        enough_similarity: below this it is tried from more starts.
        min_similarity: below this after all starts the scan is refused.
        scales: least and largest length of a head over the template's; a scan that fits beyond is refused. Adults have
            0.83 to 1.05.
    """

    space: TargetSpace
    seed: int = 1
    enough_similarity: float = 0.4
    min_similarity: float = 0.25
    scales: Sequence[float] = SCALES

    columns: ClassVar[Mapping[str, str]] = {
        "similarity": "correlation with the template in the brain, after a fit with one scale",
        "head_scale": "length in the head over length in the template",
    }

    def __call__(self, record: Record) -> Record:
        """The record with `found`.

        Raises:
            NoMatchError: if the scan does not match the template, or only at another size than that of a head.
        """
        found = register(record.scan, self.space.template, self.seed, self.enough_similarity, self.scales)
        why = self._why_not(found)
        if why:
            raise NoMatchError(why, record.updated(found=found))
        tilt = f"it was turned by {found.tilt:.0f} degrees: check its header, left and right"
        record = record.updated(found=found).warned(found.tilt > TILTED_DEGREES, tilt)
        return record.with_measured(similarity=round(found.similarity, 4), head_scale=round(found.scale, 4))

    def _why_not(self, found: Registration) -> str:
        low, high = self.scales
        if found.similarity < self.min_similarity:
            return (
                f"does not match the template (similarity {found.similarity:.2f} at {found.scale:.2f} of its length, "
                f"at least {self.min_similarity:g} needed): is it a T1-weighted head?"
            )
        if low <= found.scale <= high:
            return ""
        return (
            f"fits the template only at {found.scale:.2f} of its length (similarity {found.similarity:.2f}), and heads "
            f"have {low:g} to {high:g}: if it is so small or large, give --steps::register::scales "
            f'"[{min(low, found.scale - 0.05):.2f},{max(high, found.scale + 0.05):.2f}]"'
        )

    def __post_init__(self) -> None:
        try:
            low, high = (float(one) for one in self.scales)
        except (TypeError, ValueError):
            low, high = 0.0, 0.0
        if not 0.0 < low < high < float("inf"):
            raise ScanError(
                "wrong steps", f"`steps::register::scales` needs two lengths, such as [0.7,1.12], got {self.scales}"
            )

    def settings(self) -> dict[str, Any]:
        """The numbers; the limits of size only where they are others than the default, which sidecars of 2.1.0 lack."""
        stated = {"seed": self.seed, "enough_similarity": self.enough_similarity, "min_similarity": self.min_similarity}
        return stated if tuple(self.scales) == SCALES else {**stated, "scales": [float(one) for one in self.scales]}


@dataclass(frozen=True)
class Resample:
    """Brings the scan onto the grid in one interpolation, after a blur against aliasing; 0 outside its field of view.

    Args:
        space: the grid.
        order: 3 for cubic B-splines, 1 for linear.
    """

    space: TargetSpace
    order: int = 3

    def __call__(self, record: Record) -> Record:
        """The record with `volume`."""
        grid = self.space.grid
        finest = float(np.abs(grid.spacing).min())
        scan = blurred(record.scan, finest)
        volume = resample(scan, record.registered().rigid, grid.shape, grid.affine, order=self.order)
        return record.updated(volume=volume)


@dataclass(frozen=True)
class ScaleIntensities:
    """Scales the volume to 0..1; see `scale_intensities`."""

    space: TargetSpace
    percentile: float = 99.8
    level: float = 0.8

    def __post_init__(self) -> None:
        if not (0 < self.percentile <= 100 and 0 < self.level <= 1):
            raise ScanError(
                "wrong steps",
                f"`steps::scale` needs a percentile in 0..100 and a level in 0..1, got {self.percentile:g} and "
                f"{self.level:g}",
            )

    def __call__(self, record: Record) -> Record:
        """The record with its volume from 0 to 1."""
        space = self.space
        scaled = scale_intensities(record.on_grid(), space.brain, space.grid, self.percentile, self.level)
        return record.updated(volume=scaled)


def scale_intensities(image: np.ndarray, brain: np.ndarray, grid: Grid, percentile: float, level: float) -> np.ndarray:
    """Intensities 0..1, the same tissue at nearly the same value in every head.

    0 is the image's minimum. `level` is a high percentile deep in the brain (at least 8 mm inside the
    template's), which is white matter: fat and vessels, whose brightness varies with the protocol, have no say,
    and what of them exceeds 1 is cut.

    Args:
        image: shape of the grid, any unit.
        brain: boolean, same shape.
        grid: for its voxel size.
        percentile: 0..100, of the voxels deep in the brain.
        level: the value that this percentile becomes, up to 1.

    Returns:
        Float32 array of the same shape.

    Raises:
        ScanError: if the deep brain is no brighter than the minimum.
    """
    deep = ndimage.distance_transform_edt(brain, sampling=np.abs(grid.spacing)) > DEEP_MM
    low, high = float(image.min()), float(np.percentile(image[deep], percentile))
    if high <= low:
        raise ScanError("no match", "is dark where the template has its brain: is it a T1-weighted head?")
    return np.clip((image - low) * (level / (high - low)), 0.0, 1.0).astype(np.float32)
