# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The training objective: against MONAI's schedulers, the papers' formulas, and by sampling with its optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from released import configuration
from scipy import stats
from torch import Tensor, nn

from scripts.core.errors import BundleError
from scripts.diffusion.denoiser import HybridInferer
from scripts.diffusion.objective import DiffusionObjective, DrawNoised
from scripts.diffusion.targets import TARGETS
from scripts.sampling.latent_diffusion import LatentDiffusion

SHAPE = (3, 4, 6, 8)
ALPHAS = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2)
DIFFUSION = ("epsilon", "sample", "velocity", "difference")
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "velocity": "v_prediction"}


def objective(target: str, **options: Any) -> DiffusionObjective:
    """On the base's schedule."""
    return DiffusionObjective(configuration([], target=target).get_parsed_content("schedule"), **options)


def monais(target: str) -> DDPMScheduler | RFlowScheduler:
    """MONAI's own scheduler of the target, built without the base configuration."""
    if target == "flow":
        return RFlowScheduler(num_train_timesteps=1000)
    betas = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}
    kind = PREDICTION_TYPES.get(target, "epsilon")
    return DDPMScheduler(1000, clip_sample=False, prediction_type=kind, **betas)


def clean(target: str, output: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """The clean latents that outputs imply, (B, C, x, y, z)."""
    one, made = torch.ones(len(timestep), 1, 1, 1, 1), objective(target)
    levels = torch.cat([made.noisy(one, 0 * one, timestep), made.noisy(0 * one, one, timestep)], dim=1)
    batch = zip(output.split(1), noisy.split(1), levels.flatten(1).tolist(), strict=True)
    return torch.cat([TARGETS[target].clean(o, z, a, s) for o, z, (a, s) in batch])


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, size, *SHAPE, generator=generator)
    return latent, noise, torch.tensor([0, 250, 500, 999])[:size]


@pytest.mark.parametrize("target", TARGETS)
def test_noisy_latents_are_monais(target: str) -> None:
    latent, noise, timestep = batch()
    given = monais(target).add_noise(original_samples=latent, noise=noise, timesteps=timestep)
    assert torch.allclose(objective(target).noisy(latent, noise, timestep), given, atol=1e-6)


def test_flow_mixes_in_a_straight_line_at_any_timestep() -> None:
    latent, noise, _ = batch(2)
    noisy = objective("flow").noisy(latent, noise, torch.tensor([250.5, 1000.0]))
    assert torch.allclose(noisy[0], 0.7495 * latent[0] + 0.2505 * noise[0], atol=1e-6)
    assert torch.equal(noisy[1], noise[1])


def test_targets() -> None:
    latent, noise, timestep = batch()
    assert torch.equal(objective("epsilon").target(latent, noise, timestep), noise)
    assert torch.equal(objective("sample").target(latent, noise, timestep), latent)
    assert torch.equal(objective("flow").target(latent, noise, timestep), latent - noise)
    velocity = monais("velocity").get_velocity(latent, noise, timestep)
    assert torch.allclose(objective("velocity").target(latent, noise, timestep), velocity, atol=1e-6)
    assert torch.equal(objective("difference").target(latent, noise, timestep), noise - latent)


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_implies_the_clean_latent(target: str) -> None:
    latent, noise, timestep = batch()
    made = objective(target)
    noisy = made.noisy(latent, noise, timestep)
    found = clean(target, made.target(latent, noise, timestep), noisy, timestep)
    assert torch.allclose(found, latent, atol=2e-5)


@pytest.mark.parametrize("target", [*PREDICTION_TYPES, "flow"])
def test_the_clean_estimate_is_monais_for_any_output(target: str) -> None:
    output, noisy, timestep = batch()
    schedule = monais(target)
    schedule.set_timesteps(1000)
    expected = [schedule.step(output[i : i + 1], t, noisy[i : i + 1])[1] for i, t in enumerate(timestep.tolist())]
    assert torch.allclose(clean(target, output, noisy, timestep), torch.cat(expected), rtol=1e-4, atol=1e-4)


# The weight.


def test_min_snr_weights_are_the_papers() -> None:
    """Hang et al. 2023, section 3.4, in float64."""
    timestep = torch.tensor([0, 10, 100, 250, 500, 999])
    ratio = ALPHAS[timestep] / (1 - ALPHAS[timestep])
    capped = np.minimum(ratio, 5.0)
    assert capped[0] == 5.0 and capped[-1] < 5.0
    expected = {"epsilon": capped / ratio, "sample": capped, "velocity": capped / (ratio + 1)}
    for target, weights in expected.items():
        given = objective(target, min_snr_gamma=5).weight(timestep)
        assert given.dtype == torch.float32
        assert np.allclose(given.double().numpy(), weights, rtol=1e-3)


