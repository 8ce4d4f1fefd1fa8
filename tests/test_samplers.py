# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Samplers: the original's timesteps, trajectories with a known end, and noise that is each sample's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, RFlowScheduler
from released import configuration, generative_scheduler
from torch import Tensor

from scripts.core.errors import BundleError, find_bundle_error
from scripts.diffusion.samplers import DDIMSampler, FlowSampler, LeadingDDIMScheduler, MidpointSampler, choose_sampler

SHAPE = (3, 4, 6, 8)


def schedule(**overrides: Any) -> LeadingDDIMScheduler:
    """The base's."""
    return configuration([], **overrides).get_parsed_content("schedule")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def walk(sampler: DDIMSampler, clean: Tensor, start: Tensor, own: list[torch.Generator]) -> Tensor:
    """The end of a trajectory along which the network knows the clean latent."""
    alphas = sampler.schedule.alphas_cumprod

    def noise(latent: Tensor, timestep: int) -> Tensor:
        return (latent - alphas[timestep].sqrt() * clean) / (1 - alphas[timestep]).sqrt()

    return sampler.sample(noise, start, own)


def test_fifty_timesteps_are_the_originals_and_not_monais() -> None:
    original = list(range(980, -1, -20))
    assert DDIMSampler(schedule(), 50).timesteps == original
    trap = DDIMScheduler(num_train_timesteps=1000, schedule="scaled_linear_beta", clip_sample=False)
    trap.set_timesteps(50)
    assert trap.timesteps.tolist() != original


@pytest.mark.parametrize("steps", [1, 2, 8, 50, 100, 250, 500, 1000])
def test_timesteps_are_the_originals_where_their_number_divides_the_schedules(steps: int) -> None:
    original = generative_scheduler(configuration([]), "DDIMScheduler")
    original.set_timesteps(steps)
    sampler = DDIMSampler(schedule(), steps)
    assert sampler.timesteps == original.timesteps.tolist()
    assert len(sampler.timesteps) == steps and sampler.timesteps[-1] == 0


def test_more_steps_are_never_worse() -> None:
    """They begin no later, come no further apart, and end nearer to where the exact trajectory of a Gaussian does."""
    before, wide, one = -1, 1000, schedule()
    for steps in range(1, 1001):
        timesteps = DDIMSampler(one, steps).timesteps
        gaps = [high - low for high, low in zip(timesteps, timesteps[1:])]
        assert len(set(timesteps)) == steps and timesteps[-1] == 0
        assert timesteps[0] >= before and max(gaps, default=wide) <= wide
        before, wide = timesteps[0], max(gaps, default=wide)
    powers = one.alphas_cumprod.double()
    errors = [abs(_end_of_a_gaussian(DDIMSampler(one, steps), powers) - 0.1) for steps in STEPS]
    assert all(later < earlier * 1.001 for earlier, later in zip(errors, errors[1:])), errors


STEPS = (10, 25, 50, 100, 200, 333, 334, 400, 500, 600, 700, 999, 1000)


def _end_of_a_gaussian(sampler: DDIMSampler, powers: torch.Tensor) -> float:
    """Standard deviation that unit noise ends at, where the data are normal with one of 0.1: the network is exact."""
    latent = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    for timestep in sampler.timesteps:
        a = powers[timestep]
        noise = latent * (1 - a).sqrt() / (a * 0.1**2 + 1 - a)  # the mean of the noise, given the latent
        latent = sampler.step(noise, timestep, latent, [])
    return latent.item()


@pytest.mark.parametrize(
    ("steps", "told"),
    [(0, "at least 1"), (-5, "at least 1"), (1001, "more than the 1000"), ("x", "whole number"), (2.5, "whole number")],
)
def test_impossible_numbers_of_steps(steps: object, told: str) -> None:
    with pytest.raises(BundleError, match=f"--num_inference_steps .*{told}"):
        choose_sampler(configuration([]).get_parsed_content("samplers"), "ddim", steps)


