# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks for sampling: the same results, to rounding, from less arithmetic and memory.

Three identities and a choice:

- Cross-attention to one token gives that token's value to every query, whatever the query and key are: the softmax over
  one key is 1. The conditions are one token, so two projections and the attention itself fall away.
- Nearest upsampling and a convolution are eight smaller convolutions, and Winograd's algorithm halves the arithmetic of
  the others where a map is large; see `scripts.networks.cpu.convolution`.
- PyTorch's fused attention computes what MONAI's two products and a softmax do, without the matrix between them.
- The autoencoder is computed in slabs (`scripts.networks.cpu.streaming`).

Weights keep their names and values. Where gradients are wanted, only the fused attention differs from MONAI's way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.blocks import SABlock
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, DiffusionUNetTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.compute.precision import half_precision
from scripts.core.errors import BundleError
from scripts.core.options import AUTO, yes_or_no
from scripts.networks.cpu.convolution import TILE, doubled, doubled_weights, winograd, winograd_weights
from scripts.networks.cpu.streaming import FEW, stream
from scripts.networks.weights import is_aligned

STREAMING = ("0", "1", "2")


def is_fast(fast: Any, device: torch.device | str) -> bool:
    """Whether to use the identities: as `fast` says, or where it is `auto`, on a CPU, for which they were measured.

    Raises:
        BundleError: unless `fast` is 0, 1 or auto.
    """
    if str(fast).strip().lower() == AUTO:
        return torch.device(device).type == "cpu"
    try:
        return yes_or_no(fast, "fast")
    except BundleError as error:
        raise BundleError(f"--fast must be 1, 0 or {AUTO}, got '{fast}'") from error


def accelerate_autoencoder(
    network: AutoencoderKL | None, streaming: Any = AUTO, fast: bool = True
) -> AutoencoderKL | None:
    """Let an autoencoder compute in slabs.

    Args:
        network: with its weights, on its device; it is changed in place. None where there is none.
        streaming: 0 for MONAI's own way; 1 for slabs with two of the largest maps in memory; 2 for slabs with one, some
            convolutions being computed twice; auto for 2 where `fast` is set and the network is on a CPU, else 0.
        fast: see `scripts.networks.cpu.convolution`.

    Raises:
        BundleError: for another `streaming`.
    """
    way = str(streaming).strip().lower()
    if network is None:
        return None
    if way == AUTO:
        way = "2" if fast and next(network.parameters()).device.type == "cpu" else "0"
    if way not in STREAMING:
        raise BundleError(f"--streaming must be {', '.join(STREAMING)} or {AUTO}, got '{streaming}'")
    return network if way == "0" else stream(network, recompute=way == "2", fast=fast)


def accelerate_unet(network: nn.Module, fast: bool = True, amp: Any = False, compiled: Any = 0) -> nn.Module:
    """Let MONAI's `DiffusionModelUNet` compute by the identities above.

    Args:
        network: with its weights, on its device; it is changed in place.
        fast: whether to.
        amp: precision that it will be called in; on a GPU, weights are then cast to it once; see `cast_once`.
        compiled: whether to compile it with PyTorch's compiler, into CUDA graphs on a GPU.

    Raises:
        BundleError: for a precision that does not exist.
    """
    on_gpu = next(network.parameters()).device.type == "cuda"
    if fast:
        for module in network.modules():
            if type(module) in FORWARDS:
                module.forward = FORWARDS[type(module)](module)  # type: ignore[method-assign]
            if isinstance(module, SABlock):
                module.use_flash_attention = True
    if on_gpu:
        cast_once(network, half_precision(amp))
    if yes_or_no(compiled, "compile"):
        # Each size for itself: for sizes as variables, the compiler cannot lower the convolutions of `doubled`.
        network.compile(mode="reduce-overhead" if on_gpu else None, dynamic=False)
    return network


def forget_derived(network: nn.Module) -> None:
    """Let an accelerated network derive anew from its weights when it is called next, and give the memory back."""
    for module in network.modules():
        if isinstance(module.forward, Fast):
            module.forward.forget()


