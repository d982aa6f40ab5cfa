"""Charts as values: which column to draw against which, for which runs.

A chart names columns and runs of a history and holds no data, so one description serves two renderers: `figures`, for
files, and the interactive page of `html`.  Both take their points from `traces` and so draw the same ones.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import singledispatch
from typing import Any

from ..errors import InvalidType, InvalidValue

Columns = Mapping[str, Sequence[Any]]
Coordinates = tuple[float, ...]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")  # Okabe & Ito, without yellow
PATH_COLORS = ("#0072b2", "#1d2126", "#009e73", "#cc79a7")  # on the sphere, clear of RAMP
RAMP = ("#f3cf86", "#e08a2e", "#7a2a05")  # low to high
DASHES = ("-", "--", ":")  # the second and third time round the colours
MAX_POINTS = 2000  # of one run in one chart: more than a screen has columns of pixels


@dataclass(frozen=True)
class Chart:
    """Lines of one column against another, one line per run, its points joined in the order of `x`."""

    name: str  # slug: file name of the figure and anchor in the page
    title: str
    _: KW_ONLY
    x: str  # column name
    y: str  # column name
    runs: tuple[str, ...]  # which runs, in this order (colours are assigned in this order)
    x_label: str = ""  # empty: the name of the column in words
    y_label: str = ""
    log: str = ""  # the axes that are logarithmic: "x", "y" or "xy"
    lines: tuple[tuple[float, str], ...] = ()  # horizontal: (value, label), e.g. (2.0, "edge of stability")
    marks: tuple[tuple[float, str], ...] = ()  # vertical: (place on the horizontal axis, label)
    caption: str = ""
    part: str = ""  # charts of one part stand together, under its name
    markers: bool = False  # dots instead of lines (e.g. error against il)
    beside: tuple[tuple[str, str], ...] = ()  # further columns to draw for every run: (column, label)
    rank: int = 0  # place among the pictures on top of the page, from 1; 0: further down
    repeats: str = "all"  # "first": of a run that was repeated, only the rows with the least number in column "seed"

    def __post_init__(self) -> None:
        if self.repeats not in ("all", "first"):
            raise InvalidValue(f"repeats of the chart '{self.name}' is '{self.repeats}'; it must be 'all' or 'first'")

    @property
    def log_x(self) -> bool:
        """True where the horizontal axis is logarithmic."""
        return "x" in self.log

    @property
    def log_y(self) -> bool:
        """True where the vertical axis is logarithmic."""
        return "y" in self.log

    @property
    def axis_labels(self) -> tuple[str, str]:
        """The labels of the two axes; a logarithmic one says so."""
        x, y = self.x_label or in_words(self.x), self.y_label or in_words(self.y)
        return x + " (log)" * self.log_x, y + " (log)" * self.log_y


@dataclass(frozen=True)
class SphereChart:
    """Paths on the unit sphere: a curve of minimizers coloured by a value, and trajectories."""

    name: str  # as of a Chart
    title: str
    _: KW_ONLY
    curve: str  # run whose x, y, z (unit vectors) form the curve
    color: str  # column of that run that colours it (e.g. "spherical_sharpness")
    paths: tuple[str, ...]  # runs whose x, y, z are drawn as trajectories
    caption: str = ""
    part: str = ""
    rank: int = 0

    @property
    def color_label(self) -> str:
        """The label of the colours."""
        return in_words(self.color)


@dataclass(frozen=True)
class Trace:
    """The points of one run that a chart shows, in drawing order, and how many there are beside them."""

    run: str
    points: list[Coordinates]
    total: int  # points before thinning
    hidden: int = 0  # finite points that a logarithmic axis has no place for


def in_words(column: str) -> str:
    """The name of a column with spaces, as a label.

    >>> in_words("stability_ratio")
    'stability ratio'
    """
    return column.replace("_", " ")


@singledispatch
def traces(chart: Any, columns: Columns) -> list[Trace]:
    """Make one trace per run of the chart, in its order.  Values that are absent or not finite are no points.

    >>> chart = Chart("l", "Loss", x="step", y="loss", runs=("a",))
    >>> traces(chart, {"run": ["a", "a", "b"], "step": [1, 0, 0], "loss": [0.5, 2.0, None]})[0].points
    [(0.0, 2.0), (1.0, 0.5)]
    """
    raise InvalidType(f"no chart: {type(chart).__name__}; known: Chart, SphereChart")


@traces.register(Chart)
def line_traces(chart: Chart, columns: Columns) -> list[Trace]:
    """The lines of a chart, first those of its column `y`, then those beside."""
    result = []
    columns = _first_repeat(columns) if chart.repeats == "first" else columns
    for column, label in ((chart.y, ""), *chart.beside):
        for run, points in _points(columns, dict.fromkeys(chart.runs, (chart.x, column))).items():
            shown = [p for p in points if (p[0] > 0 or not chart.log_x) and (p[1] > 0 or not chart.log_y)]
            shown.sort(key=lambda p: p[0])  # by x alone: equal x keep the order of the history
            name = f"{run}: {label}" if label else run
            result.append(Trace(name, thin(shown, chart.log_x), len(shown), len(points) - len(shown)))
    return result


@traces.register(SphereChart)
def sphere_traces(chart: SphereChart, columns: Columns) -> list[Trace]:
    """The curve first, with points `(x, y, z, color)`, then the paths, with points `(x, y, z)`."""
    curve = _points(columns, {chart.curve: ("x", "y", "z", chart.color)})
    paths = _points(columns, dict.fromkeys(chart.paths, ("x", "y", "z")))
    return [Trace(run, thin_path(points), len(points)) for run, points in (*curve.items(), *paths.items())]


def thin(points: list[Coordinates], log_x: bool = False) -> list[Coordinates]:
    """Keep at most `MAX_POINTS` of a line: the lowest and highest of every stretch of the axis, so that bursts stay."""
    if len(points) <= MAX_POINTS:
        return points
    at = [math.log(p[0]) if log_x else p[0] for p in points]
    stretches = MAX_POINTS // 2 - 1
    width = (at[-1] - at[0]) / stretches or 1.0
    low: dict[int, int] = {}
    high: dict[int, int] = {}
    for i, (x, point) in enumerate(zip(at, points, strict=True)):
        stretch = min(int((x - at[0]) / width), stretches - 1)
        if stretch not in low or point[1] < points[low[stretch]][1]:
            low[stretch] = i
        if stretch not in high or point[1] > points[high[stretch]][1]:
            high[stretch] = i
    return [points[i] for i in sorted({0, len(points) - 1, *low.values(), *high.values()})]


def thin_path(points: list[Coordinates]) -> list[Coordinates]:
    """Keep at most `MAX_POINTS` of a path in space, in neighbouring pairs: one in n would hide a period of two."""
    if len(points) <= MAX_POINTS:
        return points
    pairs = MAX_POINTS // 2
    starts = [k * (len(points) - 2) // (pairs - 1) for k in range(pairs)]
    return [points[i] for start in starts for i in (start, start + 1)]


def _points(columns: Columns, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, list[Coordinates]]:
    """For each run, the values of its wanted columns, in those rows in which all are finite numbers."""
    result: dict[str, list[Coordinates]] = {run: [] for run in wanted}
    known = {run: [columns[name] for name in names] for run, names in wanted.items() if set(names) <= columns.keys()}
    for row, run in enumerate(columns.get("run", ())):
        if run in known:
            point = tuple(math.nan if column[row] is None else float(column[row]) for column in known[run])
            if all(map(math.isfinite, point)):
                result[run].append(point)
    return result


def _first_repeat(columns: Columns) -> Columns:
    """The rows of the repeat with the least seed, and those that belong to no repeat."""
    seeds = columns.get("seed", ())
    least = min((seed for seed in seeds if seed is not None), default=None)
    rows = [row for row, seed in enumerate(seeds) if seed in (None, least)]
    return {name: [values[row] for row in rows] for name, values in columns.items()} if seeds else columns


def missing(chart: Chart | SphereChart, columns: Columns) -> str:
    """Name the data that the chart needs and the columns do not hold; empty where nothing is missing."""
    names = (chart.x, chart.y) if isinstance(chart, Chart) else ("x", "y", "z", chart.color)
    absent = [name for name in names if name not in columns]
    if absent:
        return f"The data have no column {_listed(absent)}."
    empty = [trace.run for trace in traces(chart, columns) if not trace.points]
    if empty:
        return f"No values of {_listed(names)} to show for run{'s' * (len(empty) > 1)} {_listed(empty)}."
    return "" if isinstance(chart, SphereChart) or chart.runs else "The chart names no runs."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"“{name}”" for name in names)


def viewpoint(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Azimuth and elevation (radians) that show the middle of the points, a little from the side and from above."""
    x, y, z = (sum(p[i] for p in points) for i in range(3))
    return math.atan2(y, x) - 0.25, max(-1.2, min(1.2, math.atan2(z, math.hypot(x, y)) + 0.25))


def graticule() -> list[list[tuple[float, float, float]]]:
    """Circles of latitude and longitude, 30 degrees apart, as closed lists of points."""
    circle = [(math.cos(math.tau * k / 72), math.sin(math.tau * k / 72)) for k in range(73)]
    angles = [math.radians(a) for a in range(-60, 120, 30)]
    latitudes = [[(math.cos(a) * c, math.cos(a) * s, math.sin(a)) for c, s in circle] for a in angles[:5]]
    return latitudes + [[(math.cos(a) * c, math.sin(a) * c, s) for c, s in circle] for a in angles]