def test_samplers_of_the_base() -> None:
    samplers = configuration([]).get_parsed_content("samplers")
    assert len(choose_sampler(samplers, "ddim").timesteps) == 50
    assert len(choose_sampler(samplers, "ddpm").timesteps) == 1000
    assert choose_sampler(samplers, "ddpm", "25").timesteps == list(range(960, -1, -40))
    with pytest.raises(BundleError, match="--sampler must be one of .*, got 'plms'"):
        choose_sampler(samplers, "plms")


def test_samplers_do_not_share_their_timesteps() -> None:
    shared = schedule()
    first = DDIMSampler(shared, 50)
    DDIMSampler(shared, 10)
    assert len(first.timesteps) == 50


@pytest.mark.parametrize("steps", [1, 3, 50, 300])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_perfect_network_leads_to_the_clean_latent(steps: int, eta: float) -> None:
    start, clean = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    end = walk(DDIMSampler(schedule(), steps, eta), clean, start, generators(4))
    assert torch.allclose(end, clean, atol=2e-5)


def test_step_is_the_formula_of_the_paper() -> None:
    """Song et al. 2021, equation 12, in float64."""
    sampler, t, s = DDIMSampler(schedule(), 10, eta=0.7), 500, 400
    latent, output = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(9)).double().numpy()
    beta = np.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2
    a = np.cumprod(1 - beta)
    x, e = latent.double().numpy(), output.double().numpy()
    clean = (x - np.sqrt(1 - a[t]) * e) / np.sqrt(a[t])
    sigma = 0.7 * np.sqrt((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s]))
    expected = np.sqrt(a[s]) * clean + np.sqrt(1 - a[s] - sigma**2) * e + sigma * noise
    moved = sampler.step(output, t, latent, generators(9))
    assert np.allclose(moved.double().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_last_step_adds_no_noise() -> None:
    latent, output = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(2))
    sampler = DDIMSampler(schedule(), 50, eta=1.0)
    ends = [sampler.step(output, 0, latent, generators(seed)) for seed in (1, 2)]
    assert torch.equal(*ends)


def test_fresh_noise_is_each_samples_own_whatever_the_batch() -> None:
    clean, start = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    sampler = DDIMSampler(schedule(), 5, eta=1.0)
    together = sampler.step(clean, 800, start, generators(10, 11, 12))
    alone = [sampler.step(clean[i : i + 1], 800, start[i : i + 1], generators(10 + i)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[:1], sampler.step(clean[:1], 800, start[:1], generators(13)))


def test_ancestral_steps_keep_the_marginal_distribution() -> None:
    """With a clean latent of 0 known to the network, x_s has variance 1 - a_s at every eta."""
    for eta in (0.0, 1.0):
        sampler = DDIMSampler(schedule(), 10, eta)
        a = sampler.schedule.alphas_cumprod
        latent = torch.randn(1, 1, 40, 40, 40, generator=torch.Generator().manual_seed(4)) * (1 - a[900]).sqrt()
        moved = sampler.step(latent / (1 - a[900]).sqrt(), 900, latent, generators(6))
        assert moved.var().item() == pytest.approx(1 - a[800].item(), rel=0.03)


# Rectified flow.


@pytest.mark.parametrize("steps", [1, 7, 30, 999, 1000])
def test_flow_timesteps_are_monais_and_end_at_the_data(steps: int) -> None:
    monais = RFlowScheduler(num_train_timesteps=1000)
    monais.set_timesteps(steps)
    sampler = FlowSampler(RFlowScheduler(num_train_timesteps=1000), steps)
    assert sampler.timesteps == monais.timesteps.tolist()
    start, velocity = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    end = sampler.sample(lambda latent, timestep: velocity, start, [])
    assert torch.allclose(end, start + velocity, atol=1e-4)  # the whole way in the time of one


def test_flow_step_is_eulers() -> None:
    sampler = FlowSampler(RFlowScheduler(num_train_timesteps=1000), 30)
    latent, velocity = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert sampler.timesteps[:3] == [1000, 967, 933]
    assert torch.allclose(sampler.step(velocity, 967, latent, []), latent + 0.034 * velocity, atol=1e-6)
    assert torch.allclose(sampler.step(velocity, 33, latent, []), latent + 0.033 * velocity, atol=1e-6)


def test_midpoint_takes_the_velocity_of_the_middle() -> None:
    sampler = MidpointSampler(RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=True), 4)
    latent, first, second = torch.randn(3, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    velocities, seen = {1000: first, 750: second, 500: -second, 250: 0 * first}, {}

    def denoise(latent: Tensor, timestep: int) -> Tensor:
        seen[timestep] = latent
        return velocities[timestep]

    end = sampler.sample(denoise, latent, [])
    assert torch.allclose(seen[750], latent + 0.25 * first, atol=1e-6)
    assert torch.allclose(seen[500], latent + 0.5 * second, atol=1e-6)
    assert torch.allclose(seen[250], seen[500] - 0.25 * second, atol=1e-6) and torch.equal(end, seen[500])
    with pytest.raises(BundleError, match="--sampler midpoint must be even, got 5"):
        MidpointSampler(RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=True), 5)


