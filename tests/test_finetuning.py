# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: weights fitted to other conditions, frozen parts, and one command for either stage."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, TINY, RunHere
from heads import ROWS, write_dataset
from monai.bundle import ConfigParser
from monai.networks.nets import DiffusionModelUNet
from released import arguments, configuration, generative_network
from safetensors.torch import save_file
from torch import Tensor, nn
from trained import AUTOENCODER, DIFFUSION, ENCODE

from benchmarks.measuring import fill_with_random_values
from scripts.conditions.conditions import Conditions
from scripts.core.errors import find_bundle_error
from scripts.diffusion.denoiser import HybridInferer
from scripts.diffusion.finetuning import check_origin
from scripts.networks.weights import Checkpoint, read_checkpoint
from scripts.training.finetuning import (
    base_conditions,
    fit_conditions,
    freeze,
    network_to_train,
    read_pretrained,
    trainable_parameters,
    trained_with,
)

FINETUNE, DEMO = "configs/finetune.yaml", "configs/demo.yaml"
RANGES = {"gender": (0, 1), "age": (44, 82), "ventricular_vol": (6995.68, 171375.0), "brain_vol": (1144240, 1793910)}
NEW = {"raw": "education_years", "unit": "years", "minimum": 7, "maximum": 20}
LATENT = (8, 12, 4)  # three different sizes show a swap of axes


def conditions(*names: str, **changes: dict[str, Any]) -> Conditions:
    """Those of that name of the base, and `education`, in the given order."""
    known = {n: {"raw": f"{n}_raw", "unit": "", "minimum": low, "maximum": high} for n, (low, high) in RANGES.items()}
    return Conditions(**{name: {**known, "education": NEW, **changes}[name] for name in names})


def unet(config: ConfigParser, number: int) -> nn.Module:
    """A tiny UNet on that number of conditions, every weight random."""
    given = {**arguments(config, "network_def"), "in_channels": 3 + number, "cross_attention_dim": number}
    network = DiffusionModelUNet(**given).eval()
    torch.manual_seed(7)
    fill_with_random_values(network)
    return network


def stored(network: nn.Module, trained: Conditions | None = None) -> Checkpoint:
    """The checkpoint of a network, with its conditions in the facts where they are given."""
    facts = {} if trained is None else {"conditions": trained.as_dict()}
    return Checkpoint(Path("model.pt"), copy.deepcopy(network.state_dict()), facts)


def output(config: ConfigParser, network: nn.Module, condition: Tensor) -> Tensor:
    """The hybrid's output for fixed latents, (2, 3, *LATENT)."""
    noisy = torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(5))
    hybrid: HybridInferer = config.get_parsed_content("hybrid_inferer")
    return hybrid.denoise(network, noisy, torch.tensor([7, 901]), condition)


def close(values: Tensor, expected: Tensor) -> bool:
    return torch.allclose(values, expected, rtol=1e-4, atol=1e-5)  # wider layers add in another order


def refused(call: Callable[..., Any], *given: Any, **options: Any) -> str:
    """The one line that a call ends in."""
    with pytest.raises(Exception) as caught:
        call(*given, **options)
    error = find_bundle_error(caught.value)
    assert error is not None, caught.value
    return str(error)


# Conditions.


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_new_condition_changes_nothing_at_first(config: ConfigParser, place: int) -> None:
    names = list(RANGES)
    old, new = unet(config, 4), unet(config, 5)
    wider = conditions(*names[:place], "education", *names[place:])
    fit_conditions(new, stored(old, conditions(*names)), wider)
    values, added = torch.rand(2, 4), 10 * torch.randn(2, 1)
    widened = torch.cat([values[:, :place], added, values[:, place:]], dim=1)
    expected = output(config, old, values)
    assert expected.std() > 0.1
    assert close(output(config, new, widened), expected)
    assert not close(output(config, new, widened.flip(1)), expected)


