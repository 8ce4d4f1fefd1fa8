# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""A family that the bundle does not know: all of sampling works with it, and needs no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import BASE, TINY, RunBundle, RunHere
from heads import refused
from released import configuration
from torch import nn
from toy_family import Blobs

from scripts.conditions.conditions import Conditions
from scripts.diffusion.validation import SampleFigure

TABLE = "sex\tage_years\tventricular_vol\tbrain_vol\nfemale\t50\t0.2\t0.6\nmale\t75\t0.6\t0.4\nmale\t60\t0.5\t0.5\n"


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A configuration file of a user who has a family of his own: one entry."""
    blobs = {"_target_": "toy_family.Blobs", "grid": "@grid", "conditions": "@conditions"}
    (tmp_path / "blobs.yaml").write_text(yaml.safe_dump({"family": "blobs", "families": {"blobs": blobs}}))
    return tmp_path / "blobs.yaml"


@pytest.fixture
def added(tmp_path: Path) -> Path:
    """The same beside the bundle's own families."""
    blobs = {"_target_": "toy_family.Blobs", "grid": "@grid", "conditions": "@conditions"}
    (tmp_path / "added.yaml").write_text(yaml.safe_dump({"+families": {"blobs": blobs}}))
    return tmp_path / "added.yaml"


def volumes(folder: Path) -> dict[str, np.ndarray]:
    images: dict[str, Any] = {path.name: nib.load(path) for path in sorted(folder.glob("*.nii.gz"))}
    return {name: np.asarray(image.dataobj.get_unscaled()) for name, image in images.items()}


