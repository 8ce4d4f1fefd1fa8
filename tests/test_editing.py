# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Edits of a head: the way to noise and back, what changes and what is kept, series, tables, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, SMALLEST, TINY, RunBundle, RunHere
from heads import head, refused
from PIL import Image
from released import configuration
from torch import Tensor
from trained import content

from scripts.conditions.changes import targets_of
from scripts.conditions.conditions import Conditions
from scripts.core.tables import read_table, write_table
from scripts.diffusion.inversion import ReversiblePath
from scripts.diffusion.samplers import DDIMSampler, FlowSampler
from scripts.diffusion.targets import TARGETS, find_target
from scripts.editing.changed_regions import apparent_growth, change_mask, give_back
from scripts.editing.counterfactual import diffusion_family
from scripts.measuring.contrast import BRAIN, COARSE, TEMPLATE, check_t1_weighted
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume
from scripts.volumes.placing import read_on_grid
from scripts.volumes.reading import read_image

EDIT, PIXEL = "configs/edit.yaml", "configs/pixel.yaml"


def schedule_of(target: str) -> Any:
    return configuration(target=target).get_parsed_content("schedule")


def gaussian_denoiser(schedule: Any, target: str, sd: Tensor, mean: float) -> Any:
    """The exact network of Gaussian latents, of some standard deviation in each voxel."""
    path = ReversiblePath(schedule, schedule.num_train_timesteps)
    levels = {middle.timestep: (middle.a, middle.s) for middle in path.middles}

    def denoise(z: Tensor, timestep: int) -> Tensor:
        a, s = levels[int(timestep)]
        clean = mean + a * sd**2 / (a**2 * sd**2 + s**2) * (z - a * mean)
        noise = (z - a * clean) / s
        return find_target(target).output(clean, noise, a, s)

    return denoise


@pytest.mark.parametrize("target", TARGETS)
def test_what_goes_to_noise_comes_back(target: str) -> None:
    schedule, generator = schedule_of(target), torch.Generator().manual_seed(1)
    sd = torch.rand(2, 3, 4, 4, 4, generator=generator) + 0.2
    clean = sd * torch.randn(sd.shape, generator=generator) + 0.3
    path, denoise = ReversiblePath(schedule, 50), gaussian_denoiser(schedule, target, sd, 0.3)
    out = path.walk(denoise, clean, 0, len(path))
    back = path.walk(denoise, out.latent, len(path), 0)
    assert float((back.latent - clean).abs().max()) < 1e-3
    # The noise is the one that these Gaussians have: the latent, in its own standard deviations.
    if target != "flow":
        assert float((out.latent - (clean - 0.3) / sd).abs().max()) < 0.3
    part = path.walk(denoise, clean, 0, 20)
    assert float((path.walk(denoise, part.latent, 20, 0).latent - clean).abs().max()) < 1e-3


@pytest.mark.parametrize("target", ["velocity", "flow"])
def test_the_way_back_is_where_samplers_of_many_steps_end(target: str) -> None:
    schedule, generator = schedule_of(target), torch.Generator().manual_seed(2)
    sd = torch.rand(1, 3, 4, 4, 4, generator=generator) + 0.3
    noise, denoise = torch.randn(sd.shape, generator=generator), gaussian_denoiser(schedule, target, sd, 0.5)
    path = ReversiblePath(schedule, 25)
    ends = path.walk(denoise, noise, 25, 0).latent
    many: Any = DDIMSampler(schedule, 500) if target == "velocity" else FlowSampler(schedule, 500)
    exact = 0.5 + sd * noise

    def on_grid(z: Tensor, timestep: int) -> Tensor:
        return denoise(z, min(int(timestep), 999))

    other = many.walk(on_grid, noise, [])
    assert float((ends - exact).abs().max()) < 0.1
    assert float((ends - other).abs().max()) < 0.1


def test_targets_are_values_changes_or_lists(conditions: Conditions) -> None:
    own = torch.tensor([0.0, 0.5, 0.2, 0.4])
    age = conditions[1]

    def years(**stated: Any) -> list[float]:
        return [round(age.denormalise(float(one[1])), 2) for one in targets_of(conditions, stated, own)]

    assert years(age_years="+10") == [73] and years(age_years=-5) == [58] and years(age_years="*1.1") == [69.3]
    assert years(age_years="/2") == [31.5] and years(age_years=70) == [70] and years(age="+0.5") == [82]
    assert years(age_years="50,+10, 70") == [50, 73, 70] == years(age_years=(50, "+10", 70))
    both = targets_of(conditions, {"age_years": [50, 60], "sex": "male"}, own)
    assert [one.tolist()[0] for one in both] == [1.0, 1.0] and torch.equal(both[0][2:], own[2:])