def test_a_new_condition_can_be_learnt(config: ConfigParser) -> None:
    names = list(RANGES)
    network, before = unet(config, 5), torch.rand(2, 5)
    fit_conditions(network, stored(unet(config, 4), conditions(*names)), conditions(*names, "education"))
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    output(config, network, before).square().mean().backward()
    columns = {
        "conv_in.conv.weight": 7,
        **{n: 4 for n, _ in network.named_parameters() if n.endswith("attn2.to_v.weight")},
    }
    assert len(columns) > 2
    for name, column in columns.items():
        gradient = network.get_parameter(name).grad
        assert gradient is not None and gradient[:, column].abs().max() > 0.0, name
    optimizer.step()
    after = before.clone()
    after[:, 4] += 1.0
    assert not close(output(config, network, after), output(config, network, before))


def test_conditions_in_another_order(config: ConfigParser) -> None:
    names, order = list(RANGES), [2, 0, 3, 1]
    old, new = unet(config, 4), unet(config, 4)
    fit_conditions(new, stored(old, conditions(*names)), conditions(*(names[i] for i in order)))
    values = torch.rand(2, 4)
    assert close(output(config, new, values[:, order]), output(config, old, values))
    assert not close(output(config, new, values), output(config, old, values))


def test_a_dropped_condition_is_as_at_its_minimum(config: ConfigParser, caplog: pytest.LogCaptureFixture) -> None:
    old, new = unet(config, 4), unet(config, 3)
    fit_conditions(new, stored(old, conditions(*RANGES)), conditions("brain_vol", "gender", "education"))
    assert "'age' is dropped" in caplog.text and "'ventricular_vol' is dropped" in caplog.text
    values = torch.rand(2, 3)
    as_before = torch.stack([values[:, 1], torch.zeros(2), torch.zeros(2), values[:, 0]], dim=1)
    assert close(output(config, new, values), output(config, old, as_before))


def test_the_same_conditions_give_the_same_weights(config: ConfigParser) -> None:
    old, new = unet(config, 4), unet(config, 4)
    fit_conditions(new, stored(old, conditions(*RANGES)), conditions(*RANGES))
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())


