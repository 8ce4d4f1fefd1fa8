# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoding a dataset, what it leaves when it is stopped anywhere, and reading the latents."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import head, refused, write_dataset
from monai.bundle import ConfigParser
from monai.data import Dataset
from released import configuration, write_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scripts.autoencoder import latent_writer
from scripts.autoencoder.encoding import LatentEncoder, moments
from scripts.autoencoder.latent_writer import ArrayFile, LatentWriter
from scripts.autoencoder.latents import (
    PosteriorMeand,
    Posteriors,
    SamplePosteriord,
    latent_scale,
    latents,
    made_by,
    noise_share,
    read_encoding,
    warn_of_noise,
)
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.tables import read_table, write_table
from scripts.networks.weights import Checkpoint, encoder_sha256, load_network, read_checkpoint
from scripts.volumes.datasets import LoadVolumed, participants
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume

ENCODE = "configs/encode_latents.yaml"
FORK = multiprocessing.get_context("fork")


NAMES = ("posteriors.npy", "encoded.npy", "checksums.npy", "participants.tsv", "encoding.json")


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def posteriors(folder: Path) -> np.ndarray:
    return np.load(folder / "posteriors.npy")


# Through the bundle, at tiny size.


class Bundle:
    """A dataset of four heads, weights, and the command that encodes them."""

    def __init__(self, folder: Path, run_here: RunHere) -> None:
        self.folder, self.run_here = folder, run_here
        self.dataset, self.latents = folder / "dataset", folder / "latents"
        self.weights = folder / "tiny_autoencoder.pt"

    def encode(self, **flags: Any) -> Any:
        paths = {"dataset_dir": self.dataset, "latents_dir": self.latents, "autoencoder_path": self.weights}
        given = {name: str(path) for name, path in paths.items()}
        return self.run_here([BASE, ENCODE, TINY], **{**given, **flags})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, run_here: RunHere, config: ConfigParser, grid: Grid) -> Bundle:
    """Encoded once. Tests must not change it: see `work`."""
    bundle = Bundle(tmp_path_factory.mktemp("bundle"), run_here)
    write_weights(bundle.folder, config)
    write_dataset(bundle.dataset, grid)
    bundle.encode(seed=3)
    return bundle


@pytest.fixture
def work(done: Bundle, tmp_path: Path, run_here: RunHere) -> Bundle:
    """A copy of it, to go on with."""
    shutil.copytree(done.folder, tmp_path / "work")
    return Bundle(tmp_path / "work", run_here)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 6e-4), ("float32", 0.0)])
def test_cached_posterior_is_the_networks(
    dtype: str, tolerance: float, work: Bundle, config: ConfigParser, grid: Grid
) -> None:
    network: Any = configuration().get_parsed_content("autoencoder_def")
    load_network(network, read_checkpoint(work.weights, "autoencoder"), 1)
    work.encode(latent_dtype=dtype, fast=int(tolerance > 0.0))
    array = posteriors(work.latents)
    assert array.dtype == dtype and array.shape == (4, 2, *config.get_parsed_content("latent_shape"))
    for number, (mean, std) in enumerate(torch.from_numpy(array).float().unbind(0)):
        path = work.dataset / f"sub-{number}" / "anat" / f"sub-{number}_T1w.nii.gz"
        with torch.no_grad():
            expected = network.encode(LoadVolumed("image", grid)({"image": str(path)})["image"][None])
        for ours, theirs in zip((mean, std), expected):
            assert torch.allclose(ours, theirs[0], rtol=tolerance, atol=1e-7 if tolerance else 0.0)


def test_table_and_facts(done: Bundle) -> None:
    rows = read_table(done.latents / "participants.tsv")
    assert [row["participant_id"] for row in rows] == ["sub-0", "sub-1", "sub-2", "sub-3"]
    assert rows[1]["path"] == "sub-1/anat/sub-1_T1w.nii.gz" and rows[1]["age_years"] == "60"
    assert [(row["version"], row["row"]) for row in rows] == [("0", str(n)) for n in range(4)]
    facts = json.loads((done.latents / "encoding.json").read_text())
    mean, std = np.load(done.latents / "posteriors.npy").astype(np.float64).swapaxes(0, 1)
    share = np.square(std).mean() / (np.square(std).mean() + mean.var())
    assert facts["noise_share"] == pytest.approx(share, rel=1e-6)
    assert facts["encoder_sha256"] == encoder_sha256(torch.load(done.weights, weights_only=True))
    assert facts["augmentation"] == {"seed": 3, "flip": 0.5, "affine": 1.0} and facts["versions"] == 1
    assert {path.name for path in done.latents.glob("[!.]*")} == set(NAMES)


