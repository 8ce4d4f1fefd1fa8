# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of label maps: the outlines of structures on a volume's planes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from scripts.measuring.segmenter import CODES

COLOURS = {
    "intracranial": (255, 200, 0),
    "brain": (0, 200, 120),
    "lateral_ventricles": (255, 60, 60),
}
"""What is outlined, and its colour; later ones are drawn over earlier ones."""


def structures(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of what is outlined, of a label map in the segmenter's codes."""
    brain = np.isin(labels, (*CODES["grey"], *CODES["white"]))
    return {
        "intracranial": labels > 0,
        "brain": brain,
        "lateral_ventricles": np.isin(labels, CODES["lateral_ventricles"]),
    }


def outlined(volume: np.ndarray, labels: np.ndarray, height: int = 288) -> np.ndarray:
    """A sagittal, a coronal and an axial plane through the lateral ventricles, with outlines of `COLOURS`.

    Args:
        volume: on the bundle grid, 0..1.
        labels: in the segmenter's codes, of the same shape.
        height: of the picture in pixels.

    Returns:
        (height, width, 3) uint8; the subject's right is on the left of the coronal and axial planes.
    """
    masks = structures(labels)
    x, y, z = _middle(masks["lateral_ventricles"])
    down, whole = slice(None, None, -1), slice(None)
    cuts: list[tuple[Any, ...]] = [(x, down, down), (whole, y, down), (whole, down, z)]
    drawn = [_drawn(volume[cut].T, {name: mask[cut].T for name, mask in masks.items()}, height) for cut in cuts]
    return np.concatenate(drawn, axis=1)


def _middle(ventricles: np.ndarray) -> tuple[int, int, int]:
    """Beside the middle in x, where the bodies of the ventricles are, and their centre in y and z."""
    shape = ventricles.shape
    if not ventricles.any():
        return shape[0] // 2, shape[1] // 2, shape[2] // 2
    x, y, z = np.argwhere(ventricles).mean(axis=0)
    right = np.argwhere(ventricles[: max(1, round(x))])
    return round(right[:, 0].mean()) if len(right) else round(x), round(y), round(z)


def _drawn(plane: np.ndarray, masks: dict[str, np.ndarray], height: int) -> np.ndarray:
    size = (round(height * plane.shape[1] / plane.shape[0]), height)
    grey = Image.fromarray(np.rint(np.clip(plane, 0.0, 1.0) * 255.0).astype(np.uint8))
    pixels = np.stack([np.asarray(grey.resize(size, Image.Resampling.BICUBIC))] * 3, axis=-1)
    for name, colour in COLOURS.items():
        share = Image.fromarray((masks[name] * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
        inside = np.asarray(share) > 127
        pixels[inside & ~ndimage.binary_erosion(inside)] = colour
    return pixels
