# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Wherever it is run: other operating systems, devices, precisions, users and Pythons, most by a stand-in."""

from __future__ import annotations

import ast
import getpass
import io
import logging
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALLEST, TINY, RunHere
from processes import run_python
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from scripts.compute import counting, precision
from scripts.compute.devices import compute_device, volume_layout
from scripts.compute.pool import results
from scripts.compute.precision import autocast, choose_precision, half_precision
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError, explain
from scripts.core.quiet import log_above_bars, name_user
from scripts.networks.weights import read_checkpoint
from scripts.sampling import exported
from scripts.volumes import datasets

POSIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
OF_OS = {"fork", "getloadavg", "getuid", "mkfifo", "nice", "sched_getaffinity", "setsid", "statvfs"}
WINDOWS = """
import signal, sys
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP"):
    delattr(signal, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
import scripts.sampling.saving, scripts.evaluation.run, scripts.training.engine, scripts.compute.pool
print("imported")
"""
CPU = torch.device("cpu")


# Other systems.


def test_nothing_of_posix_alone_is_imported() -> None:
    for path in (ROOT / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                first = getattr(node, "module", None) or node.names[0].name
                assert first not in POSIX_ONLY, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in OF_OS, f"{path}:{node.lineno}"


def test_sampling_and_evaluation_are_imported_as_on_windows() -> None:
    done = run_python("-c", WINDOWS)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that the system does not know, as containers and clusters have."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_011)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    monkeypatch.setenv("LOGNAME", "")  # so that it is set back afterwards
    name_user()
    assert getpass.getuser() == "nobody"


# Devices.


def test_mps_where_there_is_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BundleError, match="--device mps: there is no GPU of Apple's"):
        compute_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert compute_device("mps").type == "mps" and volume_layout("mps") is torch.contiguous_format
    assert choose_precision("auto", torch.device("mps")) is False
    with pytest.raises(BundleError, match="on mps the bundle computes in float32"):
        autocast(torch.device("mps"), "bf16")
    with caplog.at_level(logging.INFO):
        compute_device("auto")
    assert "--device mps" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError(
            "The operator 'aten::upsample_nearest3d.out' is not currently implemented for the MPS device."
        ),
        TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."),
        RuntimeError("ConvTranspose 3D is not supported on MPS"),
    ],
)
def test_what_mps_cannot_do_is_one_line(error: Exception) -> None:
    said = explain(error)
    assert said and said.startswith("--device mps") and "--device cpu" in said


