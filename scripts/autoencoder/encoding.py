# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoding a prepared dataset once, so that the diffusion model trains on latents alone."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scripts.autoencoder.latent_writer import VOLUME, LatentWriter
from scripts.autoencoder.latents import (
    ENCODING,
    POSTERIORS,
    Posteriors,
    are_moments,
    array_sha256,
    noise_share,
    read_encoding,
    warn_of_noise,
)
from scripts.compute.counting import counted
from scripts.compute.devices import process_rank
from scripts.compute.precision import autocast
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, make_folder, write_json
from scripts.core.option_types import check_disk
from scripts.core.options import whole_number
from scripts.core.tables import write_table
from scripts.networks.weights import Checkpoint, encoder_sha256
from scripts.volumes.datasets import TABLE

logger = logging.getLogger(__name__)

MANY = 10**6
DTYPES = ("float16", "float32")
Scans = Sequence[Mapping[str, Any]]


class LatentEncoder:
    """Caches the posterior of every scan of a dataset, in the format of `scripts.autoencoder.latents`.

    The same call goes on where it was stopped, and encodes what has changed since. Under torchrun, each process
    encodes its share, and the last to finish writes the table.

    float16 rounds a latent by at most 5e-4 of its value, about 80 times less than the least noise that the
    released schedule adds (standard deviation 0.039 on latents of unit variance).

    Args:
        autoencoder: MONAI's `AutoencoderKL`, loaded.
        checkpoint: where its weights came from.
        load: transform from a row of the dataset to its volume, (1, X, Y, Z) under `image`.
        augment: random transform of such rows, for `versions` above 1.
        folder: where to write.
        latent_shape: (C, x, y, z).
        versions: latents a scan: the scan itself, then augmented ones.
        seed: of the augmentation.
        latent_dtype: `float16` or `float32`.
        settings: plain data; what else decides how every latent looks.
        augmentation: numbers that, besides, decide how the augmented ones look.
        num_workers: processes that load volumes.
        device: where to compute.
        amp: whether to compute in bfloat16.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        checkpoint: Checkpoint,
        load: Callable,
        augment: Callable,
        folder: str,
        latent_shape: Sequence[int],
        versions: Any = 1,
        seed: Any = 0,
        latent_dtype: str = "float16",
        settings: Mapping[str, Any] | None = None,
        augmentation: Mapping[str, Any] | None = None,
        num_workers: Any = 0,
        device: torch.device | str = "cpu",
        amp: bool = False,
    ) -> None:
        if latent_dtype not in DTYPES:
            raise BundleError(f"--latent_dtype must be {' or '.join(DTYPES)}, got '{latent_dtype}'")
        self.autoencoder, self.load, self.augment = autoencoder, load, augment
        self.folder, self.latent_shape, self.dtype = Path(folder), tuple(latent_shape), latent_dtype
        self.versions = whole_number(versions, "latent_versions", least=1)
        self.num_workers = whole_number(num_workers, "num_workers")
        self.device, self.amp = torch.device(device), amp
        self.origin: dict[str, Any] = {"encoder_sha256": encoder_sha256(checkpoint.state), "latent_dtype": latent_dtype}
        self.origin |= {"amp": str(amp), "settings": dict(settings or {})}
        self.seed = whole_number(0 if seed is None else seed, "seed")
        self.augmentation = {"seed": self.seed, **{k: float(v) for k, v in (augmentation or {}).items()}}

    def __call__(self, scans: Scans) -> None:
        """Encode the rows of `scripts.volumes.datasets.participants`; what is there of the same recipe and scan is
        kept.

        Raises:
            BundleError: if a volume cannot be read, a latent is not finite, or the folder not written.
        """
        rank, world = process_rank()
        make_folder(self.folder)
        self._check_room(len(scans))
        recipes = [self._recipe(*self._scan(scans, row)) for row in range(len(scans) * self.versions)]
        writer = LatentWriter(self.folder, np.array(recipes), self.latent_shape, self.dtype, prepares=rank == 0)
        new = self._encode(scans, writer, range(rank, len(recipes), world))
        logger.info(f"{self.folder}: {new} latents encoded, of {len(recipes)} in all")
        if writer.is_complete():
            self._finish(scans, writer)

    def _check_room(self, scans: int) -> None:
        """Before as much as a list of the latents is made, where that would be a long one."""
        if scans * self.versions < MANY:
            return
        each = 2 * int(np.prod(self.latent_shape)) * np.dtype(self.dtype).itemsize
        check_disk(self.folder, scans * self.versions * each - _written(self.folder), "latent_versions", self.versions)

    def _scan(self, scans: Scans, row: int) -> tuple[Mapping[str, Any], int]:
        return scans[row // self.versions], row % self.versions

    def _recipe(self, scan: Mapping[str, Any], version: int) -> np.ndarray:
        whose = {"participant_id": scan["row"]["participant_id"], "path": scan["row"]["path"], "version": version}
        augmentation = self.augmentation if version else None
        text = json.dumps({**self.origin, **whose, "augmentation": augmentation}, sort_keys=True)
        return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)

    def _encode(self, scans: Scans, writer: LatentWriter, rows: range) -> int:
        damaged = writer.clear_damaged(rows)
        if damaged:
            logger.warning(
                f"{len(damaged)} latents in {self.folder} are damaged, row {damaged[0]} the first: made again"
            )
        transforms = (self.load, self.augment, self.seed)
        volumes = VolumesToEncode(scans, self.versions, rows, writer.encoded()[:, VOLUME], *transforms)
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(volumes, batch_size=None, num_workers=self.num_workers, pin_memory=on_gpu)
        new = 0
        for row, sha256, volume in counted(
            loader, "encoding", unit="latent", disable=None if rows.start == 0 else True
        ):
            if volume is not None:
                writer.write(row, self._posterior(volume, self._scan(scans, row)[0]["image"]), sha256)
                new += 1
        return new

    @torch.no_grad()
    def _posterior(self, volume: Tensor, path: str) -> np.ndarray:
        with autocast(self.device, self.amp):
            mean, std = self.autoencoder.encode(volume[None].to(self.device, non_blocking=True))  # type: ignore[operator]
        posterior = torch.cat([mean, std]).to(getattr(torch, self.dtype))
        if not posterior.isfinite().all():
            raise BundleError(f"the latent of {path} is not finite in {self.dtype}: the autoencoder is not usable")
        return posterior.cpu().numpy()

    def _finish(self, scans: Scans, writer: LatentWriter) -> None:
        encoded = array_sha256(writer.encoded())
        table = [
            {**scan["row"], "version": version, "row": row}
            for row in range(len(writer.recipes))
            for scan, version in [self._scan(scans, row)]
        ]
        about = {"rows": len(table), "latent_shape": self.latent_shape, "versions": self.versions}
        made_with = {"torch": torch.__version__, "monai": monai.__version__}
        origin = {**self.origin, **about, "augmentation": self.augmentation, "made_with": made_with}
        write_table(self.folder / TABLE, table)
        found = self._moments(encoded)
        stated = {"moments": found, "noise_share": noise_share(found), "encoded_sha256": encoded}
        write_json(self.folder / ENCODING, {**origin, **stated})
        warn_of_noise(self.folder, found)
        logger.info(f"{len(scans)} scans are encoded, {self.versions} latents each, in {self.folder}")

    def _moments(self, encoded: str) -> dict[str, float]:
        try:
            known = read_encoding(self.folder)
        except BundleError:
            known = {}
        found: Any = known.get("moments") if known.get("encoded_sha256") == encoded else None
        return found if are_moments(found) and "noise" in found else moments(Posteriors(self.folder).array)


def _written(folder: Path) -> int:
    """Bytes of the array that is there, which a new one takes the place of."""
    path = folder / POSTERIORS
    return path.stat().st_size if path.is_file() else 0


class VolumesToEncode(Dataset):
    """The rows to encode, with their volumes where they are not encoded yet.

    Args:
        scans: rows of the dataset.
        versions: latents a scan.
        rows: which latents; row `r` is version `r % versions` of scan `r // versions`.
        volumes: (latents, 32) uint8, the hash of the volume that each was made of.
        load, augment, seed: see `LatentEncoder`.
    """

    def __init__(
        self,
        scans: Scans,
        versions: int,
        rows: range,
        volumes: np.ndarray,
        load: Callable,
        augment: Callable,
        seed: int,
    ) -> None:
        self.scans, self.versions, self.rows, self.volumes = scans, versions, rows, volumes
        self.load, self.augment, self.seed = load, augment, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, bytes, Tensor | None]:
        """Number of the latent, SHA-256 of its volume's file, and the volume (1, X, Y, Z), or None if encoded."""
        row = self.rows[number]
        scan, version = self.scans[row // self.versions], row % self.versions
        sha256 = bytes.fromhex(file_hash(scan["image"]))
        if sha256 == self.volumes[row].tobytes():
            return row, sha256, None
        sample = self.load(scan)
        if version:
            key = f"{self.seed} {scan['row']['participant_id']} {scan['row']['path']} {version}"
            drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
            self.augment.set_random_state(seed=drawn)  # type: ignore[attr-defined]
            sample = self.augment(sample)
        return row, sha256, convert_to_tensor(sample["image"], track_meta=False)


def moments(posteriors: np.ndarray) -> dict[str, float]:
    """Mean, mean square, and `noise` of samples of the posteriors (rows, 2, C, x, y, z), pooled over everything.

    The noise is the mean variance of a posterior, which is a part of the mean square.
    """
    sums = np.zeros(3)
    for row in counted(posteriors, "moments", unit="latent"):
        mean, std = torch.from_numpy(np.array(row)).double()
        noise = std.square().sum().item()
        sums += [mean.sum().item(), mean.square().sum().item() + noise, noise]
    return dict(zip(("mean", "square", "noise"), (sums / posteriors[:, 0].size).tolist()))
