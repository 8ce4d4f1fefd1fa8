# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The web page's server: what it samples, and what becomes of hostile requests."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import html
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, RunHere

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from starlette.testclient import TestClient  # noqa: E402

from scripts.core.command_line import read_request  # noqa: E402
from scripts.core.errors import BundleError, find_bundle_error  # noqa: E402
from scripts.core.flags import read_flags  # noqa: E402
from scripts.core.tables import read_table  # noqa: E402
from scripts.core.verbs import BASE, SAMPLE, merge  # noqa: E402
from scripts.preparation.quality_page import write_page  # noqa: E402
from scripts.serving.application import STATIC, Site, make_application  # noqa: E402
from scripts.serving.gallery import Gallery, OpenedFolder  # noqa: E402
from scripts.serving.guard import LOOPBACK_NAMES, MOST_BYTES, check_token  # noqa: E402
from scripts.serving.jobs import MOST_WAITING  # noqa: E402
from scripts.serving.offered import OfferedModel, find_models  # noqa: E402
from scripts.serving.reports import find_reports  # noqa: E402
from scripts.serving.server import listening_socket  # noqa: E402
from scripts.serving.worker import StoppedError  # noqa: E402

HEAD = {"sex": "female", "age_years": 70, "ventricular_vol_mm3": 60000, "brain_vol_mm3": 1300000}
LOCAL = "http://127.0.0.1"
TOKEN = "correct horse battery"


class Held:
    """A runner whose commands do nothing until they are let go."""

    def __init__(self) -> None:
        self.ran: list[Sequence[str]] = []
        self.go, self.stopped = threading.Event(), threading.Event()

    def progress(self) -> tuple[int, int]:
        return (1, 2)

    async def run(self, words: Sequence[str]) -> None:
        self.ran.append(words)
        while not self.go.is_set():
            if self.stopped.is_set():
                self.stopped.clear()
                raise StoppedError("stopped")
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.go.set()


class InThread:
    """A runner whose commands run in a thread of this process."""

    def __init__(self, run_here: RunHere) -> None:
        self.run_here = run_here

    def progress(self) -> tuple[int, int]:
        return (0, 0)

    async def run(self, words: Sequence[str]) -> None:
        request = read_request(words[0], words[1:])
        flags = read_flags(request.flags)
        try:
            await asyncio.to_thread(self.run_here, request.files, **flags)
        except Exception as error:
            raise find_bundle_error(error) or error from error

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def model(bundle_copy: Path) -> OfferedModel:
    """The tiny networks."""
    return OfferedModel("tiny", ("--with", "tiny", "--bundle_root", str(bundle_copy)))


def make_site(model: OfferedModel, folder: Path, runner: Any) -> Site:
    return Site([model], Gallery(folder), OpenedFolder(None, "volumes_dir"), runner)


# What it samples.


