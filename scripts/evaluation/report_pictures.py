# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the evaluation's report, as PNG in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from scripts.volumes.folders import VolumeFolder
from scripts.volumes.pictures import sample_picture, strip

SHOWN = 3
BINS = 30
RESOLUTION = 110  # dots an inch, for the screen and for paper


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION)
    return buffer.getvalue()


def volumes_picture(folders: Mapping[str, VolumeFolder]) -> tuple[bytes, list[Path]]:
    """The middle planes of a few volumes of each folder, evenly spread over it, a row each, and the rows' files.

    Args:
        folders: label -> volumes, 0..1; what lies outside is cut.
    """
    labels, planes, paths = [], [], []
    for label, folder in folders.items():
        for index in np.linspace(0, len(folder) - 1, min(SHOWN, len(folder))).round().astype(int):
            paths.append(folder.paths[index])
            labels.append(f"{label}\n{folder.paths[index].name}")
            planes.append(strip(folder[int(index)][0, 0].numpy()))
    buffer = io.BytesIO()
    Image.fromarray(sample_picture(labels, planes)).save(buffer, format="PNG")
    return buffer.getvalue(), paths


def histogram(name: str, sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """How a similarity is distributed over the pairs of each set, with the means.

    Args:
        name: of the metric, a column of the rows.
        sets: label -> a row for each pair.
    """
    values = {label: np.array([row[name] for row in rows], dtype=float) for label, rows in sets.items()}
    everything = np.concatenate(list(values.values()))
    bins = np.histogram_bin_edges(everything, bins=BINS).tolist()
    figure = Figure(figsize=(5.0, 2.8), layout="constrained")
    axes = figure.subplots()
    for number, (label, found) in enumerate(values.items()):
        weights = np.full(len(found), 1.0 / len(found))
        axes.hist(found, bins=bins, weights=weights, histtype="step", color=f"C{number}", label=label)
        axes.axvline(found.mean(), color=f"C{number}", linestyle=":", linewidth=1)
    axes.set_xlabel(f"{name} of a pair (dotted: means)")
    axes.set_ylabel("fraction of pairs")
    axes.legend(fontsize=8, frameon=False)
    return png(figure)
