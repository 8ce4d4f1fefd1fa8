# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""From files of weights to the file of a volume, each way in a process of its own: time and peak memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.command import GIB, bundle_command, run
from benchmarks.measuring import SIZES, Measured, original_network
from benchmarks.original import WEIGHTS
from scripts.volumes.nifti import read_volume


class SamplingCommand:
    """Commands that sample one volume with the same random weights, in the format of the released ones.

    Args:
        config: of the networks.
        size: the configuration's name.
        options: of `benchmarks.sampling`.
        folder: for weights, volumes and what the commands say.
    """

    def __init__(self, config: ConfigParser, size: str, options: argparse.Namespace, folder: Path) -> None:
        self.size, self.options, self.folder = size, options, folder
        torch.manual_seed(options.seed)
        for key, name in WEIGHTS.items():
            torch.save(original_network(config, key, torch.device("cpu")).state_dict(), folder / name)

    def calls(self, ways: Sequence[str], steps: int) -> dict[str, Callable[[], Measured]]:
        """Way -> a call that runs its command."""
        return {way: partial(self._measured, way, steps) for way in ways}

    def _measured(self, way: str, steps: int) -> Measured:
        output = self.folder / way.replace(", ", "_").replace(" ", "_")
        output.mkdir(exist_ok=True)
        for path in output.iterdir():
            path.unlink()
        command = self._original(output, steps) if way == "original" else self._ours(way, output, steps)
        found = run(command, output)
        volume = torch.from_numpy(read_volume(next(output.glob("*.nii.gz")))).clamp(0.0, 1.0)  # as ours are written
        peak = round(found["peak_gib"] * GIB)
        return Measured(found["seconds"], found["cpu_seconds"], peak, peak, volume)

    def _original(self, output: Path, steps: int) -> list[str]:
        flags = {"size": self.size, "weights": self.folder, "output": output / "volume.nii.gz", **self._common(steps)}
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-W", "ignore", "-m", "benchmarks.original", *given]

    def _ours(self, way: str, output: Path, steps: int) -> list[str]:
        common = self._common(steps)
        plain = {"fast": 0, "streaming": 0, "compile": 0}
        streaming = way.rpartition(" ")[2] if " " in way else self.options.streaming[0]
        chosen = {"fast": self.options.fast, "streaming": streaming, "compile": self.options.compile}
        flags: dict[str, Any] = {
            "autoencoder_path": self.folder / WEIGHTS["autoencoder_def"],
            "diffusion_path": self.folder / WEIGHTS["network_def"],
            "load_old": 1,
            "gender": 0.5,  # as the original has all its conditions; it would be drawn
            "sampler": "ddim",
            "num_inference_steps": common.pop("steps"),
            "output_dir": output,
            "output_dtype": "float32",
            "amp": self.options.amp,
            "decoder_amp": self.options.decoder_amp,
        }
        return bundle_command(SIZES[self.size], {**flags, **common, **(plain if way == "monai" else chosen)})

    def _common(self, steps: int) -> dict[str, Any]:
        return {"steps": steps, "seed": self.options.seed, "device": self.options.device}
