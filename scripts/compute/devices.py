# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where to compute, and how a GPU is set up for it."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.core.options import yes_or_no

logger = logging.getLogger(__name__)

DEVICES = "auto, cpu, cuda, cuda:N or mps"
WASTEFUL = ((9, 8), (9, 15))
"""Versions of cuDNN, the last one excluded, whose 3D convolutions in bfloat16 take many times the memory."""


def process_rank() -> tuple[int, int]:
    """Rank of this process and number of processes, as `torchrun` states them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def compute_device(device: str | torch.device, tf32: Any = True) -> torch.device:
    """The device to use, checked; a GPU is set up: cuDNN measures which algorithm is the fastest for each size.

    Args:
        device: `auto` (CUDA where there is one, else the CPU), or a name such as `cpu`, `cuda`, `cuda:1`, `mps`.
            Under torchrun `auto` and `cuda` mean the process's own GPU.
        tf32: whether a GPU's float32 convolutions may take TF32, 10 bits of the 23, as is PyTorch's default; matrix
            products take all of them either way.

    Raises:
        BundleError: if the name is no device, or asks for a GPU that is not there.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if process_rank()[0] == 0:
            more = " (--device mps tries this Mac's GPU)" if torch.backends.mps.is_available() else ""
            logger.info(f"computing on {device}{more}")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BundleError(f"--device must be {DEVICES}, got '{device}'") from error
    if wanted.type == "cuda":
        return _set_up(_cuda(wanted), yes_or_no(tf32, "tf32"))
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise BundleError(f"--device {device}: there is no GPU of Apple's that PyTorch can use; use --device cpu")
    if wanted.type not in ("cpu", "mps"):
        raise BundleError(f"--device must be {DEVICES}, got '{device}'")
    return wanted


def _cuda(wanted: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise BundleError(f"--device {wanted}: this machine has no CUDA GPU that PyTorch can use; use --device cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise BundleError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", index)


def _set_up(gpu: torch.device, tf32: bool) -> torch.device:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = tf32
    if not tf32:
        torch.backends.cuda.matmul.allow_tf32 = False
    if process_rank()[0] == 0:
        _say_versions(gpu)
    return gpu


@cache
def _say_versions(gpu: torch.device) -> None:
    known = gpu_versions(gpu)
    logger.info(", ".join(f"{name} {version}" for name, version in known.items()))
    if known["cudnn"] and WASTEFUL[0] <= tuple(map(int, known["cudnn"].split(".")))[:2] < WASTEFUL[1]:
        logger.warning(
            f"cuDNN {known['cudnn']} takes tens of GB for some 3D convolutions in bfloat16: with --amp, install "
            "nvidia-cudnn 9.15 or newer, or give --amp fp16"
        )


def gpu_versions(gpu: torch.device) -> dict[str, str | None]:
    """The GPU's name, and the versions of PyTorch, of its CUDA and of cuDNN; None for what this build has not."""
    number = torch.backends.cudnn.version()
    cudnn = None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    name = torch.cuda.get_device_name(gpu)
    return {"gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn}


def precision_facts(device: torch.device) -> dict[str, bool]:
    """Whether float32 means TF32 in convolutions; nothing on a CPU, which has no TF32."""
    return {"tf32": torch.backends.cudnn.allow_tf32} if device.type == "cuda" else {}


def volume_layout(device: torch.device | str) -> torch.memory_format:
    """How volumes and their convolutions' weights lie in memory where a layout may be chosen.

    On a CPU with the channels last. On a GPU in PyTorch's plain order: its group normalisation brings every map into
    that order, so that with channels last each norm of a network costs two transpositions.
    """
    return torch.channels_last_3d if torch.device(device).type == "cpu" else torch.contiguous_format


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on the device: to a GPU from pinned memory, so that the copy waits for nothing computed there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
