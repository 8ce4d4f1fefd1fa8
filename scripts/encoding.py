# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Encoding a prepared dataset once, so that the diffusion model trains on latents alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from scripts.atomic import make_folder, replacing, write_json
from scripts.checkpoints import Checkpoint, file_sha256
from scripts.datasets import TABLE
from scripts.options import whole_number
from scripts.precision import autocast
from scripts.tables import write_table

logger = logging.getLogger(__name__)


class LatentEncoder:
    """Caches the posterior of every scan of a dataset: mean and standard deviation, float32.

    Args:
        autoencoder: MONAI's `AutoencoderKL`, loaded.
        checkpoint: where its weights came from; recorded beside the latents.
        load: transform from a row of the dataset to its volume, (1, X, Y, Z) under `image`.
        augment: random transform of such rows, for `versions` above 1.
        folder: where to write one safetensors file a latent and the table of all of them.
        versions: latents a scan: the scan itself, then augmented ones.
        seed: of the augmentation.
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
        versions: Any = 1,
        seed: Any = 0,
        device: torch.device | str = "cpu",
        amp: bool = False,
    ) -> None:
        self.autoencoder, self.checkpoint = autoencoder, checkpoint
        self.load, self.augment = load, augment
        self.folder = Path(folder)
        self.versions = whole_number(versions, "latent_versions", least=1)
        self.seed = whole_number(0 if seed is None else seed, "seed")
        self.device, self.amp = torch.device(device), amp

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Encode the rows of `scripts.datasets.participants`; what is there from the same weights and scan is kept.

        Raises:
            BundleError: if a volume cannot be read, or the folder not written.
        """
        origin = {"autoencoder_sha256": self.checkpoint.sha256, "seed": self.seed}
        make_folder(self.folder)
        table = []
        for number, row in enumerate(tqdm(rows, "encoding", unit="scan", disable=None)):
            for version in range(self.versions):
                name = self._name(row, version)
                self._encode(row, name, number, version, origin)
                table.append({**row["row"], "path": name, "version": version})
        write_json(self.folder / "encoding.json", origin)
        write_table(self.folder / TABLE, table)
        logger.info(f"encoded {len(rows)} scans, {self.versions} latents each, in {self.folder}")

    def _name(self, row: Mapping[str, Any], version: int) -> str:
        path = Path(row["row"]["path"])
        inside = (
            path
            if not path.is_absolute() and ".." not in path.parts
            else Path(row["row"]["participant_id"]) / path.name
        )
        stem = str(inside).removesuffix(".gz").removesuffix(".nii")
        return f"{stem}_version-{version}.safetensors"

    def _encode(self, row: Mapping[str, Any], name: str, number: int, version: int, origin: Mapping[str, Any]) -> None:
        path = self.folder / name
        metadata = {**{key: str(value) for key, value in origin.items()}, "volume_sha256": file_sha256(row["image"])}
        if _is_encoded(path, metadata):
            return
        sample = self.load(row)
        if version:
            self.augment.set_random_state(seed=self.seed + number * self.versions + version)  # type: ignore[attr-defined]
            sample = self.augment(sample)
        mean, std = self._posterior(sample["image"])
        make_folder(path.parent)
        with replacing(path) as temporary:
            save_file({"mean": mean, "std": std}, temporary, metadata)

    @torch.no_grad()
    def _posterior(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.amp):
            mean, std = self.autoencoder.encode(volume[None].to(self.device))  # type: ignore[operator]
        return mean[0].float().cpu().contiguous(), std[0].float().cpu().contiguous()


def _is_encoded(path: Path, metadata: Mapping[str, str]) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == metadata
    except SafetensorError:
        return False
