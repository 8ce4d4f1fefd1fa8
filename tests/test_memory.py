# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory that is given back: the same weights afterwards, and the same volumes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, SMALLEST, TINY, RunHere
from safetensors.torch import save_file
from torch import nn

from scripts.core.errors import BundleError
from scripts.networks.cpu.acceleration import accelerate_unet
from scripts.networks.cpu.memory import release_weights
from scripts.networks.weights import Checkpoint, load_network, read_checkpoint


def convolution(seed: int) -> nn.Module:
    """Of 1.7 MB: more than is copied for where it lies in the file."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(128, 128, 3, padding=1), nn.Linear(20, 3)).eval()


def write(path: Path, network: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    state = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path, **options)
    return path


def taken(path: Path) -> tuple[nn.Module, Checkpoint]:
    checkpoint = read_checkpoint(path, "diffusion")
    return load_network(convolution(9), checkpoint, take=True), checkpoint


def same(network: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())


def place(network: nn.Module) -> int:
    return network[0].weight.data_ptr()  # type: ignore[index, no-any-return]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_network_has_the_file_s_own_pages(suffix: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path / f"a{suffix}", convolution(1)), "diffusion")
    lies = checkpoint.state["0.weight"].data_ptr()
    network = load_network(convolution(9), checkpoint, take=True)
    assert checkpoint.mapped and checkpoint.state == {} and same(network, convolution(1))
    assert place(network) == lies and network[0].weight.requires_grad  # type: ignore[index]
    assert network[1].weight.data_ptr() % 64 == 0  # type: ignore[index]


@pytest.mark.parametrize("way", ["half", "older"])
def test_other_files_are_copied(way: str, tmp_path: Path) -> None:
    options = {"dtype": torch.float16} if way == "half" else {"_use_new_zipfile_serialization": False}
    network, checkpoint = taken(write(tmp_path / "a.pt", convolution(1), **options))  # type: ignore[arg-type]
    before, values = place(network), {name: t.clone() for name, t in network.state_dict().items()}
    release_weights(network, checkpoint)
    assert place(network) == before and network[0].weight.dtype == torch.float32  # type: ignore[index]
    assert all(torch.equal(values[name], tensor) for name, tensor in network.state_dict().items())
    assert not checkpoint.mapped


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@torch.no_grad()
def test_released_weights_compute_the_same(suffix: str, tmp_path: Path) -> None:
    network, checkpoint = taken(write(tmp_path / f"a{suffix}", convolution(1)))
    network, x = accelerate_unet(network), torch.randn(1, 128, 2, 3, 20)
    output = network(x)
    for _ in range(2):
        release_weights(network, checkpoint)
        assert not network[0].forward._derived  # type: ignore[index, union-attr]
        assert torch.equal(network(x), output) and network[0].forward._derived  # type: ignore[index, union-attr]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_weights_are_not_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", nn.ModuleDict({"a": nn.Linear(4096, 4096)}))  # 64 MiB
    checkpoint = read_checkpoint(path, "diffusion")
    network = load_network(nn.ModuleDict({"a": nn.Linear(4096, 4096)}), checkpoint, take=True)
    resident = []
    for _ in range(2):
        network["a"].weight.sum()  # type: ignore[index]
        resident.append(file_pages())
        release_weights(network, checkpoint)
        resident.append(file_pages())
    used, released, used_again, released_again = resident
    assert min(used, used_again) - max(released, released_again) > 60 * 2**20


def file_pages() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", convolution(1))
    network, checkpoint = taken(path)
    write(tmp_path / "b.pt", convolution(2)).replace(path)  # as the trainings write: what was mapped is still there
    release_weights(network, checkpoint)
    assert same(network, convolution(1))
    network, checkpoint = taken(path)
    shutil.copyfile(write(tmp_path / "c.pt", nn.Sequential(convolution(3))), path)
    with pytest.raises(BundleError, match="a.pt was written over while it was in use"):
        release_weights(network, checkpoint)
    path.unlink()
    release_weights(network, checkpoint)


@pytest.mark.parametrize("fast", [0, 1])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_same_volumes_bit_for_bit(
    suffix: str, fast: int, run_here: RunHere, bundle_copy: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"num_inference_steps": 2, "num_samples": 2, "seed": 5, "output_dtype": "float32"}
    flags |= {"bundle_root": str(bundle_copy), "fast": fast, **SMALLEST}
    if suffix == ".safetensors":
        state = torch.load(bundle_copy / "models" / "tiny_diffusion.pt", weights_only=True)
        save_file(state, tmp_path / "diffusion.safetensors")
        flags["diffusion_path"] = str(tmp_path / "diffusion.safetensors")
    run_here([BASE, TINY], output_dir=str(tmp_path / "released"), **flags)
    copied = {"diffusion::take": False, "families::latent_diffusion::release": None}
    run_here([BASE, TINY], output_dir=str(tmp_path / "copied"), **flags, **copied)
    found, wanted = voxels(tmp_path / "released"), voxels(tmp_path / "copied")
    assert len(found) == 2 and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def voxels(folder: Path) -> list[np.ndarray]:
    images: list[Any] = [nib.load(path) for path in sorted(folder.glob("*.nii.gz"))]
    return [image.get_fdata(dtype=np.float32) for image in images]
