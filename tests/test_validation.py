# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What a validation reports, what it writes, and that a training does not notice it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.metrics.regression import MAEMetric, PSNRMetric, SSIMMetric
from monai.networks.nets import AutoencoderKL
from monai.networks.schedulers import RFlowScheduler
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from scripts.autoencoder.validation import AutoencoderValidation
from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.tables import read_table
from scripts.diffusion.objective import DiffusionObjective
from scripts.diffusion.samplers import LeadingDDIMScheduler
from scripts.diffusion.validation import DiffusionValidation, SampleFigure, label, low_and_high
from scripts.training.ema import ExponentialMovingAverage, network_to_sample
from scripts.training.validation import Evaluation, undisturbed
from scripts.volumes.pictures import figure_path, figures_of

SHAPE = (16, 24, 16)
METRICS = {
    "psnr": PSNRMetric(max_val=1.0),
    "ssim": SSIMMetric(spatial_dims=3, data_range=1.0, kernel_type="gaussian", win_size=11, kernel_sigma=1.5),
    "mae": MAEMetric(),
}


class Rows(torch.utils.data.Dataset):
    """Items that are made by a function of their index."""

    def __init__(self, make: Callable[[int], dict[str, Any]], length: int) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(index)


def volume(index: int) -> dict[str, Any]:
    """Smooth bright blobs on a dark ground."""
    noise = torch.rand((1, 1, 4, 6, 4), generator=torch.Generator().manual_seed(index))
    return {"image": nn.functional.interpolate(noise, SHAPE, mode="trilinear")[0], "participant_id": f"sub-{index}"}


def latent(index: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 + index)
    return {"image": torch.randn((3, 4, 6, 4), generator=generator), "condition": torch.rand(2, generator=generator)}


def autoencoder() -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_num_groups": 2, "num_res_blocks": 1, "attention_levels": (False, False)}
    bare = {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
    return AutoencoderKL(3, in_channels=1, out_channels=1, channels=(4, 4), latent_channels=3, **options, **bare)


def trainer(length: int = 2) -> Engine:
    """An engine whose iterations draw random numbers and report them."""
    engine = Engine(draw)
    engine.state.metrics = {}
    engine.add_event_handler(Events.STARTED, seed)
    return engine


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def draw(engine: Engine, batch: int) -> list[float]:
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    engine.state.drawn = [*getattr(engine.state, "drawn", []), *drawn]
    return drawn


def run(*handlers: Any, epochs: int = 1, engine: Engine | None = None) -> Engine:
    engine = engine or trainer()
    for handler in handlers:
        handler.attach(engine)
    engine.run([0, 1], max_epochs=epochs)
    return engine


# When it takes place, and what it leaves alone.


class Recorded(Evaluation):
    """An evaluation that notes its iterations and disturbs what it can."""

    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        random.random(), np.random.rand(), torch.rand(3)
        assert not network.training and not torch.is_grad_enabled()
        return {"iteration": float(iteration)}


def evaluated(run_dir: Path) -> list[int]:
    return [int(row["iteration"]) for row in read_table(run_dir / "validation.tsv")]


def test_evaluated_every_few_epochs_and_at_the_end(tmp_path: Path) -> None:
    run(Recorded(nn.Linear(1, 1), tmp_path, every=2), epochs=5)
    assert evaluated(tmp_path) == [4, 8, 10]
    assert [row["epoch"] for row in read_table(tmp_path / "validation.tsv")] == ["2", "4", "5"]


def test_values_are_in_the_metrics_until_the_next_epoch(tmp_path: Path) -> None:
    engine, seen = trainer(), []
    Recorded(nn.Linear(1, 1), tmp_path, every=2).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(dict(engine.state.metrics)))
    run(epochs=4, engine=engine)
    assert seen == [{}, {"val_iteration": 4.0}, {}, {"val_iteration": 8.0}]


def test_none_where_every_is_0(tmp_path: Path) -> None:
    run(Recorded(nn.Linear(1, 1), tmp_path, every=0))
    assert not list(tmp_path.iterdir())
    with pytest.raises(BundleError, match="--validate_every"):
        Recorded(nn.Linear(1, 1), tmp_path, every="x")


