# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes in one training: who is who, sums over all of them, and networks that share their gradients.

With one process every function here does nothing and costs nothing, so that callers need not ask.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scripts.compute.devices import process_rank
from scripts.core.errors import BundleError

logger = logging.getLogger(__name__)

NOT_THERE = "the other processes of this training have not turned up: start all of them"
MEETING, PAUSE_S, SAID_EVERY_S = "meeting", 0.05, 300.0
PATIENCE = timedelta(days=100)

T = TypeVar("T")


def start(device: torch.device) -> None:
    """Join the processes that `torchrun` started, over NCCL for GPUs and Gloo for CPUs; only rank 0 goes on logging.

    Args:
        device: where this process computes.
    """
    if process_rank()[1] == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, own_rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(meet(store, own_rank, size), store)
    on_gpu = device.type == "cuda"
    # A process may take hours longer than another. One that dies closes its connections, which the others notice.
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=own_rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=device if on_gpu else None,
    )
    if rank() > 0:
        logging.disable(logging.WARNING)
    logger.info(f"working in {world_size()} processes")


def arrives() -> bool:
    """Whether `arrive` waits for all processes, or there is but one: others may have been started by hand."""
    return process_rank()[1] == 1 or dist.is_torchelastic_launched()


def arrive(where: str) -> None:
    """Wait, for as long as it takes, until every process that `torchrun` started has come to this place.

    `torchrun` ends all processes as soon as one fails: one that means to fail waits here for the others' work. They
    need not have joined a group. Without `torchrun` there is nothing to wait for.

    Args:
        where: a name of the place.
    """
    if not dist.is_torchelastic_launched() or process_rank()[1] == 1:
        return
    store, own_rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"{where} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(str(own_rank), "here")
    store.wait([str(one) for one in range(size)], PATIENCE)


def meet(store: dist.Store, own_rank: int, size: int, patience: float = math.inf) -> str:
    """A name that the processes of this start have in common, and those of no earlier start had.

    Processes that torchrun restarts share the store of those before, whose addresses in it are no longer true, and
    with several nodes its count of restarts rises only where a process has died. So rank 0 makes up a name, each other
    process answers to it with a name of its own, and rank 0 confirms that: an earlier start's name, which may still be
    read, no longer gets a confirmation.

    Args:
        store: of all processes.
        own_rank: number of this process.
        size: how many there are.
        patience: seconds to wait for the others, who may still be at work: one that has died ends the waiting anyway.

    Raises:
        BundleError: if they do not turn up.
    """
    own, waiting = uuid4().hex, Waiting("the other processes", patience, NOT_THERE)
    if own_rank == 0:
        store.set(MEETING, own)
        for other in range(1, size):
            while not store.check([f"{own} {other}"]):
                waiting.pause()
            store.set(f"{own} {store.get(f'{own} {other}').decode()}", "")
        return own
    name = ""
    while not store.check([f"{name} {own}"]):
        if store.check([MEETING]):
            name = store.get(MEETING).decode()
            store.set(f"{name} {own_rank}", own)
        waiting.pause()
    return name


class Waiting:
    """Short pauses, with a line in the log now and then, for as long as the patience lasts.

    Args:
        whom: who is waited for, in words.
        patience: seconds.
        lost: what to say when it is at its end.
    """

    def __init__(self, whom: str, patience: float, lost: str) -> None:
        self.whom, self.lost, self.patience = whom, lost, patience
        self.since, self.said = time.monotonic(), 0

    def pause(self) -> None:
        """Wait a moment.

        Raises:
            BundleError: if the patience is at its end.
        """
        waited = time.monotonic() - self.since
        if waited > self.patience:
            raise BundleError(self.lost)
        if waited > SAID_EVERY_S * (self.said + 1):
            self.said += 1
            logger.warning(f"waiting for {self.whom} since {waited / 60:.0f} minutes: are all of them started?")
        time.sleep(PAUSE_S)


def wait_for_all_processes() -> None:
    """Return when every process of a `torchrun` has come here; at once without it."""
    start(torch.device("cpu"))
    if world_size() > 1:
        dist.barrier()


def finish() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def all_sum(tensor: Tensor) -> Tensor:
    """The elementwise sum of a tensor over all processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_max(number: float) -> float:
    """The largest of one number over all processes."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(float(number), device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _device() -> torch.device:
    """Where the group's messages are made: NCCL sends from GPUs alone."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_means(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Each scalar's mean over all processes; every process gives the same names."""
    means = all_sum(torch.stack([number.detach().float() for number in numbers.values()])) / world_size()
    return dict(zip(numbers, means.tolist(), strict=True))


def all_lists(items: list[T]) -> list[T]:
    """One list with the items of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return items
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def from_main(value: T) -> T:
    """What rank 0 gives, in every process; must be plain data."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network for a training: itself with one process, else PyTorch's `DistributedDataParallel` around it.

    Every parameter of these networks takes part in every step, so unused ones are not looked for. On GPUs batch
    normalisation takes its statistics over all processes; PyTorch has no such layer for CPUs, where each process
    keeps its own.

    Args:
        network: on its device.
        device: where it computes.
    """
    if world_size() == 1:
        return network
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        logger.warning("batch normalisation takes its statistics in each process on its own: this is a CPU")
    own = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated")  # its new name is not in older releases
        return DistributedDataParallel(network, device_ids=own, broadcast_buffers=False, gradient_as_bucket_view=True)


def bare(network: nn.Module) -> nn.Module:
    """The network without what `parallel` put around it."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def without_sync(network: nn.Module, wanted: bool) -> AbstractContextManager:
    """A block whose backward passes leave gradients unshared, if `wanted`: a later one shares their sum."""
    return network.no_sync() if wanted and isinstance(network, DistributedDataParallel) else nullcontext()
