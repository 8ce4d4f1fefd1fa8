# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The page's addresses, and what each answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from scripts.core.cells import shown
from scripts.core.errors import BundleError
from scripts.core.files import parse_json
from scripts.core.options import checked_steps, whole_number
from scripts.core.pages import TEMPLATES
from scripts.core.verbs import SAMPLE
from scripts.measuring.segmenter import CODES
from scripts.serving.gallery import Gallery, OpenedFolder
from scripts.serving.guard import SAFE, Guard
from scripts.serving.jobs import BusyError, Job, Jobs
from scripts.serving.offered import OfferedModel
from scripts.serving.reports import ServedReport
from scripts.serving.worker import Runner

STATIC = Path(__file__).parent / "static"
STYLE = TEMPLATES / "style.css"
NO_CACHE = {"Cache-Control": "no-cache"}
OF_REPORTS = {
    **NO_CACHE,
    "Content-Security-Policy": SAFE["Content-Security-Policy"].replace(
        "script-src 'self'", "script-src 'self' 'unsafe-inline'"
    ),
}
"""Reports hold their scripts, since they are to open from a folder as well."""
ASKED = {"model", "conditions", "seed", "sampler", "num_inference_steps", "labels"}
MOST_SEED = 2**31 - 1
MOST_STEPS = 1000


