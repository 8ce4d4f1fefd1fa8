# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The denoiser's conditions, and sampling latents with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from released import configuration, generative_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.diffusion.denoiser import HybridInferer
from scripts.diffusion.guidance import NULL_CONDITION
from scripts.networks.weights import Checkpoint, load_network
from scripts.sampling.latent_diffusion import LatentDiffusion

SHAPE = (3, 4, 8, 4)


class Recorder(nn.Module):
    """In the place of the denoiser: keeps what it is given and returns the noisy channels."""

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        self.given = x, timesteps, context
        return x[:, :3]


def inferer(**overrides: Any) -> HybridInferer:
    """The base's."""
    return configuration(**overrides).get_parsed_content("hybrid_inferer")


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, noise = torch.randn(2, 2, *SHAPE, generator=generator)
    return {
        "inputs": inputs,
        "noise": noise,
        "timesteps": torch.tensor([3, 900]),
        "condition": torch.rand(2, 4, generator=generator),
    }


def test_conditions_go_in_both_ways() -> None:
    given, network = batch(), Recorder()
    inferer().denoise(network, given["noise"], given["timesteps"], given["condition"])
    x, timesteps, context = network.given
    assert torch.equal(x[:, :3], given["noise"])
    assert torch.equal(x[:, 3:], given["condition"][:, :, None, None, None].expand(2, 4, *SHAPE[1:]))
    assert torch.equal(context, given["condition"][:, None])
    assert torch.equal(timesteps, given["timesteps"])


def test_a_denoiser_without_conditions_gets_no_context() -> None:
    given, network = batch(), Recorder()
    inferer().denoise(network, given["noise"], given["timesteps"], torch.zeros(2, 0))
    x, _, context = network.given
    assert torch.equal(x, given["noise"]) and context is None


