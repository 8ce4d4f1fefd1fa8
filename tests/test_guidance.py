# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Dropping conditions in training, and which guidance is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.core.errors import BundleError
from scripts.diffusion.guidance import NULL_CONDITION, RandDropConditiond, guidance_scale
from scripts.networks.weights import Checkpoint


def checkpoint(**facts: Any) -> Checkpoint:
    return Checkpoint(Path("model.pt"), {}, facts)


def test_vectors_are_dropped_whole_at_the_asked_rate() -> None:
    transform, condition = RandDropConditiond("condition", 0.2), torch.tensor([0.0, 0.3, 1.0])
    torch.manual_seed(0)
    vectors = [transform({"condition": condition, "image": 1})["condition"] for _ in range(5000)]
    dropped = [bool((vector == NULL_CONDITION).all()) for vector in vectors]
    assert sum(dropped) / 5000 == pytest.approx(0.2, abs=0.02)
    assert all(torch.equal(vector, condition) for vector, gone in zip(vectors, dropped) if not gone)
    assert torch.equal(condition, torch.tensor([0.0, 0.3, 1.0]))


@pytest.mark.parametrize(("prob", "count"), [(0, 0), ("0", 0), (1, 200)])
def test_never_and_always(prob: Any, count: int) -> None:
    transform = RandDropConditiond("condition", prob)
    vectors = torch.stack([transform({"condition": torch.rand(4)})["condition"] for _ in range(200)])
    assert int((vectors == NULL_CONDITION).all(dim=1).sum()) == count


def test_what_is_drawn_later_does_not_depend_on_the_drop() -> None:
    states = []
    for prob in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        RandDropConditiond("condition", prob)({"condition": torch.zeros(4)})
        states.append(torch.rand(()))
    assert states[0] == states[1] == states[2]


def test_null_vector_is_outside_the_range_of_the_conditions() -> None:
    dropped = RandDropConditiond("condition", 1.0)({"condition": torch.rand(4)})["condition"]
    assert bool((dropped < 0.0).all()) and dropped.dtype == torch.float32


@pytest.mark.parametrize("prob", [-0.1, 1.1, "often", None])
def test_impossible_rates(prob: Any) -> None:
    with pytest.raises(BundleError, match="--condition_dropout must be"):
        RandDropConditiond("condition", prob)


def test_no_guidance_unless_asked_for() -> None:
    assert guidance_scale(None, checkpoint()) is None
    assert guidance_scale("null", checkpoint(condition_dropout=0.1)) is None
    assert guidance_scale("2", checkpoint(condition_dropout=0.1)) == 2.0
    assert guidance_scale(0, checkpoint(condition_dropout=0.1)) == 0.0


@pytest.mark.parametrize(
    ("guidance", "facts", "told"),
    [
        (2, {}, "needs a model that was trained with --condition_dropout"),
        (1.0, {"condition_dropout": 0.0}, "needs a model that was trained with --condition_dropout"),
        (-1, {"condition_dropout": 0.1}, "--guidance must be at least 0"),
        ("much", {"condition_dropout": 0.1}, "--guidance must be a finite number"),
    ],
)
def test_refused_guidance(guidance: Any, facts: dict[str, Any], told: str) -> None:
    with pytest.raises(BundleError, match=told):
        guidance_scale(guidance, checkpoint(**facts))
