# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""LSGAN and VAE-GAN as a user meets them: trained at tiny size on made-up heads, stopped, sampled, evaluated."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import refused, write_dataset
from monai.utils import set_determinism
from processes import Command, run_ranks
from released import configuration, need_memory
from trained import content, difference, same

from scripts.core.tables import read_table
from scripts.gan.losses import LSGANLoss, VAEGANLoss
from scripts.networks.weights import write_safetensors
from scripts.training.loss_record import read_lines

GAN = "configs/train_gan.yaml"
FAMILIES = ("lsgan", "vae_gan")
STEADIED = {"r1": 1.0, "r1_every": 2, "instance_noise": 0.05, "balance": 0.5}


@pytest.fixture(autouse=True)
def fewer_surprises() -> Iterator[None]:
    """MONAI's determinism is off after each test."""
    yield
    set_determinism(None)


class Baselines:
    """Trains and samples in this process, at tiny size, in one folder."""

    def __init__(self, folder: Path, run_here: RunHere) -> None:
        self.folder, self.run_here = folder, run_here

    def flags(self, family: str, **more: Any) -> dict[str, Any]:
        where = {"dataset_dir": str(self.folder / "dataset"), "run_dir": str(self.folder / family)}
        return {"family": family, "seed": 1, "diversity_volumes": 2, **where, **more}

    def train(self, family: str, **more: Any) -> None:
        self.run_here([BASE, GAN, TINY], **self.flags(family, **more))

    def sample(self, family: str, folder: Path, *overlays: str | Path, **more: Any) -> None:
        given = {"family": family, "generator_path": str(self.folder / family / f"{family}.pt"), "seed": 3, **more}
        self.run_here([BASE, *overlays, TINY], output_dir=str(folder), **given)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, run_here: RunHere) -> Baselines:
    """Both trained for two epochs on three of four heads. Tests must not change it."""
    baselines = Baselines(tmp_path_factory.mktemp("gan"), run_here)
    write_dataset(baselines.folder / "dataset", configuration().get_parsed_content("grid"))
    for family in FAMILIES:
        baselines.train(family)
    return baselines


