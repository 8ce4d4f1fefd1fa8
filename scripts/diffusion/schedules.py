# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The training target, the schedule that follows from it, and whether weights were trained with both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from monai.networks.schedulers import RFlowScheduler, Scheduler

from scripts.core.errors import BundleError
from scripts.diffusion.targets import FLOW, find_target, from_monais_name
from scripts.networks.weights import Checkpoint

# Fact of a schedule -> the argument that sets it.
ARGUMENTS = {
    "num_train_timesteps": "num_train_timesteps",
    "beta_first": "beta_start",
    "beta_last": "beta_end",
    "beta_middle": "schedule",
}


def choose_schedule(schedules: Mapping[str, Callable[..., Scheduler]], target: str) -> Scheduler:
    """The schedule that a target is trained and sampled on; `target_of` knows the target from it.

    Args:
        schedules: what builds them, by the names that `scripts.diffusion.targets.TARGETS` gives them.
        target: what the network estimates.

    Raises:
        BundleError: for an unknown target.
    """
    row = find_target(target)
    schedule = schedules[row.schedule](**({"prediction_type": row.monais} if row.monais else {}))
    schedule.target = target
    return schedule


def target_of(schedule: Scheduler) -> str:
    """The target of a schedule: the one that it was chosen for, or else the one that MONAI's schedule itself names."""
    if hasattr(schedule, "target"):
        return str(schedule.target)
    return FLOW if isinstance(schedule, RFlowScheduler) else from_monais_name(schedule.prediction_type)


def signal_and_noise(schedule: Scheduler, timesteps: Iterable[int]) -> list[tuple[float, float]]:
    """The factors a of the clean latent and s of the noise at each timestep, as in `DiffusionObjective`."""
    if isinstance(schedule, RFlowScheduler):
        levels = [timestep / schedule.num_train_timesteps for timestep in timesteps]
        return [(1.0 - level, level) for level in levels]
    powers = [schedule.alphas_cumprod[timestep].item() for timestep in timesteps]
    return [(power**0.5, (1.0 - power) ** 0.5) for power in powers]


def schedule_facts(schedule: Scheduler) -> dict[str, Any]:
    """The noise levels of a schedule as plain data: its length and, for diffusion, three of its betas."""
    facts: dict[str, Any] = {"num_train_timesteps": schedule.num_train_timesteps}
    if not isinstance(schedule, RFlowScheduler):
        places = {"beta_first": 0, "beta_middle": len(schedule.betas) // 2, "beta_last": -1}
        facts |= {name: float(f"{schedule.betas[place].item():.6g}") for name, place in places.items()}
    return facts


def check_facts(checkpoint: Checkpoint, schedule: Scheduler) -> None:
    """Refuse weights whose facts say that they were trained for another target or on another schedule.

    The facts are `target` and `schedule` (see `schedule_facts`). Older checkpoints have MONAI's
    `prediction_type` alone, and the released weights have none: what is not stated is not checked.

    Raises:
        BundleError: naming the flag to give.
    """
    facts, target = checkpoint.facts, target_of(schedule)
    trained = facts.get("target", from_monais_name(facts["prediction_type"]) if "prediction_type" in facts else target)
    if trained != target:
        raise BundleError(
            f"{checkpoint.path} was trained for the target {trained}, not {target}: give --target {trained}"
        )
    now, then = schedule_facts(schedule), facts.get("schedule", {})
    for name, argument in ARGUMENTS.items():
        if name in then and then[name] != now.get(name):
            flag = f"--schedules::{find_target(target).schedule}::{argument}"
            raise BundleError(
                f"{checkpoint.path} was trained on a schedule with {name} {then[name]}, not {now.get(name)}: "
                f"give {flag} as in its training"
            )
