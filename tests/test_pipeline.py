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
from conftest import BASE, TINY, RunBundle, computed_once
from preparing import HEAD, coarse_template, posed
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from scripts.autoencoder.perceptual import LPIPS
from scripts.core.tables import read_table, write_table
from scripts.preparation.native_space import read_transform

MOTIONS: dict[str, tuple[tuple, tuple, str]] = {
    "sub-01": ((8, -4, 6), (4, -7, 9), "RAS"),
    "sub-02": ((-25, 30, -30), (300, -250, 400), "LAI"),
}
"""How the heads lie: a little tilted; turned by 30 degrees, stored in another order, its origin absurdly far away."""


def write_raw_heads(folder: Path) -> dict[str, np.ndarray]:
    """Two heads in BIDS layout: the template at 2 mm in each pose, one in int16; their motions."""
    template = nib.load(HEAD)
    data = 1000.0 * np.asarray(template.dataobj)[::2, ::2, ::2]
    spread = template.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    rows: list[dict[str, object]] = []
    motions = {}
    for (name, pose), dtype in zip(MOTIONS.items(), (np.float32, np.int16)):
        image, motions[name] = posed(nib.Nifti1Image(data.astype(dtype), spread), *pose)
        path = folder / name / "anat" / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(image, path)
        rows.append({"participant_id": name, "age": 50 + 10 * len(rows), "sex": "FM"[len(rows)]})
    write_table(folder / "participants.tsv", rows)
    return motions


@pytest.fixture(scope="module")
def work(shared_dir: Path, run_bundle: RunBundle) -> Path:
    """A folder in which the whole sequence of commands has run. Tests must not change it."""
    return computed_once(shared_dir / "pipeline", lambda folder: run_all(folder, run_bundle))


def run_all(folder: Path, run_bundle: RunBundle) -> None:
    """Every verb after the other; each has to end with exit code 0."""
    motions = write_raw_heads(folder / "raw")
    np.save(folder / "motions.npy", [motions[name] for name in MOTIONS])
    template = [word for name, path in coarse_template(folder).items() for word in (f"--{name}", path)]
    torch.manual_seed(0)
    save_file(LPIPS().state_dict(), folder / "lpips.safetensors")
    autoencoder, diffusion = folder / "autoencoder" / "autoencoder.pt", folder / "diffusion" / "diffusion.pt"
    trained = ("--autoencoder_path", autoencoder, "--load_old", 0)
    data = ("--dataset_dir", folder / "dataset")
    latents = ("--latents_dir", folder / "latents")
    samples = ("--output_dir", folder / "samples", "--num_samples", 2, "--seed", 1, "--num_inference_steps", 5)
    commands: list[tuple[list[str], tuple[object, ...]]] = [
        (["configs/prepare.yaml"], ("--input_dir", folder / "raw", *template, *data)),
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
        done = run_bundle([BASE, *overlays, TINY], *flags)
        assert done.returncode == 0, f"{overlays}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def test_preparation_carries_covariates_over(work: Path) -> None:
    rows = read_table(work / "dataset" / "participants.tsv")
    assert [(row["sex"], row["age_years"]) for row in rows] == [("female", "50"), ("male", "60")]
    assert all(float(row["similarity"]) > 0.9 for row in rows)


def test_poses_are_found(work: Path) -> None:
    points = np.array([[x, y, z, 1.0] for x in (-65, 65) for y in (-100, 65) for z in (-40, 75)])  # about the brain
    for name, motion in zip(MOTIONS, np.load(work / "motions.npy")):
        sidecar = next((work / "dataset" / name / "anat").glob("*_T1w.json"))
        error = np.linalg.inv(motion) @ read_transform(sidecar)
        assert np.linalg.norm((points @ error.T - points)[:, :3], axis=1).max() < 1.0
        assert np.degrees(Rotation.from_matrix(error[:3, :3]).magnitude()) < 1.0


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
