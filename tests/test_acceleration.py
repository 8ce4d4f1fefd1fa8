# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The UNet for sampling, against MONAI's own."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from released import FILES, configuration
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measuring import fill_with_random_values
from scripts.core.errors import BundleError
from scripts.networks.cpu import acceleration
from scripts.networks.cpu.acceleration import (
    FastConvolution,
    FastUpsampling,
    accelerate_autoencoder,
    accelerate_unet,
    cast_once,
    forget_derived,
    is_fast,
)
from scripts.sampling.requests import sample_generator
from scripts.volumes.nifti import read_volume


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    widths, attention = (16, 32, 32), (False, True, True)
    network = DiffusionModelUNet(
        3, 7, 3, 1, widths, attention, 8, 1e-6, True, (0, 16, 16), True, 1, 4, upcast_attention=True
    )
    fill_with_random_values(network)
    return network.eval()


def inputs(tokens: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 7, 8, 12, 16, generator=generator), torch.rand(2, tokens, 4, generator=generator)
    return {"x": x, "timesteps": torch.tensor([3, 900]), "context": context}


def error(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_the_same_output_to_rounding(plain: nn.Module, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used, compute = [], FastConvolution.compute

    def watched(self: FastConvolution, x: Tensor) -> Tensor:
        used.append(x.shape)
        return compute(self, x)

    monkeypatch.setattr(FastConvolution, "compute", watched)
    fast = accelerate_unet(copy.deepcopy(plain))
    assert error(fast(**inputs(tokens)), plain(**inputs(tokens))) < 1e-5
    assert used
    assert list(fast.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_in_bfloat16_the_weights_are_cast_once(plain: nn.Module, tokens: int) -> None:
    """As near to float32 as MONAI's own network under autocast; what was cast is kept, and given back."""
    fast, exact = accelerate_unet(copy.deepcopy(plain)), plain(**inputs(tokens))
    outputs = []
    for network in (fast, plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(network(**inputs(tokens)).float())
    assert torch.equal(outputs[0], outputs[2])
    assert 0 < error(outputs[0], exact) < 1.5 * error(outputs[1], exact) < 0.1
    kept = [module.forward for module in fast.modules() if isinstance(module.forward, FastConvolution)]
    cast = [forward._derived["torch.bfloat16"][1] for forward in kept if forward._derived]
    assert cast and all(weight.dtype == torch.bfloat16 for weight in cast)
    forget_derived(fast)
    assert not any(forward._derived for forward in kept)


class Operators(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_weights_cast_once_give_autocast_s_output_from_fewer_operators(plain: nn.Module) -> None:
    outputs, counts = [], []
    for network in (plain, cast_once(copy.deepcopy(plain), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
            outputs.append(network(**inputs()))
        counts.append(operators.number)
    cast = [m for m in plain.modules() if isinstance(m, (nn.Conv3d, nn.Linear))]
    assert torch.equal(*outputs)
    assert counts[0] - counts[1] >= sum(len(list(module.parameters())) for module in cast)


class OnGPU(nn.Conv3d):
    """A convolution that says that it is on a GPU."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([SimpleNamespace(device=torch.device("cuda"))])


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (0, torch.float32)])
def test_on_a_gpu_weights_are_cast_and_keep_their_layout(amp: Any, dtype: torch.dtype) -> None:
    for fast in (False, True):
        network = accelerate_unet(OnGPU(4, 4, 3), fast, amp)
        assert network.weight.dtype is dtype and network.weight.is_contiguous()


def test_on_a_gpu_the_autoencoder_is_not_computed_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "stream", lambda *given, **more: pytest.fail("streamed"))
    for fast in (False, True):
        accelerate_autoencoder(OnGPU(4, 4, 3), "auto", fast)  # type: ignore[arg-type]


@torch.no_grad()
def test_weights_that_change_are_followed(plain: nn.Module) -> None:
    fast, other = accelerate_unet(copy.deepcopy(plain)), copy.deepcopy(plain)
    fast(**inputs())
    fill_with_random_values(other)
    fast.load_state_dict(other.state_dict())
    assert error(fast(**inputs()), other(**inputs())) < 1e-5


def test_gradients_are_the_plain_network_s(plain: nn.Module) -> None:
    fast, other = accelerate_unet(copy.deepcopy(plain)), copy.deepcopy(plain)
    gradients = []
    for network in (fast, other):
        network(**inputs()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert error(*gradients) < 1e-4


@torch.no_grad()
def test_without_fast_nothing_changes(plain: nn.Module) -> None:
    assert torch.equal(accelerate_unet(copy.deepcopy(plain), fast=False)(**inputs()), plain(**inputs()))


def test_fast_0_gives_monai_s_volume_bit_for_bit(bundle_copy: Path, run_here: RunHere, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"num_inference_steps": 3, "seed": 5, "output_dtype": "float32", "gender": 1}
    volumes = {}
    for fast in (0, 1):
        run_here([BASE, TINY], bundle_root=str(bundle_copy), output_dir=str(tmp_path / str(fast)), fast=fast, **flags)
        volumes[fast] = read_volume(tmp_path / str(fast) / "sample_seed-5_000000.nii.gz")
    unclipped = plain_volume(configuration(), bundle_copy / "models", seed=5, steps=3)
    plain = unclipped.clip(0.0, 1.0)  # as every volume is that is written
    assert 0.05 < ((unclipped > 0) & (unclipped < 1)).mean(), "what is clipped shows no difference"
    assert np.array_equal(volumes[0], plain)
    assert not np.array_equal(volumes[1], plain) and np.abs(volumes[1] - plain).max() < 1e-5 * np.abs(unclipped).max()


@pytest.mark.parametrize(("flags", "decoder"), [({}, "bf16"), ({"decoder_amp": 0}, False)])
def test_the_decoder_s_precision_is_the_network_s_unless_it_is_said(
    flags: dict[str, Any], decoder: Any, bundle_copy: Path, run_here: RunHere, tmp_path: Path
) -> None:
    given = {"num_inference_steps": 2, "seed": 5, "amp": 1, **flags}
    run_here([BASE, TINY], bundle_root=str(bundle_copy), output_dir=str(tmp_path), **given)
    sidecar = json.loads((tmp_path / "sample_seed-5_000000.json").read_text())
    assert (sidecar["amp"], sidecar["decoder_amp"]) == ("bf16", decoder)


@torch.no_grad()
def plain_volume(config: Any, weights: Path, seed: int, steps: int) -> np.ndarray:
    """From MONAI's networks alone, called one step after the other."""
    networks = {}
    for key, name in FILES.items():
        networks[key] = config.get_parsed_content(key).eval()
        networks[key].load_old_state_dict(torch.load(weights / name, weights_only=True))
    schedule = config.get_parsed_content("schedule")
    schedule.set_timesteps(steps)
    latent = torch.randn(config.get_parsed_content("latent_shape"), generator=sample_generator(seed, 0))[None]
    condition = torch.tensor([[1.0, 0.5, 0.5, 0.5]])  # a man, else in the middle
    channels = condition[:, :, None, None, None].expand(-1, -1, *latent.shape[2:])
    for timestep in schedule.timesteps:
        times = torch.full((1,), int(timestep))
        output = networks["network_def"](torch.cat([latent, channels], 1), times, condition[:, None])
        latent, _ = schedule.step(output, int(timestep), latent)
    return networks["autoencoder_def"].decode_stage_2_outputs(latent)[0, 0].numpy()


@torch.no_grad()
def test_what_is_kept_is_not_computed_in_compiled_code() -> None:
    compiled: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    block = DiffusionUNetResnetBlock(3, 16, 32, out_channels=16, up=True, norm_num_groups=8).eval()
    fill_with_random_values(block)
    x, emb = torch.randn(1, 16, 2, 2, 4), torch.randn(1, 32)
    expected = block(x, emb)
    block.forward = FastUpsampling(block)  # type: ignore[method-assign]
    block.compile(backend=record)
    for _ in range(2):
        assert error(block(x, emb), expected) < 1e-5
    assert any("conv3d" in name for name in compiled) and not any("einsum" in name for name in compiled)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler for CPUs needs g++")
@torch.no_grad()
def test_compiled(plain: nn.Module) -> None:
    compiled = accelerate_unet(copy.deepcopy(plain), fast=True, compiled=1)
    assert error(compiled(**inputs()), plain(**inputs())) < 1e-5


@pytest.mark.parametrize(
    ("fast", "device", "wanted"), [("auto", "cpu", True), ("auto", "cuda", False), (1, "cuda", True)]
)
def test_where_it_is_used(fast: Any, device: str, wanted: bool) -> None:
    assert is_fast(fast, device) is wanted
    with pytest.raises(BundleError, match="--fast must be 1, 0 or auto, got 'quick'"):
        is_fast("quick", device)
