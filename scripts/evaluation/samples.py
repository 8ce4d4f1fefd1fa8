# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of samples, one for each model that is evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.compute.kept import Values
from scripts.core.errors import BundleError
from scripts.evaluation.metrics.features import FeatureNetworks, FeatureSet
from scripts.volumes.folders import VolumeFolder
from scripts.volumes.grid import Grid

FLAG = "synthetic_dir"
NAME = re.compile(r"(?!\.+$)[\w.+-]+")
REAL = "real"
"""The name of the real volumes' row in the table of models."""


class Samples:
    """The folders of samples, by the names of their models.

    Args:
        folders: a folder; several, separated by commas or as a list, which give the models' names; or a map from
            the models' names to folders. None if none was given.
        networks, feature_dir, device: of the features; see `FeatureSet`.
        values, grid, resample: of the folders; see `VolumeFolder`.

    Attributes:
        sets: name of the model -> its volumes. One folder that was not given a name has an empty one.

    Raises:
        BundleError: if two models have one name, or a name is `real` or unfit for a file, if their volumes are not
            on one grid, and for what `VolumeFolder` refuses.
    """

    def __init__(
        self,
        folders: Any,
        networks: FeatureNetworks,
        feature_dir: str,
        values: Values,
        device: torch.device | str = "cpu",
        grid: Grid | None = None,
        resample: Any = False,
    ) -> None:
        named = named_folders(folders).items()
        found = {name: VolumeFolder(path, FLAG, values, grid, resample) for name, path in named}
        given = [folder for folder in found.values() if folder.requested]
        for other in given[1:]:
            given[0].check_same_grid(other)
        self.sets = {name: FeatureSet(folder, networks, feature_dir, device) for name, folder in found.items()}


def named_folders(folders: Any) -> dict[str, Any]:
    """Name -> folder, as `Samples` takes them.

    Raises:
        BundleError: for a name that is there twice, that is `real`, that a file cannot have, or that has no folder.
    """
    if isinstance(folders, Mapping):
        named = {str(name): path for name, path in folders.items()}
        _check(list(named))
        for name, path in named.items():
            if path is None:
                raise BundleError(f"--{FLAG}: the model {name} has no folder")
        return named or {"": None}
    paths = several(folders)
    if len(paths) < 2:
        return {"": paths[0] if paths else None}
    names = [Path(path).resolve().name for path in paths]
    _check(names)
    return dict(zip(names, paths))


def several(folders: Any) -> list[str]:
    """The paths of a flag that takes one, or several as a list or separated by commas."""
    if folders is None:
        return []
    if isinstance(folders, Sequence) and not isinstance(folders, str):
        return [str(path).strip() for path in folders]
    if Path(str(folders)).is_dir():
        return [str(folders)]
    return [path.strip() for path in str(folders).split(",") if path.strip()]


def _check(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise BundleError(
                f"--{FLAG}: two folders are called {name}: name them with a map, {{'first': 'a/{name}', ...}}"
            )
        if name == REAL or not NAME.fullmatch(name):
            raise BundleError(
                f"--{FLAG}: '{name}' cannot be the name of a model: use letters, digits and . _ + -, and not dots alone"
            )
