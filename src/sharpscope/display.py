"""Small HTML of results for notebooks, figures of matplotlib, and bars of long solves.

Everything here is optional: neither IPython nor matplotlib nor tqdm is imported before it is used, and where nobody
looks on, nothing is shown.
"""

import math
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from html import escape
from io import BytesIO
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .errors import needing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2126", "#5d656f", "#e3e5e8"

SMALL = "font-size:90%;opacity:.75"
"""Style of what stands below or beside a result."""

AFTER = 2.0
"""Seconds that a solve takes before a bar shows how far it is."""

BETWEEN = 0.2
"""Seconds between two views of a bar."""

_silent: ContextVar[bool] = ContextVar("silent", default=False)
_solve: ContextVar["_Solve | None"] = ContextVar("solve", default=None)


def card(title: str, *parts: str) -> str:
    """Make the HTML of a result: a title, and below it parts that are HTML already."""
    inside = "".join(parts)
    return f'<div style="margin:.3em 0;max-width:62em"><div><b>{escape(title)}</b></div>{inside}</div>'


def text(lines: str) -> str:
    """Make HTML of plain text, whose lines and columns stay as they are."""
    return f'<pre style="margin:.3em 0;white-space:pre-wrap;background:none">{escape(lines)}</pre>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a small table of plain text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def sparkline(label: str, x: Sequence[float], y: Sequence[float], *, points: int = 200) -> str:
    """Draw a curve with a label as a small SVG, its ends in numbers; no picture of fewer than two finite points."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(kept) < 2:
        return ""
    shown = [kept[round(i * (len(kept) - 1) / (points - 1))] for i in range(points)] if len(kept) > points else kept
    (left, right), (low, high) = ((min(z), max(z)) for z in zip(*kept, strict=True))
    path = " ".join(
        f"{240 * (a - left) / (right - left or 1):.1f},{44 - 40 * (b - low) / (high - low or 1):.1f}" for a, b in shown
    )
    ends = f"{left:.6g} to {right:.6g}; {low:.4g} to {high:.4g}, last {kept[-1][1]:.4g}"
    return (
        f'<figure style="display:inline-block;margin:.3em 1em .3em 0"><svg width="240" height="48" role="img"'
        f' aria-label="{escape(label)}"><polyline points="{path}" fill="none" stroke="#0072b2"/></svg>'
        f'<figcaption style="{SMALL}">{escape(label)}: {ends}</figcaption></figure>'
    )


def shell() -> Any:
    """Return the interactive shell of the notebook that this runs in; None elsewhere."""
    found = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return found if getattr(found, "kernel", None) is not None else None


def cell(html: str) -> Any:
    """Show HTML in the notebook; return the handle by which `update_cell` replaces it, or None where there is none."""
    if shell() is None:
        return None
    from IPython.display import HTML, display

    return display(HTML(html), display_id=True)


def update_cell(handle: Any, html: str) -> None:
    """Replace what `cell` has shown."""
    from IPython.display import HTML

    handle.update(HTML(html))


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of matplotlib, of a size in inches (no pyplot, no global state).

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with needing("matplotlib", "a figure"):
        from matplotlib.figure import Figure
    return _shown(Figure)(figsize=(width, height), layout="constrained", facecolor="white")


@cache
def _shown(figure: type["Figure"]) -> type["Figure"]:
    class Shown(figure):  # type: ignore[misc,valid-type]
        """A figure that a notebook shows, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            picture = BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return Shown


def style_axes(ax: "Axes", title: str, labels: tuple[str, str] | None = None) -> None:
    """Set title and colours of axes, and where there are labels, a grid below what is drawn."""
    ax.set_title(title, loc="left", color=INK, fontsize=12, pad=10, parse_math=False)
    ax.tick_params(colors=MUTED, labelsize=9, which="both")
    for spine in ax.spines.values():
        spine.set_color("#9aa1aa")
    if labels is not None:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.set_xlabel(labels[0], parse_math=False)
        ax.set_ylabel(labels[1], parse_math=False)


@contextmanager
def silent() -> Iterator[None]:
    """Show no bars inside, whatever takes long; also a decorator."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


@contextmanager
def progress(title: str, unit: str = "products") -> Iterator[None]:
    """Let `report` say inside how far a solve is; also a decorator.

    The first report after `AFTER` seconds opens a bar, in a notebook or a terminal, which goes when the solve ends.
    Before that, and everywhere else, a report costs less than a microsecond.
    """
    solve = None if _silent.get() else _Solve(title, unit)
    before = _solve.set(solve)
    try:
        yield
    finally:
        _solve.reset(before)
        if solve is not None and solve.bar is not None:
            solve.bar.close()


def report(done: int, *, total: int | None = None, **reached: float) -> None:
    """Report the number of products that the present solve has taken, of how many, and what it has reached by name.

    Residuals and errors are relative.
    """
    solve = _solve.get()
    if solve is not None and perf_counter() >= solve.due:
        solve.show(done, total, reached)


def percent(fraction: float) -> None:
    """Report the fraction of the present solve that is done."""
    report(round(100 * fraction), total=100)


class _Solve:
    """A solve, with its bar once it has one."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self.began = perf_counter()
        self.due = self.began + AFTER
        self.bar: Any = None

    def show(self, done: int, total: int | None, reached: Mapping[str, float]) -> None:
        if self.bar is None:
            self.bar = _opened(total=total, desc=self.title, unit=f" {self.unit}")
            if self.bar is None:
                self.due = math.inf
                return
            self.bar.start_t -= perf_counter() - self.began
        words = (f"{name.replace('_', ' ')} {value:.1e}" for name, value in reached.items())
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.n = done
        self.bar.refresh()
        self.due = perf_counter() + BETWEEN


def _opened(**options: Any) -> Any:
    """Open a bar, where somebody can see it and tqdm is installed."""
    first = multiprocessing.parent_process() is None and threading.current_thread() is threading.main_thread()
    first = first and os.environ.get("RANK", "0") == "0"  # of several processes that measure together
    if not first or not (shell() is not None or sys.stderr.isatty()):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without widgets, which gets a bar of text
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(leave=False, delay=1e-9, **options)  # not before its first number
