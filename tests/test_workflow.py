# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Flags and overlays as a whole: unknown names are refused with their near match, everything declared is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BASE, ROOT, TINY, RunHere

from scripts.core.config import current_config
from scripts.core.errors import BundleError, find_bundle_error

ONLY_FLAGS = {"run": ["$@check_flags()"]}


def refused(run_here: RunHere, *overlays: str | Path, **overrides: Any) -> str:
    """The error of a run that does nothing but check its flags."""
    with pytest.raises(Exception) as caught:
        run_here([BASE, *overlays], **{**ONLY_FLAGS, **overrides})
    error = find_bundle_error(caught.value)
    assert error is not None, caught.value
    return str(error)


def overlay(folder: Path, **content: Any) -> Path:
    """A configuration file of the user's own, outside configs/."""
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("gendr", "--gender"),
        ("age_year", "--age_years"),
        ("seeed", "--seed"),
        ("numsamples", "--num_samples"),
        ("outputdir", "--output_dir"),
        ("ventricular_volume_mm3", "--ventricular_vol_mm3"),
        ("Sampler", "--sampler"),
    ],
)
def test_mistyped_flag_names_the_near_one(flag: str, near: str, run_here: RunHere) -> None:
    told = refused(run_here, **{flag: 1})
    assert f"unknown flag --{flag}: did you mean" in told and near in told


def test_flag_like_no_other(run_here: RunHere) -> None:
    assert refused(run_here, xyzzy=1).startswith("unknown flag --xyzzy")


@pytest.mark.filterwarnings("ignore:Can't merge entry")
def test_mistyped_extension(run_here: RunHere) -> None:
    assert "--sampler" in refused(run_here, **{"+smplers": {}})


def test_every_flag_of_a_condition_is_known(run_here: RunHere) -> None:
    run_here([BASE], gender=1, age_years=63, ventricular_vol=0.5, brain_vol_mm3=1500000, **ONLY_FLAGS)


def test_flags_of_an_added_condition_are_known(run_here: RunHere, tmp_path: Path) -> None:
    thickness = {"raw": "thickness_mm", "unit": "mm", "minimum": 2.0, "maximum": 3.0}
    own = overlay(tmp_path, **{"conditions::thickness": thickness})
    run_here([BASE, own], thickness_mm=2.5, **ONLY_FLAGS)
    assert "--thickness_mm" in refused(run_here, own, thicknes_mm=2.5)


def test_nested_overrides_and_what_monai_defines_are_known(run_here: RunHere) -> None:
    nested = {"grid::shape": [32, 48, 32], "samplers::ddim::num_inference_steps": 5, "network_def#norm_eps": 1e-5}
    workflow = run_here([BASE, TINY], dataset_dir="x", **nested, **ONLY_FLAGS)
    assert workflow.parser.get_parsed_content("grid").shape == (32, 48, 32)
    assert len(workflow.parser.get_parsed_content("chosen_sampler").timesteps) == 5


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("train::batch_sise", "--batch_size"),
        ("train#batch_sise", "--batch_size"),
        ("train::trainr", "--train::trainer"),
        ("validate::held_ot", "--validate::held_out"),
        ("train::xyzzy", "docs/configuration.md"),
    ],
)
def test_mistyped_nested_flag_names_the_near_one(flag: str, near: str, run_here: RunHere) -> None:
    told = refused(run_here, "configs/train_diffusion.yaml", **{flag: 1})
    assert told.startswith("unknown flag --train::" if flag.startswith("train") else "unknown flag --validate::held_ot")
    assert near in told


@pytest.mark.parametrize("name", ["autoencoder", "diffusion", "brain_age", "segmenter"])
def test_every_training_checks_its_options_first(name: str, run_here: RunHere) -> None:
    for flag, value, told in (("log_every", 0, "must be at least 1"), ("lr", "fast", "must be a finite number")):
        with pytest.raises(Exception) as caught:
            run_here([BASE, f"configs/train_{name}.yaml", TINY], **{flag: value})
        assert f"--{flag} {told}" in str(find_bundle_error(caught.value))


def test_sections_take_what_something_reads(run_here: RunHere, tmp_path: Path) -> None:
    own = {"+train": {"rate": 1.0e-4, "own": {"_target_": "torch.nn.MSELoss"}}, "lr": "@train::rate"}
    own["+samplers"] = {"quick": {"_target_": "scripts.diffusion.samplers.DDIMSampler", "_mode_": "callable"}}
    own["+validate"] = {"evaluator": "@train::own"}
    run_here([BASE, "configs/train_diffusion.yaml", overlay(tmp_path, **own)], **ONLY_FLAGS)


@pytest.mark.parametrize("name", [file.name for file in sorted((ROOT / "configs").glob("*.yaml"))])
def test_overlays_of_the_bundle_hold_known_ids_alone(name: str, run_here: RunHere) -> None:
    run_here([BASE, f"configs/{name}", TINY], **ONLY_FLAGS)


def test_own_overlay_whose_ids_are_referred_to(run_here: RunHere, tmp_path: Path) -> None:
    run_here([BASE, overlay(tmp_path, my_age=70, age_years="@my_age")], **ONLY_FLAGS)
    assert "unknown flag --my_age" in refused(run_here, overlay(tmp_path, my_age=70))


def test_workflow_in_python_raises_with_the_bundles_error_as_a_cause(run_here: RunHere) -> None:
    with pytest.raises(Exception) as caught:
        run_here([BASE, TINY], gendr=1)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, BundleError):
        error = error.__cause__ or error.__context__
    assert "unknown flag --gendr" in str(error)


def test_configuration_is_known_only_while_it_is_evaluated() -> None:
    with pytest.raises(RuntimeError, match="no MONAI configuration"):
        current_config()
