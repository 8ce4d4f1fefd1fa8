# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading cached latents: one memory-mapped array for a whole dataset, checked before the first step.

A folder of latents holds

- `posteriors.npy`, (rows, 2, C, x, y, z): the posterior of each row, its mean and its standard deviation;
- `encoded.npy`, (rows, 2, 32) uint8: SHA-256 of how each row was made and of the volume that it was made of, zeros
  where the row is not encoded;
- `checksums.npy`, (rows,) uint64: CRC-32 of each row's bytes, plus 1; 0 where the row is not encoded. A row that does
  not fit its own is damaged: it is never trained on, and is made again when the dataset is encoded again;
- `participants.tsv`: a line for each row, in the array's order, with the covariates of the scan, its `path` in the
  dataset, the `version` (0 is the scan itself, others are augmented) and the `row`;
- `encoding.json`: how the latents were made, their moments, and which share of their variance is noise. It is written
  last, and is valid for one state of `encoded.npy`, so that latents of which a part is missing or from elsewhere are
  never trained on.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from torch import Tensor

from scripts.conditions.conditions import Conditions
from scripts.conditions.ranges import check_learned_ranges
from scripts.core.config import current_config, is_plain
from scripts.core.errors import BundleError
from scripts.core.files import parse_json
from scripts.core.tables import read_table
from scripts.networks.weights import encoder_sha256, is_latent_scale, read_state
from scripts.training.health import latent_noise
from scripts.volumes.datasets import TABLE, participants, with_conditions

logger = logging.getLogger(__name__)

POSTERIORS, ENCODED, ENCODING = "posteriors.npy", "encoded.npy", "encoding.json"
CHECKSUMS = "checksums.npy"
AGAIN = "run configs/encode_latents.yaml again with the same flags, and it goes on from where it stopped"


class Posteriors:
    """The array of a folder of latents. It is mapped on first use, in each process of a data loader by itself.

    Args:
        folder: holds `posteriors.npy`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(str(folder)) / POSTERIORS
        self._array: np.ndarray | None = None
        self._checksums: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None, "_checksums": None}  # a pickled memory map would be the whole array

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (C, x, y, z) float32, of a row.

        Raises:
            BundleError: if the array is missing, damaged, or has no such row.
        """
        array = self.array
        if not 0 <= row < len(array):
            raise BundleError(f"{self.path} has {len(array)} rows, and no row {row}: {AGAIN}")
        posterior = np.array(array[row])
        if not is_whole(posterior, self.checksum_of(row)):
            raise BundleError(f"row {row} of {self.path} is damaged: {AGAIN} and makes it again")
        mean, std = torch.from_numpy(posterior).float()  # NumPy converts float16 14 times slower
        return mean, std

    def checksum_of(self, row: int) -> int:
        """What `checksums.npy` says of a row; 0 where it says nothing, as in folders of version 2.0.0."""
        path = self.path.with_name(CHECKSUMS)
        if self._checksums is None:
            self._checksums = mapped(path) if path.is_file() else np.zeros(0, np.uint64)
        return int(self._checksums[row]) if row < len(self._checksums) else 0

    @property
    def array(self) -> np.ndarray:
        """The memory map, (rows, 2, C, x, y, z).

        Raises:
            BundleError: if the file is missing, cut or no such array.
        """
        if self._array is None:
            self._array = mapped(self.path)
        return self._array


def checksum(posterior: np.ndarray) -> int:
    """CRC-32 of a row's bytes, plus 1."""
    return zlib.crc32(np.ascontiguousarray(posterior).tobytes()) + 1


def is_whole(posterior: np.ndarray, stated: int) -> bool:
    """Whether a row is what was written; without a checksum, whether its standard deviations are numbers above 0."""
    if stated:
        return checksum(posterior) == stated
    return bool(np.isfinite(posterior).all() and (posterior[1] > 0).all())


