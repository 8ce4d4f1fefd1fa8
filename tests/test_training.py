# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Both trainings, on four made-up heads at tiny size."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import head, refused
from monai.utils import set_determinism
from trained import Pipeline, content, same

from scripts.autoencoder.latents import latents
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.tables import read_table, write_table
from scripts.training.engine import Facts
from scripts.volumes.datasets import LoadVolumed, RandFillMissingd, participants
from scripts.volumes.grid import Grid
from scripts.volumes.nifti import write_volume


@pytest.fixture(autouse=True)
def fewer_surprises() -> Iterator[None]:
    """The same random numbers in every run of a test, and MONAI's determinism off after it."""
    torch.manual_seed(0)
    yield
    set_determinism(None)


@pytest.fixture(scope="module")
def done(trained_folder: Path, run_here: RunHere) -> Pipeline:
    """Both stages trained for two epochs. Tests must not change it: see `work`."""
    return Pipeline(trained_folder, run_here)


@pytest.fixture
def work(done: Pipeline, tmp_path: Path, run_here: RunHere) -> Pipeline:
    """A copy of the trained pipeline, to go on with."""
    shutil.copytree(done.folder, tmp_path / "work")
    return Pipeline(tmp_path / "work", run_here)


# From a dataset to samples.


def test_checkpoints_hold_all_that_is_needed(done: Pipeline, conditions: Conditions) -> None:
    for folder, networks in ((done.autoencoder, {"autoencoder", "discriminator"}), (done.diffusion, {"diffusion"})):
        saved = content(folder / "checkpoint_iteration=4.pt")
        done_so_far = {"epoch": 2, "iteration": 4, "seed": 1, "samples": 3, "batch": 2}
        assert {name: saved["trainer"][name] for name in done_so_far} == done_so_far
        assert networks <= saved.keys() and {"facts", "config", "code"} <= saved.keys()
        assert json.loads(saved["config"])["max_epochs"] == 2
        assert list(folder.glob("events.out.tfevents*"))


def test_results_hold_weights_and_facts_alone(done: Pipeline, conditions: Conditions) -> None:
    saved = content(done.autoencoder / "autoencoder.pt")
    assert saved.keys() == {"autoencoder", "facts"}
    assert saved["facts"] == {"network": "autoencoder", "channels": [8, 8, 16], "latent_channels": 3, "iteration": 4}
    saved = content(done.diffusion / "diffusion.pt")
    assert saved.keys() == {"diffusion", "facts"}
    assert saved["facts"]["conditions"] == conditions.as_dict()
    assert saved["facts"]["target"] == "epsilon" and saved["facts"]["schedule"]["num_train_timesteps"] == 1000


def test_sampling_takes_what_was_trained(done: Pipeline, run_here: RunHere, tmp_path: Path) -> None:
    scale = content(done.diffusion / "diffusion.pt")["facts"]["latent_scale"]
    flags = {**done.trained(), "diffusion_path": str(done.diffusion / "diffusion.pt"), "num_inference_steps": 2}
    workflow = run_here([BASE, TINY], output_dir=str(tmp_path), seed=1, **flags)
    family = workflow.parser.get_parsed_content("chosen_family")
    latent = torch.randn(1, *workflow.parser.get_parsed_content("latent_shape"))
    with torch.no_grad():
        expected = family.autoencoder.decode_stage_2_outputs(latent / scale)
    assert scale != 1.0 and torch.equal(family.decode(latent), expected)
    assert f'"latent_scale": {scale}' in (tmp_path / "sample_seed-1_000000.json").read_text()


def test_sampling_with_other_conditions_than_in_training(done: Pipeline, run_here: RunHere, tmp_path: Path) -> None:
    flags = {**done.trained(), "diffusion_path": str(done.diffusion / "diffusion.pt"), "output_dir": str(tmp_path)}
    assert "was trained with age (age_years, 44 to 82 years)" in refused(
        run_here, [BASE, TINY], **{**flags, "conditions::age::maximum": 90}
    )
    assert list(tmp_path.iterdir()) == []


