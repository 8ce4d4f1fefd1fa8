# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ and UniPC: the same numbers as diffusers', and the order that the papers state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.schedulers import RFlowScheduler
from released import configuration
from torch import Tensor

from scripts.core.errors import BundleError
from scripts.diffusion.multistep import MultistepSampler, even_in_log_ratio
from scripts.diffusion.samplers import DDIMSampler, FlowSampler, LeadingDDIMScheduler, MidpointSampler
from scripts.diffusion.schedules import choose_schedule, signal_and_noise
from scripts.diffusion.targets import TARGETS

SHAPE = (2, 3, 4, 6, 8)
PREDICTION_TYPES = {name: row.monais for name, row in TARGETS.items() if row.monais}


def schedule(target: str = "epsilon") -> LeadingDDIMScheduler:
    """The base's."""
    return configuration([], target=target).get_parsed_content("schedule")


def network(latent: Tensor, timestep: float) -> Tensor:
    """Stands in for a denoiser: not linear, bounded, and not the same at all timesteps."""
    return torch.sin(1.3 * latent + 0.002 * timestep) + 0.3 * latent.roll(1, -1)


START = torch.linspace(-2.5, 2.5, 12)[None]
CASES = [
    (target, corrector, steps) for target in PREDICTION_TYPES for corrector in (False, True) for steps in (1, 3, 20)
]
REFERENCE = Path(__file__).parent / "data" / "diffusers_multistep.json"


def key(target: str, corrector: bool, steps: int) -> str:
    return f"{'unipc' if corrector else 'dpm'} {target} {steps}"


def walk(sampler: MultistepSampler, latent: Tensor) -> Tensor:
    """The end of a trajectory with the stand-in for a network."""
    return sampler.sample(network, latent, [])


def diffusers_walk(target: str, corrector: bool, steps: int) -> Tensor:
    """The same with the scheduler of diffusers (0.42.1 for the stored ends), over the same timesteps."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    sampler, latent = MultistepSampler(schedule(target), steps), START
    kind = schedulers.UniPCMultistepScheduler if corrector else schedulers.DPMSolverMultistepScheduler
    theirs = kind(
        trained_betas=sampler.schedule.betas.numpy(), prediction_type=PREDICTION_TYPES[target], solver_order=2
    )
    theirs.set_timesteps(steps)
    alphas = theirs.alphas_cumprod[sampler.timesteps].double()
    theirs.timesteps = torch.tensor(sampler.timesteps)
    theirs.sigmas = torch.cat([((1 - alphas) / alphas).sqrt().float(), torch.zeros(1)])
    for timestep in sampler.timesteps:
        latent = theirs.step(network(latent, timestep), timestep, latent).prev_sample
    return latent


@pytest.mark.parametrize(("target", "corrector", "steps"), CASES)
def test_trajectories_end_where_those_of_diffusers_do(target: str, corrector: bool, steps: int) -> None:
    expected = torch.tensor(json.loads(REFERENCE.read_text())[key(target, corrector, steps)])
    found = walk(MultistepSampler(schedule(target), steps, corrector), START)[0]
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_stored_ends_are_those_of_diffusers() -> None:
    """Where diffusers is installed: it is not in the lock, since what it needs excludes MLflow."""
    pytest.importorskip("diffusers")
    stored = json.loads(REFERENCE.read_text())
    for case in CASES:
        assert torch.allclose(diffusers_walk(*case)[0], torch.tensor(stored[key(*case)]), rtol=1e-5, atol=1e-5)


# Where the data is Gaussian, of mean 1 and deviation 0.5, the clean latent and the end of the flow are known.

MEAN, DEVIATION = 1.0, 0.5
FINE = 20_000  # timesteps of a schedule so fine that whole ones hardly differ from those that are wanted
EVEN = 1600  # timesteps of a flow that 20, 40 and 80 steps divide evenly


def fine_schedule(target: str = "epsilon") -> LeadingDDIMScheduler:
    """The base's noise levels at 20 times as many timesteps."""
    given: dict[str, Any] = {"beta_start": 0.0015 * 1000 / FINE, "beta_end": 0.0205 * 1000 / FINE}
    build = partial(LeadingDDIMScheduler, FINE, "scaled_linear_beta", clip_sample=False, **given)
    return choose_schedule({"ddim": build}, target)


def outputs(target: str, a: float, s: float, latent: Tensor) -> Tensor:
    """What a perfect network puts out for a noisy latent a x + s e."""
    clean = MEAN + a * DEVIATION**2 * (latent - a * MEAN) / (a**2 * DEVIATION**2 + s**2)
    noise = (latent - a * clean) / s
    return TARGETS[target].output(clean, noise, a, s)


