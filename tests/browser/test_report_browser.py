"""The report in a real browser: Chromium without a window.

Without Chromium in the PATH this module has no tests; `make test` says so.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Tab
from pages import HOSTILE, page

from sharpscope.report.html import write_report

__test__ = CHROMIUM is not None


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    tab = Tab(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "report.html", **page("a run"))


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
INK = """[...document.querySelectorAll('canvas')].map(canvas => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(pixels.buffer)).size;
})"""
OVER = """(() => { const box = document.querySelector('#chart-edge .u-over');
    box.scrollIntoView({block: 'center', behavior: 'instant'});
    const { x, y, width, height } = box.getBoundingClientRect(); return [x, y, width, height]; })()"""
READINGS = "[...document.querySelectorAll('#chart-edge output')].map(output => output.textContent)"
WHOLE = "document.querySelector('#chart-edge .axis button').hidden"


@pytest.mark.parametrize("name", ["a run", HOSTILE], ids=["plain", "hostile"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 360])
def test_every_chart_is_drawn_without_complaint_request_or_overflow(
    tab: Tab, tmp_path: Path, name: str, theme: str, width: int
) -> None:
    path = write_report(tmp_path / "report.html", **page(name))
    tab.open(path, width, theme)
    assert tab.complaints() == []
    assert tab.requests() == [path.as_uri()]
    ink = tab.js(INK)
    assert len(ink) == 4 and min(ink) > 20, ink
    assert tab.js(FITS)
    tab.js("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert tab.js(FITS)
    assert tab.js("document.querySelectorAll('img').length") == 0


def test_pointing_reads_dragging_zooms_and_a_double_click_undoes_it(tab: Tab, report: Path) -> None:
    tab.open(report)

    def step(place: float) -> float:
        x, y, width, height = tab.js(OVER)  # anew: the labels of the axis change its width
        tab.mouse("mouseMoved", x + place * width, y + height / 2)
        tab.settle()
        return float(tab.js(READINGS)[0].removeprefix("step = "))

    last = 1.5 * 119  # the steps run from 0 to here
    assert step(0.5) == pytest.approx(last / 2, abs=2)
    assert [float(value) for value in tab.js(READINGS)[1:]] == pytest.approx([2, 1.5], abs=0.12)
    assert tab.js(WHOLE)
    x, y, width, height = tab.js(OVER)
    tab.mouse("mousePressed", x + 0.3 * width, y + 0.2 * height, 1)
    tab.mouse("mouseMoved", x + 0.5 * width, y + 0.4 * height, 1)
    tab.mouse("mouseReleased", x + 0.5 * width, y + 0.4 * height, 1)
    assert (step(0.01), step(0.99)) == pytest.approx((0.3 * last, 0.5 * last), abs=2)
    assert not tab.js(WHOLE)
    for clicks in (1, 2):
        tab.mouse("mousePressed", x + width / 2, y + height / 2, clicks)
        tab.mouse("mouseReleased", x + width / 2, y + height / 2, clicks)
    assert (step(0.01), step(0.99)) == pytest.approx((0, last), abs=4)
    assert tab.js(WHOLE)
    assert tab.complaints() == []


def test_a_name_hides_its_run_and_arrows_read_values(tab: Tab, report: Path) -> None:
    tab.open(report)
    tab.js("document.querySelector('#chart-edge .legend button').click()")
    tab.js("document.querySelector('#chart-edge .plot').focus()")
    tab("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    tab.settle()
    assert tab.js("document.querySelector('#chart-edge .legend button').getAttribute('aria-pressed')") == "false"
    assert tab.js(READINGS) == ["step = 0", "", "1.5"]


def test_the_sphere_turns_by_key_and_by_pointer_and_comes_back(tab: Tab, report: Path) -> None:
    tab.open(report)
    look = "document.querySelector('#chart-sphere canvas').toDataURL()"
    views = [tab.js(look)]
    tab.js("document.querySelector('#chart-sphere canvas').scrollIntoView({block: 'center', behavior: 'instant'})")
    tab.js("document.querySelector('#chart-sphere canvas').focus()")
    for key in ("ArrowLeft", "ArrowUp", "+"):
        tab("Input.dispatchKeyEvent", type="keyDown", key=key)
        views.append(tab.js(look))
    x, y = tab.js("(r => [r.x + r.width / 2, r.y + r.height / 2])(document.activeElement.getBoundingClientRect())")
    tab.mouse("mousePressed", x, y, 1)
    tab.mouse("mouseMoved", x + 60, y + 20, 1)
    tab.mouse("mouseReleased", x + 60, y + 20, 1)
    views.append(tab.js(look))
    assert len(set(views)) == 5
    tab("Input.dispatchKeyEvent", type="keyDown", key="Home")
    assert tab.js(look) == views[0]


def test_charts_follow_the_theme(tab: Tab, report: Path) -> None:
    tab.open(report)
    look = "[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"
    light = tab.js(look)
    tab.theme("dark")
    tab.settle()
    dark = tab.js(look)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    tab.theme("light")
    tab.settle()
    assert tab.js(look) == light


def test_paper_is_light_and_unfolded_and_the_screen_recovers(tab: Tab, report: Path) -> None:
    tab.open(report, theme="dark")
    tab.js("""addEventListener('beforeprint', () => {
        const paper = getComputedStyle(document.documentElement).getPropertyValue('--paper').trim();
        window.printed = [paper, document.querySelectorAll('details:not([open])').length];
    })""")
    folded = tab.js("document.querySelectorAll('details:not([open])').length")
    pdf = base64.b64decode(tab("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert tab.js("window.printed") == ["#fdfdfb", 0]
    assert folded > 0 and tab.js("document.querySelectorAll('details:not([open])').length") == folded
    assert tab.complaints() == []
