# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of volumes in rows, for looking at a training while it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from scripts.core.files import replacing
from scripts.volumes.nifti import mid_planes, plane_tiles, write_picture

FOLDER = "figures"
DPI = 100
LARGEST_DIFFERENCE = 0.2
_PLANE_HEIGHT = 192  # pixels of a row's planes before they are drawn
_ROW_INCHES = 1.6
_LABEL_WIDTH = 0.5  # of that of the planes
_CAPTION_PIXELS = 12


def figure_path(run_dir: str | os.PathLike, name: str, iteration: int) -> Path:
    """Where the picture `name` of an iteration lies in a run folder."""
    return Path(run_dir) / FOLDER / f"{name}_iteration-{iteration:06d}.png"


def figures_of(run_dir: str | os.PathLike, iteration: int) -> dict[str, Path]:
    """Name -> file of every picture that was drawn at an iteration."""
    end = figure_path(run_dir, "", iteration).name
    found = sorted((Path(run_dir) / FOLDER).glob(f"[!.]*{end}"))  # not what a killed process has left half written
    return {path.name.removesuffix(end): path for path in found}


def captioned_planes(volume: np.ndarray, lines: Sequence[str], height: int = 256) -> np.ndarray:
    """The middle planes of a volume with R and L at its sides, and lines of text below them.

    Args:
        volume: as for `scripts.volumes.nifti.mid_planes`.
        lines: of the caption.
        height: of the planes in pixels.

    Returns:
        (height and that of the text, width) uint8.
    """
    tiles = plane_tiles(volume, height)
    font = ImageFont.load_default(_CAPTION_PIXELS)
    width = sum(tile.shape[1] for tile in tiles)
    wrapped = [part for line in lines for part in _wrapped(line, width - 2 * _CAPTION_PIXELS, font)]
    text = np.zeros((round((len(wrapped) + 0.5) * 1.35 * _CAPTION_PIXELS), width), np.uint8)
    picture = Image.fromarray(np.concatenate([np.concatenate(tiles, axis=1), text]))
    draw = ImageDraw.Draw(picture)
    edge = tiles[0].shape[1]
    for tile in tiles[1:]:
        for side, anchor, x in (("R", "lm", edge + 4), ("L", "rm", edge + tile.shape[1] - 4)):
            draw.text((x, height // 2), side, fill=255, font=font, anchor=anchor)
        edge += tile.shape[1]
    for number, line in enumerate(wrapped):
        draw.text((_CAPTION_PIXELS, height + round(number * 1.35 * _CAPTION_PIXELS)), line, fill=255, font=font)
    return np.asarray(picture)


def _wrapped(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines of at most so many pixels, broken between words."""
    lines = [""]
    for word in text.encode("ascii", "replace").decode("ascii").split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
    return lines


def reconstruction_picture(
    names: Sequence[str], originals: Sequence[np.ndarray], copies: Sequence[np.ndarray]
) -> np.ndarray:
    """A row for each volume: three middle planes of it, of its reconstruction, and of their absolute difference.

    Args:
        names: of the volumes.
        originals, copies: strips of planes as `scripts.volumes.nifti.mid_planes` makes them, (height, width) uint8,
            alike in shape. Differences are of these 8-bit intensities, and shown from 0 to 0.2.

    Returns:
        (height, width, 3) uint8.
    """
    figure, rows = _grid(len(names), (1.0, 1.0, 1.0), originals[0].shape)
    for axes, name, original, copy in zip(rows, names, originals, copies, strict=True):
        difference = np.abs(original.astype(np.float32) - copy) / 255.0
        _show(axes[0], original, name)
        _show(axes[1], copy, "reconstruction")
        _show(axes[2], difference, f"difference, 0 to {LARGEST_DIFFERENCE}", "inferno", LARGEST_DIFFERENCE)
    return _pixels(figure)


def sample_picture(labels: Sequence[str], planes: Sequence[np.ndarray]) -> np.ndarray:
    """A row for each sample: its label, then its three middle planes.

    Args:
        labels: a few short lines each.
        planes: strips of planes as `scripts.volumes.nifti.mid_planes` makes them, (height, width) uint8.

    Returns:
        (height, width, 3) uint8.
    """
    figure, rows = _grid(len(labels), (_LABEL_WIDTH, 1.0), planes[0].shape)
    for axes, label, plane in zip(rows, labels, planes, strict=True):
        where = {"ha": "right", "va": "center", "transform": axes[0].transAxes}
        axes[0].text(1.0, 0.5, label, fontsize=8, parse_math=False, **where)
        axes[0].set_axis_off()
        _show(axes[1], plane, "")
    return _pixels(figure)


def signed_picture(rows: Sequence[tuple[str, np.ndarray, float]]) -> np.ndarray:
    """A row of three middle planes for each map, in greys where its limit is 0, else from blue over white to red.

    Args:
        rows: title, planes and limit of each. Grey planes are as `scripts.volumes.nifti.mid_planes` makes them,
            (height, width) uint8; coloured ones are numbers of the same shape, drawn from -limit to limit.

    Returns:
        (height, width, 3) uint8.
    """
    figure, places = _grid(len(rows), (1.0,), rows[0][1].shape)
    for axes, (title, planes, limit) in zip(places[:, 0], rows, strict=True):
        if limit:
            axes.imshow(planes, cmap="bwr", vmin=-limit, vmax=limit)
            axes.set_title(title, fontsize=8, parse_math=False)
            axes.set_axis_off()
        else:
            _show(axes, planes, title)
    return _pixels(figure)


def signed_strip(values: np.ndarray, limit: float) -> np.ndarray:
    """The three middle planes of a map (X, Y, Z), as `strip` has them: numbers from -limit to limit, in 255 steps."""
    return (strip(0.5 + 0.5 * values / limit).astype(np.float32) / 127.5 - 1.0) * limit


def write_film(path: str | os.PathLike, frames: Sequence[np.ndarray], labels: Sequence[str], seconds: float) -> None:
    """Write frames, (height, width) uint8, as an endless animated GIF that goes there and back, each with its label."""
    images = [Image.fromarray(frame) for frame in frames]
    for image, label in zip(images, labels, strict=True):
        ImageDraw.Draw(image).text((6, 4), label, fill=255)
    images += images[-2:0:-1]
    with replacing(path) as temporary:
        later, milliseconds = images[1:], round(1000 * seconds)
        images[0].save(temporary, format="GIF", save_all=True, append_images=later, duration=milliseconds, loop=0)


def pair_figure(
    labels: Sequence[tuple[str, str]], firsts: Sequence[np.ndarray], seconds: Sequence[np.ndarray]
) -> Figure:
    """A row for each pair of volumes: the three middle planes of both, side by side.

    Args:
        labels: of the two volumes of each pair.
        firsts, seconds: strips of planes as `scripts.volumes.nifti.mid_planes` makes them, (height, width) uint8.
    """
    figure, rows = _grid(len(labels), (1.0, 1.0), firsts[0].shape)
    for axes, pair, *strips in zip(rows, labels, firsts, seconds, strict=True):
        for axis, label, planes in zip(axes, pair, strips, strict=True):
            _show(axis, planes, label)
    return figure


def strip(volume: np.ndarray) -> np.ndarray:
    """The three middle planes of a volume (X, Y, Z), as the pictures take them."""
    return mid_planes(volume, _PLANE_HEIGHT)


def write(run_dir: str | os.PathLike, name: str, iteration: int, pixels: np.ndarray) -> Path:
    """Write a picture of an iteration into the run folder, as PNG."""
    path = figure_path(run_dir, name, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, pixels)
    return path


def _grid(rows: int, widths: Sequence[float], shape: tuple[int, ...]) -> tuple[Figure, np.ndarray]:
    size = sum(widths) * _ROW_INCHES * shape[1] / shape[0], rows * (_ROW_INCHES + 0.25)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)


def _show(axes: Axes, plane: np.ndarray, title: str, colours: str = "gray", top: float = 255.0) -> None:
    axes.imshow(plane, cmap=colours, vmin=0.0, vmax=top)
    axes.set_title(title, fontsize=8, parse_math=False)  # names of files may have a dollar
    axes.set_axis_off()


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
