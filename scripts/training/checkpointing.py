# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a training: writing them safely, and going on from the newest one that is whole."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from scripts.compute import processes
from scripts.compute.ownership import OutputFolder
from scripts.core.config import config_text, is_plain
from scripts.core.errors import BundleError
from scripts.core.files import make_folder, replacing
from scripts.core.options import is_absent, number, whole_number
from scripts.core.paths import PACKAGE
from scripts.training.repeatable import Stream

logger = logging.getLogger(__name__)

PATTERN = "checkpoint_iteration={}.pt"
BEST = "best.pt"
WORDS = {"samples": "samples in the dataset", "batch": "samples in a batch of all processes"}
EARLIER_NAMES = {"optimisation": "generator_step", "discriminator_optimisation": "discriminator_step"}
"""What checkpoints of earlier versions call an object, where they do so otherwise."""
SCRIPTS = "scripts_sha256"


class Checkpoints:
    """The numbered checkpoints in the folder of a training.

    Args:
        folder: made by rank 0 with the first checkpoint; several nodes must share it.
        keep: how many of the newest ones to keep.
        reads: option -> folder that the training reads.

    Raises:
        BundleError: unless at least one is kept.
    """

    def __init__(self, folder: str | os.PathLike, keep: Any = 2, reads: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(str(folder))
        self.keep = whole_number(keep, "keep_checkpoints", least=1)
        self.output = OutputFolder(folder, "run_dir", "train", reads)
        self.is_locked = False

    def paths(self) -> list[Path]:
        """All of them, oldest first."""
        found = [path for path in self.folder.glob(PATTERN.format("*")) if path.stem.split("=")[1].isdecimal()]
        return sorted(found, key=iteration_of)

    @cached_property
    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Path and content of the newest checkpoint that is whole, the same in all processes; None if there is none."""
        path = processes.from_main(self._newest_whole() if processes.is_main() else None)
        return None if path is None else (path, _read(path))

    def _newest_whole(self) -> Path | None:
        paths = self.paths()
        for path in reversed(paths):
            reason = why_damaged(path)
            if reason is None:
                return path
            logger.warning(f"{path} is damaged ({reason})" + ": going back to the one before it" * (path != paths[0]))
        if paths:
            raise BundleError(
                f"no checkpoint in {self.folder} is whole: remove them to train anew, or give another --run_dir"
            )
        return None

    def lock(self) -> None:
        """Keep other trainings out of the folder, until `unlock`, and clear away what a killed one left.

        Raises:
            BundleError: if another training is at work there, or for what `OutputFolder.claim` refuses.
        """
        if not self.is_locked:
            self.output.claim()
            self.is_locked = True

    def unlock(self) -> None:
        """Let others in again."""
        self.output.release()
        self.is_locked = False

    def write(self, content: Mapping[str, Any], iteration: int) -> Path:
        """Write one, flush it to the disk, give it its name, and only then remove the oldest.

        Raises:
            BundleError: if there is no room; the checkpoints before are kept.
        """
        path = make_folder(self.folder) / PATTERN.format(iteration)
        save(content, path)
        older = [old for old in self.paths() if iteration_of(old) < iteration]
        for old in older[: -self.keep + 1 or None]:
            old.unlink(missing_ok=True)
        return path


def iteration_of(path: Path) -> int:
    """The number in the name of a checkpoint."""
    return int(path.stem.split("=")[1])


def why_damaged(path: Path) -> str | None:
    """What is wrong with a file of `torch.save`, by its checksums and by reading it; None for nothing."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
        if bad is not None:
            return f"wrong checksum of {bad}"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can fail anywhere in both readers
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def save(content: Mapping[str, Any], path: Path) -> None:
    """`torch.save` to a temporary name, flushed and renamed.

    Raises:
        BundleError: if the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            torch.save(dict(content), temporary)
    except RuntimeError as error:  # what PyTorch's writer makes of a full disk
        raise BundleError(f"cannot write {path}: is the disk full? What was written before is kept") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # bytes that are no checkpoint can fail anywhere in PyTorch's reader
        raise BundleError(f"{path} is no checkpoint of a training: remove it, or use another --run_dir") from error


def training_seed(seed: Any, checkpoints: Checkpoints) -> int:
    """The seed of a training: the given one, else that of the checkpoint to resume, else a new one.

    Raises:
        BundleError: unless the seed is a whole number, or if a resumed training had another.
    """
    given = None if seed is None else whole_number(seed, "seed")
    resumed: int | None = checkpoints.newest[1].get("trainer", {}).get("seed") if checkpoints.newest else None
    if given is not None and resumed is not None and given != resumed:
        raise BundleError(
            f"{checkpoints.folder} holds a training of seed {resumed}: leave --seed out to go on with it, or give "
            f"another --run_dir to start one of seed {given}"
        )
    if resumed is not None:
        return resumed
    return _new_seed() if given is None else given


def _new_seed() -> int:
    seed = processes.from_main(int.from_bytes(os.urandom(4), "big"))
    logger.info(f"seed {seed}")
    return seed


class Progress:
    """How far a trainer is, as plain data for a checkpoint.

    Args:
        engine: the trainer.
        seed: that all random numbers follow from.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.seed = engine, seed

    def state_dict(self) -> dict[str, Any]:
        """Epochs and iterations that are done, the seed, and of what the stream of samples is made."""
        done = self.engine.state.iteration
        return {"epoch": done // self.engine.state.epoch_length, "iteration": done, "seed": self.seed, **self._stream()}

    def _stream(self) -> dict[str, int]:
        stream = getattr(getattr(self.engine, "data_loader", None), "batch_sampler", None)
        if not isinstance(stream, Stream):
            return {}
        return {"samples": stream.size, "batch": stream.batch_size * processes.world_size()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the engine go on from there, in the middle of an epoch if need be.

        Raises:
            BundleError: for what is no number of iterations.
        """
        done = state.get("iteration")
        if not isinstance(done, int) or done < 0:
            raise BundleError(
                f"the checkpoint to resume says that {done} iterations are done: remove it, and the one before is taken"
            )
        for name, now in self._stream().items():
            if state.get(name, now) != now:
                logger.warning(
                    f"going on with {now} {WORDS[name]}, which were {state[name]}: iterations keep their count, and "
                    "the order of the samples is another one from here"
                )
        self.engine.state.iteration = done
        self.engine.state.epoch = done // self.engine.state.epoch_length


def training_state(
    stage: str, network: Any, average: Any, optimisation: Any, facts: Any, **more: Any
) -> dict[str, Any]:
    """The objects that make up the state of a training, by their names in its checkpoints.

    Args:
        stage: what the network is called there; its averaged weights have the suffix `_ema`.
        network, average, optimisation, facts: each has a `state_dict`; there may be no average.
        more: such as a discriminator and its optimisation.
    """
    return {stage: network, f"{stage}_ema": average, "optimisation": optimisation, "facts": facts, **more}


def present(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The objects that there are: a training without an average of the weights has None in its place."""
    return {name: thing for name, thing in objects.items() if thing is not None}


class Resume:
    """Handler that continues from the newest whole checkpoint, if there is one.

    Args:
        checkpoints: of the run folder.
        objects: what to restore, by the names in the checkpoint; each has a `load_state_dict`.
        seed: of the training.
    """

    def __init__(self, checkpoints: Checkpoints, objects: Mapping[str, Any], seed: int) -> None:
        self.checkpoints, self.objects, self.seed = checkpoints, present(objects), seed

    def attach(self, engine: Engine) -> None:
        """Restore before a MONAI trainer starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Restore everything, if there is a checkpoint.

        The folder is taken first, before any other handler writes there.

        Raises:
            BundleError: if the checkpoint is of another model or of another kind of training, or if another training
                is at work there.
        """
        if processes.is_main():
            self.checkpoints.lock()
        if self.checkpoints.newest is None:
            return
        path, content = self.checkpoints.newest
        for name, thing in {**self.objects, "trainer": Progress(engine, self.seed)}.items():
            _restore(thing, name, content, path)
        del self.checkpoints.newest  # and with it the copy in memory
        total = engine.state.max_epochs * engine.state.epoch_length
        logger.info(f"resumed {path}: {engine.state.iteration} of {total} iterations are done")
        if engine.state.iteration >= total:
            logger.warning("there is nothing left to train: --max_epochs above the epochs that are done goes on")
        engine.state.best = content["trainer"].get("best", -math.inf)
        engine.state.seconds = content["trainer"].get("seconds", 0.0)
        _say_what_changed(content.get("config", "{}"), content.get("code", {}))


def _restore(thing: Any, name: str, content: Mapping[str, Any], path: Path) -> None:
    saved = content.get(name, content.get(EARLIER_NAMES.get(name, name)))
    if saved is None:
        raise BundleError(
            f"cannot resume {path}: it holds no {name}. If the configuration changed, use another --run_dir"
        )
    try:
        thing.load_state_dict(saved)
    except BundleError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        reason = lines[1] if len(lines) > 1 else lines[0]  # PyTorch's first line names the class alone
        raise BundleError(
            f"cannot resume {path}: its {name} does not fit: {reason[:200].rstrip('.: ')}. If the configuration "
            "changed on purpose, use another --run_dir"
        ) from error


def _say_what_changed(saved: str, code: Mapping[str, str]) -> None:
    for name, current in code_version().items():
        if code.get(name, current) != current:
            words = "another state of this code" if name == SCRIPTS else f"{name} {current}, which was {code[name]}"
            logger.warning(f"going on with {words}: the result may differ from that of an unbroken training")
    before, now = json.loads(saved), json.loads(config_text())
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and is_plain(now[name]):
            logger.warning(f"going on with --{name} {now[name]}, which was {before[name]}")


def code_version() -> dict[str, str]:
    """Versions of what a training runs on, and a hash of this bundle's own code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return {SCRIPTS: digest.hexdigest(), **{name: version(name) for name in ("torch", "monai", "numpy")}}


class SaveCheckpoints:
    """Handler that writes numbered checkpoints, the best weights and, at the end, the final ones.

    A numbered checkpoint holds every object's state, how far the training is, the seed, the configuration as it was
    resolved, and versions. The best and the final file hold networks and facts alone, for sampling.

    Args:
        checkpoints: of the run folder.
        objects: what to save, by name; each has a `state_dict`.
        seed: of the training.
        result: name of the final file.
        shipped: which of the objects the best and final files hold.
        every: iterations between two checkpoints; None for one at the end of each epoch.
        minutes: after which there is one more, whatever the iteration; None for no such ones.
        metric: name in `engine.state.metrics` of what tells the best; a leading `-` if less is better.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        objects: Mapping[str, Any],
        seed: int,
        result: str,
        shipped: Sequence[str],
        every: Any = None,
        metric: str | None = None,
        minutes: Any = None,
    ) -> None:
        self.checkpoints, self.objects, self.seed = checkpoints, present(objects), seed
        self.seconds = math.inf if is_absent(minutes) else 60.0 * number(minutes, "checkpoint_minutes", least=0.0)
        self.saved_at = math.inf
        self.result, self.shipped = checkpoints.folder / result, [name for name in shipped if name in self.objects]
        self.every = None if every is None else whole_number(every, "checkpoint_every", least=1)
        self.metric = metric
        self.version = code_version()
        self.config = config_text()

    def attach(self, engine: Engine) -> None:
        """Save while a MONAI trainer runs."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_within_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save_after_epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._give_up)

    def _begin(self, engine: Engine) -> None:
        if processes.is_main():
            self.checkpoints.lock()
        self.best = getattr(engine.state, "best", -math.inf)
        self.saved_at = time.monotonic()

    def _save_within_epoch(self, engine: Engine) -> None:
        due = self.every and engine.state.iteration % self.every == 0
        if (due or time.monotonic() - self.saved_at > self.seconds) and not ends_epoch(engine):
            self.save(engine)

    def _save_after_epoch(self, engine: Engine) -> None:
        # After the validation, so that a training that is killed in it has it again.
        self._save_if_best(engine)
        if self.every is None or engine.state.iteration % self.every == 0 or ends_training(engine):
            self.save(engine)

    def save(self, engine: Engine) -> None:
        """Write a numbered checkpoint now; only rank 0 does."""
        if not processes.is_main():
            return
        content = {name: thing.state_dict() for name, thing in self.objects.items()}
        content["trainer"] = {**Progress(engine, self.seed).state_dict(), "best": self.best, **_time_spent(engine)}
        content |= {"config": self.config, "code": self.version}
        self.checkpoints.write(content, engine.state.iteration)
        self.saved_at = time.monotonic()

    def _save_if_best(self, engine: Engine) -> None:
        if self.metric is None or self.metric.lstrip("-") not in engine.state.metrics:
            return
        value = engine.state.metrics[self.metric.lstrip("-")] * (-1.0 if self.metric.startswith("-") else 1.0)
        if value > self.best:
            self.best = value
            self._ship(self.checkpoints.folder / BEST, {"best": value, "iteration": engine.state.iteration})

    def _finish(self, engine: Engine) -> None:
        self._ship(self.result, {"iteration": engine.state.iteration})
        self.checkpoints.unlock()
        logger.info(f"training is done: {self.result}")

    def _give_up(self, engine: Engine, error: BaseException) -> None:
        self.checkpoints.unlock()
        raise error

    def _ship(self, path: Path, more: Mapping[str, Any]) -> None:
        if processes.is_main():
            content = {name: self.objects[name].state_dict() for name in self.shipped}
            save({**content, "facts": {**self.objects["facts"].state_dict(), **more}}, path)


def ends_epoch(engine: Engine) -> bool:
    """Whether the iteration that was just done is an epoch's last."""
    return engine.state.iteration % engine.state.epoch_length == 0


def ends_training(engine: Engine) -> bool:
    """Whether the epoch that was just done is the last."""
    return engine.state.epoch == engine.state.max_epochs


def _time_spent(engine: Engine) -> dict[str, float]:
    """The seconds that a training with a limit of minutes has taken so far."""
    since = getattr(engine.state, "since", None)
    return {} if since is None else {"seconds": round(time.monotonic() - since, 3)}
