# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of the paper (Pinaya et al. 2022): grids of samples over conditions, and samples of models side by side."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from scripts.compute.devices import process_rank
from scripts.compute.processes import wait_for_all_processes
from scripts.conditions.conditions import Condition, Conditions
from scripts.core.config import current_config
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing
from scripts.core.options import whole_number
from scripts.sampling.requests import SampleRequests
from scripts.sampling.saving import SampleSaver
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.nifti import read_volume
from scripts.volumes.pictures import strip

logger = logging.getLogger(__name__)

Cell = Mapping[str, Any]
"""Values of some conditions, by the name of either form: `{"ventricular_vol": 0.5}`."""

CELL_INCHES = 1.3
LABEL_INCHES = 1.4
CHARACTER_INCHES = 0.065
TITLE_INCHES = 0.35
DPI = 150
AXES = ("rows", "columns")
NAME = re.compile(r"[\w+-][\w.+-]*")
SAMPLES = "sample_"
"""What the files of samples begin with: a figure of such a name could overwrite one."""


def cells(figures: Mapping[str, Mapping[str, list[Cell]]], figure: str, axis: str) -> list[Cell]:
    """The `rows` or the `columns` of a figure.

    Raises:
        BundleError: if there is no such figure, or it has not just rows and columns.
    """
    if str(figure) not in figures:
        raise BundleError(f"--figure: there is no '{figure}'; there are {', '.join(figures)}")
    found = figures[str(figure)]
    names = list(found) if isinstance(found, Mapping) else []
    if sorted(names) != sorted(AXES):
        had = f"it has {', '.join(map(str, names))}" if names else f"it is {found}"
        raise BundleError(f"--figures::{figure} must be a map of rows and columns, each a list of cells; {had}")
    return found[axis]


class GridRequests(SampleRequests):
    """One sample for each cell of a grid, all from the same noise, so that they differ by their conditions alone.

    Args:
        conditions, seed: see `SampleRequests`; the flags' conditions hold where a cell says nothing.
        rows, columns: what the cells of each row and of each column have in common.
        unused: flags of sampling that a grid has no use for, with their values.
        figure: its name, which that of its picture will be.

    Attributes:
        labels: of rows and of columns.

    Raises:
        BundleError: for a condition that there is not or that a cell states twice, a value that is none, a grid
            without cells, a flag without effect, or a name that is none of a file.
    """

    def __init__(
        self,
        conditions: Conditions,
        rows: Any,
        columns: Any,
        seed: Any = 0,
        unused: Mapping[str, Any] | None = None,
        figure: Any = "figure",
    ) -> None:
        if not NAME.fullmatch(str(figure)) or str(figure).startswith(SAMPLES):
            raise BundleError(
                f"--figure: '{figure}' cannot be the name of a picture: use letters, digits and . _ + -, and "
                f"begin neither with a dot nor with {SAMPLES}"
            )
        for flag in [flag for flag, value in (unused or {}).items() if value is not None]:
            raise BundleError(f"--{flag} does not go with a figure, whose samples --rows and --columns state")
        super().__init__(conditions, None, seed)
        axes = {"rows": _checked(rows, "rows"), "columns": _checked(columns, "columns")}
        for row in axes["rows"]:
            for column in axes["columns"]:
                _check_stated_once([*row, *column], conditions)
        _check_flags_are_used(axes, conditions)
        self.labels = {axis: [_label(cell, conditions, axis) for cell in some] for axis, some in axes.items()}
        for axis, some in axes.items():
            for cell in some:
                conditions.from_request(cell, f" in --{axis}")  # warns of values outside the training range
        base = self.requested[0]
        pairs = [(row, column) for row in axes["rows"] for column in axes["columns"]]
        self.requested = [_with(_with(base, row, conditions, "rows"), col, conditions, "columns") for row, col in pairs]
        self.start()

    def noise_of(self, index: int) -> int:
        """That of sample 0 for all."""
        return 0


