# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The perceptual loss: LPIPS as its authors' package computes it, on slices along all three axes."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.autoencoder.perceptual import BLOCKS, LPIPS, SlicePerceptualLoss
from scripts.autoencoder.training import perceptual_loss
from scripts.core.errors import BundleError

# Of lpips 0.1.4 with the weights of `patterned`, for the images of `pictures`.
PACKAGE_DISTANCES = [0.0904128, 0.00684164]


def patterned(network: nn.Module) -> nn.Module:
    """Weights from a formula, so that they are the same everywhere: as large as trained ones, heads positive."""
    for number, (name, parameter) in enumerate(network.named_parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (1.3 + 0.1 * number)).float()
        size = (6.0 / parameter[0].numel()) ** 0.5 if parameter.dim() == 4 else 0.05
        wave = wave.abs() if name.startswith("lin") else wave * size
        parameter.data.copy_(wave.reshape(parameter.shape))
    return network


def pictures(height: int = 32, width: int = 48) -> tuple[Tensor, Tensor]:
    """Two pairs of smooth images, 0..1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    first = torch.stack([0.5 + 0.5 * torch.sin(9 * x + 5 * y), x * y])[:, None]
    second = torch.stack([0.5 + 0.5 * torch.sin(8 * x + 6 * y), x * x * y])[:, None]
    return first, second


@pytest.fixture(scope="module")
def network() -> LPIPS:
    return patterned(LPIPS())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def weights(network: LPIPS, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("perceptual") / "perceptual_vgg16.safetensors"
    save_file(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def loss(weights: str) -> SlicePerceptualLoss:
    return SlicePerceptualLoss(weights, 1.0)


def volumes(seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 1, 16, 24, 20, generator=generator)
    return image, (image + 0.2 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def vgg16_of(network: LPIPS) -> SimpleNamespace:
    """What torchvision's `vgg16` returns, as far as lpips looks at it, with our convolutions."""
    layers: list[nn.Module] = []
    for numbers in BLOCKS:
        for number in numbers:
            layers += [network.features[str(number)], nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    assert len(layers) == 31  # torchvision's numbering
    return SimpleNamespace(features=nn.Sequential(*layers))


def of_the_package(network: LPIPS, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The lpips package's network with the same weights."""
    models: Any = ModuleType("torchvision.models")
    models.vgg16 = lambda pretrained: vgg16_of(network)
    torchvision: Any = ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("lpips").LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    for level, head in enumerate(package.lins):
        head.model[-1].weight.data.copy_(network.get_submodule(f"lin{level}").weight.data)
    return package


@torch.no_grad()
def test_distances_are_those_of_the_package(network: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    package = of_the_package(network, monkeypatch)
    for pair in (pictures(), pictures(33, 50), [image.expand(-1, 3, -1, -1) for image in pictures()]):
        assert torch.allclose(network(*pair), package(*pair).flatten(), rtol=1e-4)


@torch.no_grad()
def test_distances_are_those_the_package_gave(network: LPIPS) -> None:
    assert network(*pictures()).tolist() == pytest.approx(PACKAGE_DISTANCES, rel=1e-3)


@torch.no_grad()
def test_distance_is_zero_for_equals_and_symmetric(network: LPIPS) -> None:
    first, second = pictures()
    assert network(first, first).tolist() == [0.0, 0.0]
    assert torch.allclose(network(first, second), network(second, first))
    assert (network(first, second) > 0).all()


@torch.no_grad()
def test_all_slices_along_the_three_axes(loss: SlicePerceptualLoss, network: LPIPS) -> None:
    image, reconstruction = volumes(batch=2)
    expected = 0.0
    for axis in (2, 3, 4):
        pairs = zip(reconstruction.unbind(axis), image.unbind(axis))
        expected += torch.stack([network(a, b).mean() for a, b in pairs]).mean().item()
    assert loss(reconstruction, image).item() == pytest.approx(expected, rel=1e-4)
    assert loss(image, image).item() == 0.0


class Slices(nn.Module):
    """In the place of the network: keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.pairs.append((a, b))
        return torch.zeros(len(a))


@pytest.mark.parametrize(("ratio", "numbers"), [(0.25, [4, 6, 5]), (1.0, [16, 24, 20]), (0.01, [1, 1, 1])])
def test_share_of_slices(ratio: float, numbers: list[int], weights: str) -> None:
    loss, slices = SlicePerceptualLoss(weights, ratio), Slices()
    loss.network = slices  # type: ignore[assignment]
    image, _ = volumes(batch=2)
    loss(image, 2 * image)
    assert [len(a) for a, _ in slices.pairs] == [2 * n for n in numbers]
    assert [tuple(a.shape[1:]) for a, _ in slices.pairs] == [(1, 24, 20), (1, 16, 20), (1, 16, 24)]
    assert all(torch.equal(2 * a, b) for a, b in slices.pairs)
    first, _ = slices.pairs[0]
    assert any(torch.equal(first[0, 0], plane) for plane in image[0, 0])


def test_gradient_reaches_the_reconstruction_alone(loss: SlicePerceptualLoss) -> None:
    image, reconstruction = volumes()
    image[:, :, :8], reconstruction[:, :, :8] = 0.0, 0.0  # air around the head
    reconstruction.requires_grad_(True)
    loss(reconstruction, image).backward()
    assert reconstruction.grad is not None and reconstruction.grad.isfinite().all() and reconstruction.grad.any()
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_missing_file_names_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="make perceptual-weights.*--perceptual_weight 0") as caught:
        perceptual_loss(str(tmp_path / "x.safetensors"), 0.002, 0.25, torch.device("cpu"))
    assert str(tmp_path / "x.safetensors") in str(caught.value)


def test_file_of_another_network(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(BundleError, match="is not the perceptual network"):
        SlicePerceptualLoss(str(tmp_path / "x.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"cut")
    with pytest.raises(BundleError, match="damaged"):
        SlicePerceptualLoss(str(tmp_path / "x.safetensors"))


def test_no_file_is_needed_without_the_loss(tmp_path: Path) -> None:
    assert perceptual_loss(str(tmp_path / "x.safetensors"), 0.0, 0.25, torch.device("cpu")) is None
    with pytest.raises(BundleError, match="must be a number of at least 0"):
        perceptual_loss(str(tmp_path / "x.safetensors"), -1.0, 0.25, torch.device("cpu"))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1])
def test_impossible_shares(ratio: float, weights: str) -> None:
    with pytest.raises(BundleError, match="fake_3d_ratio must be above 0 and at most 1"):
        SlicePerceptualLoss(weights, ratio)
