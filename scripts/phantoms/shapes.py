# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The shape of a phantom: a seed head deformed until its volumes are those that are wanted.

In the seed head's own size, first a random smooth deformation that fades towards the skull; then flows within the skull
(scripts.phantoms.potential_flow), in stages, each for the anatomy as it then is. Three flows move volume between
tissues:

- ventricles: from the outer fluid to the lateral ventricles, third and fourth at half the rate;
- brain: from the outer fluid to grey and white matter;
- ageing: from grey to white matter.

Their strengths follow from the volumes that each would move, and in the last stage are improved by Broyden's method
until the volumes of the deformed label map agree. At the end the whole head is scaled and turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.phantoms.deformation import box_grid, compose, exponential, least_jacobian, sample, warp
from scripts.phantoms.heads import SeedHead, count_volumes
from scripts.phantoms.potential_flow import total
from scripts.volumes.head_size import Volumes

THIRD_AND_FOURTH = 0.5
LEAST_FLUID = 0.05
STAGE_GROWTH = math.log(1.8)
STAGE_FLUID = math.log(1.4)
NEAR = torch.tensor([0.03, 0.005, 0.02], dtype=torch.float64)
EXACT = torch.tensor([0.005, 0.002, 0.01], dtype=torch.float64)
LARGEST = torch.tensor([1.0, 0.06, 0.2], dtype=torch.float64)
STEPS = 8


@dataclass(frozen=True)
class Pose:
    """The size of a phantom and how it lies in the box: scaled and turned about the middle of the box's bottom.

    What lies below the box is not known: its bottom, where the neck is cut, stays where it is.

    Attributes:
        scales: length in the phantom over length in the seed head, along x, y, z.
        angles: of the turns about the x, y and z axes, in radians.
    """

    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def growth(self) -> float:
        """Volume of the phantom over volume of the seed head."""
        return math.prod(self.scales)

    def positions(self, extent: Sequence[float], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Where in the seed head each voxel of the phantom comes from: (1, 3, X, Y, Z) in units of the box.

        Args:
            extent: of the box in mm.
            shape: of the phantom's grid.
            device: of the result.
        """
        size = torch.tensor(extent, dtype=torch.float64)
        turn = _turn(self.angles) @ torch.diag(1.0 / torch.tensor(self.scales, dtype=torch.float64))
        matrix = torch.diag(1.0 / size) @ turn @ torch.diag(size)
        pivot = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)
        shift = (pivot - matrix @ pivot).float().to(device).view(1, 3, 1, 1, 1)
        return torch.einsum("ij,njxyz->nixyz", matrix.float().to(device), box_grid(shape, device)) + shift


def _turn(angles: Sequence[float]) -> Tensor:
    turn = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one = torch.eye(3, dtype=torch.float64)
        one[i, i] = one[j, j] = math.cos(angle)
        one[i, j], one[j, i] = -math.sin(angle), math.sin(angle)
        turn = one @ turn
    return turn


@dataclass(frozen=True)
class PhantomTarget:
    """What a phantom's label map shall measure.

    Attributes:
        ventricles: mm3, in the phantom's own size.
        brain_fraction: grey and white matter over the intracranial volume.
        grey_over_white: volume of grey over that of white matter.
    """

    ventricles: float
    brain_fraction: float
    grey_over_white: float


@dataclass
class Shape:
    """A deformed head.

    Attributes:
        displacement: (1, 3, x, y, z) on the working grid, without the pose.
        labels: (1, 1, X, Y, Z), on the head's grid.
        positions: (1, 3, X, Y, Z): where in the seed head each voxel comes from, in units of the box.
        volumes: counted on `labels`.
        least_jacobian: smallest determinant of the displacement on the working grid.
        stages: flows that followed one another.
    """

    displacement: Tensor
    labels: Tensor
    positions: Tensor
    volumes: Volumes
    least_jacobian: float
    stages: int


@dataclass
class _Course:
    """A head on its way to the target.

    The measures are, in the head's own size, the ventricles in units of those that are wanted (a steady source makes
    them grow linearly), the brain's share of the skull, and the logarithm of grey over white.
    """

    head: SeedHead
    pose: Pose
    target: PhantomTarget
    displacement: Tensor

    def measures(self, displacement: Tensor) -> Tensor:
        """The three measures of the working grid's shares."""
        lateral, _, _, grey, white = _sums(self.head, warp(self.head.shares, displacement))
        return self.of_volumes(lateral, grey, white)

    def of_volumes(self, ventricles: float, grey: float, white: float) -> Tensor:
        """The three measures from volumes in mm3 in the head's own size."""
        fraction, ratio = (grey + white) / self.head.volumes.intracranial, max(grey, 1.0) / max(white, 1.0)
        return torch.tensor([ventricles / self.ventricles, fraction, math.log(ratio)], dtype=torch.float64)

    @property
    def ventricles(self) -> float:
        """What is wanted, in the head's own size."""
        return self.target.ventricles / self.pose.growth

    @property
    def wanted(self) -> Tensor:
        """The measures that are wanted."""
        values = [1.0, self.target.brain_fraction, math.log(self.target.grey_over_white)]
        return torch.tensor(values, dtype=torch.float64)

    def part_way(self, start: Tensor, fraction: float) -> Tensor:
        """Measures between those of the start and the wanted ones: the ventricles grow by equal factors."""
        between = start + (self.wanted - start) * fraction
        between[0] = start[0] ** (1.0 - fraction)
        return between