class NoDoubles(TorchDispatchMode):
    """Apple's GPUs have no float64; `--fast` and `--streaming`, which are for CPUs, are off there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype is torch.float64 and out.dim() > 0), func
        return out


def test_a_volume_is_sampled_without_float64(bundle_copy: Path, tmp_path: Path) -> None:
    from released import configuration

    config = configuration(
        (TINY,), bundle_root=str(bundle_copy), num_inference_steps=1, fast=0, streaming=0, **SMALLEST
    )
    family, conditions = config.get_parsed_content("chosen_family"), config.get_parsed_content("conditions")
    noise = torch.randn(1, *family.noise_shape)
    with torch.no_grad(), NoDoubles():
        volume = family.sample(noise, torch.full((1, len(conditions)), 0.5), [torch.Generator().manual_seed(0)])
    assert volume.dtype is torch.float32


class Runtime(SimpleNamespace):
    """Stands in for onnxruntime: takes what it is asked for, or falls back to the CPU in silence."""

    def __init__(self, falls_back: bool) -> None:
        super().__init__(falls_back=falls_back, asked=[], SessionOptions=SimpleNamespace)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path: Any, options: Any, providers: Any) -> Any:  # noqa: N802, its name
        self.asked += providers
        used = ["CPUExecutionProvider"] if self.falls_back else [providers[0][0]]
        return SimpleNamespace(get_providers=lambda: used, get_inputs=lambda: [])


@pytest.mark.parametrize("falls_back", [True, False])
def test_onnxruntime_takes_the_gpu_that_is_meant(falls_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(falls_back)
    monkeypatch.setattr(exported, "needed_package", lambda name: runtime)
    make = partial(exported.OnnxNetwork, exported.Checkpoint(Path("x.onnx"), {}), "cuda:1")
    if falls_back:
        with pytest.raises(BundleError, match="--device cuda:1: onnxruntime cannot use this GPU"):
            make()
    else:
        make()
        assert runtime.asked == [("CUDAExecutionProvider", {"device_id": "1"})]
    with pytest.raises(BundleError, match="--device mps"):
        exported.OnnxNetwork(exported.Checkpoint(Path("x.onnx"), {}), "mps")


# Precision.


@pytest.mark.parametrize(("fast", "amp", "chosen"), [(1, "auto", "bf16"), (0, "auto", False), (1, 0, 0), (0, 1, 1)])
def test_auto_is_what_the_cpu_is_fast_at(fast: int, amp: Any, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: bool(fast))
    monkeypatch.setattr(precision, "_begun_in_float32", lambda: False)
    assert choose_precision(amp, CPU) == chosen
    assert choose_precision("auto", torch.device("cuda", 0)) is False and half_precision("auto") is None


def test_emulated_bfloat16_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    precision._warn_of.cache_clear()
    for amp in (1, 1, 0, "auto"):
        autocast(CPU, amp)
    assert caplog.text.count("74.6 s") == 1 and "--amp 0" in caplog.text


def test_what_was_begun_in_float32_goes_on_in_it(
    run_here: RunHere, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with bfloat16, by an update that brought `auto`; elsewhere it is bfloat16."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    flags = {"bundle_root": str(bundle_copy), "num_inference_steps": 1, "seed": 1, **SMALLEST}
    run = partial(run_here, ["configs/inference.json", TINY], **flags)
    run(output_dir=str(tmp_path / "old"), amp=0)
    before = (tmp_path / "old" / "sample_seed-1_000000.nii.gz").stat().st_mtime_ns
    run(output_dir=str(tmp_path / "old"), amp="auto")
    assert (tmp_path / "old" / "sample_seed-1_000000.nii.gz").stat().st_mtime_ns == before
    run(output_dir=str(tmp_path / "new"), amp="auto")
    assert '"amp": "bf16"' in (tmp_path / "new" / "sample_seed-1_000000.json").read_text()


# Files, and workers.


def test_a_checkpoint_with_numbers_of_numpy_loads(tmp_path: Path) -> None:
    state = {"conv.weight": torch.ones(2)}
    content = {"diffusion": state, "loss": np.float64(0.5), "step": np.int64(3), "dtype": np.dtype("f4")}
    torch.save(content, tmp_path / "numbers.pt")
    assert read_checkpoint(tmp_path / "numbers.pt", "diffusion").state["conv.weight"].tolist() == [1.0, 1.0]
    torch.save({"diffusion": state, "do": os.system}, tmp_path / "code.pt")
    with pytest.raises(BundleError, match="holds Python code"):
        read_checkpoint(tmp_path / "code.pt", "diffusion")


def die_first(path: Path) -> str:
    """Ends its process the first time."""
    if not path.exists():
        path.write_text("")
        os._exit(9)
    return "made"


def test_an_item_is_tried_once_more(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("")
    items = [tmp_path / "good", tmp_path / "bad"]
    assert sorted(results(die_first, items, 1, lambda item, how: how)) == [(0, "made"), (1, "made")]


# What a person sees.


def test_without_a_terminal_there_is_an_estimate_then_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(counting.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        assert list(counting.counted(range(20), "comparing", "pair")) == list(range(20))
    assert caplog.messages == [
        "comparing: 2 of 20 pairs, about 0:01:30 left",
        "comparing: 14 of 20 pairs, about 0:00:30 left",
    ]


def test_lines_are_written_above_bars() -> None:
    screen, log = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(screen)
    log.addHandler(handler)
    try:
        log_above_bars()
        with tqdm(total=2, file=screen) as bar:
            bar.update()
            logging.getLogger("scripts.x").warning("a line of its own")
    finally:
        log.removeHandler(handler)
    assert "\ra line of its own\n" in screen.getvalue()


def test_a_fine_tuning_is_not_told_to_widen_a_range(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, conditions: Conditions
) -> None:
    rows = [{"condition": torch.full((len(conditions),), 1.5)}]
    for pretrained, told in (("x.pt", "a fine-tuning keeps the ranges"), (None, "widen the range in `conditions`")):
        monkeypatch.setattr(datasets, "current_config", lambda value=pretrained: {"pretrained": value})
        caplog.clear()
        datasets._warn_outside(rows, conditions, Path("participants.tsv"))
        assert told in caplog.text


@pytest.mark.parametrize(("flag", "value", "raw"), [("age", 50, "age_years"), ("brain_vol", 1.4e6, "brain_vol_mm3")])
def test_a_raw_value_under_a_normalised_name_is_refused(
    flag: str, value: float, raw: str, conditions: Conditions
) -> None:
    with pytest.raises(BundleError, match=f"--{flag} is .* 0 to 1 .* did you mean {raw}"):
        conditions.from_request({flag: value})
    assert conditions.from_request({flag: 1.9}, warn=False).max() == pytest.approx(1.9)