def test_second_run_changes_nothing(work: Bundle) -> None:
    before, written = content(work.latents), (work.latents / "posteriors.npy").stat().st_mtime_ns
    work.encode(seed=3)
    assert content(work.latents) == before and (work.latents / "posteriors.npy").stat().st_mtime_ns == written


def changed(before: np.ndarray, after: np.ndarray) -> list[int]:
    return [row for row, (a, b) in enumerate(zip(before, after, strict=True)) if not np.array_equal(a, b)]


def test_a_changed_scan_is_encoded_anew(work: Bundle, grid: Grid) -> None:
    before, scale = posteriors(work.latents), latent_scale(str(work.latents))
    write_volume(work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz", head(grid, 9).numpy(), grid)
    work.encode()
    assert changed(before, posteriors(work.latents)) == [1]
    assert latent_scale(str(work.latents)) != scale


def test_another_autoencoder_encodes_all_anew(work: Bundle) -> None:
    before = posteriors(work.latents)
    state = torch.load(work.weights, weights_only=True)
    torch.save({name: 1.1 * tensor for name, tensor in state.items()}, work.weights)
    work.encode()
    assert changed(before, posteriors(work.latents)) == [0, 1, 2, 3]
    made_by(str(work.latents), work.weights)


def test_another_decoder_changes_no_latent(work: Bundle, tmp_path: Path) -> None:
    before = content(work.latents)
    state = torch.load(work.weights, weights_only=True)
    decoder = {name: 1.1 * tensor for name, tensor in state.items() if name.startswith(("decoder.", "post_quant_conv"))}
    assert decoder
    save_file({name: tensor.contiguous() for name, tensor in {**state, **decoder}.items()}, tmp_path / "b.safetensors")
    work.encode(seed=3, autoencoder_path=str(tmp_path / "b.safetensors"))
    assert content(work.latents) == before
    assert made_by(str(work.latents), tmp_path / "b.safetensors") == made_by(str(work.latents), work.weights)


def test_augmented_versions_of_a_scan(work: Bundle) -> None:
    plain = posteriors(work.latents)
    work.encode(latent_versions=2)
    both = posteriors(work.latents)
    assert len(both) == 8 and changed(plain, both[::2]) == [] and changed(plain, both[1::2]) == [0, 1, 2, 3]
    rows = read_table(work.latents / "participants.tsv")
    assert [row["version"] for row in rows[:3]] == ["0", "1", "0"]
    assert [row["age_years"] for row in rows[:3]] == ["50", "50", "60"]
    work.encode(latent_versions=2, latents_dir=str(work.folder / "again"), num_workers=2)
    assert content(work.folder / "again") == content(work.latents)
    work.encode(latent_versions=2, flip=0, affine=0)
    assert changed(plain, posteriors(work.latents)[1::2]) == []


def test_a_flip_is_a_flip(work: Bundle, grid: Grid) -> None:
    for number in range(4):
        path = work.dataset / f"sub-{number}" / "anat" / f"sub-{number}_T1w.nii.gz"
        write_volume(path, head(grid, number).flip(0).numpy(), grid)
    work.encode(latents_dir=str(work.folder / "mirrored"))
    for number in range(4):
        path = work.dataset / f"sub-{number}" / "anat" / f"sub-{number}_T1w.nii.gz"
        write_volume(path, head(grid, number).numpy(), grid)
    work.encode(latent_versions=2, flip=1, affine=0)
    assert changed(posteriors(work.latents)[1::2], posteriors(work.folder / "mirrored")) == []


def test_scan_that_is_damaged_is_named(work: Bundle) -> None:
    path = work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    path.write_bytes(b"cut")
    for workers in (0, 1):
        folder = work.folder / f"workers-{workers}"
        told = refused(work.encode, latents_dir=str(folder), num_workers=workers)
        assert f"{path} cannot be read" in told and "\n" not in told
        assert np.load(folder / "encoded.npy").any(axis=(1, 2)).tolist() == [True, False, False, False]
        assert "is not finished" in refused(read_encoding, folder)


def test_flags_that_are_refused(work: Bundle) -> None:
    assert "--latent_dtype must be float16 or float32, got 'bfloat16'" in refused(work.encode, latent_dtype="bfloat16")
    assert "--latent_versions" in refused(work.encode, latent_versions=0)


# Stopped anywhere, and by several processes: with a network and volumes that take no time.


class Pooling(nn.Module):
    """In the place of the autoencoder: mean and maximum of blocks."""

    calls = 0

    def encode(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        Pooling.calls += 1
        blocks = volume.reshape(1, 1, 2, 4, 2, 4, 2, 4).permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5)
        return blocks.mean(-1), blocks.amax(-1)


def load(row: Any) -> dict[str, Any]:
    return {**row, "image": torch.from_numpy(np.load(row["image"]))}


def write_scans(folder: Path, numbers: list[int], changed: int | None = None) -> list[dict[str, Any]]:
    """Volumes of (1, 8, 8, 8), each its own, and their rows."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        drawn = np.random.default_rng([number, number == changed]).random((1, 8, 8, 8), np.float32)
        np.save(folder / f"{number}.npy", drawn)
    names = [{"participant_id": f"sub-{number}", "path": f"{number}.npy"} for number in numbers]
    return [{"image": str(folder / row["path"]), "row": row} for row in names]


def encode(scans: list[dict[str, Any]], folder: Path, scale: float = 1.0, **options: Any) -> int:
    """Encode, and say how many latents were computed."""
    before = Pooling.calls
    checkpoint = Checkpoint(Path("x.pt"), {"encoder.weight": torch.full((1,), scale)})
    LatentEncoder(Pooling(), checkpoint, load, lambda row: row, str(folder), (1, 2, 2, 2), **options)(scans)
    return Pooling.calls - before


def in_a_process(call: Callable[..., Any], *given: Any) -> Any:
    process = FORK.Process(target=call, args=given)
    process.start()
    return process


def killed_at(step: int, scans: list[dict[str, Any]], folder: Path) -> None:
    """Encode, and die of signal 9 at that step of the writing; between two steps lies half of a write."""
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    write, replace = ArrayFile.write, os.replace

    def halting(self: ArrayFile, number: int, row: np.ndarray, flush: bool = True) -> None:
        count()
        half = row.copy()
        half.flat[half.size // 2 :] = 77
        write(self, number, half, flush)
        count()
        write(self, number, row, flush)

    def halting_replace(*paths: Any) -> None:
        count()
        replace(*paths)

    ArrayFile.write = halting  # type: ignore[method-assign]
    os.replace = halting_replace  # type: ignore[assignment]
    encode(scans, folder)


def is_readable(folder: Path) -> bool:
    try:
        return bool(latents(str(folder), Conditions()))
    except BundleError:
        return False


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("first", "left"),
    [([], [3, 2, 1, 0]), ([0, 1], [2, 1, 0]), ([1, 3, 0], [1, 0]), ([3, 0, 1], [1, 0])],
    ids=["anew", "grown", "reordered", "changed"],
)
def test_killed_at_any_step(first: list[int], left: list[int], tmp_path: Path) -> None:
    """Three scans; where some were encoded before, one of those has changed since."""
    old, start = write_scans(tmp_path / "old", first), tmp_path / "start"
    start.mkdir()
    if old:
        encode(old, start)
    scans = write_scans(tmp_path / "scans", [3, 0, 1], changed=1)
    encode(scans, tmp_path / "whole")
    whole, computed = content(tmp_path / "whole"), []
    for step in range(1, 200):
        folder = tmp_path / f"step-{step}"
        shutil.copytree(start, folder)
        process = in_a_process(killed_at, step, scans, folder)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not is_readable(folder) or content(folder) == content(start)
        computed.append(encode(scans, folder))
        assert content(folder) == whole and not list(folder.glob("next-*")), step
    assert content(folder) == whole
    assert computed == sorted(computed, reverse=True)  # the longer it ran, the less is left to do
    assert list(dict.fromkeys(computed)) == left


def test_only_what_is_in_flight_is_lost(tmp_path: Path) -> None:
    scans, missing = write_scans(tmp_path / "scans", [0, 1, 2, 3]), str(tmp_path / "scans" / "2.npy")
    os.rename(missing, missing + "x")
    with pytest.raises(BundleError, match="2.npy: No such file"):
        encode(scans, tmp_path / "latents")
    os.rename(missing + "x", missing)
    assert encode(scans, tmp_path / "latents") == 2
    assert encode(scans, tmp_path / "latents") == 0


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [3, 1], [2, 0, 1], [4, 5]])
def test_other_scans_keep_what_is_there(numbers: list[int], tmp_path: Path) -> None:
    encode(write_scans(tmp_path / "scans", [0, 1, 2]), tmp_path / "latents")
    scans = write_scans(tmp_path / "scans", numbers)
    assert encode(scans, tmp_path / "latents") == len(set(numbers) - {0, 1, 2})
    encode(scans, tmp_path / "fresh")
    assert content(tmp_path / "latents") == content(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({}, 0),
        ({"scale": 2.0}, 6),
        ({"latent_dtype": "float32"}, 6),
        ({"settings": {"resample_to_grid": True}}, 6),
        ({"amp": True}, 6),
        ({"seed": 1}, 3),
        ({"augmentation": {"flip": 0.0}}, 3),
        ({"versions": 3}, 3),
        ({"versions": 1}, 0),
    ],
)
def test_other_settings_are_encoded_anew(options: dict[str, Any], computed: int, tmp_path: Path) -> None:
    class Same:
        def set_random_state(self, seed: int) -> None: ...

        def __call__(self, row: Any) -> Any:
            return row

    def run(**options: Any) -> int:
        weights = {"encoder.weight": torch.full((1,), options.pop("scale", 1.0))}
        before, checkpoint = Pooling.calls, Checkpoint(Path("x.pt"), weights)
        given = {"versions": 2, "augmentation": {"flip": 0.5}, **options}
        LatentEncoder(Pooling(), checkpoint, load, Same(), str(tmp_path / "latents"), (1, 2, 2, 2), **given)(scans)
        return Pooling.calls - before

    scans = write_scans(tmp_path / "scans", [0, 1, 2])
    assert run() == 6
    assert run(**options) == computed


def as_rank(rank: int, world: int, scans: list[dict[str, Any]], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    encode(scans, folder)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [2, 1, 0]])
def test_several_processes_write_what_one_writes(order: list[int], tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", [0, 1, 2, 3, 4])
    encode(scans, tmp_path / "one")
    processes = [in_a_process(as_rank, rank, len(order), scans, tmp_path / "many") for rank in order]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(order)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_ranks_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = write_scans(tmp_path / "scans", [0, 1, 2, 3, 4])
    encode(scans, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, computed in ((0, 3), (1, 2)):
        assert not (tmp_path / "two" / "encoding.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert encode(scans, tmp_path / "two") == computed
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_rank_alone_does_not_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="rank 0 has not prepared"):
        LatentWriter(tmp_path, np.ones((2, 32), np.uint8), (1, 2, 2, 2), "float16", prepares=False, patience=0.3)


def test_a_full_disk_is_one_line_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, flush, calls = write_scans(tmp_path / "scans", [0, 1, 2, 3]), os.fsync, iter(range(99))

    def full(number: int) -> None:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(number)

    with monkeypatch.context() as patch:
        patch.setattr(latent_writer.os, "fsync", full)
        with pytest.raises(BundleError, match=f"cannot write the latents in {tmp_path}.*No space left on device"):
            encode(scans, tmp_path / "latents")
    assert 0 < encode(scans, tmp_path / "latents") < 4


def test_a_disk_without_room_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(latent_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BundleError, match="needs 0.00 GB and its disk has 0.00 GB left"):
        encode(write_scans(tmp_path / "scans", [0, 1, 2, 3]), tmp_path / "latents")


def test_a_latent_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", [0])
    np.save(scans[0]["image"], np.full((1, 8, 8, 8), 1e5, np.float32))
    with pytest.raises(BundleError, match="the latent of .*0.npy is not finite in float16"):
        encode(scans, tmp_path / "latents")
    assert encode(scans, tmp_path / "latents", latent_dtype="float32") == 1


# Reading.


def test_rows_for_training(done: Bundle, conditions: Conditions) -> None:
    rows, scans = latents(str(done.latents), conditions), participants(str(done.dataset), conditions)
    assert [row["image"] for row in rows] == [0, 1, 2, 3]
    for row, scan in zip(rows, scans, strict=True):
        assert torch.equal(row["condition"], scan["condition"]) and row["participant_id"] == scan["participant_id"]


def test_scale_is_one_over_the_deviation_of_samples(done: Bundle, conditions: Conditions) -> None:
    rows: Any = latents(str(done.latents), conditions)
    draw = SamplePosteriord("image", str(done.latents), latent_scale(str(done.latents)))
    torch.manual_seed(0)
    drawn = torch.stack([draw(row)["image"] for row in rows for _ in range(20)])
    assert drawn.dtype == torch.float32 and drawn.std().item() == pytest.approx(1.0, abs=0.02)


def test_samples_are_of_the_posterior(done: Bundle) -> None:
    draw = SamplePosteriord("image", str(done.latents), 2.0)
    mean, std = torch.from_numpy(posteriors(done.latents)[2]).float()
    torch.manual_seed(5)
    first, second = draw({"image": 2})["image"], draw({"image": 2})["image"]
    torch.manual_seed(5)
    assert torch.equal(first, (mean + std * torch.randn(mean.shape)) * 2.0)
    assert not torch.equal(first, second)


def test_means_are_those_of_the_posterior(done: Bundle) -> None:
    mean = torch.from_numpy(posteriors(done.latents)[2, 0]).float()
    assert torch.equal(PosteriorMeand("image", str(done.latents), 2.0)({"image": 2})["image"], mean * 2.0)


def test_each_worker_maps_the_array_itself(done: Bundle, conditions: Conditions) -> None:
    draw = SamplePosteriord("image", str(done.latents), 1.0)
    draw({"image": 0})
    pickled = pickle.dumps(draw)
    assert len(pickled) < 2000 < posteriors(done.latents).nbytes
    rows: Any = latents(str(done.latents), conditions)
    loader: Any = DataLoader(Dataset(rows, pickle.loads(pickled)), batch_size=2, num_workers=2)
    batches = list(loader)
    assert [batch["participant_id"] for batch in batches] == [["sub-0", "sub-1"], ["sub-2", "sub-3"]]
    means = torch.from_numpy(posteriors(done.latents)[:, 0]).float()
    assert (torch.cat([batch["image"] for batch in batches]) - means).abs().max() > 0
    assert batches[0]["image"].shape == (2, *means.shape[1:]) and batches[0]["condition"].shape == (2, 4)


@pytest.fixture
def cache(work: Bundle) -> Iterator[Path]:
    yield work.latents


def cut_posteriors(folder: Path) -> None:
    path = folder / "posteriors.npy"
    path.write_bytes(path.read_bytes()[:-10])


def fewer_rows_in_the_table(folder: Path) -> None:
    write_table(folder / "participants.tsv", read_table(folder / "participants.tsv")[:3])


def fewer_rows_in_the_array(folder: Path) -> None:
    np.save(folder / "posteriors.npy", posteriors(folder)[:3])


def rows_in_another_order(folder: Path) -> None:
    write_table(folder / "participants.tsv", read_table(folder / "participants.tsv")[::-1])


def one_row_blank(folder: Path) -> None:
    encoded = np.load(folder / "encoded.npy")
    encoded[2] = 0
    np.save(folder / "encoded.npy", encoded)


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (removed("posteriors.npy"), "there is no .*posteriors.npy"),
        (removed("encoded.npy"), "there is no .*encoded.npy"),
        (removed("encoding.json"), "is not finished: run configs/encode_latents.yaml again"),
        (removed("participants.tsv"), "cannot read the table .*participants.tsv"),
        (cut_posteriors, "posteriors.npy is cut or damaged"),
        (fewer_rows_in_the_table, "does not list the 4 rows"),
        (fewer_rows_in_the_array, "does not list the 3 rows"),
        (rows_in_another_order, "does not list the 4 rows of posteriors.npy in their order"),
        (one_row_blank, "is not finished"),
    ],
)
def test_latents_that_are_damaged(
    damage: Callable[[Path], None], told: str, cache: Path, work: Bundle, conditions: Conditions
) -> None:
    damage(cache)
    with pytest.raises(BundleError, match=told):
        latents(str(cache), conditions)
    work.encode(seed=3)
    assert len(latents(str(cache), conditions)) == 4


def flipped(folder: Path) -> None:
    array = np.lib.format.open_memmap(folder / "posteriors.npy", mode="r+")
    array[2, 0].view(np.uint8).reshape(-1)[10:74] ^= 1
    array.flush()


def zeroed(folder: Path) -> None:
    array = np.lib.format.open_memmap(folder / "posteriors.npy", mode="r+")
    array[2] = 0
    array.flush()


@pytest.mark.parametrize(("damage", "older"), [(flipped, False), (zeroed, False), (zeroed, True)])
def test_a_damaged_row_is_not_trained_on_and_made_again(
    damage: Callable[[Path], None], older: bool, tmp_path: Path
) -> None:
    """Folders of version 2.0.0 have no checksums: there, standard deviations of 0 alone are noticed."""
    scans, folder = write_scans(tmp_path / "scans", [0, 1, 2, 3]), tmp_path / "latents"
    encode(scans, folder)
    whole = content(folder)
    if older:
        (folder / "checksums.npy").unlink()
    damage(folder)
    assert [torch.is_tensor(Posteriors(folder)[row][0]) for row in (0, 1, 3)] == [True] * 3
    with pytest.raises(BundleError, match="row 2 of .*posteriors.npy is damaged"):
        Posteriors(folder)[2]
    assert encode(scans, folder) == 1 and content(folder) == whole and encode(scans, folder) == 0


@pytest.mark.parametrize("moments", [None, {}, {"mean": 0.0, "square": "x"}, {"mean": 0.0, "square": 1e300}])
def test_moments_that_cannot_be(moments: Any, tmp_path: Path) -> None:
    scans, folder = write_scans(tmp_path / "scans", [0]), tmp_path / "latents"
    encode(scans, folder)
    stated = json.loads((folder / "encoding.json").read_text())
    (folder / "encoding.json").write_text(json.dumps({**stated, "moments": moments}))
    with pytest.raises(BundleError, match="moments|variance"):
        latent_scale(str(folder))
    if not isinstance(moments, dict) or len(moments) < 2:
        assert encode(scans, folder) == 0 and latent_scale(str(folder)) > 0


def test_latents_that_do_not_fit(done: Bundle, conditions: Conditions, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"have shape \(3, 8, 12, 8\), the configured networks' have \(3, 20, 28, 20\)"
    ):
        latents(str(done.latents), conditions, latent_shape=(3, 20, 28, 20))
    with pytest.raises(BundleError, match="made by another autoencoder"):
        torch.save({"encoder.weight": torch.ones(1)}, tmp_path / "other.pt")
        made_by(str(done.latents), tmp_path / "other.pt", needed=False)
    with pytest.raises(BundleError, match="give the --autoencoder_path .* or --sample_every 0"):
        made_by(str(done.latents), tmp_path / "none.pt", needed=True)
    with pytest.raises(BundleError, match="there are no latents in"):
        latents(str(tmp_path), conditions)
    with pytest.raises(BundleError, match="has 4 rows, and no row 4"):
        Posteriors(done.latents)[4]


def test_latents_without_variance(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", [0])
    np.save(scans[0]["image"], np.zeros((1, 8, 8, 8), np.float32))
    encode(scans, tmp_path / "latents")
    with pytest.raises(BundleError, match="have variance 0.0"):
        latent_scale(str(tmp_path / "latents"))


@pytest.mark.parametrize("sigma", [0.2, 10.0])
def test_latents_that_are_noise_are_warned_of(sigma: float, caplog: pytest.LogCaptureFixture) -> None:
    """As those of an autoencoder whose KL term weighs too much."""
    mean = np.random.default_rng(0).standard_normal((3, 2, 8, 8, 8))
    found = moments(np.stack([mean, np.full_like(mean, sigma)], axis=1))
    assert noise_share(found) == pytest.approx(sigma**2 / (sigma**2 + mean.var()))
    warn_of_noise("runs/latents", found)
    assert caplog.messages == [] if sigma < 1 else "99% of the latents' variance" in caplog.text
    assert noise_share({"mean": 0.0, "square": 1.0}) is None  # of latents that version 2.1.0 encoded
