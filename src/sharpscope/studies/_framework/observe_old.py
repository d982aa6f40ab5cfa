"""Slopes, rank correlations and claims over repeats: how the numbers of a study are summed up.

A row of a history may carry ``seed``, the number of the repeat it belongs to; what is read `by_seed` gives one number
for each repeat, and a criterion then has to hold for every one of them (or for their median).
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...records.history import History
from .claims import Observed

Observer = Callable[[History, Any], Observed]
Reduce = Callable[..., float]


def by_seed(run: str, reduce: Reduce, *columns: str) -> Observer:
    """``reduce(*columns)`` of the rows of a run, once for each repeat (column ``seed``).

    >>> h = History([{"run": "a", "seed": s, "n": n, "gap": 3 / n} for s in (0, 1) for n in (8, 16)])
    >>> [round(v, 9) for v in by_seed("a", lambda n, gap: gap[0] * n[0] - 4, "n", "gap")(h, None)]
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