def deform(head: SeedHead, target: PhantomTarget, pose: Pose, random: Tensor) -> Shape:
    """Deform a seed head until its label map measures what is wanted, to half a percent.

    Args:
        head: the seed head.
        target: volumes of the phantom.
        pose: its size and position.
        random: (1, 3, x, y, z) stationary velocity in mm, of a deformation that comes first; it is made to
            vanish at the skull.

    Raises:
        BundleError: if the volumes cannot be reached with this head, or the map folds.
    """
    _check(head, target, pose)
    course = _Course(head, pose, target, exponential(_in_box(random, head)))
    stages = _stages(course)
    start = course.measures(course.displacement)
    for stage in range(1, stages):
        course.displacement = _advanced(course, course.part_way(start, stage / stages))
        _unfolded(course, course.displacement)
    return _finished(course, stages)


def _unfolded(course: _Course, displacement: Tensor) -> float:
    """The smallest Jacobian determinant, which must be above 0."""
    least = least_jacobian(displacement)
    if least <= 0.0:
        raise BundleError(f"the map of {course.head.name} folds on the way to {_words(course.target)}")
    return least


def _check(head: SeedHead, target: PhantomTarget, pose: Pose) -> None:
    left = 1.0 - target.brain_fraction - target.ventricles / (pose.growth * head.volumes.intracranial)
    if left < LEAST_FLUID:
        raise BundleError(
            f"{_words(target)} do not fit into a skull of {pose.growth * head.volumes.intracranial / 1e3:.0f} mL: "
            f"{left:.1%} of it would be left for the fluid around the brain, at least {LEAST_FLUID:.0%} are needed"
        )


def _words(target: PhantomTarget) -> str:
    return f"ventricles of {target.ventricles / 1e3:.1f} mL and a brain of {target.brain_fraction:.1%} of the skull"


def _stages(course: _Course) -> int:
    """Stages in each of which the ventricles and the outer fluid change by moderate factors."""
    lateral, inner, outer, *_ = _sums(course.head, warp(course.head.shares, course.displacement))
    intracranial = course.head.volumes.intracranial
    left = (1.0 - course.target.brain_fraction) * intracranial - course.ventricles - inner
    growth = abs(math.log(course.ventricles / max(lateral, 1.0))) / STAGE_GROWTH
    fluid = abs(math.log(max(left, 0.01 * intracranial) / max(outer, 1.0))) / STAGE_FLUID
    return max(1, math.ceil(max(growth, fluid)))


def _sums(head: SeedHead, values: Tensor) -> list[float]:
    voxel = math.prod(head.flow.spacing)
    return [float(sum_of) * voxel for sum_of in total(values.double()).flatten()]


def _in_box(velocity: Tensor, head: SeedHead) -> Tensor:
    """Millimetres to units of the box, and a stop at the skull, along which the flow would slip."""
    extent = velocity.new_tensor(_extent(head))
    return velocity * (2.0 / extent).view(1, 3, 1, 1, 1) * head.window


def _extent(head: SeedHead) -> list[float]:
    return [n * abs(s) for n, s in zip(head.grid.shape, head.grid.spacing)]


def _rates(head: SeedHead, shares: Tensor) -> Tensor:
    """Growth of volume by the three flows, (3, x, y, z), each of which moves 1 mm3 a unit of time."""
    lateral, inner, outer, grey, white = shares[0] * head.flow.inside
    growing = lateral + THIRD_AND_FOURTH * inner
    brain = grey + white
    flows = [growing / total(lateral) - outer * (total(growing) / total(lateral) / total(outer))]
    flows += [brain / total(brain) - outer / total(outer), grey / total(grey) - white / total(white)]
    return torch.stack(flows) / math.prod(head.flow.spacing)


