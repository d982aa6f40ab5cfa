"""Schedules say at which steps of a run to measure."""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InvalidValue

Schedule = Callable[[int], bool]


def log_spaced(per_decade: int = 10) -> Schedule:
    """A schedule for `Monitor(every=...)`: steps 0, 1, 2, .. and later `per_decade` in every decade.

    >>> due = log_spaced(3)
    >>> [step for step in range(200) if due(step)]
    [0, 1, 2, 5, 10, 22, 46, 100]
    """
    if per_decade < 1:
        raise InvalidValue(f"per_decade={per_decade}: at least one measurement in a decade")

    return LogSpaced(per_decade)


@dataclass(frozen=True)
class LogSpaced:
    """A schedule of all early steps, and later of `per_decade` in every decade."""

    per_decade: int

    def __call__(self, step: int) -> bool:
        return step == 0 or self._count(step) > self._count(step - 1)

    def _count(self, step: int) -> int:
        """Count the values round(10^(i/per_decade)) that are at most `step`."""
        i = 0
        while round(10 ** (i / self.per_decade)) <= step:
            i += 1
        return i


def every_nth(n: int) -> Schedule:
    """A schedule of the steps 0, n, 2n, ..."""
    if n < 1:
        raise InvalidValue(f"every={n}: the number of steps between measurements is at least 1")
    return EveryNth(n)


def never(step: int) -> bool:
    """A schedule without steps."""
    return False


@dataclass(frozen=True)
class EveryNth:
    """A schedule of every n-th step."""

    n: int

    def __call__(self, step: int) -> bool:
        return step % self.n == 0
