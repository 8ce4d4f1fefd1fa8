# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory that is given back while something else needs it."""

from __future__ import annotations

import ctypes
import logging
import sys
from typing import Any

from torch import nn

from scripts.core.errors import BundleError
from scripts.networks.cpu.acceleration import forget_derived
from scripts.networks.weights import Checkpoint, file_stamp, load_network, read_state

logger = logging.getLogger(__name__)


def release_weights(network: nn.Module, checkpoint: Checkpoint, load_old: Any = 0) -> None:
    """Give back the memory of a network's weights on a CPU, which are read from their file again when next used.

    Where they are pages of the file, the file is mapped anew, and none of its pages is in memory until it is used: the
    full-size UNet takes 2.1 GiB, and so does decoding. Other weights stay in memory, as do those of a compiled network
    and of a file that another one has replaced since it was read. What was derived from weights is given back as well.

    Args:
        network: from `scripts.networks.weights.load_network` with `take`, accelerated or not.
        checkpoint: what it was loaded from.
        load_old: as it was loaded.

    Raises:
        BundleError: if the file was written over: what is in memory could be of either content.
    """
    compiled = getattr(network, "_compiled_call_impl", None) is not None
    if compiled or any(parameter.device.type != "cpu" for parameter in network.parameters()):
        return
    forget_derived(network)
    if checkpoint.mapped and _is_the_same_file(checkpoint):
        state, facts = read_state(checkpoint.path, "diffusion", logger.debug, check=False)  # it was when it was read
        load_network(network, Checkpoint(checkpoint.path, state, facts), load_old, take=True)
    return_free_memory()


def _is_the_same_file(checkpoint: Checkpoint) -> bool:
    try:
        stamp = file_stamp(checkpoint.path)
    except OSError:
        return False
    if stamp != checkpoint.stamp and stamp[:2] == checkpoint.stamp[:2]:
        raise BundleError(f"{checkpoint.path} was written over while it was in use: run the command again")
    return stamp == checkpoint.stamp


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc does)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
