# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Pixel-space diffusion: what it trains on and samples, the released models' samplers and files, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import head, refused
from released import configuration
from safetensors.torch import save_file
from torch import Tensor
from trained import DIFFUSION, content

from benchmarks.measuring import counted, fill_with_random_values
from scripts.diffusion.objective import DiffusionObjective
from scripts.diffusion.pixel_range import to_denoiser, to_volume
from scripts.diffusion.samplers import DDIMSampler
from scripts.diffusion.targets import TARGETS
from scripts.diffusion.training import DenoisingLoss
from scripts.networks.weights import write_safetensors
from scripts.training.optimisation import Optimisation
from scripts.training.step import TrainingStep

PIXEL, NONE, FINETUNE = "configs/pixel.yaml", "configs/unconditional.yaml", "configs/finetune.yaml"
ENGINE: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=1, iteration=1))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, trained_folder: Path, run_here: RunHere) -> dict[str, Any]:
    """Flags of a model with the bundle's conditions, trained for an epoch with a figure, and two samples of it."""
    folder = tmp_path_factory.mktemp("pixel")
    training = {"dataset_dir": str(trained_folder / "dataset"), "run_dir": str(folder / "run"), "max_epochs": 1}
    run_here([BASE, DIFFUSION, PIXEL, TINY], **training, seed=1, sample_every=1, num_inference_steps=2)
    model = {"diffusion_path": str(folder / "run" / "diffusion.pt"), "seed": 1, "num_inference_steps": 3}
    run_here([BASE, PIXEL, TINY], **model, num_samples=2, batch_size=2, age=0.2, output_dir=str(folder / "out"))
    return {"folder": folder, "trained": trained_folder, "training": training, "model": model}


def samples(folder: Path) -> list[np.ndarray]:
    return [np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))]  # type: ignore[attr-defined]


def test_range_goes_there_and_back() -> None:
    volume = torch.rand(1, 4, 4, 4)
    assert torch.allclose(to_volume(to_denoiser(volume)), volume, atol=1e-7)
    assert to_denoiser(torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3])).tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]


# Training and sampling.


def test_training_knows_volumes_and_no_latents(work: dict[str, Any]) -> None:
    trained = content(work["folder"] / "run" / "diffusion.pt")
    facts = trained["facts"]
    assert facts["family"] == "pixel_diffusion" and facts["target"] == "velocity"
    assert list(facts["conditions"]) == ["gender", "age", "ventricular_vol", "brain_vol"]
    assert "latent_scale" not in facts and "encoder_sha256" not in facts
    assert facts["schedule"]["beta_first"] == 1e-4 and facts["schedule"]["beta_last"] == 2e-2
    assert trained["diffusion"]["conv_in.conv.weight"].shape[1] == 1 + 4
    assert list((work["folder"] / "run" / "figures").glob("samples_*.png"))


def test_samples_state_what_made_them(work: dict[str, Any]) -> None:
    stated = json.loads(next((work["folder"] / "out").glob("*.json")).read_text())
    assert stated["family"] == "pixel_diffusion" and stated["clip_sample"] is True
    assert list(stated["weights"]) == ["diffusion"] and "latent_scale" not in stated
    assert stated["conditions"]["age"] == 0.2 and stated["grid"]["shape"] == [32, 48, 32]
    one, two = samples(work["folder"] / "out")
    assert one.shape == (32, 48, 32) and not np.array_equal(one, two)


