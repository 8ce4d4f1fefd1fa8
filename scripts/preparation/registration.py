# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Rigid registration of a head to the template, and resampling onto another grid."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation
from skimage.filters import threshold_otsu

from scripts.core.errors import BundleError
from scripts.volumes.reading import MGH, has_suffix, read_header
from scripts.volumes.scans import Scan, ScanError, load_scan

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
NO_ANTS = (
    "scans are registered by the package antspyx: pip install antspyx (the extra `preparation`); it has no wheel for "
    "Python 3.14 and newer, so prepare with an older one"
)
COARSE_MM = 6.0
POLISH_MM = 4.0
FINE_MM = 2.0
SCALE, CHILDS_SCALE = 0.93, 0.76
LIKELY_LOG_SCALE = 0.12
LIKELY_SCALES = (SCALE * float(np.exp(-LIKELY_LOG_SCALE)), SCALE * float(np.exp(LIKELY_LOG_SCALE)))
"""Lengths of adult heads over the template's, 0.825 to 1.049."""
TYPICAL_SCALES = (0.91, 0.86, 0.97)
SHIFTS_MM = (-30.0, -15.0, 0.0, 15.0, 30.0)
LIKELY_STARTS = 12
FINISHED_STARTS = 2
ROUGH = 7
FOREGROUND_STEP = 101
_SIMPLEX = np.vstack([np.zeros(7), np.diag([0.15, 0.15, 0.15, 8.0, 8.0, 8.0, 0.05])])
SKULL_MARGIN_MM = 10.0
SCALP_MARGIN_MM = 20.0
HEAD_HEIGHT_MM = 180.0


