# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A model without conditions: trained, fine-tuned, sampled, drawn and evaluated as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BASE, TINY, RunBundle, RunHere
from heads import refused
from released import configuration
from trained import DIFFUSION, content

from scripts.conditions.conditions import Conditions
from scripts.core.command_line import main
from scripts.networks.weights import Checkpoint
from scripts.preparation.covariates import CovariateReader
from scripts.training.finetuning import fit_conditions

NONE = "configs/unconditional.yaml"
FIGURES, EVALUATE, FINETUNE = (f"configs/{name}.yaml" for name in ("figures", "evaluate", "finetune"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, trained_folder: Path, run_here: RunHere) -> dict[str, Any]:
    """Flags of a model without conditions that was trained for an epoch, a figure included."""
    folder = tmp_path_factory.mktemp("unconditional")
    autoencoder = {"autoencoder_path": str(trained_folder / "autoencoder" / "autoencoder.pt"), "load_old": 0}
    training = {"latents_dir": str(trained_folder / "latents"), "run_dir": str(folder / "run"), "max_epochs": 1}
    run_here([BASE, DIFFUSION, NONE, TINY], **autoencoder, **training, seed=1, sample_every=1, num_inference_steps=2)
    model = {"diffusion_path": str(folder / "run" / "diffusion.pt"), **autoencoder}
    run_here([BASE, NONE, TINY], **model, seed=1, num_samples=3, num_inference_steps=2, output_dir=str(folder / "out"))
    return {"folder": folder, "latents": training["latents_dir"], "model": model}


def test_training_states_that_there_are_none(work: dict[str, Any]) -> None:
    trained = content(Path(work["model"]["diffusion_path"]))
    assert trained["facts"]["conditions"] == {}
    assert not any("attn2" in name for name in trained["diffusion"]), "no cross-attention to nothing"
    assert list((work["folder"] / "run" / "figures").glob("samples_*.png"))


def test_samples_are_what_their_seed_says(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    stated = [json.loads(path.read_text()) for path in sorted((work["folder"] / "out").glob("*.json"))]
    assert [one["conditions"] for one in stated] == [{}, {}, {}]
    (tmp_path / "rows.tsv").write_text("site\nA\nB\nA\n")
    flags = {**work["model"], "seed": 1, "num_inference_steps": 2, "conditions_table": str(tmp_path / "rows.tsv")}
    run_here([BASE, NONE, TINY], **flags, batch_size=2, output_dir=str(tmp_path / "out"))
    for path in sorted((work["folder"] / "out").glob("*.nii.gz")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    (tmp_path / "rows.tsv").write_text("age_years\n50\n")
    told = refused(run_here, [BASE, NONE, TINY], **flags, output_dir=str(tmp_path / "never"))
    assert told == f"the column age_years of {tmp_path / 'rows.tsv'} has no effect here: the model has no conditions"


@pytest.mark.parametrize("flag", ["age", "age_years"])
def test_a_condition_is_refused_by_both_commands(
    flag: str, run_bundle: RunBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_bundle([BASE, NONE, TINY], f"--{flag}", "0.7", "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and f"--{flag} has no effect here: the model has no conditions" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert main(["sample", "--with", "unconditional", f"--{flag}", "0.7"]) == 2
    assert f"--{flag} has no effect here: the model has no conditions" in capsys.readouterr().err


def test_help_has_no_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--with", "unconditional", "--help"]) == 0
    told = capsys.readouterr().out
    assert "\n  --gender" not in told and "\n  --sex" not in told and "\n  --num_samples" in told


def test_fine_tuning_starts_from_the_same(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    flags = {"latents_dir": work["latents"], "run_dir": str(tmp_path), **work["model"], "seed": 1, "max_epochs": 1}
    run_here([BASE, DIFFUSION, FINETUNE, NONE, TINY], **flags, lr=1e-9)
    before, after = content(Path(work["model"]["diffusion_path"])), content(tmp_path / "diffusion.pt")
    for name, tensor in before["diffusion"].items():
        assert torch.allclose(tensor, after["diffusion"][name], atol=1e-6), name


def test_weights_of_the_other_kind_are_refused(work: dict[str, Any], trained_folder: Path, run_here: RunHere) -> None:
    conditioned = str(trained_folder / "diffusion" / "diffusion.pt")
    flags = {**work["model"], "output_dir": str(work["folder"] / "never"), "seed": 1}
    told = refused(run_here, [BASE, NONE, TINY], **{**flags, "diffusion_path": conditioned})
    assert "was trained with gender, age" in told and "fine-tune" not in told
    assert "was trained with no conditions" in refused(run_here, [BASE, TINY], **flags)
    start = {"latents_dir": work["latents"], "run_dir": str(work["folder"] / "no"), "autoencoder_path": "x"}
    told = refused(run_here, [BASE, DIFFUSION, FINETUNE, NONE, TINY], **{**flags, **start, "pretrained": conditioned})
    assert "neither can start from the other's weights" in told
    assert not (work["folder"] / "never").exists() and not (work["folder"] / "no").exists()


def test_weights_that_state_nothing_may_have_none() -> None:
    config = configuration([NONE, TINY])
    network, none = config.get_parsed_content("network_def"), Conditions()
    given = Checkpoint(Path("model.pt"), {name: torch.ones_like(t) for name, t in network.state_dict().items()})
    assert fit_conditions(network, given, none).state_dict()["out.2.conv.bias"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("overlays", "flags", "told"),
    [
        ([DIFFUSION], {"condition_dropout": 0.1}, "--condition_dropout hides conditions"),
        ([FIGURES], {}, "there is no condition 'ventricular_vol'; there are none"),
        ([], {"guidance": 2.0}, "--guidance needs a model that was trained with --condition_dropout"),
    ],
)
def test_what_needs_conditions_says_so(
    overlays: list[str], flags: dict[str, Any], told: str, work: dict[str, Any], run_here: RunHere, tmp_path: Path
) -> None:
    given = {**work["model"], "output_dir": str(tmp_path / "out"), "seed": 1, **flags}
    given |= {"latents_dir": work["latents"], "run_dir": str(tmp_path / "run")} if DIFFUSION in overlays else {}
    assert told in refused(run_here, [BASE, *overlays, NONE, TINY], **given)
    assert not list(tmp_path.iterdir())


def test_a_map_without_a_target_says_what_to_write(run_here: RunHere, tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text(yaml.safe_dump({"conditions": {}}))
    told = refused(run_here, [BASE, tmp_path / "none.yaml", TINY], output_dir=str(tmp_path / "out"))
    assert "begins with `_target_: scripts.conditions.conditions.Conditions`" in told


@pytest.mark.parametrize("overlays", [[], [NONE]])
def test_evaluation_leaves_out_what_was_not_asked_for(
    overlays: list[str], work: dict[str, Any], run_here: RunHere, tmp_path: Path
) -> None:
    folders = {"synthetic_dir": str(work["folder"] / "out"), "output_dir": str(tmp_path)}
    run_here([BASE, EVALUATE, *overlays, TINY], **folders, num_pairs=1)
    measures = json.loads((tmp_path / "evaluation.json").read_text())["measures"]
    assert measures["volumetry"]["status"] == "not requested"


def test_preparing_carries_nothing_over() -> None:
    assert CovariateReader(Conditions(), {"age_years": "age"}, {}, {"age_years": [0, 120]}, []).columns == {}


def test_export_has_no_context(work: dict[str, Any]) -> None:
    config = configuration([NONE, TINY], **work["model"], device="cpu", fast=0)
    (diffusion, _), _ = config.get_parsed_content("chosen_family").export()
    assert list(diffusion.inputs) == ["x", "timesteps"]
    assert diffusion.network(**diffusion.inputs).shape == diffusion.inputs["x"].shape
