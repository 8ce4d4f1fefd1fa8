# Copyright (c) Brain LDM contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Both trainings, on four made-up heads at tiny size."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import head, refused, write_dataset
from monai.bundle import ConfigParser
from monai.networks.nets import PatchDiscriminator
from monai.utils import set_determinism
from released import configuration, generative_network
from torch import Tensor, nn

from scripts.autoencoder_training import AutoencoderStep, autoencoder_to_train, kl_to_standard_normal
from scripts.checkpoints import load_network
from scripts.conditions import Conditions
from scripts.datasets import LoadVolumed, RandFillMissingd, participants
from scripts.errors import BundleError
from scripts.grid import Grid
from scripts.latents import latents
from scripts.tables import read_table, write_table
from scripts.training import Facts, FiniteLosses, lr_schedule, set_seed, start
from scripts.volumes import write_volume

AUTOENCODER, ENCODE, DIFFUSION = (
    f"configs/{name}.yaml" for name in ("train_autoencoder", "encode_latents", "train_diffusion")
)


@pytest.fixture(scope="module")
def config() -> ConfigParser:
    return configuration()


@pytest.fixture(scope="module")
def conditions(config: ConfigParser) -> Conditions:
    return config.get_parsed_content("conditions")


@pytest.fixture(scope="module")
def grid(config: ConfigParser) -> Grid:
    return config.get_parsed_content("grid")


@pytest.fixture(autouse=True)
def fewer_surprises() -> Iterator[None]:
    """The same random numbers in every run of a test, and MONAI's determinism off after it."""
    torch.manual_seed(0)
    yield
    set_determinism(None)


