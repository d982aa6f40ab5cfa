"""The section of the tensors in a real browser: its table is sorted, its map is drawn, and both fit.

Without Chromium in the PATH this module has no tests; `make test` says so.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, Tab
from pages import HOSTILE

from sharpscope.monitoring.measurements import Facts
from sharpscope.monitoring.page import render_run
from sharpscope.records.history import History
from sharpscope.report.html import write_page

__test__ = CHROMIUM is not None

NAMES = ("embed.weight", "h.0.attn.weight", "h.10.attn.weight", "h.2.mlp.weight", HOSTILE)
KINDS = ("embedding", "attention", "attention", "linear", "other")
NORMS = (3.0, 1.0, 20.0, 0.004, 5.0)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    tab = Tab(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(1, 9):
        row: dict[str, Any] = {"run": "training", "step": 10 * i}
        for name, norm in zip(NAMES, NORMS, strict=True):
            row |= {f"norm/{name}": norm * i / 8, f"update/{name}": norm / 1000 / i}
        row |= {f"signal/{NAMES[1]}": 0.5, f"signal/{NAMES[0]}": 0.1}
        rows.append(row)
    html = render_run(History(rows), Facts(kinds=dict(zip(NAMES, KINDS, strict=True))), {})
    return write_page(tmp_path_factory.mktemp("tensors") / "page.html", html)


FIRST = "[...document.querySelectorAll('#tensor-table tbody th')].map(head => head.textContent)"


def press(tab: Tab, title: str) -> list[str]:
    """Press a head of the table; the names in the order after it."""
    tab.js(f"[...document.querySelectorAll('#tensor-table button')].find(b => b.textContent === '{title}').click()")
    return list(tab.js(FIRST))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_is_drawn_without_complaint_request_or_overflow(tab: Tab, path: Path, width: int, theme: str) -> None:
    tab.open(path, width, theme)
    assert tab.complaints() == [] and tab.requests() == [path.as_uri()]
    ink = """(() => { const map = document.getElementById('tensor-map');
        const pixels = map.getContext('2d').getImageData(0, 0, map.width, map.height).data;
        return new Set(new Uint32Array(pixels.buffer)).size; })()"""
    assert tab.js(ink) > 20
    assert tab.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.js("document.querySelectorAll('img').length") == 0


def test_a_press_sorts_and_a_second_one_turns_round(tab: Tab, path: Path) -> None:
    tab.open(path)
    by_norm = [name for _, name in sorted(zip(NORMS, NAMES, strict=True), reverse=True)]
    assert press(tab, "Norm") == by_norm
    assert press(tab, "Norm") == by_norm[::-1]
    by_name = press(tab, "Tensor")
    assert by_name.index("h.2.mlp.weight") < by_name.index("h.10.attn.weight")  # numbers by their size
    assert press(tab, "m/√v")[:2] == ["h.0.attn.weight", "embed.weight"]
    assert press(tab, "m/√v")[:2] == ["embed.weight", "h.0.attn.weight"]  # those without a number stay below
    assert tab.js("document.querySelectorAll('[aria-sort]').length") == 1


def test_the_map_shows_one_kind_and_says_what_is_under_the_pointer(tab: Tab, path: Path) -> None:
    tab.open(path)
    tab.js("""(() => { const kind = document.getElementById('tensor-kind'); kind.value = 'linear';
        kind.dispatchEvent(new Event('change')); document.getElementById('tensor-map')
        .scrollIntoView({block: 'center', behavior: 'instant'}); })()""")
    tab.settle()
    box = "document.getElementById('tensor-map').getBoundingClientRect()"
    x, y, width, height = tab.js(f"(({{x, y, width, height}}) => [x, y, width, height])({box})")
    assert height == 16 + 18  # one line, and the steps
    tab.mouse("mouseMoved", x + width - 3, y + 8)
    assert tab.js("document.getElementById('tensor-value').textContent") == "h.2.mlp.weight, step 80: 5 × 10⁻⁷"