class GridSaver(SampleSaver):
    """A `SampleSaver` whose sidecars say that the noise is that of sample 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.facts["noise_of_index"] = 0


def _checked(given: Any, flag: str) -> list[Cell]:
    if not isinstance(given, Sequence) or not given or not all(isinstance(cell, Mapping) for cell in given):
        raise BundleError(f"--{flag} must be a list such as \"[{{'ventricular_vol':0.1}},{{'ventricular_vol':0.9}}]\"")
    return list(given)


def _condition(flag: str, conditions: Conditions, axis: str) -> tuple[int, Condition]:
    found = [(i, c) for i, c in enumerate(conditions) if flag in (c.name, c.raw)]
    if not found:
        known = ", ".join(name for c in conditions for name in (c.name, c.raw)) or "none"
        raise BundleError(f"--{axis}: there is no condition '{flag}'; there are {known}")
    return found[0]


def _check_stated_once(flags: Sequence[str], conditions: Conditions) -> None:
    for condition in conditions:
        given = [flag for flag in flags if flag in (condition.name, condition.raw)]
        if len(given) > 1:
            raise BundleError(
                f"--rows and --columns state {condition.name} twice in one cell ({', '.join(given)}): which is meant?"
            )


def _check_flags_are_used(axes: Mapping[str, Sequence[Cell]], conditions: Conditions) -> None:
    """Refuse a flag of a condition that every cell states anyway."""
    config = current_config()
    for condition in conditions:
        names = {condition.name, condition.raw}
        for flag in [flag for flag in (condition.name, condition.raw) if config.get(flag) is not None]:
            for axis, some in axes.items():
                if all(names & set(cell) for cell in some):
                    raise BundleError(f"--{flag} has no effect: all --{axis} state {condition.name}; leave it out")


def _with(vector: Tensor, cell: Cell, conditions: Conditions, axis: str) -> Tensor:
    vector = vector.clone()
    for flag, value in cell.items():
        index, condition = _condition(flag, conditions, axis)
        vector[index] = condition.parse(flag, value, f" in --{axis}")
    return vector


def _label(cell: Cell, conditions: Conditions, axis: str) -> str:
    """Raw value and unit, or its word, and the normalised value in brackets, of each condition of a cell."""
    lines = []
    for flag, value in cell.items():
        _, condition = _condition(flag, conditions, axis)
        normalised = condition.parse(flag, value, f" in --{axis}")
        lines.append(f"{condition.name}\n{condition.describe(condition.denormalise(normalised))} ({normalised:.3g})")
    return "\n".join(lines)


def draw_grid(requests: GridRequests, saver: SampleSaver, name: str) -> None:
    """Draw the samples of a grid as `<name>.png` beside them, when all processes have sampled theirs.

    Raises:
        BundleError: if a volume is damaged: what to do then.
    """
    wait_for_all_processes()
    if process_rank()[0] == 0:
        paths = [Path(f"{saver.stem(requests.seed, i)}.nii.gz") for i in range(len(requests.vectors))]
        width = len(requests.labels["columns"])
        rows = [[strip(_sampled(path)) for path in paths[i : i + width]] for i in range(0, len(paths), width)]
        _write(grid_figure(rows, requests.labels["rows"], requests.labels["columns"]), saver.folder / f"{name}.png")


def _sampled(path: Path) -> np.ndarray:
    try:
        return read_volume(path)
    except BundleError as error:
        raise BundleError(f"{error}; remove this file and run the command again, which samples it anew") from error


def draw_models(models: Any, count: Any, output_dir: str) -> None:
    """Draw the first volumes of several folders, one row a folder, as `models.png`.

    Args:
        models: name of a model -> folder of its samples.
        count: volumes of each.
        output_dir: where to write.

    Raises:
        BundleError: if there are no models, one has no folder, or a folder has no volumes or fewer than `count`.
    """
    if not isinstance(models, Mapping) or not models:
        raise BundleError(
            "--models must map names to folders of samples, such as \"{'LDM':'output','real':'dataset'}\""
        )
    wanted = whole_number(count, "count", least=1)
    rows = []
    seen: dict[Path, str] = {}
    for name, path in models.items():
        if path is None or isinstance(path, (Sequence, Mapping)) and not isinstance(path, str):
            raise BundleError(f"--models: {name} must have one folder, got {path}")
        other = seen.setdefault(Path(str(path)).resolve(), str(name))
        if other != str(name):
            logger.warning(f"--models: {other} and {name} are one folder, {path}: their rows show the same volumes")
        folder = VolumeFolder(path, "models")
        if len(folder) < wanted:
            raise BundleError(f"--models: {name} has {len(folder)} volumes in {folder.folder}, --count is {wanted}")
        rows.append([strip(folder[i][0, 0].numpy()) for i in range(wanted)])
    _write(grid_figure(rows, [str(name) for name in models], [""] * wanted), make_folder(output_dir) / "models.png")


def grid_figure(
    rows: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Figure:
    """A labelled grid of pictures.

    Args:
        rows: strips of middle planes as `scripts.volumes.nifti.mid_planes` makes them, (height, width) uint8.
        row_labels, column_labels: on the left and on top, as they are: a `$` begins no formula.
    """
    ratio = max(picture.shape[1] / picture.shape[0] for row in rows for picture in row)
    lines = max(label.count("\n") + 1 for label in column_labels)
    longest = max(len(line) for label in row_labels for line in label.split("\n"))
    left = max(LABEL_INCHES, longest * CHARACTER_INCHES)
    size = (left + len(column_labels) * CELL_INCHES * ratio, len(rows) * CELL_INCHES + lines * TITLE_INCHES)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(len(rows), len(column_labels), squeeze=False)
    for row, line, label in zip(axes, rows, row_labels):
        for cell, picture in zip(row, line):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=255)
            cell.set_xticks([])
            cell.set_yticks([])
        row[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", labelpad=6, parse_math=False)
    for cell, label in zip(axes[0], column_labels):
        cell.set_title(label, fontsize=8, parse_math=False)
    return figure


def _write(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    logger.info(f"wrote {path}")