def test_options_of_both_trainings(work: Pipeline) -> None:
    """Crops, a cache, given weights, a falling rate, a narrow posterior, and all that saves memory."""
    small = {"accumulate": 2, "gradient_checkpointing": 1, "channels_last": 1}
    options = {"max_epochs": 1, "lr_decay": "cosine", "lr_warm_up": 1, "ema_decay": 0.9, **small}
    crops = {"patch_shape": [24, 24, 24], "cache_rate": 1.0, "initial_log_variance": -8.0, "warm_up_epochs": 0}
    pretrained = str(work.autoencoder / "autoencoder.pt")
    work.train_autoencoder(run_dir=str(work.folder / "other"), pretrained=pretrained, amp="bf16", **crops, **options)
    saved = content(work.folder / "other" / "autoencoder.pt")
    assert saved["facts"]["iteration"] == 2 and saved["autoencoder_ema"]["updates"] == 2
    pretrained = str(work.diffusion / "diffusion.pt")
    more = {"condition_dropout": 0.5, "timestep_density": "logit-normal", "min_snr_gamma": 5}
    where = {"run_dir": str(work.folder / "another"), "pretrained": pretrained}
    work.train_diffusion(**where, epoch_length=1, amp="fp16", **more, **options)
    saved = content(work.folder / "another" / "diffusion.pt")
    assert saved["facts"]["iteration"] == 1 and saved["facts"]["condition_dropout"] == 0.5
    assert saved["diffusion_ema"]["updates"] == 1


@pytest.mark.parametrize("target", ["sample", "velocity", "flow"])
def test_targets_reach_sampling_through_the_checkpoint(target: str, work: Pipeline, tmp_path: Path) -> None:
    folder = work.folder / target
    work.train_diffusion(run_dir=str(folder), target=target, max_epochs=1, ema_decay=0.9)
    flags = {**work.trained(), "diffusion_path": str(folder / "diffusion.pt"), "output_dir": str(tmp_path / "out")}
    told = refused(work.run_here, [BASE, TINY], **flags, num_inference_steps=2)
    assert f"was trained for the target {target}, not epsilon: give --target {target}" in told
    work.run_here([BASE, TINY], **flags, target=target, num_inference_steps=2)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1


def test_sampling_takes_the_averaged_weights(work: Pipeline, run_here: RunHere, tmp_path: Path) -> None:
    folder = work.folder / "averaged"
    work.train_diffusion(run_dir=str(folder), ema_decay=0.99)
    saved = content(folder / "diffusion.pt")
    assert not same(saved["diffusion"], saved["diffusion_ema"]["weights"])
    flags = {**work.trained(), "diffusion_path": str(folder / "diffusion.pt"), "num_inference_steps": 1}
    workflow = run_here([BASE, TINY], output_dir=str(tmp_path / "out"), **flags)
    used = workflow.parser.get_parsed_content("diffusion").state_dict()
    assert same(used, saved["diffusion_ema"]["weights"])


# Stopping and going on. That a killed training ends in the same weights is in test_resume.py.


def test_rerun_of_a_finished_training_changes_nothing(work: Pipeline) -> None:
    before = content(work.autoencoder / "autoencoder.pt")
    work.train_autoencoder()
    assert same(content(work.autoencoder / "autoencoder.pt")["autoencoder"], before["autoencoder"])


def steps_of(optimisation: dict[str, Any]) -> set[int]:
    return {int(state["step"]) for state in optimisation["optimizer"]["state"].values()}


def test_more_epochs_go_on_from_the_last(work: Pipeline) -> None:
    work.train_diffusion(max_epochs=3)
    assert steps_of(content(work.diffusion / "checkpoint_iteration=6.pt")["optimisation"]) == {6}
    work.train_autoencoder(max_epochs=3)
    names = sorted(path.name for path in work.autoencoder.glob("checkpoint*"))
    assert names == ["checkpoint_iteration=4.pt", "checkpoint_iteration=6.pt"]
    saved = content(work.autoencoder / "checkpoint_iteration=6.pt")
    assert steps_of(saved["optimisation"]) == {6}
    assert steps_of(saved["discriminator_optimisation"]) == {4}  # it rested for one epoch


