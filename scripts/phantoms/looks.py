# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""How a phantom looks: what age does to grey and white matter, and what differs from scan to scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.phantoms.deformation import cosine_field


@dataclass(frozen=True)
class Looks:
    """What is drawn for one scan.

    Attributes:
        bias: (1, k, l, m) cosine coefficients of the logarithm of the bias field.
        gamma: exponent on the intensities.
        gain: factor on the intensities.
        noise: standard deviation of the noise, in intensities 0..1.
        noise_seed: of the noise.
    """

    bias: Tensor
    gamma: float
    gain: float
    noise: float
    noise_seed: int


def aged(images: Tensor, levels: Sequence[float], contrast: float) -> Tensor:
    """Intensities with another contrast between grey and white matter.

    Grey and white move towards each other, or apart, by the same amount; in between, partial volumes follow. On T1
    the two do lose contrast with age (Salat et al. 2009, NeuroImage 48:21-28).

    Args:
        images: (1, 2, X, Y, Z): intensity, and the share of grey matter within the brain's tissue; see `SeedHead`.
        levels: mean intensity of grey and of white matter.
        contrast: difference of the two over what it is in the seed head.

    Returns:
        (1, 1, X, Y, Z).
    """
    grey, white = levels
    return images[:, :1] + images[:, 1:2] * ((1.0 - contrast) * (white - grey))


def scanned(image: Tensor, looks: Looks) -> Tensor:
    """An image as a scanner might show it: gamma, gain, bias field, noise, and cut to 0..1.

    The noise is that of a magnitude image, of two normal channels (Gudbjartsson and Patz 1995).

    Args:
        image: (1, 1, X, Y, Z), 0..1.
        looks: of the scan.
    """
    generator = torch.Generator().manual_seed(looks.noise_seed)
    field = torch.exp(cosine_field(looks.bias, image.shape[2:]).to(image.device))
    signal = image.clamp(0.0, 1.0).pow(looks.gamma) * (looks.gain * field)
    real, imaginary = (torch.randn(image.shape, generator=generator).to(image.device) for _ in range(2))
    return torch.hypot(signal + looks.noise * real, looks.noise * imaginary).clamp(0.0, 1.0)


def draw_looks(settings: Mapping[str, float], bias: Tensor, generator: torch.Generator) -> Looks:
    """Looks of one scan.

    Args:
        settings: `bias`, the standard deviation of the field's logarithm; `gamma` and `gain`, the largest deviation
            from 1; `noise`, the largest standard deviation.
        bias: coefficients of a field of unit variance.
        generator: on the CPU.
    """
    u = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    seed = int(torch.randint(2**62, (1,), generator=generator))
    gamma, gain = (1.0 + settings[name] * (2.0 * value - 1.0) for name, value in zip(("gamma", "gain"), u))
    return Looks(settings["bias"] * bias, gamma, gain, settings["noise"] * u[2], seed)
