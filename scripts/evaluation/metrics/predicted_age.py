# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How old the samples look, against the age that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from scripts.conditions.conditions import Condition, Conditions
from scripts.core.bootstrap import summarise
from scripts.core.correlation import correlations, in_words, pearson
from scripts.core.errors import BundleError
from scripts.core.inputs import Input
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Result, Row
from scripts.evaluation.metrics.features import Extractor, FeatureNetworks, FeatureSet
from scripts.evaluation.stated_conditions import stated_conditions, table_rows
from scripts.measuring.brain_age import AGE, age_condition, age_of, fingerprint, network_of
from scripts.networks.weights import Checkpoint, load_network, read_checkpoint
from scripts.volumes.folders import VolumeFolder

logger = logging.getLogger(__name__)

NETWORK = "brain_age"
FACTS = ("shape", "spacing", "channels", "age_mean", "age_deviation", "age_range", "trained_on")


class BrainAgeFile:
    """The trained network as one whose only feature is age in years, so that ages are kept as features are.

    Args:
        path: `brain_age.pt` of train_brain_age.yaml; None if it was not given.
    """

    dimension = 1

    def __init__(self, path: Any) -> None:
        self.path = path

    @property
    def given(self) -> bool:
        """Whether the file was given."""
        return self.path is not None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What the file holds.

        Raises:
            BundleError: if it is missing, damaged, or not of a brain age network.
        """
        source = "train one with configs/train_brain_age.yaml"
        if not Path(str(self.path)).is_file():
            raise BundleError(f"--brain_age_path: there is no file {self.path}: {source}")
        checkpoint = read_checkpoint(self.path, NETWORK)
        lacking = [name for name in FACTS if name not in checkpoint.facts]
        if lacking:
            raise BundleError(
                f"--brain_age_path {self.path} is of no brain age network (it has no {lacking[0]}): {source}"
            )
        return checkpoint

    def facts(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        return {"network": "Cole et al. 2017", "weights_sha256": self.checkpoint.sha256}

    def load(self, device: torch.device) -> Extractor:
        """See `FeatureNetwork`."""
        network = load_network(network_of(self.checkpoint.facts), self.checkpoint, device=device)
        return partial(_told, network, tuple(self.checkpoint.facts["shape"]))

    def check_grid(self, folder: VolumeFolder) -> None:
        """Raise a `BundleError` unless a folder's volumes are on the network's grid, or one that divides its voxels."""
        shape, spacing = tuple(self.checkpoint.facts["shape"]), self.checkpoint.facts["spacing"]
        voxels = np.array(folder.shape) // np.array(shape)
        same = np.array_equal(voxels * shape, folder.shape) and np.allclose(voxels * folder.spacing, spacing, rtol=1e-3)
        if voxels.min() < 1 or not same:
            found, wanted = (
                f"{tuple(size)} voxels of {' x '.join(f'{side:g}' for side in steps)} mm"
                for size, steps in ((folder.shape, folder.spacing), (shape, spacing))
            )
            raise BundleError(f"--{folder.flag} has {found}, the brain age network was trained on {wanted}")


def _told(network: nn.Module, shape: tuple[int, int, int], volumes: Tensor) -> Tensor:
    """Ages of volumes on a grid as fine as the network's of this shape, or finer: then averaged over its voxels."""
    return network(functional.interpolate(volumes, shape, mode="area"))


class BrainAgeNetworks(FeatureNetworks):
    """The one network of `--brain_age_path`.

    Args:
        path: see `BrainAgeFile`.
    """

    flag = "brain_age_path"

    def __init__(self, path: Any) -> None:
        super().__init__(None, {NETWORK: BrainAgeFile(path)})

    @property
    def file(self) -> BrainAgeFile:
        """The network, where it was given."""
        return self.chosen[NETWORK]  # type: ignore[return-value]


