# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What trainings need around their iterations: finite losses, facts for the checkpoint, stopping in good order."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.compute import processes
from scripts.compute.devices import volume_layout
from scripts.compute.precision import recompute_activations
from scripts.core.errors import BundleError
from scripts.core.options import is_absent, number, whole_number, yes_or_no
from scripts.training.checkpointing import Checkpoints, SaveCheckpoints, ends_epoch

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
"""Windows has no SIGUSR1."""
BLOCKS = ("AEKLResBlock", "AEKLDownsample", "DiffusionUNetResnetBlock", "SpatialTransformer", "UpsampleBlock")
FILES_TO_NAME = 8


class Facts:
    """Plain data that a checkpoint carries along, so that sampling needs nothing but the file.

    Args:
        more: further facts, by name.
        facts: numbers, text, and lists and dictionaries of them.
    """

    def __init__(self, more: Mapping[str, Any] | None = None, **facts: Any) -> None:
        self.facts = {**facts, **(more or {})}

    def state_dict(self) -> dict[str, Any]:
        """The data."""
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
    """Handler that stops a training at the first loss, or norm of gradients, that is NaN or infinite.

    Args:
        checkpoints: of the run folder, to name the one to go back to.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def attach(self, engine: Engine) -> None:
        """Watch a MONAI trainer whose output holds `losses`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Check the iteration that has just ended; all processes see the same means, and so stop together.

        Raises:
            BundleError: naming the loss, the iteration, the batch's scans and the checkpoint before.
        """
        bad = {name: value for name, value in losses_of(engine.state.output).items() if not math.isfinite(value)}
        if bad:
            name, value = next(iter(bad.items()))
            raise BundleError(
                f"'{name}' is {value} at iteration {engine.state.iteration}, on {_scans(engine)}. "
                f"{self._way_back()}: look at those scans, lower --lr, or compute with --amp bf16 or 0"
            )

    def _way_back(self) -> str:
        paths = self.checkpoints.paths()
        return f"The last good checkpoint is {paths[-1]}" if paths else "There is no checkpoint yet"


def _scans(engine: Engine) -> str:
    batch = engine.state.batch
    own = [str(name) for name in batch.get("path", batch.get("participant_id", []))]
    names = processes.all_lists(own)
    more = f" and {len(names) - FILES_TO_NAME} more" if len(names) > FILES_TO_NAME else ""
    return f"{', '.join(names[:FILES_TO_NAME])}{more}" if names else "an unnamed batch"


class StopOnSignal:
    """Handler that saves a checkpoint and stops when the machine is taken away: SIGTERM, SIGUSR1 or Ctrl-C.

    All processes agree on the iteration at which they stop. A second signal stops at once.

    Args:
        saver: writes the checkpoint.
    """

    def __init__(self, saver: SaveCheckpoints) -> None:
        self.saver = saver
        self.caught = 0
        self.before: dict[int, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Listen while a MONAI trainer runs."""
        engine.add_event_handler(Events.STARTED, self.listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.stop_listening)

    def listen(self) -> None:
        """Take the signals over; only a program's main thread can."""
        try:
            self.before = {one: signal.signal(one, self._catch) for one in SIGNALS}
        except ValueError:
            logger.info("not in the main thread: a signal will stop this training without a checkpoint")

    def stop_listening(self) -> None:
        """Give the signals back."""
        for one, handler in self.before.items():
            signal.signal(one, handler)
        self.before = {}

    def _catch(self, caught: int, frame: FrameType | None) -> None:
        # A loading process is forked with this handler. It lets the first signal pass, which is meant for its parent.
        self.caught = caught
        self.stop_listening()

    def within_epoch(self, engine: Engine) -> None:
        """After an iteration: as `__call__`, unless the epoch is over and its validation is still to come."""
        if not ends_epoch(engine):
            self(engine)

    def __call__(self, engine: Engine) -> None:
        """Go on, or save and stop.

        Raises:
            BundleError: after the checkpoint was saved.
        """
        caught = int(processes.all_max(self.caught))
        if caught:
            self.stop_listening()
            self.saver.save(engine)
            raise BundleError(
                f"stopped by {signal.Signals(caught).name} after iteration {engine.state.iteration}, which is saved in "
                f"{self.saver.checkpoints.folder}: the same command goes on from there"
            )


