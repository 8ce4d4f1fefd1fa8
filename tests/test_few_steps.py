# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Consistency distillation: what a student learns, that it goes on where it was stopped, and its sampler."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BASE, TINY, RunHere
from test_editing import schedule_of
from torch import Tensor, nn
from trained import DIFFUSION, Pipeline, content, same

from scripts.diffusion.consistency import ConsistencySampler, trailing_timesteps
from scripts.diffusion.distillation import ConsistencyLoss
from scripts.diffusion.schedules import signal_and_noise
from scripts.diffusion.targets import TARGETS, find_target
from scripts.networks.weights import Checkpoint
from scripts.training.optimisation import Optimisation
from scripts.training.step import TrainingStep

FEW = "configs/few_steps.yaml"
DISTILLED = [target for target in TARGETS if target != "sample"]
SD = 0.5


class Plain(nn.Module):
    """A network that knows each of some timesteps: output = weight z, a number for each."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, z: Tensor, number: Tensor) -> Tensor:
        return self.weights[number].view(-1, *[1] * (z.ndim - 1)) * z


class Caller:
    """Calls it as `HybridInferer` calls a denoiser."""

    def __init__(self, timesteps: list[int]) -> None:
        self.timesteps = torch.tensor(timesteps)

    def denoise(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return network(noisy, (timesteps[:, None] == self.timesteps).int().argmax(1))


def exact_weights(target: str, levels: list[tuple[float, float]]) -> Tensor:
    """What makes z the estimate of Gaussian latents of deviation SD."""
    found = []
    for a, s in levels:
        clean = torch.tensor(a * SD**2 / (a**2 * SD**2 + s**2))
        found.append(find_target(target).output(clean, (1.0 - a * clean) / s, a, s))
    return torch.stack(found).float()


@pytest.mark.parametrize("target", DISTILLED)
def test_a_student_of_a_gaussian_learns_where_trajectories_end(target: str) -> None:
    """There, a trajectory ends at z times a known factor, which one step of the student has to give."""
    schedule, steps = schedule_of(target), 6
    timesteps = trailing_timesteps(schedule, steps)[::-1]
    levels = signal_and_noise(schedule, timesteps)
    student = Plain(exact_weights(target, levels))
    teacher = Checkpoint(Path("teacher.pt"), {}, {})
    loss = ConsistencyLoss(Caller(timesteps), schedule, student, teacher, None, steps)
    step = TrainingStep(Optimisation(student, torch.optim.Adam(student.parameters(), 0.03), clip_gradients=0.0), loss)
    engine: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"), epoch=1, iteration=1))
    generator = torch.Generator().manual_seed(0)
    drawn = {"timestep": torch.linspace(0, 999, 24), "condition": torch.zeros(24, 0)}
    for round_ in range(400):
        for group in step.optimisation.optimizer.param_groups:
            group["lr"] = 0.03 * 0.99**round_
        latents = {name: torch.randn(24, 1, 4, 4, 4, generator=generator) for name in ("image", "noise")}
        step(engine, {**drawn, "image": SD * latents["image"], "noise": latents["noise"]})
    factor, found = 1.0, []
    teaching, row = exact_weights(target, levels), find_target(target)
    for (a, s), (a_next, s_next), weight in zip(levels, [(1.0, 0.0), *levels], teaching):
        one = torch.ones(1)
        factor *= float(a_next * row.clean(weight * one, one, a, s) + s_next * row.noise(weight * one, one, a, s))
        found.append(factor)
    learnt = student.weights.detach()
    seen = [float(row.clean(w * torch.ones(1), torch.ones(1), *level)) for w, level in zip(learnt, levels)]
    assert torch.allclose(torch.tensor(seen), torch.tensor(found), atol=0.03), (seen, found)


@pytest.mark.parametrize("target", ["velocity", "flow"])
def test_steps_of_the_sampler_begin_at_the_noisiest(target: str) -> None:
    schedule = schedule_of(target)
    last = 1000 if target == "flow" else 999
    assert trailing_timesteps(schedule, 1) == [last]
    assert set(trailing_timesteps(schedule, 4)) <= set(trailing_timesteps(schedule, 48))
    clean = torch.full((1, 1, 2, 2, 2), 0.7)
    sampler = ConsistencySampler(schedule, 3)
    levels = dict(zip(sampler.timesteps, signal_and_noise(schedule, sampler.timesteps), strict=True))

    def knows(z: Tensor, timestep: int) -> Tensor:
        a, s = levels[timestep]
        return find_target(target).output(clean, (z - a * clean) / s, a, s)

    generators = [torch.Generator().manual_seed(0)]
    assert torch.allclose(sampler.sample(knows, torch.randn(clean.shape), generators), clean, atol=1e-5)


def test_a_model_of_the_clean_sample_has_no_student() -> None:
    teacher = Checkpoint(Path("teacher.pt"), {}, {})
    with pytest.raises(Exception, match="target sample cannot be distilled"):
        ConsistencyLoss(Caller([]), schedule_of("sample"), nn.Identity(), teacher)
    with pytest.raises(Exception, match="there is no teacher"):
        ConsistencyLoss(Caller([]), schedule_of("velocity"), nn.Identity(), None)
    with pytest.raises(Exception, match="--teacher_guidance needs a teacher"):
        ConsistencyLoss(Caller([]), schedule_of("velocity"), nn.Identity(), teacher, guidance=2.0)


def test_a_student_goes_on_to_the_same_bits_and_is_sampled(
    trained_folder: Path, run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(trained_folder, run_here)
    teacher = str(trained_folder / "diffusion" / "diffusion.pt")
    flags = {**pipeline.diffusion_flags(), "pretrained": teacher, "teacher_steps": 6, "lr": 1e-3}
    configs = [BASE, DIFFUSION, FEW, TINY]
    run_here(configs, **{**flags, "run_dir": str(tmp_path / "whole")})
    for epochs in (1, 2):
        run_here(configs, **{**flags, "run_dir": str(tmp_path / "parts"), "max_epochs": epochs})
    whole, parts = (content(tmp_path / name / "diffusion.pt") for name in ("whole", "parts"))
    assert same(whole["diffusion"], parts["diffusion"])
    assert same(whole["diffusion_ema"]["weights"], parts["diffusion_ema"]["weights"])
    assert not same(whole["diffusion"], content(Path(teacher))["diffusion"])
    facts = whole["facts"]["distilled"]
    assert facts["steps"] == 6 and len(facts["teacher"]) == 64 and whole["facts"]["target"] == "epsilon"
    model = {**pipeline.trained(), "sampler": "few", "num_inference_steps": 2, "seed": 1}
    with caplog.at_level(logging.WARNING):
        student = str(tmp_path / "whole" / "diffusion.pt")
        run_here([BASE, TINY], **model, diffusion_path=student, output_dir=str(tmp_path / "few"))
        assert "for a model that was distilled" not in caplog.text
        run_here([BASE, TINY], **model, diffusion_path=teacher, output_dir=str(tmp_path / "other"))
        assert "for a model that was distilled" in caplog.text
    stated = json.loads(next((tmp_path / "few").glob("*.json")).read_text())
    assert stated["sampler"] == "few" and stated["num_inference_steps"] == 2
