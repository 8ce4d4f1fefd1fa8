# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes that other threads write: nothing is lost, nothing is halved, and an error is one error."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, SMALLEST, TINY, RunHere

from scripts.compute.writer import BackgroundWriter, HostCopy
from scripts.core import files
from scripts.core.errors import BundleError, find_bundle_error


def test_calls_run_at_the_same_time_and_only_so_many_wait() -> None:
    writer, gate = BackgroundWriter(2), threading.Event()
    done: list[int] = []

    def call(number: int) -> None:
        gate.wait()
        done.append(number)

    for number in range(4):
        writer.submit(call, number)
    fifth = threading.Thread(target=writer.submit, args=(call, 4))
    fifth.start()
    fifth.join(0.05)
    assert fifth.is_alive() and done == []  # two run and two wait: there is no room for another
    gate.set()
    fifth.join()
    writer.finish()
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_an_error_ends_the_calls_and_is_raised_once() -> None:
    writer, gate = BackgroundWriter(1), threading.Event()
    done: list[int] = []

    def fail() -> None:
        gate.wait()
        raise BundleError("the disk is full")

    writer.submit(fail)
    writer.submit(done.append, 1)
    gate.set()
    with pytest.raises(BundleError, match="the disk is full"):
        writer.finish()
    assert done == []
    writer.finish()
    writer.submit(done.append, 2)
    writer.finish()
    assert done == [2]


def test_an_error_is_raised_when_the_next_call_is_asked_for() -> None:
    writer = BackgroundWriter(1)
    done: list[str] = []
    writer.submit(done.remove, "x")
    with pytest.raises(ValueError, match="not in list"):
        while True:
            writer.submit(done.append, "y")


def test_without_threads_calls_are_made_at_once() -> None:
    done: list[int] = []
    BackgroundWriter(0).submit(done.append, 1)
    assert done == [1]
    with pytest.raises(BundleError, match="--write_threads must be at least 0"):
        BackgroundWriter(-1)


def test_a_tensor_on_the_cpu_is_not_copied() -> None:
    volume = torch.rand(3, 4)
    assert HostCopy(volume).wait() is volume


@pytest.mark.gpu
def test_a_copy_from_the_gpu_holds_what_was_there_when_it_was_asked_for() -> None:
    volume = torch.rand(200, 200, 200).cuda()
    expected = volume.cpu()
    copy = HostCopy(volume)
    volume.zero_()
    assert torch.equal(copy.wait(), expected)


# Sampling with it.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))} if folder.is_dir() else {}


def flags(bundle: Path, folder: Path, **others: Any) -> dict[str, Any]:
    given = {"bundle_root": str(bundle), "output_dir": str(folder), "num_inference_steps": 1, "seed": 3}
    return {**SMALLEST, **given, "num_samples": 4, "batch_size": 1, **others}


def test_files_do_not_depend_on_the_threads(run_here: RunHere, bundle_copy: Path, tmp_path: Path) -> None:
    for threads in (0, 1, 3):
        run_here([BASE, TINY], **flags(bundle_copy, tmp_path / str(threads), write_threads=threads))
    at_once, one, three = (contents(tmp_path / str(threads)) for threads in (0, 1, 3))
    assert len(at_once) == 12
    assert at_once == one == three


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room is left when the second volume is flushed to disk."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("_000001.nii.gz"):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_stops_the_run_with_one_error(run_here: RunHere, bundle_copy: Path, output_dir: Path) -> None:
    with pytest.raises(Exception) as caught:
        run_here([BASE, TINY], **flags(bundle_copy, output_dir, write_threads=2))
    stem = output_dir / "sample_seed-3_000001"
    assert str(find_bundle_error(caught.value)) == f"cannot write {stem}.nii.gz: No space left on device"
    names = set(contents(output_dir))
    assert not any(name.startswith((".", stem.name)) for name in names)
    for written in {name.split(".")[0] for name in names}:
        assert {f"{written}.nii.gz", f"{written}.png", f"{written}.json"} <= names


def test_what_was_sampled_before_an_interruption_is_written(
    run_here: RunHere, bundle_copy: Path, output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.sampling.latent_diffusion import LatentDiffusion

    run_here([BASE, TINY], **flags(bundle_copy, tmp_path / "whole"))
    calls, decode = [0], LatentDiffusion.decode

    def interrupted(self: LatentDiffusion, latent: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return decode(self, latent)

    monkeypatch.setattr(LatentDiffusion, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_here([BASE, TINY], **flags(bundle_copy, output_dir))
    whole = contents(tmp_path / "whole")
    assert contents(output_dir) == {name: whole[name] for name in whole if "_000000" in name or "_000001" in name}
    monkeypatch.setattr(LatentDiffusion, "decode", decode)
    run_here([BASE, TINY], **flags(bundle_copy, output_dir))
    assert contents(output_dir) == whole