class Pipeline:
    """Runs the verbs in this process, at tiny size, in one folder."""

    def __init__(self, folder: Path, run_here: RunHere) -> None:
        self.folder, self.run_here = folder, run_here
        self.dataset, self.latents = folder / "dataset", folder / "latents"
        self.autoencoder, self.diffusion = folder / "autoencoder", folder / "diffusion"

    def train_autoencoder(self, **flags: Any) -> Any:
        given = {
            "dataset_dir": str(self.dataset),
            "run_dir": str(self.autoencoder),
            "perceptual_weight": 0.0,
            "seed": 1,
        }
        return self.run_here([BASE, AUTOENCODER, TINY], **{**given, **flags})

    def encode(self, **flags: Any) -> Any:
        given = {"dataset_dir": str(self.dataset), "latents_dir": str(self.latents), **self.trained()}
        return self.run_here([BASE, ENCODE, TINY], **{**given, **flags})

    def train_diffusion(self, **flags: Any) -> Any:
        given = {"latents_dir": str(self.latents), "run_dir": str(self.diffusion), "seed": 1}
        return self.run_here([BASE, DIFFUSION, TINY], **{**given, **flags})

    def trained(self) -> dict[str, Any]:
        return {"autoencoder_path": str(self.autoencoder / "autoencoder.pt"), "load_old": 0}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, run_here: RunHere, grid: Grid) -> Pipeline:
    """Both stages trained for two epochs. Tests must not change it: see `work`."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"), run_here)
    write_dataset(pipeline.dataset, grid)
    pipeline.train_autoencoder()
    pipeline.encode()
    pipeline.train_diffusion()
    return pipeline


@pytest.fixture
def work(done: Pipeline, tmp_path: Path, run_here: RunHere) -> Pipeline:
    """A copy of the trained pipeline, to go on with."""
    shutil.copytree(done.folder, tmp_path / "work")
    return Pipeline(tmp_path / "work", run_here)


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# One iteration of the autoencoder's training.


def test_kl_is_that_of_torch_distributions() -> None:
    mean, std = torch.randn(3, 2, 4, 5, 6), torch.rand(3, 2, 4, 5, 6) + 0.05
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(mean, std), normal(torch.zeros(()), torch.ones(())))
    assert kl_to_standard_normal(mean, std).item() == pytest.approx(reference.sum().item() / 3, rel=1e-5)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.ones(2, 3)).item() == 0.0
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)).isfinite()


class SquaredError(nn.Module):
    """In the place of the perceptual loss."""

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        return (reconstruction - image).square().mean()


def discriminator() -> nn.Module:
    options = {"kernel_size": 4, "activation": None, "norm": "BATCH", "bias": False, "padding": 1}
    return PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1, **options)


def engine(config: ConfigParser, epoch: int, lr: float = 0.1) -> Any:
    """What an iteration needs of a trainer, with plain gradient descent."""
    autoencoder = config.get_parsed_content("autoencoder_def")
    autoencoder = load_network(autoencoder, SimpleNamespace(path="x", facts={}, state=old_weights(config)), 1).train()  # type: ignore[arg-type]
    opponent = discriminator()
    state = SimpleNamespace(
        device=torch.device("cpu"),
        epoch=epoch,
        g_network=autoencoder,
        d_network=opponent,
        g_optimizer=torch.optim.SGD(autoencoder.parameters(), lr),
        d_optimizer=torch.optim.SGD(opponent.parameters(), lr),
    )
    return SimpleNamespace(state=state, non_blocking=False)


def old_weights(config: ConfigParser) -> dict[str, Tensor]:
    return generative_network(config, "autoencoder_def").state_dict()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(2))


def test_one_iteration_minimises_the_weighted_sum(config: ConfigParser, images: Tensor) -> None:
    weights = {"perceptual_weight": 0.5, "kl_weight": 1e-3, "adversarial_weight": 0.25}
    trainer = engine(config, epoch=3)
    network, opponent = copy.deepcopy(trainer.state.g_network), copy.deepcopy(trainer.state.d_network)
    torch.manual_seed(4)
    output = AutoencoderStep(SquaredError(), **weights, warm_up_epochs=2, clip_gradients=0.0)(
        trainer, {"image": images}
    )

    torch.manual_seed(4)
    reconstruction, mean, std = network(images)
    terms = {
        "l1": (reconstruction - images).abs().mean(),
        "perceptual": (reconstruction - images).square().mean(),
        "kl": kl_to_standard_normal(mean, std),
        "adversarial": (opponent(reconstruction)[-1] - 1).square().mean(),
    }
    total = terms["l1"] + 0.5 * terms["perceptual"] + 1e-3 * terms["kl"] + 0.25 * terms["adversarial"]
    total.backward()
    opponent.zero_grad()
    real, fake = opponent(images)[-1], opponent(reconstruction.detach())[-1]
    judged = 0.5 * ((real - 1).square().mean() + fake.square().mean())
    judged.backward()

    expected = {"loss": total, **terms, "discriminator": judged}
    assert output["losses"] == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert torch.allclose(output["pred"], reconstruction)
    for ours, reference in ((trainer.state.g_network, network), (trainer.state.d_network, opponent)):
        for moved, parameter in zip(ours.parameters(), reference.parameters(), strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert torch.allclose(moved, parameter - 0.1 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "weight", "joins"), [(1, 0.1, False), (2, 0.1, False), (3, 0.1, True), (3, 0.0, False)]
)
def test_discriminator_rests_in_the_warm_up(
    epoch: int, weight: float, joins: bool, config: ConfigParser, images: Tensor
) -> None:
    trainer = engine(config, epoch)
    before = copy.deepcopy(trainer.state.d_network.state_dict())
    step = AutoencoderStep(None, 0.0, 1e-8, weight, warm_up_epochs=2)
    losses = step(trainer, {"image": images})["losses"]
    assert {"adversarial", "discriminator"} <= losses.keys() if joins else losses.keys() == {"loss", "l1", "kl"}
    assert same(before, trainer.state.d_network.state_dict()) is not joins


def test_gradients_are_clipped(config: ConfigParser, images: Tensor) -> None:
    trainer = engine(config, epoch=1, lr=1.0)
    before = copy.deepcopy(trainer.state.g_network.state_dict())
    AutoencoderStep(None, 0.0, 1.0, 0.0, warm_up_epochs=2, clip_gradients=1e-2)(trainer, {"image": images})
    after = trainer.state.g_network.state_dict()
    moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    assert moved.item() == pytest.approx(1e-2, rel=1e-2)


def test_reconstruction_of_two_volumes_improves(config: ConfigParser, grid: Grid) -> None:
    images = torch.stack([head(grid, seed)[::2, ::3, ::2] for seed in range(2)])[:, None]
    trainer = engine(config, epoch=1)
    trainer.state.g_network = autoencoder_to_train(configuration().get_parsed_content("autoencoder_def"), -8.0)
    trainer.state.g_optimizer = torch.optim.Adam(trainer.state.g_network.parameters(), 5e-3)
    step = AutoencoderStep(None, 0.0, 1e-8, 0.0, warm_up_epochs=5)
    losses = [step(trainer, {"image": images})["losses"]["l1"] for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# From a dataset to samples.


def test_checkpoints_hold_all_that_is_needed(done: Pipeline, conditions: Conditions) -> None:
    names = {path.name for path in done.autoencoder.iterdir() if path.suffix == ".pt"}
    assert names == {"checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "autoencoder.pt"}
    saved = content(done.autoencoder / "autoencoder.pt")
    assert saved["trainer"] == {"epoch": 2, "iteration": 4}
    assert saved["facts"] == {"network": "autoencoder", "channels": [8, 8, 16], "latent_channels": 3}
    saved = content(done.diffusion / "diffusion.pt")
    assert saved["facts"]["conditions"] == conditions.as_dict()
    assert saved["facts"]["prediction_type"] == "epsilon"
    assert list(done.diffusion.glob("events.out.tfevents*"))


def test_sampling_takes_what_was_trained(done: Pipeline, run_here: RunHere, tmp_path: Path) -> None:
    scale = content(done.diffusion / "diffusion.pt")["facts"]["latent_scale"]
    flags = {**done.trained(), "diffusion_path": str(done.diffusion / "diffusion.pt"), "num_inference_steps": 2}
    workflow = run_here([BASE, TINY], output_dir=str(tmp_path), seed=1, **flags)
    inferer = workflow.parser.get_parsed_content("inferer")
    latent = torch.randn(1, *workflow.parser.get_parsed_content("latent_shape"))
    with torch.no_grad():
        expected = inferer.autoencoder.decode_stage_2_outputs(latent / scale)
    assert scale != 1.0 and torch.equal(inferer.decode(latent), expected)
    assert f'"latent_scale": {scale}' in (tmp_path / "sample_seed-1_000000.json").read_text()


def test_sampling_with_other_conditions_than_in_training(done: Pipeline, run_here: RunHere, tmp_path: Path) -> None:
    flags = {**done.trained(), "diffusion_path": str(done.diffusion / "diffusion.pt"), "output_dir": str(tmp_path)}
    assert "other conditions" in refused(run_here, [BASE, TINY], **{**flags, "conditions::age::maximum": 90})
    assert list(tmp_path.iterdir()) == []


def test_options_of_both_trainings(work: Pipeline) -> None:
    """Mixed precision, crops, a cache, given weights, a falling rate, a narrow posterior."""
    pretrained, options = str(work.autoencoder / "autoencoder.pt"), {"amp": 1, "max_epochs": 1, "lr_decay": "cosine"}
    crops = {"patch_shape": [16, 16, 16], "cache_rate": 1.0, "initial_log_variance": -8.0, "warm_up_epochs": 0}
    work.train_autoencoder(run_dir=str(work.folder / "other"), pretrained=pretrained, **crops, **options)
    assert content(work.folder / "other" / "autoencoder.pt")["trainer"] == {"epoch": 1, "iteration": 2}
    pretrained = str(work.diffusion / "diffusion.pt")
    work.train_diffusion(run_dir=str(work.folder / "another"), pretrained=pretrained, epoch_length=1, **options)
    assert content(work.folder / "another" / "diffusion.pt")["trainer"] == {"epoch": 1, "iteration": 1}


# Stopping and going on.


def test_rerun_of_a_finished_training_changes_nothing(work: Pipeline) -> None:
    before = content(work.autoencoder / "autoencoder.pt")
    work.train_autoencoder(seed=2)
    after = content(work.autoencoder / "autoencoder.pt")
    assert after["trainer"] == before["trainer"]
    assert same(after["autoencoder"], before["autoencoder"]) and same(after["discriminator"], before["discriminator"])


def steps_of(optimizer: dict[str, Any]) -> set[int]:
    return {int(state["step"]) for state in optimizer["state"].values()}


def test_more_epochs_go_on_from_the_last(work: Pipeline) -> None:
    work.train_autoencoder(max_epochs=3)
    names = sorted(path.name for path in work.autoencoder.glob("checkpoint*"))
    assert names == ["checkpoint_epoch=2.pt", "checkpoint_epoch=3.pt"]
    saved = content(work.autoencoder / "autoencoder.pt")
    assert saved["trainer"] == {"epoch": 3, "iteration": 6}
    assert steps_of(saved["optimizer"]) == {6}
    assert steps_of(saved["discriminator_optimizer"]) == {4}  # it rested for one epoch
    work.train_diffusion(max_epochs=3)
    assert steps_of(content(work.diffusion / "diffusion.pt")["optimizer"]) == {6}


def test_stopped_training_goes_on(work: Pipeline) -> None:
    (work.autoencoder / "autoencoder.pt").unlink()
    (work.autoencoder / "checkpoint_epoch=2.pt").unlink()
    work.train_autoencoder()
    assert steps_of(content(work.autoencoder / "autoencoder.pt")["optimizer"]) == {4}


def test_damaged_checkpoint_is_named(work: Pipeline) -> None:
    newest = work.diffusion / "checkpoint_epoch=2.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    told = refused(work.train_diffusion, max_epochs=3)
    assert f"cannot resume from {newest}" in told and "\n" not in told


def test_resuming_another_model_is_refused(work: Pipeline) -> None:
    told = refused(work.train_diffusion, **{"max_epochs": 3, "network_def::channels": [16, 32, 48]})
    assert "cannot resume" in told
    told = refused(work.train_diffusion, **{"max_epochs": 3, "conditions::age::maximum": 90})
    assert "was trained with conditions" in told and "another --run_dir" in told
    saved = content(work.diffusion / "diffusion.pt")
    assert saved["trainer"]["epoch"] == 2


def test_facts_in_another_order_are_other_facts() -> None:
    facts = Facts(conditions={"age": {"maximum": 82}, "sex": {"maximum": 1}})
    facts.load_state_dict({"conditions": {"age": {"maximum": 82}, "sex": {"maximum": 1}}})
    with pytest.raises(BundleError, match="trained with conditions"):
        facts.load_state_dict({"conditions": {"sex": {"maximum": 1}, "age": {"maximum": 82}}})


@pytest.mark.parametrize("more", [8, 20])
def test_cosine_decay_follows_a_training_that_is_made_longer(more: int) -> None:
    def run(schedule: Any, epochs: int) -> list[float]:
        rates = []
        for _ in range(epochs):
            rates.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return rates

    def schedule(epochs: int) -> Any:
        return lr_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), "cosine", epochs)

    first, whole = schedule(4), schedule(more)
    run(first, 4)
    assert first.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
    longer = schedule(more)
    longer.load_state_dict(first.state_dict())
    longer.optimizer.load_state_dict(first.optimizer.state_dict())
    expected = run(whole, more)
    assert run(longer, more - 4)[1:] == pytest.approx(expected[5:])
    assert run(lr_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), "constant", 4), 4) == [0.1] * 4
    with pytest.raises(BundleError, match="constant or cosine, got 'linear'"):
        lr_schedule(first.optimizer, "linear", 4)


def test_loss_that_is_not_finite_stops_the_training(done: Pipeline, tmp_path: Path) -> None:
    told = refused(done.train_autoencoder, run_dir=str(tmp_path), kl_weight=float("nan"))
    assert "the loss 'loss' is nan at iteration 1" in told
    assert list(tmp_path.glob("*.pt")) == []


def test_finite_losses_alone_pass() -> None:
    state = SimpleNamespace(output={"losses": {"l1": 0.5, "kl": 1e30}}, iteration=7)
    FiniteLosses()(SimpleNamespace(state=state))  # type: ignore[arg-type]
    state.output["losses"]["kl"] = float("inf")
    with pytest.raises(BundleError, match="'kl' is inf at iteration 7"):
        FiniteLosses()(SimpleNamespace(state=state))  # type: ignore[arg-type]


def test_failed_training_keeps_the_result_of_the_one_before(work: Pipeline) -> None:
    before = (work.autoencoder / "autoencoder.pt").read_bytes()
    refused(work.train_autoencoder, max_epochs=3, kl_weight=float("nan"))
    assert (work.autoencoder / "autoencoder.pt").read_bytes() == before


def test_training_starts_from_given_weights(config: ConfigParser, tmp_path: Path) -> None:
    torch.save(old_weights(config), tmp_path / "old.pt")
    network: Any = configuration().get_parsed_content("autoencoder_def")
    fresh = copy.deepcopy(network.state_dict())
    assert start(network).training and same(network.state_dict(), fresh)
    assert start(network, str(tmp_path / "old.pt"), "autoencoder", load_old=1).training
    assert not same(network.state_dict(), fresh)
    assert "no weights of the autoencoder" in refused(start, network, str(tmp_path / "missing.pt"), "autoencoder")


def test_seed_must_be_a_whole_number() -> None:
    for seed in ("x", 1.5, -1):
        with pytest.raises(BundleError, match="--seed"):
            set_seed(seed)


# Data that is not as it should be.


def test_participants_read_their_conditions(done: Pipeline, conditions: Conditions) -> None:
    rows = participants(str(done.dataset), conditions)
    assert rows[1]["condition"].tolist() == pytest.approx([1.0, 16 / 38, 0.13994, 0.54761], abs=1e-4)
    assert rows[1]["image"] == str(done.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz")


def edit(folder: Path, **changes: object) -> None:
    """Change cells of the second row."""
    rows: list[dict[str, object]] = [dict(row) for row in read_table(folder / "participants.tsv")]
    rows[1].update(changes)
    write_table(folder / "participants.tsv", rows)


def test_missing_condition_stops_unless_told_otherwise(work: Pipeline, conditions: Conditions) -> None:
    edit(work.latents, age_years=None)
    told = refused(work.train_diffusion, run_dir=str(work.folder / "other"))
    assert "participant sub-1 in" in told and "no value of 'age_years'" in told
    rows = latents(str(work.latents), conditions, "default")
    assert rows[1]["condition"][1] == 0.5
    assert not (work.folder / "other").exists()


def test_unknown_condition_is_drawn_anew_each_time() -> None:
    row: Any = {"condition": torch.tensor([0.3, float("nan"), 1.7])}
    drawn = torch.stack([RandFillMissingd("condition")(row)["condition"] for _ in range(200)])
    assert (drawn[:, 0] == 0.3).all() and (drawn[:, 2] == 1.7).all()
    assert drawn[:, 1].min() >= 0.0 and drawn[:, 1].max() <= 1.0 and len(drawn[:, 1].unique()) > 100
    assert row["condition"][1].isnan()


def test_scan_that_is_missing(work: Pipeline) -> None:
    (work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz").unlink()
    for verb in (work.train_autoencoder, work.encode):
        told = refused(verb, **{"run_dir": str(work.folder / "other")} if verb == work.train_autoencoder else {})
        assert "participant sub-1 in" in told and "no such file" in told


@pytest.mark.parametrize("workers", [0, 1])
def test_scan_that_is_damaged_is_named_during_training(workers: int, work: Pipeline) -> None:
    path = work.dataset / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    told = refused(work.train_autoencoder, run_dir=str(work.folder / "other"), num_workers=workers)
    assert f"cannot read the volume {path}" in told and "\n" not in told
    assert list((work.folder / "other").glob("*.pt")) == []


def test_scan_on_another_grid(tmp_path: Path, grid: Grid) -> None:
    finer = Grid((40, 56, 40), [s * 0.8 for s in grid.spacing], grid.origin)
    write_volume(tmp_path / "x.nii.gz", head(finer, 0).numpy(), finer)
    row: Any = {"image": str(tmp_path / "x.nii.gz")}
    assert "has shape (40, 56, 40), not (32, 48, 32)" in refused(LoadVolumed("image", grid), row)
    assert LoadVolumed("image", grid, resample=True)(row)["image"].shape == (1, 32, 48, 32)


def test_resampling_keeps_positions_in_the_world(tmp_path: Path, grid: Grid) -> None:
    finer = Grid((64, 96, 64), [s / 2 for s in grid.spacing], grid.origin)
    x, y, z = torch.meshgrid(*(torch.linspace(0, 1, n) for n in finer.shape), indexing="ij")
    write_volume(tmp_path / "x.nii.gz", ((x + 2 * y + 4 * z) / 7).numpy(), finer, "float32")
    volume = LoadVolumed("image", grid, resample=True)({"image": str(tmp_path / "x.nii.gz")})["image"][0]
    assert torch.allclose(volume[:31, :47, :31], ((x + 2 * y + 4 * z) / 7)[::2, ::2, ::2][:31, :47, :31], atol=1e-4)


def test_folder_that_is_no_dataset(tmp_path: Path, conditions: Conditions) -> None:
    assert "prepare a dataset first" in refused(participants, str(tmp_path), conditions)
    write_table(tmp_path / "participants.tsv", [{"participant_id": 1, "file": "x"}])
    assert "no column 'path'" in refused(participants, str(tmp_path), conditions)
