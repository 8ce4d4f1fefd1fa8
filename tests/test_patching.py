# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The autoencoder on cubes of voxels, against MONAI's own on volumes that were folded by einops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ROOT
from einops import rearrange
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from torch import nn

from scripts.networks.cpu.streaming import stream
from scripts.networks.patching import PatchedAutoencoderKL

NETWORK: dict[str, Any] = {
    "spatial_dims": 3,
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, False),
    "norm_num_groups": 4,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
FOLDED = "b c (x p) (y q) (z r) -> b (c p q r) x y z"
TWO = {"p": 2, "q": 2, "r": 2}


@pytest.fixture
def patched() -> PatchedAutoencoderKL:
    torch.manual_seed(0)
    made = PatchedAutoencoderKL(**NETWORK).eval()
    for parameter in made.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.normal_(parameter, std=0.5)
    return made


def test_is_the_plain_network_on_folded_volumes(patched: PatchedAutoencoderKL) -> None:
    plain = AutoencoderKL(in_channels=8, out_channels=8, **NETWORK).eval()
    plain.load_state_dict(patched.state_dict())
    volumes, latents = torch.rand(2, 1, 8, 12, 16), torch.randn(2, 3, 2, 3, 4)
    with torch.no_grad():
        mean, std = patched.encode(volumes)
        plain_mean, plain_std = plain.encode(rearrange(volumes, FOLDED, **TWO))
        decoded, plain_decoded = patched.decode(latents), plain.decode(latents)
    assert mean.shape == latents.shape and decoded.shape == volumes.shape
    assert torch.equal(mean, plain_mean) and torch.equal(std, plain_std)
    assert torch.equal(rearrange(decoded, FOLDED, **TWO), plain_decoded)


def test_forward_and_reconstruction_fold_and_unfold(patched: PatchedAutoencoderKL) -> None:
    volumes = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        reconstruction = patched.reconstruct(volumes)
        assert torch.equal(reconstruction, patched.decode(patched.encode(volumes)[0]))
        assert patched(volumes)[0].shape == volumes.shape


def test_computes_in_slabs(patched: PatchedAutoencoderKL) -> None:
    streamed, latents = stream(copy.deepcopy(patched), True, True, 60), torch.randn(1, 3, 4, 4, 4)
    with torch.no_grad():
        expected, volume = patched.decode(latents), streamed.decode(latents)
    assert (volume - expected).abs().max() < 1e-5 * expected.abs().max()


def test_side_that_is_no_multiple_of_the_cube(patched: PatchedAutoencoderKL) -> None:
    with pytest.raises(ValueError, match="divisible by factor 2"):
        patched.encode(torch.rand(1, 1, 8, 9, 8))


def test_small_models_latent_is_the_papers() -> None:
    config = ConfigParser()
    config.read_config([str(ROOT / "configs" / name) for name in ("inference.json", "demo.yaml")])
    network = config.get_parsed_content("autoencoder_def").eval()
    assert config.get_parsed_content("latent_shape") == [3, 20, 28, 20]
    assert config.get_parsed_content("grid").shape == (160, 224, 160)
    with torch.no_grad():
        assert network.encode(torch.rand(1, 1, 16, 32, 24))[0].shape == (1, 3, 2, 4, 3)
