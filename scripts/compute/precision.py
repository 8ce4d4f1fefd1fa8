# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Mixed precision, and activations that are computed again instead of kept."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.core.config import build, current_config
from scripts.core.errors import BundleError
from scripts.core.files import read_json
from scripts.core.options import AUTO, NO, YES

logger = logging.getLogger(__name__)

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SLOW = (
    "this CPU has no instructions for it and emulates them, many times slower than float32: one call of the released "
    "UNet took 74.6 s in bfloat16 and 0.79 s in float32. Give --amp 0"
)


def half_precision(amp: Any) -> torch.dtype | None:
    """The type in which a network computes where that is safe, or None for float32 throughout.

    Args:
        amp: `bf16` or a yes for bfloat16, `fp16` for float16, a no, or an `auto` that nothing has settled, for
            neither.

    Raises:
        BundleError: for anything else.
    """
    text = str(amp).strip().lower()
    if text in NO or text == AUTO:
        return None
    if text in YES:
        return torch.bfloat16
    if text not in HALVES:
        raise BundleError(f"--amp must be 0, 1, auto, bf16 or fp16, got '{amp}'")
    return HALVES[text]


def precision_name(amp: Any) -> str | bool:
    """`bf16`, `fp16` or False: one word for each precision, for records.

    Raises:
        BundleError: as `half_precision`.
    """
    dtype = half_precision(amp)
    return next((name for name, half in HALVES.items() if half is dtype), False)


def autocast(device: torch.device, amp: Any) -> AbstractContextManager:
    """Autocast on the device to what `amp` says; see `half_precision`. Where that is slow, it is said once.

    Raises:
        BundleError: for a half precision on Apple's GPUs, on which nobody has tried it.
    """
    dtype = half_precision(amp)
    if dtype is not None and device.type == "mps":
        raise BundleError(f"--amp {amp}: on mps the bundle computes in float32: give --amp 0")
    if dtype is not None and device.type == "cpu" and not has_bfloat16():
        _warn_of(str(amp))
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@cache
def _warn_of(amp: str) -> None:
    logger.warning(f"--amp {amp}: {SLOW}")


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 that PyTorch uses: AVX-512 BF16 or AMX."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def choose_precision(amp: Any, device: torch.device) -> Any:
    """What `--amp` says; for `auto`, bfloat16 on a CPU that has instructions for it, and float32 elsewhere.

    A GPU's float32 is TF32 in convolutions, and stays what it was. What was begun in float32 goes on in it: samples in
    the output folder, or the training of the run folder.
    """
    if str(amp).strip().lower() != AUTO:
        half_precision(amp)
        return amp
    return "bf16" if device.type == "cpu" and has_bfloat16() and not _begun_in_float32() else False


def _begun_in_float32() -> bool:
    config = current_config()
    is_training = config.get("stage", "sampling") != "sampling"
    folder = Path(str(build("run_dir" if is_training else "output_dir")))
    if is_training:
        stated = read_json(folder / ".made_by").get("settings", {})
    else:
        stated = next((read_json(path) for path in folder.glob("sample_seed-*_*.json")), {})
    found = str(stated.get("amp", AUTO)).lower() if isinstance(stated, dict) else AUTO
    return found in NO


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
