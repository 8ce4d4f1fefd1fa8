# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Both trainings at tiny size, as the tests run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import BASE, TINY, RunHere
from heads import write_dataset
from released import configuration
from torch import Tensor

AUTOENCODER, ENCODE, DIFFUSION = (
    f"configs/{name}.yaml" for name in ("train_autoencoder", "encode_latents", "train_diffusion")
)


class Pipeline:
    """Runs the verbs in this process, at tiny size, in one folder."""

    def __init__(self, folder: Path, run_here: RunHere) -> None:
        self.folder, self.run_here = folder, run_here
        self.dataset, self.latents = folder / "dataset", folder / "latents"
        self.autoencoder, self.diffusion = folder / "autoencoder", folder / "diffusion"

    def train_autoencoder(self, **flags: Any) -> Any:
        return self.run_here([BASE, AUTOENCODER, TINY], **{**self.autoencoder_flags(), **flags})

    def encode(self, **flags: Any) -> Any:
        given = {"dataset_dir": str(self.dataset), "latents_dir": str(self.latents), **self.trained()}
        return self.run_here([BASE, ENCODE, TINY], **{**given, **flags})

    def train_diffusion(self, **flags: Any) -> Any:
        return self.run_here([BASE, DIFFUSION, TINY], **{**self.diffusion_flags(), **flags})

    def autoencoder_flags(self) -> dict[str, Any]:
        where = {"dataset_dir": str(self.dataset), "run_dir": str(self.autoencoder)}
        return {**where, "perceptual_weight": 0.0, "seed": 1}

    def diffusion_flags(self) -> dict[str, Any]:
        where = {"latents_dir": str(self.latents), "run_dir": str(self.diffusion)}
        return {**where, **self.trained(), "seed": 1}

    def trained(self) -> dict[str, Any]:
        return {"autoencoder_path": str(self.autoencoder / "autoencoder.pt"), "load_old": 0}


def train_pipeline(folder: Path, run_here: RunHere) -> None:
    """Both stages, for two epochs, on four made-up heads, one of them held out."""
    pipeline = Pipeline(folder, run_here)
    write_dataset(pipeline.dataset, configuration().get_parsed_content("grid"))
    pipeline.train_autoencoder()
    pipeline.encode()
    pipeline.train_diffusion()


def content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts agree to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a: Any, b: Any) -> float:
    """The largest absolute difference of any number in two nested states."""
    if isinstance(a, Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((difference(a[name], b[name]) for name in a), default=0.0)
    if isinstance(a, (list, tuple)):
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return abs(a - b) if isinstance(a, (int, float)) else 0.0
