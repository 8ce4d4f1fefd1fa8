# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The denoiser's conditions: by concatenation and by cross-attention together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scripts.compute.precision import autocast, precision_name


class HybridInferer:
    """Calls the denoiser with its conditions both as extra channels and as the context of cross-attention.

    The hybrid of Rombach et al. 2022 as Pinaya et al. 2022 use it: the vector of conditions is one context
    token, and each condition fills one more input channel. MONAI's own inferers do one or the other.
    Training and sampling both call it.

    Args:
        amp: precision of the network, see `scripts.compute.precision.half_precision`; its output is float32 all the
            same.
    """

    def __init__(self, amp: Any = False) -> None:
        self.amp = precision_name(amp)

    def denoise(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The network's output for noisy latents (B, C, x, y, z) at timesteps (B,) with conditions (B, n).

        Without conditions, n = 0, there is no context: the network is one that takes none.
        """
        channels = condition[:, :, None, None, None].expand(-1, -1, *noisy.shape[2:])
        x = torch.cat([noisy, channels.to(noisy)], dim=1)
        context = condition[:, None, :] if condition.shape[1] else None
        with autocast(noisy.device, self.amp):
            output = network(x=x, timesteps=timesteps, context=context)
        return output.float()
