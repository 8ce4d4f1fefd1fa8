# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The web page in a browser, as a person uses it: `serve` with tiny networks, and Chromium."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Command

pytest.importorskip("starlette")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium"),
]
DRAWN = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
"""WebGL by the processor, as a machine without a graphics card has it."""
PATIENCE = 180_000


class Serving:
    """A page that is served by its command, and its address."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        flags = ["--with", "tiny", "--bundle_root", bundle, "--output_dir", folder, "--port", 0]
        self.command = Command(["-m", "scripts", "serve", *flags])
        self.address = self._address()

    def _address(self) -> str:
        for _ in range(1200):
            said = self.command.paths[0].read_text() if self.command.paths[0].exists() else ""
            if found := re.search(r"http://\S+", said):
                return found[0]
            assert self.command.process.is_alive(), self.command.paths[1].read_text()
            time.sleep(0.1)
        raise AssertionError("it does not start")

    def interrupt(self) -> int | None:
        """End it as Ctrl-C does; its exit code."""
        os.kill(self.command.process.pid or 0, signal.SIGINT)
        self.command.process.join(60)
        return self.command.process.exitcode


@pytest.fixture(scope="module")
def serving(bundle_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    made = Serving(bundle_copy, tmp_path_factory.mktemp("page"))
    with made.command:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=DRAWN)
        yield browser
        browser.close()


class Tab:
    """A tab with the page, and all that went wrong in it."""

    def __init__(self, browser: Any, address: str, width: int = 1400) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(PATIENCE)
        self.address, self.wrong = address, list[str]()
        self.page.on(
            "console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._watch(request.url))
        self.open()

    def _watch(self, url: str) -> None:
        if not url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"asked {url}")

    def open(self, behind: str = "") -> None:
        self.page.goto(self.address + behind)
        self.page.wait_for_selector("body[data-ready=yes]")

    def ask(self, age: int, button: str = "#sample", steps: int = 2) -> None:
        if not self.page.is_visible("#steps"):
            self.page.click("#sampling summary")
        self.page.fill("#steps", str(steps))
        self.page.fill("#age_years", str(age))
        self.page.click(button)

    def see(self, age: int) -> None:
        """Wait until a head of that age is drawn."""
        self.page.wait_for_selector(f"canvas[data-shown*='{age} years']")

    def idle(self) -> None:
        self.page.wait_for_selector("#jobs li", state="detached")


@pytest.fixture
def tab(browser: Any, serving: Serving) -> Iterator[Tab]:
    """A tab in which nothing may go wrong."""
    made = Tab(browser, serving.address)
    yield made
    assert made.wrong == []
    made.page.close()


def test_two_heads_are_compared_and_taken_away(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    tab.ask(80)
    tab.see(80)
    tab.ask(45, "#sample-beside")
    tab.see(45)
    tab.idle()
    assert page.locator("#gallery li").count() == 2 and page.locator(".viewer:visible").count() == 2
    page.click("#difference")
    page.wait_for_selector("canvas[data-shown*='right minus left']")
    page.click("#labels")
    page.wait_for_selector("#legend li:has-text('mL')")
    assert "measured" in page.inner_text("#details") and "--age_years 80" in page.inner_text("#details")
    places = page.locator(".viewer:visible footer")
    before = places.first.inner_text()
    page.locator("canvas").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+PageUp")
    page.wait_for_timeout(300)
    assert places.first.inner_text() != before
    where = [places.nth(n).inner_text().split(";")[0] for n in range(2)]
    assert where[0] == where[1], "the crosshairs are not linked"
    with page.expect_download() as download:
        page.locator("#details a", has_text="NIfTI").first.click()
    saved = tmp_path / "head.nii.gz"
    download.value.save_as(saved)
    assert download.value.suggested_filename == "sample_seed-1_000000.nii.gz"
    assert gzip.decompress(saved.read_bytes())[344:347] == b"n+1"
    tab.page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    tab.see(80)
    tab.see(45)


def test_a_slider_moves_by_keys_and_says_where_training_ends(tab: Tab) -> None:
    page = tab.page
    slider = page.locator("input[type=range][name=age_years]")
    slider.focus()
    age = float(page.input_value("#age_years"))
    page.keyboard.press("ArrowRight")
    assert float(page.input_value("#age_years")) == age + 1
    page.keyboard.press("End")
    assert "beyond" in page.inner_text(".field:has(#age_years) p")
    page.keyboard.press("Home")
    page.fill("#age_years", "60")
    assert "beyond" not in page.inner_text(".field:has(#age_years) p") and slider.input_value() == "60"


def test_by_keyboard_alone(tab: Tab) -> None:
    page = tab.page
    page.fill("#seed", "7")
    page.fill("#age_years", "51")
    seen = list[str]()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))
        if seen[-1] == "sample":
            break
    assert seen[-1] == "sample", seen
    page.keyboard.press("Enter")
    page.wait_for_selector("#jobs li")
    tab.see(51)
    tab.idle()
    wanted = {"view", "labels", "opacity", "View"}
    for _ in range(60):
        page.keyboard.press("Tab")
        wanted.discard(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))
    assert not wanted


def test_a_strip_fills_and_another_tab_sees_it_come(tab: Tab, browser: Any, serving: Serving) -> None:
    other = Tab(browser, serving.address)
    tab.ask(66)
    tab.see(66)
    tab.page.click("#strip-settings summary")
    tab.page.fill("#strip-count", "3")
    tab.page.select_option("#strip-condition", "ventricular_vol_mm3")
    tab.page.click("#sample-strip")
    for count in (1, 2, 3):
        tab.page.wait_for_selector(f"#strip img >> nth={count - 1}")
    tab.page.click("#strip button >> nth=2")
    tab.page.wait_for_selector("canvas[data-shown*='ventricular 171 mL']")
    other.page.wait_for_selector("#gallery li:has-text('ventricular 171 mL')")
    assert other.wrong == []
    other.page.close()


def test_stopping_and_what_is_refused(tab: Tab) -> None:
    page = tab.page
    tab.ask(70, steps=1000)
    page.wait_for_selector("#jobs:has-text('step ')")
    page.click("#jobs li.running button")
    page.wait_for_selector("#status:has-text('stopped')", state="attached")
    tab.idle()
    tab.ask(71)  # in a process that has begun anew
    tab.see(71)
    tab.idle()


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_wider_than_the_window(width: int, browser: Any, serving: Serving) -> None:
    made = Tab(browser, serving.address, width)
    made.page.wait_for_selector("#gallery li")
    assert made.page.evaluate("() => document.documentElement.scrollWidth") <= width
    for side in made.page.locator("main > *:visible").all():
        assert (side.bounding_box() or {})["width"] <= width
    assert made.wrong == []
    made.page.close()


def test_it_ends_by_ctrl_c(bundle_copy: Path, tmp_path: Path) -> None:
    made = Serving(bundle_copy, tmp_path / "page")
    with made.command:
        assert made.interrupt() == 0
        assert "Traceback" not in made.command.paths[1].read_text()
    assert not (tmp_path / "page" / ".lock").exists()
