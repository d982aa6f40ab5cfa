"""Claims: criteria, verdicts on what is not a number, and verdicts that survive a file."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from sharpscope.records.files import _finite
from sharpscope.records.history import History
from sharpscope.report.charts import Chart
from sharpscope.studies._framework.claims import (
    KINDS,
    WIDER,
    Claim,
    Criterion,
    Observed,
    Verdict,
    at_least,
    at_most,
    comparison,
    within,
)
from sharpscope.studies._framework.observe import run
from sharpscope.studies._framework.pages import about, chart_of, opening, ranked
from sharpscope.studies._framework.study import headings

CRITERIA = [at_most(2.0), at_least(2.0), within(1.9, 2.5)]


def claim(observe: Callable[[History, Any], Observed], criterion: Criterion = CRITERIA[0], **more: Any) -> Claim:
    return Claim("the number is small", observe, criterion, "inequality", "Part", ("a",), **more)


def test_bounds_belong_to_the_criterion() -> None:
    assert at_most(2.0)(2.0) and not at_most(2.0)(math.nextafter(2, 3))
    assert at_least(2.0)(2.0) and not at_least(2.0)(math.nextafter(2, 1))
    assert within(1.9, 2.5)(1.9) and within(1.9, 2.5)(2.5)
    assert not within(1.9, 2.5)(1.89) and not within(1.9, 2.5)(2.51)


@pytest.mark.parametrize(
    ("criterion", "text"),
    [(at_most(1e-13), "at most 1e-13"), (at_least(5), "at least 5"), (within(0.2, 1), "within [0.2, 1]")],
)
def test_criteria_say_what_they_ask(criterion: Criterion, text: str) -> None:
    assert criterion.text == text


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.text)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(criterion: Criterion, odd: float) -> None:
    assert not criterion(odd)
    assert not criterion((2.0, odd))
    assert criterion(2.0)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.text)
def test_every_one_of_several_numbers_has_to_pass(criterion: Criterion) -> None:
    assert criterion((2.0, 2.0))
    assert not criterion((2.0, 1.0, 3.0))
    assert not criterion(())


def test_a_claim_is_decided_by_history_and_configuration() -> None:
    history = History([{"run": "a", "step": i, "loss": 1 / (1 + i)} for i in range(3)])
    late = claim(lambda h, c: float(h.series("a", "loss")[-1]) * c["unit"], at_most(0.5), note="lower is better")
    verdict = late.decide("study", history, {"unit": 1.0})
    assert verdict == Verdict(
        "study", "the number is small", 1 / 3, "at most 0.5", "inequality", True, "Part", True, "lower is better"
    )
    assert not late.decide("study", history, {"unit": 3.0}).passed


def test_several_numbers_are_kept_as_a_tuple() -> None:
    verdict = claim(lambda h, c: (1.0, 3.0)).decide("study", History(), None)
    assert verdict.observed == (1.0, 3.0)
    assert not verdict.passed


@pytest.mark.parametrize(
    "observe",
    [
        lambda h, c: float(h.series("b", "loss")[-1]),
        lambda h, c: float(h.series("a", "radius")[-1]),
        lambda h, c: h.series("a", "loss").tolist()[5],
        lambda h, c: min([]),
        lambda h, c: 1 / 0,
        lambda h, c: math.nan,
    ],
    ids=["no run", "no column", "too short", "empty", "division", "nan"],
)
def test_what_cannot_be_formed_does_not_pass(observe: Callable[[History, Any], float]) -> None:
    verdict = claim(observe).decide("study", History([{"run": "a", "loss": 1.0}]), None)
    assert not verdict.passed
    assert isinstance(verdict.observed, float) and math.isnan(verdict.observed)


def test_mistakes_of_the_study_are_not_hidden() -> None:
    with pytest.raises(AttributeError):
        claim(lambda h, c: c.missing).decide("study", History(), None)


def test_kinds_are_checked() -> None:
    made = [Claim("s", lambda h, c: 0.0, at_most(1), kind, runs=("a",)) for kind in KINDS]
    assert [claim.kind for claim in made] == list(KINDS)
    assert [claim.deciding for claim in made] == [kind != WIDER for kind in KINDS]
    with pytest.raises(ValueError, match="kind 'law' of the claim 'a sentence' is none of identity, inequality"):
        Claim("a sentence", lambda h, c: 0.0, at_most(1), "law", runs=("a",))


def test_a_claim_says_which_runs_it_reads() -> None:
    assert Claim("s", run("a")["x"].last() / run("b")["x"].last(), at_most(1), "identity").runs == ("a", "b")
    with pytest.raises(ValueError, match="the claim 's' does not say which runs it reads"):
        Claim("s", lambda h, c: 0.0, at_most(1), "identity")


@pytest.mark.parametrize("observed", [0.1 + 0.2, (1e-300, 2.0), math.nan, (1.0, math.nan), (2.0,), math.inf])
def test_verdicts_survive_a_file(observed: Observed) -> None:
    verdict = claim(lambda h, c: observed, deciding=False, note="θ").decide("study", History(), None)
    text = json.dumps(_finite(dataclasses.asdict(verdict)), allow_nan=False)
    back = Verdict.read(json.loads(text))
    assert isinstance(back.observed, tuple) == isinstance(observed, tuple)
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (back.observed, observed)), strict=True)
    # JSON has one word, null, for whatever is not finite
    assert all(after == before or (math.isnan(after) and not math.isfinite(before)) for after, before in pairs)
    assert dataclasses.replace(back, observed=0.0) == dataclasses.replace(verdict, observed=0.0)


def test_a_claim_leads_to_the_chart_that_shows_most_of_it() -> None:
    def chart(name: str, title: str, *runs: str, part: str = "") -> Chart:
        return Chart(name, title, x="step", y="loss", runs=runs, part=part)

    charts = [
        chart("sharp", "Sharpness", "a", "b"),
        chart("test", "Test error", "a", "b"),
        chart("other", "Test error", "a", part="elsewhere"),
        chart("foreign", "Test error of c", "c"),
    ]
    claims = [
        comparison(sentence, run(name)["loss"].last() <= 1) for sentence, name in (("The test error", "a"), ("it", "d"))
    ]
    assert [chart_of(claim, charts) for claim in claims] == ["test", ""]
    sharp = comparison("Sharpness falls, and with it the loss", run("a")["loss"].last() <= 1)
    assert chart_of(sharp, charts) == "sharp"


def test_charts_without_ranks_get_two() -> None:
    charts = [Chart(name, name, x="step", y="loss", runs=("a",)) for name in "abc"]
    assert [chart.rank for chart in ranked(charts)] == [1, 2, 0]
    given = [charts[0], replace(charts[1], rank=1)]
    assert ranked(given) == given


def test_a_page_opens_with_what_fits_and_the_rest_stands_below() -> None:
    first, second, third = "A" * 199 + ".", "B" * 140 + ".", "C" * 30 + "."
    assert opening(f"{first} {second} {third}") == (f"{first} {second}", third)
    assert opening("D" * 500 + ". E.") == ("D" * 500 + ".", "E.")
    study: Any = ModuleType("a_study")
    study.__doc__ = f"""Title.

    {first}  {second}
    {third}

    Where ``x < 1``:

        y = <x>
         z
    """
    assert headings(study) == ("Title", f"{first} {second} {third}")
    assert about(study) == (
        f'<p>{third}</p><p>Where <code>x &lt; 1</code>:</p><pre tabindex="0">    y = &lt;x&gt;\n     z</pre>'
    )
    study.__doc__ = "Title alone."
    assert headings(study) == ("Title alone", "") and about(study) == ""
