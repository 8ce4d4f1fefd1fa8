# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a mask covers is drawn anew to fit the rest; heads between two; what is refused of both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import head, refused
from PIL import Image
from released import configuration
from test_editing import schedule_of

from scripts.core.tables import read_table
from scripts.diffusion.known_regions import KnownRegionSampler
from scripts.diffusion.targets import find_target
from scripts.editing.inpainting import continued, missing_latents
from scripts.editing.interpolation import slerp
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume
from scripts.volumes.reading import read_image

INPAINT, INTERPOLATE = "configs/inpaint.yaml", "configs/interpolate.yaml"


@pytest.mark.parametrize("target", ["velocity", "flow"])
def test_what_is_missing_follows_from_what_is_known(target: str) -> None:
    """Latents of one Gaussian in which neighbours are alike: the exact network, and the exact answer."""
    schedule, count = schedule_of(target), 4
    covariance = torch.tensor([[0.9 ** abs(i - j) for j in range(count)] for i in range(count)], dtype=torch.float64)
    sampler = KnownRegionSampler(schedule, 20, 4)
    levels = dict(zip(sampler.timesteps, sampler.levels[1:], strict=True))

    def denoise(z: torch.Tensor, timestep: int) -> torch.Tensor:
        a, s = levels[timestep]
        gain = a * covariance @ torch.linalg.inv(a * a * covariance + s * s * torch.eye(count, dtype=torch.float64))
        clean = (z.flatten(1).double() @ gain.T).float().view_as(z)
        return find_target(target).output(clean, (z - a * clean) / s, a, s)

    draws = 150
    known = torch.tensor([1.5, 0.0, 0.0, -0.5]).view(1, 1, count, 1, 1).expand(draws, -1, -1, -1, -1)
    missing = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, count, 1, 1)
    generators = [torch.Generator().manual_seed(number) for number in range(draws)]
    found = sampler.sample(denoise, known, missing, generators)[:, 0, :, 0, 0]
    inner, outer = [1, 2], [0, 3]
    weights = covariance[inner][:, outer] @ torch.linalg.inv(covariance[outer][:, outer])
    mean = weights @ torch.tensor([1.5, -0.5], dtype=torch.float64)
    spread = (covariance[inner][:, inner] - weights @ covariance[outer][:, inner]).diagonal().sqrt()
    assert torch.equal(found[:, outer], known[:, 0, outer, 0, 0])
    assert torch.allclose(found[:, inner].mean(0).double(), mean, atol=0.2)
    assert torch.allclose(found[:, inner].std(0).double(), spread, rtol=0.4)


def test_masks_reach_latents_and_values_go_on_into_them() -> None:
    mask = np.zeros((16, 16, 16), bool)
    mask[8, 8, 8] = True
    assert missing_latents(mask, (16, 16, 16)).sum() == 1 and missing_latents(mask, (4, 4, 4)).sum() == 27
    grid = Grid(mask.shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert np.allclose(continued(np.full(mask.shape, 0.4, np.float32), mask, grid), 0.4, atol=1e-5)


def test_slerp_keeps_the_length_of_noise() -> None:
    one, other = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(one, other, 0.0), one, atol=1e-5)
    assert torch.allclose(slerp(one, other, 1.0), other, atol=1e-5)
    assert float(slerp(one, other, 0.5).std()) == pytest.approx(1.0, abs=0.05)
    assert torch.allclose(slerp(one, one, 0.3), one)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, trained_folder: Path) -> dict[str, Any]:
    """Flags of the tiny trained model, a head, and masks: a good one, and others."""
    folder, grid = tmp_path_factory.mktemp("inpainting"), configuration().get_parsed_content("grid")
    mask = np.zeros(grid.shape, np.uint8)
    mask[10:16, 20:28, 10:16] = 1
    masks = {"mask": mask, "empty": mask * 0, "full": mask * 0 + 1, "codes": mask * 7, "small": mask[:-1]}
    for name, values in masks.items():
        nib.save(nib.Nifti1Image(values, grid.affine), folder / f"{name}.nii.gz")  # type: ignore[attr-defined]
    moved = grid.affine.copy()
    moved[0, 3] += 20.0
    nib.save(nib.Nifti1Image(mask, moved), folder / "moved.nii.gz")  # type: ignore[attr-defined]
    write_volume(folder / "raw.nii.gz", head(grid, 1).numpy() * 0.0, grid)
    flags = {
        "autoencoder_path": str(trained_folder / "autoencoder" / "autoencoder.pt"),
        "diffusion_path": str(trained_folder / "diffusion" / "diffusion.pt"),
        "load_old": 0,
        "measure": 0,
    }
    heads = [str(trained_folder / "dataset" / f"sub-{n}" / "anat" / f"sub-{n}_T1w.nii.gz") for n in (1, 2)]
    return {"flags": flags, "heads": heads, "folder": folder, "mask": mask > 0}