def cast_once(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A network whose convolutions and linear layers hold their weights in the type that autocast computes them in.

    Autocast casts the same weights to the same values at every call, which is half of the operators of a call of the
    UNet. The output is the same to the last bit; outside of autocast to `dtype` the network cannot be called any more.

    Args:
        network: changed in place.
        dtype: None changes nothing.
    """
    for module in network.modules():
        if dtype is not None and isinstance(module, (nn.Conv3d, nn.Linear)):
            module.to(dtype)
    return network


class Fast(ABC):
    """A module's way to compute where no gradients are wanted; with them, the module's own.

    What is derived from a weight is kept until that weight changes.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.original = module, module.forward
        self._derived: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module."""
        suits = not torch.is_grad_enabled() and self.suits(x, *args, **kwargs)
        return (self.compute if suits else self.original)(x, *args, **kwargs)

    def suits(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether there is a faster way for this input."""
        return True

    @abstractmethod
    def compute(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The faster way."""

    @torch.compiler.disable
    def derived(self, name: str, derive: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        """`derive(weight)`, computed once; see `forget_derived`.

        Outside of compiled code: what that computes on a GPU lies in memory that its next call takes back.
        """
        state = weight.data_ptr(), weight._version
        if name not in self._derived or self._derived[name][0] != state:
            self._derived[name] = state, derive(weight if is_aligned(weight) else weight.clone())
        return self._derived[name][1]

    def forget(self) -> None:
        """Let go of all that was derived."""
        self._derived.clear()


class FastConvolution(Fast):
    """`torch.nn.Conv3d` on a CPU: in float32 by Winograd's algorithm, under autocast with weights cast once."""

    def suits(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Under autocast all; else 3 x 3 x 3 with stride 1 and at least four tiles along z: below it is no faster."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return True
        conv = self.module
        plain = conv.kernel_size == (3, 3, 3) and conv.stride == (1, 1, 1) and conv.padding == (1, 1, 1)
        wide = conv.groups == 1 and min(conv.weight.shape[:2]) >= FEW and x.shape[4] % TILE == 0
        return plain and wide and x.shape[4] >= 4 * TILE and _in_float32_on_cpu(x)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, I, X, Y, Z) to (N, O, X, Y, Z)."""
        if not torch.is_autocast_enabled("cpu"):
            return winograd(x, self.derived("winograd", winograd_weights, self.module.weight), self.module.bias)
        conv, half = self.module, torch.get_autocast_dtype("cpu")
        weight = self.derived(str(half), lambda w: w.to(half, memory_format=torch.channels_last_3d), conv.weight)
        bias = None if conv.bias is None else conv.bias.to(half)
        with torch.autocast("cpu", enabled=False):
            x = x.to(half, memory_format=torch.channels_last_3d)
            return F.conv3d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class FastTransformer(Fast):
    """MONAI's transformer block for conditions that are one token (B, 1, n)."""

    def suits(self, x: Tensor, context: Tensor | None = None) -> bool:  # type: ignore[override]
        """One token alone."""
        return context is not None and context.shape[1] == 1

    def compute(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """(B, voxels, C) to the same."""
        block = self.module
        x = block.attn1(block.norm1(x)) + x
        x = x + block.attn2.out_proj(block.attn2.to_v(context))
        return block.ff(block.norm3(x)) + x


class FastUpsampling(Fast):
    """MONAI's residual block of the UNet, where it upsamples."""

    def suits(self, x: Tensor, emb: Tensor) -> bool:  # type: ignore[override]
        """Three-dimensional ones that upsample."""
        return self.module.up and self.module.spatial_dims == 3

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, x, y, z) to (B, O, 2 x, 2 y, 2 z)."""
        block, conv = self.module, self.module.conv1.conv
        h = block.nonlinearity(block.norm1(x))
        weights = self.derived("doubled", doubled_weights, conv.weight)
        h = doubled(F.pad(h, (0, 0, 0, 0, 1, 1)), weights, conv.bias)
        h = h + block.time_emb_proj(block.nonlinearity(emb))[:, :, None, None, None]
        h = block.conv2(block.nonlinearity(block.norm2(h)))
        return block.upsample(block.skip_connection(x)) + h


def _in_float32_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


FORWARDS: dict[type[nn.Module], type[Fast]] = {
    nn.Conv3d: FastConvolution,
    DiffusionUNetTransformerBlock: FastTransformer,
    DiffusionUNetResnetBlock: FastUpsampling,
}
