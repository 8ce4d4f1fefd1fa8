# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Where losses, validations and figures go beside the run folder: TensorBoard, and MLflow with `--tracking mlflow`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from scripts.core.config import current_config, is_plain
from scripts.training.engine import losses_of
from scripts.volumes.pictures import figures_of


def write_evaluation(engine: Engine, writer: SummaryWriter, run_dir: str | os.PathLike) -> None:
    """Write the engine's metrics, and the figures of this iteration, to TensorBoard.

    It is an `epoch_event_writer` of MONAI's `TensorBoardStatsHandler`, whose own counts epochs, so that validations
    could not be laid over the losses of the iterations.

    Args:
        engine: its `state.metrics` are numbers.
        writer: of TensorBoard.
        run_dir: the run folder, where `scripts.volumes.pictures` writes.
    """
    iteration = engine.state.iteration
    for name, value in engine.state.metrics.items():
        writer.add_scalar(name, value, iteration)
    for name, path in figures_of(run_dir, iteration).items():
        with Image.open(path) as image:
            writer.add_image(name, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")
    writer.flush()


def complete_mlflow(engine: Engine, handlers: Iterable[Any], run_dir: str | os.PathLike) -> None:
    """Let MONAI's `MLFlowHandler`, where `--tracking` has put one among the handlers, log all there is of a training.

    MONAI's handler expects outputs in lists with one `loss` and knows metrics by epoch. Here it logs each of the
    losses, metrics by iteration, the figures, the configuration and its plain top-level values as parameters. Call
    this from the configuration, when the trainer is there and before it runs; without such a handler it does nothing.

    Args:
        engine: the trainer.
        handlers: its handlers.
        run_dir: the run folder.
    """
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            MLFlowRecord(handler, run_dir, current_config()).attach(engine)


class MLFlowRecord:
    """What is logged in the run of an `MLFlowHandler`, which keeps opening and closing it.

    Args:
        handler: attached to the trainer; its transform of outputs and its epoch logger are replaced.
        run_dir: the run folder.
        config: the merged configuration.
    """

    def __init__(self, handler: MLFlowHandler, run_dir: str | os.PathLike, config: Mapping[str, Any]) -> None:
        self.handler, self.run_dir, self.config = handler, run_dir, config
        handler.output_transform = losses_of
        handler.epoch_logger = self.log_evaluation

    def attach(self, engine: Engine) -> None:
        """Log the configuration when the trainer has started, after the handler has."""
        engine.add_event_handler(Events.STARTED, self.log_config)

    def log_config(self) -> None:
        """Log the configuration, and the parameters that the run does not have yet: MLflow lets none change."""
        client, run = self.handler.client, self._run()
        logged = client.get_run(run).data.params
        for name, value in parameters(self.config).items():
            if name not in logged:
                client.log_param(run, name, value)
        client.log_text(run, json.dumps(self.config, indent=4, default=str) + "\n", "config.json")

    def log_evaluation(self, engine: Engine) -> None:
        """Log the engine's metrics and the figures of this iteration."""
        client, run, iteration = self.handler.client, self._run(), engine.state.iteration
        for name, value in engine.state.metrics.items():
            client.log_metric(run, name, float(value), step=iteration)
        for path in figures_of(self.run_dir, iteration).values():
            client.log_artifact(run, str(path), "figures")

    def _run(self) -> str:
        return self.handler.cur_run.info.run_id


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level values of a configuration that are plain: numbers, truth values, and text that is no expression."""
    return {name: value for name, value in config.items() if is_plain(value)}
