# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `serve`: listens until Ctrl-C."""

from __future__ import annotations

import logging
import socket
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from scripts.core.config import current_config
from scripts.core.errors import BundleError
from scripts.core.options import whole_number, yes_or_no
from scripts.core.verbs import condition_flags

logger = logging.getLogger(__name__)

MISSING = "the page needs Starlette and uvicorn, which are not installed: pip install starlette uvicorn"
PATIENCE = 2
"""Seconds that open connections have as the server ends."""


class PageServer:
    """The local page.

    Args:
        output_dir: of the gallery.
        host, port: where to listen; port 0 takes a free one.
        open_browser: whether to open the page.
        token: what has to be known to open it; required where other machines can reach it.
        volumes_dir: a folder of volumes to look at, beside what is sampled; None takes `dataset_dir`, where it is.
        dataset_dir: a prepared dataset.
        evaluation_dir: of an evaluation, whose report is shown where it is.
        models: name -> words of `sample` that choose a model.
        runs_dir: the folder of the trainings.
        bundle_root: where `evaluation` and `runs` are looked for that are not given.
        uses: what of the configuration its commands use; for the check of flags.

    Raises:
        BundleError: if the server's packages are missing, or a flag is bad.
    """

    def __init__(
        self,
        output_dir: str,
        host: str = "127.0.0.1",
        port: Any = 8765,
        open_browser: Any = False,
        token: str | None = None,
        volumes_dir: str | None = None,
        dataset_dir: str = "dataset",
        evaluation_dir: str | None = None,
        models: Mapping[str, Sequence[str]] | None = None,
        runs_dir: str | None = None,
        bundle_root: str = ".",
        uses: str = "",
    ) -> None:
        try:
            from scripts.serving.guard import check_token
        except ModuleNotFoundError as error:
            raise BundleError(f"{MISSING} ({error.name})") from error
        check_token(str(host), token)
        self.host, self.port, self.token = str(host), whole_number(port, "port"), token
        self.open_browser = yes_or_no(open_browser, "open")
        self.folder, self.entries = Path(output_dir), dict(models or {})
        self.runs = _given_folder(runs_dir, "runs_dir", Path(bundle_root) / "runs")
        self.volumes = _volumes(volumes_dir, dataset_dir)
        self.evaluation = _given_folder(evaluation_dir, "evaluation_dir", Path(bundle_root) / "evaluation")
        self.config = {name: value for name, value in current_config().items()}

    def serve(self) -> None:
        """Listen until the process is asked to end.

        Raises:
            BundleError: if there is no model, or the port is taken.
        """
        import uvicorn

        from scripts.serving.application import Site, make_application
        from scripts.serving.gallery import Gallery, OpenedFolder
        from scripts.serving.guard import LOOPBACK_NAMES
        from scripts.serving.offered import find_models
        from scripts.serving.reports import find_reports
        from scripts.serving.worker import WorkerProcess

        models = find_models(self.config, self.entries, self.runs, self.folder / "models")
        if not models:
            raise BundleError("there are no weights to sample with: see docs/page.md, or give --with demo")
        opened = OpenedFolder(self.volumes, "volumes_dir")
        with closing(listening_socket(self.host, self.port)) as listening:
            reports = find_reports(opened, self.evaluation)
            site = Site(models, Gallery(self.folder), opened, WorkerProcess(), reports, self._given())
            application = make_application(site, () if self.token else LOOPBACK_NAMES, self.token)
            settings = uvicorn.Config(
                application,
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=256,
                timeout_graceful_shutdown=PATIENCE,
            )
            self._say(listening.getsockname()[1])
            with suppress(KeyboardInterrupt):
                uvicorn.Server(settings).run(sockets=[listening])

    def _given(self) -> dict[str, Any]:
        names = [*condition_flags(self.config), "sampler", "seed"]
        plain = {name: self.config.get(name) for name in names}
        return {name: value for name, value in plain.items() if value is not None and not isinstance(value, dict)}

    def _say(self, port: int) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")
        print(f"{address}   (Ctrl-C ends it)", flush=True)
        if self.open_browser:
            webbrowser.open(address)


def _volumes(volumes_dir: str | None, dataset_dir: str) -> Path | None:
    if volumes_dir is not None:
        return Path(str(volumes_dir))
    return Path(dataset_dir) if (Path(dataset_dir) / "participants.tsv").is_file() else None


def _given_folder(path: str | None, flag: str, default: Path) -> Path:
    """The folder that was given, which has to be there, or the default, which may be."""
    if path is None:
        return default
    if not Path(str(path)).is_dir():
        raise BundleError(f"--{flag}: there is no folder {path}")
    return Path(str(path))


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        BundleError: if the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()
    except (OSError, OverflowError) as error:
        made.close()
        raise BundleError(f"cannot listen on --host {host} --port {port}: {error}") from error
    return made
