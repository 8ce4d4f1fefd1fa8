# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a sample shows a person of the training, also when it is deformed and scanned anew: with its own power."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.stats import binomtest, rankdata
from tqdm import tqdm

from scripts.core.bootstrap import Estimate, bootstrapped, summarise
from scripts.core.inputs import Input
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import FeatureSet
from scripts.phantoms.deformation import box_grid, cosine_field, sample, smooth_coefficients
from scripts.phantoms.looks import draw_looks, scanned
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

FRAME = (36, 44, 36)
"""Points along x, y, z in the frame that every head is laid into."""
KEPT = 2
"""Every how many of them are kept once they are smoothed."""
STEP_MM = 4.0
"""To which volumes are averaged first."""
HEAD, BRIGHT = 0.25, 90
"""Intensity from which a voxel counts as of the head, over the percentile of the head's that is white matter's."""
WINDOW, SMOOTHING, LEAST_CONTRAST = 2.0, 1.2, 0.03
"""In points of the frame: window of the local mean and contrast, smoothing; and the contrast that is none."""
DEFORMATION_MM, WAVELENGTH_MM = 1.5, 70.0
"""Standard deviation along each axis, and scale, of the deformation of planted copies."""
LOOKS = {"bias": 0.05, "gamma": 0.1, "gain": 0.05, "noise": 0.02}
BIAS_MM = 150.0
ALLOWED = 0.05
"""Share of other people that count as found."""
LEAST = 8
"""Of held-out volumes, for a limit that few of them pass."""


