# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The verb `weights`, against a server on this machine that does what servers and networks do wrong."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from scripts.core.errors import BundleError
from scripts.tools import released_weights
from scripts.tools.released_weights import LargeFile, fetch, large_files, urls

CONTENT = np.random.default_rng(0).bytes(300_000)
FILE = LargeFile("models/model.pt", "x", hashlib.md5(CONTENT).hexdigest())
FLIPPED = CONTENT[:1000] + bytes([CONTENT[1000] ^ 1]) + CONTENT[1001:]


class Handler(BaseHTTPRequestHandler):
    """Serves `CONTENT` in the way that stands in the server's `fault`, and notes each request's range."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:  # noqa: N802, as http.server calls it
        server: Any = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        FAULTS[server.fault](self, int(asked[6:-1]) if asked else 0, len(server.asked))

    def answer(
        self,
        start: int,
        body: bytes | None = None,
        length: int | None = None,
        status: int = 0,
        begins: int | None = None,
    ) -> None:
        """The content from `start`, or what is given in its place."""
        body = CONTENT[start:] if body is None else body
        self.send_response(status or (206 if start else 200))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if start:
            self.send_header("Content-Range", f"bytes {start if begins is None else begins}-{len(CONTENT)}/*")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def breaks_off(self: Handler, start: int, count: int) -> None:
    self.answer(start, CONTENT[start : start + 100_000], len(CONTENT) - start)


def breaks_off_without_ranges(self: Handler, start: int, count: int) -> None:
    self.answer(0, CONTENT[: 100_000 * count], len(CONTENT))


def says_too_much(self: Handler, start: int, count: int) -> None:
    self.answer(start, length=2 * len(CONTENT))


def says_too_little(self: Handler, start: int, count: int) -> None:
    self.answer(start, length=min(150_000, len(CONTENT) - start))


def sends_a_page(self: Handler, start: int, count: int) -> None:
    self.answer(0, b"<!DOCTYPE html><title>Quota exceeded</title>")


def is_not_there(self: Handler, start: int, count: int) -> None:
    self.send_error(404)


def fails_twice(self: Handler, start: int, count: int) -> None:
    self.answer(start) if count > 2 else self.send_error(503)


def has_another_file(self: Handler, start: int, count: int) -> None:
    self.send_error(416) if start else self.answer(0, FLIPPED)


def sends_another_part(self: Handler, start: int, count: int) -> None:
    self.answer(start, begins=7) if start else self.answer(0, CONTENT[:5000], len(CONTENT))


def stalls(self: Handler, start: int, count: int) -> None:
    if count > 1:
        self.answer(start)
        return
    self.send_response(200)
    self.send_header("Content-Length", str(len(CONTENT)))
    self.end_headers()
    self.wfile.write(CONTENT[:5000])
    self.wfile.flush()
    time.sleep(1.0)


FAULTS: dict[str, Callable[[Handler, int, int], None]] = {
    one.__name__: one
    for one in (
        *(breaks_off, breaks_off_without_ranges, says_too_much, says_too_little, sends_a_page),
        *(is_not_there, fails_twice, has_another_file, sends_another_part, stalls),
    )
}
ENDS_WELL = {
    *("breaks_off", "breaks_off_without_ranges", "says_too_much", "says_too_little", "fails_twice", "stalls"),
}
REFUSED = {
    "sends_a_page": "a web page came in place of the file",
    "is_not_there": "the server answers 404",
    "has_another_file": "it is another file than the one that was released",
    "sends_another_part": "the server sends another part of the file",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(released_weights, "PAUSE_S", 0.0)
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked, found.url = [], f"http://127.0.0.1:{found.server_address[1]}"
    Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_servers_do(fault: str, server: Any, tmp_path: Path) -> None:
    server.fault = fault
    assert (fault in ENDS_WELL) is not (fault in REFUSED)
    if fault in ENDS_WELL:
        assert fetch(FILE, tmp_path, server.url, 0.3).read_bytes() == CONTENT
        assert len(server.asked) < 7 and [path.name for path in (tmp_path / "models").iterdir()] == ["model.pt"]
    else:
        with pytest.raises(BundleError, match=REFUSED[fault]) as caught:
            fetch(FILE, tmp_path, server.url, 0.3)
        assert "\n" not in str(caught.value) and str(tmp_path / "models" / "model.pt") in str(caught.value)
        assert not (tmp_path / "models" / "model.pt").exists()


def test_the_next_command_goes_on_and_a_damaged_file_is_fetched_anew(server: Any, tmp_path: Path) -> None:
    server.fault = "says_too_much"
    (tmp_path / "models").mkdir()
    part = tmp_path / "models" / ".model.pt.part"
    part.write_bytes(CONTENT[:250_000])
    assert fetch(FILE, tmp_path, server.url).read_bytes() == CONTENT and server.asked == ["bytes=250000-"]
    assert fetch(FILE, tmp_path, server.url).read_bytes() == CONTENT and len(server.asked) == 1  # it is there
    (tmp_path / "models" / "model.pt").write_bytes(FLIPPED)
    part.write_bytes(FLIPPED[:2000])  # of another file: what follows does not fit
    assert fetch(FILE, tmp_path, server.url).read_bytes() == CONTENT


def test_without_a_network_it_is_one_line_and_the_second_place_is_tried(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = "http://127.0.0.1:9/{path}"
    monkeypatch.setattr(released_weights, "SOURCES", {"huggingface": gone, "google": gone})
    with pytest.raises(BundleError, match=r"huggingface: no answer.*google: no answer.*elsewhere and put it at"):
        fetch(FILE, tmp_path)
    server.fault = "says_too_much"
    monkeypatch.setattr(released_weights, "SOURCES", {"huggingface": gone, "google": server.url + "/{path}"})
    assert fetch(FILE, tmp_path).read_bytes() == CONTENT


def test_sources() -> None:
    for file in large_files():
        found = urls(file, "auto")
        assert list(found) == ["huggingface", "google"] and file.drive and file.drive in found["google"]
        assert found["huggingface"].endswith(f"/resolve/main/{file.path}") and len(file.md5) == 32
    with pytest.raises(BundleError, match="--source must be auto, huggingface, google or an address, got 'hub'"):
        urls(FILE, "hub")
