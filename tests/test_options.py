# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Small parts of every command: option values, devices, errors in one line, and lines of progress."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser

from scripts.compute import devices
from scripts.compute.devices import compute_device, process_rank
from scripts.core.errors import BundleError, find_bundle_error, report_errors_in_one_line
from scripts.core.options import whole_number, yes_or_no
from scripts.training.progress import TrainingProgress, VolumeProgress


@pytest.mark.parametrize("value", [1, "1", True, "True", "yes", "ON", 1.0, " true "])
def test_yes(value: object) -> None:
    assert yes_or_no(value, "amp") is True


@pytest.mark.parametrize("value", [0, "0", False, "false", "no", "off", 0.0, None, "None", "null"])
def test_no(value: object) -> None:
    assert yes_or_no(value, "amp") is False


@pytest.mark.parametrize("value", ["maybe", 2, "", [1]])
def test_neither_yes_nor_no(value: object) -> None:
    with pytest.raises(BundleError, match="--amp must be 1 or 0"):
        yes_or_no(value, "amp")


@pytest.mark.parametrize("value", [3, "3", " 3 ", "+3"])
def test_whole_numbers(value: object) -> None:
    assert whole_number(value, "seed") == 3


@pytest.mark.parametrize("value", ["x", "", None, 3.0, "3.5", True, (1, 2), "1e3"])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(BundleError, match="--seed must be a whole number"):
        whole_number(value, "seed")


def test_limits_of_whole_numbers() -> None:
    assert whole_number(2**63 - 1, "seed") == 2**63 - 1
    for value, told in ((2**63, "at most"), (-1, "at least 0"), (10**30, "at most")):
        with pytest.raises(BundleError, match=f"--seed must be {told}"):
            whole_number(value, "seed")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, cudnn: int = 91700) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    devices._say_versions.cache_clear()


def test_devices_of_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert compute_device("auto") == compute_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(BundleError, match="no CUDA GPU.*use --device cpu"):
            compute_device(name)


def test_devices_of_a_machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    assert compute_device("auto") == compute_device("cuda") == torch.device("cuda:0")
    assert compute_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BundleError, match="cuda:2: there are 2 GPUs"):
        compute_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compute_device("auto") == compute_device("cuda") == torch.device("cuda:1")


def test_a_gpu_is_set_up_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpus(monkeypatch, 1)
    caplog.set_level("INFO")
    assert devices.precision_facts(compute_device("cuda")) == {"tf32": True} and torch.backends.cudnn.benchmark
    assert f"gpu GPU 0, torch {torch.__version__}" in caplog.text and "cudnn 9.17.0" in caplog.text
    assert devices.precision_facts(compute_device("cuda", tf32=0)) == {"tf32": False}
    assert not caplog.records[1:], "versions are said once"
    assert devices.precision_facts(compute_device("cpu", tf32=0)) == {}
    with pytest.raises(BundleError, match="--tf32 must be 1 or 0"):
        compute_device("cuda", tf32="half")
    assert devices.volume_layout("cuda") is torch.contiguous_format
    assert devices.volume_layout("cpu") is torch.channels_last_3d


