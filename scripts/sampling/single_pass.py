# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Models that make a volume of noise in one call: the generators of LSGAN and VAE-GAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scripts.compute.precision import autocast, precision_name
from scripts.networks.weights import Checkpoint
from scripts.sampling.family import ModelFamily


class SinglePass(ModelFamily):
    """One call of a generator, without conditions.

    Args:
        name: of the family.
        network: the generator, from noise (B, noise_size) to volumes (B, 1, X, Y, Z) of 0 to 1.
        noise_size: numbers that a volume starts from.
        checkpoint: of the generator, for the facts.
        amp: precision; see `scripts.compute.precision.half_precision`.

    Raises:
        BundleError: for a precision that does not exist.
    """

    conditional: ClassVar[bool] = False

    def __init__(
        self, name: str, network: nn.Module, noise_size: int, checkpoint: Checkpoint, amp: Any = False
    ) -> None:
        super().__init__()
        self.name, self.network, self.checkpoint = name, network, checkpoint
        self.noise_size, self.amp = noise_size, precision_name(amp)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(noise_size,)."""
        return (self.noise_size,)

    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of 0 to 1 for noise (B, noise_size), one at a time: the batch changes no bit."""
        with autocast(noise.device, self.amp):
            return torch.cat([self.network(one).float() for one in noise.split(1)])

    def facts(self) -> dict[str, Any]:
        """Family, precision, and the hash of the weights."""
        return {"family": self.name, "amp": self.amp, "weights": {"generator": self.checkpoint.identity}}