def test_one_seed_is_one_volume_whatever_the_batch(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    run_here([BASE, PIXEL, TINY], **work["model"], num_samples=2, age=0.2, output_dir=str(tmp_path))
    for one, other in zip(samples(work["folder"] / "out"), samples(tmp_path), strict=True):
        assert np.array_equal(one, other)


def test_shipped_weights_sample_as_the_checkpoint(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "diffusion.safetensors"
    write_safetensors(path, work["model"]["diffusion_path"], "diffusion", "float32")
    flags = {**work["model"], "diffusion_path": str(path), "age": 0.2}
    run_here([BASE, PIXEL, TINY], **flags, output_dir=str(tmp_path / "out"))
    assert np.array_equal(samples(tmp_path / "out")[0], samples(work["folder"] / "out")[0])


def test_fine_tuning_starts_from_the_weights(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    flags = {**work["training"], "run_dir": str(tmp_path), "diffusion_path": work["model"]["diffusion_path"]}
    run_here([BASE, DIFFUSION, PIXEL, FINETUNE, TINY], **flags, seed=2, lr=1e-9, sample_every=0)
    before, after = content(Path(work["model"]["diffusion_path"])), content(tmp_path / "diffusion.pt")
    for name, tensor in before["diffusion_ema"]["weights"].items():
        assert torch.allclose(tensor, after["diffusion"][name], atol=1e-6), name


@pytest.mark.parametrize("target", TARGETS)
def test_a_training_of_each_target_lowers_its_loss(target: str) -> None:
    small = {"grid::shape": [16, 16, 16], "network_def::channels": [8, 16], "network_def::num_head_channels": 8}
    config = configuration([PIXEL, NONE, TINY], target=target, **small)
    torch.manual_seed(0)
    network = config.get_parsed_content("network_def")
    objective = DiffusionObjective(config.get_parsed_content("schedule"))
    loss = DenoisingLoss(config.get_parsed_content("hybrid_inferer"), objective)
    step = TrainingStep(Optimisation(network, torch.optim.Adam(network.parameters(), 3e-3), clip_gradients=0.0), loss)
    clean = torch.stack([to_denoiser(head(config.get_parsed_content("grid"), n))[None] for n in range(2)])
    timestep = objective.timestep_at(torch.tensor([0.3, 0.7]))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    batch = {"image": clean, "condition": torch.zeros(2, 0), "timestep": timestep, "noise": noise}
    losses = [step(ENGINE, batch)["losses"]["loss"] for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


# The released models' samplers, network and files.


def schedule() -> Any:
    return configuration([PIXEL]).get_parsed_content("schedule")


def test_schedule_and_timesteps_are_the_released_models() -> None:
    found = schedule()
    assert found.betas[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])
    assert float(found.final_alpha_cumprod) == 1.0 and found.clip_sample
    config = configuration([PIXEL])
    assert config.get_parsed_content("chosen_sampler").timesteps == list(range(945, -1, -15))
    even = configuration([PIXEL], sampler="ddim_even").get_parsed_content("chosen_sampler")
    assert len(even.timesteps) == 256 and even.timesteps[0] == 999 and even.timesteps[-1] == 0
    assert even.timesteps == [round(999 * i / 255) for i in range(255, -1, -1)]
    assert even.settings == {"clip_sample": True, "spacing": "even", "recompute_noise": True}


@pytest.mark.parametrize("recompute", [False, True])
def test_noise_may_follow_from_the_clipped_volume(recompute: bool) -> None:
    """One step by hand, from an output whose clean volume has to be clipped."""
    sampler = DDIMSampler(schedule(), 10, recompute_noise=recompute)
    noisy, output = torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), -0.5)
    power, following = (float(sampler.schedule.alphas_cumprod[t]) for t in (500, 400))
    a, s = math.sqrt(power), math.sqrt(1 - power)
    implied = a * 2.0 - s * -0.5
    clean = min(max(implied, -1.0), 1.0)
    noise = (2.0 - a * clean) / s if recompute else a * -0.5 + s * 2.0
    assert implied > 1.0
    expected = math.sqrt(following) * clean + math.sqrt(1 - following) * noise
    assert float(sampler.step(output, 500, noisy, [])) == pytest.approx(expected, rel=1e-5)


def test_an_unknown_spacing_is_refused() -> None:
    assert "leading or strided or even, not 'odd'" in refused(DDIMSampler, schedule(), 10, spacing="odd")


@pytest.fixture(scope="module")
def released_state() -> dict[str, Tensor]:
    """Weights of the released network's names, at tiny size."""
    network = configuration([PIXEL, NONE, TINY]).get_parsed_content("network_def")
    torch.manual_seed(0)
    fill_with_random_values(network)
    return network.state_dict()


@pytest.mark.parametrize("generation", ["2025", "2026"])
def test_released_files_load(
    generation: str, released_state: dict[str, Tensor], run_here: RunHere, tmp_path: Path
) -> None:
    path = tmp_path / ("model_epoch100.pt" if generation == "2025" else "MedForj-weights-velocity_ema.safetensors")
    if generation == "2025":
        torch.save({"model": released_state, "optimizer": {"state": {}}, "epoch": 100, "run_id": "x"}, path)
    else:
        save_file(released_state, path)
    flags = {"diffusion_path": str(path), "seed": 1, "num_inference_steps": 2, "output_dir": str(tmp_path / "out")}
    run_here([BASE, PIXEL, NONE, TINY], **flags)
    (stated,) = (json.loads(one.read_text()) for one in (tmp_path / "out").glob("*.json"))
    assert stated["weights"]["diffusion"]["file"] == path.name and samples(tmp_path / "out")[0].std() > 0


def test_released_weights_of_another_size_are_refused(
    released_state: dict[str, Tensor], run_here: RunHere, tmp_path: Path
) -> None:
    save_file(released_state, tmp_path / "MedForj-weights-flow_ema.safetensors")
    flags = {"diffusion_path": str(tmp_path / "MedForj-weights-flow_ema.safetensors"), "seed": 1}
    wider = {"network_def::channels": [32, 64, 64], "output_dir": str(tmp_path / "out")}
    assert "is of another model: its" in refused(run_here, [BASE, PIXEL, NONE, TINY], **flags, **wider)
    more = refused(run_here, [BASE, PIXEL, TINY], **flags, output_dir=str(tmp_path / "out"))
    assert "is of another model than the configured one" in more and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_full_size_network_is_the_released_one() -> None:
    """Parameters and arithmetic of a call at 192 x 224 x 192, counted without computing it; one step at an eighth."""
    config = configuration([PIXEL, NONE])
    network = config.get_parsed_content("network_def").eval()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(41.25e6, rel=0.001)
    with torch.device("meta"):
        other = configuration([PIXEL, NONE]).get_parsed_content("network_def")
        x, t = torch.empty(1, 1, 192, 224, 192), torch.empty(1)
    assert counted(lambda: other.to("meta")(x=x, timesteps=t)).flop == pytest.approx(4.0e12, rel=0.1)
    sampler = config.get_parsed_content("chosen_sampler")
    noisy = torch.randn(1, 1, 96, 112, 96)
    with torch.no_grad():
        output = network(x=noisy, timesteps=torch.tensor([945.0]))
    assert sampler.step(output, 945, noisy, []).isfinite().all()


# What is refused.


def test_latents_are_refused_in_training(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    files = [BASE, DIFFUSION, PIXEL, TINY]
    flags = {**work["training"], "run_dir": str(tmp_path / "run"), "seed": 1}
    latents = str(work["trained"] / "latents")
    assert "leave out --latents_dir" in refused(run_here, files, **flags, latents_dir=latents)
    assert "holds latents" in refused(run_here, files, **{**flags, "dataset_dir": latents})
    other = {"grid::shape": [32, 32, 32], "resample_to_grid": False}
    assert "(32, 48, 32)" in refused(run_here, files, **flags, **other)
    assert "multiples of 4" in refused(run_here, files, **flags, **{"grid::shape": [30, 48, 32]})
    assert not (tmp_path / "run").exists()


def test_weights_of_another_family_or_target_are_refused(
    work: dict[str, Any], run_here: RunHere, tmp_path: Path
) -> None:
    latent = str(work["trained"] / "diffusion" / "diffusion.pt")
    flags = {**work["model"], "output_dir": str(tmp_path / "out")}
    told = refused(run_here, [BASE, PIXEL, TINY], **{**flags, "diffusion_path": latent})
    assert told.endswith("is of the family latent_diffusion, not pixel_diffusion: give --family latent_diffusion")
    told = refused(run_here, [BASE, PIXEL, TINY], **flags, target="flow")
    assert "was trained for the target velocity, not flow: give --target velocity" in told
    start = {**work["training"], "run_dir": str(tmp_path / "run"), "pretrained": latent, "seed": 1}
    told = refused(run_here, [BASE, DIFFUSION, PIXEL, FINETUNE, TINY], **start)
    assert "is of the family latent_diffusion" in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_the_two_flows_are_told_apart(work: dict[str, Any], run_here: RunHere, tmp_path: Path) -> None:
    """Noise less data on the path of diffusion, and data less noise on the straight one."""
    trained = content(Path(work["model"]["diffusion_path"]))
    for target, other in (("difference", "flow"), ("flow", "difference")):
        trained["facts"]["target"] = target
        torch.save(trained, tmp_path / f"{target}.pt")
        flags = {**work["model"], "diffusion_path": str(tmp_path / f"{target}.pt"), "output_dir": str(tmp_path / "out")}
        told = refused(run_here, [BASE, PIXEL, TINY], **flags, target=other)
        assert f"was trained for the target {target}, not {other}: give --target {target}" in told