CHANGES = [
    ({}, "nothing is to change"),
    ({"age_years": "+x"}, "--age_years must be a finite number"),
    ({"age_years": "/0"}, "divided by 0"),
    ({"age_years": 200}, "--age_years 200 comes to 200 years, far outside"),
    ({"ventricular_vol_mm3": "*100"}, "far outside"),
    ({"sex": "+1"}, "--sex is one of female, male"),
    ({"age_years": 50, "age": 0.1}, "same condition"),
    ({"age_years": [50, 60], "brain_vol": [0, 0.5, 1]}, "must be of one length"),
]


@pytest.mark.parametrize(("stated", "said"), CHANGES)
def test_changes_that_say_nothing_are_refused(stated: dict[str, Any], said: str, conditions: Conditions) -> None:
    assert said in refused(targets_of, conditions, stated, torch.full((4,), 0.5))


def test_where_nothing_changed_the_scan_is_given_back() -> None:
    grid = Grid((24, 24, 24), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    scan = np.random.default_rng(0).random(grid.shape, np.float32)
    reconstruction = np.full(grid.shape, 0.5, np.float32)
    edited = reconstruction.copy()
    edited[:6] = 0.9
    mask = change_mask(reconstruction, edited, grid)
    answer = give_back(scan, reconstruction, edited, mask)
    assert np.array_equal(answer[12:], scan[12:]) and np.allclose(answer[:4], 0.9)
    assert 0.0 <= mask.min() and mask.max() <= 1.0
    assert np.array_equal(give_back(scan, reconstruction, reconstruction, np.zeros(grid.shape)), scan)


def test_growth_is_seen_where_tissue_grows() -> None:
    grid = Grid((32, 32, 32), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    radius = np.sqrt(((np.indices(grid.shape) - 15.5) ** 2).sum(0))

    def ball(size: float) -> np.ndarray:
        return (1.0 / (1.0 + np.exp(radius - size))).astype(np.float32)

    growth = apparent_growth(ball(9.0), ball(10.0), grid)
    assert growth[(radius > 5) & (radius < 9)].mean() > 0.02
    assert np.abs(growth[radius > 14]).mean() < 0.02
    assert apparent_growth(ball(10.0), ball(9.0), grid)[(radius > 5) & (radius < 9)].mean() < -0.02


# The verb.


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, trained_folder: Path, run_bundle: RunBundle) -> dict[str, Any]:
    """Flags of the tiny trained model, and what the command line makes of a head of its dataset: a series of two."""
    folder = tmp_path_factory.mktemp("editing")
    flags = {
        "autoencoder_path": str(trained_folder / "autoencoder" / "autoencoder.pt"),
        "diffusion_path": str(trained_folder / "diffusion" / "diffusion.pt"),
        "load_old": 0,
        "measure": 0,
        "inversion_steps": 2,
        "inversion_tolerance": 1e-3,
        "strength": 1.0,
    }
    scan, out = trained_folder / "dataset" / "sub-1" / "anat" / "sub-1_T1w.nii.gz", folder / "out"
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = run_bundle([BASE, EDIT, TINY], *words, "--scan", scan, "--age_years", "+5,+20", "--output_dir", out)
    assert done.returncode == 0, done.stderr
    return {"flags": flags, "scan": scan, "out": out, "folder": folder}


def test_an_edit_says_what_it_is(work: dict[str, Any]) -> None:
    stated = json.loads((work["out"] / "sub-1_edit-000-01_space-MNI152_T1w.json").read_text())
    assert stated["synthetic"] is True and stated["conditions"]["age_years"] == 80
    assert stated["own_conditions"]["age_years"] == 60 and stated["conditions"]["sex"] == "male"
    assert set(stated["own_conditions_from"].values()) == {"table"}
    assert stated["inversion"]["steps"] == 2 and stated["inverted"]["latent_error"] < 0.05
    assert "sampler" not in stated and list(stated["weights"]) == ["autoencoder", "diffusion"]
    rows = read_table(work["out"] / "participants.tsv")
    assert [row["age_years"] for row in rows] == ["65.0", "80.0"]
    scan = read_image(work["scan"]).data
    for row in rows:
        volume, name = read_image(work["out"] / row["path"]).data, row["participant_id"]
        difference = read_image(work["out"] / f"{name}_difference.nii.gz").data
        assert np.abs(volume - scan - difference).max() < 0.01
        assert Image.open(work["out"] / f"{name}.png").size[0] > 100
    film: Any = Image.open(work["out"] / "sub-1_edit-000.gif")
    assert film.n_frames == 2


def test_the_same_edit_is_kept_and_another_is_refused(work: dict[str, Any], run_here: RunHere) -> None:
    files = {path: path.stat().st_mtime_ns for path in work["out"].glob("*.nii.gz")}
    flags = {**work["flags"], "scan": str(work["scan"]), "output_dir": str(work["out"])}
    run_here([BASE, EDIT, TINY], **flags, age_years="+5,+20")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "of another request" in refused(run_here, [BASE, EDIT, TINY], **flags, age_years="+6,+20")


def test_an_edit_to_its_own_conditions_is_the_scan(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    """And an answer is edited by the table beside it."""
    chained = work["out"] / "sub-1_edit-000-01_space-MNI152_T1w.nii.gz"
    flags = {**work["flags"], "scan": str(chained)}
    run_here([BASE, EDIT, TINY], **flags, age_years="+0", output_dir=str(tmp_path / "out"))
    [path] = (tmp_path / "out").glob("*_T1w.nii.gz")
    assert np.abs(read_image(path).data - read_image(chained).data).max() < 0.01
    assert json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())["changed_share"] < 1e-3


def test_a_table_edits_many_in_pixel_space_too(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    config = configuration([PIXEL, TINY], **SMALLEST)
    torch.manual_seed(0)
    network, grid = config.get_parsed_content("network_def"), config.get_parsed_content("grid")
    torch.save({"diffusion": network.state_dict(), "facts": {"family": "pixel_diffusion"}}, tmp_path / "pixel.pt")
    for number in range(2):
        write_volume(tmp_path / f"head-{number}.nii.gz", head(grid, number).numpy(), grid)
    own = {"own_sex": "female", "own_age_years": 50, "own_brain_vol": 0.5}
    rows = [
        {"scan": "head-0.nii.gz", "age_years": "*1.2", "ventricular_vol": "n/a", "site": "a", **own},
        {"scan": "head-1.nii.gz", "age_years": "n/a", "ventricular_vol": "0.3,0.6", "site": "n/a", **own},
    ]
    write_table(tmp_path / "edits.tsv", rows)
    flags = {
        "diffusion_path": str(tmp_path / "pixel.pt"),
        "measure": 0,
        "inversion_steps": 1,
        "inversion_tolerance": 0.1,
    }
    flags |= {"conditions_table": str(tmp_path / "edits.tsv"), "output_dir": str(tmp_path / "out"), **SMALLEST}
    run_here([BASE, EDIT, PIXEL, TINY], **flags)
    made = read_table(tmp_path / "out" / "participants.tsv")
    assert [row["participant_id"] for row in made] == ["head-0_edit-000", "head-1_edit-001-00", "head-1_edit-001-01"]
    assert made[0]["age_years"] == "60.0" and made[0]["site"] == "a" and made[2]["site"] == "n/a"
    stated = json.loads((tmp_path / "out" / "head-0_edit-000_space-MNI152_T1w.json").read_text())
    assert stated["family"] == "pixel_diffusion" and stated["own_conditions_from"]["ventricular_vol_mm3"] == "assumed"


def test_native_space_on_request(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    grid = configuration().get_parsed_content("grid")
    raw, scan = tmp_path / "raw.nii.gz", tmp_path / "sub-9_space-MNI152_T1w.nii.gz"
    write_volume(scan, head(grid, 1).numpy(), grid)
    shifted = np.eye(4)
    shifted[:3, 3] = 4.0, -3.0, 2.0
    nib.save(nib.Nifti1Image(np.zeros((20, 22, 24), np.float32), np.diag([6.0, 6.0, 6.0, 1.0])), raw)  # type: ignore
    (tmp_path / "sub-9_space-MNI152_T1w.json").write_text(json.dumps({"template_to_scan_mm": shifted.tolist()}))
    flags = {**work["flags"], "scan": str(scan), "native_scan": str(raw), "own": {"sex": "male"}, "strength": 0.5}
    run_here([BASE, EDIT, TINY], **flags, age_years=70, output_dir=str(tmp_path / "out"))
    native = read_image(tmp_path / "out" / "sub-9_edit-000_space-native_T1w.nii.gz")
    assert native.data.shape == (20, 22, 24) and np.allclose(native.affine, np.diag([6.0, 6.0, 6.0, 1.0]))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"scan": None}, "nothing to edit"),
    ({"scan": "missing.nii.gz"}, "is not there"),
    ({"scan": "raw.nii.gz"}, "not 0 to 1: prepare it first"),
    ({"scan": "other.nii.gz", "resample_to_grid": 0}, "shape .* prepare it first"),
    ({"scan": "constant.nii.gz"}, "there is no head"),
    ({"scan": "nan.nii.gz"}, "NaN"),
    ({"age_years": None}, "nothing is to change"),
    ({"age_years": 300}, "far outside"),
    ({"own": {"iq": 100}}, "iq, which is no condition"),
    ({"missing_conditions": "error", "scan": "bare.nii.gz"}, "sex of .* is not known"),
    ({"missing_conditions": "random"}, "default or error"),
    ({"native_scan": "missing.nii.gz"}, "is not there"),
    ({"strength": 0.01}, "--strength 0.01 of 2 steps is none"),
    ({"strength": 2}, "--strength"),
    ({"guidance": 2.0}, "--guidance needs a model"),
    ({"output_dtype": "int7"}, "--output_dtype"),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=[said for _, said in BAD])