def test_a_changed_rate_is_taken_and_said(work: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        work.train_diffusion(max_epochs=3, lr=1.0e-5)
    assert "going on with --lr 1e-05, which was 0.001" in caplog.text
    saved = content(work.diffusion / "checkpoint_iteration=6.pt")
    assert [group["lr"] for group in saved["optimisation"]["optimizer"]["param_groups"]] == [1e-5]


def test_damaged_checkpoint_is_skipped(work: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    newest = work.diffusion / "checkpoint_iteration=4.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        work.train_diffusion(max_epochs=3)
    assert f"{newest} is damaged" in caplog.text
    assert f"resumed {work.diffusion / 'checkpoint_iteration=2.pt'}" in caplog.text
    assert content(work.diffusion / "diffusion.pt")["facts"]["iteration"] == 6


def test_resuming_another_model_is_refused(work: Pipeline) -> None:
    told = refused(work.train_diffusion, **{"max_epochs": 3, "network_def::channels": [16, 32, 48]})
    assert "cannot resume" in told and "its diffusion does not fit" in told and "--run_dir" in told
    told = refused(work.train_diffusion, **{"max_epochs": 3, "conditions::age::maximum": 90})
    assert "was trained with conditions" in told and "another --run_dir" in told
    told = refused(work.train_diffusion, max_epochs=3, target="velocity")
    assert "was trained with target epsilon, now it is velocity" in told
    assert content(work.diffusion / "diffusion.pt")["facts"]["iteration"] == 4


def test_facts_in_another_order_are_other_facts() -> None:
    facts = Facts(conditions={"age": {"maximum": 82}, "sex": {"maximum": 1}})
    facts.load_state_dict({"conditions": {"age": {"maximum": 82}, "sex": {"maximum": 1}}})
    with pytest.raises(BundleError, match="trained with conditions"):
        facts.load_state_dict({"conditions": {"sex": {"maximum": 1}, "age": {"maximum": 82}}})


def test_loss_that_is_not_finite_stops_the_training(done: Pipeline, tmp_path: Path) -> None:
    told = refused(done.train_autoencoder, run_dir=str(tmp_path), kl_weight=1e38)
    assert "'loss' is inf at iteration 1, on sub-" in told and "_T1w.nii.gz" in told
    assert "There is no checkpoint yet" in told
    assert list(tmp_path.glob("*.pt")) == []


def test_failed_training_keeps_the_result_of_the_one_before(work: Pipeline) -> None:
    before = (work.autoencoder / "autoencoder.pt").read_bytes()
    told = refused(work.train_autoencoder, max_epochs=3, kl_weight=1e38)
    assert f"The last good checkpoint is {work.autoencoder / 'checkpoint_iteration=4.pt'}" in told
    assert (work.autoencoder / "autoencoder.pt").read_bytes() == before


# Data that is not as it should be.


def test_participants_read_their_conditions(done: Pipeline, conditions: Conditions) -> None:
    rows = participants(str(done.dataset), conditions)
    assert rows[1]["condition"].tolist() == pytest.approx([1.0, 16 / 38, 0.13994, 0.54761], abs=1e-4)
    assert rows[1]["image"] == str(done.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz")


def edit(folder: Path, **changes: object) -> None:
    """Change cells of the second row."""
    rows: list[dict[str, object]] = [dict(row) for row in read_table(folder / "participants.tsv")]
    rows[1].update(changes)
    write_table(folder / "participants.tsv", rows)


def test_missing_condition_stops_unless_told_otherwise(work: Pipeline, conditions: Conditions) -> None:
    edit(work.latents, age_years=None)
    told = refused(work.train_diffusion, run_dir=str(work.folder / "other"))
    assert "participant sub-1 in" in told and "no value of 'age_years'" in told
    rows = latents(str(work.latents), conditions, "default")
    assert rows[1]["condition"][1] == 0.5
    assert not (work.folder / "other").exists()


def test_unknown_condition_is_drawn_anew_each_time() -> None:
    row: Any = {"condition": torch.tensor([0.3, float("nan"), 1.7])}
    drawn = torch.stack([RandFillMissingd("condition")(row)["condition"] for _ in range(200)])
    assert (drawn[:, 0] == 0.3).all() and (drawn[:, 2] == 1.7).all()
    assert drawn[:, 1].min() >= 0.0 and drawn[:, 1].max() <= 1.0 and len(drawn[:, 1].unique()) > 100
    assert row["condition"][1].isnan()


def test_scan_that_is_missing(work: Pipeline) -> None:
    (work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz").unlink()
    for verb in (work.train_autoencoder, work.encode):
        told = refused(verb, **{"run_dir": str(work.folder / "other")} if verb == work.train_autoencoder else {})
        assert "participant sub-1 in" in told and "no such file" in told


@pytest.mark.parametrize("workers", [0, 1])
def test_scan_that_is_damaged_is_named_during_training(workers: int, work: Pipeline) -> None:
    path = work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    told = refused(work.train_autoencoder, run_dir=str(work.folder / "other"), num_workers=workers)
    assert f"{path} cannot be read: it is truncated or damaged" in told and "\n" not in told
    assert list((work.folder / "other").glob("*.pt")) == []


def test_bad_scan_is_refused_before_the_first_step(work: Pipeline, grid: Grid) -> None:
    """Even where it would be loaded last: by its header, in whichever split it is."""
    path, where = work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz", str(work.folder / "other")
    finer = Grid((40, 56, 40), [s * 0.8 for s in grid.spacing], grid.origin)
    write_volume(path, head(finer, 0).numpy(), finer)
    told = refused(work.train_autoencoder, run_dir=where, resample_to_grid=False)
    assert f"the volume {path} has shape (40, 56, 40), not (32, 48, 32)" in told
    path.write_bytes(b"no volume")
    assert f"{path} cannot be read: it is neither NIfTI nor MGH" in refused(work.train_autoencoder, run_dir=where)
    assert not Path(where).exists()


def test_scan_on_another_grid(tmp_path: Path, grid: Grid) -> None:
    finer = Grid((40, 56, 40), [s * 0.8 for s in grid.spacing], grid.origin)
    write_volume(tmp_path / "x.nii.gz", head(finer, 0).numpy(), finer)
    row: Any = {"image": str(tmp_path / "x.nii.gz")}
    assert "has shape (40, 56, 40), not (32, 48, 32)" in refused(LoadVolumed("image", grid), row)
    assert LoadVolumed("image", grid, resample=True)(row)["image"].shape == (1, 32, 48, 32)


def test_resampling_keeps_positions_in_the_world(tmp_path: Path, grid: Grid) -> None:
    finer = Grid((64, 96, 64), [s / 2 for s in grid.spacing], grid.origin)
    x, y, z = torch.meshgrid(*(torch.linspace(0, 1, n) for n in finer.shape), indexing="ij")
    write_volume(tmp_path / "x.nii.gz", ((x + 2 * y + 4 * z) / 7).numpy(), finer, "float32")
    volume = LoadVolumed("image", grid, resample=True)({"image": str(tmp_path / "x.nii.gz")})["image"][0]
    assert torch.allclose(volume[:31, :47, :31], ((x + 2 * y + 4 * z) / 7)[::2, ::2, ::2][:31, :47, :31], atol=1e-4)


def test_folder_that_is_no_dataset(tmp_path: Path, conditions: Conditions) -> None:
    assert "prepare a dataset first" in refused(participants, str(tmp_path), conditions)
    write_table(tmp_path / "participants.tsv", [{"participant_id": 1, "file": "x"}])
    assert "no column 'path'" in refused(participants, str(tmp_path), conditions)
