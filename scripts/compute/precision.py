# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Mixed precision, and activations that are computed again instead of kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.core.errors import BundleError
from scripts.core.options import NO, YES

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_precision(amp: Any) -> torch.dtype | None:
    """The type in which a network computes where that is safe, or None for float32 throughout.

    Args:
        amp: `bf16` or a yes for bfloat16, `fp16` for float16, a no for neither.

    Raises:
        BundleError: for anything else.
    """
    text = str(amp).strip().lower()
    if text in NO:
        return None
    if text in YES:
        return torch.bfloat16
    if text not in HALVES:
        raise BundleError(f"--amp must be 0, 1, bf16 or fp16, got '{amp}'")
    return HALVES[text]


def precision_name(amp: Any) -> str | bool:
    """`bf16`, `fp16` or False: one word for each precision, for records.

    Raises:
        BundleError: as `half_precision`.
    """
    dtype = half_precision(amp)
    return next((name for name, half in HALVES.items() if half is dtype), False)


def autocast(device: torch.device, amp: Any) -> AbstractContextManager:
    """Autocast on the device to what `amp` says; see `half_precision`."""
    dtype = half_precision(amp)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def recompute_activations(network: nn.Module, kinds: tuple[str, ...]) -> nn.Module:
    """Let a network's blocks keep their inputs alone, and compute the rest again for the gradient (Chen et al. 2016).

    The result is the same to the last bit; memory goes down and time up by about a third.

    Args:
        network: it is changed in place; its state dict keeps its names.
        kinds: class names of the blocks.

    Raises:
        BundleError: if the network has none of these blocks.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise BundleError(f"the network has no {' or '.join(kinds)} whose activations could be computed again")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
    return network
