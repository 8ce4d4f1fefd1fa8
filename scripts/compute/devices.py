# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where to compute."""

from __future__ import annotations

import logging
import os

import torch

from scripts.core.errors import BundleError

logger = logging.getLogger(__name__)


def process_rank() -> tuple[int, int]:
    """Rank of this process and number of processes, as `torchrun` states them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def compute_device(device: str | torch.device) -> torch.device:
    """The device to use, checked.

    Args:
        device: `auto` (CUDA where there is one, else the CPU), or a name such as `cpu`, `cuda`, `cuda:1`.
            Under torchrun `auto` and `cuda` mean the process's own GPU.

    Raises:
        BundleError: if the name is no device, or asks for a GPU that is not there.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if process_rank()[0] == 0:
            logger.info(f"computing on {device}")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BundleError(f"--device must be auto, cpu, cuda or cuda:N, got '{device}'") from error
    if wanted.type == "cuda":
        return _cuda(wanted)
    if wanted.type != "cpu":
        raise BundleError(f"--device must be auto, cpu, cuda or cuda:N, got '{device}'")
    return wanted


def _cuda(wanted: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise BundleError(f"--device {wanted}: this machine has no CUDA GPU that PyTorch can use; use --device cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise BundleError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", index)