@dataclass(frozen=True)
class Template:
    """The head that scans are registered to, in MNI152 millimetres.

    Attributes:
        head: the average head, skull and scalp included.
        brain: 1 inside the brain (ventricles included), on any grid in the same millimetres.
    """

    head: Scan
    brain: Scan

    @cached_property
    def thinned(self) -> Template:
        """The same template on a grid of 2 mm."""
        return Template(thinned(self.head, FINE_MM), self.brain)

    @cached_property
    def in_brain(self) -> np.ndarray:
        """The brain as a boolean array on the head's own grid."""
        return self.brain_on(self.head.data.shape, self.head.affine)

    @cached_property
    def centre(self) -> np.ndarray:
        """The brain's centroid in mm."""
        return centroid(self.in_brain, self.head.affine)

    def near_brain(self, margin: float) -> np.ndarray:
        """The brain and what lies within `margin` mm of it, on the head's own grid."""
        return ndimage.distance_transform_edt(~self.in_brain, sampling=self.head.spacing) <= margin

    def brain_on(self, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        """The brain as a boolean array on another grid in MNI152 millimetres."""
        return resample(self.brain, np.eye(4), shape, affine, order=1) > 0.5


@dataclass(frozen=True)
class Registration:
    """How a head lies on the template.

    Attributes:
        rigid: 4 x 4 matrix from template world to scan world (RAS+, mm), without any change of size.
        scale: length in the head over length in the template.
        similarity: correlation of head and template inside the template's brain at 2 mm, the head brought to
            the template's size.
    """

    rigid: np.ndarray
    scale: float
    similarity: float

    def with_scale(self, centre: np.ndarray) -> np.ndarray:
        """4 x 4 matrix from template world to scan world that brings the template to the head's size as well.

        Args:
            centre: of the template's brain, in mm, which `rigid` takes to the head's.
        """
        return self.rigid @ resized_about(centre, self.scale)

    @property
    def tilt(self) -> float:
        """The angle of the rigid motion, 0 to 180 degrees."""
        return float(np.degrees(_rotation(self.rigid).magnitude()))


def load_template(head: str | os.PathLike, brain: str | os.PathLike) -> Template:
    """Read the template and its brain mask.

    Raises:
        BundleError: if either is unreadable, or the mask has no voxel inside the head's image.
    """
    template = Template(load_scan(head), load_scan(brain))
    if not template.in_brain.any():
        raise BundleError(f"the brain mask {brain} does not overlap the template {head}: both must be in MNI152 mm")
    return template


def resample(scan: Scan, transform: np.ndarray, shape: tuple[int, ...], affine: np.ndarray, order: int) -> np.ndarray:
    """A scan on another grid, in one interpolation.

    Args:
        scan: the image to read.
        transform: 4 x 4 matrix from the grid's world to the scan's world (RAS+, mm).
        shape, affine: the grid.
        order: 1 for linear, 3 for cubic B-splines. Cubic interpolation rings, so the result is cut to the
            range of the scan.

    Returns:
        Float32 array of `shape`; 0 outside the scan's field of view.
    """
    to_voxels = np.linalg.inv(scan.affine) @ transform @ affine
    values = ndimage.affine_transform(scan.data, to_voxels[:3, :3], to_voxels[:3, 3], tuple(shape), order=order)
    return np.clip(values, min(0.0, scan.data.min()), scan.data.max())


def blurred(scan: Scan, spacing: float) -> Scan:
    """The scan blurred along axes finer than `spacing` mm, so that sampling it at that step does not alias.

    A box of `spacing` is wider than the scan's voxel by a variance of (spacing^2 - voxel^2) / 12, which the
    Gaussian supplies. Axes within a fifth of `spacing` are left alone.
    """
    fine = scan.spacing < 0.8 * spacing
    variance = np.where(fine, (spacing**2 - scan.spacing**2) / 12.0, 0.0)
    if not fine.any():
        return scan
    return Scan(ndimage.gaussian_filter(scan.data, np.sqrt(variance) / scan.spacing), scan.affine)


def thinned(scan: Scan, spacing: float) -> Scan:
    """Every n-th voxel of the blurred scan, n such that no step exceeds `spacing` mm unless it did before."""
    step = np.maximum(1, np.floor(spacing / scan.spacing + 1e-3)).astype(int)
    data = blurred(scan, spacing).data[:: step[0], :: step[1], :: step[2]]
    return Scan(np.ascontiguousarray(data), scan.affine @ np.diag([*step, 1.0]))


def seen_fraction(scan: Scan, transform: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> float:
    """Fraction of the voxels of `mask` (on the grid `affine`) that lie inside the scan's field of view.

    Planes at the array's ends that are constant do not count as seen: they are padding.
    """
    voxels = _apply(np.linalg.inv(scan.affine) @ transform @ affine, np.argwhere(mask))
    first, last = signal_box(scan.data)
    inside = (voxels >= first - 0.5) & (voxels <= last + 0.5)
    return float(inside.all(axis=1).mean())


def signal_box(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last index along each axis of the planes that hold more than the array's minimum.

    The whole array where it is constant.
    """
    above = data > data.min()
    if not above.any():
        return np.zeros(3, int), np.asarray(data.shape) - 1
    profiles = (np.flatnonzero(above.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    ends = [(profile[0], profile[-1]) for profile in profiles]
    return np.array([first for first, _ in ends]), np.array([last for _, last in ends])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two arrays of one shape; 0 where either is constant."""
    a, b = a.astype(np.float64) - a.mean(), b.astype(np.float64) - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def register(
    scan: Scan, template: Template, seed: int, enough: float, scales: Sequence[float] = (0.0, float("inf"))
) -> Registration:
    """Find the rigid motion that lays a head on the template.

    A coarse search over rotations and shifts about the centre of the head gives two starts. From each, ANTs refines
    rotation, shift and one scale (Avants et al. 2011): the mutual information of Mattes et al. (2003) in the template's
    brain and up to its scalp, at 4 and then 2 mm. The more similar one is taken. The scale is left out of the result:
    without it a small brain would have no clear place in the large template, and with a scale for each axis the brain
    is pulled over its own rim.

    Where no fit of an adult's size is as similar as `enough`, others follow until one is: from the best poses at
    typical scales, since with large ventricles, a lesion or no face the free scale runs away; from a search for a head
    of a child's size; and over every rotation, for files whose header names the axes wrongly. If all fail, the starts
    count as well as what ANTs made of them, and the most similar is improved by its similarity at 4 mm. One thread and
    a fixed seed make the result the same each time.

    Args:
        scan: the head.
        template: where it should lie.
        seed: of the points at which ANTs samples the metric, above 0.
        enough: similarity that needs no further search.
        scales: least and largest length of a head over the template's; a fit beyond is taken only where there is none
            within.
    """
    scan = thinned(without_highlights(scan), FINE_MM)
    template = template.thinned
    fits: list[Registration] = []
    starts: list[Registration] = []
    for some, (least, most) in _rounds(scan, template, scales):
        fits += [_registration(scan, template, _ants_similarity(scan, template, seed, start)) for start in some]
        likely = [fit for fit in fits if least <= fit.scale <= most]
        if likely and _most_similar(likely).similarity >= enough:
            return _most_similar(likely)
        starts += [_registration(scan, template, start) for start in some]
    best = _best_within(scales, [*fits, *starts])
    search = _CoarseSearch(scan, template, best.scale, POLISH_MM, margin=0.0)
    return _best_within(scales, [best, _registration(scan, template, search.polished(best, template.centre))])


def _rounds(
    scan: Scan, template: Template, scales: Sequence[float]
) -> Iterator[tuple[list[np.ndarray], Sequence[float]]]:
    """Places to fit from, template world to scan world, the likeliest first, and the sizes at which a fit is enough."""
    search = _CoarseSearch(scan, template)
    yield search.best(NODS), LIKELY_SCALES
    for scale in TYPICAL_SCALES:
        yield search.at_scale(scale), scales if scale == TYPICAL_SCALES[-1] else LIKELY_SCALES
    yield _CoarseSearch(scan, template, CHILDS_SCALE).best(NODS), scales
    yield search.best(ALL_ROUND), scales


def _most_similar(found: Sequence[Registration]) -> Registration:
    return max(found, key=lambda one: one.similarity)


def _best_within(scales: Sequence[float], found: Sequence[Registration]) -> Registration:
    """The most similar of those whose scale is within limits; of all, if there are none."""
    return _most_similar([one for one in found if scales[0] <= one.scale <= scales[1]] or found)


def _registration(scan: Scan, template: Template, fitted: np.ndarray) -> Registration:
    """A map from template to scan with its scale, as rigid motion, scale, and the similarity that decides."""
    moved = resample(scan, fitted, template.head.data.shape, template.head.affine, order=1)
    similarity = correlation(moved[template.in_brain], template.head.data[template.in_brain])
    scale = float(np.cbrt(np.linalg.det(fitted[:3, :3])))
    return Registration(_rigid_part(fitted, template.centre), scale, similarity)


def _rotation(matrix: np.ndarray) -> Rotation:
    left, _, right = np.linalg.svd(matrix[:3, :3])
    return Rotation.from_matrix(left @ right)


def _rigid_part(fitted: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The map without its scale: the same rotation, and the same image of the brain's centre."""
    rigid = np.eye(4)
    rigid[:3, :3] = _rotation(fitted).as_matrix()
    rigid[:3, 3] = _apply(fitted, centre) - rigid[:3, :3] @ centre
    return rigid


def _tilts(*angles: Sequence[int]) -> list[Rotation]:
    """Rotations by every combination of the angles, in degrees, about x, y and z."""
    return [Rotation.from_euler("xyz", three, degrees=True) for three in itertools.product(*angles)]


NODS = _tilts(range(-60, 61, 20), range(-40, 41, 20), range(-40, 41, 20))
"""How heads lie in a scanner whose header is right, and more."""
ALL_ROUND = [turn * tilt for turn in Rotation.create_group("O") for tilt in _tilts(*[(-30, 0, 30)] * 3)]
"""Every rotation there is, in steps of some 30 degrees."""


class _CoarseSearch:
    """Compares head and template at the points of the template's brain and near it, for many starts.

    Args:
        scan, template: see `register`.
        scale: typical length of the heads that are looked for, over the template's.
        step: in mm, at which it compares.
        margin: of the brain in mm, up to which it compares.
    """

    def __init__(
        self,
        scan: Scan,
        template: Template,
        scale: float = SCALE,
        step: float = COARSE_MM,
        margin: float = SKULL_MARGIN_MM,
    ) -> None:
        self.scale, self.height = scale, HEAD_HEIGHT_MM * (scale / SCALE)
        coarse = Template(thinned(template.head, step), template.brain)
        near = coarse.near_brain(margin)
        self.points = _apply(coarse.head.affine, np.argwhere(near))
        self.wanted = coarse.head.data[near]
        self.scan = thinned(scan, step)
        self.pivot = _head_centre(_foreground_points(template.head), Rotation.identity(), HEAD_HEIGHT_MM)
        self.head = _foreground_points(scan)

    def best(self, rotations: Iterable[Rotation]) -> list[np.ndarray]:
        """The best starts, template world to scan world: the likeliest of the grid, each improved, then compared.

        They are often nearly the same, and yet ANTs goes from them to places that lie up to 2.5 mm apart.
        """
        nearest = [min(self._starts(rotation), key=self._rough_loss) for rotation in rotations]
        likely = sorted(nearest, key=self._rough_loss)[:LIKELY_STARTS]
        improved = sorted((self._improved(start, 120) for start in likely), key=lambda found: found.fun)
        self.finished = [self._improved(found.x, 400).x for found in improved[:FINISHED_STARTS]]
        return [self._start(parameters) for parameters in self.finished]

    def at_scale(self, scale: float) -> list[np.ndarray]:
        """The best start that was found before, improved at a scale that it keeps."""
        held = np.append(self.finished[0][:6], np.log(scale / self.scale))
        return [self._start(self._improved(held, 200, free=6).x)]

    def polished(self, found: Registration, centre: np.ndarray) -> np.ndarray:
        """A map that was found, improved by this search's own measure; it can only become more like the template."""
        turn, place = _rotation(found.rigid).as_rotvec(), _apply(found.with_scale(centre), self.pivot)
        return self._start(self._improved(np.concatenate([turn, place, [np.log(found.scale / self.scale)]]), 400).x)

    def _starts(self, rotation: Rotation) -> list[np.ndarray]:
        """Places for one rotation: where the head's centre is if it lies so, and up, down, forwards and back."""
        centre = _head_centre(self.head, rotation, self.height)
        moves = rotation.apply([[0.0, y, z] for y, z in itertools.product(SHIFTS_MM, SHIFTS_MM)])
        return [np.concatenate([rotation.as_rotvec(), centre + move, [0.0]]) for move in moves]

    def _improved(self, start: np.ndarray, evaluations: int, free: int = 7) -> optimize.OptimizeResult:
        """The start with its first `free` parameters improved; the others stay."""
        simplex = (start + _SIMPLEX)[: free + 1, :free]
        options = {"maxfev": evaluations, "xatol": 0.02, "fatol": 1e-4, "initial_simplex": simplex}
        found = optimize.minimize(
            lambda some: self._loss(np.append(some, start[free:])), start[:free], method="Nelder-Mead", options=options
        )
        found.x = np.append(found.x, start[free:])
        return found

    def _start(self, parameters: np.ndarray) -> np.ndarray:
        start = np.eye(4)
        start[:3, :3] = self.scale * np.exp(parameters[6]) * Rotation.from_rotvec(parameters[:3]).as_matrix()
        start[:3, 3] = parameters[3:6] - start[:3, :3] @ self.pivot
        return start

    def _seen(self, parameters: np.ndarray, every: int = 1) -> np.ndarray:
        voxels = _apply(np.linalg.inv(self.scan.affine) @ self._start(parameters), self.points[::every])
        return ndimage.map_coordinates(self.scan.data, voxels.T, order=1)

    def _loss(self, parameters: np.ndarray) -> float:
        """Less the correlation, and a wall about sizes of no head: a brain can be laid on a scalp of 1.2 its size."""
        unlikely = max(0.0, abs(parameters[6]) - LIKELY_LOG_SCALE)
        return 10.0 * unlikely**2 - correlation(self._seen(parameters), self.wanted)

    def _rough_loss(self, parameters: np.ndarray) -> float:
        return -correlation(self._seen(parameters, ROUGH), self.wanted[::ROUGH])


def foreground(data: np.ndarray) -> np.ndarray:
    """What is brighter than the background, by the threshold of Otsu (1979)."""
    return data > threshold_otsu(np.minimum(data, np.percentile(data, 99.5))[::2, ::2, ::2])


def without_highlights(scan: Scan) -> Scan:
    """The scan cut a little above white matter: fat and vessels would take up most of the metric's range."""
    white = np.percentile(scan.data[foreground(scan.data)], 75)
    return Scan(np.clip(scan.data, 0.0, 1.15 * white), scan.affine)


def _foreground_points(scan: Scan, step: int = FOREGROUND_STEP) -> np.ndarray:
    """World millimetres, (n, 3), of every `step`-th voxel that is brighter than the background."""
    return _apply(scan.affine, np.argwhere(foreground(scan.data))[::step])


def _head_centre(points: np.ndarray, rotation: Rotation, height: float) -> np.ndarray:
    """Centroid, in mm, of the top `height` mm of the head, if it is turned by `rotation` from upright."""
    upright = rotation.inv().apply(points)
    top = np.percentile(upright[:, 2], 99.5)
    return rotation.apply(upright[upright[:, 2] > top - height].mean(axis=0))


def head_centre(scan: Scan) -> np.ndarray:
    """Centroid, in mm, of the top 180 mm of a head that is upright in the scan's world."""
    return _head_centre(_foreground_points(scan, step=3), Rotation.identity(), HEAD_HEIGHT_MM)


def centroid(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Mean position, in mm, of the voxels of a mask."""
    return _apply(affine, np.argwhere(mask)).mean(axis=0)


def resized_about(centre: np.ndarray, factor: float) -> np.ndarray:
    """The 4 x 4 matrix that makes everything larger by `factor` and leaves `centre` (mm) where it is."""
    matrix = np.diag([factor] * 3 + [1.0])
    matrix[:3, 3] = centre - factor * centre
    return matrix


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def deterministic_ants(seed: int) -> ModuleType:
    """The ants package, set to one thread and a fixed seed: the same input gives the same output.

    Raises:
        BundleError: if it is not installed.
    """
    ants = _ants()
    ants.config.set_ants_deterministic(True, seed)
    return ants


def _ants() -> ModuleType:
    try:
        import ants
    except ImportError as error:
        raise BundleError(NO_ANTS) from error
    return ants


def itk_frame(path: Path, scan: Scan) -> np.ndarray:
    """4 x 4 matrix from the millimetres of a scan, as it was read, to those in which ITK's tools see its file (RAS+).

    They are the same but where the header contradicts itself: then ITK is asked, which may take the qform.

    Args:
        path: the file.
        scan: as it was read, before its axes were turned.
    """
    if has_suffix(path, MGH) or not path.is_file() or read_header(path).says_one_place:
        return np.eye(4)
    try:
        found = _ants().image_header_info(str(path))
    except Exception as error:  # what ITK makes of a file that it cannot read
        raise ScanError("unreadable", f"{path} cannot be read by ITK, and its header contradicts itself") from error
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(found["direction"])[:3, :3] * np.asarray(found["spacing"])[:3]
    affine[:3, 3] = np.asarray(found["origin"])[:3]
    return LPS @ affine @ np.linalg.inv(scan.affine)


def as_ants_image(scan: Scan) -> Any:
    """The scan as an `ants.ANTsImage`, whose world is LPS."""
    affine = LPS @ scan.affine
    left, _, right = np.linalg.svd(affine[:3, :3] / scan.spacing)
    return _ants().from_numpy(scan.data, list(affine[:3, 3]), list(scan.spacing), left @ right)


def _ants_similarity(scan: Scan, template: Template, seed: int, start: np.ndarray) -> np.ndarray:
    ants = deterministic_ants(seed)
    near = template.near_brain(SCALP_MARGIN_MM)
    with tempfile.TemporaryDirectory() as folder:
        found = ants.registration(
            fixed=as_ants_image(template.head),
            moving=as_ants_image(scan),
            type_of_transform="Similarity",
            initial_transform=[write_ants_map(start, Path(folder) / "start.mat")],
            outprefix=os.path.join(folder, "fitted"),
            mask=as_ants_image(Scan(near.astype(np.float32), template.head.affine)),
            mask_all_stages=True,
            aff_iterations=(500, 100),
            aff_shrink_factors=(2, 1),
            aff_smoothing_sigmas=(1, 0),
            aff_random_sampling_rate=0.25,
        )
        return _ants_matrix([ants.read_transform(path) for path in found["fwdtransforms"]])


def write_ants_map(start: np.ndarray, path: Path) -> str:
    """Write a 4 x 4 matrix (RAS+, mm) as a transform file of ANTs; the path as text."""
    ants, matrix = _ants(), LPS @ start @ LPS
    parameters = [*matrix[:3, :3].ravel(), *matrix[:3, 3]]
    transform = ants.create_ants_transform(
        transform_type="AffineTransform", parameters=parameters, fixed_parameters=[0.0, 0.0, 0.0]
    )
    ants.write_transform(transform, str(path))
    return str(path)


def _ants_matrix(transforms: list) -> np.ndarray:
    """The matrix (RAS+) of ITK transforms that are applied to a point one after the other."""
    points = np.vstack([np.zeros(3), np.eye(3)])
    for transform in transforms:
        points = np.array([transform.apply_to_point(list(point)) for point in points])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (points[1:] - points[0]).T, points[0]
    return LPS @ matrix @ LPS
