"""The live page in a real browser: it keeps up with the run, and leaves the reader alone meanwhile.

Without Chromium in the PATH this module has no tests; `make test` says so.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, Tab
from pages import serving

from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.report.charts import Chart
from sharpscope.report.html import render

__test__ = CHROMIUM is not None
PATIENCE = 20.0  # seconds; the page asks every two


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    tab = Tab(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


def charts_of(directory: Path) -> str | None:
    """A page with three charts of the rows so far."""
    history = History(RunLog(directory, "training").rows)
    runs = ("training", "other")
    charts = [Chart(name, name, x="step", y=name, runs=runs) for name in ("loss", "sharpness", "radius")]
    facts: dict[str, object] = {"rows": len(history)}
    given: dict[str, Any] = {"charts": charts, "columns": history.columns, "environment": facts}
    return render(title="A run", subtitle="", lead="", config=facts, **given) if len(history) else None


def add_rows(log: RunLog, count: int) -> None:
    for step in range(len(log.rows), len(log.rows) + count):
        for run in ("training", "other"):
            row = {"run": run, "step": step, "loss": 1 / (1 + step), "sharpness": step + len(run), "radius": 1.0}
            with log.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path, "training")


SAID = "document.querySelector('#watch span')?.textContent"
ROWS = "document.readyState === 'complete' ? document.querySelector('#configuration td')?.textContent : undefined"
OFFER = "document.querySelector('#watch button')?.hidden === false"
MARK = "window.mark = true"
SAME = "window.mark === true"


def until(tab: Tab, expression: str, value: Any) -> None:
    end = time.monotonic() + PATIENCE
    while (seen := tab.js(expression)) != value:
        assert time.monotonic() < end, f"{expression} is {seen!r}, not {value!r}"
        time.sleep(0.05)


def zoom(tab: Tab) -> None:
    x, y, width, height = tab.js(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('.u-over').getBoundingClientRect())"
    )
    tab.mouse("mousePressed", x + 0.3 * width, y + 0.2 * height, 1)
    tab.mouse("mouseMoved", x + 0.6 * width, y + 0.6 * height, 1)
    tab.mouse("mouseReleased", x + 0.6 * width, y + 0.6 * height, 1)
    tab.settle()


def test_the_page_keeps_up_with_the_run(tab: Tab, log: RunLog) -> None:
    with serving(log.path.parent, charts_of, lambda _: log.finished) as port:
        tab.open(f"http://127.0.0.1:{port}/")
        until(tab, SAID, "waiting")
        assert tab.js("document.querySelector('h1').textContent") == "Waiting for the first measurement"
        add_rows(log, 10)
        until(tab, ROWS, "20")
        until(tab, SAID, "running")
        tab.js(MARK)
        add_rows(log, 1)
        until(tab, ROWS, "22")
        assert not tab.js(SAME)
        log.finish()
        until(tab, SAID, "finished")
        assert tab.complaints() == []
        assert {url.removeprefix(f"http://127.0.0.1:{port}") for url in tab.requests()} <= {"/", "/version"}
    until(tab, SAID, "no longer served")


def test_nothing_moves_while_nothing_changes(tab: Tab, log: RunLog) -> None:
    add_rows(log, 10)
    with serving(log.path.parent, charts_of) as port:
        tab.open(f"http://127.0.0.1:{port}/")
        until(tab, SAID, "running")
        tab.js(MARK)
        tab.js("scrollTo({top: 300, behavior: 'instant'})")
        asked = len(tab.requests())
        os.utime(log.path)  # touched, with the same rows
        while len(tab.requests()) < asked + 2:
            tab.settle()
        assert tab.js(SAME) and tab.js("scrollY") == 300
        before = time.time() - 100
        os.utime(log.path, (before, before))
        until(tab, f"{SAID}.replace(/\\d+/, 'N')", "no news for N s")
        assert tab.js(SAME) and tab.complaints() == []


def test_the_reader_keeps_place_folds_and_hidden_runs(tab: Tab, log: RunLog) -> None:
    add_rows(log, 10)
    with serving(log.path.parent, charts_of) as port:
        tab.open(f"http://127.0.0.1:{port}/")
        until(tab, SAID, "running")
        tab.js("document.querySelector('#chart-sharpness details').open = true")
        tab.js("document.querySelectorAll('#chart-sharpness .legend button')[1].click()")
        tab.js("scrollTo({top: 400, behavior: 'instant'})")
        tab.js(MARK)
        add_rows(log, 1)
        until(tab, ROWS, "22")
        assert not tab.js(SAME)
        until(tab, "scrollY", 400)
        assert tab.js("[...document.querySelectorAll('figure details')].map(d => d.open)") == [False, True, False]
        pressed = "[...document.querySelectorAll('.legend button')].map(b => b.getAttribute('aria-pressed') === 'true')"
        assert tab.js(pressed) == [True, True, True, False, True, True]
        tab.open(f"http://127.0.0.1:{port}/")  # by the reader: from the start
        assert tab.js(pressed) == [True] * 6


def test_a_zoomed_reader_is_asked_first(tab: Tab, log: RunLog) -> None:
    add_rows(log, 30)
    with serving(log.path.parent, charts_of) as port:
        tab.open(f"http://127.0.0.1:{port}/")
        until(tab, SAID, "running")
        zoom(tab)
        assert not tab.js("document.querySelector('.axis button').hidden")
        tab.js(MARK)
        add_rows(log, 1)
        until(tab, OFFER, True)
        assert tab.js(SAME) and tab.js(ROWS) == "60"
        tab.js("document.querySelector('#watch button').click()")
        until(tab, ROWS, "62")
        zoom(tab)
        add_rows(log, 1)
        until(tab, OFFER, True)
        tab.js("document.querySelector('.axis button').click()")  # the whole range again: nothing is lost any more
        until(tab, ROWS, "64")
        assert tab.complaints() == []


@pytest.mark.parametrize("width", [1280, 360])
def test_the_note_fits_and_is_not_printed(tab: Tab, log: RunLog, width: int) -> None:
    add_rows(log, 10)
    with serving(log.path.parent, charts_of) as port:
        tab.open(f"http://127.0.0.1:{port}/", width)
        until(tab, SAID, "running")
        inside = "(r => r.left >= 0 && r.right <= innerWidth && r.bottom <= innerHeight)"
        assert tab.js(f"{inside}(document.getElementById('watch').getBoundingClientRect())")
        tab("Emulation.setEmulatedMedia", media="print")
        assert tab.js("getComputedStyle(document.getElementById('watch')).display") == "none"
        tab("Emulation.setEmulatedMedia", media="")