def test_resumed_training_drops_the_rows_of_what_it_does_again(tmp_path: Path) -> None:
    run(Recorded(nn.Linear(1, 1), tmp_path), epochs=4)
    again = trainer()
    again.state.max_epochs, again.state.epoch_length = 3, 2
    again.state.epoch, again.state.iteration = 2, 4
    Recorded(nn.Linear(1, 1), tmp_path).attach(again)
    again.add_event_handler(Events.EPOCH_STARTED, lambda: again.state.seen.append(evaluated(tmp_path)))
    again.state.seen = []
    again.run([0, 1], max_epochs=3)
    assert again.state.seen == [[2, 4]]
    assert evaluated(tmp_path) == [2, 4, 6]


def test_new_training_drops_all_rows(tmp_path: Path) -> None:
    run(Recorded(nn.Linear(1, 1), tmp_path), epochs=4)
    run(Recorded(nn.Linear(1, 1), tmp_path, every=3), epochs=3)
    assert evaluated(tmp_path) == [6]


def test_training_draws_the_same_numbers_with_and_without(tmp_path: Path) -> None:
    alone = run(epochs=3).state.drawn
    assert run(Recorded(nn.Linear(1, 1), tmp_path), epochs=3).state.drawn == alone
    real = AutoencoderValidation(autoencoder(), Rows(volume, 2), METRICS, tmp_path / "a")
    assert run(real, epochs=3).state.drawn == alone
    assert run(diffusion(tmp_path / "d"), figure(tmp_path / "s"), epochs=3).state.drawn == alone


@pytest.mark.gpu
def test_numbers_of_the_gpu_are_left_alone() -> None:
    network = nn.Linear(1, 1).cuda()
    torch.cuda.manual_seed(1)
    first = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    with undisturbed(network):
        torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), first)


def test_modes_of_modules_come_back_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1).eval()).train()
    network[1].eval()
    with pytest.raises(RuntimeError), undisturbed(network):
        assert not network[0].training
        raise RuntimeError
    assert [module.training for module in network.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_weights_may_come_from_a_function(tmp_path: Path) -> None:
    averaged = nn.Linear(1, 1)
    seen = []

    class Seen(Evaluation):
        def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
            seen.append(network)
            return {}

    run(Seen(lambda: averaged, tmp_path))
    assert seen == [averaged] and not (tmp_path / "validation.tsv").exists()


def test_monai_trainer_reports_the_values(tmp_path: Path) -> None:
    network = nn.Conv3d(1, 1, 1)
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.rand(1, 1, 4, 4, 4), "label": torch.rand(1, 1, 4, 4, 4)}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=nn.MSELoss(),
        train_handlers=[Recorded(network, tmp_path)],
    ).run()
    assert evaluated(tmp_path) == [1] and network.training


# The autoencoder.


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path, Any]:
    """Metrics, run folder and network of one validation of an untrained autoencoder on five volumes."""
    network, folder = autoencoder(), tmp_path_factory.mktemp("run")
    engine = run(AutoencoderValidation(network, Rows(volume, 5), METRICS, folder))
    return dict(engine.state.metrics), folder, network


def test_metrics_are_those_of_skimage(validated: tuple[dict[str, float], Path, Any]) -> None:
    values, _, network = validated
    pairs = []
    for index in range(5):
        original = volume(index)["image"][None]
        with torch.no_grad():
            pairs.append([v[0, 0].numpy() for v in (original, network.eval().reconstruct(original))])
    psnr = [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
    assert values["val_psnr"] == pytest.approx(np.mean(psnr), rel=1e-5)
    assert values["val_mae"] == pytest.approx(np.mean([np.abs(a - b).mean() for a, b in pairs]), rel=1e-5)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "truncate": 3.5}
    ssim = [structural_similarity(*pair, data_range=1.0, **window) for pair in pairs]
    assert values["val_ssim"] == pytest.approx(np.mean(ssim), rel=1e-3)


