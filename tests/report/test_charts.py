"""Charts: the points they show, and their matplotlib figures."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharpscope.errors import InvalidValue
from sharpscope.report.charts import (
    Chart,
    Columns,
    Coordinates,
    SphereChart,
    missing,
    thin,
    thin_path,
    traces,
    viewpoint,
)
from sharpscope.report.figures import figure, panels, save_figures

LOSS = Chart("loss", "Loss", x="step", y="loss", runs=("a", "b"))


def columns(**rows: Any) -> dict[str, list[Any]]:
    """Columns from run -> list of rows."""
    flat = [{"run": run, **row} for run, many in rows.items() for row in many]
    return {name: [row.get(name) for row in flat] for name in dict.fromkeys(k for row in flat for k in row)}


def circle(n: int = 40) -> list[dict[str, float]]:
    turns = [math.tau * k / (n - 1) for k in range(n)]
    return [{"x": math.cos(t), "y": math.sin(t), "z": 0.0, "sharp": 2 + math.cos(t)} for t in turns]


SPHERE = SphereChart("sphere", "A sphere", curve="curve", color="sharp", paths=("path",))
ROUND = columns(curve=circle(), path=circle()[:9])


def test_a_trace_holds_finite_points_in_the_order_of_x() -> None:
    rows = [
        {"step": 3, "loss": 1.0},
        {"step": 1, "loss": None},
        {"step": 2, "loss": math.nan},
        {"step": 0, "loss": 4.0},
    ]
    a, b = traces(LOSS, columns(a=rows, b=[{"step": 0, "loss": math.inf}]))
    assert a.points == [(0.0, 4.0), (3.0, 1.0)]
    assert b.points == []


def test_a_logarithmic_axis_counts_what_it_cannot_show() -> None:
    chart = Chart("l", "L", x="step", y="loss", runs=("a",), log="y")
    (trace,) = traces(chart, columns(a=[{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.0}, {"step": 2, "loss": -1.0}]))
    assert (trace.points, trace.hidden) == ([(0.0, 1.0)], 2)


@pytest.mark.parametrize("log_x", [False, True])
def test_thinning_keeps_ends_and_bursts(log_x: bool) -> None:
    points: list[Coordinates] = [(float(i + 1), math.sin(i / 900)) for i in range(50_000)]
    points[31_234], points[7] = (31_235.0, 99.0), (8.0, -99.0)
    kept = thin(points, log_x)
    assert len(kept) <= 2000
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[-1], points[31_234], points[7]} <= set(kept)


def test_thinning_leaves_short_and_degenerate_lines_alone() -> None:
    short: list[Coordinates] = [(float(i), 0.0) for i in range(2000)]
    assert thin(short) is short
    assert set(thin([(1.0, float(i)) for i in range(5000)])) == {(1.0, 0.0), (1.0, 4999.0)}


def test_a_thinned_path_keeps_its_period_of_two() -> None:
    points: list[Coordinates] = [(float(i), (-1.0) ** i) for i in range(30_000)]
    kept = thin_path(points)
    assert len(kept) == 2000
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert all(a[1] == -b[1] and b[0] == a[0] + 1 for a, b in zip(kept[::2], kept[1::2], strict=True))


@pytest.mark.parametrize(
    ("chart", "data", "sentence"),
    [
        (LOSS, {}, "The data have no column “step”, “loss”."),
        (LOSS, columns(a=[{"step": 0, "loss": 1.0}]), "No values of “step”, “loss” to show for run “b”."),
        (Chart("l", "L", x="step", y="loss", runs=()), {"run": [], "step": [], "loss": []}, "The chart names no runs."),
        (SPHERE, {"run": [], "x": [], "y": [], "z": []}, "The data have no column “sharp”."),
        (SPHERE, ROUND, ""),
    ],
)
def test_missing_data_are_named(chart: Chart | SphereChart, data: dict[str, list[Any]], sentence: str) -> None:
    assert missing(chart, data) == sentence
    figure(chart, data)  # draws what there is


def test_other_things_are_no_charts() -> None:
    for reader in (traces, figure):
        with pytest.raises(TypeError, match="str"):
            reader("loss", {})


def test_a_figure_has_the_lines_axes_and_labels_of_its_chart() -> None:
    names = ("_a", "50$ b$")
    chart = Chart(
        "e",
        "50$ and _x_$",
        x="step",
        y="mean_loss",
        runs=names,
        x_label="n $",
        log="xy",
        lines=((2.0, "edge $ of stability"), (-1.0, "not on a logarithmic axis")),
    )
    data = columns(**{name: [{"step": k + 1, "mean_loss": 1 / (k + 1)} for k in range(3)] for name in names})
    fig = figure(chart, data)
    fig.draw_without_rendering()
    (ax,) = fig.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("n $ (log)", "mean loss (log)")
    assert ax.get_title(loc="left") == "50$ and _x_$"
    assert len(ax.get_lines()) == 3  # two runs, one reference line
    assert [text.get_text() for text in ax.texts] == ["edge $ of stability"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["_a", "50$ b$"]


def test_markers_are_dots_without_lines() -> None:
    chart = Chart("m", "M", x="step", y="loss", runs=("a",), markers=True)
    (line,) = figure(chart, columns(a=[{"step": k, "loss": k} for k in range(3)])).axes[0].get_lines()
    assert (line.get_marker(), line.get_linestyle()) == ("o", "None")


def test_the_sphere_is_seen_from_the_side_of_its_paths() -> None:
    azimuth, elevation = viewpoint([(0.0, 1.0, 0.0), (0.0, 0.9, 0.1)])
    eye = (math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation))
    assert eye[1] > 0.9
    figure(SPHERE, ROUND).draw_without_rendering()


def test_figures_are_saved_by_name(tmp_path: Path) -> None:
    data = {**ROUND, "step": [1] * 49, "loss": [1.0] * 49}
    paths = save_figures([LOSS, SPHERE], data, tmp_path / "figures")
    assert [path.name for path in paths] == ["loss.png", "loss.pdf", "sphere.png", "sphere.pdf"]
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    before = [path.read_bytes() for path in paths]
    assert all(b.startswith(starts[path.suffix]) for path, b in zip(paths, before, strict=True))
    save_figures([LOSS, SPHERE], data, tmp_path / "figures")
    assert [path.read_bytes() for path in paths] == before  # whenever they are drawn


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        figure(LOSS, {})


def test_columns_beside_are_drawn_for_every_run() -> None:
    chart = Chart("c", "C", x="step", y="a", runs=("r", "s"), beside=(("b", "2/η̃"),))
    columns: Columns = {"run": ["r", "s"], "step": [0, 0], "a": [1.0, 2.0], "b": [3.0, None]}
    assert [(t.run, t.points) for t in traces(chart, columns)] == [
        ("r", [(0.0, 1.0)]),
        ("s", [(0.0, 2.0)]),
        ("r: 2/η̃", [(0.0, 3.0)]),
        ("s: 2/η̃", []),
    ]


def test_a_chart_of_the_first_repeat_leaves_out_the_others() -> None:
    """The first has the least seed; rows without a seed belong to no repeat."""
    rows: Columns = {"run": ["r"] * 4 + ["law"], "seed": [7, 7, 9, 9, None], "n": [1, 2, 1, 2, 1], "y": [3, 4, 5, 6, 8]}
    chart = Chart("c", "C", x="n", y="y", runs=("r", "law"), beside=(("n", "n"),), repeats="first")
    assert [t.points for t in traces(chart, rows)] == [[(1, 3), (2, 4)], [(1, 8)], [(1, 1), (2, 2)], [(1, 1)]]
    assert missing(chart, rows) == ""
    unrepeated = {name: values for name, values in rows.items() if name != "seed"}
    assert [len(t.points) for t in traces(chart, unrepeated)] == [4, 1, 4, 1]
    with pytest.raises(InvalidValue, match="repeats of the chart 'c' is 'last'; it must be 'all' or 'first'"):
        Chart("c", "C", x="n", y="y", runs=("r",), repeats="last")


def test_panels_draw_what_there_is_with_marks() -> None:
    data: dict[str, list[Any]] = {"run": ["a"] * 3, "step": [0, 1, 2], "loss": [3.0, 2.0, 1.0], "norm": [1.0, 1.0, 2.0]}
    charts = [Chart(y, y, x="step", y=y, runs=("a",), marks=((1.5, "here"),)) for y in ("loss", "absent", "norm")]
    fig = panels(charts, data)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["loss", "norm"]
    for ax in fig.axes:
        curve, mark = ax.lines
        assert np.asarray(curve.get_ydata()).tolist() == data[ax.get_title(loc="left")] and np.asarray(
            mark.get_xdata()
        ).tolist() == [1.5, 1.5]
        assert [text.get_text() for text in ax.texts] == ["here"]
    with pytest.raises(InvalidValue, match="nothing to draw"):
        panels(charts, {"run": [], "step": []})
