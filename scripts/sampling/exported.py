# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Exported networks in the place of PyTorch's, so that the same sampler shows what they give."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash, parse_json
from scripts.networks.weights import Checkpoint, check_conditions, check_family
from scripts.sampling.exporting import RECORD, needed_package

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def read_exported(folder: str, network: str, family: str | None = None) -> Checkpoint:
    """What is known of an exported network: its file, facts and hash, without weights.

    Args:
        folder: what `scripts.sampling.exporting.export_networks` wrote.
        network: `diffusion` or `decoder`.
        family: as for `scripts.networks.weights.read_checkpoint`.

    Raises:
        BundleError: if there is no complete export, or one of another family.
    """
    record, path = Path(str(folder)) / RECORD, Path(str(folder)) / f"{network}.onnx"
    for file in (record, path):
        if not file.is_file():
            raise BundleError(f"there is no {file}: export the networks with configs/export.yaml, or give --export_dir")
    try:
        facts = parse_json(record.read_text(encoding="utf-8"))["facts"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{record} is damaged: export the networks again") from error
    if family is not None:
        check_family(path, facts, family)
    return Checkpoint(path, {}, facts, file_hash(path))


class OnnxNetwork(nn.Module):
    """An exported network that onnxruntime runs, called as the network that it was.

    Args:
        checkpoint: from `read_exported`.
        device: `cpu`, or `cuda` where onnxruntime can use it.
        conditions: what the network is going to be conditioned on; compared with what it was exported with.

    Raises:
        BundleError: if onnxruntime is not installed, cannot use the device or read the file, or the conditions differ.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = "cpu", conditions: Conditions | None = None
    ) -> None:
        super().__init__()
        check_conditions(checkpoint, conditions)
        runtime = needed_package("onnxruntime")
        self.device = torch.device(device)
        if self.device.type not in PROVIDERS:
            raise BundleError(f"--device {device}: exported networks run on {' or '.join(PROVIDERS)}")
        provider = PROVIDERS[self.device.type]
        if provider not in runtime.get_available_providers():
            raise BundleError(
                f"--device {device}: this onnxruntime has no CUDA: install onnxruntime-gpu, or use --device cpu"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            of_device = {} if self.device.type == "cpu" else {"device_id": str(self.device.index or 0)}
            self.session = runtime.InferenceSession(checkpoint.path, options, providers=[(provider, of_device)])
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise BundleError(f"onnxruntime cannot read {checkpoint.path}: {error}") from error
        if provider not in self.session.get_providers():  # it falls back to the CPU in silence
            raise BundleError(f"--device {device}: onnxruntime cannot use this GPU: use --device cpu")
        self.inputs = {entry.name: entry.shape for entry in self.session.get_inputs()}

    def forward(self, **inputs: Tensor) -> Tensor:
        """The network's one output for its named inputs, float32."""
        arrays = {name: inputs[name].float().cpu().numpy() for name in self.inputs}
        return torch.from_numpy(self.session.run(None, arrays)[0]).to(self.device)


class OnnxDecoder(OnnxNetwork):
    """An exported decoder, called as the autoencoder whose half it is; it knows the latents' scale itself."""

    def decode_stage_2_outputs(self, latent: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of scaled latents (B, C, x, y, z)."""
        return self(latent=latent)
