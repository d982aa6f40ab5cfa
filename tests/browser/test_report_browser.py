"""The report in a real browser: Chromium without a window.

Without Chromium in the PATH this module has no tests; `make test` says so.
"""

import base64
import xml.etree.ElementTree
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, Tab
from pages import HOSTILE, page, verdict

from sharpscope.report.charts import Chart, SphereChart
from sharpscope.report.html import write_report
from sharpscope.studies._framework.pages import about, opening, outcome, ranked
from sharpscope.studies._framework.study import find, headings, known

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


def straight(charts: list[Chart | SphereChart]) -> dict[str, list[Any]]:
    """Columns with a straight line for every run of the charts."""
    rows: list[dict[str, Any]] = []
    for chart in charts:
        if isinstance(chart, Chart):
            rows += [{"run": run, chart.x: k, chart.y: 1.0 + k} for run in chart.runs for k in range(9)]
        else:
            runs = (chart.curve, *chart.paths)
            rows += [{"run": run, "x": 1.0, "y": 0.0, "z": 0.0, chart.color: 1.0} for run in runs]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


@pytest.mark.parametrize("name", known())
def test_the_finding_and_its_first_picture_are_on_the_first_screen(tab: Tab, tmp_path: Path, name: str) -> None:
    study = find(name)
    title, argument = headings(study)
    charts, verdicts = ranked(list(study.CHARTS)), [verdict() for _ in range(65)]
    given: dict[str, Any] = {"subtitle": study.PAPER, "config": {}, "environment": {}, "tested": outcome(verdicts)}
    given |= {"title": title, "lead": opening(argument)[0], "sections": [("About", about(study))]}
    path = write_report(tmp_path / "report.html", **given, charts=charts, columns=straight(charts))
    for width, height in ((1280, 900), (390, 844)):
        tab.open(path, width)
        ends = "[...document.querySelectorAll('h1, .lead, .plot, .sphere')].map(e => e.getBoundingClientRect().bottom)"
        head, lead_end, plot, *_ = tab.js(ends)
        assert head < lead_end < plot <= height, (width, plot)
        assert tab.js(FITS)
        below = "document.querySelector('.summary').getBoundingClientRect().top + scrollY"
        assert tab.js(below) < 3 * height


def test_what_decides_the_paper_is_its_first_picture(tab: Tab, tmp_path: Path) -> None:
    charts = list(find("lyu2022").CHARTS)
    tab.open(write_report(tmp_path / "report.html", **page(charts=charts, columns=straight(charts))))
    assert tab.js("document.querySelector('.plot').closest('figure').id") == "chart-network-decay"


def test_claims_are_filtered_by_verdict_and_kind(tab: Tab, report: Path) -> None:
    tab.open(report)
    seen = "[...document.querySelectorAll('#claims tbody tr')].filter(r => r.checkVisibility()).map(r => r.id)"
    assert tab.js(seen) == ["claim-2", "claim-3", "claim-4"]  # the part in which one fails is open

    def choose(name: str, value: str) -> list[str]:
        tab.js(f"""(() => {{ const list = document.getElementById('claim-{name}'); list.value = '{value}';
            list.dispatchEvent(new Event('change')); }})()""")
        return list(tab.js(seen))

    assert choose("state", "fails") == ["claim-2"]
    assert tab.js("document.getElementById('claim-count').textContent") == "1 claim"
    assert choose("state", "holds") == ["claim-1", "claim-4"]
    assert choose("kind", "negative control") == ["claim-4"]
    assert choose("state", "aside") == []
    choose("kind", "")
    assert choose("state", "") == ["claim-2", "claim-3", "claim-4"]


def test_a_link_unfolds_what_it_leads_to(tab: Tab, report: Path) -> None:
    tab.open(report)
    tab.js("document.querySelectorAll('#claims .to')[0].click()")
    tab.settle()
    assert tab.js("document.getElementById('chart-loss').checkVisibility()")
    wide = "document.querySelector('#chart-loss .u-over').getBoundingClientRect().width"
    assert tab.js(wide) > 250  # drawn anew at the width that it has now