@pytest.mark.parametrize(("steps", "told"), [(0, "at least 1"), (1001, "more than the 1000"), ("x", "whole number")])
def test_impossible_numbers_of_flow_steps(steps: object, told: str) -> None:
    with pytest.raises(BundleError, match=f"--num_inference_steps .*{told}"):
        FlowSampler(RFlowScheduler(num_train_timesteps=1000), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"use_discrete_timesteps": False}, {"use_timestep_transform": True}])
def test_flow_timesteps_that_monais_step_would_round(option: dict[str, bool]) -> None:
    with pytest.raises(BundleError, match="use_discrete_timesteps and without use_timestep_transform"):
        FlowSampler(RFlowScheduler(num_train_timesteps=1000, **option), 30)


@pytest.mark.parametrize(
    ("target", "sampler", "told"),
    [
        ("flow", "ddim", "give --sampler flow"),
        ("flow", "ddpm", "give --sampler flow"),
        ("flow", "unipc", "give --sampler flow or midpoint"),
        ("epsilon", "flow", "give --sampler ddim, or --target flow"),
        ("velocity", "flow", "give --sampler ddim, or --target flow"),
    ],
)
def test_sampler_of_another_schedule(target: str, sampler: str, told: str) -> None:
    with pytest.raises(Exception) as caught:
        configuration([], target=target, sampler=sampler).get_parsed_content("chosen_sampler")
    assert told in str(find_bundle_error(caught.value))


# On a GPU, waiting for the device once a step would leave it idle.


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "unipc", "flow", "midpoint"])
def test_no_step_waits_for_the_device(name: str) -> None:
    """Tensors on the device `meta` have no values: whatever needs one on the host fails."""
    target = "flow" if name in ("flow", "midpoint") else "epsilon"
    sampler = configuration([], target=target, sampler=name, num_inference_steps=6).get_parsed_content("chosen_sampler")
    start = torch.empty(2, *SHAPE, device="meta")
    end = sampler.sample(lambda latent, timestep: latent, start, generators(1, 2))
    assert end.device.type == "meta"


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "unipc", "flow", "midpoint"])
def test_two_trajectories_of_one_sampler_may_run_at_once(name: str) -> None:
    target = "flow" if name in ("flow", "midpoint") else "velocity"
    sampler = configuration([], target=target, sampler=name, num_inference_steps=6).get_parsed_content("chosen_sampler")
    first, second = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    alone = [sampler.sample(lambda latent, timestep: latent.sin(), start, generators(3)) for start in (first, second)]
    inner = []

    def denoise(latent: Tensor, timestep: int) -> Tensor:
        """Walks the whole other trajectory at each step of this one."""
        inner.append(sampler.sample(lambda latent, timestep: latent.sin(), second, generators(3)))
        return latent.sin()

    assert torch.equal(sampler.sample(denoise, first, generators(3)), alone[0])
    assert len(inner) == 6 and all(torch.equal(end, alone[1]) for end in inner)
