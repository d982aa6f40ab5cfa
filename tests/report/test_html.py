"""The report: one page that is safe, whole, offline and says what is missing."""

import json
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
from pages import HOSTILE, Elements, page, verdict

from sharpscope.report.charts import COLORS, PATH_COLORS, RAMP, Chart
from sharpscope.report.html import number, render, write_report
from sharpscope.studies._framework.pages import observed, summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1797, "1797"),
        (-3.0, "−3"),
        (2.0499999, "2.05"),
        (0.99987, "0.9999"),
        (0.001, "0.001"),
        (0.00099999, "0.001"),
        (0.00042, "4.2 × 10⁻⁴"),
        (-1e-5, "−10⁻⁵"),
        (3.1e-13, "3.1 × 10⁻¹³"),
        (12345.6, "12 350"),
        (99999.6, "10⁵"),
        (123456, "123 456"),
        (2e6, "2 000 000"),
        (3e9, "3 × 10⁹"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_are_short_and_readable(value: float, text: str) -> None:
    assert number(value).replace("\u202f", " ").replace("\u00a0", " ") == text


def test_several_observations_are_a_range() -> None:
    assert observed((2.05, 2.2701)) == "2.05 to 2.27"
    assert observed((3.0, 1.0, 1.5)) == "1.5 (1 to 3)"
    assert observed((2.0, 2.0, 2.0)) == "2"
    assert observed((2.00001, 2.0)) == "2"
    assert observed((1.0, math.nan)) == observed(()) == "not a number"


def test_the_summary_counts_claims_and_controls_apart() -> None:
    claims = [verdict(), verdict(), verdict(passed=False), verdict(deciding=False)]
    controls = [verdict(kind="negative control"), verdict(kind="negative control", passed=False)]
    assert summary(claims + controls) == (
        "2 of 3 deciding claims hold; 1 of 2 negative controls behave as they should; "
        "1 more is reported without deciding."
    )
    assert summary([verdict()]) == "1 of 1 deciding claim holds."


def test_names_are_text_wherever_they_stand() -> None:
    plain, hostile = Elements(render(**page())), Elements(render(**page(HOSTILE)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert not [attrs for _, attrs in hostile.tags if any(name.startswith("on") for name in attrs)]
    data = json.loads(hostile.data)
    assert data["loss"]["runs"][0]["name"] == HOSTILE
    assert data["edge"]["lines"][0] == [2.0, HOSTILE] and data["edge"]["marks"] == [[60.0, HOSTILE]]


def test_dollars_in_names_are_not_placeholders() -> None:
    assert "$title ${lead} $$" in render(**page("$title ${lead} $$"))


def test_the_page_fetches_nothing() -> None:
    elements = Elements(render(**page(), figures={"loss": b"png"}))
    for tag, attrs in elements.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    policy = next(a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    style = (files("sharpscope.report") / "assets" / "report.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_the_licence_of_the_plotting_library_travels_with_it() -> None:
    html = render(**page())
    assert "Copyright (c) 2022 Leon Sorokin" in html and "The above copyright notice" in html


def test_claims_show_number_criterion_and_verdict() -> None:
    html = render(**page())
    rows = dict(re.findall(r'<tr id="(claim-\d)" (class=.*?)</tr>', html))
    assert re.match(r'class="fails" data-kind="inequality">.{0,120}✗</span> fails</td>', rows["claim-2"])
    assert '<th scope="row">it fails <a class="to" href="#chart-edge">chart</a>' in rows["claim-2"]
    assert rows["claim-3"].startswith('class="fails aside"')
    assert 'it fails aside <span class="tag">reported, does not decide</span>' in rows["claim-3"]
    assert '<li>Fails: <a href="#claim-2">it fails</a></li>' in html and 'id="claim-2"' in html
    assert "2.05 to 2.27" in html and "at most 2" in html and "as it should</td>" in html


def test_a_page_without_verdicts_has_no_claims() -> None:
    html = render(**page(verdicts=()))
    assert 'id="claims"' not in html and 'href="#claims"' not in html
    assert 'id="charts"' in html


def test_missing_data_become_a_sentence() -> None:
    html = render(**page())
    assert '<p class="missing"><span class="note">The data have no column “accuracy”.</span></p>' in html
    empty = render(**page(columns={}, verdicts=(), config={}, environment={}))
    assert empty.count('class="missing"') == 5 and "data-chart=" not in empty
    assert 'id="configuration"' not in empty and 'id="environment"' not in empty


def test_long_runs_are_thinned_and_the_page_says_so() -> None:
    losses = [1.0] * 50_000
    losses[31_234], losses[40_001] = 70.0, 0.0
    columns = {"run": ["run"] * 50_000, "step": list(range(50_000)), "loss": losses}
    chart = Chart("loss", "Loss", x="step", y="loss", runs=("run",), log="y")
    html = render(**page(columns=columns, charts=[chart]))
    run = json.loads(Elements(html).data)["loss"]["runs"][0]
    assert len(run["x"]) <= 2000
    assert run["y"][run["x"].index(31_234)] == 70.0
    assert f"Thinned for this page, extremes kept (run: {len(run['x'])} of 49999 points)." in html
    assert "Not on a logarithmic axis: 1 at or below zero." in html


def test_data_keep_the_parity_of_large_steps() -> None:
    columns = {"run": ["run"] * 2, "step": [1_000_000, 1_000_001], "loss": [1.0, 2.0]}
    chart = Chart("loss", "Loss", x="step", y="loss", runs=("run",))
    data = json.loads(Elements(render(**page(columns=columns, charts=[chart]))).data)
    assert data["loss"]["runs"][0]["x"] == [1_000_000, 1_000_001]


def test_figures_stand_in_where_scripts_are_off() -> None:
    html = render(**page(), figures={"loss": b"png"})
    assert 'src="data:image/png;base64,cG5n"></noscript>' in html
    assert "which are switched off.</noscript>" in html


def test_page_and_figures_share_their_colours() -> None:
    style = (files("sharpscope.report") / "assets" / "report.css").read_text()
    for name, colors in {"series": COLORS, "paths": PATH_COLORS, "ramp": RAMP}.items():
        assert f"--{name}: {' '.join(colors)};" in style


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", **page())
    before = path.read_text(encoding="utf-8")
    assert before.startswith("<!doctype html>") and before.endswith("</html>\n")
    with pytest.raises(UnicodeEncodeError):  # half of a surrogate pair: fails while it is written
        write_report(path, **page(title="\ud800"))
    assert path.read_text(encoding="utf-8") == before
    assert list(path.parent.iterdir()) == [path]


def test_pictures_come_first_then_what_was_tested_then_the_rest_folded() -> None:
    html = render(**page(lead="At the edge of stability"))
    places = [html.index(x) for x in ("<h1>", 'class="term"', 'id="chart-edge"', 'class="summary', 'id="claims"')]
    assert places == sorted(places) and html.count('id="chart-edge"') == 1
    assert html.index('id="claims"') < html.index('id="chart-loss"') < html.index('id="glossary"')
    folded = re.findall(
        r'<details class="part"( open)?><summary><h3>(.*?)</h3> <span class="beside">(.*?)</span>', html
    )
    assert folded == [("", "run", "1 of 1 hold"), (" open", "One", "1 of 2 hold"), ("", "run", "1 chart")]


def test_a_page_weighs_little() -> None:
    """The library, the script and the style: what a page of no data takes; the points of a chart take 20 bytes each."""
    assert len(render(**page(columns={}, verdicts=())).encode()) < 110_000