def volumes(folder: Path) -> dict[str, np.ndarray]:
    images: dict[str, Any] = {path.name: nib.load(path) for path in sorted(folder.glob("*.nii.gz"))}
    return {name: np.asarray(image.dataobj.get_unscaled()) for name, image in images.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_leaves_what_the_others_leave(done: Baselines, family: str) -> None:
    run_dir = done.folder / family
    result, state = content(run_dir / f"{family}.pt"), content(run_dir / "checkpoint_iteration=4.pt")
    assert result.keys() == {"generator", "generator_ema", "facts"} and not (run_dir / "best.pt").exists()
    facts = {"network": "generator", "family": family, "noise_size": 16, "channels": [16, 16, 8, 8], "iteration": 4}
    assert result["facts"] == facts
    assert {"generator", "generator_ema", "discriminator", "optimisation", "discriminator_optimisation"} <= state.keys()
    assert ("encoder" in state) == (family == "vae_gan")
    lines = list(read_lines(run_dir / "losses.jsonl"))
    losses, validations = ([line[kind] for line in lines if kind in line] for kind in ("losses", "validation"))
    assert len(losses) == 4 and {"loss", "adversarial", "discriminator", "gradient_norm"} <= losses[0].keys()
    assert {"val_ms_ssim", "val_ms_ssim_real"} <= validations[-1].keys() and len(validations) == 2
    assert ("val_kl_per_value" in validations[-1] and "val_psnr" in validations[-1]) == (family == "vae_gan")
    assert len(list(run_dir.glob("figures/samples_*.png"))) == 2 and list(run_dir.glob("events.out.tfevents*"))
    assert lines[0]["rates"] == {"lr": 1e-3, "discriminator_lr": 4e-4}


def test_samples_are_those_of_the_average_and_of_their_seed(done: Baselines, tmp_path: Path) -> None:
    for size in (1, 2, 3):
        done.sample("lsgan", tmp_path / str(size), num_samples=3, batch_size=size)
    one, two, three = (volumes(tmp_path / str(size)) for size in (1, 2, 3))
    assert len(one) == 3 and all(np.array_equal(one[n], two[n]) and np.array_equal(one[n], three[n]) for n in one)
    assert len({volume.tobytes() for volume in one.values()}) == 3
    sidecar = json.loads(min((tmp_path / "1").glob("*.json")).read_text())
    assert (sidecar["family"], sidecar["conditions"], sidecar["seed"]) == ("lsgan", {}, 3)
    assert (
        sidecar["weights"]["generator"]["file"] == "lsgan.pt" and len(sidecar["weights"]["generator"]["sha256"]) == 64
    )
    assert len(list((tmp_path / "1").glob("*.png"))) == 3


def test_rows_of_a_table_are_sampled_and_a_rerun_keeps_them(
    done: Baselines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.tsv").write_text("note\nfirst\nsecond\n")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            done.sample("vae_gan", tmp_path / "out", conditions_table=str(tmp_path / "rows.tsv"), batch_size=2)
    assert "2 of 2 samples are in" in caplog.text and len(volumes(tmp_path / "out")) == 2
    told = refused(done.sample, "lsgan", tmp_path / "out", num_samples=2)
    assert "made with other settings" in told


def test_weights_as_safetensors_make_the_same_samples(done: Baselines, tmp_path: Path) -> None:
    small = tmp_path / "lsgan.safetensors"
    write_safetensors(small, done.folder / "lsgan" / "lsgan.pt", "generator", "float32")
    done.sample("lsgan", tmp_path / "of_pt")
    done.sample("lsgan", tmp_path / "of_safetensors", generator_path=str(small))
    (one,), (other,) = (volumes(tmp_path / name).values() for name in ("of_pt", "of_safetensors"))
    assert np.array_equal(one, other)
    told = refused(done.sample, "vae_gan", tmp_path / "refused", generator_path=str(small))
    assert told.endswith("lsgan.safetensors is of the family lsgan, not vae_gan: give --family lsgan")


def test_samples_are_drawn_and_evaluated_as_any_others(done: Baselines, tmp_path: Path) -> None:
    for family in FAMILIES:
        done.sample(family, tmp_path / family, num_samples=3)
    folders = {family: str(tmp_path / family) for family in FAMILIES}
    where = {"real_dir": str(done.folder / "dataset"), "output_dir": str(tmp_path / "evaluation"), "num_pairs": 3}
    done.run_here([BASE, "configs/evaluate.yaml", TINY], synthetic_dir=folders, **where)
    rows = read_table(tmp_path / "evaluation" / "table_1.tsv")
    assert [row["model"] for row in rows][:2] == list(FAMILIES) and all(float(row["MS-SSIM"]) > 0 for row in rows[:2])
    beside = tmp_path / "side"
    done.run_here([BASE, "configs/side_by_side.yaml", TINY], models=folders, count=2, output_dir=str(beside))
    assert (beside / "models.png").is_file()
    cells = {"rows": [{}], "columns": [{}, {}], "figure": "same"}
    done.sample("lsgan", tmp_path / "grid", "configs/figures.yaml", **cells)
    first, second = volumes(tmp_path / "grid").values()
    assert np.array_equal(first, second), "one noise and no conditions: one head"


# Stopping and going on.


@pytest.mark.parametrize("family", ["lsgan", pytest.param("vae_gan", marks=pytest.mark.slow)])
def test_killed_training_ends_in_the_same_bits(family: str, done: Baselines, tmp_path: Path) -> None:
    """With all that is random and all that has a state."""
    every = {"checkpoint_every": 1, "keep_checkpoints": 9, "max_epochs": 4, "epoch_length": 2, **STEADIED}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = done.flags(family, **every, run_dir=str(killed), device="cpu")
    words = ["-m", "monai.bundle", "run", "--config_file", str([BASE, GAN, TINY])]
    words += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    with Command(words) as command:
        while not (killed / "checkpoint_iteration=2.pt").exists():
            assert command.process.exitcode is None
            time.sleep(0.01)
        command.kill()
    assert not (killed / f"{family}.pt").exists(), "it was faster than the kill"
    done.train(family, **every, run_dir=str(killed))
    done.train(family, **every, run_dir=str(whole))
    expected, found = (content(folder / "checkpoint_iteration=8.pt") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name in expected.keys() - {"config", "code"}:
        assert difference(expected[name], found[name]) == 0.0, name
    assert [line["losses"] for line in read_lines(whole / "losses.jsonl") if "losses" in line] == [
        line["losses"] for line in read_lines(killed / "losses.jsonl") if "losses" in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_are_one_with_the_whole_batch(family: str, done: Baselines, tmp_path: Path) -> None:
    common = {"max_epochs": 2, "epoch_length": 2, "lr": 1e-4, "device": "cpu", **STEADIED}
    done.train(family, **common, batch_size=2, run_dir=str(tmp_path / "one"))
    flags = done.flags(family, **common, batch_size=1, run_dir=str(tmp_path / "two"))
    words = ["-m", "monai.bundle", "run", "--config_file", str([BASE, GAN, TINY])]
    finished = run_ranks(2, *words, *[word for name, value in flags.items() for word in (f"--{name}", value)])
    assert all(ran.returncode == 0 for ran in finished), [ran.stderr[-3000:] for ran in finished]
    one, two = (content(tmp_path / name / "checkpoint_iteration=4.pt") for name in ("one", "two"))
    for name in one.keys() - {"config", "code", "optimisation", "discriminator_optimisation"}:
        assert difference(one[name], two[name]) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_all_trainings(family: str, done: Baselines, tmp_path: Path) -> None:
    """What saves memory changes no shape and no name; weights are fine-tuned."""
    pretrained = str(done.folder / family / f"{family}.pt")
    more = {"accumulate": 2, "gradient_checkpointing": 1, "channels_last": 1, "cache_rate": 1.0, "freeze": "linear"}
    done.train(family, run_dir=str(tmp_path), pretrained=pretrained, amp="bf16", lr_decay="cosine", **more, **STEADIED)
    before, after = content(Path(pretrained)), content(tmp_path / f"{family}.pt")
    assert torch.equal(after["generator"]["linear.weight"], before["generator_ema"]["weights"]["linear.weight"])
    assert not same(before["generator_ema"]["weights"], after["generator"])


def test_resuming_the_other_family_is_refused(done: Baselines, tmp_path: Path) -> None:
    shutil.copytree(done.folder / "lsgan", tmp_path / "run")
    told = refused(done.train, "vae_gan", run_dir=str(tmp_path / "run"), max_epochs=3)
    assert "another --run_dir" in told and "the checkpoint optimised" in told


# What is refused, in one line, with nothing left behind.


def test_what_cannot_be_sampled(done: Baselines, trained_folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    out = tmp_path / "out"
    diffusion, gan = trained_folder / "diffusion" / "diffusion.pt", done.folder / "lsgan" / "lsgan.pt"
    autoencoder = str(trained_folder / "autoencoder" / "autoencoder.pt")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"family": "lsgna"},
            "got 'lsgna': did you mean lsgan?",
        ),
        ({"age": 0.7}, "--age 0.7: the family lsgan has no conditions: leave it out"),
        ({"generator_path": str(diffusion)}, "diffusion.pt is of the family latent_diffusion, not lsgan"),
        ({"generator_path": autoencoder}, "autoencoder.pt is of the family latent_diffusion, not lsgan"),
        ({"noise_size": 8}, "lsgan.pt is of another model: its linear.weight is"),
        ({"generator_channels": [16, 8, 8]}, "lsgan.pt is of another model than the configured one:"),
        ({"generator_channels": [16, 8, 8, 8, 8, 8, 8]}, "multiples of 64"),
        ({"generator_path": str(tmp_path / "no.pt")}, "train one with `python -m scripts train gan`"),
    ]
    for flags, told in cases:
        given = {"family": "lsgan", "generator_path": str(gan), "output_dir": str(out), "seed": 1, **flags}
        assert told in refused(run_here, [BASE, TINY], **given), flags
        assert "monai-generative" not in refused(run_here, [BASE, TINY], **given)
    of_the_pair = {"autoencoder_path": autoencoder, "load_old": 0, "output_dir": str(out), "diffusion_path": str(gan)}
    told = refused(run_here, [BASE, TINY], **of_the_pair)
    assert told.endswith("lsgan.pt is of the family lsgan, not latent_diffusion: give --family lsgan")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"family": "vaegan"}, "--family must be one of lsgan, vae_gan, got 'vaegan': did you mean vae_gan?"),
        ({"family": "latent_diffusion"}, "--family must be one of lsgan, vae_gan"),
        ({"r1": -1}, "--r1 must be at least 0"),
        ({"balance": "x"}, "--balance must be from 0 to 1, got 'x'"),
        ({"shift": -1}, "--shift must be at least 0"),
        ({"discriminator_lr": 0}, "--discriminator_lr must be above 0"),
        ({"generator_channels": [16, 8, 8, 8, 8, 8, 8]}, "multiples of 64"),
        ({"gan_discriminator_channels": [4, 4]}, "at least 3"),
        ({"family": "vae_gan", "feature_weight": 0}, "--feature_weight must be at least"),
        ({"family": "vae_gan", "kl_weight": -1}, "--kl_weight must be at least 0"),
        ({"diversity_volumes": 1}, "--diversity_volumes must be at least 2"),
    ],
)
def test_what_cannot_be_trained(flags: dict[str, Any], told: str, done: Baselines, tmp_path: Path) -> None:
    given = {"family": "lsgan", **flags}
    assert told in refused(done.train, given.pop("family"), run_dir=str(tmp_path / "run"), **given)
    assert not (tmp_path / "run").exists()


