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
"""The inferer that training and sampling share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from released import configuration, generative_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.checkpoints import Checkpoint, load_network
from scripts.guidance import NULL_CONDITION
from scripts.hybrid import HybridInferer, LatentDiffusionSampler

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


def test_training_adds_the_noise_of_the_schedule_and_conditions_both_ways() -> None:
    given, network = batch(), Recorder()
    inferer()(network=network, **given)
    x, timesteps, context = network.given
    betas = torch.linspace(0.0015**0.5, 0.0205**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[given["timesteps"]].float()[:, None, None, None, None]
    noisy = alphas.sqrt() * given["inputs"] + (1 - alphas).sqrt() * given["noise"]
    assert torch.allclose(x[:, :3], noisy, atol=1e-5)
    assert torch.equal(x[:, 3:], given["condition"][:, :, None, None, None].expand(2, 4, *SHAPE[1:]))
    assert torch.equal(context, given["condition"][:, None])
    assert torch.equal(timesteps, given["timesteps"])


def test_mixed_precision_computes_in_bfloat16_and_returns_float32() -> None:
    given, layer = batch(), nn.Conv3d(7, 3, 1)
    seen = []

    def network(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append(layer(x))
        return seen[-1]

    for amp, dtype in ((False, torch.float32), (1, torch.bfloat16), ("true", torch.bfloat16)):
        output = inferer(amp=amp)(network=network, **given)  # type: ignore[arg-type]
        assert seen[-1].dtype == dtype and output.dtype == torch.float32


def test_sampling_calls_the_network_as_training_does() -> None:
    config = configuration()
    weights = Checkpoint("x", generative_network(config, "network_def").state_dict())  # type: ignore[arg-type]
    network, given = load_network(config.get_parsed_content("network_def"), weights, 1), batch()
    hybrid = config.get_parsed_content("hybrid_inferer")
    noisy = config.get_parsed_content("schedule").add_noise(given["inputs"], given["noise"], given["timesteps"])
    with torch.no_grad():
        trained = hybrid(network=network, **given)
        sampled = [
            hybrid.denoise(network, noisy[i : i + 1], given["timesteps"][i : i + 1], given["condition"][i : i + 1])
            for i in (0, 1)
        ]
    assert torch.allclose(trained, torch.cat(sampled), rtol=1e-4, atol=1e-5)


class Decoder(nn.Module):
    """In the place of the autoencoder."""

    def decode_stage_2_outputs(self, latent: Tensor) -> Tensor:
        return 2.0 * latent[:, :1]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_latents_are_divided_by_their_scale_before_decoding(scale: float) -> None:
    config = configuration(num_inference_steps=2)
    sampler = LatentDiffusionSampler(inferer(), config.get_parsed_content("chosen_sampler"), Decoder(), scale)
    given = batch()
    latent = sampler.sample_latent(given["noise"], Recorder(), given["condition"], [])
    volumes = sampler(given["noise"], Recorder(), given["condition"], [])
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
    sampler = LatentDiffusionSampler(inferer(amp=amp), steps, Watching(), decoder_amp=decoder_amp)
    volumes = sampler(batch()["noise"], Network(), batch()["condition"], [])
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
    sampler = LatentDiffusionSampler(
        config.get_parsed_content("hybrid_inferer"),
        config.get_parsed_content("chosen_sampler"),
        Decoder(),
        guidance=guidance,
    )
    network = Linear()
    return sampler.sample_latent(batch()["noise"], network, condition, []), network.calls


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
    sampler, network = LatentDiffusionSampler(hybrid, steps, Decoder(), guidance=2.0), Linear()
    latent = sampler.sample_latent(given["noise"].cuda(), network, given["condition"].cuda(), [])
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
    sampler = LatentDiffusionSampler(hybrid, steps, Decoder(), guidance=2.0)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with Operators() as operators:
        sampler.sample_latent(given["noise"], Linear(), given["condition"], generators)
    assert "aten::cat" in operators.names and not {"aten::_local_scalar_dense", "aten::item"} & operators.names
