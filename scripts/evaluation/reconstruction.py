# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How well an autoencoder gives volumes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.networks.nets import AutoencoderKL

from scripts.compute.counting import counted
from scripts.compute.kept import Values, complete, identity
from scripts.core.bootstrap import summarise
from scripts.core.errors import BundleError
from scripts.core.options import whole_number
from scripts.evaluation.measures import Measure, Metric, Result, Row, check_entries, settings
from scripts.volumes.folders import VolumeFolder

PICTURED = 6
LARGEST_DIFFERENCE = 0.2


class Reconstruction(Measure):
    """Metrics between volumes and what the autoencoder makes of them: the posterior mean, decoded, in float32.

    One volume is in memory at a time. The reconstruction is not clipped.

    Args:
        folder: the volumes.
        autoencoder: with its weights, in evaluation mode, on `device`; None where no folder was given.
        metrics: name -> metric of a reconstruction and its original, both (1, 1, X, Y, Z).
        values: where what was measured is kept.
        seed: of the bootstrap.
        device: where to compute.
    """

    says = (
        "How well the autoencoder gives a volume back, and so a limit on what any sample of the model can look like. "
        "PSNR is in dB, MAE in units of intensity, which goes from 0 to 1."
    )
    pitfall = "A smooth copy scores well: look at the pictures for lost texture. It says nothing about the samples."
    shows = "The middle axial plane of the first volumes, of their reconstructions, and their absolute difference."

    def __init__(
        self,
        folder: VolumeFolder,
        autoencoder: AutoencoderKL | None,
        metrics: Mapping[str, Metric],
        values: Values,
        seed: Any = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.inputs, self.folder = [folder], folder
        self.autoencoder = autoencoder
        check_entries("reconstruction_metrics", metrics)
        self.metrics = metrics
        self.values = values
        self._planes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.seed = whole_number(seed, "seed")
        self.device = torch.device(device)

    def update(self) -> None:
        """Measure the volumes that were not measured before, as one of several processes if there are any."""
        self._complete()

    def compute(self) -> Result:
        """The means over all volumes; the first few are reconstructed in any case, to be drawn.

        Raises:
            BundleError: if the autoencoder returns another shape, or NaN.
        """
        folder = self.folder
        self._complete(alone=True)
        table: list[dict[str, Any]] = [
            {"volume": folder.name(index), **self._known(index)} for index in range(len(folder))
        ]
        for index in range(min(PICTURED, len(folder))):
            if index not in self._planes:
                self._reconstruct(index)
        values = {name: np.array([line[name] for line in table]) for name in self.metrics}
        rows = [Row(n, summarise(v, np.arange(len(v)), self.seed), headline=False) for n, v in values.items()]
        facts = {"seed": self.seed, "settings": settings(self.metrics), folder.flag: folder.summary()}
        planes = [plane for _, plane in sorted(self._planes.items())]
        return Result(rows, facts, table, picture([line["volume"] for line in table[:PICTURED]], planes))

    @cached_property
    def _identities(self) -> dict[str, str]:
        assert self.autoencoder is not None
        weights = weights_hash(self.autoencoder)
        return {n: identity(n, m, weights=weights, **settings({n: m})[n]) for n, m in self.metrics.items()}

    def _known(self, index: int) -> dict[str, float]:
        digest = self.folder.hashes[index]
        found = {name: self.values.get(what, digest) for name, what in self._identities.items()}
        return {name: numbers[0] for name, numbers in found.items() if numbers is not None}

    def _complete(self, alone: bool = False) -> None:
        label = f"reconstructions of {self.folder.flag}"
        complete(label, range(len(self.folder)), self._is_known, self._measure, self.values, alone)

    def _is_known(self, index: int) -> bool:
        return self._known(index).keys() >= self.metrics.keys()

    def _measure(self, missing: Sequence[int]) -> None:
        for index in counted(missing, "reconstructing", unit="volume"):
            original, copy = self._reconstruct(index)
            for name, metric in self.metrics.items():
                digest = self.folder.hashes[index]
                self.values.add(self._identities[name], [digest], [float(metric(copy, original))])

    @torch.no_grad()
    def _reconstruct(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.autoencoder is not None
        folder = self.folder
        original = folder[index].to(self.device)
        copy = self.autoencoder.reconstruct(original)
        if copy.shape != original.shape:
            raise BundleError(
                f"the autoencoder turns {folder.paths[index]}, {tuple(original.shape[2:])}, into "
                f"{tuple(copy.shape[2:])}: give volumes on the bundle's grid"
            )
        if not copy.isfinite().all():
            raise BundleError(f"the autoencoder gives NaN or infinite values for {folder.paths[index]}")
        if index < PICTURED:
            self._planes[index] = _mid_plane(original), _mid_plane(copy)
        return original, copy


def weights_hash(network: torch.nn.Module) -> str:
    """SHA-256 of a network's weights, names and types included."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _mid_plane(volume: torch.Tensor) -> np.ndarray:
    plane = volume[0, 0, :, :, volume.shape[-1] // 2].cpu().numpy()
    return plane[:, ::-1].T


def picture(names: Sequence[str], planes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Figure:
    """A row for each volume: its middle axial plane, the reconstruction, and their absolute difference.

    Args:
        names: of the volumes.
        planes: original and reconstruction, (rows, columns), 0..1.
    """
    figure = Figure(figsize=(7.5, 3.2 * len(planes)), layout="constrained")
    for axes, name, (original, copy) in zip(figure.subplots(len(planes), 3, squeeze=False), names, planes):
        _show(axes[0], original, fill(name, 40, break_on_hyphens=False))
        _show(axes[1], copy, "reconstruction")
        _show(axes[2], np.abs(original - copy), f"difference, 0 to {LARGEST_DIFFERENCE}", "inferno", LARGEST_DIFFERENCE)
    return figure


def _show(axes: Axes, plane: np.ndarray, title: str, colours: str = "gray", top: float = 1.0) -> None:
    axes.imshow(plane, cmap=colours, vmin=0.0, vmax=top)
    axes.set_title(title, fontsize=8, parse_math=False)
    axes.set_axis_off()
