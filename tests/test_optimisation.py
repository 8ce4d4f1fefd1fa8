# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""One optimiser's step, and its learning rate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts.compute.precision import half_precision, recompute_activations
from scripts.core.errors import BundleError
from scripts.training.optimisation import Batch, LearningRate, Optimisation


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1))


def batch(size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(size, 5, generator=generator), "y": torch.randn(size, 1, generator=generator)}


def squared_error(net: nn.Module, factor: float = 1.0) -> Callable[[Batch], dict[str, Tensor]]:
    def losses(part: Batch) -> dict[str, Tensor]:
        error = (net(part["x"]).float() - part["y"]).square().mean()
        return {"loss": factor * error, "plain": error}

    return losses


def optimised(clip: float = 0.0, **options: Any) -> Optimisation:
    net = network()
    return Optimisation(net, torch.optim.SGD(net.parameters(), 0.1), clip_gradients=clip, **options)


def test_step_is_that_of_plain_pytorch() -> None:
    step, reference = optimised(), network()
    losses = step(batch(), squared_error(step.network))
    error = (reference(batch()["x"]) - batch()["y"]).square().mean()
    error.backward()
    assert losses["loss"].item() == pytest.approx(error.item(), rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    assert losses["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for moved, parameter in zip(step.network.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and torch.allclose(moved, parameter - 0.1 * parameter.grad, atol=1e-7)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_add_up_to_the_whole_batch(parts: int) -> None:
    whole, parted = optimised(), optimised(accumulate=parts)
    expected, losses = (step(batch(), squared_error(step.network)) for step in (whole, parted))
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    for a, b in zip(whole.network.parameters(), parted.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_batch_that_cannot_be_parted() -> None:
    step = optimised(accumulate=4)
    with pytest.raises(BundleError, match="--batch_size 6 is no multiple of --accumulate 4"):
        step(batch(), squared_error(step.network))


def test_gradients_are_clipped_together() -> None:
    step = optimised(clip=1e-2)
    before = [p.detach().clone() for p in step.network.parameters()]
    losses = step(batch(), squared_error(step.network))
    moved = torch.stack([(p - q).norm() for p, q in zip(step.network.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * 1e-2, rel=1e-3) and losses["gradient_norm"] > 1e-2


def test_float16_scales_the_loss_and_leaves_out_infinite_steps() -> None:
    step = optimised(amp="fp16")
    before = copy.deepcopy(step.network.state_dict())
    losses = step(batch(), squared_error(step.network, factor=1e35))
    assert losses["gradient_norm"] == 0.0 and step.scaler.get_scale() == 2.0**15
    assert all(torch.equal(before[name], value) for name, value in step.network.state_dict().items())
    step(batch(), squared_error(step.network))
    assert not torch.equal(before["0.weight"], step.network.state_dict()["0.weight"])


def test_float16_that_never_fits_is_an_error() -> None:
    step = optimised(amp="fp16")

    def infinite(part: Batch) -> dict[str, Tensor]:
        # finite itself, with an infinite derivative
        return {"loss": (0.0 * step.network(part["x"]).sum()).sqrt()}

    with pytest.raises(BundleError, match="use --amp bf16"):
        for _ in range(40):
            step(batch(), infinite)


def test_state_goes_on_exactly() -> None:
    whole = optimised(amp="fp16")
    whole.optimizer = torch.optim.Adam(whole.network.parameters(), 1e-2)
    half = copy.deepcopy(whole)
    for _ in range(4):
        whole(batch(), squared_error(whole.network))
    for _ in range(2):
        half(batch(), squared_error(half.network))
    rest = optimised(amp="fp16")
    rest.optimizer = torch.optim.Adam(rest.network.parameters(), 1e-2)
    rest.network.load_state_dict(half.network.state_dict())
    rest.load_state_dict(half.state_dict())
    for _ in range(2):
        rest(batch(), squared_error(rest.network))
    for a, b in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused() -> None:
    state = optimised().state_dict()
    other = nn.Linear(5, 1)
    with pytest.raises(BundleError, match="optimised 4 tensors of the Linear, now it is 2, and not the same"):
        Optimisation(other, torch.optim.SGD(other.parameters(), 0.1)).load_state_dict(state)


def rates(schedule: LearningRate, first: int, epochs: int, length: int = 5) -> list[float]:
    found = []
    for iteration in range(first + 1, epochs * length + 1):
        schedule(SimpleNamespace(state=SimpleNamespace(iteration=iteration, max_epochs=epochs, epoch_length=length)))  # type: ignore[arg-type]
        found.append(schedule.optimizer.param_groups[0]["lr"])
    return found


def schedule(decay: str, warm_up: Any = 0, lr: Any = 0.1) -> LearningRate:
    return LearningRate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), lr, decay, warm_up)


def test_cosine_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    expected = []
    for _ in range(20):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates(schedule("cosine"), 0, 4) == pytest.approx(expected)


def test_exponential_decay_is_pytorchs_by_epoch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    reference = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    expected = []
    for _ in range(3):
        expected += reference.get_last_lr() * 5
        optimizer.step()
        reference.step()
    assert rates(LearningRate(optimizer, 0.1, "exponential", factor=0.9), 0, 3) == pytest.approx(expected)
    with pytest.raises(BundleError, match="--lr_decay_factor must be at most 1, got 1.1"):
        LearningRate(optimizer, 0.1, "exponential", factor=1.1)


def test_rate_of_an_iteration_does_not_depend_on_the_past() -> None:
    whole = rates(schedule("cosine", warm_up=3), 0, 4)
    assert rates(schedule("cosine", warm_up=3), 13, 4) == whole[13:]
    assert whole[:3] == pytest.approx([0.025, 0.05, 0.075])
    assert rates(schedule("constant"), 0, 2) == [0.1] * 10


@pytest.mark.parametrize(
    "wrong", [{"decay": "linear"}, {"decay": "constant", "lr": "abc"}, {"decay": "cosine", "lr": float("nan")}]
)
def test_rates_that_are_none(wrong: dict[str, Any]) -> None:
    expected = "--lr_decay must be one of constant, cosine, exponential, got|--lr must be a finite number"
    with pytest.raises(BundleError, match=expected):
        schedule(**wrong)


def test_precision_by_name() -> None:
    assert [half_precision(amp) for amp in (0, "False", None, 1, True, "bf16", "FP16")] == [
        *[None] * 3,
        *[torch.bfloat16] * 3,
        torch.float16,
    ]
    with pytest.raises(BundleError, match="--amp must be 0, 1, auto, bf16 or fp16, got 'half'"):
        half_precision("half")


def test_recomputed_activations_change_no_bit() -> None:
    plain, recomputed = network(), network()
    names = list(recomputed.state_dict())
    recompute_activations(recomputed, ("Linear",))
    assert list(recomputed.state_dict()) == names
    x = batch()["x"].requires_grad_()
    for net in (plain, recomputed):
        net(x).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    with pytest.raises(BundleError, match="has no Conv3d"):
        recompute_activations(network(), ("Conv3d",))