@pytest.mark.parametrize(("version", "warned"), [(90701, False), (90800, True), (91400, True), (91500, False)])
def test_versions_of_cudnn_that_waste_memory(
    version: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(monkeypatch, 1, version)
    compute_device("cuda")
    assert any("3D convolutions in bfloat16" in record.message for record in caplog.records) is warned


def test_copies_to_a_gpu_leave_from_pinned_memory() -> None:
    said: list[object] = []

    class OnTheCPU:
        def pin_memory(self) -> OnTheCPU:
            said.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> OnTheCPU:
            said.append((device.type, non_blocking))
            return self

    for kind in ("cpu", "cuda"):
        devices.sent(OnTheCPU(), torch.device(kind))  # type: ignore[arg-type]
    assert said == [("cpu", False), "pinned", ("cuda", True)]


@pytest.mark.parametrize("name", ["tpu", "gpu", "meta", "", "cpu0", None, 1.5])
def test_what_is_no_device(name: Any) -> None:
    with pytest.raises(BundleError, match="--device must be auto, cpu, cuda, cuda:N or mps"):
        compute_device(name)


def test_rank_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_rank() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_rank() == (2, 4)


def wrapped(error: Exception) -> Exception:
    """The error as MONAI's configuration parser hands it on."""
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("failed to evaluate") from inner
    except RuntimeError as outer:
        return outer


def test_the_bundles_error_is_found_among_causes() -> None:
    assert str(find_bundle_error(wrapped(BundleError("no weights")))) == "no weights"
    assert find_bundle_error(wrapped(ValueError("a bug"))) is None
    assert find_bundle_error(None) is None


def test_errors_are_one_line() -> None:
    assert str(BundleError("cannot read x: expected 10 bytes,\n  got 3\n")) == "cannot read x: expected 10 bytes, got 3"


def test_a_class_that_there_is_not_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", ["/x/site-packages/monai/bundle/__main__.py"])
    report_errors_in_one_line()
    with pytest.raises(ModuleNotFoundError) as caught:
        ConfigParser({"metric": {"_target_": "scripts.evaluation.metrics.fid.Nope"}}).get_parsed_content("metric")
    sys.excepthook(caught.type, caught.value, None)
    line = capsys.readouterr().err
    assert line == "error: a _target_ of the configuration cannot be found: 'scripts.evaluation.metrics.fid.Nope'\n"


def test_the_command_line_shows_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    report_errors_in_one_line()
    assert sys.excepthook is sys.__excepthook__  # another program's errors are its own
    monkeypatch.setattr(sys, "argv", ["/x/site-packages/monai/bundle/__main__.py"])
    report_errors_in_one_line()
    error = wrapped(BundleError("no weights"))
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "error: no weights\n"
    bug = wrapped(ValueError("a bug"))
    sys.excepthook(type(bug), bug, bug.__traceback__)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "short"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB",
            "CUDA out of memory. Tried to allocate 2.50 GiB",
        ),
        ("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried", "can't allocate"),
        ("Unable to allocate 8.00 GiB for an array with shape (1, 2)", "Unable to allocate 8.00 GiB for an array"),
    ],
)
def test_out_of_memory_says_what_to_do(
    told: str, short: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", ["/x/site-packages/monai/bundle/__main__.py"])
    report_errors_in_one_line()
    error = wrapped(RuntimeError(told))
    sys.excepthook(type(error), error, None)
    line = capsys.readouterr().err
    assert line.startswith("error: not enough memory (") and short in line and line.count("\n") == 1
    assert "--batch_size" in line and "79.10" not in line


def test_training_shows_losses_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda _, batch: {"losses": {"loss": 0.5 * len(batch["image"]), "kl": 1234567.0}})
    TrainingProgress(log_every=2).attach(engine)
    with caplog.at_level("INFO", logger="scripts.training.progress"):
        engine.run([{"image": [0.0] * size} for size in (1, 2, 3)], max_epochs=2)
    lines = [record.message for record in caplog.records if record.name == "scripts.training.progress"]
    assert [line.split(" (")[0] for line in lines] == [
        "epoch 1 iteration 2/6 loss 1 kl 1.235e+06",
        "epoch 2 iteration 4/6 loss 0.5 kl 1.235e+06",
        "epoch 2 iteration 6/6 loss 1.5 kl 1.235e+06",
    ]
    assert all(re.search(r"s each, [\d.e+]+ samples/s, \S+ left", line) for line in lines)


def test_bar_over_volumes_counts_them() -> None:
    engine = Engine(lambda _, batch: None)
    engine.data_loader = type("Loader", (), {"dataset": range(5)})  # type: ignore[attr-defined]
    progress = VolumeProgress()
    progress.attach(engine)
    engine.run([{"index": [0, 1]}, {"index": [2, 3]}, {"index": [4]}])
    assert progress.bar.total == 5