def mapped(path: Path) -> np.ndarray:
    """A `.npy` file as a read-only memory map.

    Raises:
        BundleError: if it is missing, or shorter than its header says, or no `.npy` file.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise BundleError(f"there is no {path}: encode a dataset first (configs/encode_latents.yaml)") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is cut or damaged ({error}): remove it, and {AGAIN}") from error


def latents(
    folder: str, conditions: Conditions, missing: str = "error", latent_shape: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The rows of a folder of cached latents, after checking that the folder is whole.

    Args:
        folder: what configs/encode_latents.yaml wrote.
        conditions: which columns to read.
        missing: what to do where a condition is `n/a`; see `Conditions.from_row`.
        latent_shape: (C, x, y, z) of the configured networks; None to take any.

    Returns:
        One dictionary a row, as `scripts.volumes.datasets.participants` gives them for scans, but that `image` is the
        row's number in the array and the table's other cells are left out.

    Raises:
        BundleError: if the folder is incomplete or damaged, the latents have another shape, a condition is
            missing or malformed, or the dataset's learned ranges are not the configured ones.
    """
    check_learned_ranges(folder, conditions)
    encoding, table = read_encoding(folder), Path(str(folder)) / TABLE
    posteriors = Posteriors(folder).array
    shape = tuple(posteriors.shape[2:])
    if latent_shape is not None and shape != tuple(latent_shape):
        raise BundleError(
            f"the latents in {folder} have shape {shape}, the configured networks' have {tuple(latent_shape)}: "
            "give the configuration that they were encoded with, or encode anew into another folder"
        )
    rows = read_table(table, required=("participant_id", "version", "row"))
    if not len(rows) == len(posteriors) == encoding["rows"] or any(str(i) != r["row"] for i, r in enumerate(rows)):
        raise BundleError(f"{table} does not list the {len(posteriors)} rows of {POSTERIORS} in their order: {AGAIN}")
    found = with_conditions(rows, conditions, missing, table)
    return [{"image": number, **{k: v for k, v in row.items() if k != "row"}} for number, row in enumerate(found)]


def prepared_volumes(folder: str, conditions: Conditions, missing: str = "error") -> list[dict[str, Any]]:
    """The rows of a prepared dataset, for a model that is trained on volumes in the place of latents.

    Args:
        folder, conditions, missing: see `scripts.volumes.datasets.participants`.

    Raises:
        BundleError: as `participants`, if latents were given, by `--latents_dir` too, or if the dataset's learned
            ranges are not the configured ones.
    """
    if is_plain(current_config().get("latents_dir")):  # and not the expression that is its default
        raise BundleError("pixel diffusion is trained on the volumes of --dataset_dir: leave out --latents_dir")
    if (Path(str(folder)) / ENCODING).is_file() or (Path(str(folder)) / POSTERIORS).is_file():
        raise BundleError(f"--dataset_dir {folder} holds latents: pixel diffusion is trained on prepared volumes")
    check_learned_ranges(folder, conditions)
    return participants(folder, conditions, missing)


def read_encoding(folder: str | Path) -> dict[str, Any]:
    """What `encoding.json` says of a folder whose encoding is finished.

    Raises:
        BundleError: if there are no latents, or only a part of them.
    """
    path = Path(str(folder)) / ENCODING
    encoded = path.with_name(ENCODED)
    if not path.is_file() and not encoded.is_file():
        raise BundleError(f"there are no latents in {folder}: encode a dataset first (configs/encode_latents.yaml)")
    try:
        encoding = parse_json(path.read_text(encoding="utf-8"))
        fresh = encoding["encoded_sha256"] == array_sha256(mapped(encoded)) and not in_making(encoded).exists()
        fresh &= all(np.isfinite(float(encoding["moments"][name])) for name in ("mean", "square"))
        fresh &= int(encoding["rows"]) >= 0
    except (OSError, ValueError, KeyError, TypeError):
        fresh = False
    if not fresh:
        raise BundleError(f"the encoding in {folder} is not finished: {AGAIN}")
    return encoding


