# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a model is to all that samples from it: the family that its networks and its way of sampling belong to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pydoc import locate
from typing import Any, ClassVar, NamedTuple

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from scripts.conditions.conditions import Conditions, NoConditions
from scripts.core.config import choose, entry_of
from scripts.core.errors import BundleError

ENTRY = "@families::{name}"


class Part(NamedTuple):
    """A network to export: its name, examples of its inputs by name, each a batch of two, and its output's name."""

    name: str
    network: nn.Module
    inputs: dict[str, Tensor]
    output: str


class ModelFamily(nn.Module, ABC):
    """Noise and conditions to volumes: one entry of the map `families`, with the networks that it samples with.

    Requests, saver, figures and export know nothing else of a model. A new family is a class of these methods, and an
    entry in `families` that says what it is built of.
    """

    conditional: ClassVar[bool] = True
    """Whether samples have conditions at all. Where they do not, those that are given are refused."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the standard normal noise that a sample starts from, without the batch, such as (C, x, y, z)."""

    @abstractmethod
    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Volumes of a batch. Each depends on its own noise, condition and generator alone.

        Args:
            noise: (B, *noise_shape), on the device to compute on.
            condition: (B, n), nominally 0..1; n is 0 without conditions.
            generators: one a sample, on the CPU, for what is drawn besides the noise.

        Returns:
            (B, 1, X, Y, Z) float32, of the grid's shape; intensities nominally 0..1, whatever the networks' own range.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the sidecars say of how all samples of a run were made, as plain data.

        A sample whose sidecar states other facts counts as another one. `family` names the family; sidecars and
        checkpoints without it are of latent diffusion.
        """

    def release(self) -> None:
        """Give back what memory the weights take, where they can be read again when they are next used."""
        return None

    def encode(self, volume: Tensor) -> Tensor:
        """What trajectories that give these volumes end in: what is diffused, without noise.

        Args:
            volume: (B, 1, X, Y, Z) of the grid's shape, intensities 0..1.

        Returns:
            (B, *noise_shape) float32.

        Raises:
            BundleError: for a family without a way back from volumes.
        """
        raise BundleError(
            f"{type(self).__name__} has no way back from a volume to its noise: edit with a diffusion model"
        )

    def export(self) -> tuple[list[Part], dict[str, Any]]:
        """The networks as files shall have them, and what `export.json` says beside their inputs.

        Raises:
            BundleError: for a family that cannot be exported.
        """
        raise BundleError(f"{type(self).__name__} cannot be exported: configs/export.yaml is for latent diffusion")


class FamilyInferer(Inferer):
    """Has MONAI's `SupervisedEvaluator`, whose network is a family, sample with it."""

    def __call__(
        self, inputs: Tensor, network: ModelFamily, condition: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """See `ModelFamily.sample`; `inputs` is the noise."""
        return network.sample(inputs, condition, generators)


def choose_family(name: str, entry: str = ENTRY) -> ModelFamily:
    """The family of that name in the configuration's map. The others are not built: they may lack weights.

    Args:
        name: the key.
        entry: see `scripts.core.config.choose`.

    Raises:
        BundleError: for a name that is not in the map.
    """
    return choose(name, entry, "family").eval()


def model_conditions(conditions: Conditions, name: str, entry: str = ENTRY) -> Conditions:
    """The conditions that samples of a family have: those configured, or none where its class takes none.

    Args:
        conditions: the configured ones.
        name, entry: see `choose_family`.

    Raises:
        BundleError: for a name that is not in the map.
    """
    found = entry_of(name, entry, "family")
    target = locate(str(found["_target_"])) if isinstance(found, Mapping) else None
    conditional = getattr(target, "conditional", True)
    return conditions if conditional else NoConditions(conditions, f"the family {name}")
