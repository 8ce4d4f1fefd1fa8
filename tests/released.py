# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights in the format of the released ones: networks of monai-generative, of any configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, ROOT, TINY
from monai.bundle import ConfigParser
from torch import Tensor, nn

from benchmarks.measuring import GENERATIVE, fill_with_random_values, original_scheduler

FILES = {"autoencoder_def": "tiny_autoencoder.pt", "network_def": "tiny_diffusion.pt"}  # as tiny.yaml has them


def configuration(overlays: Sequence[str] = (TINY,), **overrides: Any) -> ConfigParser:
    """The base with overlays and overrides, merged."""
    config = ConfigParser(ConfigParser.load_config_files([str(ROOT / name) for name in (BASE, *overlays)]))
    config.update(overrides)
    return config


def arguments(config: ConfigParser, key: str) -> dict[str, Any]:
    """What a component of the configuration is built with, its references resolved."""
    config.get_parsed_content(key)
    entry = config.ref_resolver.get_item(key, resolve=True).get_config()
    return {name: value for name, value in entry.items() if not name.startswith("_")}


def generative_network(config: ConfigParser, key: str, seed: int = 0) -> nn.Module:
    """The network `autoencoder_def` or `network_def` as monai-generative builds it, all its weights random."""
    given = arguments(config, key)
    given["num_channels"] = given.pop("channels")
    network = GENERATIVE[config[f"{key}::_target_"]](**given).eval()
    torch.manual_seed(seed)
    fill_with_random_values(network)
    return network


def generative_scheduler(config: ConfigParser, name: str) -> Any:
    """The configured noise schedule as monai-generative's scheduler of that name."""
    return original_scheduler(name, arguments(config, "schedules::ddim"))


def write_weights(folder: Path, config: ConfigParser) -> None:
    """Both networks' weights under the names that tiny.yaml expects in `models/`."""
    for key, name in FILES.items():
        torch.save(generative_network(config, key).state_dict(), folder / name)


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    assert output.shape == reference.shape
    return float((output - reference).abs().max() / reference.abs().max())


def need_memory(device: torch.device, gigabytes: float) -> None:
    """Skip on a machine whose free memory is too small."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 2**30
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        if (meminfo := Path("/proc/meminfo")).exists():
            lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
            free = int(lines["MemAvailable"].split()[0]) / 2**20
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, there are {free:.1f}")