@pytest.fixture(scope="module")
def client(model: OfferedModel, run_here: RunHere, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A page that samples in this process."""
    site = make_site(model, tmp_path_factory.mktemp("page"), InThread(run_here))
    with TestClient(make_application(site, LOOPBACK_NAMES), base_url=LOCAL) as client:
        yield client


def ask(client: TestClient, **more: Any) -> Any:
    asked = {"model": "tiny", "conditions": HEAD, "seed": 3, "sampler": "ddim", "num_inference_steps": 2, **more}
    return client.post("/api/samples", json=asked)


def finished(client: TestClient, number: int) -> dict[str, Any]:
    for _ in range(1200):
        job = next(job for job in client.get("/api/jobs").json() if job["number"] == number)
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.05)
    raise AssertionError("it takes too long")


@pytest.fixture(scope="module")
def entry(client: TestClient) -> dict[str, Any]:
    """A sample with its labels, in the gallery."""
    jobs = ask(client, labels=True).json()
    assert [finished(client, job["number"])["state"] for job in jobs] == ["done", "done"]
    (found,) = client.get("/api/gallery").json()
    assert found["name"] == jobs[0]["entry"]
    return found


def test_a_sample_is_the_commands_own(
    client: TestClient, entry: dict[str, Any], run_here: RunHere, tmp_path: Path
) -> None:
    """Of the command that the page shows, to the last voxel."""
    words = entry["command"].split()
    assert words[:4] == ["python", "-m", "scripts", SAMPLE] and "--output_dir" not in words
    request = read_request(SAMPLE, words[4:])
    run_here(request.files, **{**read_flags(request.flags), "output_dir": str(tmp_path / "own")})
    (own,) = (tmp_path / "own").glob("*.nii.gz")
    (tmp_path / "page.nii.gz").write_bytes(client.get(f"/gallery/{entry['name']}/volume.nii.gz").content)
    volumes: list[Any] = [nib.load(path) for path in (own, tmp_path / "page.nii.gz")]
    own_voxels, shown = (np.asarray(volume.dataobj) for volume in volumes)
    assert np.array_equal(own_voxels, shown) and np.array_equal(volumes[0].affine, volumes[1].affine)


def test_an_entry_says_what_it_is(client: TestClient, entry: dict[str, Any]) -> None:
    sidecar = client.get(f"/gallery/{entry['name']}/sidecar.json").json()
    assert {name: sidecar["conditions"][name] for name in HEAD} == {**HEAD, "age_years": 70.0}
    assert (entry["seed"], sidecar["num_inference_steps"]) == (3, 2)
    labels = gzip.decompress(client.get(f"/gallery/{entry['name']}/labels.nii.gz").content)
    assert len(labels) > 352
    assert entry["has_labels"] and set(entry["volumes"]) >= {"ventricular_vol_mm3", "brain_vol_mm3", "grey_mm3"}
    saved = client.get(f"/gallery/{entry['name']}/volume.nii.gz?save").headers["content-disposition"]
    assert "sample_seed-3_000000.nii.gz" in saved


def test_the_same_request_is_the_same_entry(client: TestClient, entry: dict[str, Any]) -> None:
    (job,) = ask(client).json()
    assert finished(client, job["number"])["state"] == "done" and job["entry"] == entry["name"]
    assert [one["name"] for one in client.get("/api/gallery").json()] == [entry["name"]]


def test_the_gallery_outlives_the_server(client: TestClient, entry: dict[str, Any], model: OfferedModel) -> None:
    application: Any = client.app
    folder = application.state.site.gallery.folder.parent
    with TestClient(make_application(make_site(model, folder, Held()), LOOPBACK_NAMES), base_url=LOCAL) as again:
        assert again.get("/api/gallery").json() == client.get("/api/gallery").json()


def test_units_and_ranges_are_those_of_the_configuration(client: TestClient) -> None:
    (about,) = client.get("/api/about").json()["models"]
    configured = {name: one for name, one in merge([BASE])["conditions"].items() if isinstance(one, dict)}
    for condition in about["conditions"]:
        own = configured[condition["name"]]
        assert [condition[key] for key in ("raw", "unit", "minimum", "maximum")] == [
            own[key] for key in ("raw", "unit", "minimum", "maximum")
        ]
        assert condition["low"] <= condition["minimum"] < condition["maximum"] <= condition["high"]
    assert list(about["samplers"]) == ["ddim", "ddpm", "dpm", "unipc"] and about["sampler"] == "ddim"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "large"}, "no model 'large'"),
    ({"model": ["tiny"]}, "no model"),
    ({"conditions": {**HEAD, "education": 3}}, "no condition 'education'"),
    ({"conditions": {"output_dir": "/tmp"}}, "no condition 'output_dir'"),
    ({"conditions": {"age_years": "old"}}, "--age_years must be a finite number"),
    ({"conditions": {"age_years": [70]}}, "--age_years must be a finite number"),
    ({"conditions": {"age_years": "$__import__('os').system('true')"}}, "--age_years must be a finite number"),
    ({"conditions": {"age_years": "1e999"}}, "--age_years must be a finite number"),
    ({"conditions": {"sex": "@device"}}, "--sex must be one of female, male"),
    ({"conditions": [70]}, "conditions must be a map"),
    ({"seed": -1}, "--seed must be at least 0"),
    ({"seed": 2**40}, "--seed must be at most"),
    ({"seed": "1 --output_dir /tmp"}, "--seed must be a whole number"),
    ({"sampler": "$exit()"}, "--sampler must be one of"),
    ({"sampler": "flow"}, "--sampler must be one of"),
    ({"sampler": ["ddim"]}, "--sampler must be one of"),
    ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
    ({"num_inference_steps": 10**6}, "more than the 1000 steps"),
    ({"output_dir": "/tmp"}, "unknown: output_dir"),
    ({"--bundle_root": "/"}, "unknown: --bundle_root"),
]


@pytest.mark.parametrize(("asked", "told"), REFUSED, ids=[str(asked)[:50] for asked, _ in REFUSED])
def test_what_no_command_would_take(asked: dict[str, Any], told: str, client: TestClient) -> None:
    answer = ask(client, **asked)
    assert answer.status_code == 400 and told in answer.json()["error"]


def test_a_command_that_fails_says_why(run_here: RunHere, bundle_copy: Path, tmp_path: Path) -> None:
    """Here its weights are taken away once the page is open."""
    weights = Path(shutil.copy(bundle_copy / "models" / "tiny_diffusion.pt", tmp_path))
    words = ("--with", "tiny", "--bundle_root", str(bundle_copy), "--diffusion_path", str(weights))
    site = make_site(OfferedModel("tiny", words), tmp_path / "page", InThread(run_here))
    weights.unlink()
    with TestClient(make_application(site, LOOPBACK_NAMES), base_url=LOCAL) as client:
        job = finished(client, ask(client).json()[0]["number"])
        assert job["state"] == "failed" and f"no weights of the diffusion at {weights}" in job["error"]
        assert client.get("/api/gallery").json() == []
        assert client.post(f"/api/samples/{job['entry']}/labels").status_code == 400


# Hostile requests, as bytes to a server that listens.


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gallery in it, and beside that what no request may read."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text("SECRET")
    entry = folder / "page" / "derivatives" / "0123456789ab" / "sample"
    entry.mkdir(parents=True)
    (entry / "sample_seed-1_000000.nii.gz").symlink_to(folder / "secret.txt")
    (entry / "sample_seed-1_000000.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def served(model: OfferedModel, secret: Path) -> Iterator[tuple[int, Site]]:
    """A listening server whose jobs wait, and its port."""
    site = make_site(model, secret / "page", Held())
    sock = listening_socket("127.0.0.1", 0)
    config = uvicorn.Config(
        make_application(site, LOOPBACK_NAMES), log_level="error", timeout_graceful_shutdown=1, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    yield sock.getsockname()[1], site
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def send(port: int, request: bytes, wait: float = 5.0) -> bytes:
    """What the server answers to these bytes, until it closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        try:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except OSError:
            return b""


def get(path: str, host: str = "127.0.0.1", *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def post(path: str, body: bytes, *headers: str, host: str = "127.0.0.1", kind: str = "application/json") -> bytes:
    return get(path, host, f"Content-Type: {kind}", *headers, method="POST", body=body)


GOOD = json.dumps({"model": "tiny", "seed": 1}).encode()
POST = b"POST /api/samples HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
DEEP = b"[" * 20000 + b"]" * 20000
PATHS = [
    "/static/../../../secret.txt",
    "/static/..%2f..%2f..%2fsecret.txt",
    "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/static//etc/passwd",
    "/static/..\\..\\secret.txt",
    "/static/%00",
    "/static/page.js%00.txt",
    "/../../etc/passwd",
    "/gallery/../secret.txt/volume.nii.gz",
    "/gallery/..%2f..%2fsecret/volume.nii.gz",
    "/gallery/%2e%2e/volume.nii.gz",
    "/gallery/0123456789ab/..%2f..%2f..%2fsecret.txt",
    "/gallery/0123456789ab/request.json",
    "/gallery/0123456789ab/volume.nii.gz",
    "/gallery/0123456789AB/sidecar.json",
    "/gallery/*/sidecar.json",
    "/gallery/0123456789ab%0a/sidecar.json",
    "/gallery/" + "a" * 5000 + "/volume.nii.gz",
    "/opened/0/secret.txt",
    "/opened/-1/x",
    "/opened/99999999999999999999999999/x",
    "/opened/0x0/x",
    "/opened/" + "9" * 5000 + "/x",
    "http://127.0.0.1@evil.example/etc/passwd",
    "/api/samples",
    "/%ff%fe",
    "/api/jobs/1/stop",
    "//evil.example/",
    "/style.css/../../secret.txt",
]
FOREIGN = [
    get("/api/about", "evil.example"),
    get("/", "127.0.0.1.evil.example"),
    get("/", "evil.example:80@127.0.0.1"),
    get("/", ""),
    get("/", "[::1"),
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    get("/api/gallery", "127.0.0.1", "Origin: http://evil.example"),
    get("/api/gallery", "127.0.0.1", "Origin: null"),
    get("/api/gallery", "127.0.0.1", "Origin: http://127.0.0.1:1"),
    get("/gallery/0123456789ab/sidecar.json", "127.0.0.1", "Sec-Fetch-Site: cross-site"),
    post("/api/samples", GOOD, "Origin: http://evil.example"),
    post("/api/samples", GOOD, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"),
    post("/api/jobs/1/stop", b"{}", "Origin: https://127.0.0.1.evil.example"),
]
BODIES = [
    post("/api/samples", GOOD, kind="text/plain"),
    post("/api/samples", GOOD, kind="application/x-www-form-urlencoded"),
    post("/api/samples", b""),
    post("/api/samples", b"{"),
    post("/api/samples", b"[]"),
    post("/api/samples", b'"tiny"'),
    post("/api/samples", b"\xff\xfe\x00"),
    post("/api/samples", DEEP),
    post("/api/samples", b'{"model": "tiny", "seed": NaN}'),
    post("/api/samples", b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}"),
    post("/api/samples", b" " * (MOST_BYTES + 1)),
    POST + b"Content-Length: 99999999999\r\n\r\n{",
    POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 40,
    POST + b"Content-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200000 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    b"BREW / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
]
HOSTILE = [*(get(path) for path in PATHS), *FOREIGN, *BODIES]


def test_hostile_requests(served: tuple[int, Site], secret: Path) -> None:
    """None is answered with success, none reads what lies outside, none writes, and none stops the server."""
    port, site = served
    before = sorted(secret.rglob("*"))
    assert len(HOSTILE) >= 50
    for request in HOSTILE:
        answer = send(port, request, 1)
        assert b"SECRET" not in answer and b"root:" not in answer, request[:200]
        status = answer.split(b" ")[1:2]
        assert not status or status[0][:1] in b"345", (request[:200], answer[:200])
        assert b"Traceback" not in answer
    assert sorted(secret.rglob("*")) == before and not site.jobs.unfinished()
    assert send(port, get("/")).startswith(b"HTTP/1.1 200")


def test_many_jobs_at_once(served: tuple[int, Site]) -> None:
    """As many as the queue takes; others are refused, and the server answers meanwhile."""
    port, site = served
    asked = [post("/api/samples", json.dumps({"model": "tiny", "seed": seed}).encode()) for seed in range(200)]
    statuses: list[bytes] = []

    def one(request: bytes) -> None:
        statuses.append(send(port, request, 20).split(b" ")[1])

    threads = [threading.Thread(target=one, args=(request,)) for request in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = statuses.count(b"202")
    assert MOST_WAITING <= accepted <= MOST_WAITING + 1 and statuses.count(b"503") == 200 - accepted
    assert len(site.jobs.unfinished()) == accepted
    assert len(list(site.gallery.folder.glob("*/request.json"))) == accepted, "nothing is written for the others"
    # Whoever asked may go away in the middle of it.
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(post("/api/samples", GOOD)[:-5])
    for job in site.jobs.about():
        send(port, post(f"/api/jobs/{job['number']}/stop", b"{}"))
    for _ in range(500):
        if not site.jobs.unfinished():
            break
        time.sleep(0.01)
    assert not site.jobs.unfinished() and {job["state"] for job in site.jobs.about()} == {"stopped"}
    assert send(port, get("/api/jobs")).startswith(b"HTTP/1.1 200")


# Reports.


def test_reports_show_their_volumes_and_nothing_else(model: OfferedModel, secret: Path, tmp_path: Path) -> None:
    dataset, volume = tmp_path / "dataset", tmp_path / "dataset" / "sub-1" / "sub-1_space-MNI152_T1w.nii.gz"
    (dataset / "figures").mkdir(parents=True)
    volume.parent.mkdir()
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), volume)  # type: ignore[no-untyped-call]
    (dataset / "participants.tsv").write_text(f"participant_id\tpath\nsub-1\t{volume.relative_to(dataset)}\n")
    (dataset / "figures" / "sub-1.jpg").write_bytes(b"picture")
    (dataset / "figures" / "link.jpg").symlink_to(secret / "secret.txt")
    write_page(dataset, read_table(dataset / "participants.tsv"))
    listed = html.escape(json.dumps([str(volume), str(secret / "secret.txt")]), quote=True)
    (tmp_path / "evaluation.html").write_text(f'<html><head></head><body><img data-volumes="{listed}"></body></html>')
    opened = OpenedFolder(dataset, "volumes_dir")
    site = Site([model], Gallery(tmp_path / "page"), opened, Held(), find_reports(opened, tmp_path))
    with TestClient(make_application(site, LOOPBACK_NAMES), base_url=LOCAL) as client:
        about = client.get("/api/about").json()
        assert [one["address"] for one in about["reports"]] == ["/reports/quality/", "/reports/evaluation/"]
        assert "report.js" in client.get("/reports/quality/").text
        assert client.get("/reports/quality/figures/sub-1.jpg").content == b"picture"
        same = ("/reports/quality/volume/sub-1", "/reports/evaluation/volume/0", "/opened/0/volume.nii.gz")
        assert {client.get(address).content for address in same} == {volume.read_bytes()}
        for address in (
            "/reports/quality/volume/sub-2",
            "/reports/quality/volume/..%2f..%2fsecret.txt",
            "/reports/quality/figures/link.jpg",
            "/reports/quality/figures/%2e%2e/participants.tsv",
            "/reports/quality/participants.tsv",
            "/reports/evaluation/volume/1",
            "/reports/evaluation/volume/-1",
            "/reports/nothing/",
        ):
            assert client.get(address).status_code == 404, address


def test_labels_of_a_sample_that_was_stopped_are_not_waited_for(model: OfferedModel, tmp_path: Path) -> None:
    site = make_site(model, tmp_path, Held())
    with TestClient(make_application(site, LOOPBACK_NAMES), base_url=LOCAL) as client:
        first, second = (job["number"] for job in ask(client, labels=True).json())
        assert client.post(f"/api/jobs/{first}/stop").status_code == 202
        assert [finished(client, number)["state"] for number in (first, second)] == ["stopped", "stopped"]


# The token, and where it listens.


def test_nothing_without_the_token(model: OfferedModel, tmp_path: Path) -> None:
    application = make_application(make_site(model, tmp_path, Held()), (), TOKEN)
    with TestClient(application, base_url="http://machine.example", follow_redirects=False) as client:
        for path in ("/", "/api/gallery", "/static/page.js", "/?token=wrong", "/?token="):
            assert client.get(path).status_code == 401
        assert client.get("/", headers={"Cookie": "token=%ff; \x01"}).status_code == 401
        entered = client.get("/", params={"token": TOKEN})
        assert entered.status_code == 303 and TOKEN not in entered.headers["location"]
        assert {"HttpOnly", "SameSite=strict"} <= set(entered.headers["set-cookie"].replace("; ", ";").split(";"))
        assert client.get("/api/gallery").status_code == 200
        assert client.get("/api/gallery", headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(("host", "token"), [("0.0.0.0", None), ("::", None), ("10.0.0.1", "short"), ("name", None)])
def test_other_machines_need_a_token(host: str, token: str | None) -> None:
    with pytest.raises(BundleError, match="--token"):
        check_token(host, token)
    check_token(host, TOKEN)


def test_a_port_that_is_taken() -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        with pytest.raises(BundleError, match="--port"):
            listening_socket("127.0.0.1", taken.getsockname()[1])


# Models, and what ships.


def test_models_that_are_there_are_offered(bundle_copy: Path, tmp_path: Path, trained_folder: Path) -> None:
    request = read_request(SAMPLE, ["--with", "tiny"])
    config = {**merge(request.files), "bundle_root": str(bundle_copy)}
    entries = {"small": ["--with", "demo"], "released": []}
    found = {one.name: one for one in find_models(config, entries, trained_folder, tmp_path)}
    assert list(found) == ["as given", "small", "runs/diffusion"]
    assert found["runs/diffusion"].weights()[1] == trained_folder / "diffusion" / "diffusion.pt"
    assert found["runs/diffusion"].config["network_def"] == merge(request.files)["network_def"]
    demo = find_models({**merge([BASE]), "bundle_root": str(ROOT)}, entries, tmp_path, tmp_path)
    assert [one.name for one in demo][0] == "small"


def test_a_generator_has_no_conditions_and_no_sampler() -> None:
    about = OfferedModel("gan", ("--with", "tiny", "--family", "lsgan")).about({})
    assert about["conditions"] == [] and about["samplers"] == {} and about["sampler"] is None


def test_the_viewer_is_the_one_that_its_record_states() -> None:
    record = (STATIC / "niivue.txt").read_text()
    assert hashlib.sha256((STATIC / "niivue.umd.js").read_bytes()).hexdigest() in record
    assert "BSD 2-Clause" in (STATIC / "niivue.LICENSE.txt").read_text()