# At full size.


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_at_full_size(family: str) -> None:
    need_memory(torch.device("cpu"), 6 if family == "lsgan" else 14)
    config = configuration([GAN], family=family, seed=1, amp="bf16", device="cpu", run_dir="unused")
    config["gans::vae_gan::validation"] = None  # which needs a dataset
    networks = [config.get_parsed_content(f"train::{name}") for name in ("prepared", "learner", "discriminator")]
    before = [next(network.parameters()).detach().clone() for network in networks]
    loss = config.get_parsed_content("train::loss")
    assert isinstance(loss, LSGANLoss if family == "lsgan" else VAEGANLoss)
    shape = config["grid"]["shape"]
    draw = config.get_parsed_content("train::preprocessing").transforms[-1]
    item = draw({"image": torch.rand(1, *shape)})
    batch = {name: item[name][None] for name in loss.inputs}
    optimisation = config.get_parsed_content("train::optimisation")
    loss.before_step(optimisation.network, batch, 1)
    losses = optimisation(batch, lambda part: loss(optimisation.network, part, 1), loss.before_update)
    assert all(value.isfinite() for value in losses.values())
    assert not any(torch.equal(old, next(n.parameters())) for old, n in zip(before, networks, strict=True))
    with torch.no_grad():
        assert networks[0](batch["prior_noise"]).shape == (1, 1, *shape)