class TimeLimit:
    """Handler that ends a training when its minutes are over, as another ends after its last epoch.

    The epoch that is going on ends with the iteration that is, is validated, and the result is written. What falls with
    the learning rate's decay has then fallen to its end. All runs of a training count, stops between them do not.
    Attach it before the rates, and after the handler that resumes.

    Args:
        max_minutes: the limit; None for none.

    Raises:
        BundleError: for a limit that is no number above 0.
    """

    def __init__(self, max_minutes: Any = None) -> None:
        self.seconds = None if is_absent(max_minutes) else 60.0 * number(max_minutes, "max_minutes", least=0.0)
        if self.seconds == 0.0:
            raise BundleError("--max_minutes must be above 0")

    def attach(self, engine: Engine) -> None:
        """Follow a MONAI trainer, if there is a limit."""
        if self.seconds is not None:
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.end_in_time)

    def start(self, engine: Engine) -> None:
        """Go on with the time that was spent; with none left, there is nothing to train."""
        engine.state.since = time.monotonic() - getattr(engine.state, "seconds", 0.0)
        if self._is_over(engine):
            logger.warning("the minutes of this training are over: --max_minutes above them goes on")
            engine.state.max_epochs = engine.state.epoch

    def end_in_time(self, engine: Engine) -> None:
        """After an iteration: make the epoch the last, and end it; all processes do so together."""
        if self._is_over(engine):
            logger.info(f"the minutes are over after iteration {engine.state.iteration}")
            engine.state.max_epochs = engine.state.epoch
            if not ends_epoch(engine):
                engine.terminate_epoch()

    def _is_over(self, engine: Engine) -> bool:
        spent = time.monotonic() - engine.state.since
        engine.state.time_share = processes.all_max(spent / self.seconds) if self.seconds else 0.0
        return engine.state.time_share >= 1.0


def prepare_for_training(
    network: nn.Module, device: torch.device | str | None = None, checkpointing: Any = False, channels_last: Any = False
) -> nn.Module:
    """A network set up for training: on its device, and with what saves memory or time there.

    Args:
        network: what to train; changed in place.
        device: where to move it; None leaves it where it is.
        checkpointing: whether to compute activations again in the backward pass instead of keeping them.
        channels_last: whether weights lie in memory with their channels last, where the device gains by it; see
            `scripts.compute.devices.volume_layout`.
    """
    if yes_or_no(checkpointing, "gradient_checkpointing"):
        recompute_activations(network, BLOCKS)
    network = network.to(device)
    if yes_or_no(channels_last, "channels_last"):
        layout = volume_layout(next(network.parameters()).device)
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
    return network.train()


def check_options(rates: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Refuse numbers that a training could not use, before anything is built.

    Args:
        rates: learning rates by the names of their flags.
        whole: flags that are whole numbers: `num_workers` of at least 0, the others of at least 1, or None where
            they follow from the data.

    Raises:
        BundleError: naming the flag.
    """
    for flag, rate in rates.items():
        if number(rate, flag) <= 0.0:
            raise BundleError(f"--{flag} must be above 0, got {rate}")
    for flag, value in whole.items():
        if not (flag == "epoch_length" and is_absent(value)):
            whole_number(value, flag, least=0 if flag == "num_workers" else 1)


def epoch_length(value: Any) -> int | None:
    """Iterations of an epoch; None for one pass over the data, which the command line hands over as `null`.

    Raises:
        BundleError: for a number below 1, or none.
    """
    return None if is_absent(value) else whole_number(value, "epoch_length", least=1)


def flatten(handlers: Iterable[Any]) -> list[Any]:
    """One list of handlers: those in lists in it, too, and without the None that a disabled one leaves."""
    flat: list[Any] = []
    for handler in handlers:
        flat += flatten(handler) if isinstance(handler, list) else [handler]
    return [handler for handler in flat if handler is not None]


def seed_networks(seed: int, deterministic: Any = False) -> None:
    """Set the random state from which networks are initialised, alike in all processes.

    Args:
        seed: of the training.
        deterministic: whether cuDNN may only use algorithms that give the same bits each time.
    """
    torch.manual_seed(seed)
    exact = yes_or_no(deterministic, "deterministic")
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark &= not exact


def losses_of(output: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a trainer's output: those under `losses`, or MONAI's one `loss`."""
    return dict(output["losses"]) if "losses" in output else {"loss": output["loss"].item()}
