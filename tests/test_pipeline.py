# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Every verb after the other, as the README has them, on heads made from the template."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, TINY, RunBundle
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from scripts.autoencoder.perceptual import LPIPS
from scripts.core.tables import read_table, write_table

TEMPLATE = ROOT / "models" / "template" / "tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz"


def write_raw_heads(folder: Path) -> None:
    """Two heads in BIDS layout: the template at 2 mm, each tilted and shifted by its header, one in int16."""
    template = nib.load(TEMPLATE)
    data = 1000.0 * np.asarray(template.dataobj)[::2, ::2, ::2]
    spread = template.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    rows: list[dict[str, object]] = []
    for name, angles, dtype in (("sub-01", (8, -4, 6), np.float32), ("sub-02", (-6, 3, -9), np.int16)):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        pose[:3, 3] = (4.0, -7.0, 9.0)
        path = folder / name / "anat" / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(data.astype(dtype), pose @ spread), path)
        rows.append({"participant_id": name, "age": 50 + 10 * len(rows), "sex": "FM"[len(rows)]})
    write_table(folder / "participants.tsv", rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, run_command: RunBundle) -> Path:
    """A folder in which the whole sequence of commands has run; each has ended with exit code 0."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_raw_heads(folder / "raw")
    torch.manual_seed(0)
    save_file(LPIPS().state_dict(), folder / "lpips.safetensors")
    autoencoder, diffusion = folder / "autoencoder" / "autoencoder.pt", folder / "diffusion" / "diffusion.pt"
    trained = ("--autoencoder_path", autoencoder, "--load_old", 0)
    data = ("--dataset_dir", folder / "dataset")
    latents = ("--latents_dir", folder / "latents")
    samples = ("--output_dir", folder / "samples", "--num_samples", 2, "--seed", 1, "--num_inference_steps", 5)
    commands: list[tuple[list[str], tuple[object, ...]]] = [
        (["configs/prepare.yaml"], ("--input_dir", folder / "raw", *data)),
        (
            ["configs/train_autoencoder.yaml"],
            (*data, "--run_dir", autoencoder.parent, "--perceptual_path", folder / "lpips.safetensors"),
        ),
        (["configs/encode_latents.yaml"], (*data, *latents, *trained)),
        (
            ["configs/train_diffusion.yaml"],
            (*latents, "--run_dir", diffusion.parent, "--missing_conditions", "default"),
        ),
        ([], (*trained, "--diffusion_path", diffusion, *samples, "--sex", "female", "--age_years", 63)),
        (
            ["configs/evaluate.yaml"],
            ("--synthetic_dir", folder / "samples", "--real_dir", folder / "dataset", *trained)
            + ("--reconstruct_dir", folder / "dataset", "--output_dir", folder / "evaluation", "--num_pairs", 2),
        ),
    ]
    for overlays, flags in commands:
        done = run_command([BASE, *overlays, TINY], *flags)
        assert done.returncode == 0, f"{overlays}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return folder


def test_preparation_carries_covariates_over(work: Path) -> None:
    rows = read_table(work / "dataset" / "participants.tsv")
    assert [(row["sex"], row["age_years"]) for row in rows] == [("female", "50"), ("male", "60")]
    assert all(float(row["similarity"]) > 0.9 for row in rows)


def test_prepared_heads_agree(work: Path) -> None:
    volumes = [nib.load(path).get_fdata() for path in sorted((work / "dataset").glob("sub-*/anat/*.nii.gz"))]
    assert np.corrcoef(volumes[0].ravel(), volumes[1].ravel())[0, 1] > 0.98


def test_checkpoint_carries_what_sampling_needs(work: Path) -> None:
    content = torch.load(work / "diffusion" / "diffusion.pt", weights_only=True)
    assert content["facts"]["latent_scale"] > 0.0
    assert list(content["facts"]["conditions"]) == ["gender", "age", "ventricular_vol", "brain_vol"]


def test_samples_use_the_scale_of_the_training(work: Path) -> None:
    facts = torch.load(work / "diffusion" / "diffusion.pt", weights_only=True)["facts"]
    sidecars = [json.loads(path.read_text()) for path in sorted((work / "samples").glob("*.json"))]
    assert [sidecar["latent_scale"] for sidecar in sidecars] == [facts["latent_scale"]] * 2
    assert {sidecar["conditions"]["age_years"] for sidecar in sidecars} == {63.0}


def test_evaluation_reports_samples_and_reconstructions(work: Path) -> None:
    report = json.loads((work / "evaluation" / "evaluation.json").read_text())
    assert (work / "evaluation" / "evaluation.tsv").is_file()
    assert (work / "evaluation" / "reconstruction.tsv").is_file()
    assert report
