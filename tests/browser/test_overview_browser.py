"""The pages over several runs in a real browser: they fit, they need no scripts, and keys open what is folded.

Without Chromium in the PATH this module has no tests; `make test` says so.
"""

from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Tab
from pages import HOSTILE, verdict

from sharpscope.report.html import write_page
from sharpscope.studies._framework import study as study_module
from sharpscope.studies._framework.claims import WIDER
from sharpscope.studies._framework.pages import StudyRow, overview, seeds_page
from sharpscope.studies._framework.seeds import repeated_claims

__test__ = CHROMIUM is not None
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    tab = Tab(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


DOT = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")
"""A picture of one grey dot."""


def rows(name: str) -> list[StudyRow]:
    verdicts = [
        verdict(name, part=name, note=name, criterion=name),
        verdict("it fails", passed=False, observed=(2.05, 2.2701)),
        verdict(name, passed=False, kind=WIDER, deciding=False),
        verdict("the control behaves", kind="negative control"),
    ]
    good = StudyRow("one", name, name, "one/report.html", verdicts, [], {name: name}, 75.0, 10, name, True, DOT)
    broken = StudyRow("two", name, "", "", [], [name], {}, 0.0, 0, "", True)
    return [good, broken, StudyRow("three", name, name, "", [], [], {}, 0.0, 0, "", False)]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 400])
def test_the_overview_fits_and_asks_for_nothing(tab: Tab, tmp_path: Path, theme: str, width: int) -> None:
    for name in ("a study", HOSTILE):
        path = write_page(tmp_path / "index.html", overview(rows(name)))
        tab.open(path, width, theme)
        asked = [uri for uri in tab.requests() if not uri.startswith("data:image/png;")]
        assert tab.complaints() == [] and asked == [path.as_uri()]
        assert tab.js(FITS)
        tab.js("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        assert tab.js(FITS)
        assert tab.js("document.scripts.length") == 0
        assert tab.js("[...document.images].map(image => [image.naturalWidth, image.closest('a').innerText])") == [
            [1, name]
        ]


def test_keys_open_the_claims(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_page(tmp_path / "index.html", overview(rows("a study"))))
    focus = "document.activeElement.tagName"
    seen: list[str] = []
    while (not seen or seen[-1] != "SUMMARY") and len(seen) < 20:
        for kind in ("keyDown", "keyUp"):
            tab("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        seen.append(tab.js(focus))
    assert seen[-1] == "SUMMARY" and "A" in seen
    tab("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    tab.settle()
    assert tab.js("document.querySelector('details').open")


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_over_seeds_fits(tab: Tab, tmp_path: Path, width: int) -> None:
    study = study_module.find(study_module.known()[0])
    runs = [[verdict(c.sentence, part=c.part, observed=(0.1 * i, 12345.6)) for c in study.CLAIMS] for i in range(7)]
    page = seeds_page(
        study, {i: f"seed-{i}/report.html" for i in range(7)}, repeated_claims(study.CLAIMS, runs), [HOSTILE]
    )
    tab.open(write_page(tmp_path / "index.html", page), width)
    assert tab.complaints() == [] and tab.js(FITS)