def test_latent_statistics_are_those_of_all_latents(validated: tuple[dict[str, float], Path, Any]) -> None:
    values, _, network = validated
    with torch.no_grad():
        mean, sigma = network.eval().encode(torch.stack([volume(index)["image"] for index in range(5)]))
    normal = torch.distributions.Normal
    kl = (
        torch.distributions.kl_divergence(normal(mean, sigma), normal(torch.zeros(()), torch.ones(()))).sum().item() / 5
    )
    expected = {"kl": kl, "kl_per_value": kl / mean[0].numel(), "latent_sigma": sigma.mean()}
    expected |= {"latent_mean": mean.mean(), "latent_std": mean.std(correction=0)}
    for channel in range(3):
        expected[f"latent_mean_channel{channel}"] = mean[:, channel].mean()
        expected[f"latent_std_channel{channel}"] = mean[:, channel].std(correction=0)
    found = {name: values[f"val_{name}"] for name in expected}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4, abs=1e-6)
    assert set(values) == {f"val_{name}" for name in (*expected, *METRICS)}


def test_table_has_the_values(validated: tuple[dict[str, float], Path, Any]) -> None:
    values, folder, _ = validated
    (row,) = read_table(folder / "validation.tsv")
    assert (row.pop("epoch"), row.pop("iteration")) == ("1", "2")
    assert {name: float(value) for name, value in row.items()} == pytest.approx(values, rel=1e-6)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_reconstructions_are_drawn(validated: tuple[dict[str, float], Path, Any]) -> None:
    _, folder, _ = validated
    assert figures_of(folder, 2) == {"reconstruction": folder / "figures" / "reconstruction_iteration-000002.png"}
    assert figures_of(folder, 3) == {}
    picture = pixels(figure_path(folder, "reconstruction", 2))
    assert picture.shape[0] == 3 * 185 and picture.shape[1] > 900 and picture.shape[2] == 3
    for row in np.split(picture, 3):
        original, copy, difference = np.array_split(row.astype(float), 3, axis=1)
        assert original.std() > 10 and (original[60:] == original[60:, :, :1]).all()
        assert np.abs(difference[..., 0] - difference[..., 2]).max() > 50
        assert np.abs(original[:, :300] - copy[:, :300]).max() > 50


def test_validation_does_not_depend_on_earlier_ones(
    tmp_path: Path, validated: tuple[dict[str, float], Path, Any]
) -> None:
    engine = run(AutoencoderValidation(autoencoder(), Rows(volume, 5), METRICS, tmp_path), epochs=3)
    assert engine.state.metrics == validated[0]


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    few = run(AutoencoderValidation(autoencoder(), Rows(volume, 5), METRICS, tmp_path, limit=2))
    same = run(AutoencoderValidation(autoencoder(), Rows(volume, 2), METRICS, tmp_path, limit=9))
    assert few.state.metrics == same.state.metrics


def test_rows_may_be_read_ahead(tmp_path: Path, validated: tuple[dict[str, float], Path, Any]) -> None:
    engine = run(AutoencoderValidation(autoencoder(), Rows(volume, 5), METRICS, tmp_path, num_workers=1))
    assert engine.state.metrics == validated[0]


def test_without_held_out_rows_there_is_no_validation(tmp_path: Path) -> None:
    assert run(AutoencoderValidation(autoencoder(), Rows(volume, 0), METRICS, tmp_path)).state.metrics == {}