def test_what_cannot_be_edited_is_one_line_and_leaves_nothing(
    flags: dict[str, Any], said: str, work: dict[str, Any], run_here: RunHere, tmp_path: Path
) -> None:
    grid = configuration().get_parsed_content("grid")
    volume = head(grid, 1).numpy()
    write_volume(tmp_path / "bare.nii.gz", volume, grid)
    nib.save(nib.Nifti1Image(volume * 900.0, grid.affine), tmp_path / "raw.nii.gz")  # type: ignore[attr-defined]
    nib.save(nib.Nifti1Image(volume[:-2], grid.affine), tmp_path / "other.nii.gz")  # type: ignore[attr-defined]
    nib.save(nib.Nifti1Image(np.ones_like(volume), grid.affine), tmp_path / "constant.nii.gz")  # type: ignore
    broken = np.where(volume > 0.6, np.nan, volume)
    nib.save(nib.Nifti1Image(broken, grid.affine), tmp_path / "nan.nii.gz")  # type: ignore[attr-defined]
    before = {"scan": str(work["scan"]), "age_years": 70, "output_dir": str(tmp_path / "out")}
    paths = {name: str(tmp_path / value) for name, value in flags.items() if str(value).endswith(".nii.gz")}
    error = refused(run_here, [BASE, EDIT, TINY], **{**work["flags"], **before, **flags, **paths})
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_another_contrast_is_refused(tmp_path: Path) -> None:
    template, brain = read_on_grid(TEMPLATE, COARSE), read_on_grid(BRAIN, COARSE, mode="nearest")
    level = float(np.percentile(template, 99.8))
    for name, volume in (("t1", template / level), ("turned", np.where(brain > 0, 1.0 - template / level, 0.3))):
        write_volume(tmp_path / f"{name}.nii.gz", volume.clip(0.0, 1.0), COARSE)
    check_t1_weighted(tmp_path / "t1.nii.gz")
    assert "turned.nii.gz is not like the T1-weighted template" in refused(
        check_t1_weighted, tmp_path / "turned.nii.gz"
    )


def test_a_gan_has_no_way_back() -> None:
    family = configuration(family="lsgan", generator_path="none").get_parsed_content("generator_def")
    assert "no way from a volume to its noise" in refused(diffusion_family, family)


@pytest.mark.slow
def test_trained_latents_come_back(work: dict[str, Any]) -> None:
    """The networks of the tiny training, 50 steps, float32."""
    config = configuration(**{k: v for k, v in work["flags"].items() if k.endswith("_path") or k == "load_old"})
    family = config.get_parsed_content("chosen_family")
    assert content(Path(work["flags"]["diffusion_path"]))["facts"]["target"] == "epsilon"
    volume = torch.from_numpy(read_image(work["scan"]).data)[None, None]
    with torch.no_grad():
        clean, condition = family.encode(volume), torch.full((1, 4), 0.5)
        path, denoise = ReversiblePath(family.sampler.schedule, 50), family.denoiser(condition)
        out = path.walk(denoise, clean, 0, 50)
        back = path.walk(denoise, out.latent, 50, 0)
    assert float((back.latent - clean).abs().max()) < 1e-3
