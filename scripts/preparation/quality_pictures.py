# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of prepared scans with the template's outlines, by which a person tells good registrations from bad."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from scripts.core.files import make_folder, replacing
from scripts.preparation.registration import Template, foreground, resized_about
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import mid_planes
from scripts.volumes.scans import Scan

BRAIN_COLOUR = (255, 60, 40)
HEAD_COLOUR = (80, 170, 255)
THUMBNAILS = "thumbnails"


class QualityPictures:
    """Writes a picture and a thumbnail of each prepared scan.

    The sagittal, coronal and axial middle planes, the subject's right on the left of the picture; over them the
    outline of the template's brain in red and of its head in blue, both brought to the size of the scanned head, so
    that they lie on its surfaces where the registration is right.

    Args:
        template: the head that scans are registered to.
        height, thumbnail_height: of the pictures in pixels.
    """

    def __init__(self, template: Template, height: int = 320, thumbnail_height: int = 96) -> None:
        self.height, self.thumbnail_height = height, thumbnail_height
        self.centre = template.centre
        self.brain = Scan(template.in_brain.astype(np.float32), template.head.affine)
        self.head = Scan(_filled(foreground(template.head.data)).astype(np.float32), template.head.affine)

    def write(self, folder: str | os.PathLike, name: str, volume: np.ndarray, grid: Grid, scale: float) -> None:
        """Write `<folder>/<name>.jpg` and `<folder>/thumbnails/<name>.jpg`.

        Args:
            folder: is made.
            name: of the scan.
            volume, grid, scale: as for `picture`.
        """
        pixels = self.picture(volume, grid, scale)
        small = Image.fromarray(self.picture(volume, grid, scale, self.thumbnail_height))
        _write_jpeg(make_folder(folder) / f"{name}.jpg", Image.fromarray(pixels), 88)
        _write_jpeg(make_folder(Path(folder) / THUMBNAILS) / f"{name}.jpg", small, 75)

    def picture(self, volume: np.ndarray, grid: Grid, scale: float, height: int | None = None) -> np.ndarray:
        """The middle planes with the outlines.

        Args:
            volume: a prepared scan, 0..1, of the grid's shape.
            grid: where it lies.
            scale: length in the head over length in the template.
            height: of the picture; None takes the one of `write`.

        Returns:
            (height, width, 3) uint8.
        """
        height = height or self.height
        pixels = np.repeat(mid_planes(volume, height)[..., None], 3, axis=2)
        for mask, colour in ((self.head, HEAD_COLOUR), (self.brain, BRAIN_COLOUR)):
            on_planes = _on_mid_planes(mask, resized_about(self.centre, 1.0 / scale), grid)
            inside = mid_planes(on_planes, height) > 127
            pixels[inside & ~ndimage.binary_erosion(inside)] = colour
        return pixels


def _on_mid_planes(mask: Scan, transform: np.ndarray, grid: Grid) -> np.ndarray:
    """A mask on the three middle planes of a grid, 0 elsewhere: they are all that a picture shows."""
    to_voxels = np.linalg.inv(mask.affine) @ transform @ grid.affine
    volume = np.zeros(grid.shape, np.float32)
    for axis, size in enumerate(grid.shape):
        ranges = [np.arange(n) if other != axis else [size // 2] for other, n in enumerate(grid.shape)]
        indices = np.stack(np.meshgrid(*ranges, indexing="ij")).reshape(3, -1)
        voxels = to_voxels[:3, :3] @ indices + to_voxels[:3, 3:]
        volume[tuple(indices)] = ndimage.map_coordinates(mask.data, voxels, order=1)
    return volume


def _filled(mask: np.ndarray) -> np.ndarray:
    """The largest part of the mask, closed over gaps of 6 voxels, its holes filled in each axial plane."""
    parts, _ = ndimage.label(mask)
    largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    closed = ndimage.binary_closing(np.pad(largest, 4), iterations=3)[4:-4, 4:-4, 4:-4]
    return np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(closed, 2, 0)], axis=2)


def _write_jpeg(path: Path, image: Image.Image, quality: int) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="JPEG", quality=quality, subsampling=0, optimize=True)