def test_draws_are_the_scan_outside_of_the_mask(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    flags = {**work["flags"], "scan": work["heads"][0], "mask": str(work["folder"] / "mask.nii.gz"), "seed": 3}
    few = {"inpaint_steps": 3, "repaint_times": 2, "num_samples": 2, "output_dir": str(tmp_path / "out")}
    run_here([BASE, INPAINT, TINY], **flags, **few)
    scan, mask = read_image(work["heads"][0]).data, work["mask"]
    draws = []
    for row in read_table(tmp_path / "out" / "participants.tsv"):
        volume = read_image(tmp_path / "out" / row["path"]).data
        assert np.abs(volume - scan)[~mask].max() < 0.005
        draws.append(volume)
    assert np.abs(draws[0] - draws[1])[mask].max() > 0.0
    sd = read_image(tmp_path / "out" / "sub-1_inpaint_sd.nii.gz").data
    assert sd[mask].max() > 0.0 and sd[~mask].max() < 1e-6
    stated = json.loads((tmp_path / "out" / "sub-1_inpaint-seed-4_space-MNI152_T1w.json").read_text())
    assert stated["synthetic"] is True and stated["seed"] == 4 and stated["conditions"]["age_years"] == 60
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    run_here([BASE, INPAINT, TINY], **flags, **few)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_series_between_two_seeds_and_two_heads(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    flags = {**work["flags"], "inversion_steps": 2, "inversion_tolerance": 1e-2, "frames": 3}
    run_here([BASE, INTERPOLATE, TINY], **flags, seeds=[1, 2], age_years=70, output_dir=str(tmp_path / "seeds"))
    rows = read_table(tmp_path / "seeds" / "participants.tsv")
    assert [row["share"] for row in rows] == ["0.0", "0.5", "1.0"] and rows[1]["age_years"] == "70.0"
    film: Any = Image.open(tmp_path / "seeds" / "seed-1_to_seed-2.gif")
    assert film.is_animated
    run_here([BASE, INTERPOLATE, TINY], **flags, scans=work["heads"], output_dir=str(tmp_path / "heads"))
    assert [row["age_years"] for row in read_table(tmp_path / "heads" / "participants.tsv")] == ["60.0", "65.0", "70.0"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    (INPAINT, {"mask": None}, "nothing to inpaint: give --mask"),
    (INPAINT, {"mask": "missing.nii.gz"}, "is not there"),
    (INPAINT, {"mask": "empty.nii.gz"}, "covers nothing"),
    (INPAINT, {"mask": "full.nii.gz"}, "covers everything"),
    (INPAINT, {"mask": "codes.nii.gz"}, "is no mask"),
    (INPAINT, {"mask": "small.nii.gz"}, "small.nii.gz has shape"),
    (INPAINT, {"mask": "moved.nii.gz"}, "moved.nii.gz does not lie on the grid"),
    (INPAINT, {"scan": "raw.nii.gz"}, "there is no head"),
    (INPAINT, {"scan": None}, "give --scan"),
    (INPAINT, {"age_years": "50,60"}, "one value of each condition"),
    (INPAINT, {"repaint_times": 0}, "--repaint_times"),
    (INPAINT, {"conditions_table": "x.tsv"}, "--conditions_table has no use here"),
    (INTERPOLATE, {}, "between two of what"),
    (INTERPOLATE, {"seeds": [1]}, "--seeds must be a list of 2"),
    (INTERPOLATE, {"scans": ["raw.nii.gz"]}, "--scans must be a list of two"),
    (INTERPOLATE, {"seeds": [1, 2], "frames": 1}, "--frames"),
    (INTERPOLATE, {"scans": ["mask.nii.gz", "mask.nii.gz"], "age_years": 70}, "conditions of their own"),
]


@pytest.mark.parametrize(("verb", "flags", "said"), BAD, ids=[said for _, _, said in BAD])
def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing(
    verb: str, flags: dict[str, Any], said: str, work: dict[str, Any], run_here: RunHere, tmp_path: Path
) -> None:
    folder = work["folder"]
    good = {"scan": work["heads"][0], "mask": str(folder / "mask.nii.gz")} if verb == INPAINT else {}
    paths = {name: str(folder / value) for name, value in flags.items() if str(value).endswith(".nii.gz")}
    given = {**work["flags"], **good, **flags, **paths, "output_dir": str(tmp_path / "out")}
    error = refused(run_here, [BASE, verb, TINY], **given)
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()
