"""Draws charts as figures of matplotlib, which is optional and imported only where a figure is made."""

import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidType, MissingExtra
from ..records.files import replacing
from .charts import (
    COLORS,
    DASHES,
    GRID,
    INK,
    MUTED,
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
    fig = _new_figure(7.2, 4.2)
    from matplotlib.patheffects import withStroke

    ax = fig.subplots()
    _style(ax, chart.title)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    x_label, y_label = chart.axis_labels
    ax.set_xlabel(x_label, parse_math=False)
    ax.set_ylabel(y_label, parse_math=False)
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
            ax.annotate(
                label,
                xy=(1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=MUTED,
                fontsize=9,
                parse_math=False,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    if len(drawn) > 1:
        _legend(fig, drawn)
    if not drawn:
        _write(fig, missing(chart, columns))
    return fig


@figure.register(SphereChart)
def sphere_figure(chart: SphereChart, columns: Columns) -> "Figure":
    """Draw the curve and the paths on a sphere, faint where they are behind it."""
    fig = _new_figure(7.2, 5.6)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    ax = fig.add_subplot(projection="3d", proj_type="ortho", box_aspect=(1, 1, 1), computed_zorder=False)
    ax.set_axis_off()
    _style(ax, chart.title)
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
    """Write one `NAME.png` per chart into the folder, which is made if need be; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        paths.append(folder / f"{chart.name}.png")
        with replacing(paths[-1]) as draft:
            figure(chart, columns).savefig(draft, dpi=150, format="png")
    return paths


def _new_figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("figures need matplotlib; in a checkout of sharpscope: pip install '.[studies]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _style(ax: "Axes", title: str) -> None:
    ax.set_title(title, loc="left", color=INK, fontsize=12, pad=10, parse_math=False)
    ax.tick_params(colors=MUTED, labelsize=9, which="both")
    for spine in ax.spines.values():
        spine.set_color("#9aa1aa")


def _legend(fig: "Figure", drawn: Sequence[tuple[Any, str]]) -> None:
    lines, blank = [line for line, _ in drawn], [""] * len(drawn)
    legend = fig.legend(lines, blank, loc="outside right upper", frameon=False, fontsize=9)
    for text, (_, run) in zip(legend.get_texts(), drawn, strict=True):  # a leading "_" or a "$" is part of the name
        text.set(text=run, parse_math=False)


def _write(fig: "Figure", sentence: str) -> None:
    fig.text(0.5, 0.5, sentence, ha="center", va="center", color=MUTED, wrap=True, parse_math=False)
