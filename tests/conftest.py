# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the thread limit, and running the bundle as a user does.

`make test` has two processes that each begin with half of the tests, in order; the one that has finished takes half of
what the other has left (xdist's worksteal), so that neither waits for the other's longest file. A module's tests may
then be in both: a fixture of a module that takes seconds is `computed_once`.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import filelock
import pytest
from processes import Finished, run_interpreter, run_python

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

    from scripts.conditions.conditions import Conditions
    from scripts.volumes.grid import Grid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ.setdefault(variable, "1")  # read when torch and ITK are first imported, here and in subprocesses

BASE = "configs/inference.json"
TINY = "configs/tiny.yaml"
SMALLEST: dict[str, object] = {"grid::shape": [16, 32, 16]}
"""The smallest volume that the networks of `tiny.yaml` take, for tests that compare volumes with each other."""


class RunBundle(Protocol):
    """The type of the fixture `run_bundle`."""

    def __call__(
        self, configs: Sequence[str | Path], *flags: object, cwd: str | Path | None = None, timeout: float = 900
    ) -> Finished: ...


class RunHere(Protocol):
    """The type of the fixture `run_here`."""

    def __call__(self, configs: Sequence[str | Path], **overrides: Any) -> Any: ...


class RunTiny(Protocol):
    """The type of the fixture `tiny`."""

    def __call__(self, overlays: Sequence[str | Path], *flags: object, timeout: float = 900) -> Finished: ...


def bundle_words(configs: Sequence[str | Path], flags: Sequence[object], cwd: str | Path | None) -> list[str]:
    """What follows `python`, as `RunBundle` has it."""
    files = [str(config) if cwd is None else str(ROOT / config) for config in configs]
    return ["-m", "monai.bundle", "run", "--config_file", str(files), *map(str, flags)]


@pytest.fixture(scope="session")
def run_bundle() -> RunBundle:
    """`run_bundle(configs, *flags, cwd=None, timeout=900)` runs `python -m monai.bundle run` in a process of its own.

    `configs` are merged in their order; relative paths are taken from the repository's root, which is also
    the working directory unless `cwd` is given. Flags go to the command line one by one: `"--seed", 3`.
    The process is one of `processes.py`, which costs a tenth of a new interpreter.
    """

    def run(
        configs: Sequence[str | Path], *flags: object, cwd: str | Path | None = None, timeout: float = 900
    ) -> Finished:
        return run_python(*bundle_words(configs, flags, cwd), cwd=cwd or ROOT, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def run_command() -> RunBundle:
    """As `run_bundle`, in a new interpreter, as a shell starts it."""

    def run(
        configs: Sequence[str | Path], *flags: object, cwd: str | Path | None = None, timeout: float = 900
    ) -> Finished:
        return run_interpreter(*bundle_words(configs, flags, cwd), cwd=cwd or ROOT, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def run_here() -> RunHere:
    """`run_here(configs, **overrides)` runs the merged configs in this process and returns MONAI's workflow.

    It raises what the command line would show; `scripts.core.errors.find_bundle_error` finds the line in it. What a
    command's process does as it ends, a run that fails does here: it lets go of its folders.
    """
    from monai.bundle import create_workflow

    from scripts.compute.ownership import release_all

    def run(configs: Sequence[str | Path], **overrides: Any) -> Any:
        files = [str(ROOT / config) for config in configs]
        flags = {"bundle_root": str(ROOT), "device": "cpu", **overrides}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "parsing config_file")  # MONAI: whoever writes a config may run code
                workflow = create_workflow(config_file=files, workflow_type="inference", logging_file=False, **flags)
            workflow.run()
            workflow.finalize()
        except BaseException:
            release_all()
            raise
        return workflow

    return run


@pytest.fixture(scope="module")
def config() -> ConfigParser:
    """The base at tiny size."""
    from released import configuration

    return configuration()


@pytest.fixture(scope="module")
def conditions(config: ConfigParser) -> Conditions:
    """Those of the base."""
    return config.get_parsed_content("conditions")


@pytest.fixture(scope="module")
def grid(config: ConfigParser) -> Grid:
    """That of tiny volumes."""
    return config.get_parsed_content("grid")


@pytest.fixture(scope="session")
def bundle_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that links to this one's files, with tiny weights of the released format in its own `models/`."""
    from released import configuration, write_weights

    folder = tmp_path_factory.mktemp("bundle")
    (folder / "models").mkdir()
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    write_weights(folder / "models", configuration())
    return folder


def computed_once(folder: Path, compute: Callable[[Path], object]) -> Path:
    """A folder that the first of the tests' processes to ask for it has filled; the others wait for it."""
    complete = folder.with_suffix(".complete")
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            compute(folder)
            complete.touch()
    return folder


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of a run of the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def trained_folder(shared_dir: Path, run_here: RunHere) -> Path:
    """That of `trained.train_pipeline`. Tests must not change it."""
    from trained import train_pipeline

    return computed_once(shared_dir / "trained", lambda folder: train_pipeline(folder, run_here))


@pytest.fixture(scope="session")
def made_collection(shared_dir: Path, run_here: RunHere, bundle_copy: Path) -> Path:
    """A collection of five rows in two shards, with labels. Tests must not change it."""
    from collecting import draw, make

    def compute(folder: Path) -> None:
        draw(run_here, folder / "set")
        make(run_here, bundle_copy, folder / "set", labels=1)

    return computed_once(shared_dir / "collection", compute) / "set"


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """A folder for one test's output, not yet made."""
    return tmp_path / "output"


@pytest.fixture
def tiny(run_bundle: RunBundle, output_dir: Path) -> RunTiny:
    """`tiny(overlays, *flags)` runs the base with the overlays and, last, `tiny.yaml`; it writes to `output_dir`."""

    def run(overlays: Sequence[str | Path], *flags: object, timeout: float = 900) -> Finished:
        return run_bundle([BASE, *overlays, TINY], "--output_dir", output_dir, *flags, timeout=timeout)

    return run