def test_released_format_is_fitted_too(config: ConfigParser) -> None:
    released = generative_network(config, "network_def")
    new, values = unet(config, 5), torch.rand(2, 4)
    fit_conditions(new, stored(released), conditions("education", *RANGES), load_old=1)
    widened = torch.cat([torch.randn(2, 1), values], dim=1)
    expected = output(config, released, values)
    assert (output(config, new, widened) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_released_weights_are_of_the_base_configurations_conditions() -> None:
    overlaid = configuration(overlays=(DEMO,), **{"conditions::age::maximum": 90})
    assert overlaid.get_parsed_content("conditions")[1].maximum == 90
    silent = trained_with(Checkpoint(Path("model.pt"), {}))
    assert silent == base_conditions() and list(silent) == list(RANGES)
    assert {name: (entry["minimum"], entry["maximum"]) for name, entry in silent.items()} == RANGES


@pytest.mark.parametrize("stated", [True, False])
def test_another_range_is_refused(config: ConfigParser, stated: bool) -> None:
    wider = conditions(*RANGES, age={"raw": "age_years", "unit": "years", "minimum": 18, "maximum": 90})
    weights = stored(unet(config, 4), conditions(*RANGES) if stated else None)
    told = refused(fit_conditions, unet(config, 4), weights, wider)
    assert "trained with age from 44 to 82, now it is 18 to 90 years" in told and "rename" in told


def test_conditions_that_a_file_does_not_state(config: ConfigParser) -> None:
    old, values = unet(config, 2), torch.rand(2, 2)
    weights, wanted = stored(old), conditions("age", "gender")
    assert "has 2 conditions, but is taken to be trained with 4" in refused(
        fit_conditions, unet(config, 2), weights, wanted
    )
    for given in (["gender", "age"], ("gender", "age"), "gender,age", {"gender": {}, "age": {"minimum": 44}}):
        network = fit_conditions(unet(config, 2), weights, wanted, trained=given)
        assert close(output(config, network, values.flip(1)), output(config, old, values))
    told = refused(fit_conditions, unet(config, 2), weights, wanted, trained={"gender": {}, "age": {"minimum": 20}})
    assert "trained with age from 20 to 82" in told
    for wrong in (3, [], {"age": 3}, [1, 2]):
        assert "--trained_conditions must be names" in refused(trained_with, weights, wrong)


def test_what_a_file_states_is_not_overruled() -> None:
    weights = Checkpoint(Path("model.pt"), {}, {"conditions": conditions("age", "gender").as_dict()})
    assert list(trained_with(weights, "age,gender")) == ["age", "gender"]
    assert "states that it was trained with age, gender" in refused(trained_with, weights, "gender,age")
    damaged = Checkpoint(Path("model.pt"), {}, {"conditions": 3})
    assert "is damaged" in refused(trained_with, damaged)


def test_a_network_without_hybrid_conditioning(config: ConfigParser) -> None:
    weights = stored(unet(config, 4), conditions(*RANGES))
    for network in (nn.Linear(2, 2), unet(config, 3)):
        assert "cross_attention_dim 4" in refused(fit_conditions, network, weights, conditions(*RANGES))


def test_weights_of_another_size_are_refused(config: ConfigParser) -> None:
    wide = configuration((TINY,), **{"network_def::channels": [24, 32, 32]})
    weights = stored(unet(wide, 4), conditions(*RANGES))
    told = refused(fit_conditions, unet(config, 5), weights, conditions(*RANGES, "education"))
    assert "is of another model" in told


# Frozen parts.


def frozen_names(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "starts"),
    [
        (["down_blocks.*", "time_embed.*"], ("down_blocks.", "time_embed.")),
        (("down_blocks", "time_embed"), ("down_blocks.", "time_embed.")),
        ("conv_in, out.*", ("conv_in.", "out.")),
        (
            "down_blocks.?.resnets.0.*",
            ("down_blocks.0.resnets.0.", "down_blocks.1.resnets.0.", "down_blocks.2.resnets.0."),
        ),
    ],
)
def test_patterns_choose_by_name(config: ConfigParser, patterns: Any, starts: tuple[str, ...]) -> None:
    network = freeze(unet(config, 4), patterns)
    names = {name for name, _ in network.named_parameters()}
    assert frozen_names(network) == {name for name in names if name.startswith(starts)} != set()


@pytest.mark.parametrize("patterns", [(), [], "", None])
def test_nothing_is_frozen_unless_asked(config: ConfigParser, patterns: Any) -> None:
    assert frozen_names(freeze(unet(config, 4), patterns)) == set()


def test_frozen_weights_stay_while_others_move(config: ConfigParser, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = network_to_train(unet(config, 4), frozen=["down_blocks", "*.attn2.*"])
    parameters = trainable_parameters(network)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1)
    output(config, network, torch.rand(2, 4)).square().mean().backward()
    optimizer.step()
    held = frozen_names(network)
    assert {name for name, value in network.state_dict().items() if torch.equal(value, before[name])} == held
    trained = sum(parameter.numel() for parameter in parameters)
    total = sum(value.numel() for value in before.values())
    assert f"training {trained:,} of {total:,} weights of the DiffusionModelUNet" in caplog.text
    assert network.training


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ("down_block.*", "'down_block.*' matches no weight of the network (did you mean down_blocks"),
        (["out.*", "encoder"], "'encoder' matches no weight of the network; its parts are conv_in, time_embed"),
        ("*", "nothing would be left to train"),
        (["[a-n]*", "[o-z]*"], "nothing would be left to train"),
        (3, "must be a pattern or a list"),
        ([1], "must be a pattern or a list"),
    ],
)
def test_patterns_that_are_refused(config: ConfigParser, patterns: Any, told: str) -> None:
    assert told in refused(freeze, unet(config, 4), patterns)