def in_processes(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    run_dir = Path(folder) / f"rank{rank}"
    engine = run(
        AutoencoderValidation(autoencoder(), Rows(volume, 5), METRICS, run_dir), figure(run_dir), diffusion(run_dir)
    )
    torch.save(dict(engine.state.metrics), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_rows(tmp_path: Path, validated: tuple[dict[str, float], Path, Any]) -> None:
    start_processes(in_processes, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    expected = validated[0] | run(diffusion(tmp_path / "alone"), figure(tmp_path / "alone")).state.metrics
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == expected
    assert not (tmp_path / "rank1").exists()
    written = figures_of(tmp_path / "rank0", 2)
    assert written.keys() == {"reconstruction", "samples"}
    assert (pixels(written["samples"]) == pixels(figure_path(tmp_path / "alone", "samples", 2))).all()


# The diffusion model.


def objective(target: str = "epsilon") -> DiffusionObjective:
    if target == "flow":
        return DiffusionObjective(RFlowScheduler(num_train_timesteps=1000))
    return DiffusionObjective(objective_schedule())


def objective_schedule() -> LeadingDDIMScheduler:
    """That of the released model."""
    return LeadingDDIMScheduler(1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205)


def signal_and_noise(target: str, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the clean latent and of the noise."""
    shape = (-1, 1, 1, 1, 1)
    if target == "flow":
        return (1.0 - timesteps / 1000.0).reshape(shape), (timesteps / 1000.0).reshape(shape)
    betas = torch.linspace(0.0015**0.5, 0.0205**0.5, 1000, dtype=torch.float64) ** 2
    power = torch.cumprod(1.0 - betas, dim=0)[timesteps].float().reshape(shape)
    return power.sqrt(), (1.0 - power).sqrt()


class Call:
    """Calls the network as it is, and notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def denoise(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((noisy, timesteps, condition))
        return network(noisy, timesteps)


class Oracle(nn.Module):
    """Knows the one latent that there is, and so the noise."""

    def __init__(self, target: str, latent: Tensor) -> None:
        super().__init__()
        self.target, self.latent = target, nn.Parameter(latent)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = signal_and_noise(self.target, timesteps)
        found = (noisy - signal * self.latent) / noise
        return self.latent - found if self.target == "flow" else found


class Zero(nn.Module):
    """Always 0."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.nothing * noisy


def diffusion(run_dir: Path, network: nn.Module | None = None, rows: int = 3, **options: Any) -> DiffusionValidation:
    given: dict[str, Any] = {"hybrid": Call(), "objective": objective(), **options}
    return DiffusionValidation(network=network or Zero(), dataset=Rows(latent, rows), run_dir=run_dir, **given)


BANDS = [f"val_loss_band{band}" for band in range(5)]


@pytest.mark.parametrize("target", ["epsilon", "flow"])
def test_oracle_has_no_loss(target: str, tmp_path: Path) -> None:
    oracle = Oracle(target, latent(0)["image"])
    values = run(diffusion(tmp_path, oracle, rows=1, objective=objective(target))).state.metrics
    assert values == pytest.approx(dict.fromkeys(["val_loss", *BANDS], 0.0), abs=1e-6)


@pytest.mark.parametrize(("target", "about"), [("epsilon", 1.0), ("flow", 2.0)])
def test_zero_has_the_mean_square_of_the_target(target: str, about: float, tmp_path: Path) -> None:
    hybrid = Call()
    values = run(diffusion(tmp_path, hybrid=hybrid, objective=objective(target))).state.metrics
    losses: dict[int, list[float]] = {band: [] for band in range(5)}
    for row, (noisy, timesteps, condition) in enumerate(hybrid.calls):
        clean = latent(row)["image"]
        signal, share = signal_and_noise(target, timesteps)
        noise = (noisy - signal * clean) / share
        assert condition.shape == (5, 2) and (condition == latent(row)["condition"]).all()
        for one, drawn in zip(timesteps.tolist(), noise - clean if target == "flow" else noise):
            losses[int(one // 200)].append(drawn.square().mean().item())
    assert all(len(band) == 3 for band in losses.values())
    expected = {f"val_loss_band{band}": np.mean(of_band) for band, of_band in losses.items()}
    assert values == pytest.approx({**expected, "val_loss": np.mean(list(losses.values()))}, rel=1e-3)
    assert values["val_loss"] == pytest.approx(about, rel=0.1)  # of one or two standard normals


def test_weight_of_the_objective_counts(tmp_path: Path) -> None:
    plain = run(diffusion(tmp_path)).state.metrics
    capped = DiffusionObjective(objective_schedule(), min_snr_gamma=1.0)
    weighted = run(diffusion(tmp_path, objective=capped)).state.metrics
    assert weighted["val_loss_band0"] < 0.5 * plain["val_loss_band0"]
    assert weighted["val_loss_band4"] == pytest.approx(plain["val_loss_band4"])


def test_unknown_conditions_are_in_the_middle(tmp_path: Path) -> None:
    hybrid = Call()
    row = {**latent(0), "condition": torch.tensor([float("nan"), 0.9])}
    rows = Rows(lambda index: row, 1)
    run(DiffusionValidation(network=Zero(), dataset=rows, hybrid=hybrid, objective=objective(), run_dir=tmp_path))
    assert hybrid.calls[0][2][0].tolist() == pytest.approx([0.5, 0.9])


def test_averaged_weights_are_those_of_sampling() -> None:
    network = nn.Linear(1, 1)
    average = ExponentialMovingAverage(network, 0.9)
    assert network_to_sample(network) is network and network_to_sample(network, average) is average.network


def test_noise_and_timesteps_are_fixed_and_differ_between_rows(tmp_path: Path) -> None:
    first, second = Call(), Call()
    run(diffusion(tmp_path, hybrid=first))
    torch.manual_seed(7)
    run(diffusion(tmp_path, hybrid=second, rows=2))
    for a, b in zip(first.calls, second.calls):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    everything = torch.cat([timesteps for _, timesteps, _ in first.calls])
    assert len(everything.unique()) == 15


def test_few_draws_visit_the_bands_in_turn(tmp_path: Path) -> None:
    hybrid = Call()
    values = run(diffusion(tmp_path, hybrid=hybrid, draws=2, rows=2)).state.metrics
    timesteps = torch.cat([timesteps for _, timesteps, _ in hybrid.calls])
    assert (timesteps // 200).tolist() == [0, 1, 2, 3]
    assert "val_loss_band3" in values and "val_loss_band4" not in values


# Samples.


CONDITIONS = Conditions(
    age={"raw": "age_years", "unit": "years", "minimum": 40, "maximum": 80},
    sex={"raw": "sex_word", "unit": "", "minimum": 0, "maximum": 1, "codes": {"female": 0, "male": 1}},
)


class Blobs:
    """Volumes whose brightness is the first condition, with a pattern of the noise."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[float]]] = []

    noise_shape = (3, 4, 6, 4)

    def sample(self, noise: Tensor, condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        self.calls.append((noise, condition[0].tolist()))
        pattern = nn.functional.interpolate(noise[:, :1], SHAPE, mode="trilinear").sigmoid()
        return 0.5 * condition[:, :1, None, None, None] + 0.5 * pattern


def figure(run_dir: Path, **options: Any) -> SampleFigure:
    given: dict[str, Any] = {"family": Blobs(), "conditions": CONDITIONS, **options}
    return SampleFigure(Zero(), run_dir=run_dir, **given)


def test_samples_have_each_condition_low_and_high(tmp_path: Path) -> None:
    sampler = Blobs()
    run(figure(tmp_path, family=sampler), epochs=2)
    vectors = [vector for _, vector in sampler.calls]
    assert vectors == [[0.0, 0.5], [1.0, 0.5], [0.5, 0.0], [0.5, 1.0]] * 2
    noise = sampler.calls[0][0]
    assert noise.shape == (1, 3, 4, 6, 4) and all(torch.equal(inputs, noise) for inputs, _ in sampler.calls)
    assert not (tmp_path / "validation.tsv").exists()


def test_samples_are_drawn_with_their_conditions(tmp_path: Path) -> None:
    run(figure(tmp_path))
    picture = pixels(figure_path(tmp_path, "samples", 2))
    assert picture.shape[0] == 4 * 185 and picture.shape[1] > 500 and picture.shape[2] == 3
    low, high, *_ = np.split(picture.astype(float), 4)
    text = picture.shape[1] // 3
    assert high[60:-20, text + 40 : -40].mean() > low[60:-20, text + 40 : -40].mean() + 50
    for row in (low, high):
        assert (row[:, : text - 20] < 128).sum() > 200  # the text
    assert not np.array_equal(low[:, : text - 20], high[:, : text - 20])


def test_labels_say_both_units() -> None:
    assert low_and_high(CONDITIONS) == [{"age": 0.0}, {"age": 1.0}, {"sex": 0.0}, {"sex": 1.0}]
    assert label(CONDITIONS, torch.tensor([0.25, 1.0])) == "age 0.25 (50 years)\nsex 1 (male)"
    volume = Conditions(brain={"raw": "mm3", "unit": "mm3", "minimum": 1144240, "maximum": 1793910})
    assert label(volume, torch.tensor([0.5])) == "brain 0.5 (1469 mL)"


def test_requests_of_samples_may_be_given(tmp_path: Path) -> None:
    sampler = Blobs()
    run(figure(tmp_path, family=sampler, requests=[{"age_years": 60, "sex": 1}]))
    assert [vector for _, vector in sampler.calls] == [[0.5, 1.0]]
    with pytest.raises(BundleError, match="no samples to draw"):
        figure(tmp_path, requests=[])
