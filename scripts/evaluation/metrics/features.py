# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Features of volumes from pretrained networks, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from scripts.compute.counting import counted
from scripts.compute.kept import complete
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing, write_json
from scripts.core.inputs import Input
from scripts.evaluation.measures import check_entries
from scripts.networks.weights import check_values, check_zip
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

Extractor = Callable[[torch.Tensor], torch.Tensor]


class FeatureNetwork(Protocol):
    """A pretrained network and the preprocessing that goes with it; nothing is read before it is used."""

    @property
    def given(self) -> bool:
        """Whether a flag of its own asks for it, as that for the file of its weights."""
        ...

    @property
    def dimension(self) -> int:
        """Number of features of a volume."""
        ...

    def facts(self) -> dict[str, Any]:
        """All that the features depend on, the hash of the weights included, as plain data."""
        ...

    def load(self, device: torch.device) -> Extractor:
        """The function from a volume, (1, 1, X, Y, Z) of intensities 0..1, to its features, (dimension,)."""
        ...


class FeatureNetworks(Input):
    """Those of the feature networks that were asked for.

    Args:
        names: what `--features` says: a name, several separated by commas, or a list; None for none.
        networks: all that there are, by name.

    Attributes:
        chosen: name -> network, of those named and those that are given by a flag of their own.

    Raises:
        BundleError: for a name that is not known.
    """

    flag = "features"

    def __init__(self, names: Any, networks: Mapping[str, FeatureNetwork]) -> None:
        check_entries("feature_networks", networks, ("given", "facts", "load"))
        named = _names(names)
        for name in named:
            if name not in networks:
                raise BundleError(f"--features: there is no network '{name}'; there are {', '.join(networks)}")
        self.chosen = {name: network for name, network in networks.items() if name in named or network.given}

    @property
    def requested(self) -> bool:
        """Whether any network was asked for."""
        return bool(self.chosen)

    def check(self) -> None:
        """Raise a `BundleError` if the weights of a network that was asked for cannot be used."""
        for network in self.chosen.values():
            network.load(torch.device("cpu"))


def _names(names: Any) -> list[str]:
    if names is None:
        return []
    parts = names.split(",") if isinstance(names, str) else names
    if not isinstance(parts, Sequence):
        raise BundleError(f"--features takes names separated by commas, got '{names}'")
    return [str(part).strip() for part in parts if str(part).strip()]


class FeatureSet:
    """The features of a folder's volumes.

    Each volume's features are a file `<feature_dir>/<network>-<id>/<SHA-256 of the volume>.npy`, in which the
    id stands for all that `FeatureNetwork.facts` says: another network, preprocessing or volume is never
    taken for this one, a volume that moved is found again, and an interrupted run goes on where it stopped.
    One volume at a time is in memory. Under torchrun each process computes its share.

    Args:
        folder: the volumes.
        networks: which networks.
        feature_dir: where to keep the features.
        device: where to compute.
    """

    def __init__(
        self, folder: VolumeFolder, networks: FeatureNetworks, feature_dir: str, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = folder
        self.networks = networks
        self.feature_dir = Path(str(feature_dir))
        self.device = torch.device(device)

    @property
    def inputs(self) -> list[Input]:
        """The flags that it needs."""
        return [self.folder, self.networks]

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of each volume's file."""
        return self.folder.hashes

    def extract(self, alone: bool = False) -> None:
        """Compute what is not on disk yet; returns when all processes are done.

        Args:
            alone: see `scripts.compute.kept.complete`.

        Raises:
            BundleError: if a volume, a network's weights or the folder cannot be used, or features are not finite.
        """
        for name in self.networks.chosen:
            cache = make_folder(self._cache(name))
            items = enumerate(cache / f"{digest}.npy" for digest in self.hashes)
            label, compute = f"{name} features of {self.folder.flag}", partial(self._compute, name)
            known = partial(_is_there, self.networks.chosen[name].dimension)
            complete(label, items, known, compute, alone=alone)

    def _cache(self, name: str) -> Path:
        facts = json.dumps(self.networks.chosen[name].facts(), sort_keys=True)
        return self.feature_dir / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    @torch.inference_mode()
    def _compute(self, name: str, missing: list[tuple[int, Path]]) -> None:
        network = self.networks.chosen[name]
        write_json(missing[0][1].parent / "network.json", network.facts())
        extractor = network.load(self.device)
        for index, file in counted(missing, f"{name} features of {self.folder.flag}", unit="volume"):
            features = extractor(self.folder[index].to(self.device)).double().cpu().numpy()
            if features.shape != (network.dimension,) or not np.isfinite(features).all():
                raise BundleError(f"{name} gives no finite features of {self.folder.paths[index]}")
            with replacing(file) as temporary:
                np.save(temporary, features)

    def matrix(self, name: str) -> np.ndarray:
        """(volumes, dimension) float64: the features by one network, which are computed if need be.

        Raises:
            BundleError: as `extract`.
        """
        cache, dimension = self._cache(name), self.networks.chosen[name].dimension
        files = [cache / f"{digest}.npy" for digest in self.hashes]
        if not all(_is_there(dimension, (0, file)) for file in files):
            self.extract(alone=True)
        return np.stack([np.load(file, allow_pickle=False) for file in files])


def _is_there(dimension: int, item: tuple[int, Path]) -> bool:
    """Whether features are kept in a file; damaged ones are not, and are made again."""
    path = item[1]
    if not path.is_file():
        return False
    try:
        features = np.load(path, allow_pickle=False)
        usable = features.shape == (dimension,) and features.dtype.kind == "f" and bool(np.isfinite(features).all())
    except (OSError, ValueError, EOFError):
        usable = False
    if not usable:
        logger.warning(f"the features in {path} are damaged, and are made again")
    return usable


def read_weights(path: str | os.PathLike, what: str, source: str) -> dict[str, torch.Tensor]:
    """A state dict from a `.pth` file, read without running a pickle; `state_dict` and `module.` are unwrapped.

    Args:
        path: the file.
        what: of what network, for messages.
        source: where to get it, for messages.

    Raises:
        BundleError: if there is no such file, or it holds no state dict.
    """
    path = Path(str(path))
    if not path.is_file():
        raise BundleError(f"there are no weights of {what} at {path}: {source}")
    check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BundleError(f"{path} holds no weights of {what}, or was cut short: {source}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise BundleError(f"{path} holds no weights of {what}: {source}")
    check_values(path, tensors)
    return tensors


def load_strictly(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Any, what: str) -> None:
    """Put a state dict into a network, all of it and nothing else.

    Raises:
        BundleError: if a weight is missing, superfluous or of another shape.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()[1:]]
        raise BundleError(f"{path} is not {what}: {details[0][:200] if details else error}") from error
