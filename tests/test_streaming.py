# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The autoencoder in slabs, against MONAI's own in one piece."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.core.errors import BundleError
from scripts.networks.cpu.acceleration import accelerate_autoencoder
from scripts.networks.cpu.slabs import Moments
from scripts.networks.cpu.streaming import stream

NETWORKS: dict[str, dict[str, Any]] = {
    "two blocks a level": {"channels": (8, 16, 16), "num_res_blocks": 2, "latent": (3, 2, 2)},
    "wider outside": {"channels": (16, 8), "num_res_blocks": 1, "latent": (5, 4, 3)},
    "attention": {"channels": (8, 16), "attention_levels": (False, True), "latent": (3, 5, 4)},
    "transposed": {"channels": (8, 16), "use_convtranspose": True, "latent": (3, 4, 4)},
}


def network(channels: tuple[int, ...], latent: tuple[int, ...], num_res_blocks: int = 1, **more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    given: dict[str, Any] = {"attention_levels": (False,) * len(channels), "norm_num_groups": 4, "norm_eps": 1e-6}
    given |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False, **more}
    made = AutoencoderKL(3, 1, 1, num_res_blocks, channels, **given).eval()
    for parameter in made.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.normal_(parameter, std=0.5)
    return made


def error(output: Tensor, reference: Tensor) -> float:
    assert output.shape == reference.shape
    return float((output - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("voxels", [60, 10**6])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_slabs_give_the_plain_networks_volume(name: str, recompute: bool, voxels: int) -> None:
    plain = network(**NETWORKS[name])
    factor = 2 ** (len(plain.decoder.channels) - 1)
    latents = torch.randn(2, 3, *NETWORKS[name]["latent"])
    images = torch.rand(2, 1, *(factor * side for side in NETWORKS[name]["latent"]))
    with torch.no_grad():
        volumes, (mean, std) = plain.decode(latents), plain.encode(images)
        for fast in (False, True):
            streamed = stream(copy.deepcopy(plain), recompute, fast, voxels)
            assert error(streamed.decode(latents), volumes) < 1e-5
            assert error(streamed.encode(images)[0], mean) < 1e-5 > error(streamed.encode(images)[1], std)
    assert list(streamed.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("overlay", ["demo.yaml", "tiny.yaml"])
def test_the_bundles_networks(overlay: str) -> None:
    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in ("inference.json", overlay)])
    plain = config.get_parsed_content("autoencoder_def").eval()
    latent = torch.randn(1, 3, 3, 4, 4)
    with torch.no_grad():
        volume = plain.decode(latent)
        assert error(accelerate_autoencoder(plain, "2").decode(latent), volume) < 1e-5  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """Counts the memory that is asked for in pieces of at least `counted` bytes."""

    def __init__(self, counted: int) -> None:
        super().__init__()
        self.counted, self.seen = counted, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.untyped_storage().nbytes() >= self.counted and "empty" in str(func):
            self.seen += 1
        return output


@pytest.mark.parametrize(("recompute", "maps"), [(False, 3), (True, 1)])
def test_few_maps_of_the_largest_size_are_made(recompute: bool, maps: int) -> None:
    """Of 8 channels and all voxels: two of them in each of two blocks, one of which is used again; or one in all."""
    streamed = stream(network((8, 8, 8), (4, 2, 2), 2), recompute, True, 16)
    largest = 8 * 16 * 8 * 8 * 4
    with torch.no_grad(), Largest(largest) as made:
        streamed.decode(torch.randn(1, 3, 4, 2, 2))
    assert made.seen == maps


def test_half_precision_under_autocast() -> None:
    plain, latent = network((8, 16), (4, 4, 4), 1), torch.randn(1, 3, 4, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half, streamed = plain.decode(latent), stream(copy.deepcopy(plain), True, True, 64).decode(latent)
    with torch.no_grad():
        whole = plain.decode(latent)
    assert streamed.dtype == half.dtype == torch.bfloat16
    assert error(streamed.float(), whole) < 2 * error(half.float(), whole) + 0.01


def test_gradients_are_those_of_the_plain_network() -> None:
    plain, latent = network((8, 16), (2, 2, 2), 1), torch.randn(1, 3, 2, 2, 2)
    streamed = stream(copy.deepcopy(plain), True, True)
    plain.decode(latent).sum().backward()
    streamed.decode(latent).sum().backward()
    assert torch.equal(plain.post_quant_conv.conv.weight.grad, streamed.post_quant_conv.conv.weight.grad)


def test_moments_of_values_far_from_zero() -> None:
    slabs, moments = 1000.0 + torch.randn(1, 4, 6, 5, 5), Moments()
    norm = nn.GroupNorm(2, 4, eps=1e-6)
    for slab in slabs.split([1, 3, 2], 2):
        moments.add(slab)
    scale, _ = moments.scale_and_shift(norm)
    variance = slabs.double().view(2, -1).var(1, correction=0)
    assert torch.allclose(scale.flatten()[::2].double(), variance.rsqrt(), rtol=1e-4)


def test_what_is_chosen() -> None:
    for streaming, fast, changed in (("auto", True, True), ("auto", False, False), (0, True, False), (1, False, True)):
        chosen = accelerate_autoencoder(network((8, 8), (2, 2, 2)), streaming, fast)
        assert (type(chosen.decoder).__name__ == "Streamed") is changed  # type: ignore[union-attr]
    assert accelerate_autoencoder(None) is None
    with pytest.raises(BundleError, match="--streaming must be 0, 1, 2 or auto, got '3'"):
        accelerate_autoencoder(network((8, 8), (2, 2, 2)), 3)
