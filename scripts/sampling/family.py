# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a model is to all that samples from it: the family that its networks and its way of sampling belong to."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from scripts.core.config import build, current_config
from scripts.core.errors import BundleError


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


def choose_family(name: str, entry: str = "@families::{name}") -> ModelFamily:
    """The family of that name in the configuration's map. The others are not built: they may lack weights.

    Args:
        name: the key.
        entry: where in the configuration the entry of a name stands. MONAI takes it for text, and builds nothing; but
            what looks for the flags that a command has a use for sees a reference to the whole map.

    Raises:
        BundleError: for a name that is not in the map.
    """
    families: Mapping[str, Any] = current_config()[entry.strip("@").split("::")[0]]
    if name not in families:
        near = difflib.get_close_matches(str(name), families, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise BundleError(f"--family must be one of {', '.join(families)}, got '{name}'{hint}")
    return build(entry.strip("@").format(name=name)).eval()
