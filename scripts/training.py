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
"""What both trainings need around their iterations: finite losses, facts for the checkpoint, resuming."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint as IgniteCheckpoint
from monai.handlers import CheckpointSaver
from monai.networks.schedulers import Scheduler
from monai.utils import set_determinism
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from scripts.atomic import make_folder
from scripts.checkpoints import load_network, read_checkpoint
from scripts.errors import BundleError
from scripts.options import whole_number

logger = logging.getLogger(__name__)


class Facts:
    """Plain data that a checkpoint carries along, so that sampling needs nothing but the file.

    Args:
        facts: numbers, text, and lists and dictionaries of them.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def state_dict(self) -> dict[str, Any]:
        """The data, as MONAI's `CheckpointSaver` asks for it."""
        return dict(self.facts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a resumed training has the same facts.

        Raises:
            BundleError: naming the fact that differs.
        """
        for name, value in self.facts.items():
            if json.dumps(state.get(name)) != json.dumps(value):  # which also compares the order of conditions
                raise BundleError(
                    f"the checkpoint to resume was trained with {name} {state.get(name)}, now it is {value}: "
                    "use another --run_dir for a new training"
                )


class FiniteLosses:
    """Handler that stops a training at the first loss that is NaN or infinite."""

    def attach(self, engine: Engine) -> None:
        """Watch a MONAI trainer whose output holds `losses`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Check the iteration that has just ended.

        Raises:
            BundleError: naming the loss and the iteration.
        """
        for name, value in losses_of(engine.state.output).items():
            if not math.isfinite(value):
                raise BundleError(
                    f"the loss '{name}' is {value} at iteration {engine.state.iteration}: the last checkpoint is "
                    "from before; lower the learning rate, or check the batch's scans"
                )


class EngineState:
    """The epoch and iteration of a trainer, as plain data for a checkpoint.

    MONAI's `AdversarialTrainer` would put whole networks as pickled objects into its own state.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, int]:
        """How far the training has come."""
        return {"epoch": self.engine.state.epoch, "iteration": self.engine.state.iteration}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the engine go on from there."""
        self.engine.state.epoch, self.engine.state.iteration = state["epoch"], state["iteration"]


class SaveCheckpoints(CheckpointSaver):
    """MONAI's `CheckpointSaver` with the trainer's epoch and iteration in each checkpoint.

    Args:
        folder: where to write `checkpoint_epoch=N.pt` and, at the end, the final file.
        objects: what to save, by name; each has a `state_dict`.
        final_name: the final file.
        interval: epochs between checkpoints.
        keep: how many of them to keep.
    """

    def __init__(self, folder: str, objects: Mapping[str, Any], final_name: str, interval: int = 1, keep: int = 2):
        make_folder(folder)
        super().__init__(folder, dict(objects), save_final=True, final_filename=final_name, save_interval=interval)
        self.folder, self.final_name, self.keep = Path(folder), final_name, keep

    def attach(self, engine: Engine) -> None:
        """Save while a MONAI trainer runs."""
        self.save_dict["trainer"] = EngineState(engine)
        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._remove_old)
        engine.add_event_handler(Events.COMPLETED, self._say_where)

    def exception_raised(self, engine: Engine, e: Exception) -> None:
        """Save nothing: MONAI's handler would put the weights of a training that failed in the place of the result."""
        raise e

    def _remove_old(self) -> None:
        for path in checkpoints_in(self.folder)[: -self.keep]:
            path.unlink()

    def _say_where(self) -> None:
        logger.info(f"training is done: {self.folder / self.final_name}")


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The numbered checkpoints of a run folder, oldest first."""
    return sorted(Path(folder).glob("checkpoint_epoch=*.pt"), key=lambda path: int(path.stem.split("=")[1]))


class Resume:
    """Handler that continues from the newest checkpoint of the run folder, if there is one.

    Args:
        folder: where `SaveCheckpoints` writes.
        objects: what to restore, by the names in the checkpoint.
    """

    def __init__(self, folder: str, objects: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.objects = dict(objects)

    def attach(self, engine: Engine) -> None:
        """Restore before a MONAI trainer starts."""
        self.objects["trainer"] = EngineState(engine)
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Restore networks, optimisers and the engine's epoch, if there is a checkpoint.

        Raises:
            BundleError: if the checkpoint is unreadable or of another model.
        """
        found = checkpoints_in(self.folder)
        if found:
            self._restore(found[-1])
            logger.info(f"resumed {found[-1]}: {engine.state.epoch} of {engine.state.max_epochs} epochs are done")

    def _restore(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            IgniteCheckpoint.load_objects(to_load=self.objects, checkpoint=content)
        except BundleError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BundleError(
                f"cannot resume from {path}: {reason}. If the configuration changed, use another --run_dir; "
                "if the file is damaged, remove it to go on from the checkpoint before"
            ) from error


def start(
    network: nn.Module,
    pretrained: str | None = None,
    name: str = "",
    load_old: Any = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A network to train, on its device: as initialised, or with the weights of a file.

    Args:
        network: what to train.
        pretrained: weights to start from; None for none.
        name: which network of a training checkpoint to take; see `scripts.checkpoints.read_checkpoint`.
        load_old: whether the file has the monai-generative package's names.
        device: where to move the network.

    Raises:
        BundleError: if the file is not there or of another model.
    """
    if pretrained is not None:
        load_network(network, read_checkpoint(pretrained, name), load_old)
    return network.to(device).train()


def lr_schedule(optimizer: Optimizer, decay: str, max_epochs: int) -> LRScheduler:
    """How the learning rate changes from epoch to epoch.

    Args:
        optimizer: its rate is the first epoch's.
        decay: `constant`, or `cosine` for a fall to 0 at the end.
        max_epochs: length of the training.

    Raises:
        BundleError: for another `decay`.
    """
    if decay not in ("constant", "cosine"):
        raise BundleError(f"--lr_decay must be constant or cosine, got '{decay}'")
    # Of PyTorch's schedules, this one keeps no length in its state: a resumed training may be made longer.
    return LambdaLR(optimizer, partial(_cosine, max_epochs) if decay == "cosine" else _constant)


def _cosine(max_epochs: int, epoch: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, epoch / max_epochs)))


def _constant(epoch: int) -> float:
    return 1.0


def check_target(schedule: Scheduler) -> None:
    """Refuse a schedule whose model would not predict the noise, which is what the training's target is.

    Raises:
        BundleError: for another prediction type than `epsilon`.
    """
    if schedule.prediction_type != "epsilon":
        raise BundleError(
            f"the training's target is the noise: schedule::prediction_type {schedule.prediction_type} "
            "can be sampled from, but not trained yet"
        )


def set_seed(seed: Any = None) -> None:
    """Seed Python's, NumPy's, PyTorch's and MONAI's random numbers; None leaves them random.

    Raises:
        BundleError: unless the seed is a whole number.
    """
    if seed is not None:
        set_determinism(whole_number(seed, "seed"))


def losses_of(output: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a trainer's output: those under `losses`, or MONAI's one `loss`."""
    return dict(output["losses"]) if "losses" in output else {"loss": output["loss"].item()}
