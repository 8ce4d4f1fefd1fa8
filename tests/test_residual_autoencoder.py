# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The residual autoencoder: against SciPy's cosine transform at its start, and as the bundle's commands use it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import write_dataset
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from released import configuration
from scipy.fft import dctn, idctn
from torch import Tensor, nn
from trained import AUTOENCODER, content, difference

from scripts.autoencoder.training import PosteriorAutoencoder, autoencoder_to_train
from scripts.networks.cpu.acceleration import accelerate_autoencoder
from scripts.networks.residual_autoencoder import (
    ChannelNorm,
    EqualisedConv3d,
    ResidualAutoencoderKL,
    dct_basis,
    lowest_frequencies,
)
from scripts.networks.weights import ENCODER
from scripts.training.finetuning import freeze

SMALL: dict[str, Any] = {"latent_channels": 5, "channels": (8, 16), "num_res_blocks": 1, "patch": 2}
SIDE = 4
OVERLAY, MUON = "configs/demo_next.yaml", "configs/muon.yaml"
NETWORKS = ["*.entry", "*.levels", "*.folded", "*.unfolded", "*.seen", "*.norm", "*.exit"]


def small(**given: Any) -> ResidualAutoencoderKL:
    torch.manual_seed(0)
    return ResidualAutoencoderKL(**{**SMALL, **given}).eval()


def trained(**given: Any) -> ResidualAutoencoderKL:
    """One whose residual networks no longer give 0."""
    network = small(**given)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def cubes(volume: np.ndarray) -> np.ndarray:
    """(x, y, z, SIDE, SIDE, SIDE) of a volume."""
    parts = [n // SIDE for n in volume.shape]
    shape = [length for part in parts for length in (part, SIDE)]
    return volume.reshape(shape).transpose(0, 2, 4, 1, 3, 5)


def coefficients(volume: np.ndarray, number: int) -> np.ndarray:
    """(number, x, y, z): SciPy's transform of each cube, at the lowest frequencies."""
    transformed = dctn(cubes(volume), axes=(3, 4, 5), norm="ortho")
    return np.stack([transformed[..., i, j, k] for i, j, k in lowest_frequencies(SIDE, number)])


def test_starts_as_scipys_cosine_transform() -> None:
    stds = [2.0, 0.5, 0.4, 0.3, 0.2]
    network, volume = small(mean=0.25, coefficient_stds=stds), torch.rand(8, 12, 4)
    expected = coefficients(volume.double().numpy() - 0.25, 5) / np.array(stds).reshape(5, 1, 1, 1)
    with torch.no_grad():
        mean, std = network.encode(volume[None, None])
        decoded = network.decode(mean)[0, 0]
    np.testing.assert_allclose(mean[0], expected, atol=1e-5)
    assert std.shape == mean.shape == (1, 5, 2, 3, 1)
    kept = np.zeros((2, 3, 1, SIDE, SIDE, SIDE))
    for values, (i, j, k), scale in zip(expected, lowest_frequencies(SIDE, 5), stds, strict=True):
        kept[..., i, j, k] = values * scale
    np.testing.assert_allclose(cubes(decoded.numpy()), idctn(kept, axes=(3, 4, 5), norm="ortho") + 0.25, atol=1e-5)


def test_with_all_frequencies_nothing_is_lost() -> None:
    network, volumes = small(latent_channels=SIDE**3), torch.rand(2, 1, 4, 8, 4)
    with torch.no_grad():
        torch.testing.assert_close(network.reconstruct(volumes), volumes)


def test_basis_is_orthonormal_and_begins_with_the_mean() -> None:
    basis = dct_basis(8, 20).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(20), atol=1e-5, rtol=0.0)
    assert basis[0].unique().numel() == 1
    assert lowest_frequencies(8, 5) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]


def test_a_translation_by_a_cube_is_one_by_a_voxel_of_the_latent() -> None:
    network, volume = trained(), torch.zeros(1, 1, 8, 16 * SIDE, 8)
    volume[:, :, :, 7 * SIDE : 8 * SIDE] = torch.rand(8, SIDE, 8)
    with torch.no_grad():
        here, there = network.encode(volume)[0], network.encode(volume.roll(SIDE, dims=3))[0]
    torch.testing.assert_close(here[:, :, :, 6:9], there[:, :, :, 7:10])


