# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.curves RUN_DIR PICTURE`: the losses and validations of a training as one picture.

Losses are read from `losses.jsonl`, validations from `validation.tsv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.core.errors import BundleError
from scripts.core.files import replacing
from scripts.core.programs import errors_in_one_line
from scripts.core.tables import read_table
from scripts.training.loss_record import FILE, read_lines
from scripts.training.validation import TABLE

Curve = tuple[np.ndarray, np.ndarray]
"""Iterations, rising, and the values at them."""

HIDDEN = ("latent_mean", "latent_std_channel")
COLUMNS, PANEL_INCHES = 3, (4.0, 2.6)
SMOOTHED = 50


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw with command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="folder of a training, such as runs/autoencoder")
    parser.add_argument("picture", help="PNG to write")
    options = parser.parse_args(arguments)
    with errors_in_one_line():
        draw(losses(options.run_dir), validations(options.run_dir), options.picture)


def losses(run_dir: str | Path) -> dict[str, Curve]:
    """The losses of a training by name.

    Raises:
        BundleError: if the folder holds no `losses.jsonl` with any.
    """
    found: dict[str, dict[int, float]] = {}
    for line in read_lines(Path(run_dir) / FILE):
        for name, value in line.get("losses", {}).items():
            found.setdefault(name, {})[line["iteration"]] = value
    if not found:
        raise BundleError(f"there are no losses in {run_dir}: give the --run_dir of a training")
    return {name: _curve(values) for name, values in found.items()}


def validations(run_dir: str | Path) -> dict[str, Curve]:
    """The validations of a training by name; none if there was no validation."""
    table = Path(run_dir) / TABLE
    if not table.is_file():
        return {}
    rows = read_table(table, ("iteration",))
    names = [name for name in rows[0] if name not in ("epoch", "iteration")]
    return {name: _curve({int(row["iteration"]): float(row[name]) for row in rows}) for name in names}


def _curve(values: Mapping[int, float]) -> Curve:
    iterations = sorted(values)
    return np.array(iterations), np.array([values[iteration] for iteration in iterations])


def draw(training: Mapping[str, Curve], validation: Mapping[str, Curve], picture: str | Path) -> None:
    """One panel for each training loss and each validation; bands of one validation share a panel.

    Raises:
        BundleError: if the picture cannot be written.
    """
    panels = _panels(training, validation)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure((COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, curves) in enumerate(panels.items(), start=1):
        _panel(figure.add_subplot(rows, COLUMNS, place), title, curves)
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=80)


def _panels(training: Mapping[str, Curve], validation: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    panels = {f"training: {name}": {"": curve} for name, curve in training.items()}
    for name, curve in validation.items():
        if not name.removeprefix("val_").startswith(HIDDEN):
            whole, _, part = name.partition("_band")
            panels.setdefault(f"held out: {whole}{' by band' * bool(part)}", {})[part and f"band {part}"] = curve
    return panels


def _panel(axes: Any, title: str, curves: Mapping[str, Curve]) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    for label, (iterations, values) in curves.items():
        many = len(values) > 4 * SMOOTHED
        axes.plot(iterations, values, linewidth=0.5 if many else 1.2, alpha=0.4 if many else 1.0, label=label)
        if many:
            mean = np.convolve(values, np.full(SMOOTHED, 1.0 / SMOOTHED), mode="valid")
            axes.plot(iterations[SMOOTHED - 1 :], mean, color="black", linewidth=1.0)
    if all(values.min() > 0 for _, values in curves.values()) and _spread(curves) > 20:
        axes.set_yscale("log")
    if any(curves):
        axes.legend(fontsize=6)


def _spread(curves: Mapping[str, Curve]) -> float:
    values = np.concatenate([values for _, values in curves.values()])
    return float(values.max() / values.min())


if __name__ == "__main__":
    main()
