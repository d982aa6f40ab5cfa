"""Numbers that claims are about, read off a history.

A `Reading` forms its number from one run, given as the history and the suffix of a repeat ("", ", seed 1", ...);
`over_seeds` turns it into what a claim observes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import InvalidValue
from ...records.history import History

Reading = Callable[[History, str], float]
Observer = Callable[[History, Any], Any]


def at(h: History, run: str, column: str, tau: float) -> float:
    """A column of a run at the reading nearest to τ, which must be near."""
    taus, values = h.table(run, "tau", column)
    i = int(np.abs(taus - tau).argmin())
    if abs(taus[i] - tau) > 0.05 * tau:
        raise InvalidValue(f"'{run}' has no reading near τ = {tau}")
    return float(values[i])


def last(h: History, run: str, column: str) -> float:
    """The last reading of a column."""
    return float(h.series(run, column)[-1])


def over_seeds(reading: Reading, *runs: str) -> Observer:
    """The reading, which takes `runs`; where all of them have repeats under other seeds, one number per seed."""

    def observe(h: History, config: Any) -> float | tuple[float, ...]:
        first, names = runs[0], set(h.runs)
        suffixes = [name.removeprefix(first) for name in h.runs if name == first or name.startswith(f"{first}, seed ")]
        suffixes = [s for s in suffixes if all(run + s in names for run in runs)]
        values = tuple(reading(h, suffix) for suffix in suffixes)
        return values[0] if len(values) == 1 else values

    return observe


def span(run: str, column: str, start: float, end: float = np.inf) -> Observer:
    """Least and greatest value of a column between two times τ, over all seeds."""

    def observe(h: History, config: Any) -> tuple[float, float]:
        lows, highs = [], []
        for name in h.runs:
            if name == run or name.startswith(f"{run}, seed "):
                tau, values = h.table(name, "tau", column)
                inside = values[(tau >= start * (1 - 1e-9)) & (tau <= end * (1 + 1e-9))]
                lows.append(float(inside.min()))
                highs.append(float(inside.max()))
        return min(lows), max(highs)

    return observe


def value(run: str, column: str, tau: float | None = None) -> Reading:
    """A column at τ, or at the end."""
    return lambda h, s: last(h, run + s, column) if tau is None else at(h, run + s, column, tau)


def ratio(over: Reading, under: Reading) -> Reading:
    """One reading over another."""
    return lambda h, s: over(h, s) / under(h, s)


def fall(run: str, end: float, start: float | None = None) -> Reading:
    """Factor by which λ1 falls from τ = `start` (None: from the first reading) to τ = `end`."""

    def read(h: History, s: str) -> float:
        values = h.series(run + s, "spherical_sharpness")
        before = float(values[0]) if start is None else at(h, run + s, "spherical_sharpness", start)
        return before / at(h, run + s, "spherical_sharpness", end)

    return read


def late_fall(run: str) -> Reading:
    """Factor by which λ1 falls over the second half of a run."""

    def read(h: History, s: str) -> float:
        values = h.series(run + s, "spherical_sharpness")
        return float(values[len(values) // 2] / values[-1])

    return read


def drift(run: str, column: str = "spherical_sharpness") -> Reading:
    """Largest relative change of a column over the last half of a run."""

    def read(h: History, s: str) -> float:
        values = h.series(run + s, column)
        late = values[len(values) // 2 :]
        return float(np.abs(late / late[-1] - 1).max())

    return read


def peak(run: str, column: str) -> Reading:
    """The greatest value of a column."""
    return lambda h, s: float(h.series(run + s, column).max())


def farthest(run: str, *taus: float, column: str = "eta_lambda", centre: float = 2.0) -> Reading:
    """Of the values at those τ the one farthest from `centre`."""

    def read(h: History, s: str) -> float:
        return max((at(h, run + s, column, t) for t in taus), key=lambda v: abs(v - centre))

    return read


def extreme(run: str, column: str, start: float, end: float, centre: float) -> Reading:
    """Of all readings between two times τ the one farthest from `centre`."""

    def read(h: History, s: str) -> float:
        tau, values = h.table(run + s, "tau", column)
        inside = values[(tau >= start * (1 - 1e-9)) & (tau <= end * (1 + 1e-9))]
        return float(inside[np.abs(inside - centre).argmax()])

    return read


def around(h: History, run: str, column: str, tau: float) -> float:
    """The median of a column over the readings within 5 % of τ: single readings at the edge scatter by some percent."""
    taus, values = h.table(run, "tau", column)
    near = values[np.abs(taus - tau) <= 0.05 * tau]
    if not len(near):
        raise InvalidValue(f"'{run}' has no reading near τ = {tau}")
    return float(np.median(near))


def apart(run: str, other: str, *taus: float, column: str = "spherical_sharpness") -> Reading:
    """Largest relative difference of a column between two runs at equal τ."""

    def read(h: History, s: str) -> float:
        return max(abs(around(h, other + s, column, t) / around(h, run + s, column, t) - 1) for t in taus)

    return read


def balance(run: str, start: float) -> Reading:
    """Time mean, over rows after τ = `start`, of the rotational balance of the group where it is farthest from one."""

    def read(h: History, s: str) -> float:
        means = []
        for column in (c for c in h.columns if c.startswith("balance/")):
            tau, values = h.table(run + s, "tau", column)
            if len(values):
                means.append(float(values[tau >= start].mean()))
        return max(means, key=lambda m: abs(m - 1))

    return read
