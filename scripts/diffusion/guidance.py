# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: training without the conditions now and then, sampling away from that.

Ho & Salimans 2022 (arXiv:2207.12598). With w = 1 for no guidance, the network's output becomes
null + w (conditional - null): the paper's w plus one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform
from torch import Tensor

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.options import is_absent, number
from scripts.networks.weights import Checkpoint

NULL_CONDITION = -1.0


class RandDropConditiond(MapTransform):
    """Dictionary transform that sometimes replaces the whole vector of conditions by the null vector.

    Every condition of the null vector is -1, one range below the 0 to 1 of the data, so that it stands for
    no brain that the model is shown. Drawn with torch's random state, one number a call whatever comes of it.

    Args:
        keys: entries that hold vectors of conditions, of shape (conditions,).
        prob: how often, 0 to 1; 0 leaves the conditions alone.
        value: of every condition of the null vector.
        conditions: those of the vectors, if it matters whether there are any.

    Raises:
        BundleError: unless `prob` is from 0 to 1, or if it is above 0 and there are no conditions.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        prob: Any = 0.0,
        value: float = NULL_CONDITION,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__(keys)
        self.prob = number(prob, "condition_dropout", 0.0, 1.0)
        if self.prob and conditions is not None and not conditions:
            raise BundleError("--condition_dropout hides conditions now and then, and the model has none: leave it out")
        self.value = float(value)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its vectors kept or, all of them together, dropped."""
        given = dict(data)
        if torch.rand(()).item() < self.prob:
            for key in self.key_iterator(given):
                given[key] = torch.full_like(given[key], self.value)
        return given


def null_conditions(condition: Tensor) -> Tensor:
    """Null vectors in the shape of a batch of conditions, (B, conditions)."""
    return torch.full_like(condition, NULL_CONDITION)


def guidance_scale(guidance: Any, checkpoint: Checkpoint) -> float | None:
    """The factor w that was asked for, or None for sampling without guidance.

    Args:
        guidance: 1 follows the conditions as without guidance, at twice the computing; more exaggerates
            them; 0 ignores them.
        checkpoint: of the diffusion model; its fact `condition_dropout` says whether it knows the null vector.

    Raises:
        BundleError: if it is no number of at least 0, or the model was trained without dropping conditions.
    """
    if is_absent(guidance):
        return None
    scale = number(guidance, "guidance", 0.0)
    if not checkpoint.facts.get("condition_dropout"):
        raise BundleError(
            f"--guidance needs a model that was trained with --condition_dropout above 0, and {checkpoint.path} "
            "does not say so: leave out --guidance"
        )
    return scale