def descriptor(volume: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """A head without its size, place, brightness and local contrast: what is left is its shape and its folds.

    The head is laid into a frame by the extents of what is bright above its lower third, so that size and place do not
    count. From each point its local mean is taken and divided by the local standard deviation, which removes gain, bias
    field and most of gamma; what is left is smoothed, against deformations.

    Args:
        volume: (X, Y, Z), the head upright, x, y, z along the first three axes and z upwards.
        spacing: mm.

    Returns:
        (x, y, z) float32; 0 where there is no head.
    """
    image = _averaged(volume, spacing)
    bright = _bright(image)
    if bright <= 0.0:
        return np.zeros([-(-n // KEPT) for n in FRAME], np.float32)
    found = map_coordinates(image, np.meshgrid(*_frame(image, HEAD * bright), indexing="ij"), order=1) / bright
    mean = gaussian_filter(found, WINDOW, truncate=2.5)
    rest = found - mean
    spread = np.sqrt(gaussian_filter(rest * rest, WINDOW, truncate=2.5) + LEAST_CONTRAST**2)
    smooth = gaussian_filter(np.where(mean > 0.1, rest / spread, 0.0), SMOOTHING)
    return smooth[::KEPT, ::KEPT, ::KEPT].astype(np.float32)


def _averaged(volume: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    shape = [max(1, round(n * abs(step) / STEP_MM)) for n, step in zip(volume.shape, spacing)]
    tensor = torch.as_tensor(np.ascontiguousarray(volume), dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(tensor, shape, mode="area")[0, 0].numpy()


def _bright(image: np.ndarray) -> float:
    head = image[image > 0.1 * image.max()]
    return float(np.percentile(head, BRIGHT)) if len(head) else 0.0


def _frame(image: np.ndarray, least: float) -> list[np.ndarray]:
    """Positions along each axis: the head's width and depth, and from its top as far down as is its mean size."""
    mask = gaussian_filter(image, 1.0) > least
    mask[:, :, : mask.shape[2] // 3] = False  # the face and the neck
    if not mask.any():
        return [np.linspace(0, n - 1, points) for n, points in zip(image.shape, FRAME)]
    (left, right), (back, front), (_, top) = (_extent(mask, axis) for axis in range(3))
    size = np.sqrt((right - left) * (front - back))
    margin = 0.02 * size
    return [
        np.linspace(left - margin, right + margin, FRAME[0]),
        np.linspace(back - margin, front + margin, FRAME[1]),
        np.linspace(top - 0.92 * size, top + 1.5 * margin, FRAME[2]),
    ]


def _extent(mask: np.ndarray, axis: int) -> tuple[float, float]:
    """Between which positions along an axis 98 % of a mask lie."""
    shares = np.cumsum(mask.sum(axis=tuple(other for other in range(3) if other != axis))) / mask.sum()
    low, high = np.interp([0.01, 0.99], shares, np.arange(len(shares)))
    return float(low), float(high)


def planted_copy(volume: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """A head as a model that has memorised it might show it: deformed by some mm, with noise and another look.

    Args:
        volume: (X, Y, Z), 0..1.
        spacing: mm.
        seed: of deformation and look.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = volume.shape
    extent = [n * abs(step) for n, step in zip(shape, spacing)]
    modes = smooth_coefficients(3, extent, WAVELENGTH_MM, generator)
    sides = torch.tensor(extent).view(1, 3, 1, 1, 1)
    positions = box_grid(shape) + cosine_field(modes, shape) * (2.0 * DEFORMATION_MM / sides)
    image = sample(torch.as_tensor(np.ascontiguousarray(volume), dtype=torch.float32)[None, None], positions)
    looks = draw_looks(LOOKS, smooth_coefficients(1, extent, BIAS_MM, generator), generator)
    return scanned(image, looks)[0, 0].numpy()


class Reidentifier:
    """Tells how much a volume looks like the training volume that it looks most like, and how good it is at that.

    Args:
        training, held_out: volumes that were trained on, and of other people.
        copies: how many copies are planted to measure the power.
        seed: of what is planted.
    """

    def __init__(self, training: VolumeFolder, held_out: VolumeFolder, copies: Any = 20, seed: Any = 0) -> None:
        self.training, self.held_out = training, held_out
        self.copies = whole_number(copies, "reidentifier::copies", least=1)
        self.seed = whole_number(seed, "seed")

    @cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the training's descriptors with their mirror images, and the unit vectors that differ from it."""
        both = [
            turned
            for one in descriptors(self.training)
            for turned in (one, one[::-1])  # a model may have learnt from mirrored heads
        ]
        rows = np.stack([one.ravel() for one in both])
        mean = rows.mean(axis=0)
        return mean, _unit(rows - mean)

    def likeness(self, found: np.ndarray) -> tuple[int, float]:
        """Position of the likest training volume or its mirror image, and the correlation with it, -1 to 1."""
        mean, known = self._known
        alike = known @ _unit((found.ravel() - mean)[None])[0]
        best = int(np.argmax(alike))
        return best // 2, float(alike[best])

    def of_folder(self, folder: VolumeFolder) -> list[tuple[int, float]]:
        """`likeness` of each volume of a folder."""
        return [self.likeness(one) for one in descriptors(folder)]

    @cached_property
    def others(self) -> np.ndarray:
        """Likeness of the held-out volumes that are not among those trained on."""
        known = set(self.training.hashes)
        paths = [path for path, digest in zip(self.held_out.paths, self.held_out.hashes) if digest not in known]
        return np.array([alike for _, alike in self.of_folder(self.held_out.part(paths))])

    @cached_property
    def planted(self) -> list[tuple[bool, float]]:
        """Of copies of training volumes, whether the likest is the one that was copied, and their likeness."""
        order = np.random.default_rng(self.seed).permutation(len(self.training))[: self.copies].tolist()
        found = []
        for index in tqdm(order, "planting copies", unit="volume", disable=None):
            copy = planted_copy(self.training[index][0, 0].numpy(), self.training.spacing, self.seed + index)
            position, alike = self.likeness(descriptor(copy, self.training.spacing))
            found.append((position == index, alike))
        return found


def descriptors(folder: VolumeFolder) -> list[np.ndarray]:
    """`descriptor` of each volume of a folder."""
    numbers = tqdm(range(len(folder)), f"likeness of {folder.flag}", unit="volume", disable=None)
    return [descriptor(folder[index][0, 0].numpy(), folder.spacing) for index in numbers]


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0.0, lengths, 1.0)


class EnoughOthers(Input):
    """Whether there are enough held-out volumes.

    Args:
        folder: of them.
    """

    def __init__(self, folder: VolumeFolder) -> None:
        self.folder, self.flag = folder, folder.flag

    @property
    def requested(self) -> bool:
        """Whether there are `LEAST`."""
        return self.folder.requested and not self.why_not

    @property
    def why_not(self) -> str:
        """That there are too few."""
        if not self.folder.requested or len(self.folder) >= LEAST:
            return ""
        return f"--{self.flag} has {len(self.folder)} volumes: re-identification needs {LEAST} of other people"


class Reidentification(Measure):
    """How alike samples are to training volumes whatever their deformation, and how many planted copies that finds.

    Rows of `likeness`: its means (`synthetic`, `held_out`), and the share of samples (`close`) beyond all but 5 % of
    the held-out volumes. Rows of `copies_found`: the `power`, which share of copies that were planted lies beyond the
    same limit and names the right volume, and `auc`, how well likeness tells copies from other people.

    Args:
        synthetic: the samples.
        reidentifier: of the training and of other people.
        seed: of the bootstrap.
    """

    says = (
        "Whether samples show people of the training, also deformed by some mm and scanned anew. The power says how "
        "many such copies this finds: that none is found says as much as the power is high. A close share of about "
        f"{ALLOWED:g} is expected without copies."
    )
    pitfall = (
        "The power is that for copies that are deformed as these are; a part of a head that was copied, or a head that "
        "was changed more, can stay unseen. Held-out volumes of people of the training hide copies."
    )

    def __init__(self, synthetic: FeatureSet, reidentifier: Reidentifier, seed: Any = 0) -> None:
        self.synthetic, self.reidentifier = synthetic.folder, reidentifier
        self.inputs = [self.synthetic, reidentifier.training, EnoughOthers(reidentifier.held_out)]
        self.seed = whole_number(seed, "seed")

    def check(self) -> None:
        """Raise a `BundleError` unless all volumes lie on one grid."""
        for folder in (self.synthetic, self.reidentifier.held_out):
            self.reidentifier.training.check_same_grid(folder)

    def compute(self) -> Result:
        """Measure; nothing, with a warning, where fewer volumes than `LEAST` were held out from the training."""
        if len(self.reidentifier.others) < LEAST:
            count = len(self.reidentifier.others)
            logger.warning(f"re-identification: {count} volumes were not trained on, and it needs {LEAST}: left out")
            return Result([], {"held_out_volumes": count})
        others, planted = self.reidentifier.others, self.reidentifier.planted
        limit = float(np.quantile(others, 1 - ALLOWED))
        found = self.reidentifier.of_folder(self.synthetic)
        alike, copied = np.array([one for _, one in found]), np.array([one for _, one in planted])
        right = np.array([right for right, _ in planted])
        figures = {
            ("likeness", "synthetic"): summarise(alike, np.arange(len(alike)), self.seed),
            ("likeness", "held_out"): summarise(others, np.arange(len(others)), self.seed),
            ("likeness", "close"): share(alike > limit),
            ("copies_found", "power"): share((copied > limit) & right),
            ("copies_found", "auc"): area_under_curve(copied, others, self.seed),
        }
        rows = [Row(metric, one, kind=kind, headline=False) for (metric, kind), one in figures.items()]
        return Result(rows, self._facts(limit), self._table(found, limit))

    def _table(self, found: list[tuple[int, float]], limit: float) -> list[dict[str, Any]]:
        training = self.reidentifier.training
        lines = [
            {
                "volume": self.synthetic.name(index),
                "likest": training.name(position),
                "likeness": alike,
                "close": int(alike > limit),
            }
            for index, (position, alike) in enumerate(found)
        ]
        return sorted(lines, key=lambda line: -line["likeness"])

    def _facts(self, limit: float) -> dict[str, Any]:
        return {
            "synthetic_volumes": len(self.synthetic),
            "training_volumes": len(self.reidentifier.training),
            "held_out_volumes": len(self.reidentifier.others),
            "planted_copies": len(self.reidentifier.planted),
            "deformation_mm": DEFORMATION_MM,
            "limit": limit,
            "seed": self.seed,
        }


def share(found: np.ndarray) -> Estimate:
    """A share with its interval (Wilson 1927)."""
    low, high = binomtest(int(found.sum()), len(found)).proportion_ci(method="wilson")
    return Estimate(float(found.mean()), len(found), interval=(float(low), float(high)))


def area_under_curve(positive: np.ndarray, negative: np.ndarray, seed: int) -> Estimate:
    """The chance that a positive is above a negative (Mann and Whitney 1947), with its bootstrap interval."""

    def area(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        n, m = a.shape[axis], b.shape[axis]
        ranks = rankdata(np.concatenate([a, b], axis=axis), axis=axis)
        return (ranks.take(range(n), axis=axis).sum(axis=axis) - n * (n + 1) / 2) / (n * m)

    interval = bootstrapped([positive, negative], area, seed)
    return Estimate(float(area(positive, negative)), min(len(positive), len(negative)), interval=interval)
