# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The schedule and the sampler that follow from the target, and the check of a checkpoint's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monai.networks.schedulers import RFlowScheduler
from released import configuration

from scripts.core.errors import BundleError, find_bundle_error
from scripts.diffusion.samplers import DDIMSampler, FlowSampler, LeadingDDIMScheduler
from scripts.diffusion.schedules import check_facts, choose_schedule, schedule_facts, target_of
from scripts.diffusion.targets import TARGETS
from scripts.networks.weights import Checkpoint


def schedule(target: str = "epsilon", **overrides: Any) -> Any:
    """The base's."""
    return configuration([], target=target, **overrides).get_parsed_content("schedule")


def checkpoint(**facts: Any) -> Checkpoint:
    return Checkpoint(Path("runs/diffusion.pt"), {}, facts)


@pytest.mark.parametrize(
    ("target", "name"), [("epsilon", "epsilon"), ("sample", "sample"), ("velocity", "v_prediction")]
)
def test_targets_of_diffusion(target: str, name: str) -> None:
    made = schedule(target)
    assert isinstance(made, LeadingDDIMScheduler)
    assert made.prediction_type == name and made.clip_sample is False
    sampler = configuration([], target=target).get_parsed_content("chosen_sampler")
    assert isinstance(sampler, DDIMSampler) and len(sampler.timesteps) == 50


def test_target_flow() -> None:
    config = configuration([], target="flow")
    assert isinstance(config.get_parsed_content("schedule"), RFlowScheduler)
    sampler = config.get_parsed_content("chosen_sampler")
    assert isinstance(sampler, FlowSampler) and len(sampler.timesteps) == 30


@pytest.mark.parametrize("target", TARGETS)
def test_target_is_known_from_the_schedule(target: str) -> None:
    assert target_of(schedule(target)) == target


def test_default_target_is_the_papers() -> None:
    assert configuration([]).get_parsed_content("schedule").prediction_type == "epsilon"


@pytest.mark.parametrize("wanted", ["schedule", "sampler", "chosen_sampler"])
def test_unknown_target(wanted: str) -> None:
    with pytest.raises(Exception) as caught:
        configuration([], target="noise").get_parsed_content(wanted)
    told = str(find_bundle_error(caught.value))
    assert told == "--target must be one of epsilon, sample, velocity, flow, difference, got 'noise'"


# What a checkpoint says.


def test_facts_are_plain_data() -> None:
    facts = schedule_facts(schedule())
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["num_train_timesteps"], facts["beta_first"], facts["beta_last"]) == (1000, 0.0015, 0.0205)
    assert schedule_facts(schedule("flow")) == {"num_train_timesteps": 1000}


@pytest.mark.parametrize("target", TARGETS)
def test_own_facts_pass(target: str) -> None:
    made = schedule(target)
    check_facts(checkpoint(target=target, schedule=schedule_facts(made)), made)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_without_facts_pass(target: str) -> None:
    check_facts(checkpoint(), schedule(target))


@pytest.mark.parametrize("trained", TARGETS)
@pytest.mark.parametrize("asked", TARGETS)
def test_other_target(trained: str, asked: str) -> None:
    facts = checkpoint(target=trained, schedule=schedule_facts(schedule(trained)))
    if trained == asked:
        check_facts(facts, schedule(asked))
    else:
        with pytest.raises(BundleError, match=rf"diffusion\.pt was trained for .* give --target {trained}$"):
            check_facts(facts, schedule(asked))


def test_facts_of_the_old_kind() -> None:
    check_facts(checkpoint(prediction_type="epsilon"), schedule())
    check_facts(checkpoint(prediction_type="v_prediction"), schedule("velocity"))
    with pytest.raises(BundleError, match="give --target velocity$"):
        check_facts(checkpoint(prediction_type="v_prediction"), schedule())
    with pytest.raises(BundleError, match="give --target velocity$"):  # MONAI calls the flow's target the same
        check_facts(checkpoint(prediction_type="v_prediction"), schedule("flow"))


OTHER_SCHEDULES = [
    ("epsilon", "schedules::ddim::num_train_timesteps", 500),
    ("velocity", "schedules::ddim::beta_start", 0.0001),
    ("sample", "schedules::ddim::beta_end", 0.02),
    ("epsilon", "schedules::ddim::schedule", "linear_beta"),
    ("flow", "schedules::flow::num_train_timesteps", 500),
]


@pytest.mark.parametrize(("target", "flag", "value"), OTHER_SCHEDULES, ids=[f"{t} {f}" for t, f, _ in OTHER_SCHEDULES])
def test_other_schedule_names_its_flag(target: str, flag: str, value: Any) -> None:
    trained = checkpoint(target=target, schedule=schedule_facts(schedule(target, **{flag: value})))
    check_facts(trained, schedule(target, **{flag: value}))
    with pytest.raises(BundleError, match=f"give --{flag} as in its training"):
        check_facts(trained, schedule(target))


def test_choice_builds_no_other_schedule() -> None:
    built = choose_schedule({"flow": RFlowScheduler}, "flow")
    assert built.num_train_timesteps == 1000
