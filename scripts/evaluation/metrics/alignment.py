# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Similarity of two volumes after one was turned and shifted, or mirrored before, onto the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft, ndimage
from scipy.spatial.transform import Rotation
from skimage.metrics import structural_similarity

from scripts.core.options import number
from scripts.volumes.folders import VolumeFolder

WINDOW = 7
COARSE = 2
"""Voxels of the fine grid along each side of one of the coarse grid."""
COARSE_STEPS, FINE_STEPS = 30, 10
LEAST_GAIN = 1e-5
"""A step that raises the correlation by less is the last one."""
FLAT = 1e-6
MARGIN = 1e-3  # voxels

Three = tuple[float, float, float]


class Motion(NamedTuple):
    """How a volume is moved: mirrored left to right or not, turned about its centre, then shifted.

    Attributes:
        rotation: its axis times its angle in degrees.
        shift: mm along x, y, z.
        mirrored: whether it is mirrored first.
    """

    rotation: Three = (0.0, 0.0, 0.0)
    shift: Three = (0.0, 0.0, 0.0)
    mirrored: bool = False

    @property
    def angle(self) -> float:
        """The angle of the rotation in degrees."""
        return float(np.linalg.norm(self.rotation))

    def followed_by(self, rotation: np.ndarray, shift: np.ndarray) -> Motion:
        """This motion and then another, of a rotation vector in radians and mm."""
        turn = Rotation.from_rotvec(rotation)
        turned = turn * Rotation.from_rotvec(self.rotation, degrees=True)
        shifted = turn.apply(self.shift) + shift
        return Motion(_three(turned.as_rotvec(degrees=True)), _three(shifted), self.mirrored)


def _three(vector: np.ndarray) -> Three:
    x, y, z = map(float, vector)
    return x, y, z


class Aligned(NamedTuple):
    """How alike two volumes are, and what was done to the second.

    Attributes:
        ssim: SSIM of both where they overlap.
        motion: of the second.
    """

    ssim: float
    motion: Motion