def sidecars(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_table_is_sampled_on_the_command_line(
    run_bundle: RunBundle, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "conditions.tsv").write_text(TABLE)
    flags = ["--conditions_table", tmp_path / "conditions.tsv", "--seed", 3, "--output_dir", tmp_path / "samples"]
    done = run_bundle([BASE, overlay, TINY], *flags, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    first, *_ = stated = sidecars(tmp_path / "samples")
    assert len(stated) == len(volumes(tmp_path / "samples")) == 3
    assert (first["family"], first["contrast"], first["conditions"]["age_years"]) == ("blobs", 1.0, 50)
    assert "weights" not in first and "sampler" not in first
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


def test_one_seed_is_one_volume_whatever_the_batch(run_here: RunHere, overlay: Path, tmp_path: Path) -> None:
    for size in (1, 2, 3):
        where = str(tmp_path / str(size))
        flags: dict[str, Any] = {"seed": 4, "num_samples": 3, "output_dir": where, "families::blobs::contrast": 0.7}
        run_here([BASE, overlay, TINY], batch_size=size, **flags)
    one, two, three = (volumes(tmp_path / str(size)) for size in (1, 2, 3))
    assert len(one) == 3 and one.keys() == two.keys() == three.keys()
    assert all(np.array_equal(one[name], two[name]) and np.array_equal(one[name], three[name]) for name in one)
    first, second, _ = one.values()
    assert not np.array_equal(first, second)
    assert 0 < first.min() < 100 < first.max() < 255, "the range is 0..1, of which uint8 is 255 parts"


def test_samples_of_the_same_facts_are_kept_and_others_refused(
    run_here: RunHere, added: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: list[str | Path] = [BASE, added, TINY]
    flags: dict[str, Any] = {"family": "blobs", "seed": 4, "output_dir": str(tmp_path / "samples")}
    run_here(files, **flags)
    with caplog.at_level("INFO"):
        run_here(files, **flags)
    assert any("1 of 1 samples" in message for message in caplog.messages)
    assert "made with other settings" in refused(run_here, files, **flags, **{"families::blobs::contrast": 2.0})


def test_figures_and_side_by_side(run_here: RunHere, overlay: Path, tmp_path: Path) -> None:
    cells = {"rows": [{"gender": 0}, {"gender": 1}], "columns": [{}], "output_dir": str(tmp_path / "grid")}
    run_here([BASE, "configs/figures.yaml", overlay, TINY], **cells)
    dark, bright = volumes(tmp_path / "grid").values()
    assert (tmp_path / "grid" / "volumes.png").is_file() and bright.mean() > dark.mean() + 30
    models = {"blobs": str(tmp_path / "grid"), "again": str(tmp_path / "grid")}
    run_here([BASE, "configs/side_by_side.yaml", TINY], models=models, count=2, output_dir=str(tmp_path / "side"))
    assert (tmp_path / "side" / "models.png").is_file()


@pytest.mark.slow
def test_obedience_from_samples_to_the_report(run_here: RunHere, overlay: Path, tmp_path: Path) -> None:
    moved, report = str(tmp_path / "obedience"), tmp_path / "evaluation"
    run_here([BASE, "configs/obedience.yaml", overlay, TINY], num_heads=2, levels=[0.0, 1.0], output_dir=moved)
    first, *_, back = (one for one in sidecars(tmp_path / "obedience") if one.get("noise_of_index", one["index"]) == 0)
    assert first["conditions"] == back["conditions"] and len(volumes(tmp_path / "obedience")) == 2 * (1 + 1 + 6 + 1)
    flags: dict[str, Any] = {"synthetic_dir": moved, "num_pairs": 1, "pair_metrics": {}, "output_dir": str(report)}
    run_here([BASE, "configs/evaluate.yaml", overlay, TINY], **flags)
    rows = [
        row for row in json.loads((report / "evaluation.json").read_text())["rows"] if row["measure"] == "obedience"
    ]
    assert {row["value"] for row in rows if row["metric"] == "return"} == {0.0}
    assert (report / "obedience.png").is_file()


def test_figures_of_a_training(overlay: Path, tmp_path: Path) -> None:
    config = configuration([TINY, str(overlay)])
    blobs = config.get_parsed_content("chosen_family")
    network = nn.Linear(1, 1)
    SampleFigure(network, family=blobs, conditions=blobs.conditions, run_dir=tmp_path).evaluate(network, 3)
    free = Blobs(blobs.grid, Conditions())
    SampleFigure(network, family=free, conditions=free.conditions, run_dir=tmp_path).evaluate(network, 4)
    assert len(list((tmp_path / "figures").glob("samples_iteration-*.png"))) == 2


def test_a_family_without_conditions(run_here: RunHere, overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text(
        yaml.safe_dump({"conditions": {"_target_": "scripts.conditions.conditions.Conditions"}})
    )
    files: list[str | Path] = [BASE, overlay, TINY, tmp_path / "none.yaml"]
    run_here(files, seed=4, num_samples=2, batch_size=2, output_dir=str(tmp_path / "samples"))
    assert [stated["conditions"] for stated in sidecars(tmp_path / "samples")] == [{}, {}]
    first, second = volumes(tmp_path / "samples").values()
    assert not np.array_equal(first, second)
    told = refused(run_here, files, seed=4, age=0.5, output_dir=str(tmp_path / "samples"))
    assert told == "--age has no effect here: the model has no conditions"


def test_conditions_given_to_a_family_that_takes_none(
    run_here: RunHere, added: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though four are configured, for other families."""
    monkeypatch.setattr(Blobs, "conditional", False)
    files: list[str | Path] = [BASE, added, TINY]
    flags: dict[str, Any] = {"family": "blobs", "seed": 4, "output_dir": str(tmp_path / "samples")}
    (tmp_path / "conditions.tsv").write_text(TABLE)
    told = refused(run_here, files, **flags, age=0.7)
    assert told == "--age 0.7: the family blobs has no conditions: leave it out"
    told = refused(run_here, files, **flags, conditions_table=str(tmp_path / "conditions.tsv"))
    assert "conditions.tsv has the column 'sex', but the family blobs has no conditions" in told
    grid: list[str | Path] = [BASE, "configs/figures.yaml", added, TINY]
    told = refused(run_here, grid, **flags, rows=[{"age": 0}], columns=[{}])
    assert "there is no condition 'age'; there are none" in told
    assert not (tmp_path / "samples").exists()


def test_a_wrong_name_names_the_near_one(run_here: RunHere, added: Path, tmp_path: Path) -> None:
    told = refused(run_here, [BASE, added, TINY], family="blob", output_dir=str(tmp_path / "samples"))
    families = "latent_diffusion, lsgan, vae_gan, pixel_diffusion, blobs"
    assert told == f"--family must be one of {families}, got 'blob': did you mean blobs?"


def test_a_family_that_cannot_be_exported_says_so(run_here: RunHere, overlay: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    files: list[str | Path] = [BASE, "configs/export.yaml", overlay, TINY]
    assert "Blobs cannot be exported" in refused(run_here, files, export_dir=str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_weights_of_another_family_are_refused(run_here: RunHere, bundle_copy: Path, tmp_path: Path) -> None:
    state = torch.load(bundle_copy / "models" / "tiny_diffusion.pt", weights_only=True)
    flags = {"bundle_root": str(bundle_copy), "output_dir": str(tmp_path / "samples"), "num_inference_steps": 1}
    for stated in ("blobs", "latent_diffusion"):
        torch.save({"diffusion": state, "facts": {"family": stated}}, tmp_path / f"{stated}.pt")
    told = refused(run_here, [BASE, TINY], **flags, diffusion_path=str(tmp_path / "blobs.pt"))
    assert told.endswith("blobs.pt is of the family blobs, not latent_diffusion: give --family blobs")
    run_here([BASE, TINY], **flags, seed=1, diffusion_path=str(tmp_path / "latent_diffusion.pt"))
    (stated_facts,) = sidecars(tmp_path / "samples")
    assert list(stated_facts) == [  # what samples of versions before stated, and the hashes: with any other entry,
        # those would be refused
        *("conditions", "seed", "index", "sampler", "eta", "num_inference_steps", "guidance", "target", "schedule"),
        *("amp", "decoder_amp", "fast", "latent_scale", "weights", "dtype", "grid", "versions"),
        *("schema_version", "synthetic", "bundle", "files"),
    ]
