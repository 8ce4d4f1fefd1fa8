# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Similarity of two volumes after one was shifted, or mirrored and shifted, onto the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from scipy import fft
from skimage.metrics import structural_similarity

from scripts.options import number
from scripts.volume_folders import VolumeFolder

WINDOW = 7


class Aligned(NamedTuple):
    """How alike two volumes are, and what was done to the second.

    Attributes:
        ssim: SSIM of both where they overlap.
        shift: voxels along x, y, z by which the second was moved.
        mirrored: whether it was mirrored left to right before.
    """

    ssim: float
    shift: tuple[int, int, int]
    mirrored: bool


class Alignment:
    """SSIM (Wang et al. 2004, uniform window of 7 voxels) after the best shift of at most some millimetres.

    Volumes are first averaged to voxels of about `spacing` mm. The shift is that of the highest correlation of the two
    volumes less their means, found by Fourier transforms for whole voxels; both the volume and its mirror image are
    tried, since training data are flipped. Rotations are not searched: volumes on one grid have been registered.

    Args:
        spacing: sides of the voxels to compare at, in mm.
        largest_shift: in mm, along each axis.
        data_range: of the intensities.
    """

    def __init__(self, spacing: Any = 2.0, largest_shift: Any = 16.0, data_range: float = 1.0) -> None:
        self.spacing = number(spacing, "alignment::spacing", least=0.1)
        self.largest_shift = number(largest_shift, "alignment::largest_shift", least=0.0)
        self.data_range = data_range

    def reduced(self, folder: VolumeFolder, index: int) -> np.ndarray:
        """Volume `index` of a folder with the voxels to compare at, (X, Y, Z) float32."""
        factors = [self._factor(side, n) for side, n in zip(folder.spacing, folder.shape)]
        return F.avg_pool3d(folder[index], factors)[0, 0].numpy()

    def _factor(self, side: float, voxels: int) -> int:
        return max(1, min(round(self.spacing / side), voxels // WINDOW))

    def compare(self, first: np.ndarray, second: np.ndarray, sides: tuple[float, ...]) -> Aligned:
        """The better of the second volume and its mirror image, each where it fits best.

        Args:
            first, second: (X, Y, Z) of one shape, on the grid of `reduced`.
            sides: of the voxels, in mm.
        """
        most = [min(int(self.largest_shift / side), n - WINDOW) for side, n in zip(sides, first.shape)]
        found = []
        for mirrored in (False, True):
            moving = second[::-1] if mirrored else second
            shift = best_shift(first, moving, most)
            found.append(Aligned(self._ssim(*overlap(first, moving, shift)), shift, mirrored))
        return max(found, key=_ssim_of)

    def _ssim(self, first: np.ndarray, second: np.ndarray) -> float:
        return float(structural_similarity(first, second, win_size=WINDOW, data_range=self.data_range))

    def sides(self, folder: VolumeFolder) -> tuple[float, ...]:
        """Sides of the voxels of `reduced`, in mm."""
        return tuple(side * self._factor(side, n) for side, n in zip(folder.spacing, folder.shape))

    def facts(self) -> dict[str, Any]:
        """What the similarity depends on, for the report."""
        return {"spacing": self.spacing, "largest_shift": self.largest_shift, "data_range": self.data_range}


def _ssim_of(found: Aligned) -> float:
    return found.ssim


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


def overlap(first: np.ndarray, second: np.ndarray, shift: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The parts of both volumes that lie on each other when the second is moved by `shift` voxels."""
    here = tuple(slice(max(s, 0), n + min(s, 0)) for s, n in zip(shift, first.shape))
    there = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(shift, first.shape))
    return first[here], second[there]


def moved(volume: np.ndarray, shift: tuple[int, int, int], mirrored: bool) -> np.ndarray:
    """A volume mirrored, if it is to be, and moved; 0 where nothing is moved to."""
    volume = volume[::-1] if mirrored else volume
    result = np.zeros_like(volume)
    here, there = overlap(result, volume, shift)
    here[...] = there
    return result