@pytest.mark.parametrize("target", DIFFUSION)
def test_the_weighted_loss_is_one_error_of_the_clean_latent_whatever_the_target(target: str) -> None:
    latent, noise, timestep = batch()
    made = objective(target, min_snr_gamma=5.0)
    output = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    found = clean(target, output, made.noisy(latent, noise, timestep), timestep)
    ratio = torch.tensor(ALPHAS)[timestep] / (1 - torch.tensor(ALPHAS)[timestep])
    expected = ratio.clamp(max=5.0) * (found - latent).square().flatten(1).mean(1)
    assert torch.allclose(made.loss(output, latent, noise, timestep).double(), expected, rtol=1e-3)


@pytest.mark.parametrize("off", [None, "null", 0, "0"])
def test_no_weight_unless_asked_for(off: Any) -> None:
    assert torch.equal(objective("epsilon", min_snr_gamma=off).weight(torch.tensor([0, 999])), torch.ones(2))
    assert torch.equal(objective("flow", min_snr_gamma=off).weight(torch.tensor([0.5, 999.5])), torch.ones(2))


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("flow", {"min_snr_gamma": 5}, "--min_snr_gamma is a weight of diffusion schedules"),
        ("epsilon", {"min_snr_gamma": -1}, "--min_snr_gamma must be at least 0"),
        ("epsilon", {"min_snr_gamma": "five"}, "--min_snr_gamma must be a finite number"),
        ("epsilon", {"timestep_density": "normal"}, "--timestep_density must be one of uniform, logit-normal"),
        ("flow", {"density_scale": -1}, "--density_scale must be at least 0"),
        ("flow", {"density_location": "inf"}, "--density_location must be a finite number"),
    ],
)
def test_bad_options(target: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(BundleError, match=told):
        objective(target, **options)


# The loss.


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_each_samples_mean_squared_error_in_float32(target: str) -> None:
    latent, noise, timestep = batch()
    made = objective(target)
    output = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    loss = made.loss(output, latent, noise, timestep)
    wanted = made.target(latent, noise, timestep)
    expected = [nn.functional.mse_loss(output[i].float(), wanted[i]) for i in range(4)]
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.stack(expected))


# What training draws.


def draws(made: DiffusionObjective, count: int = 8000) -> Tensor:
    torch.manual_seed(0)
    latent = torch.zeros(1, 1, 1, 1)
    return torch.stack([made.draw(latent)[1] for _ in range(count)])


