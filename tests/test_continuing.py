# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Work that version 2.0.0 began is gone on with: its files are in data/version_2_0_0/, and make.sh there made them."""

from __future__ import annotations

import gzip
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, TINY, RunHere
from trained import content

OLD = ROOT / "tests" / "data" / "version_2_0_0"
MONAI = "1.6.1"  # whose metrics it kept values of
TRAINING: dict[str, Any] = {
    "max_epochs": 2,
    "epoch_length": 2,
    "batch_size": 1,
    "seed": 1,
    "validation_fraction": 0.5,
    "validate_every": 0,
    "keep_checkpoints": 9,
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the files, unpacked."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    for packed in folder.rglob("*.pt.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


class Run:
    """A verb at the size of the files, in this process."""

    def __init__(self, run_here: RunHere, old: Path) -> None:
        self.run_here, self.old = run_here, old

    def __call__(self, *overlays: str, **flags: Any) -> None:
        self.run_here([BASE, *overlays, TINY, self.old / "small.yaml"], **flags)


@pytest.fixture
def run(run_here: RunHere, old: Path) -> Run:
    return Run(run_here, old)


def weights(old: Path) -> dict[str, Any]:
    """Flags of the trained networks."""
    paths = {f"{stage}_path": str(old / stage / f"{stage}.pt") for stage in ("autoencoder", "diffusion")}
    return {**paths, "load_old": 0}


def state(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below some folders, when it was written and what it holds."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_prepared_dataset_is_kept(run: Run, old: Path) -> None:
    dataset = old / "dataset"
    scans, table = state(*dataset.glob("sub-*")), (dataset / "participants.tsv").read_bytes()
    run("configs/prepare.yaml", input_dir=str(old / "raw"), dataset_dir=str(dataset), segment_with="own")
    assert len(scans) == 6 and state(*dataset.glob("sub-*")) == scans
    assert (dataset / "participants.tsv").read_bytes() == table and not (dataset / "failures.tsv").exists()


def test_latents_are_kept(run: Run, old: Path) -> None:
    latents, autoencoder = old / "latents", str(old / "autoencoder" / "autoencoder.pt")
    before = state(latents)[latents / "posteriors.npy"]
    flags = {"dataset_dir": str(old / "dataset"), "latents_dir": str(latents), "load_old": 0}
    run("configs/encode_latents.yaml", autoencoder_path=autoencoder, **flags)
    assert state(latents)[latents / "posteriors.npy"] == before


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_training_ends_where_it_would_have(
    stage: str, run: Run, old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(old / stage / "checkpoint_iteration=2.pt", run_dir)
    own: dict[str, Any] = {"dataset_dir": str(old / "dataset"), "perceptual_weight": 0}
    if stage == "diffusion":
        own = {"latents_dir": str(old / "latents"), "ema_decay": 0.5, **weights(old)}
        own.pop("diffusion_path")
    run(f"configs/train_{stage}.yaml", run_dir=str(run_dir), **TRAINING, **own)
    assert "2 of 4 iterations are done" in caplog.text
    begun, ended = content(run_dir / "checkpoint_iteration=2.pt"), content(old / stage / f"{stage}.pt")
    reached = content(run_dir / f"{stage}.pt")
    assert reached.keys() == ended.keys()
    for network in ended.keys() - {"facts"}:
        way = distance(ended[network], begun[network])
        assert way > 0 and distance(reached[network], ended[network]) < 1e-3 * way  # another CPU may round otherwise


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Euclidean, over all weights of a network or of the average of one."""
    a, b = a.get("weights", a), b.get("weights", b)
    tensors = [name for name, value in a.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return float(sum((a[name] - b[name]).double().square().sum() for name in tensors)) ** 0.5


def test_a_sampling_keeps_what_is_there_and_makes_what_lacks(run: Run, old: Path) -> None:
    samples = old / "samples"
    lacking = samples / "sample_seed-1_000001.nii.gz"
    wanted = np.asanyarray(nib.load(lacking).dataobj)  # type: ignore[attr-defined]
    for path in samples.glob("*_000001.*"):
        path.unlink()
    before = state(samples)
    conditions = {"gender": 1.0, "age": 0.7, "ventricular_vol": 0.7, "brain_vol": 0.5}
    flags = {"num_samples": 2, "seed": 1, "num_inference_steps": 5}
    run(output_dir=str(samples), **flags, **conditions, **weights(old))
    assert len(before) == 2 and before.items() <= state(samples).items()
    assert np.abs(np.asanyarray(nib.load(lacking).dataobj) - wanted).max() < 0.01  # type: ignore[attr-defined]


@pytest.mark.skipif(version("monai") != MONAI, reason="MONAI's own metrics are another version's")
def test_an_evaluation_measures_nothing_again(run: Run, old: Path, tmp_path: Path) -> None:
    kept = old / "evaluation" / "values", old / "evaluation" / "features"
    before, values = state(*kept), (kept[0] / "rank-0.tsv").read_text()
    folders = {f"{name}_dir": str(old / "dataset") for name in ("real", "reconstruct")}
    where = {"value_dir": str(kept[0]), "feature_dir": str(kept[1]), "output_dir": str(tmp_path / "report")}
    networks = {**weights(old), "brain_age_path": str(old / "brain_age.pt")}
    run("configs/evaluate.yaml", synthetic_dir=str(old / "samples"), **folders, **where, **networks)
    now, found = state(*kept), (kept[0] / "rank-0.tsv").read_text()
    changed = [path for path in before if now[path] != before[path]]
    assert len(before) == len(now) == 6 and changed in ([], [kept[0] / "rank-0.tsv"])
    added = found.removeprefix(values).splitlines()  # regions of real heads, which 2.0.0 did not measure
    assert found.startswith(values) and all(line.startswith("structures-") for line in added)
    assert (tmp_path / "report" / "evaluation.html").is_file()
