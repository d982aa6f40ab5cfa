"""Plans what measuring may cost, so that a fraction of the time of training is enough.

Measurements are paid in seconds.  With a fraction b, and c seconds for the most expensive of the latest measurements,
there is one after t steps when

    measured + c ≤ b · (trained + s · max(G - t, 0)),        G = 200

with s seconds for a short step: the first steps are given an advance, so that the beginning is seen too, and from step
G on the fraction is kept at every moment.  What the first measurement leaves of the advance is spread over these steps.
An expensive measurement is made up for before the next.  One that takes longer than it may is given up.  Until the
scale-invariant groups are found, half of what measuring may cost is saved for that.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.data import head
from ..autodiff.expansion import Expansion
from ..autodiff.objective import Expand, Objective
from ..errors import InvalidValue, OutOfTime
from ..linalg.operators import Linear
from ..measures.iterate import LARGE

SAFETY = 0.9
"""Part of the time budget that is planned with."""

ADVANCE = 200
"""Number of steps whose share of the budget may be spent at once."""

PLANNED_MEASUREMENTS = 24
"""Measurements that a plan wants to afford in the steps of the run (1000 where they are not known)."""

MIN_EXAMPLES = 16
"""The least number of examples of a planned probe, if there are as many."""

FEWEST_EXAMPLES = 4
"""Number of examples at least where the first measurement could not be afforded in the first steps otherwise."""

MAX_EXAMPLES = 4096
"""The largest number of examples of a planned probe."""

PRODUCT_COST = 1.5
"""Cost of a product with the Hessian in gradients, for the plan."""

LOOK_EXAMPLES = 4
"""Number of examples of a first look, which comes before a far dearer first measurement; two where these cost much."""

LOOK_COST = 10.0
"""Cost of a first look in gradients of so many examples."""

GROUPS_COST = 3.0
"""Cost of one of the gradients of `find_groups`, which are in double precision, in gradients of the plan."""

GROUPS_EXAMPLES = 8
"""Number of examples on which `find_groups` runs."""

LARGE_GROUPS = (50, 4)
"""Number of the gradients of `find_groups` on a large model, and the number of examples of most of them."""

LARGE_COSTS = (9, 5, 2.0)
"""Products for an eigenvalue of a large model, in the first and in a later measurement, and the cost of one."""


def parse_fraction(budget: float | str) -> float:
    """Read a fraction of the training time from a number or a percentage.

    >>> parse_fraction("5%"), parse_fraction(0.02)
    (0.05, 0.02)
    """
    try:
        fraction = float(budget.rstrip("% ")) / 100 if isinstance(budget, str) and "%" in budget else float(budget)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise InvalidValue(f"budget={budget!r}: give the fraction of the training time as '5%' or .05, at most 1")
    return fraction


@dataclass
class Ledger:
    """Seconds of training and of measuring so far."""

    steps: int = 0  # that were timed
    trained: float = 0.0
    measured: float = 0.0
    most_expensive: float = 0.0  # measurement so far
    measured_at_first: float = 0.0  # measuring up to the end of the first measurement
    latest_measurements: deque[float] = field(default_factory=lambda: deque(maxlen=8))  # seconds, without the first
    latest_steps: deque[float] = field(default_factory=lambda: deque(maxlen=32))  # seconds of single steps

    def add_measurement(self, seconds: float) -> None:
        """Enter the time of a measurement."""
        self.measured += seconds
        if self.most_expensive:
            self.latest_measurements.append(seconds)
        else:
            self.measured_at_first = self.measured
        self.most_expensive = max(self.most_expensive, seconds)

    def add_steps(self, seconds: float, steps: int) -> None:
        """Enter the time of so many steps of training."""
        self.steps += steps
        self.trained += seconds
        self.latest_steps.append(seconds / steps)

    @property
    def overhead(self) -> float:
        """Time of measuring over time of training."""
        return self.measured / self.trained if self.trained else 0.0

    @property
    def typical_step(self) -> float:
        """Seconds of a step: the median of the latest, or the mean of all if that is less."""
        return min(median(self.latest_steps), self.trained / self.steps) if self.latest_steps else 0.0

    @property
    def short_step(self) -> float:
        """Seconds that hardly a step is shorter than: the lower tenth of the latest, or the mean of all if less."""
        tenth = sorted(self.latest_steps)[: len(self.latest_steps) // 10 + 1]
        return min(tenth[-1], self.trained / self.steps) if tenth else 0.0


@dataclass(frozen=True)
class ProbePlan:
    """The data and the quantities to measure: `objective` on a number of examples, and k eigenpairs."""

    objective: Objective
    examples: int
    full: bool  # all quantities, or only those that one eigenvalue problem gives
    k: int
    first_seconds: float  # that the first measurement is expected to take
    usual_seconds: float  # that each of the others is expected to take
    groups_objective: Objective  # for finding the scale-invariant groups: a few examples will do
    groups_seconds: float  # that finding them is expected to take
    look: Objective  # for a first look
    look_seconds: float  # that it is expected to take


@dataclass(frozen=True)
class Budget:
    """A fraction of the time of training, which is planned to last `steps` steps (None: unknown)."""

    fraction: float
    steps: int | None = None

    @property
    def advance(self) -> int:
        """Number of first steps whose part of the budget may be spent at once."""
        return min(ADVANCE, self.steps or ADVANCE)

    def allows(self, ledger: Ledger, step: int, plan: ProbePlan, *, saving: bool = False) -> bool:
        """Say whether to measure at `step`; the plan's expected seconds count where none were seen yet.

        If `saving`, half of what was left after the first measurement is kept for finding the groups.
        """
        affordable = self.affordable(ledger, step)
        if not ledger.most_expensive:
            return ledger.measured + plan.first_seconds <= affordable
        part = min(step / self.advance, 1.0) * (0.5 if saving else 1.0)
        affordable = ledger.measured_at_first + part * max(affordable - ledger.measured_at_first, 0.0)
        coming = max(ledger.latest_measurements, default=plan.usual_seconds)
        return ledger.measured + coming <= affordable

    def allows_look(self, ledger: Ledger, step: int, plan: ProbePlan) -> bool:
        """Say whether there is time for a first look, where the first measurement takes far longer."""
        left = self.affordable(ledger, step) - ledger.measured
        return plan.look_seconds <= min(left, plan.first_seconds / 3)

    def allows_once(self, ledger: Ledger, seconds: float, step: int) -> bool:
        """Say whether something that is done once, after the first measurement, may be done now."""
        return bool(ledger.most_expensive) and ledger.measured + seconds <= self.affordable(ledger, step)

    def affordable(self, ledger: Ledger, step: int) -> float:
        """Seconds that measuring may take until now, with the advance of the first steps.

        The first steps are as a rule slower than those that the advance is to be paid from.
        """
        ahead = max(self.advance - step, 0)
        return SAFETY * self.fraction * (ledger.trained + ledger.short_step * ahead)

    def planned(self, ledger: Ledger) -> float:
        """Seconds that a plan may spend in the whole run, or in 1000 steps."""
        return 0.8 * self.fraction * ledger.typical_step * (self.steps or 1000)


def plan_probe(f: Objective, w: Tensor, ledger: Ledger, budget: Budget, solves: int, k: int) -> ProbePlan:
    """Plan the largest probe, and the most quantities, with which `PLANNED_MEASUREMENTS` fit into the budget.

    A gradient of n examples is taken to cost a + c n seconds, from one of 2 and one of 8 examples.  Where not even the
    least probe fits, there will be fewer measurements.  Of several processes the clock of the first counts, and the
    plan is made for the one with the most examples.
    """
    largest: list[Any] = []
    totals = f.processes.each(lambda: _read(f, largest))
    seconds = f.processes.first({n: _gradient_seconds(f, w, n) for n in (2, 8)})
    slope = max(seconds[8] - seconds[2], 0.0) / 6
    fixed = max(seconds[2] - 2 * slope, 0.0)
    total = max(totals)
    allowed = budget.planned(ledger)

    large = f.size >= LARGE and k == 1
    cold, warm, product = LARGE_COSTS if large else (25, 6, PRODUCT_COST)

    def cost(pairs: int) -> tuple[float, float]:
        """Gradients of the first measurement, and of all."""
        first = 4 + cold * product * pairs
        return first, first + PLANNED_MEASUREMENTS * (2 + warm * product * pairs)

    def fitting(pairs: int) -> int:
        """Examples with which all measurements fit into the budget."""
        room = allowed / cost(pairs)[1] - fixed
        return total if room >= slope * total else int(room / slope) if slope > 0 else 0

    least = min(MIN_EXAMPLES, total)
    choices = ((solves > 1, k), (solves > 1, 1), (False, 1))
    full, pairs = next((c for c in choices if fitting(_pairs(*c, solves)) >= min(4 * least, total)), choices[-1])
    n = min(max(fitting(_pairs(full, pairs, solves)), least), total)
    first, all_of_them = cost(_pairs(full, pairs, solves))
    if n == least and slope > 0:  # fewer, where the first measurement would have to wait for long
        affordable = 0.7 * budget.affordable(ledger, ledger.steps) - ledger.measured
        n = min(n, max(int((affordable / first - fixed) / slope), min(FEWEST_EXAMPLES, total)))
    first, all_of_them = first * (fixed + slope * n), all_of_them * (fixed + slope * n)
    few = LOOK_EXAMPLES if LOOK_COST * (fixed + slope * LOOK_EXAMPLES) < allowed / PLANNED_MEASUREMENTS else 2
    gradients, at_once = LARGE_GROUPS if large else (12 + len(f.slices), GROUPS_EXAMPLES)
    return ProbePlan(
        objective=f.on(head(largest, n, f.form)),
        examples=sum(min(n, own) for own in totals),
        full=full,
        k=pairs,
        first_seconds=first,
        usual_seconds=(all_of_them - first) / PLANNED_MEASUREMENTS,
        groups_objective=f.on(head(largest, min(GROUPS_EXAMPLES, total), f.form)),
        groups_seconds=GROUPS_COST * gradients * (fixed + slope * min(at_once, total)),
        look=f.on(head(largest, few, f.form)),
        look_seconds=LOOK_COST * (fixed + slope * min(few, total)),
    )


def _read(f: Objective, taken: list[Any]) -> int:
    """Read the batches that a probe is taken from; return the number of their examples."""
    taken += head(f.source, MAX_EXAMPLES, f.form)
    return sum(map(f.form.size, taken))


def limited(expand: Expand, deadline: float) -> Expand:
    """Form products with the backend `expand`, up to a time on the clock of `perf_counter`."""

    def limited_expand(f: Objective, w: Tensor) -> Expansion:
        at = expand(f, w)

        def in_time(product: Linear) -> Linear:
            def limited_product(v: Tensor) -> Tensor:
                if perf_counter() > deadline:
                    raise OutOfTime("a measurement was given up: it took longer than the budget allows")
                return product(v)

            return limited_product

        return replace(at, hvp=in_time(at.hvp), drafts=tuple(map(in_time, at.drafts)))

    return limited_expand


def wait_for_device(optimizer: Optimizer) -> float:
    """Wait until all that was sent to the device of the weights is done; return the seconds that this took."""
    device = next(p for group in optimizer.param_groups for p in group["params"]).device
    if device.type != "cuda":
        return 0.0
    began = perf_counter()
    torch.cuda.synchronize(device)
    return perf_counter() - began


def _pairs(full: bool, k: int, solves: int) -> int:
    return k * (solves if full else 1)


def _gradient_seconds(f: Objective, w: Tensor, n: int) -> float:
    """Time the second of two gradients on n examples."""
    small = f.on(head(f.source, n, f.form))
    small.grad(w)
    began = perf_counter()
    small.grad(w).sum().item()  # waits for the device
    return perf_counter() - began