def test_norm_sees_one_position_alone() -> None:
    norm, x = ChannelNorm(8, 2, 1e-6), torch.randn(2, 8, 3, 4, 5)
    grouped = norm(x).view(2, 2, 4, 3, 4, 5)
    torch.testing.assert_close(grouped.square().mean(dim=2), torch.ones(2, 2, 3, 4, 5), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(norm(x)[:, :, :1, 1:2], norm(x[:, :, :1, 1:2]))


def moved_by_one_step(layer: nn.Conv3d) -> float:
    """How far a step of Adam moves the outputs, in their standard deviations."""
    x, optimizer = torch.randn(1, layer.in_channels, 8, 8, 8), torch.optim.Adam(layer.parameters(), lr=1e-3)
    before = layer(x)
    (before * torch.randn_like(before)).sum().backward()
    optimizer.step()
    return ((layer(x) - before).std() / before.std()).item()


def test_one_rate_moves_wide_and_narrow_layers_alike() -> None:
    torch.manual_seed(0)
    narrow, wide = (moved_by_one_step(EqualisedConv3d(channels, 32, 3)) for channels in (4, 64))
    plain = moved_by_one_step(nn.Conv3d(64, 32, 3, padding=1))
    assert wide == pytest.approx(narrow, rel=0.5) and plain > 10 * wide


def test_every_weight_learns_and_the_posterior_can_start_narrow() -> None:
    network = autoencoder_to_train(trained(), -8.0)
    assert (network.quant_conv_log_sigma.conv.bias == -8.0).all()  # type: ignore[union-attr]
    pred, mean, std = PosteriorAutoencoder(network)(torch.rand(1, 1, 8, 8, 8), torch.randn(1, 5, 2, 2, 2))
    (pred.square().mean() + mean.square().mean() + std.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_networks_frozen_at_their_start_are_not_computed_in_training() -> None:
    network, volumes, computed = small(), torch.rand(1, 1, 8, 8, 8), []
    for part in (network.encoder, network.decoder):
        part.blocks[0].entry.register_forward_hook(lambda *_: computed.append(True))  # type: ignore[union-attr, index]
    freeze(network, NETWORKS)
    evaluated = network.reconstruct(volumes)
    assert len(computed) == 2
    torch.testing.assert_close(network.train().reconstruct(volumes), evaluated)
    assert len(computed) == 2


def test_network_of_the_decoder_is_in_units_of_what_the_linear_code_leaves() -> None:
    network, latents = small(residual_std=0.05), torch.randn(1, 5, 2, 2, 2)
    before = network.decode(latents)
    nn.init.ones_(network.decoder.blocks[0].exit.bias)  # type: ignore[union-attr, index, arg-type]
    torch.testing.assert_close(network.decode(latents) - before, torch.full_like(before, 0.05))


def test_first_step_already_moves_the_residual_networks() -> None:
    network = small()
    network(torch.rand(1, 1, 8, 8, 8))[0].square().mean().backward()
    moved = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert {"encoder.blocks.0.exit.weight", "decoder.blocks.0.exit.weight"} <= {*moved}


@pytest.mark.parametrize("streaming", ["0", "1", "2"])
def test_sampling_in_slabs_changes_nothing(streaming: str) -> None:
    plain = trained()
    network = accelerate_autoencoder(copy.deepcopy(plain), streaming, fast=True)
    volumes, latents = torch.rand(2, 1, 8, 8, 12), torch.randn(2, 5, 2, 2, 3)
    assert isinstance(network, AutoencoderKL)
    with torch.no_grad():
        torch.testing.assert_close(network.encode(volumes), plain.encode(volumes))
        torch.testing.assert_close(network.decode_stage_2_outputs(latents), plain.decode(latents))
    assert [*network.state_dict()] == [*plain.state_dict()]


def test_encodings_depend_on_the_weights_that_are_hashed_and_on_no_others() -> None:
    network, volumes = trained(), torch.rand(1, 1, 8, 8, 8)

    def encodings() -> Tensor:
        with torch.no_grad():
            return torch.cat(network.encode(volumes))

    before = encodings()
    for name, parameter in network.named_parameters():
        if not name.startswith(ENCODER):
            nn.init.zeros_(parameter)
    assert torch.equal(encodings(), before)
    for name, parameter in network.named_parameters():
        if name.startswith(ENCODER):
            with torch.no_grad():
                parameter.mul_(2.0)
            now = encodings()
            assert not torch.equal(now, before), name
            before = now


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coefficient_stds": [1.0]}, "1 coefficient_stds are given for 5"),
        ({"num_res_blocks": [1]}, "1 numbers of residual blocks are given for 2 levels"),
        ({"norm_num_groups": 3}, "multiples of norm_num_groups 3"),
        ({"in_channels": 2}, "one channel"),
    ],
)
def test_arguments_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**given)


def test_side_that_is_no_multiple_of_the_largest_cube() -> None:
    with pytest.raises(ValueError, match="divisible by factor 2"):
        small().encode(torch.rand(1, 1, 8, 6, 8))


def test_next_small_models_latent() -> None:
    config = ConfigParser()
    config.read_config([BASE, OVERLAY])
    assert config.get_parsed_content("latent_shape") == [16, 20, 28, 20]
    with torch.no_grad():
        network = config.get_parsed_content("autoencoder_def").eval()
        assert network.encode(torch.rand(1, 1, 16, 32, 24))[0].shape == (1, 16, 2, 4, 3)


def test_trains_by_the_bundles_command_and_goes_on_exactly(tmp_path: Path, run_here: RunHere) -> None:
    write_dataset(tmp_path / "dataset", configuration().get_parsed_content("grid"))
    files, two = [BASE, AUTOENCODER, OVERLAY, MUON, TINY], {"autoencoder_def::patch": 2, "epoch_length": 2, "seed": 1}
    flags = {**two, "autoencoder_channels": [8, 16], "dataset_dir": str(tmp_path / "dataset"), "channels_last": 1}
    run_here(files, **flags, run_dir=str(tmp_path / "whole"), max_epochs=2)
    for epochs in (1, 2):
        run_here(files, **flags, run_dir=str(tmp_path / "parts"), max_epochs=epochs)
    whole, parts = (content(tmp_path / name / "checkpoint_iteration=4.pt") for name in ("whole", "parts"))
    for name in whole.keys() - {"config", "code"}:
        assert difference(whole[name], parts[name]) == 0.0, name