class Alignment:
    """SSIM (Wang et al. 2004, uniform window of 7 voxels) after the best rigid motion that a local search finds.

    Volumes are first averaged to voxels of about `spacing` mm, and these to voxels of twice that. On the coarse grid
    the volume and its mirror image (training data are flipped) are shifted by whole voxels to the highest correlation,
    found by Fourier transforms, and from there turned and shifted by at most 30 steps of `improved`. The one of the
    higher correlation goes on with at most 10 steps on the fine grid.

    Args:
        spacing: sides of the voxels to compare at, in mm.
        largest_shift: in mm, along each axis.
        largest_rotation: the largest angle in degrees.
        data_range: of the intensities.
    """

    def __init__(
        self, spacing: Any = 2.0, largest_shift: Any = 16.0, largest_rotation: Any = 20.0, data_range: float = 1.0
    ) -> None:
        self.spacing = number(spacing, "alignment::spacing", least=0.1)
        self.largest_shift = number(largest_shift, "alignment::largest_shift", least=0.0)
        self.largest_rotation = number(largest_rotation, "alignment::largest_rotation", least=0.0)
        self.data_range = data_range

    def reduced(self, folder: VolumeFolder, index: int) -> np.ndarray:
        """Volume `index` of a folder with the voxels to compare at, (X, Y, Z) float32."""
        factors = [self._factor(side, n) for side, n in zip(folder.spacing, folder.shape)]
        return _averaged(folder[index][0, 0].numpy(), factors)

    def _factor(self, side: float, voxels: int) -> int:
        return max(1, min(round(self.spacing / side), voxels // WINDOW))

    def sides(self, folder: VolumeFolder) -> tuple[float, ...]:
        """Sides of the voxels of `reduced`, in mm."""
        return tuple(side * self._factor(side, n) for side, n in zip(folder.spacing, folder.shape))

    def compare(self, first: np.ndarray, second: np.ndarray, sides: Sequence[float]) -> Aligned:
        """The better of the second volume and its mirror image, where it fits best.

        Args:
            first, second: (X, Y, Z) of one shape, on the grid of `reduced`.
            sides: of the voxels, in mm.
        """
        starts = [self._start(first, second, sides, mirrored) for mirrored in (False, True)]
        start = max(starts, key=_correlation_of)[0]
        motion, _ = improved(first, _facing(second, start), sides, start, FINE_STEPS, self._allows)
        return Aligned(self._ssim(first, *moved(second, motion, sides)), motion)

    def _start(
        self, first: np.ndarray, second: np.ndarray, sides: Sequence[float], mirrored: bool
    ) -> tuple[Motion, float]:
        """The motion on the coarse grid, and the correlation there."""
        factors = [max(1, min(COARSE, n // WINDOW)) for n in first.shape]
        coarse = [factor * side for factor, side in zip(factors, sides)]
        fixed, moving = _averaged(first, factors), _averaged(_facing(second, Motion(mirrored=mirrored)), factors)
        most = [max(0, min(int(self.largest_shift / side), n - WINDOW)) for side, n in zip(coarse, fixed.shape)]
        shift = _three(np.array(best_shift(fixed, moving, most)) * coarse)
        return improved(fixed, moving, coarse, Motion(shift=shift, mirrored=mirrored), COARSE_STEPS, self._allows)

    def _allows(self, motion: Motion) -> bool:
        return motion.angle <= self.largest_rotation and max(map(abs, motion.shift)) <= self.largest_shift

    def _ssim(self, first: np.ndarray, second: np.ndarray, inside: np.ndarray) -> float:
        _, local = structural_similarity(first, second, win_size=WINDOW, data_range=self.data_range, full=True)
        whole = ndimage.minimum_filter(inside.view(np.uint8), WINDOW, mode="constant").astype(bool)
        return float(local[whole].mean()) if whole.any() else 0.0

    def facts(self) -> dict[str, Any]:
        """What the similarity depends on, for the report."""
        names = ("spacing", "largest_shift", "largest_rotation", "data_range")
        return {name: getattr(self, name) for name in names}


def _correlation_of(found: tuple[Motion, float]) -> float:
    return found[1]


def _averaged(volume: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    whole = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
    return F.avg_pool3d(whole, list(factors))[0, 0].numpy()


def _facing(volume: np.ndarray, motion: Motion) -> np.ndarray:
    return volume[::-1] if motion.mirrored else volume


def best_shift(first: np.ndarray, second: np.ndarray, most: list[int]) -> tuple[int, int, int]:
    """The shift of `second`, of whole voxels, that gives the highest correlation with `first`.

    Args:
        first, second: (X, Y, Z) of one shape. Outside them is what is less than or equal to their means.
        most: voxels along each axis.

    Returns:
        What to add to positions in `second` to be at those of `first`.
    """
    shape = [fft.next_fast_len(n + m, real=True) for n, m in zip(first.shape, most)]
    spectra = [fft.rfftn(volume - volume.mean(), shape) for volume in (first, second)]
    correlation = fft.irfftn(spectra[0] * spectra[1].conj(), shape)
    near = correlation[np.ix_(*(np.r_[0 : m + 1, -m:0] for m in most))]
    place = np.unravel_index(near.argmax(), near.shape)
    x, y, z = (int(p) if p <= m else int(p) - 2 * m - 1 for p, m in zip(place, most))
    return x, y, z


def improved(
    fixed: np.ndarray,
    moving: np.ndarray,
    sides: Sequence[float],
    start: Motion,
    steps: int,
    allows: Callable[[Motion], bool],
) -> tuple[Motion, float]:
    """A rigid motion that raises the correlation of two volumes, by Gauss-Newton steps.

    Each step solves for the small motion of `fixed` that explains the difference of the standardised intensities where
    the volumes overlap: the inverse compositional algorithm of Baker and Matthews (2004), whose matrix is the same for
    all steps.

    Args:
        fixed, moving: (X, Y, Z) of one shape; the second mirrored already, if it is to be.
        sides: of the voxels, in mm.
        start: from where.
        steps: how many at most.
        allows: whether a motion may be tried.

    Returns:
        The motion of the highest correlation that was seen, and that correlation.
    """
    basis = _small_motions(fixed, sides)
    inverse = np.linalg.pinv(basis @ basis.T)
    best, highest = start, -np.inf
    motion = start
    for _ in range(steps + 1):
        difference, correlation = _difference(fixed, *_warped(moving, motion, sides, order=1))
        gain = correlation - highest
        if gain > 0:
            best, highest = motion, correlation
        delta = inverse @ (basis @ difference)
        motion = motion.followed_by(delta[:3], delta[3:])
        if gain < LEAST_GAIN or not allows(motion):
            break
    return best, highest


def _small_motions(volume: np.ndarray, sides: Sequence[float]) -> np.ndarray:
    """What a rotation of 1 radian about each axis and a shift of 1 mm along it add to a volume, to first order.

    Returns:
        (6, voxels), in standard deviations of the volume, as functions of position: d/dp of volume(p(x)).
    """
    gradient = np.gradient(volume / max(float(volume.std()), FLAT), *sides)
    shape = volume.shape
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * side for n, side in zip(shape, sides)), indexing="ij", sparse=True
    )
    dx, dy, dz = gradient
    return np.stack([y * dz - z * dy, z * dx - x * dz, x * dy - y * dx, dx, dy, dz]).reshape(6, -1)


def _difference(fixed: np.ndarray, moving: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, float]:
    """Second less first volume, both standardised where they overlap and 0 elsewhere, and their correlation."""
    if not inside.any():
        return np.zeros(fixed.size), -1.0
    one, other = (_standardised(volume[inside]) for volume in (fixed, moving))
    difference = np.zeros(fixed.shape, np.float32)
    difference[inside] = other - one
    return difference.ravel(), float(np.mean(one * other))


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), FLAT)


def moved(volume: np.ndarray, motion: Motion, sides: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A volume after a motion, by cubic B-splines cut to its range; and whether a voxel was inside it before.

    Args:
        volume: (X, Y, Z).
        motion: of it.
        sides: of the voxels, in mm.

    Returns:
        (X, Y, Z) of the volume's type, 0 outside, and (X, Y, Z) of bool.
    """
    result, inside = _warped(_facing(volume, motion), motion, sides, order=3)
    return np.where(inside, np.clip(result, volume.min(), volume.max()), 0).astype(volume.dtype), inside


def _warped(volume: np.ndarray, motion: Motion, sides: Sequence[float], order: int) -> tuple[np.ndarray, np.ndarray]:
    back = Rotation.from_rotvec(motion.rotation, degrees=True).as_matrix().T
    matrix = back * np.array(sides) / np.array(sides)[:, None]
    centre = (np.array(volume.shape) - 1) / 2
    offset = centre - matrix @ centre - back @ motion.shift / sides
    result = ndimage.affine_transform(volume, matrix, offset, order=order, mode="nearest")
    return result, _inside(volume.shape, matrix, offset)


def _inside(shape: tuple[int, ...], matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Whether `matrix @ voxel + offset` lies within a volume of that shape, for each of its voxels."""
    voxels = np.ogrid[tuple(slice(n) for n in shape)]
    places = [sum(m * v for m, v in zip(row, voxels)) + o for row, o in zip(matrix, offset)]
    inside = [(place > -MARGIN) & (place < n - 1 + MARGIN) for place, n in zip(places, shape)]
    return inside[0] & inside[1] & inside[2]
