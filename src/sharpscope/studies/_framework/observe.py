"""Numbers that claims are about, read off the history of a study.

A quantity says what to read.  It is formed later, once for each repeat of its run under another seed:

    run("BN").at(tau=4)["spherical_sharpness"] / run("BN, no decay")["spherical_sharpness"].last()

Rows are narrowed first (`at`, `near`, `between`, `where`), then a column of them is summed up (`last`, `max`,
`farthest_from`, `reduce`); quantities are combined by arithmetic, repeat by repeat.  A comparison with a
number, ``quantity <= 1``, is the test that a claim is decided by.

A repeat is a run whose name ends in ", seed N", or the rows of a run that carry a number N in the column "seed".
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidValue
from ...records.history import History
from .claims import Observed, Tested, at_least, at_most, within

Array = NDArray[np.float64]
Repeat = tuple[str, float]
"""Ending of the name of a run, and number in its column "seed" (0 where there is none)."""

Condition = Callable[[Array], NDArray[Any]]

NEAR = 0.05
"""Largest relative distance of a row from the place at which it is asked for."""


@dataclass(frozen=True)
class Quantity:
    """Some numbers for each repeat of a run; `runs` names the runs from which they are read."""

    read: Callable[[History, Any], Mapping[Repeat, Array]]
    runs: tuple[str, ...]

    def __call__(self, history: History, config: Any) -> Observed:
        """All numbers, repeat by repeat; where there is only one, that number."""
        values = tuple(float(v) for array in self.read(history, config).values() for v in np.ravel(array))
        return values[0] if len(values) == 1 else values

    def reduce(self, function: Callable[[Array], Any]) -> "Quantity":
        """Apply a function to the values of each repeat."""
        return Quantity(lambda h, c: {k: np.asarray(function(v)) for k, v in self.read(h, c).items()}, self.runs)

    def first(self) -> "Quantity":
        """The first value of each repeat."""
        return self.reduce(lambda v: v[0])

    def last(self) -> "Quantity":
        """The last value of each repeat."""
        return self.reduce(lambda v: v[-1])

    def min(self) -> "Quantity":
        """The least value of each repeat."""
        return self.reduce(np.min)

    def max(self) -> "Quantity":
        """The greatest value of each repeat."""
        return self.reduce(np.max)

    def mean(self) -> "Quantity":
        """The mean of the values of each repeat."""
        return self.reduce(np.mean)

    def median(self) -> "Quantity":
        """The median of the values of each repeat."""
        return self.reduce(np.median)

    def farthest_from(self, centre: float) -> "Quantity":
        """The value of each repeat that lies farthest from `centre`."""
        return self.reduce(lambda v: v[np.abs(v - centre).argmax()])

    def second_half(self) -> "Quantity":
        """The values of each repeat from the middle one on."""
        return self.reduce(lambda v: v[len(v) // 2 :])

    def over_repeats(self, function: Callable[[Array], Any]) -> "Quantity":
        """Apply a function to all values of all repeats together."""

        def read(h: History, config: Any) -> dict[Repeat, Array]:
            return {("", 0): np.asarray(function(np.concatenate([np.ravel(v) for v in self.read(h, config).values()])))}

        return Quantity(read, self.runs)

    def extent(self) -> "Quantity":
        """The least and the greatest of all values of all repeats."""
        return self.over_repeats(lambda v: np.array([v.min(), v.max()]))

    def __abs__(self) -> "Quantity":
        return self.reduce(np.abs)

    def __add__(self, other: "Quantity | float") -> "Quantity":
        return _combined(operator.add, self, other)

    def __sub__(self, other: "Quantity | float") -> "Quantity":
        return _combined(operator.sub, self, other)

    def __mul__(self, other: "Quantity | float") -> "Quantity":
        return _combined(operator.mul, self, other)

    __rmul__ = __mul__

    def __le__(self, bound: float) -> Tested:
        return Tested(self, at_most(bound))

    def __ge__(self, bound: float) -> Tested:
        return Tested(self, at_least(bound))

    def within(self, low: float, high: float) -> Tested:
        """Test that every number lies between two others."""
        return Tested(self, within(low, high))

    def __truediv__(self, other: "Quantity | float") -> "Quantity":
        return _combined(operator.truediv, self, other)


def measured(function: Callable[[History, Any], Any], *runs: str) -> Quantity:
    """A quantity formed by ``function(history, config)``, which reads these runs: one number or several."""
    return Quantity(lambda h, config: {("", 0): np.asarray(function(h, config), float)}, runs)


def joined(*quantities: Quantity) -> Quantity:
    """The values of several quantities side by side, repeat by repeat."""
    return _combined(lambda *values: np.concatenate([np.ravel(v) for v in values]), *quantities)


def _combined(function: Callable[..., Any], *parts: "Quantity | float") -> Quantity:
    """Combine parts repeat by repeat, over those that all of them have; a plain number stands for every repeat."""

    def read(h: History, config: Any) -> dict[Repeat, Array]:
        found = [part.read(h, config) if isinstance(part, Quantity) else part for part in parts]
        tables = [f for f in found if isinstance(f, Mapping)]
        repeats = [key for key in tables[0] if all(key in table for table in tables)]
        return {key: function(*(f[key] if isinstance(f, Mapping) else f for f in found)) for key in repeats}

    return Quantity(read, tuple(dict.fromkeys(r for part in parts if isinstance(part, Quantity) for r in part.runs)))


@dataclass(frozen=True)
class Rows:
    """The rows of a run and of its repeats under other seeds, as far as they meet the conditions.

    >>> h = History([{"run": "a", "seed": s, "n": n, "gap": (s + 3) / n} for s in (0, 1) for n in (8, 16)])
    >>> run("a")["gap"].last()(h, None), (16 * run("a").at(n=16)["gap"])(h, None)
    ((0.1875, 0.25), (3.0, 4.0))
    """

    run: str
    conditions: tuple[tuple[str, Condition], ...] = ()

    def where(self, column: str, test: Condition) -> "Rows":
        """The rows for whose `column` ``test(values)`` is true; the test may also return their indices."""
        return replace(self, conditions=(*self.conditions, (column, test)))

    def between(self, **ends: tuple[float, float]) -> "Rows":
        """The rows in which a column lies between two values, to rounding: ``between(tau=(1, 6))``."""
        ((column, (low, high)),) = ends.items()
        return self.where(column, lambda v: (v >= low * (1 - 1e-9)) & (v <= high * (1 + 1e-9)))

    def near(self, **place: float) -> "Rows":
        """The rows in which a column is within 5 % of a value: ``near(tau=4)``.

        Forming a number of it raises InvalidValue where there are none.
        """
        ((column, value),) = place.items()

        def close(v: Array) -> NDArray[Any]:
            found = np.abs(v - value) <= NEAR * abs(value)
            if not found.any():
                raise InvalidValue(f"'{self.run}' has no row near {column} = {value}")
            return found

        return self.where(column, close)

    def at(self, **place: float | tuple[float, ...]) -> "Rows":
        """The row in which a column is nearest to a value, or those for several: ``at(tau=4)``, ``at(tau=(1, 2))``.

        Forming a number of it raises InvalidValue where the nearest is more than 5 % away.
        """
        ((column, values),) = place.items()

        def nearest(v: Array) -> NDArray[Any]:
            picked = [int(np.abs(v - value).argmin()) for value in np.ravel(values)]
            if any(abs(v[i] - value) > NEAR * abs(value) for i, value in zip(picked, np.ravel(values), strict=True)):
                raise InvalidValue(f"'{self.run}' has no row near {column} = {values}")
            return np.array(picked)

        return self.where(column, nearest)

    def __getitem__(self, column: str) -> Quantity:
        """The values of a column, over the rows that have it."""
        return self.reduce(lambda v: v, column)

    def reduce(self, function: Callable[..., Any], *columns: str) -> Quantity:
        """Apply a function to columns of each repeat, over the rows that have all of them."""

        def read(h: History, config: Any) -> dict[Repeat, Array]:
            return {key: np.asarray(function(*arrays)) for key, arrays in self._tables(h, columns).items()}

        return Quantity(read, (self.run,))

    def _tables(self, h: History, columns: tuple[str, ...]) -> dict[Repeat, tuple[Array, ...]]:
        """The columns of every repeat."""
        names = (*columns, *(column for column, _ in self.conditions))
        runs = [name for name in h.runs if name == self.run or name.startswith(f"{self.run}, seed ")]
        found: dict[Repeat, tuple[Array, ...]] = {}
        for name in runs or [self.run]:  # a run that is not there is an error of the history
            arrays = list(h.table(name, *names))
            seeds = np.zeros(len(arrays[0]))
            if "seed" in h.columns and len(h.series(name, "seed")):
                seeds, *arrays = h.table(name, "seed", *names)
            for seed in np.unique(seeds):
                own = [values[seeds == seed] for values in arrays]
                found[name.removeprefix(self.run), float(seed)] = self._chosen(own, len(columns))
        return found

    def _chosen(self, arrays: list[Array], count: int) -> tuple[Array, ...]:
        """The first `count` arrays, in the rows that meet all conditions, which are about the others."""
        for i, (_, test) in enumerate(self.conditions, start=count):
            keep = test(arrays[i])
            arrays = [v[keep] for v in arrays]
        return tuple(arrays[:count])


def run(name: str) -> Rows:
    """All rows of the run called `name`, and of its repeats under other seeds."""
    return Rows(name)
