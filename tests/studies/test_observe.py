"""What claims read off a history: rows, columns, repeats, and arithmetic on them."""

import numpy as np
import pytest

from sharpscope.errors import InvalidValue, NoSuchColumn
from sharpscope.records.history import History
from sharpscope.report.charts import Chart
from sharpscope.studies._framework.claims import (
    KINDS,
    comparison,
    control,
    identity,
    inequality,
    labelled,
    scaling,
    under,
    wider_claim,
)
from sharpscope.studies._framework.fits import exponent, slope
from sharpscope.studies._framework.observe import joined, measured, run

TAU = (0.5, 1.0, 2.0, 4.0)
BY_NAME = History(
    {"run": f"{name}{ending}", "tau": t, "x": scale * t + i}
    for i, ending in enumerate(("", ", seed 1", ", seed 7"))
    for name, scale in (("a", 1.0), ("a, longer", 10.0))
    for t in TAU
    if ending != ", seed 7" or name == "a"
)
BY_COLUMN = History(
    {"run": "a", "seed": seed, "n": n, "gap": (seed + 3) / n, "good": float(n < 32)}
    for seed in (0, 1)
    for n in (8, 16, 32)
)


def test_repeats_by_name_are_those_of_this_run_alone() -> None:
    assert run("a")["x"].last()(BY_NAME, None) == (4.0, 5.0, 6.0)
    assert run("a, longer")["x"].last()(BY_NAME, None) == (40.0, 41.0)


def test_repeats_by_column() -> None:
    assert run("a")["gap"].last()(BY_COLUMN, None) == (3 / 32, 4 / 32)
    assert run("a").reduce(lambda n, gap: (n * gap).sum(), "n", "gap")(BY_COLUMN, None) == (9.0, 12.0)


def test_slopes_and_exponents_of_one_column_over_another() -> None:
    assert run("a").reduce(exponent, "n", "gap")(BY_COLUMN, None) == pytest.approx((-1, -1), rel=1e-12)
    assert run("a, longer").reduce(slope, "tau", "x")(BY_NAME, None) == pytest.approx((10, 10), rel=1e-12)


def test_arithmetic_is_between_equal_repeats() -> None:
    """The seventh seed of one run has no partner; plain numbers go with all."""
    ratio = run("a, longer")["x"].last() / run("a")["x"].last()
    assert ratio(BY_NAME, None) == (10.0, 41 / 5)
    assert ratio.runs == ("a, longer", "a")
    assert np.allclose((2 * (ratio - 10) + 1)(BY_NAME, None), (1.0, -2.6))
    assert abs(run("a")["x"].first() - 2)(BY_NAME, None) == (1.5, 0.5, 0.5)


def test_places() -> None:
    x = run("a").at(tau=2)["x"]
    assert x(BY_NAME, None) == (2.0, 3.0, 4.0)
    assert run("a").at(tau=(1, 4))["x"].farthest_from(2.4)(BY_NAME, None) == (4.0, 5.0, 6.0)
    assert run("a").between(tau=(1, 2))["x"].max()(BY_NAME, None) == (2.0, 3.0, 4.0)
    assert run("a").near(tau=1.02)["x"].median()(BY_NAME, None) == (1.0, 2.0, 3.0)
    assert run("a").where("good", lambda good: good == 1)["n"].max()(BY_COLUMN, None) == (16.0, 16.0)
    assert run("a").where("good", lambda good: good == 1).at(n=16)["gap"](BY_COLUMN, None) == (3 / 16, 4 / 16)
    for rows in (run("a").at(tau=3), run("a").near(tau=3)):
        with pytest.raises(InvalidValue, match="'a' has no row near tau = 3"):
            rows["x"](BY_NAME, None)


def test_summaries() -> None:
    x = run("a")["x"]
    assert [x.min()(BY_NAME, None), x.mean()(BY_NAME, None)] == [(0.5, 1.5, 2.5), (1.875, 2.875, 3.875)]
    assert x.second_half().first()(BY_NAME, None) == (2.0, 3.0, 4.0)
    assert x.extent()(BY_NAME, None) == (0.5, 6.0)
    assert x.last().over_repeats(np.median)(BY_NAME, None) == 5.0
    assert joined(x.first(), x.last())(BY_NAME, None) == (0.5, 4.0, 1.5, 5.0, 2.5, 6.0)


def test_a_comparison_is_the_test_of_a_claim() -> None:
    x = run("a")["x"].last()
    tests = {x <= 6: True, x <= 5.9: False, x >= 4: True, x.within(4, 6): True, (x <= 5).in_the_median(): True}
    verdicts = [control("c", test).decide("study", BY_NAME, None) for test in tests]
    assert [v.passed for v in verdicts] == list(tests.values())
    assert [v.criterion for v in verdicts] == [
        "at most 6",
        "at most 5.9",
        "at least 4",
        "within [4, 6]",
        "median at most 5",
    ]
    assert {v.kind for v in verdicts} == {"negative control"} and control("c", x <= 1).runs == ("a",)
    made = [kind("c", x <= 6, note="n") for kind in (identity, inequality, scaling, comparison, control, wider_claim)]
    assert tuple(claim.kind for claim in made) == KINDS
    assert [claim.deciding for claim in made] == [True] * 5 + [False]
    ends = measured(lambda h, config: (h.series("a", "x")[0], config), "a") <= 2
    assert identity("c", ends).decide("study", BY_NAME, 1.5).observed == (0.5, 1.5)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(NoSuchColumn, match="no run 'b' with columns x"):
        run("b")["x"](BY_NAME, None)
    with pytest.raises(NoSuchColumn, match="no run 'a' with columns y"):
        run("a")["y"](BY_NAME, None)


def test_headings_and_labels_are_said_once() -> None:
    first, second = (
        Chart("one", "One", x="n", y="gap", runs=("a",)),
        Chart("two", "Two", x="n", y="x", runs=("a",), y_label="x!"),
    )
    charts = under("Part", *labelled({"n": "examples", "gap": "the gap"}, first, second))
    assert [(c.part, c.x_label, c.y_label) for c in charts] == [
        ("Part", "examples", "the gap"),
        ("Part", "examples", "x!"),
    ]