def test_a_new_condition_that_nothing_could_learn(config: ConfigParser) -> None:
    weights, wider = stored(unet(config, 4), conditions(*RANGES)), conditions(*RANGES, "education")
    everything = ["conv_in", "*.attn2.*"]
    told = refused(network_to_train, unet(config, 5), weights, frozen=everything, conditions=wider)
    assert "new condition education" in told
    network_to_train(unet(config, 4), weights, frozen=everything, conditions=conditions(*RANGES))
    network_to_train(unet(config, 5), weights, frozen="conv_in", conditions=wider)


# Files.


def test_pretrained_file_that_is_not_there(tmp_path: Path) -> None:
    assert read_pretrained(None, "diffusion") is None
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    told = refused(read_pretrained, str(tmp_path / "modell.safetensors"), "diffusion")
    assert "no such file: did you mean" in told and "model.safetensors?" in told
    assert "no weights of the diffusion at" in refused(read_pretrained, str(tmp_path / "x" / "y.pt"), "diffusion")


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"target": "velocity"}, "was trained for the target velocity, not epsilon: give --target velocity"),
        ({"schedule": {"num_train_timesteps": 500}}, "give --schedules::ddim::num_train_timesteps"),
        ({"encoder_sha256": "b" * 64}, "on latents of another autoencoder (SHA-256 of its encoder: bbbbbbbbbbbb...)"),
    ],
)
def test_weights_that_were_trained_for_something_else(facts: dict[str, Any], told: str, config: ConfigParser) -> None:
    schedule = config.get_parsed_content("schedule")
    assert told in refused(check_origin, Checkpoint(Path("model.pt"), {}, facts), schedule, "a" * 64)


def test_weights_that_say_nothing_or_fit(config: ConfigParser) -> None:
    schedule, facts = config.get_parsed_content("schedule"), {"target": "epsilon", "encoder_sha256": "a" * 64}
    for checkpoint in (None, Checkpoint(Path("model.pt"), {}), Checkpoint(Path("model.pt"), {}, facts)):
        check_origin(checkpoint, schedule, "a" * 64)


# Commands.


def diffusion_flags(folder: Path, config: ConfigParser, run_here: RunHere, **flags: Any) -> dict[str, Any]:
    """Flags of a training on the latents of four heads with years of education, by an autoencoder of random weights."""
    rows = [{**row, "education_years": 10 + 3 * number} for number, row in enumerate(ROWS)]
    dataset = write_dataset(folder / "dataset", config.get_parsed_content("grid"), rows)
    torch.save(generative_network(config, "autoencoder_def").state_dict(), folder / "encoder.pt")
    given = {"latents_dir": str(folder / "latents"), "autoencoder_path": str(folder / "encoder.pt")}
    run_here([BASE, ENCODE, TINY], dataset_dir=str(dataset), **given)
    return {**given, "run_dir": str(folder / "run"), "seed": 1, "max_epochs": 1, **flags}


def saved(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "run" / name, map_location="cpu", weights_only=True)


def zero_columns(weights: dict[str, Tensor], columns: Sequence[int]) -> bool:
    return bool((weights["conv_in.conv.weight"][:, list(columns)] == 0).all())


def test_diffusion_is_fine_tuned_with_one_more_condition(
    config: ConfigParser, run_here: RunHere, tmp_path: Path
) -> None:
    released = generative_network(config, "network_def")
    torch.save({"state_dict": {f"module.{k}": v for k, v in released.state_dict().items()}}, tmp_path / "model.pt")
    flags = diffusion_flags(
        tmp_path, config, run_here, diffusion_path=str(tmp_path / "model.pt"), freeze=["up_blocks", "time_embed.*"]
    )
    run_here([BASE, DIFFUSION, TINY, FINETUNE], **{**flags, "conditions::education": NEW})
    result = saved(tmp_path, "diffusion.pt")
    assert result["facts"]["latent_scale"] == 1.0  # the released weights', not that of these latents
    assert list(result["facts"]["conditions"]) == [*RANGES, "education"]
    weights, before = result["diffusion"], released.state_dict()
    assert weights["conv_in.conv.weight"].shape[1] == 8 and not zero_columns(weights, [7])
    for name in ("up_blocks.0.resnets.0.conv1.conv.weight", "time_embed.0.weight"):
        assert torch.equal(weights[name], before[name])
    assert not torch.equal(weights["out.2.conv.weight"], before["out.2.conv.weight"])
    assert torch.allclose(weights["conv_in.conv.weight"][:, :7], before["conv_in.conv.weight"], atol=1e-3)

    entries = {**configuration()["conditions"], "education": NEW}
    backwards = {"_target_": entries.pop("_target_"), **dict(reversed(entries.items()))}
    flags |= {"diffusion_path": str(tmp_path / "run" / "diffusion.pt"), "run_dir": str(tmp_path / "again")}
    run_here([BASE, DIFFUSION, TINY, FINETUNE], **{**flags, "conditions": backwards})
    moved = read_checkpoint(tmp_path / "again" / "diffusion.pt", "diffusion").state["conv_in.conv.weight"]
    assert torch.allclose(moved[:, 3:].flip(1), weights["conv_in.conv.weight"][:, 3:], atol=1e-3)


