# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Numerical parity with monai-generative, the package that the released weights come from.

Every parameter is random, since the constructors' zeros would hide most of a network, and the three sizes of
the latent differ, so that swapped axes show.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from monai.bundle import ConfigParser
from released import configuration, generative_network, generative_scheduler, need_memory, relative_difference
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.networks.weights import load_network, read_checkpoint

DIFFERENT_SIZES: dict[str, Any] = {"grid::shape": [16, 48, 32]}  # latents of 4 x 12 x 8
KINDS = {"autoencoder_def": "autoencoder", "network_def": "diffusion"}
BOUND = 1e-5


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where to compare; on a GPU without TF32, whose 10 bits would hide an error of ours."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture(scope="module")
def config() -> ConfigParser:
    return configuration(**DIFFERENT_SIZES)


@pytest.fixture(scope="module")
def originals(config: ConfigParser) -> dict[str, nn.Module]:
    return {key: generative_network(config, key) for key in KINDS}


@pytest.fixture(scope="module")
def files(originals: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {key: write(folder / f"{key}.pt", network) for key, network in originals.items()}


def write(path: Path, network: nn.Module) -> Path:
    state = network.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def ours(config: ConfigParser, key: str, path: Path, device: torch.device) -> nn.Module:
    """The bundle's network with the weights of a file, as sampling gets it."""
    network = config.get_parsed_content(key)
    return load_network(network, read_checkpoint(path, KINDS[key]), load_old=1, device=device)


def noise_and_conditions(config: ConfigParser, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(batch, *config.get_parsed_content("latent_shape"), generator=generator)
    condition = torch.rand(batch, len(config.get_parsed_content("conditions")), generator=generator)
    return noise.to(device), condition.to(device)


@torch.no_grad()
def original_call(unet: nn.Module, latent: Tensor, timestep: int, condition: Tensor) -> Tensor:
    channels = condition[:, :, None, None, None].expand(-1, -1, *latent.shape[2:])
    timesteps = torch.full((len(latent),), timestep, device=latent.device)
    return unet(torch.cat([latent, channels], 1), timesteps=timesteps, context=condition.unsqueeze(1))


def original_latent(
    config: ConfigParser, unet: nn.Module, noise: Tensor, condition: Tensor, scheduler: str, steps: int, **step: Any
) -> Tensor:
    """The original's sampling loop: conditions as context and as channels, its scheduler's own timesteps."""
    schedule = generative_scheduler(config, scheduler)
    schedule.set_timesteps(steps)
    latent = noise
    for timestep in schedule.timesteps.tolist():
        latent, _ = schedule.step(original_call(unet, latent, timestep, condition), timestep, latent, **step)
    return latent


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("key", list(KINDS))
def test_networks_compute_the_same_from_every_format(
    key: str,
    suffix: str,
    config: ConfigParser,
    originals: dict[str, nn.Module],
    device: torch.device,
    tmp_path: Path,
) -> None:
    original = originals[key].to(device)
    network = ours(config, key, write(tmp_path / f"weights{suffix}", original), device)
    for output, reference in zip(calls(key, network, config, device), calls(key, original, config, device)):
        assert reference.std() > 0.01
        assert relative_difference(output, reference) < BOUND


@torch.no_grad()
def calls(key: str, network: Any, config: ConfigParser, device: torch.device) -> Sequence[Tensor]:
    """What either package's network gives: mean, standard deviation and decoded latent, or the UNet's output."""
    noise, condition = noise_and_conditions(config, 2, device)
    if key == "network_def":
        return [original_call(network, noise, timestep, condition) for timestep in (0, 321, 999)]
    volume = torch.rand(2, 1, *config["grid"]["shape"], generator=torch.Generator().manual_seed(3)).to(device)
    return [*network.encode(volume), network.decode(noise), network.reconstruct(volume)]


def test_ddim_trajectory_and_decoding_are_the_originals(
    config: ConfigParser,
    originals: dict[str, nn.Module],
    files: dict[str, Path],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet: Any = originals["network_def"].to(device)
    autoencoder: Any = originals["autoencoder_def"].to(device)
    noise, condition = noise_and_conditions(config, 2, device)
    latent = original_latent(config, unet, noise, condition, "DDIMScheduler", 50)
    with torch.no_grad():
        image = autoencoder.decode_stage_2_outputs(latent)

    family = sampling(files, device, **DIFFERENT_SIZES)
    sampled = family.sample_clean(noise, condition, [])
    assert len(family.sampler.timesteps) == 50
    assert relative_difference(sampled, latent) < BOUND
    assert relative_difference(family.decode(sampled), image) < BOUND
    monkeypatch.setattr(family, "sample_clean", lambda *_: sampled)
    assert torch.equal(family.sample(noise, condition, []), family.decode(sampled))


def sampling(files: dict[str, Path], device: torch.device, **overrides: Any) -> Any:
    """The base's family, with the weights of the files."""
    paths = {"autoencoder_path": str(files["autoencoder_def"]), "diffusion_path": str(files["network_def"])}
    overlays = overrides.pop("overlays", [TINY])
    parser = configuration(overlays, device=str(device), **paths, **overrides)
    return parser.get_parsed_content("chosen_family")


def test_ddpm_is_the_originals_with_the_same_draws(
    originals: dict[str, nn.Module], files: dict[str, Path], device: torch.device
) -> None:
    overrides: dict[str, Any] = {**DIFFERENT_SIZES, "schedules::ddim::num_train_timesteps": 50, "sampler": "ddpm"}
    config = configuration(**overrides)
    noise, condition = noise_and_conditions(config, 1, device)
    draws = torch.Generator().manual_seed(5)
    unet = originals["network_def"].to(device)
    latent = original_latent(config, unet, noise, condition, "DDPMScheduler", 50, generator=draws)

    family = sampling(files, device, **overrides)
    sampled = family.sample_clean(noise, condition, [torch.Generator().manual_seed(5)])
    assert family.sampler.timesteps == list(range(49, -1, -1))
    assert relative_difference(sampled, latent) < 1e-4


@pytest.fixture
def all_threads() -> Iterator[None]:
    """Full-size networks may use every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_full_size_unet_and_first_steps(device: torch.device, tmp_path: Path, all_threads: None) -> None:
    need_memory(device, 8)
    config = configuration([])
    noise, condition = noise_and_conditions(config, 1, device)
    original = generative_network(config, "network_def").to(device)
    path = write(tmp_path / "model.pt", original)
    schedule = generative_scheduler(config, "DDIMScheduler")
    schedule.set_timesteps(50)
    latents, outputs = [noise], []
    for timestep in schedule.timesteps.tolist()[:2]:
        outputs.append(original_call(original, latents[-1], timestep, condition))
        latents.append(schedule.step(outputs[-1], timestep, latents[-1])[0])
    del original
    gc.collect()

    network = ours(config, "network_def", path, device)
    inferer, sampler = config.get_parsed_content("hybrid_inferer"), config.get_parsed_content("chosen_sampler")
    latent = noise
    for number, timestep in enumerate(sampler.timesteps[:2]):
        with torch.no_grad():
            output = inferer.denoise(network, latent, torch.tensor([timestep], device=device), condition)
        latent = sampler.step(output, timestep, latent, [])
        assert relative_difference(output, outputs[number]) < BOUND
        assert relative_difference(latent, latents[number + 1]) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "encode"])
def test_full_size_autoencoder(part: str, device: torch.device, tmp_path: Path, all_threads: None) -> None:
    need_memory(device, 18)
    config = configuration([])
    latent, _ = noise_and_conditions(config, 1, device)
    original = generative_network(config, "autoencoder_def").to(device)
    path = write(tmp_path / "autoencoder.pt", original)
    references = full_size_calls(part, original, latent, config)
    del original
    gc.collect()
    network = ours(config, "autoencoder_def", path, device)
    for output, reference in zip(full_size_calls(part, network, latent, config), references):
        assert relative_difference(output, reference) < BOUND


@torch.no_grad()
def full_size_calls(part: str, network: Any, latent: Tensor, config: ConfigParser) -> Sequence[Tensor]:
    if part == "decode":
        return [network.decode_stage_2_outputs(latent).cpu()]
    volume = torch.rand(1, 1, *config["grid"]["shape"], generator=torch.Generator().manual_seed(3))
    return [output.cpu() for output in network.encode(volume.to(latent.device))]