def press(tab: Tab, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        tab("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9, "Escape": 27}[key])


@pytest.mark.parametrize("width", [1280, 390])
def test_a_term_explains_itself_to_the_keyboard(tab: Tab, tmp_path: Path, width: int) -> None:
    path = write_report(tmp_path / "report.html", **page(lead="It sits at the edge of stability, and τ goes on"))
    tab.open(path, width)
    tip = "getComputedStyle(document.querySelector('.term'), '::after').content"
    assert tab.js(tip) == "none"
    press(tab, "Tab")
    assert tab.js("document.activeElement.textContent") == "edge of stability"
    assert tab.js(tip).startswith('"Where sharpness equals') and tab.js(FITS)
    described = "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent"
    assert tab.js(described).startswith("Where sharpness equals")
    press(tab, "Escape")
    assert tab.js(tip) == "none"


def tree(tab: Tab) -> list[tuple[str, str, Any]]:
    """Role, name and level of what a screen reader is given."""
    nodes = tab("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node["ignored"]]
    level = [
        next((p["value"]["value"] for p in node.get("properties", ()) if p["name"] == "level"), 0) for node in seen
    ]
    return [(n["role"]["value"], n.get("name", {}).get("value", ""), k) for n, k in zip(seen, level, strict=True)]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_screen_reader_finds_names_and_an_outline(tab: Tab, tmp_path: Path, width: int) -> None:
    tab.open(write_report(tmp_path / "report.html", **page(lead="At the edge of stability")), width)
    tab.js("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    found = tree(tab)
    named = {"button", "link", "combobox", "heading", "image", "application", "table"}
    assert [node for node in found if node[0] in named and not node[1].strip()] == []
    levels = [level for role, _, level in found if role == "heading"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    ids = tab.js("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
    targets = tab.js("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))")
    assert set(targets) <= set(ids)


FILES = """(async () => {
    const made = [], old = URL.createObjectURL;
    URL.createObjectURL = (blob) => { made.push(blob); return 'blob:nothing'; };
    const names = [], click = HTMLAnchorElement.prototype.click;
    HTMLAnchorElement.prototype.click = function () { names.push(this.download); };
    document.querySelectorAll('#chart-NAME .files button:not(:last-child)').forEach(button => button.click());
    URL.createObjectURL = old;
    HTMLAnchorElement.prototype.click = click;
    return [names, ...await Promise.all(made.map(blob => blob.text()))];
})()"""


@pytest.mark.parametrize("name", ["a run", HOSTILE], ids=["plain", "hostile"])
def test_a_chart_is_printed_alone(tab: Tab, tmp_path: Path, name: str) -> None:
    tab.open(write_report(tmp_path / "report.html", **page(name)), theme="dark")
    closed = tab.js("document.querySelectorAll('details:not([open])').length")
    title = tab.js("document.title")
    tab.js("window.print = () => {}; document.querySelector('#chart-edge .files button:last-child').click()")
    assert tab.js("document.title") == "edge"
    assert tab.js("document.querySelector('.sheet text').getAttribute('fill')") == "#5d656f"  # as on light paper
    tab("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.body.children].filter(e => getComputedStyle(e).display !== 'none').map(e => e.className)"
    assert tab.js(shown) == ["sheet"]
    tab("Emulation.setEmulatedMedia", media="")
    pages = base64.b64decode(tab("Page.printToPDF")["data"]).count(b"/Type /Page\n")
    assert pages == 1
    tab.js("dispatchEvent(new Event('afterprint'))")
    assert tab.js("document.querySelector('.sheet')") is None and tab.js("document.title") == title
    assert tab.js("document.querySelectorAll('details:not([open])').length") == closed
    assert tab.complaints() == []


@pytest.mark.parametrize("name", ["a run", HOSTILE], ids=["plain", "hostile"])
def test_a_chart_comes_as_svg_and_as_csv(tab: Tab, tmp_path: Path, name: str) -> None:
    tab.open(write_report(tmp_path / "report.html", **page(name)))
    names, svg, csv = tab.js(FILES.replace("NAME", "edge"))
    assert names == ["edge.svg", "edge.csv"]
    drawing = xml.etree.ElementTree.fromstring(svg)
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Edge", name, "other", "step", "near"} <= set(texts)
    paths = [path.get("d") or "" for path in drawing.iter("{http://www.w3.org/2000/svg}path")]
    assert max(path.count("L") for path in paths) == 119  # of 120 points
    rows = csv.splitlines()
    assert rows[0] == "run,step,edge" and len(rows) == 1 + 240 and rows[-1] == "other,178.5,1.5"
    names, svg, csv = tab.js(FILES.replace("NAME", "sphere"))
    assert names == ["sphere.svg", "sphere.csv"]
    xml.etree.ElementTree.fromstring(svg)
    assert csv.splitlines()[0] == "run,x,y,z,sharpness" and len(csv.splitlines()) == 1 + 61 + 9
    assert tab.complaints() == []