def _response(course: _Course, shares: Tensor, rates: Tensor) -> Tensor:
    """How the measures change with the strengths of the flows, to first order: (3, 3).

    Under a flow with divergence f, the volume of a tissue with shares p grows at the rate of the integral of p f.
    """
    _, _, _, grey, white = _sums(course.head, shares)
    growth = torch.tensor([_sums(course.head, shares * rate) for rate in rates], dtype=torch.float64)
    v, g, w = growth[:, 0], growth[:, 3], growth[:, 4]
    return torch.stack([v / course.ventricles, (g + w) / course.head.volumes.intracranial, g / grey - w / white])


def _advanced(course: _Course, wanted: Tensor) -> Tensor:
    """The displacement after one stage whose strengths are those of the first order."""
    head, shares = course.head, warp(course.head.shares, course.displacement)
    rates = _rates(head, shares)
    change = wanted - course.measures(course.displacement)
    strengths = torch.linalg.solve(_response(course, shares, rates), change)
    rate = torch.einsum("f,fxyz->xyz", strengths.to(rates), rates)[None]
    return compose(course.displacement, exponential(_in_box(-head.flow.velocity(rate), head)))


def _finished(course: _Course, stages: int) -> Shape:
    last = _LastStage(course, stages)
    near, response = _solved(last.roughly, course, last.response, torch.zeros(3, dtype=torch.float64), NEAR)
    voxels = course.ventricles / abs(math.prod(course.head.grid.spacing))
    exact = EXACT.clone()
    exact[0] = max(float(exact[0]), 1.0 / voxels)
    _unfolded(course, last.displacement)
    _solved(last.exactly, course, response, near, exact)
    return last.shape


class _LastStage:
    """The flows of the last stage, and what the head measures after them."""

    def __init__(self, course: _Course, stages: int) -> None:
        shares = warp(course.head.shares, course.displacement)
        rates = _rates(course.head, shares)
        self.course, self.stages = course, stages
        self.response = _response(course, shares, rates)
        self.velocities = course.head.flow.velocity(rates)

    def roughly(self, strengths: Tensor) -> Tensor:
        """The measures on the working grid."""
        head = self.course.head
        velocity = torch.einsum("f,fcxyz->cxyz", strengths.to(self.velocities), self.velocities)[None]
        self.displacement = compose(self.course.displacement, exponential(_in_box(-velocity, head)))
        return self.course.measures(self.displacement)

    def exactly(self, strengths: Tensor) -> Tensor:
        """The measures of the label map on the full grid."""
        self.roughly(strengths)
        self.shape = _at_full_size(self.course, self.displacement, self.stages)
        return self.course.of_volumes(*(v / self.course.pose.growth for v in self.shape.volumes.of_tissues))


def _solved(
    measure: Callable[[Tensor], Tensor], course: _Course, response: Tensor, strengths: Tensor, tolerance: Tensor
) -> tuple[Tensor, Tensor]:
    """Strengths at which the measures are as wanted, by Broyden's method, and the response that it ends with."""
    found = measure(strengths)
    for _ in range(STEPS):
        error = course.wanted - found
        if bool((error.abs() < tolerance).all()):
            return strengths, response
        step, singular = torch.linalg.solve_ex(response, torch.clamp(error, -LARGEST, LARGEST))
        if bool(singular) or not bool(step.abs().amax() < course.head.volumes.intracranial):
            break
        strengths = strengths + step
        before, found = found, measure(strengths)
        response = response + torch.outer(found - before - response @ step, step) / (step @ step)
    raise BundleError(
        f"{course.head.name} cannot be deformed to {_words(course.target)}: the last try has "
        f"{float(found[0]) * course.target.ventricles / 1e3:.1f} mL and {float(found[1]):.1%}"
    )


def _with_neck(positions: Tensor, planes: int) -> Tensor:
    """Positions below the field of view moved onto its lowest plane: a neck goes on, ears and crown do not."""
    x, y, z = positions.split(1, dim=1)
    return torch.cat((x, y, z.clamp(min=-1.0 + 1.0 / planes)), dim=1)


def _at_full_size(course: _Course, displacement: Tensor, stages: int) -> Shape:
    head = course.head
    positions = course.pose.positions(_extent(head), head.grid.shape, displacement.device)
    positions = _with_neck(positions + sample(displacement, positions), head.grid.shape[2])
    labels = sample(head.labels, positions, "nearest", "zeros")
    least = _unfolded(course, displacement)
    return Shape(displacement, labels, positions, count_volumes(labels, head.grid), least, stages)
