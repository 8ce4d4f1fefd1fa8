# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Progress on the screen: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta

from ignite.engine import Engine, Events
from tqdm import tqdm

from scripts.compute.processes import is_main, world_size
from scripts.training.engine import losses_of

logger = logging.getLogger(__name__)


class VolumeProgress:
    """Handler with a progress bar over the volumes of a run; only a terminal shows it."""

    def attach(self, engine: Engine) -> None:
        """Follow a MONAI evaluator whose batches hold one entry of `index` a volume."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.close)

    def start(self, engine: Engine) -> None:
        """Open the bar."""
        self.bar = tqdm(total=len(engine.data_loader.dataset), desc="sampling", unit="volume", disable=None)

    def advance(self, engine: Engine) -> None:
        """Count the volumes of the batch that was just saved."""
        self.bar.update(len(engine.state.batch["index"]))

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class TrainingProgress:
    """Handler that shows the losses, the speed and the time left of a training; in one process of several.

    Args:
        log_every: iterations between two plain lines where there is no terminal.
    """

    def __init__(self, log_every: int = 20) -> None:
        self.log_every = log_every

    def attach(self, engine: Engine) -> None:
        """Follow a MONAI trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.close)

    def start(self, engine: Engine) -> None:
        """Open the bar over all iterations of all epochs, those of a resumed run counted in."""
        self.first, self.since = engine.state.iteration, time.monotonic()
        total = engine.state.max_epochs * engine.state.epoch_length
        shown = None if is_main() else True  # None: only on a terminal
        self.bar = tqdm(total=total, initial=self.first, desc="training", unit="it", disable=shown)

    def advance(self, engine: Engine) -> None:
        """Show the iteration that has just ended."""
        losses = {name: f"{value:.4g}" for name, value in losses_of(engine.state.output).items()}
        self.bar.update()
        self.bar.set_postfix({"epoch": engine.state.epoch, **losses, "samples/s": self._rate(engine)}, refresh=False)
        if not sys.stderr.isatty() and engine.state.iteration % self.log_every == 0:
            logger.info(self._line(engine, losses))

    def _pace(self, engine: Engine) -> float:
        return (time.monotonic() - self.since) / max(1, engine.state.iteration - self.first)

    def _rate(self, engine: Engine) -> str:
        samples = len(next(iter(engine.state.batch.values()))) * world_size()
        return f"{samples / max(self._pace(engine), 1e-9):.3g}"

    def _line(self, engine: Engine, losses: dict[str, str]) -> str:
        done = engine.state.iteration
        total = engine.state.max_epochs * engine.state.epoch_length
        pace = self._pace(engine)
        left = timedelta(seconds=round(pace * (total - done)))
        shown = " ".join(f"{name} {value}" for name, value in losses.items())
        speed = f"{pace:.2f} s each, {self._rate(engine)} samples/s, {left} left"
        return f"epoch {engine.state.epoch} iteration {done}/{total} {shown} ({speed})"

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