class Site:
    """What the page is about: models, the gallery, an opened folder, and the queue.

    Args:
        models: that are offered.
        gallery: where samples go.
        opened: volumes that were there before.
        runner: runs the commands.
        reports: of other commands.
        given: values of options, conditions among them, that the page begins with.
    """

    def __init__(
        self,
        models: Sequence[OfferedModel],
        gallery: Gallery,
        opened: OpenedFolder,
        runner: Runner,
        reports: Iterable[ServedReport] = (),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.gallery, self.opened, self.given = gallery, opened, dict(given or {})
        self.reports = {report.name: report for report in reports}
        self.jobs = Jobs(runner)
        self.abouts = [model.about(self.given) for model in models]

    def about(self) -> dict[str, Any]:
        """What does not change while the page is open."""
        return {
            "models": self.abouts,
            "seed": self.given.get("seed"),
            "structures": [
                {"name": name, "title": name.replace("_", " "), "codes": sorted(set(codes))}
                for name, codes in CODES.items()
            ],
            "folder": None if self.opened.folder is None else str(self.opened.folder),
            "volumes": self.opened.names(),
            "files": [path.name for path in self.opened.paths],
            "reports": [{"title": one.title, "address": f"/reports/{one.name}/"} for one in self.reports.values()],
        }

    def ask(self, asked: Mapping[str, Any]) -> list[Job]:
        """Put what the page asks for into the queue: a sample, and then its labels, where they are wanted.

        Raises:
            BusyError: if too many jobs wait.
            BundleError: for what no command would take, in its words.
        """
        if unknown := asked.keys() - ASKED:
            raise BundleError(f"unknown: {', '.join(map(shown, sorted(unknown)))}")
        model = self.models.get(str(asked.get("model")))
        if model is None:
            raise BundleError(f"there is no model '{shown(asked.get('model'))}'")
        request, labels = _checked(model, asked), asked.get("labels") is True
        self.jobs.check_room(1 + labels)  # before anything is written for it
        words = [SAMPLE, *model.words, *(word for n, v in request.items() for word in (f"--{n}", str(v)))]
        entry, complete = self.gallery.add({"model": model.name, **request}, words)
        jobs = [self.jobs.submit(Job(SAMPLE, entry, complete))]
        return [*jobs, self.label(entry, check=False)] if labels else jobs

    def label(self, entry: str, check: bool = True) -> Job:
        """Put the segmentation of an entry into the queue.

        Raises:
            BundleError: if `check` finds no such volume, or too many jobs wait.
        """
        words = self.gallery.labelling(entry, check)
        return self.jobs.submit(Job("segment", entry, words))


def _checked(model: OfferedModel, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `sample` that a request comes to, each as the command would take it."""
    conditions = asked.get("conditions", {})
    if not isinstance(conditions, Mapping):
        raise BundleError("conditions must be a map")
    known = {condition.raw: condition for condition in model.conditions}
    for name, value in conditions.items():
        if name not in known:
            raise BundleError(f"the model {model.name} has no condition '{shown(name)}'")
        known[name].parse(name, value)
    found: dict[str, Any] = {raw: conditions[raw] for raw in known if raw in conditions}
    found["seed"] = whole_number(asked.get("seed", 0), "seed")
    if found["seed"] > MOST_SEED:
        raise BundleError(f"--seed must be at most {MOST_SEED}")
    if (sampler := asked.get("sampler")) is not None:
        if not isinstance(sampler, str) or sampler not in model.samplers:
            raise BundleError(f"--sampler must be one of {', '.join(model.samplers)}, got '{shown(sampler)}'")
        found["sampler"] = sampler
    if (steps := asked.get("num_inference_steps")) is not None:
        found["num_inference_steps"] = checked_steps(steps, MOST_STEPS)
    return found


def make_application(site: Site, hosts: tuple[str, ...] = (), token: str | None = None) -> Starlette:
    """The web application.

    Args:
        site: what it shows.
        hosts, token: see `scripts.serving.guard.Guard`.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(site.jobs.work())
        try:
            yield
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            await run_in_threadpool(site.jobs.runner.close)

    application = Starlette(
        routes=[
            Route("/", _page),
            Route("/style.css", _style),
            Route("/api/about", _reading(lambda request: site.about())),
            Route("/api/gallery", _reading(lambda request: site.gallery.entries())),
            Route("/api/jobs", _jobs(site)),
            Route("/api/samples", _asking(site), methods=["POST"]),
            Route("/api/samples/{entry}/labels", _labelling(site), methods=["POST"]),
            Route("/api/jobs/{number:int}/stop", _stopping(site), methods=["POST"]),
            Route("/gallery/{entry}/{file}", _of_gallery(site)),
            Route("/opened/{number:int}/{file}", _opened(site)),
            Mount("/static", StaticFiles(directory=STATIC)),
            *(route for report in site.reports.values() for route in _report(report)),
        ],
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={BundleError: _refused, BusyError: _refused},
        lifespan=lifespan,
    )
    application.state.site = site
    return application


Answer = Callable[[Request], Any]


async def _refused(request: Request, error: Exception) -> Response:
    status = 503 if isinstance(error, BusyError) else 404 if request.method == "GET" else 400
    return JSONResponse({"error": str(error)}, status_code=status)


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", headers=NO_CACHE)


async def _style(request: Request) -> Response:
    return FileResponse(STYLE, headers=NO_CACHE)


def _reading(answer: Answer) -> Answer:
    """What is read from files, or may take a moment: beside the loop that answers others."""

    async def respond(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(answer, request), headers=NO_CACHE)

    return respond


def _jobs(site: Site) -> Answer:
    async def respond(request: Request) -> Response:
        return JSONResponse(site.jobs.about(), headers=NO_CACHE)

    return respond


def _asking(site: Site) -> Answer:
    async def respond(request: Request) -> Response:
        return JSONResponse([job.about() for job in site.ask(await _body(request))], status_code=202)

    return respond


def _labelling(site: Site) -> Answer:
    async def respond(request: Request) -> Response:
        return JSONResponse(site.label(request.path_params["entry"]).about(), status_code=202)

    return respond


def _stopping(site: Site) -> Answer:
    async def respond(request: Request) -> Response:
        if not site.jobs.stop(request.path_params["number"]):
            raise HTTPException(404)
        return JSONResponse({}, status_code=202)

    return respond


def _of_gallery(site: Site) -> Answer:
    async def respond(request: Request) -> Response:
        entry, file = (request.path_params[name] for name in ("entry", "file"))
        path = await run_in_threadpool(site.gallery.path, entry, file)
        return FileResponse(path, filename=path.name if "save" in request.query_params else None, headers=NO_CACHE)

    return respond


def _opened(site: Site) -> Answer:
    async def respond(request: Request) -> Response:
        path = await run_in_threadpool(site.opened.path, request.path_params["number"])
        return FileResponse(path, media_type="application/octet-stream", headers=NO_CACHE)

    return respond


def _report(report: ServedReport) -> list[BaseRoute]:
    """The addresses of a report: its page, its pictures, and the volumes behind them."""

    async def page(request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(report.content), headers=OF_REPORTS)

    async def volume(request: Request) -> Response:
        path = await run_in_threadpool(report.volume, request.path_params["key"])
        headers = {**NO_CACHE, "X-File": quote(path.name)}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    own = f"/reports/{report.name}"
    figures = StaticFiles(directory=report.figures, check_dir=False)
    return [
        Route(f"{own}/", page),
        Route(f"{own}/volume/{{key}}", volume),
        Mount(f"{own}/{report.figures.name}", figures),
    ]


async def _body(request: Request) -> Mapping[str, Any]:
    """The map in a request's body.

    Raises:
        BundleError: if it is none.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise BundleError("a request is JSON, and says so")
    try:
        content = parse_json((await request.body()).decode("utf-8"))
    except (ValueError, json.JSONDecodeError) as error:
        raise BundleError("the request is no JSON") from error
    if not isinstance(content, Mapping):
        raise BundleError("the request is no map")
    return content
