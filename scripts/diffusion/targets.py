# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of targets: what a network may estimate, and all that follows from it.

A noisy volume or latent is z = a x + s e, for a clean x and standard normal noise e. A target is an output

    o = p x + q e,

with p and q functions of a and s. Whatever they are, two equations in x and e have one solution,

    x = (q z - s o) / d,    e = (a o - p z) / d,    d = a q - s p,

so that training, samplers and the weight of the loss ask the table and know no target by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from scripts.core.errors import BundleError

DIFFUSION, FLOW = "ddim", "flow"


class Target(NamedTuple):
    """One row. In all methods a and s are numbers, or tensors that broadcast with the volumes or latents.

    Attributes:
        schedule: the entry of the map `schedules` that it stands on: `ddim`, on which a^2 + s^2 = 1, or `flow`, on
            which a + s = 1.
        coefficients: (a, s) to (p, q, d), with d as short as the schedule's a and s allow: the less is computed, the
            less is rounded.
        monais: MONAI's name of it on `schedule`, where it has one.
    """

    schedule: str
    coefficients: Callable[[Any, Any], tuple[Any, Any, Any]]
    monais: str = ""

    def output(self, clean: Tensor, noise: Tensor, a: Any, s: Any) -> Tensor:
        """What the network shall put out, in the shape of `clean` and `noise`."""
        p, q, _ = self.coefficients(a, s)
        return p * clean + q * noise

    def clean_factors(self, a: float, s: float) -> tuple[float, float]:
        """The factors of z and of o in the clean x."""
        _, q, d = self.coefficients(a, s)
        return q / d, -s / d

    def clean(self, output: Tensor, noisy: Tensor, a: Any, s: Any) -> Tensor:
        """The clean x that an output for z implies."""
        _, q, d = self.coefficients(a, s)
        return _combined(q, noisy, -s, output, d)

    def noise(self, output: Tensor, noisy: Tensor, a: Any, s: Any) -> Tensor:
        """The noise e that an output for z implies."""
        p, _, d = self.coefficients(a, s)
        return _combined(-p, noisy, a, output, d)

    def min_snr_weight(self, a: Tensor, s: Tensor, cap: float) -> Tensor:
        """The weight of the output's squared error that caps the signal-to-noise ratio R = a^2/s^2.

        Hang et al. 2023 (arXiv:2303.09556) weigh the error of the clean x by min(R, cap). An error of the output is
        one of x times d/s, so that it has the weight min(R, cap) (s/d)^2: for `epsilon` min(R, cap)/R, for `velocity`
        min(R, cap)/(R + 1), as there.
        """
        _, _, d = self.coefficients(a, s)
        return ((a / s) ** 2).clamp(max=cap) / (d / s) ** 2


def _combined(u: Any, first: Tensor, w: Any, second: Tensor, d: Any) -> Tensor:
    """(u first + w second) / d; where one factor is 0, the other's quotient comes first, which is often exactly 1."""
    if isinstance(u, float) and u == 0.0:
        return w / d * second
    return (u * first + w * second) / d


TARGETS = {
    # e: Ho et al. 2020 (arXiv:2006.11239), the paper's
    "epsilon": Target(DIFFUSION, lambda a, s: (0.0, 1.0, a), "epsilon"),
    # x
    "sample": Target(DIFFUSION, lambda a, s: (1.0, 0.0, -s), "sample"),
    # a e - s x: Salimans & Ho 2022 (arXiv:2202.00512)
    "velocity": Target(DIFFUSION, lambda a, s: (-s, a, 1.0), "v_prediction"),
    # x - e, from noise to data: Liu et al. 2022 (arXiv:2209.03003). This is the sign of MONAI's `RFlowScheduler`, whose
    # `step` adds the velocity; others state e - x
    "flow": Target(FLOW, lambda a, s: (1.0, -1.0, -1.0)),
    # e - x, on the schedule of diffusion
    "difference": Target(DIFFUSION, lambda a, s: (-1.0, 1.0, a + s)),
}


def find_target(name: str) -> Target:
    """The row of that name.

    Raises:
        BundleError: if there is none.
    """
    if name not in TARGETS:
        raise BundleError(f"--target must be one of {', '.join(TARGETS)}, got '{name}'")
    return TARGETS[name]


def from_monais_name(name: str) -> str:
    """The target that MONAI's schedules of diffusion call so; another name is left as it is."""
    return next((target for target, row in TARGETS.items() if row.monais == name), name)