def test_uniform_timesteps_of_diffusion() -> None:
    timesteps = draws(objective("epsilon"))
    assert timesteps.dtype == torch.int64
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert stats.chisquare(torch.bincount(timesteps // 50, minlength=20)).pvalue > 0.001


def test_uniform_timesteps_of_flow() -> None:
    timesteps = draws(objective("flow"))
    assert timesteps.dtype == torch.float32
    assert stats.kstest(timesteps / 1000, "uniform").pvalue > 0.001


@pytest.mark.parametrize("target", TARGETS)
def test_timesteps_at_fractions_of_the_schedule(target: str) -> None:
    timesteps = objective(target).timestep_at(torch.tensor([0.0, 0.2505, 0.9999, 1.0]))
    assert timesteps.is_floating_point() == (target == "flow")
    assert timesteps.tolist() == pytest.approx([0, 250.5, 999.9, 1000] if target == "flow" else [0, 250, 999, 999])


def logit_normal(edges: Any, location: float, scale: float) -> Any:
    """SciPy's cumulated distribution of sigmoid(normal)."""
    with np.errstate(divide="ignore"):
        return stats.norm.cdf(np.log(edges / (1 - edges)), location, scale)


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_timesteps(location: float, scale: float) -> None:
    options = {"timestep_density": "logit-normal", "density_location": location, "density_scale": scale}
    flow = draws(objective("flow", **options))
    assert stats.kstest(flow / 1000, lambda u: logit_normal(u, location, scale)).pvalue > 0.001
    timesteps = draws(objective("epsilon", **options))
    share = np.diff(logit_normal(np.linspace(0, 1, 21), location, scale))
    counts = torch.bincount(timesteps // 50, minlength=20).numpy()
    common = share * len(timesteps) > 5
    expected = share[common] / share[common].sum() * counts[common].sum()
    assert counts[~common].sum() < 100
    assert stats.chisquare(counts[common], expected).pvalue > 0.001


@pytest.mark.parametrize("target", ["epsilon", "flow"])
def test_a_higher_location_means_more_noise(target: str) -> None:
    latent, noise, _ = batch(1)
    for location, near in ((-30.0, latent), (30.0, noise)):
        made = objective(target, timestep_density="logit-normal", density_location=location)
        timestep = made.draw(latent[0])[1][None]
        noisy = made.noisy(latent, noise, timestep)
        assert (noisy - near).abs().max() < 0.4 * (latent - noise).abs().max()


@pytest.mark.parametrize("target", ["velocity", "flow"])
def test_transform_draws_with_torchs_random_state(target: str) -> None:
    transform, latent = DrawNoised("image", objective(target)), torch.zeros(2, 20, 20, 20)
    torch.manual_seed(3)
    first, second = transform({"image": latent, "participant_id": "a"}), transform({"image": latent})
    torch.manual_seed(3)
    again = transform({"image": latent})
    assert first["participant_id"] == "a" and first["image"] is latent
    assert torch.equal(first["noise"], again["noise"]) and torch.equal(first["timestep"], again["timestep"])
    assert not torch.equal(first["noise"], second["noise"]) and first["timestep"] != second["timestep"]
    assert first["noise"].shape == latent.shape and first["timestep"].shape == ()
    assert stats.kstest(first["noise"].flatten(), "norm").pvalue > 0.001


# Sampling with the network that the objective asks for.


class Known(nn.Module):
    """In the place of the denoiser: the target of the only clean latent that there is."""

    def __init__(self, made: DiffusionObjective, clean: Tensor) -> None:
        super().__init__()
        self.made, self.clean = made, clean

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        noisy = x[:, : self.clean.shape[1]]
        a = self.made.noisy(torch.ones_like(noisy), torch.zeros_like(noisy), timesteps)
        s = self.made.noisy(torch.zeros_like(noisy), torch.ones_like(noisy), timesteps)
        return self.made.target(self.clean, (noisy - a * self.clean) / s, timesteps)


class OptimalForGaussian(nn.Module):
    """In the place of the denoiser: the target's mean, given the noisy latent, for data from N(0, deviation^2)."""

    def __init__(self, made: DiffusionObjective, deviation: float) -> None:
        super().__init__()
        self.made, self.variance = made, deviation**2

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        noisy = x[:, :3]
        a = self.made.noisy(torch.ones_like(noisy), torch.zeros_like(noisy), timesteps)
        s = self.made.noisy(torch.zeros_like(noisy), torch.ones_like(noisy), timesteps)
        total = a**2 * self.variance + s**2
        return self.made.target(a * self.variance / total * noisy, s / total * noisy, timesteps)


def sample(target: str, network: type[nn.Module], known: Any, noise: Tensor, **flags: Any) -> Tensor:
    """Sampling as the base does it, in float32."""
    config = configuration([], target=target, **flags)
    denoiser, sampler = network(objective(target), known), config.get_parsed_content("chosen_sampler")
    family = LatentDiffusion(denoiser, nn.Identity(), HybridInferer(), sampler)
    generators = [torch.Generator().manual_seed(i) for i in range(len(noise))]
    return family.sample_clean(noise, torch.rand(len(noise), 4), generators)


WAYS = [
    *((target, {"num_inference_steps": steps}) for target in TARGETS for steps in (1, 3, 50)),
    *((target, {"sampler": "ddpm", "num_inference_steps": 20}) for target in DIFFUSION),
    *((target, {}) for target in TARGETS),
]


@pytest.mark.parametrize(("target", "flags"), WAYS)
def test_a_network_that_knows_the_latent_leads_to_it(target: str, flags: dict[str, Any]) -> None:
    latent, noise, _ = batch(1)
    assert torch.allclose(sample(target, Known, latent, noise, **flags), latent, atol=5e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("deviation", [0.5, 1.5])
def test_the_best_network_for_gaussian_data_samples_gaussian_data(target: str, deviation: float) -> None:
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    latent = sample(target, OptimalForGaussian, deviation, noise, num_inference_steps=500)
    ratio = latent / noise
    assert torch.allclose(ratio, torch.tensor(deviation), rtol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_on_a_gpu_is_the_cpus(target: str) -> None:
    made = objective(target, min_snr_gamma=None if target == "flow" else 5)
    latent, noise, timestep = batch()
    given = (latent.flip(0), latent, noise, timestep)
    on_gpu = made.loss(*(tensor.cuda() for tensor in given))
    assert torch.allclose(on_gpu.cpu(), made.loss(*given), rtol=1e-4)
