# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Validation of the first stage: reconstructions of held-out volumes, and their latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from scripts.autoencoder.training import kl_to_standard_normal
from scripts.compute.precision import autocast
from scripts.compute.processes import is_main
from scripts.training.validation import HeldOut, Network
from scripts.volumes import pictures


class AutoencoderValidation(HeldOut):
    """How well an autoencoder gives held-out volumes back, and what its latents are like.

    The reconstruction is the decoded posterior mean, not clipped. Means over the volumes of the metrics, and

    - `kl`: KL divergence of the posterior from N(0, 1), summed over a latent; `kl_per_value`: the same divided by
      the number of values of a latent. Nats;
    - `latent_mean`, `latent_std`: of the posterior means, pooled over volumes and voxels, of all channels and,
      with the suffix `_channel0` and so on, of each;
    - `latent_sigma`: mean standard deviation of the posterior.

    The first volumes are drawn as `figures/reconstruction_iteration-N.png`.

    Args:
        network, dataset, run_dir, every, limit, num_workers: see `HeldOut`. The network is an `AutoencoderKL`,
            items hold `image` (1, X, Y, Z), 0..1, and `participant_id`.
        metrics: name -> metric of a reconstruction and its original, both (1, 1, X, Y, Z).
        amp: precision; see `scripts.compute.precision.autocast`.
        pictured: volumes to draw.
    """

    def __init__(
        self,
        network: Network,
        dataset: Dataset,
        metrics: Mapping[str, Callable[..., torch.Tensor]],
        run_dir: str | os.PathLike,
        every: Any = 1,
        amp: Any = False,
        limit: Any = None,
        num_workers: int = 0,
        pictured: int = 3,
    ) -> None:
        super().__init__(network, dataset, run_dir, every, limit, num_workers)
        self.metrics = metrics
        self.amp = amp
        self.pictured = pictured

    def measure(self, network: Any, device: torch.device, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics, moments of the latent, and planes of the first volumes."""
        original = torch.as_tensor(item["image"])[None].to(device)
        with autocast(device, self.amp):
            mean, sigma = network.encode(original)
            copy = network.decode(mean).float()
        mean, sigma = mean.float(), sigma.float()
        found = {
            "kl": kl_to_standard_normal(mean, sigma).item(),
            "latent_sigma": sigma.double().mean().item(),
            "first": mean[0].double().flatten(1).mean(dim=1).cpu().numpy(),
            "second": mean[0].double().square().flatten(1).mean(dim=1).cpu().numpy(),
            "values": mean.numel(),
        }
        if index < self.pictured:
            found["name"] = str(item["participant_id"])
            found["planes"] = [pictures.strip(volume[0, 0].cpu().numpy()) for volume in (original, copy)]
        return found | {name: float(metric(copy, original)) for name, metric in self.metrics.items()}

    def summarise(self, rows: Sequence[Mapping[str, Any]], iteration: int) -> dict[str, float]:
        """Means over volumes, moments over all; draws the picture."""
        for metric in self.metrics.values():  # MONAI's metrics keep every value until they are told not to
            getattr(metric, "reset", int)()
        drawn = [row for row in rows if "planes" in row]
        if drawn and is_main():
            originals, copies = zip(*(row["planes"] for row in drawn))
            pixels = pictures.reconstruction_picture([row["name"] for row in drawn], originals, copies)
            pictures.write(self.run_dir, "reconstruction", iteration, pixels)
        means = {name: float(np.mean([row[name] for row in rows])) for name in (*self.metrics, "kl", "latent_sigma")}
        return {**means, "kl_per_value": means["kl"] / rows[0]["values"], **_latent_moments(rows)}


def _latent_moments(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    first, second = (np.mean([row[name] for row in rows], axis=0) for name in ("first", "second"))
    moments = {"": (first.mean(), second.mean())}
    moments |= {f"_channel{i}": (first[i], second[i]) for i in range(len(first))}
    means = {f"latent_mean{suffix}": float(a) for suffix, (a, _) in moments.items()}
    return means | {f"latent_std{suffix}": float(max(b - a**2, 0.0) ** 0.5) for suffix, (a, b) in moments.items()}
