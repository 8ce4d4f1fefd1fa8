# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights from files: both formats load in full, and whatever else a file may be is refused with one clear error."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DiffusionModelUNet
from released import arguments, generative_network
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.conditions.conditions import Conditions
from scripts.core.errors import BundleError
from scripts.core.files import file_hash
from scripts.networks.weights import Checkpoint, load_network, read_checkpoint, write_safetensors

State = dict[str, Tensor]

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
HTML = b"<!DOCTYPE html><html>quota exceeded</html>"
NO_STATE_DICTS = [torch.ones(3), [1, 2], {}, {"a": 1}, {"a": torch.ones(1), "b": "text"}, {0: torch.ones(1)}]


@pytest.fixture(scope="module")
def old_unet(config: ConfigParser) -> State:
    return generative_network(config, "network_def").state_dict()


@pytest.fixture(scope="module")
def old_autoencoder(config: ConfigParser) -> State:
    return generative_network(config, "autoencoder_def").state_dict()


def new_unet(config: ConfigParser, **options: Any) -> nn.Module:
    """MONAI core's UNet of the configuration, freshly initialised."""
    return DiffusionModelUNet(**{**arguments(config, "network_def"), **options})


def checkpoint(state: State, **facts: Any) -> Checkpoint:
    return Checkpoint(Path("weights.pt"), state, facts)