def in_making(path: Path) -> Path:
    """Where a new array is made that is to replace the one at `path`."""
    return path.with_name(f"next-{path.name}")


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's elements, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def made_by(folder: str, autoencoder_path: str | Path, needed: Any = True) -> str:
    """`encoder_sha256` of the autoencoder that made the latents of a folder, after a look at the file that is given.

    Args:
        folder: of the latents.
        autoencoder_path: what the training calls their autoencoder.
        needed: whether the training has a use for that file. Where it has none, the file need not be there.

    Raises:
        BundleError: if the file's encoder is another one, the file is needed and not there, or the latents do not say
            what made them.
    """
    sha256, path = read_encoding(folder).get("encoder_sha256"), Path(str(autoencoder_path))
    if sha256 is None:
        raise BundleError(f"the latents in {folder} are of an earlier version and do not state their encoder: {AGAIN}")
    if not path.is_file() and needed:
        raise BundleError(
            f"there is no autoencoder at {path}, which decodes the samples of the figures: give the --autoencoder_path "
            "that encode_latents.yaml was given, or --sample_every 0"
        )
    if path.is_file() and encoder_sha256(read_state(path, "autoencoder", logger.debug)[0]) != sha256:
        raise BundleError(
            f"the latents in {folder} were made by another autoencoder than {path}: encode anew, or give "
            f"--autoencoder_path the file that made them (the SHA-256 of its encoder is {sha256[:12]}...)"
        )
    return sha256


def noise_share(moments: Mapping[str, float]) -> float | None:
    """The share, 0..1, of the variance of samples of the posteriors that is their own noise: E[std^2] over all of it.

    None for moments of 2.1.0, which lack it.
    """
    variance = moments["square"] - moments["mean"] ** 2
    return moments["noise"] / variance if "noise" in moments and variance > 0.0 else None


def warn_of_noise(folder: str | Path, moments: Mapping[str, float]) -> None:
    """Log a warning where the latents of a folder are noise for more than a tenth."""
    for finding in latent_noise(noise_share(moments) or 0.0):
        logger.warning(f"{folder}: {finding.words}")


def latent_scale(folder: str) -> float:
    """One over the standard deviation of samples of the posteriors, pooled over all rows, voxels and channels.

    The variance of a sample is E[mean^2 + std^2] - E[mean]^2; the encoding has stored both moments. Latents that are
    noise for more than a tenth are warned of.

    Raises:
        BundleError: if the variance is zero or not finite.
    """
    moments: Any = read_encoding(folder).get("moments")
    if not are_moments(moments):
        raise BundleError(f"{Path(str(folder)) / ENCODING} has no moments of the latents: remove it, and {AGAIN}")
    variance = moments["square"] - moments["mean"] ** 2
    if not variance > 0.0 or not is_latent_scale(variance**-0.5):
        raise BundleError(f"the latents in {folder} have variance {variance}: the autoencoder is not usable")
    warn_of_noise(folder, moments)
    return float(variance**-0.5)


def are_moments(value: Any) -> bool:
    """Whether a value is the mean and mean square of latents, as `encoding.json` holds them."""
    names = ("mean", "square")
    return isinstance(value, Mapping) and all(isinstance(value.get(name), (int, float)) for name in names)


class PosteriorMeand(MapTransform):
    """Dictionary transform from the row of a cached posterior to its scaled mean, without anything random.

    Args:
        keys: entries that hold row numbers.
        folder: what configs/encode_latents.yaml wrote.
        scale: factor on the latents.
    """

    def __init__(self, keys: str | Sequence[str], folder: str, scale: float) -> None:
        super().__init__(keys)
        self.posteriors, self.scale = Posteriors(folder), float(scale)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with latents (C, x, y, z), float32, in place of their rows."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = self._latent(*self.posteriors[loaded[key]]) * self.scale
        return loaded

    def _latent(self, mean: Tensor, std: Tensor) -> Tensor:
        return mean


class SamplePosteriord(PosteriorMeand):
    """Dictionary transform from the row of a cached posterior to a scaled sample of it.

    Draws mean + standard deviation * noise with torch's random state and multiplies by the scale, so that
    the diffusion model sees latents of unit variance, and different ones of one scan in every epoch.

    Args:
        keys, folder, scale: see `PosteriorMeand`.
    """

    def _latent(self, mean: Tensor, std: Tensor) -> Tensor:
        return mean + std * torch.randn_like(mean)