def test_autoencoder_is_fine_tuned(config: ConfigParser, run_here: RunHere, tmp_path: Path) -> None:
    released = generative_network(config, "autoencoder_def")
    torch.save(released.state_dict(), tmp_path / "autoencoder.pt")
    dataset = write_dataset(tmp_path / "dataset", config.get_parsed_content("grid"))
    flags = {"dataset_dir": str(dataset), "run_dir": str(tmp_path / "run"), "perceptual_weight": 0.0, "max_epochs": 1}
    own = {"autoencoder_path": str(tmp_path / "autoencoder.pt"), "freeze": "encoder,quant_conv_*", "seed": 1}
    run_here([BASE, AUTOENCODER, TINY, FINETUNE], **flags, **own)
    weights, before = saved(tmp_path, "autoencoder.pt")["autoencoder"], released.state_dict()
    held = {name for name in weights if name in before and torch.equal(weights[name], before[name])}
    assert {name for name in held if name.startswith(("decoder", "post_quant"))} == set()
    assert all(name in held for name in before if name.startswith(("encoder.", "quant_conv_")))


def test_each_stage_takes_its_own_weights(tmp_path: Path) -> None:
    for stage in ("autoencoder", "diffusion"):
        parser = configuration(overlays=(f"configs/train_{stage}.yaml", DEMO, FINETUNE))
        assert parser.get_parsed_content("pretrained").endswith(f"models/demo/{stage}.safetensors")
        assert parser.get_parsed_content("run_dir").endswith(f"runs/finetune_{stage}")
        assert parser.get_parsed_content("lr") < configuration((f"configs/train_{stage}.yaml",)).get_parsed_content(
            "lr"
        )


def test_small_model_is_fine_tuned_with_one_more_condition() -> None:
    parser = configuration(overlays=(DIFFUSION, DEMO, FINETUNE), **{"conditions::education": NEW, "device": "cpu"})
    network, trained = (
        parser.get_parsed_content("trained"),
        read_checkpoint(parser.get_parsed_content("pretrained"), "diffusion"),
    )
    weights = network.state_dict()
    assert zero_columns(weights, [7])
    assert torch.equal(weights["conv_in.conv.weight"][:, :7], trained.state["conv_in.conv.weight"].float())
    assert parser.get_parsed_content("latent_scale") == trained.latent_scale != 1.0


def test_absent_and_other_weights_are_named(config: ConfigParser, run_here: RunHere, tmp_path: Path) -> None:
    torch.save(generative_network(config, "autoencoder_def").state_dict(), tmp_path / "autoencoder.pt")
    files, flags = [BASE, DIFFUSION, TINY, FINETUNE], diffusion_flags(tmp_path, config, run_here)
    told = refused(run_here, files, **flags, pretrained=str(tmp_path / "autoencoder.pth"))
    assert "no such file: did you mean" in told and "autoencoder.pt?" in told
    told = refused(run_here, files, **flags, pretrained=str(tmp_path / "autoencoder.pt"))
    assert "is of another model" in told
    assert not (tmp_path / "run").exists()
