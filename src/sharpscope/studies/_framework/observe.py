"""Slopes, rank correlations and claims over repeats: how the numbers of a study are summed up.

A row of a history may carry ``seed``, the number of the repeat it belongs to; what is read `by_seed` gives one number
for each repeat, and a criterion then has to hold for every one of them (or for their median).
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InvalidValue
from ...records.history import History
from .claims import Observed

Observer = Callable[[History, Any], Observed]
Reduce = Callable[..., float]


@dataclass(frozen=True)
class Fit:
    """Least squares ``y ≈ intercept + slope·x``: the standard error of the slope, and R²."""

    slope: float
    intercept: float
    error: float
    r2: float


def line(x: ArrayLike, y: ArrayLike) -> Fit:
    """Least squares through at least two points with different x.

    >>> line([0, 1, 2], [1, 3, 5])
    Fit(slope=2.0, intercept=1.0, error=0.0, r2=1.0)
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) != len(b) or len(a) < 2 or not np.ptp(a) > 0:
        raise InvalidValue(f"a line needs two points with different x; got x = {a.tolist()}, y = {b.tolist()}")
    u, v = a - a.mean(), b - b.mean()
    slope = float(u @ v / (u @ u))
    rest = float(np.square(v - slope * u).sum())
    error = (rest / max(len(a) - 2, 1) / float(u @ u)) ** 0.5
    return Fit(slope, float(b.mean() - slope * a.mean()), error, 1 - rest / float(v @ v) if v.any() else 1.0)


def power(x: ArrayLike, y: ArrayLike) -> Fit:
    """Least squares of log y on log x: the slope is the exponent of a power law.

    >>> round(power([1, 2, 4], [3, 12, 48]).slope, 12)
    2.0
    """
    return line(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties by their mean rank.

    >>> spearman([1, 2, 3, 4], [10, 20, 30, 25])
    0.8
    """
    ranks = [_ranks(np.asarray(v, float)) for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _ranks(v: np.ndarray) -> np.ndarray:
    """Mean rank of each value among all."""
    _, place, counts = np.unique(v, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def by_seed(run: str, reduce: Reduce, *columns: str) -> Observer:
    """``reduce(*columns)`` of the rows of a run, once for each repeat (column ``seed``).

    >>> h = History([{"run": "a", "seed": s, "n": n, "gap": 3 / n} for s in (0, 1) for n in (8, 16)])
    >>> [round(v, 9) for v in by_seed("a", lambda n, gap: power(n, gap).slope, "n", "gap")(h, None)]
    [-1.0, -1.0]
    """

    def read(h: History, config: Any) -> tuple[float, ...]:
        seed, *values = h.table(run, "seed", *columns)
        return tuple(float(reduce(*(v[seed == s] for v in values))) for s in np.unique(seed))

    return read


def last(run: str, column: str) -> Observer:
    """The last value of a column in each repeat: for what is written once."""
    return by_seed(run, lambda v: v[-1], column)


def worst(observe: Observer, pick: Callable[[Sequence[float]], float] = max) -> Observer:
    """The greatest of several observed numbers (or what `pick` makes of them: min, statistics.median)."""

    def read(h: History, config: Any) -> float:
        seen = observe(h, config)
        return pick(seen) if isinstance(seen, tuple) else seen

    return read


def over(top: Observer, bottom: Observer) -> Observer:
    """The ratio of two observations, repeat by repeat."""

    def read(h: History, config: Any) -> tuple[float, ...]:
        pairs = [v if isinstance(v, tuple) else (v,) for v in (top(h, config), bottom(h, config))]
        return tuple(a / b for a, b in zip(*pairs, strict=True))

    return read


def less(first: Observer, second: Observer) -> Observer:
    """The difference of two observations, repeat by repeat."""

    def read(h: History, config: Any) -> tuple[float, ...]:
        pairs = [v if isinstance(v, tuple) else (v,) for v in (first(h, config), second(h, config))]
        return tuple(a - b for a, b in zip(*pairs, strict=True))

    return read


def together(*observers: Observer) -> Observer:
    """All numbers of several observations, which one criterion has to hold for."""

    def read(h: History, config: Any) -> tuple[float, ...]:
        seen = [observe(h, config) for observe in observers]
        return tuple(v for some in seen for v in (some if isinstance(some, tuple) else (some,)))

    return read


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)