class BrainAge(Measure):
    """Predicted against requested age of samples, and against the true one of people held out from the network.

    Of each set there are the mean absolute error (years), Pearson's and Spearman's r and the slope of the least
    squares line of predicted on stated age. Volumes that the network was trained on are left out of the real set.

    Args:
        synthetic: samples with their sidecars or their table.
        real: a dataset with its table; those without age are left out.
        networks: the network.
        feature_dir: where ages are kept, as features are.
        conditions: one of them is `age`.
        seed: of the bootstrap.
        device: where to compute.
    """

    says = (
        "Whether samples look the age that was asked for: a network tells their age, and that of people held out from "
        "it for comparison (the paper's Figure 3, right)."
    )
    pitfall = (
        "The network errs on real people too, and towards the middle of its training's ages: compare with the held-out "
        "real volumes, not with a correlation of 1."
    )
    shows = "Predicted against stated age in years, one point a volume; the line is that of equal ages."

    def __init__(
        self,
        synthetic: FeatureSet,
        real: VolumeFolder,
        networks: BrainAgeNetworks,
        feature_dir: str,
        conditions: Conditions,
        seed: Any = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.synthetic, self.real, self.networks = synthetic.folder, real, networks
        self.inputs: list[Input] = [
            real if real.requested and not self.synthetic.requested else self.synthetic,
            networks,
        ]
        self.feature_dir, self.conditions, self.device = feature_dir, conditions, device
        self.seed = whole_number(seed, "seed")

    @cached_property
    def sets(self) -> dict[str, tuple[FeatureSet, list[float]]]:
        """`synthetic` and `real`, where there are such volumes with ages: the volumes and their ages in years.

        Raises:
            BundleError: if no set is left, or the volumes are not on the network's grid.
        """
        found = {}
        for name, folder in (("synthetic", self.synthetic), ("real", self.real)):
            if folder.requested:
                self.networks.file.check_grid(folder)
                kept, ages = self._aged(folder)
                if ages:
                    found[name] = (FeatureSet(kept, self.networks, self.feature_dir, self.device), ages)
        if not found:
            raise BundleError("--brain_age_path: no volume has an age to compare with")
        return found

    def _aged(self, folder: VolumeFolder) -> tuple[VolumeFolder, list[float]]:
        ages, rows = ages_in(folder, self.conditions), table_rows(folder)
        trained = self._trained_on(ages, rows) if folder is self.real else set()
        kept = {path: age for path, age in ages.items() if age is not None and path not in trained}
        unknown = sum(age is None for age in ages.values())
        if unknown:
            logger.warning(f"--{folder.flag}: {unknown} of {len(ages)} volumes have no age: brain age leaves them out")
        if trained:
            logger.info(f"--{folder.flag}: the brain age network was trained on {len(trained)} volumes: left out")
        if ages and not kept:
            logger.warning(f"--{folder.flag}: no volume is left to tell the age of")
        return folder.part(list(kept)), list(kept.values())

    def _trained_on(self, ages: Mapping[Path, float | None], rows: Mapping[Path, Mapping[str, str]]) -> set[Path]:
        known = set(self.networks.file.checkpoint.facts["trained_on"])
        named = {path: rows[path].get("participant_id", "") for path in ages if path in rows}
        return {p for p, name in named.items() if ages[p] is not None and fingerprint(name, ages[p] or 0.0) in known}

    def check(self) -> None:
        """Raise a `BundleError` as `sets`, before anything is computed."""
        _ = self.sets

    def update(self) -> None:
        """Tell the ages that are not on disk yet; under torchrun, each process its share."""
        for volumes, _ in self.sets.values():
            volumes.extract()

    def compute(self) -> Result:
        """Compare.

        Raises:
            BundleError: as `sets`.
        """
        rows: list[Row] = []
        table = []
        for name, (volumes, ages) in self.sets.items():
            stated, predicted = np.array(ages), volumes.matrix(NETWORK)[:, 0]
            table += [
                {"volume": volumes.folder.name(i), "set": name, "age_years": a, "predicted_years": round(float(p), 3)}
                for i, (a, p) in enumerate(zip(ages, predicted))
            ]
            error = summarise(np.abs(predicted - stated), np.arange(len(ages)), self.seed)
            found = {"mae": error, **correlations(f"{name}_age", stated, predicted, self.seed)}
            rows += [Row(metric, one, AGE, kind=name, headline=False) for metric, one in found.items()]
        return Result(rows, self._facts(), table, scatter(table))

    def _facts(self) -> dict[str, Any]:
        file = self.networks.file
        folders = {volumes.folder.flag: str(volumes.folder.folder) for volumes, _ in self.sets.values()}
        trained = {
            "age_range": file.checkpoint.facts["age_range"],
            "trained_on": len(file.checkpoint.facts["trained_on"]),
        }
        return {"brain_age_path": str(file.path), **file.facts(), **trained, "seed": self.seed, **folders}


def ages_in(folder: VolumeFolder, conditions: Conditions) -> dict[Path, float | None]:
    """Each volume of a folder and its age in years, as its sidecar or its table states it; None where none does.

    Raises:
        BundleError: if there is no condition `age`, or an age is no number.
    """
    condition, rows = age_condition(conditions), table_rows(folder)
    return {path: _age(path, rows.get(path), condition) for path in folder.paths}


def _age(path: Path, row: Mapping[str, str] | None, condition: Condition) -> float | None:
    stated = stated_conditions(path, row)
    return None if stated is None else age_of(stated, condition, f" of {path}")


def scatter(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against stated age in years, one panel a set, with the line of identity."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(4.5 * len(sets), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False, sharex=True, sharey=True)[0], sets):
        of_set = [row for row in rows if row["set"] == name]
        stated, predicted = (np.array([row[key] for row in of_set]) for key in ("age_years", "predicted_years"))
        ends = [min(stated.min(), predicted.min()), max(stated.max(), predicted.max())]
        axes.plot(ends, ends, color="0.7", linewidth=1)
        axes.scatter(stated, predicted, s=8)
        axes.set_xlabel(f"{AGE} {'requested' if name == 'synthetic' else 'of the person'} (years)")
        axes.set_ylabel("predicted (years)")
        error = np.abs(predicted - stated).mean()
        axes.set_title(f"{name}: {in_words(pearson(stated, predicted))}, MAE = {error:.1f} years", fontsize=9)
    return figure
