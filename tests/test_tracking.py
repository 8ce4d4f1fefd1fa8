# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard and MLflow are given of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from monai.handlers import TensorBoardStatsHandler
from monai.utils import path_to_sqlite_uri
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from scripts.training.engine import losses_of
from scripts.training.tracking import complete_mlflow, parameters, write_evaluation
from scripts.training.validation import Evaluation
from scripts.volumes.pictures import write

CONFIG = {
    "bundle_root": ".",
    "lr": 0.5,
    "amp": False,
    "network": {"channels": [1, 2]},
    "run_dir": "$@bundle_root + '/runs'",
    "pretrained": None,
}


class Drawn(Evaluation):
    """One value and a picture; both say the iteration."""

    def evaluate(self, network: nn.Module, iteration: int) -> dict[str, float]:
        write(self.run_dir, "samples", iteration, picture(iteration))
        return {"loss": 1.0 / iteration}


def picture(iteration: int) -> np.ndarray:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :, 0] = iteration
    return pixels


def trainer(run_dir: Path, *handlers: Any) -> Engine:
    """An engine with losses 1/iteration and twice that, and an evaluation after each second epoch."""
    engine = Engine(step)
    engine.state.metrics = {}
    for handler in (Drawn(nn.Linear(1, 1), run_dir, every=2), *handlers):
        handler.attach(engine)
    return engine


def step(engine: Engine, batch: Any) -> dict[str, Any]:
    if batch is None:
        raise RuntimeError("no batch")
    loss = 1.0 / engine.state.iteration
    return {"losses": {"loss": loss, "kl": 2.0 * loss}}


def test_tensorboard_has_losses_values_and_figures_by_iteration(tmp_path: Path) -> None:
    def writer(engine: Engine, summary_writer: Any) -> None:
        write_evaluation(engine, summary_writer, run_dir=tmp_path)

    handler = TensorBoardStatsHandler(log_dir=str(tmp_path), output_transform=losses_of, epoch_event_writer=writer)
    trainer(tmp_path, handler).run([0, 1, 2], max_epochs=4)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert {e.step: e.value for e in events.Scalars("val_loss")} == pytest.approx({6: 1 / 6, 12: 1 / 12})
    assert [e.step for e in events.Scalars("kl")] == list(range(1, 13))
    images = events.Images("samples")
    assert [(image.step, image.width, image.height) for image in images] == [(6, 16, 8), (12, 16, 8)]


def test_parameters_are_the_plain_values() -> None:
    assert parameters(CONFIG) == {"bundle_root": ".", "lr": 0.5, "amp": False}


class Trainer(Engine):
    """A trainer as a configuration builds it: 2 epochs of 3 iterations."""

    def __init__(self, handlers: list[Any], fails: bool) -> None:
        super().__init__(step)
        self.state.metrics = {}
        self.fails = fails
        for handler in handlers:
            handler.attach(self)

    def train(self) -> None:
        self.run([0, 1, None if self.fails else 2], max_epochs=2)


class Track:
    """Runs a training with MONAI's own tracking in one folder."""

    def __init__(self, folder: Path) -> None:
        mlflow = pytest.importorskip("mlflow")
        self.folder = folder
        self.client = mlflow.MlflowClient(path_to_sqlite_uri(folder / "mlruns.db"))

    def run(self, **flags: Any) -> None:
        path = self.folder / "train.json"
        path.write_text(json.dumps(self.config()))
        given = {"workflow_type": "train", "logging_file": False, "tracking": "mlflow", **flags}
        workflow = ConfigWorkflow(config_file=str(path), **given)
        workflow.run()
        workflow.finalize()

    def config(self) -> dict[str, Any]:
        evaluation = {"network": {"_target_": "torch.nn.Identity"}, "run_dir": "@run_dir", "every": 2}
        handlers = [{"_target_": f"{__name__}.Drawn", **evaluation}]
        trainer = {"_target_": f"{__name__}.Trainer", "handlers": "@train::handlers", "fails": "@fails"}
        tracking = {"engine": "@train::trainer", "handlers": "@train::handlers", "run_dir": "@run_dir"}
        return {
            **CONFIG,
            "bundle_root": str(self.folder),
            "run_dir": str(self.folder),
            "output_dir": "$@run_dir",
            "run_name": "@run_dir",
            "fails": False,
            "train": {"handlers": handlers, "trainer": trainer},
            "run": [{"_target_": "scripts.training.tracking.complete_mlflow", **tracking}, "$@train::trainer.train()"],
        }

    def logged(self) -> Any:
        """The one run that there is."""
        (experiment,) = [e for e in self.client.search_experiments() if e.name == "monai_experiment"]
        (run,) = self.client.search_runs(experiment.experiment_id)
        return run

    def artifacts(self) -> dict[str, Path]:
        """Name -> file of what was logged."""
        root = Path(self.logged().info.artifact_uri.removeprefix("file://"))
        return {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Track:
    """A tracked training, done."""
    track = Track(tmp_path_factory.mktemp("run"))
    track.run()
    return track


def test_mlflow_run_has_losses_values_and_parameters(tracked: Track) -> None:
    run, history = tracked.logged(), tracked.client.get_metric_history
    assert (run.info.run_name, run.info.status) == (str(tracked.folder), "FINISHED")
    assert [(m.step, m.value) for m in history(run.info.run_id, "val_loss")] == [(6, 1 / 6)]
    assert [(m.step, m.value) for m in history(run.info.run_id, "kl")] == [(i, 2 / i) for i in range(1, 7)]
    assert run.data.params["lr"] == "0.5" and run.data.params["max_epochs"] == "2"


def test_mlflow_run_has_figures_and_configuration(tracked: Track) -> None:
    artifacts = tracked.artifacts()
    with Image.open(artifacts["figures/samples_iteration-000006.png"]) as image:
        assert (np.asarray(image) == picture(6)).all()
    logged = json.loads(artifacts["config.json"].read_text())
    assert logged["lr"] == 0.5 and logged["network"] == {"channels": [1, 2]}
    assert len(artifacts) == 3  # the last is MONAI's own copy of the configuration


def test_interrupted_run_goes_on_with_another_parameter(tmp_path: Path) -> None:
    track = Track(tmp_path)
    with pytest.raises(RuntimeError):
        track.run(fails=True)
    assert track.logged().info.status == "RUNNING" and "config.json" in track.artifacts()
    track.run(lr=0.25)
    assert track.logged().info.status == "FINISHED" and track.logged().data.params["lr"] == "0.5"


def test_without_tracking_nothing_is_logged(tmp_path: Path) -> None:
    engine = trainer(tmp_path)
    complete_mlflow(engine, [Drawn(nn.Linear(1, 1), tmp_path)], tmp_path)
    engine.run([0, 1], max_epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "validation.tsv"]