def error(sampler: Any, target: str) -> float:
    """The largest error of the clean latents at the last timestep of a trajectory, in float64."""
    start = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    levels = signal_and_noise(sampler.schedule, sampler.timesteps)
    of_timestep = dict(zip(sampler.timesteps, levels))

    def denoise(latent: Tensor, timestep: int) -> Tensor:
        a, s = of_timestep[timestep]
        return outputs(target, a, s, latent)

    latent = sampler.sample(denoise, start, [])
    first, last = levels[0], levels[-1] if target != "flow" else (1.0, 0.0)
    spread = [math.hypot(a * DEVIATION, s) for a, s in (first, last)]
    noisy = last[0] * MEAN + (start - first[0] * MEAN) * spread[1] / spread[0]
    exact = noisy if target == "flow" else outputs("sample", *last, noisy)
    return float((latent - exact).abs().max())


ORDERS: list[tuple[str, Callable[[int], Any], float, float]] = [
    ("epsilon", lambda n: DDIMSampler(fine_schedule(), n), 0.7, 1.2),
    ("epsilon", lambda n: MultistepSampler(fine_schedule(), n), 1.8, 2.4),
    ("sample", lambda n: MultistepSampler(fine_schedule("sample"), n), 1.8, 2.4),
    ("velocity", lambda n: MultistepSampler(fine_schedule("velocity"), n), 1.8, 2.4),
    ("velocity", lambda n: MultistepSampler(fine_schedule("velocity"), n, corrector=True), 1.9, 4.0),
    ("difference", lambda n: DDIMSampler(fine_schedule("difference"), n), 0.7, 1.2),
    ("difference", lambda n: MultistepSampler(fine_schedule("difference"), n), 1.8, 2.4),
    ("flow", lambda n: FlowSampler(RFlowScheduler(EVEN, use_discrete_timesteps=True), n), 0.8, 1.2),
    ("flow", lambda n: MidpointSampler(RFlowScheduler(EVEN, use_discrete_timesteps=True), n), 1.8, 4.0),
]


@pytest.mark.parametrize(("target", "sampler", "least", "most"), ORDERS)
def test_order_of_the_error(target: str, sampler: Callable[[int], Any], least: float, most: float) -> None:
    errors = [error(sampler(n), target) for n in (20, 40, 80)]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert least < min(orders) and max(orders) < most, (errors, orders)


@pytest.mark.parametrize("corrector", [False, True])
def test_twenty_steps_are_nearer_to_the_end_of_the_flow_than_fifty_of_ddim(corrector: bool) -> None:
    assert (
        error(MultistepSampler(schedule(), 20, corrector), "epsilon")
        < error(DDIMSampler(schedule(), 50), "epsilon") / 4
    )


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100, 999, 1000])
def test_timesteps_fall_from_the_last_to_the_first(steps: int) -> None:
    found = even_in_log_ratio(schedule(), steps)
    assert len(found) == steps and found[0] == 999 and (steps == 1 or found[-1] == 0)
    assert all(now > following for now, following in zip(found, found[1:]))
    ratios = [math.log(a / s) for a, s in signal_and_noise(schedule(), found)]
    if 1 < steps < 50:
        widths = np.diff(ratios)
        assert widths.max() - widths.min() < 0.4  # the schedule's own first timesteps are 0.35 apart


def test_a_new_trajectory_forgets_the_last_one() -> None:
    sampler = MultistepSampler(schedule(), 4, corrector=True)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))

    first, calls = walk(sampler, start), [0]

    def broken_off(latent: Tensor, timestep: float) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return network(latent, timestep)

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(broken_off, start + 1.0, [])
    assert torch.equal(walk(sampler, start), first)


def test_clean_latents_are_clipped_where_the_schedule_says_so() -> None:
    clipping = LeadingDDIMScheduler(1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, clip_sample=True)
    start = 5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    ends = [MultistepSampler(s, 1).sample(lambda z, t: torch.zeros(SHAPE), start, []) for s in (clipping, schedule())]
    assert ends[0].abs().max() == 1.0 < ends[1].abs().max()


def test_multistep_samplers_are_for_diffusion() -> None:
    with pytest.raises(BundleError, match="give --sampler flow or midpoint"):
        MultistepSampler(RFlowScheduler(1000, use_discrete_timesteps=True), 10)  # type: ignore[arg-type]