def test_mixed_precision_computes_in_bfloat16_and_returns_float32() -> None:
    given, layer = batch(), nn.Conv3d(7, 3, 1)
    seen = []

    def network(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append(layer(x))
        return seen[-1]

    for amp, dtype in ((False, torch.float32), (1, torch.bfloat16), ("true", torch.bfloat16)):
        output = inferer(amp=amp).denoise(network, given["noise"], given["timesteps"], given["condition"])  # type: ignore[arg-type]
        assert seen[-1].dtype == dtype and output.dtype == torch.float32


class Decoder(nn.Module):
    """In the place of the autoencoder."""

    def decode_stage_2_outputs(self, latent: Tensor) -> Tensor:
        return 2.0 * latent[:, :1]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_latents_are_divided_by_their_scale_before_decoding(scale: float) -> None:
    config = configuration(num_inference_steps=2)
    steps, given = config.get_parsed_content("chosen_sampler"), batch()
    family = LatentDiffusion(Recorder(), Decoder(), inferer(), steps, latent_scale=scale)
    latent = family.sample_clean(given["noise"], given["condition"], [])
    volumes = family.sample(given["noise"], given["condition"], [])
    assert torch.allclose(volumes, 2.0 * latent[:, :1] / scale)


@pytest.mark.parametrize(("amp", "decoder_amp"), [(0, 0), (1, 0), (0, "bf16"), ("bf16", 1)])
def test_network_and_decoder_have_precisions_of_their_own(amp: Any, decoder_amp: Any) -> None:
    seen = {}

    class Watching(Decoder):
        def decode_stage_2_outputs(self, latent: Tensor) -> Tensor:
            seen["decoder"] = torch.is_autocast_enabled("cpu")
            return super().decode_stage_2_outputs(latent)

    class Network(Recorder):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen["network"] = torch.is_autocast_enabled("cpu")
            return super().forward(*args, **kwargs)

    steps = configuration(num_inference_steps=2).get_parsed_content("chosen_sampler")
    family = LatentDiffusion(Network(), Watching(), inferer(amp=amp), steps, decoder_amp=decoder_amp)
    volumes = family.sample(batch()["noise"], batch()["condition"], [])
    assert seen == {"network": bool(amp), "decoder": bool(decoder_amp)} and volumes.dtype == torch.float32


# Classifier-free guidance.


class Linear(Recorder):
    """In the place of the denoiser: an output that depends on conditions and latent; counts its calls."""

    calls = 0

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        self.calls += 1
        return 0.1 * x[:, :3] * context.mean(dim=(1, 2))[:, None, None, None, None] + 0.01 * x[:, 3:6]


def guided(guidance: float | None, condition: Tensor, target: str = "epsilon", steps: int = 3) -> tuple[Tensor, int]:
    """Sampled latents, and how often the network was called."""
    config = configuration(num_inference_steps=steps, target=target)
    hybrid, sampler = config.get_parsed_content("hybrid_inferer"), config.get_parsed_content("chosen_sampler")
    network = Linear()
    family = LatentDiffusion(network, Decoder(), hybrid, sampler, guidance=guidance)
    return family.sample_clean(batch()["noise"], condition, []), network.calls


@pytest.mark.parametrize("target", ["epsilon", "flow"])
def test_guidance_of_one_is_none_and_of_zero_leaves_the_conditions_out(target: str) -> None:
    condition = batch()["condition"]
    null = torch.full_like(condition, NULL_CONDITION)
    (plain, few), (one, many) = guided(None, condition, target), guided(1.0, condition, target)
    assert torch.equal(plain, one)
    assert many == 2 * few
    assert torch.equal(guided(0.0, condition, target)[0], guided(None, null, target)[0])
    assert not torch.equal(plain, guided(None, null, target)[0])


@pytest.mark.parametrize("scale", [0.3, 2.0, 7.5])
def test_guidance_extrapolates_from_the_null_vector(scale: float) -> None:
    """One step of flow moves by the output itself."""
    condition, noise = batch()["condition"], batch()["noise"]
    null = guided(None, torch.full_like(condition, NULL_CONDITION), "flow", 1)[0] - noise
    conditional = guided(None, condition, "flow", 1)[0] - noise
    moved = guided(scale, condition, "flow", 1)[0] - noise
    assert torch.allclose(moved, null + scale * (conditional - null), atol=1e-5)


@pytest.mark.gpu
def test_guidance_calls_the_network_once_a_step_on_a_gpu() -> None:
    config, given = configuration(num_inference_steps=3), batch()
    hybrid, steps = config.get_parsed_content("hybrid_inferer"), config.get_parsed_content("chosen_sampler")
    network = Linear()
    family = LatentDiffusion(network, Decoder(), hybrid, steps, guidance=2.0)
    latent = family.sample_clean(given["noise"].cuda(), given["condition"].cuda(), [])
    assert network.calls == 3
    assert torch.allclose(latent.cpu(), guided(2.0, given["condition"])[0], rtol=1e-4, atol=1e-4)


# Timesteps of rectified flow.


def test_timesteps_need_not_be_whole_numbers() -> None:
    config, given = configuration(), batch()
    weights = Checkpoint("x", generative_network(config, "network_def").state_dict())  # type: ignore[arg-type]
    network = load_network(config.get_parsed_content("network_def"), weights, 1)
    whole, same, between = (
        inferer().denoise(network, given["noise"], torch.tensor(timesteps), given["condition"])
        for timesteps in ([3, 900], [3.0, 900.0], [3.5, 900.5])
    )
    assert torch.equal(whole, same)
    assert not torch.allclose(whole, between, rtol=1e-4)


class Operators(TorchDispatchMode):
    """Keeps the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "unipc", "flow", "midpoint"])
def test_no_value_is_read_back_while_a_trajectory_runs(name: str) -> None:
    """Each would have the host wait for a GPU, and the GPU then for the host."""
    target = "flow" if name in ("flow", "midpoint") else "epsilon"
    config, given = configuration(target=target, sampler=name, num_inference_steps=4), batch()
    hybrid, steps = config.get_parsed_content("hybrid_inferer"), config.get_parsed_content("chosen_sampler")
    family = LatentDiffusion(Linear(), Decoder(), hybrid, steps, guidance=2.0)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with Operators() as operators:
        family.sample_clean(given["noise"], given["condition"], generators)
    assert "aten::cat" in operators.names and not {"aten::_local_scalar_dense", "aten::item"} & operators.names
