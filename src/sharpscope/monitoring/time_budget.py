"""When to measure a running training: at chosen steps, or as often as a share of its time allows.

Measurements are paid in seconds.  With a share b, and c seconds for the dearest reading so far, there is one when

    measured + c ≤ b · trained

so that the share is kept at every moment.  Where the number N of steps is known, and with it the time the whole
training will take, the share is kept at the end instead.  The first reading, which has to find everything, may take
half of all that may be spent, B = b · whole, so that the beginning is seen too; what it leaves is spread over the steps
t, with c' seconds for the dearest of the latest readings and m₁ for what had been spent after the first one:

    measured + c ≤ B,       measured + c' ≤ m₁ + (B - m₁) t/N

A reading that takes longer than it may is given up.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from torch import Tensor

from ..autodiff.data import examples, head
from ..autodiff.objective import Expand, Expansion, Objective
from ..errors import InvalidValue, OutOfTime

SAFETY = 0.9
"""Part of the share that is planned with."""

READINGS = 24
"""Measurements that a plan wants to afford in the steps of the run (1000 where they are not known)."""

LEAST, MOST = 16, 4096
"""Examples that a planned probe holds at least, if there are as many, and at most."""

PRODUCT, GROUPS = 1.5, 3.0
"""Cost of a product, and of one of the gradients of `find_groups` (in double precision), in gradients, for the plan."""

ASKED = 8
"""Examples on which `find_groups` is asked."""


def share_of(budget: float | str) -> float:
    """A share as a number, from a number or a percentage.

    >>> share_of("5%"), share_of(0.02)
    (0.05, 0.02)
    """
    try:
        share = float(budget.rstrip("% ")) / 100 if isinstance(budget, str) and "%" in budget else float(budget)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise InvalidValue(f"budget={budget!r}: give the share of the training time as '5%' or .05, at most 1")
    return share


@dataclass
class Ledger:
    """Seconds of training and of measuring so far."""

    steps: int = 0  # that were timed
    trained: float = 0.0
    measured: float = 0.0
    dearest: float = 0.0  # reading
    begun: float = 0.0  # measuring up to the end of the first reading
    readings: deque[float] = field(default_factory=lambda: deque(maxlen=8))  # seconds of the latest, but for the first
    lately: deque[float] = field(default_factory=lambda: deque(maxlen=32))  # seconds of single steps

    def note(self, seconds: float) -> None:
        """A reading has taken so long."""
        if self.dearest:
            self.readings.append(seconds)
        else:
            self.begun = self.measured + seconds
        self.dearest = max(self.dearest, seconds)

    def stepped(self, seconds: float, steps: int) -> None:
        """So many steps of training have taken so long."""
        self.steps, self.trained = self.steps + steps, self.trained + seconds
        self.lately.append(seconds / steps)

    @property
    def overhead(self) -> float:
        """Time of measuring over time of training."""
        return self.measured / self.trained if self.trained else 0.0

    @property
    def typical(self) -> float:
        """Seconds of a step: the median of the latest, or the mean of all if that is less."""
        return min(median(self.lately), self.trained / self.steps) if self.lately else 0.0


@dataclass(frozen=True)
class Budget:
    """A share of the time of training, which is planned to last `steps` steps (None: nobody knows)."""

    share: float
    steps: int | None = None

    def allows(self, ledger: Ledger, step: int, first: float, usual: float) -> bool:
        """Whether there is a reading at `step`; `first` and `usual` are seconds expected where none was seen yet."""
        dearest = ledger.dearest or first
        if self.steps is None or not ledger.dearest:
            part = 1 if self.steps is None else 2
            return ledger.measured + dearest <= max(self.whole(ledger) / part, SAFETY * self.share * ledger.trained)
        whole = self.whole(ledger)
        coming = max(ledger.readings, default=usual)
        spread = ledger.begun + (whole - ledger.begun) * step / self.steps
        return ledger.measured + coming <= spread and ledger.measured + dearest <= whole

    def affords(self, ledger: Ledger, step: int, cost: float) -> bool:
        """Whether something that is done once, after the first reading, may be done now."""
        half = ledger.begun + (self.whole(ledger) - ledger.begun) / 2
        return bool(ledger.dearest) and ledger.measured + cost <= max(half, SAFETY * self.share * ledger.trained)

    def whole(self, ledger: Ledger) -> float:
        """Seconds that measuring may take until the end, or until now where nobody knows the end."""
        coming = 0 if self.steps is None else max(self.steps - ledger.steps, 0)
        return SAFETY * self.share * (ledger.trained + ledger.typical * coming)

    def seconds(self, ledger: Ledger) -> float:
        """What may be spent in the whole run, or in 1000 steps."""
        return 0.8 * self.share * ledger.typical * (self.steps or 1000)


@dataclass(frozen=True)
class Plan:
    """What is measured: `objective` on a number of examples, and k eigenpairs."""

    objective: Objective
    examples: int
    full: bool  # all quantities, or only those that one eigenvalue problem gives
    k: int
    first: float  # seconds that the first reading is expected to take
    usual: float  # and each of the others
    asking: Objective  # of which weights are invariant: a few examples will do
    answer: float  # seconds that this is expected to take


def plan(f: Objective, w: Tensor, ledger: Ledger, budget: Budget, solves: int, k: int) -> Plan:
    """The largest probe, and the most quantities, with which `READINGS` readings fit into the budget.

    A gradient of n examples is taken to cost a + c n seconds, from one of 4 and one of 16 examples.  Where not even the
    least probe fits, there will be fewer readings.
    """
    seconds = {n: _gradient_seconds(f, w, n) for n in (4, 16)}
    slope = max(seconds[16] - seconds[4], 0.0) / 12
    fixed = max(seconds[4] - 4 * slope, 0.0)
    most = head(f.data, MOST)
    total = sum(map(examples, most))
    allowed = budget.seconds(ledger)

    def cost(pairs: int) -> tuple[float, float]:
        """Gradients of the first reading, and of all."""
        first = 4 + 25 * PRODUCT * pairs
        return first, first + READINGS * (2 + 6 * PRODUCT * pairs)

    def fitting(pairs: int) -> int:
        room = allowed / cost(pairs)[1] - fixed
        return total if room >= slope * total else int(room / slope) if slope > 0 else 0

    least = min(LEAST, total)
    choices = ((solves > 1, k), (solves > 1, 1), (False, 1))
    full, pairs = next((c for c in choices if fitting(_pairs(*c, solves)) >= min(4 * least, total)), choices[-1])
    n = min(max(fitting(_pairs(full, pairs, solves)), least), total)
    first, all_of_them = (c * (fixed + slope * n) for c in cost(_pairs(full, pairs, solves)))
    asked = min(ASKED, total)
    answer = GROUPS * (12 + len(f.slices)) * (fixed + slope * asked)
    usual = (all_of_them - first) / READINGS
    return Plan(f.on(head(most, n)), n, full, pairs, first, usual, f.on(head(most, asked)), answer)


def limited(expand: Expand, deadline: float) -> Expand:
    """Products in the way of `expand`, up to a time on the clock of `perf_counter`."""

    def limited_expand(f: Objective, w: Tensor) -> Expansion:
        at = expand(f, w)
        product = at.hvp

        def hvp(v: Tensor) -> Tensor:
            if perf_counter() > deadline:
                raise OutOfTime("a reading was given up: it took longer than the budget allows")
            return product(v)

        at.hvp = hvp  # type: ignore[method-assign]
        at.together = False
        return at

    return limited_expand


def _pairs(full: bool, k: int, solves: int) -> int:
    return k * (solves if full else 1)


def _gradient_seconds(f: Objective, w: Tensor, n: int) -> float:
    """Of n examples, the second time."""
    small = f.on(head(f.data, n))
    small.grad(w)
    began = perf_counter()
    small.grad(w).sum().item()  # waits for the device
    return perf_counter() - began
