"""Draws charts as figures of matplotlib, which is optional and imported only where a figure is made."""

import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import MUTED, new_figure, style_axes
from ..errors import InvalidType, InvalidValue
from ..records.files import replacing
from .charts import (
    COLORS,
    DASHES,
    PATH_COLORS,
    RAMP,
    Chart,
    Columns,
    SphereChart,
    graticule,
    missing,
    traces,
    viewpoint,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@singledispatch
def figure(chart: Any, columns: Columns) -> "Figure":
    """Draw the chart as a matplotlib figure (no pyplot, no global state); missing data become a sentence in it."""
    raise InvalidType(f"no figure of a {type(chart).__name__}; known: Chart, SphereChart")


@figure.register(Chart)
def line_figure(chart: Chart, columns: Columns) -> "Figure":
    """Draw lines, reference lines, and a legend where there are several runs."""
    fig = new_figure(7.2, 4.2)
    drawn = _draw(fig.subplots(), chart, columns)
    if len(drawn) > 1:
        _legend(fig, drawn)
    if not drawn:
        _write(fig, missing(chart, columns))
    return fig


def panels(charts: Sequence[Chart], columns: Columns) -> "Figure":
    """Draw charts of the same runs as one figure, two beside each other.

    Raises:
        InvalidValue: there is nothing to draw.
    """
    there = [chart for chart in charts if any(trace.points for trace in traces(chart, columns))]
    if not there:
        raise InvalidValue("there is nothing to draw yet: no column of these charts has a number")
    across = min(len(there), 2)
    down = -(-len(there) // across)
    fig = new_figure(5.6 * across, 3.2 * down)
    drawn: dict[str, Any] = {}
    for ax, chart in zip(fig.subplots(down, across, squeeze=False).flat, there, strict=False):
        drawn |= {run: line for line, run in _draw(ax, chart, columns)}
    for ax in fig.axes[len(there) :]:
        ax.remove()
    if len(drawn) > 1:
        _legend(fig, [(line, run) for run, line in drawn.items()])
    return fig


def _draw(ax: "Axes", chart: Chart, columns: Columns) -> list[tuple[Any, str]]:
    """Draw lines, reference lines and marks; return the lines with their runs."""
    style_axes(ax, chart.title, chart.axis_labels)
    ax.set_xscale("log" if chart.log_x else "linear")
    ax.set_yscale("log" if chart.log_y else "linear")
    drawn = []
    for i, trace in enumerate(traces(chart, columns)):
        if trace.points:
            x, y = zip(*trace.points, strict=True)
            shape = "o" if chart.markers or len(x) == 1 else DASHES[i // len(COLORS) % len(DASHES)]
            (line,) = ax.plot(x, y, shape, color=COLORS[i % len(COLORS)], linewidth=1.6, markersize=5)
            drawn.append((line, trace.run))
    for value, label in chart.lines:
        if drawn and (value > 0 or not chart.log_y):
            ax.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            _label(ax, label, (1, value), ("axes fraction", "data"), ha="right")
    for place, label in chart.marks:
        if drawn and (place > 0 or not chart.log_x):
            ax.axvline(place, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            _label(ax, label, (place, 1), ("data", "axes fraction"), ha="right", va="top", rotation=90)
    return drawn


def _label(ax: "Axes", words: str, place: tuple[float, float], axes: tuple[str, str], **more: Any) -> None:
    from matplotlib.patheffects import withStroke

    ax.annotate(
        words,
        xy=place,
        xycoords=axes,
        xytext=(-2, 3 if "va" not in more else -2),
        textcoords="offset points",
        color=MUTED,
        fontsize=9,
        parse_math=False,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        **more,
    )


@figure.register(SphereChart)
def sphere_figure(chart: SphereChart, columns: Columns) -> "Figure":
    """Draw the curve and the paths on a sphere, faint where they are behind it."""
    fig = new_figure(7.2, 5.6)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    ax = fig.add_subplot(projection="3d", proj_type="ortho", box_aspect=(1, 1, 1), computed_zorder=False)
    ax.set_axis_off()
    style_axes(ax, chart.title)
    curve, *paths = traces(chart, columns)
    if not (curve.points or any(path.points for path in paths)):
        _write(fig, missing(chart, columns))
        return fig
    azimuth, elevation = viewpoint([p for path in paths for p in path.points] or curve.points)
    ax.view_init(math.degrees(elevation), math.degrees(azimuth))
    eye = (math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation))

    def draw(points: Sequence[Sequence[float]], width: float, **style: Any) -> None:
        segments = [(a[:3], b[:3]) for a, b in pairwise(points)]
        fade = [1.0 if sum(e * (p + q) for e, p, q in zip(eye, a, b, strict=True)) > 0 else 0.25 for a, b in segments]
        ax.add_collection3d(Line3DCollection(segments, linewidths=width, alpha=fade, **style), autolim=False)

    for circle in graticule():
        draw(circle, 0.6, colors="#b5bac1")
    if curve.points:
        values = [p[3] for p in curve.points]
        ramp = LinearSegmentedColormap.from_list("ramp", RAMP)
        scale = (LogNorm if 0 < 20 * min(values) < max(values) else Normalize)(min(values), max(values))
        draw(curve.points, 4, colors=[ramp(scale((a + b) / 2)) for a, b in pairwise(values)])
        bar = fig.colorbar(ScalarMappable(scale, ramp), ax=ax, shrink=0.6, pad=0.02, label=chart.color_label)
        bar.outline.set_visible(False)
    drawn = []
    for i, path in enumerate(paths):
        if path.points:
            color = PATH_COLORS[i % len(PATH_COLORS)]
            draw(path.points, 0.6 if path.total > 500 else 1.4, colors=color, zorder=3 + i)
            (end,) = ax.plot(*zip(path.points[-1], strict=True), "o", markersize=5, color=color, zorder=3 + i)
            drawn.append((end, path.run))
    ax.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), zlim=(-0.7, 0.7))
    if drawn:
        _legend(fig, drawn)
    return fig


def save_figures(charts: Iterable[Chart | SphereChart], columns: Columns, folder: str | Path) -> list[Path]:
    """Write `NAME.png` and `NAME.pdf` of each chart into the folder, which is made if need be; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        drawn = figure(chart, columns)
        for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):  # the same figure is the same file
            paths.append(folder / f"{chart.name}.{kind}")
            with replacing(paths[-1]) as draft:
                drawn.savefig(draft, dpi=150, format=kind, metadata=metadata)
    return paths


def save_preview(chart: Chart | SphereChart, columns: Columns, path: Path) -> None:
    """Write a small PNG of the chart, some 400 points wide."""
    with replacing(path) as draft:
        figure(chart, columns).savefig(draft, dpi=55, format="png")


def _legend(fig: "Figure", drawn: Sequence[tuple[Any, str]]) -> None:
    lines, blank = [line for line, _ in drawn], [""] * len(drawn)
    legend = fig.legend(lines, blank, loc="outside right upper", frameon=False, fontsize=9)
    for text, (_, run) in zip(legend.get_texts(), drawn, strict=True):  # a leading "_" or a "$" is part of the name
        text.set(text=run, parse_math=False)


def _write(fig: "Figure", sentence: str) -> None:
    fig.text(0.5, 0.5, sentence, ha="center", va="center", color=MUTED, wrap=True, parse_math=False)