def message(call: Callable[..., Any], *given: Any, **options: Any) -> str:
    """The one-line error that a call ends in."""
    with pytest.raises(BundleError) as caught:
        call(*given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def two_conditions(**changes: Any) -> Conditions:
    entries = {
        "age": {"raw": "age_years", "unit": "years", "minimum": 44, "maximum": 82},
        "gender": {"raw": "sex", "unit": "", "minimum": 0, "maximum": 1},
    }
    return Conditions(**{**entries, **changes})


# What MONAI's conversion of old weights drops without an error.


@pytest.mark.parametrize("trap", [{"include_fc": False}, {"use_combined_linear": True}], ids=["no_fc", "combined"])
def test_network_that_would_drop_projections_is_refused(
    trap: dict[str, bool], config: ConfigParser, old_unet: State
) -> None:
    silent = new_unet(config, **trap)
    silent.load_old_state_dict(dict(old_unet))  # type: ignore[operator]  # the trap: no error
    assert "attn" in message(load_network, new_unet(config, **trap), checkpoint(old_unet), 1)


def test_given_state_dict_is_left_as_it_was(config: ConfigParser, old_unet: State) -> None:
    names = list(old_unet)
    load_network(new_unet(config), checkpoint(old_unet), 1)
    assert list(old_unet) == names


def test_old_file_with_a_missing_weight(config: ConfigParser, old_unet: State) -> None:
    for name in (
        "conv_in.conv.weight",
        "out.2.conv.bias",
        *(n for n in old_unet if n.endswith(("to_q.weight", "norm1.bias"))),
    ):
        state = {key: value for key, value in old_unet.items() if key != name}
        assert "1 weights missing" in message(load_network, new_unet(config), checkpoint(state), 1), name


def test_old_file_with_a_left_over_weight(config: ConfigParser, old_unet: State) -> None:
    state = {**old_unet, "class_embedding.weight": torch.zeros(3)}
    told = message(load_network, new_unet(config), checkpoint(state), 1)
    assert "1 not in the network (class_embedding.weight ...)" in told


@pytest.mark.parametrize(
    "name", ["conv_in.conv.weight", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
)
def test_old_file_with_a_weight_of_another_shape(name: str, config: ConfigParser, old_unet: State) -> None:
    state = {**old_unet, name: old_unet[name][:-1]}
    told = message(load_network, new_unet(config), checkpoint(state), 1)
    assert "is of another model" in told and name in told


@pytest.mark.parametrize("load_old", [0, 1])
def test_weights_of_another_model_are_refused(
    load_old: int, config: ConfigParser, old_unet: State, old_autoencoder: State
) -> None:
    autoencoder = config.get_parsed_content("autoencoder_def", instantiate=True)
    for network, state in ((new_unet(config), old_autoencoder), (autoencoder, old_unet)):
        assert "is of another model" in message(load_network, network, checkpoint(state), load_old)


def test_model_of_another_width_is_refused(config: ConfigParser, old_unet: State) -> None:
    wider = new_unet(config, channels=[24, 32, 32])
    assert "is of another model" in message(load_network, wider, checkpoint(old_unet), 1)
    state = new_unet(config).state_dict()
    assert "is (" in message(load_network, wider, checkpoint(state), 0)


# The two formats and how load_old tells them apart.


def test_old_names_without_load_old_suggest_it(config: ConfigParser, old_unet: State) -> None:
    assert "--load_old 1" in message(load_network, new_unet(config), checkpoint(old_unet), 0)


@pytest.mark.parametrize("load_old", [0, 1, "0", "1", "true"])
def test_new_names_are_taken_with_either_load_old(load_old: object, config: ConfigParser) -> None:
    source = new_unet(config)
    network = load_network(new_unet(config), checkpoint(source.state_dict()), load_old)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in source.state_dict().items())
    assert not network.training


def test_load_old_must_be_yes_or_no(config: ConfigParser, old_unet: State) -> None:
    assert "--load_old must be 1 or 0" in message(load_network, new_unet(config), checkpoint(old_unet), "maybe")


# What a file may be.


def tensors() -> State:
    return {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_missing_file_names_both_ways_out(suffix: str, tmp_path: Path) -> None:
    told = message(read_checkpoint, tmp_path / f"model{suffix}", "diffusion")
    assert "model" + suffix in told and "-m scripts weights" in told and "demo.yaml" in told


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 0.999])
def test_truncated_file(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(tensors(), path) if suffix == ".safetensors" else torch.save(tensors(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    told = message(read_checkpoint, path, "diffusion")
    assert "damaged" in told and str(path) in told and "again" in told


DAMAGED: dict[str, Any] = {
    "nan": torch.tensor([1.0, torch.nan]),
    "1e+30": torch.tensor([1.0, 1e30]),
    "complex64": torch.ones(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("said", DAMAGED)
def test_weights_that_cannot_be(said: str, suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"model{suffix}", {**tensors(), "odd": DAMAGED[said]}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    told = message(read_checkpoint, path, "diffusion")
    assert str(path) in told and "odd" in told and said in told


def test_a_changed_byte_of_the_weights_is_noticed(tmp_path: Path) -> None:
    """PyTorch does not compare the checksums of its files; safetensors has none, so that ours is in the metadata."""
    torch.save({"diffusion": tensors(), "facts": {}}, tmp_path / "first.pt")
    write_safetensors(tmp_path / "first.safetensors", tmp_path / "first.pt", "diffusion", "float32")
    for path in (tmp_path / "first.pt", tmp_path / "first.safetensors"):
        read_checkpoint(path, "diffusion")
        content, weight = path.read_bytes(), next(iter(tensors().values())).numpy().tobytes()[:8]
        place = content.index(weight)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert "damaged" in message(read_checkpoint, path, "diffusion")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_of_another_type(dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in nn.Linear(2, 2).state_dict().items()}
    assert "is damaged or of another model" in message(load_network, nn.Linear(2, 2), checkpoint(state))


@pytest.mark.parametrize("scale", [1e300, 0.0, -1.0, float("nan"), True, "1", None, 1e-30])
def test_a_latent_scale_that_cannot_be(scale: Any) -> None:
    assert "latent scale" in message(lambda: checkpoint({}, latent_scale=scale).latent_scale)


def test_file_of_pytorchs_older_format_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        message(read_checkpoint, path, "diffusion")


@pytest.mark.parametrize("content", [b"hello\n", b"cos\nsystem\n", HTML, bytes(600)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_that_is_no_checkpoint(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert str(path) in message(read_checkpoint, path, "diffusion")


class Intruder:
    """Unpickles into a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({**tensors(), "x": Intruder(trace)}, path, _use_new_zipfile_serialization=zipped)
    assert "Python code" in message(read_checkpoint, path, "diffusion")
    path.write_bytes(pickle.dumps(Intruder(trace), protocol=2))
    message(read_checkpoint, path, "diffusion")
    assert not trace.exists()


def test_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    assert "state dict" in message(read_checkpoint, tmp_path / "model.pt", "diffusion")


@pytest.mark.parametrize(
    "content", [torch.ones(3), [1, 2], {}, {"a": 1}, {"a": torch.ones(1), "b": "text"}, {0: torch.ones(1)}]
)
def test_content_that_is_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt holds" in message(read_checkpoint, tmp_path / "model.pt", "diffusion")


@pytest.mark.parametrize("zipped", [True, False])
def test_both_of_pytorchs_own_formats_load(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path, "diffusion")
    assert all(torch.equal(read.state[name], value) for name, value in tensors().items())
    assert read.facts == {} and read.latent_scale == 1.0
    assert read.sha256 == file_hash(path)


# Training checkpoints.


def training_checkpoint(path: Path, **facts: Any) -> Path:
    torch.save({"diffusion": tensors(), "optimizer": {"state": {}}, "trainer": {"epoch": 3}, "facts": facts}, path)
    return path


def test_training_checkpoint_gives_its_network_and_facts(tmp_path: Path) -> None:
    path = training_checkpoint(tmp_path / "diffusion.pt", latent_scale=0.3, network="diffusion")
    read = read_checkpoint(path, "diffusion")
    assert read.state.keys() == tensors().keys()
    assert read.latent_scale == 0.3


def test_training_checkpoint_of_the_other_stage(tmp_path: Path) -> None:
    path = training_checkpoint(tmp_path / "diffusion.pt")
    told = message(read_checkpoint, path, "autoencoder")
    assert "no weights of the autoencoder: it holds diffusion" in told


def test_averaged_weights_are_taken_where_there_are_some(tmp_path: Path) -> None:
    average = {name: value + 1.0 for name, value in tensors().items()}
    torch.save({"diffusion": tensors(), "diffusion_ema": {"weights": average, "decay": 0.999}}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt", "diffusion")
    assert all(torch.equal(read.state[name], value) for name, value in average.items())
    assert "no weights of the autoencoder" in message(read_checkpoint, tmp_path / "a.pt", "autoencoder")


@pytest.mark.parametrize("nest", ["state_dict", "model", "diffusion"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_other_trainers(nest: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = {prefix + name: value for name, value in tensors().items()}
    torch.save({"epoch": 3, nest: state, "optimizer": {"state": {}}}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt", "diffusion")
    assert read.state.keys() == tensors().keys() and read.facts == {}
    assert all(torch.equal(read.state[name], value) for name, value in tensors().items())
    assert ("took the weights under" in caplog.text) is (nest != "diffusion")
    assert ("left out the prefix 'module.'" in caplog.text) is (prefix != "")


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    save_file(state, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors", "diffusion").state.keys() == state.keys()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_safetensors_of_a_training_checkpoint(dtype: str, tmp_path: Path) -> None:
    facts = {"latent_scale": 0.7, "conditions": two_conditions().as_dict()}
    source = training_checkpoint(tmp_path / "diffusion.pt", **facts)
    write_safetensors(tmp_path / "diffusion.safetensors", source, "diffusion", dtype)
    read = read_checkpoint(tmp_path / "diffusion.safetensors", "diffusion")
    assert read.facts == facts
    assert read.latent_scale == 0.7
    assert {str(value.dtype) for value in read.state.values()} == {f"torch.{dtype}"}
    assert all(torch.equal(read.state[name].float(), value) for name, value in tensors().items())


def test_half_precision_file_loads_into_a_float32_network(tmp_path: Path) -> None:
    source = training_checkpoint(tmp_path / "diffusion.pt")
    write_safetensors(tmp_path / "diffusion.safetensors", source, "diffusion")
    network = nn.ModuleDict({"a": nn.Linear(4, 3)})
    load_network(network, read_checkpoint(tmp_path / "diffusion.safetensors", "diffusion"), 0)
    assert network["a"].weight.dtype == torch.float32


def other_range() -> Conditions:
    return two_conditions(age={"raw": "age_years", "unit": "years", "minimum": 18, "maximum": 90})


def other_order() -> Conditions:
    entries = {
        c.name: {"raw": c.raw, "unit": c.unit, "minimum": c.minimum, "maximum": c.maximum} for c in two_conditions()
    }
    return Conditions(**dict(reversed(entries.items())))


def other_unit() -> Conditions:
    return two_conditions(age={"raw": "age_months", "unit": "months", "minimum": 528, "maximum": 984})


def one_more() -> Conditions:
    return two_conditions(bmi={"raw": "bmi_kg_m2", "unit": "kg/m2", "minimum": 15, "maximum": 40})


@pytest.mark.parametrize(
    ("other", "told", "way_out"),
    [
        (other_range, ["age (age_years, 44 to 82 years)", "age (age_years, 18 to 90 years)"], "conditions.json"),
        (other_unit, ["44 to 82 years", "age_months, 528 to 984 months"], "as they were"),
        (other_order, ["with age, gender;", "order gender, age"], "--with finetune"),
        (one_more, ["with age, gender;", "is also bmi:", "leave out bmi"], "--with finetune"),
        (lambda: Conditions(), ["with age, gender;", "lacks age, gender"], "give age, gender in `conditions`"),
    ],
    ids=["range", "unit", "order", "more", "none"],
)
def test_other_conditions_than_in_training_are_refused(
    other: Callable[[], Conditions], told: list[str], way_out: str
) -> None:
    network = nn.ModuleDict({"a": nn.Linear(4, 3)})
    trained = checkpoint(tensors(), conditions=two_conditions().as_dict())
    refusal = message(load_network, network, trained, 0, conditions=other())
    assert all(part in refusal for part in [*told, way_out])
    assert ("conditions.json" in refusal) == (way_out == "conditions.json")
    load_network(network, trained, 0, conditions=two_conditions())
    load_network(network, checkpoint(tensors()), 0, conditions=other())


@pytest.mark.parametrize("stated", [["age", "gender"], {"age": {}}, {"age": 44}])
def test_conditions_that_are_no_ranges_are_refused(stated: Any) -> None:
    given = checkpoint(tensors(), conditions=stated)
    assert "damaged" in message(load_network, nn.ModuleDict(), given, 0, conditions=two_conditions())


def test_conditions_survive_both_formats(tmp_path: Path) -> None:
    conditions = two_conditions()
    source = training_checkpoint(tmp_path / "diffusion.pt", conditions=conditions.as_dict())
    write_safetensors(tmp_path / "diffusion.safetensors", source, "diffusion")
    for path in (source, tmp_path / "diffusion.safetensors"):
        network = nn.ModuleDict({"a": nn.Linear(4, 3)})
        load_network(network, read_checkpoint(path, "diffusion"), 0, conditions=conditions)
