# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Samples one volume as the original does: monai-generative's networks in float32 and its own loop of DDIM.

    python -m benchmarks.original --size full --weights folder --steps 50 --output volume.nii.gz

The weights are those that `benchmarks.sampling --cases command` writes. Noise and conditions are those of the first
sample of the bundle's command with the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from benchmarks.command import configuration
from benchmarks.measuring import SIZES, bare_original_network, original_scheduler
from scripts.compute.devices import compute_device
from scripts.sampling.requests import sample_generator
from scripts.volumes.nifti import write_volume

WEIGHTS = {"autoencoder_def": "autoencoder.pt", "network_def": "diffusion.pt"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program with command-line arguments."""
    options = _options(arguments)
    config, device = configuration(SIZES[options.size]), compute_device(options.device)
    noise = torch.randn(config.get_parsed_content("latent_shape"), generator=sample_generator(options.seed, 0))[None]
    condition = torch.full((1, len(config.get_parsed_content("conditions"))), 0.5)
    unet = network_of(config, "network_def", options.weights, device)
    autoencoder: Any = network_of(config, "autoencoder_def", options.weights, device)
    with torch.no_grad():
        latent = sampled_latent(config, unet, noise.to(device), condition.to(device), options.steps)
        volume = autoencoder.decode_stage_2_outputs(latent)
    write_volume(options.output, volume[0, 0].cpu().numpy(), config.get_parsed_content("grid"), "float32")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--weights", required=True, help=f"folder of {' and '.join(WEIGHTS.values())}")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", required=True, help="NIfTI file to write, float32")
    return parser.parse_args(arguments)


def network_of(config: ConfigParser, key: str, folder: str, device: torch.device) -> nn.Module:
    """One of the two networks with its weights."""
    network = bare_original_network(config, key)
    network.load_state_dict(torch.load(Path(folder) / WEIGHTS[key], map_location="cpu", weights_only=True))
    return network.to(device)


def sampled_latent(config: ConfigParser, unet: nn.Module, noise: Tensor, condition: Tensor, steps: int) -> Tensor:
    """The end of a trajectory of DDIM; the conditions are a token of context and further channels."""
    scheduler = original_scheduler("DDIMScheduler", config["schedules"]["ddim"])
    scheduler.set_timesteps(steps)
    channels = condition[:, :, None, None, None].expand(-1, -1, *noise.shape[2:])
    latent = noise
    for timestep in scheduler.timesteps.tolist():
        times = torch.full((len(latent),), timestep, device=latent.device)
        output = unet(torch.cat([latent, channels], 1), timesteps=times, context=condition[:, None])
        latent, _ = scheduler.step(output, timestep, latent)
    return latent


if __name__ == "__main__":
    main()
