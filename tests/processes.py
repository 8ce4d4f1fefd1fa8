# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""`python -m ...` and `python -c ...` in processes that need not import torch and MONAI first.

Each is forked from one server, a process that has imported the libraries and nothing of this project. Exit code,
output, folder and environment are as those of a new interpreter; the seconds of importing are paid once.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIBRARIES = ["monai.bundle", "monai.engines", "monai.networks.nets", "ignite.handlers", "nibabel", "scipy.ndimage"]
LIBRARIES += ["generative.networks.nets", "matplotlib.pyplot", "skimage.metrics", "torch.utils.tensorboard"]


class Finished(NamedTuple):
    """What a finished command left: exit code and texts."""

    returncode: int
    stdout: str
    stderr: str


def run_python(*arguments: object, cwd: str | Path = ROOT, timeout: float = 900) -> Finished:
    """`python -m module ...`, `python -c code ...` or `python script ...` in the folder `cwd`.

    Raises:
        subprocess.TimeoutExpired: if it took longer than `timeout` seconds; it has been ended then.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return run_interpreter(*arguments, cwd=cwd, timeout=timeout)
    with Command(arguments, cwd) as command:
        return command.finish(timeout)


def run_ranks(number: int, *arguments: object, timeout: float = 900) -> list[Finished]:
    """The same command in `number` processes that find each other by the environment, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    with ExitStack() as stack:
        ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
        commands = [stack.enter_context(Command(arguments, ROOT, rank)) for rank in ranks]
        return [command.finish(timeout) for command in commands]


def run_interpreter(*arguments: object, cwd: str | Path = ROOT, timeout: float = 900) -> Finished:
    """As `run_python`, in a new interpreter."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    return Finished(done.returncode, done.stdout, done.stderr)


class Command(AbstractContextManager):
    """A process of the server's, which ends with the context if not before."""

    def __init__(
        self, arguments: Sequence[object], cwd: str | Path = ROOT, environment: Mapping[str, object] | None = None
    ) -> None:
        self.words = [str(argument) for argument in arguments]
        self.texts = tempfile.TemporaryDirectory()
        self.paths = [Path(self.texts.name, name) for name in ("stdout", "stderr")]
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(LIBRARIES)  # heeded when the server starts, with the first process
        complete = {**os.environ, **{name: str(value) for name, value in (environment or {}).items()}}
        self.process = server.Process(target=_run, args=(self.words, str(Path(cwd).resolve()), complete, self.paths))
        self.process.start()

    def finish(self, timeout: float) -> Finished:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self.paths)
        return Finished(self.process.exitcode, out, err)

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self.process.kill()
        self.process.join()

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.texts.cleanup()


def _run(words: Sequence[str], folder: str, environment: Mapping[str, str], texts: Sequence[Path]) -> None:
    """What the interpreter does with its command line."""
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [folder, *added, *(path for path in sys.path if Path(path).resolve() not in (HERE, ROOT))]
    sys.argv[:] = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which an interpreter does, and a process of multiprocessing does not
