# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from scripts.core.options import number


class ExponentialMovingAverage:
    """Keeps an average of a network's weights while it is trained, to sample from.

    After update n = 0, 1, ... the average is d_n times what it was plus 1 - d_n times the weights, with
    d_n = min(decay, (1 + n)/(10 + n)) so that it forgets the first weights soon; update 0 takes the weights as
    they are. Buffers are copied. Averaging of diffusion models' weights: Ho et al. 2020 (arXiv:2006.11239).

    Args:
        network: whose weights to average; float32, on its final device, not wrapped for several processes.
        decay: 0 to 1, such as 0.9999.

    Raises:
        BundleError: unless `decay` is from 0 to 1.
    """

    def __init__(self, network: nn.Module, decay: Any) -> None:
        self.source = network
        self.decay = number(decay, "ema_decay", 0.0, 1.0)
        self.updates = 0
        self._average = AveragedModel(network, multi_avg_fn=self._move)
        self._average.requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights, in eval mode."""
        return self._average.module

    def decay_at(self, update: int) -> float:
        """How much of the average the update with that number, from 0, keeps."""
        return min(self.decay, (1 + update) / (10 + update)) if update else 0.0

    def update(self) -> None:
        """Move the average towards the network's weights; once after each step of the optimiser."""
        self._average.update_parameters(self.source)
        self.updates += 1

    def _move(self, averaged: PARAM_LIST, weights: PARAM_LIST, count: Any) -> None:
        get_ema_multi_avg_fn(self.decay_at(self.updates))(averaged, weights, count)

    def state_dict(self) -> dict[str, Any]:
        """`weights`, a state dict with the network's own names, and the number of `updates`."""
        return {"weights": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.network.load_state_dict(state["weights"])
        self.updates = int(state["updates"])
        self._average.n_averaged.fill_(self.updates)


def weight_average(network: nn.Module, decay: Any) -> ExponentialMovingAverage | None:
    """The average of a network's weights, or None where the decay is 0.

    Raises:
        BundleError: unless `decay` is from 0 to 1.
    """
    return ExponentialMovingAverage(network, decay) if number(decay, "ema_decay", 0.0, 1.0) else None


def network_to_sample(network: nn.Module, average: ExponentialMovingAverage | None = None) -> nn.Module:
    """The network that sampling will take of a training: that of the averaged weights, where there is one."""
    return network if average is None else average.network
