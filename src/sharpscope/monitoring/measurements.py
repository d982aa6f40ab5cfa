"""Measurements as the rules of a diagnosis see them: columns of one run, constant facts, and the present moment.

r is the ratio of sharpness to its threshold.  Since the threshold changes with the learning rate, measurements are kept
as r/lr, the curvature in the metric of the steps, and compared at one rate: the present one or the largest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..records.history import History

ENOUGH = 3
"""Number of measurements from which on there is a verdict."""

SAME_RATE = 1.25
"""Factor within which learning rates count as the same."""


@dataclass(frozen=True)
class Facts:
    """Numbers that stay the same along a run: counts of weights, and the number of planned steps (None: unknown)."""

    size: int = 0
    invariant: int = 0
    defect: float = 1.0
    groups: Mapping[str, int] = field(default_factory=dict)
    null: Mapping[str, int] = field(default_factory=dict)
    decayed_null: int = 0
    pairs: tuple[str, ...] = ()  # "a -> b": what may be rescaled by c and 1/c
    steps: int | None = None
    schedule: tuple[tuple[float, float], ...] = ()  # (step, learning rate) of steps to come, where it is known
    overhead: float | None = None  # time of measuring / training, where it is newer than the last measurement
    budget: float | None = None  # fraction of the training time that measuring may take, where there is one
    groups_known: bool = True  # whether it is known which weights are invariant
    stops_gradients: bool = False  # on the way, so that training follows no gradient of one function
    observed: tuple[str, ...] = ()  # optimizers that no law of stability is known for
    decayed: Mapping[str, int] = field(default_factory=dict)  # kind of weights (`KINDS`) -> number with weight decay
    undecayed: Mapping[str, int] = field(default_factory=dict)  # and without
    one_sided: tuple[str, ...] = ()  # those of the pairs of which one side has weight decay
    kinds: Mapping[str, str] = field(default_factory=dict)  # of the layer of each tensor


@dataclass(frozen=True)
class Now:
    """The present moment of a run, later than its last measurement; None where only that is known."""

    step: int | None = None
    learning_rate: float | None = None
    largest_rate: float | None = None  # so far
    tau: float | None = None


class Measurements:
    """The columns of one run, and beside them the facts and where it is now."""

    def __init__(self, history: History, run: str, facts: Facts, now: Now | None = None) -> None:
        self.history, self.run, self.facts, self.now = history, run, facts, now or Now()

    def table(self, *names: str) -> tuple[np.ndarray, ...]:
        """The named columns over the rows that have all of them; empty where a column is missing."""
        known = all(name in self.history.columns for name in names) and self.run in self.history.runs
        return self.history.table(self.run, *names) if known else (np.empty(0),) * len(names)

    def series(self, name: str) -> np.ndarray:
        """The measured values of a column, none where there is no such column."""
        return self.table(name)[0]

    def last(self, name: str) -> float:
        """The latest value of a column; not a number where there is none."""
        values = self.series(name)
        return float(values[-1]) if len(values) else math.nan

    def late(self, name: str) -> np.ndarray:
        """The last quarter of the values of a column, at least three."""
        values = self.series(name)
        return values[-_late(len(values)) :]

    def by_group(self, name: str) -> dict[str, float]:
        """The median of the late values of the column ``name/GROUP``, by group."""
        prefix = f"{name}/"
        columns = [c for c in self.history.columns if c.startswith(prefix) and len(self.series(c))]
        return {c.removeprefix(prefix): float(np.median(self.late(c))) for c in columns}

    @cached_property
    def step(self) -> float:
        """Number of steps taken by now."""
        return self.last("step") if self.now.step is None else float(self.now.step)

    @cached_property
    def rate(self) -> float:
        """The present learning rate."""
        return self.last("learning_rate") if self.now.learning_rate is None else self.now.learning_rate

    @cached_property
    def largest_rate(self) -> float:
        """The largest learning rate so far."""
        known = [*self.series("learning_rate"), self.rate, self.now.largest_rate or 0.0]
        return float(np.nanmax(known)) if known else math.nan

    @cached_property
    def tau(self) -> float:
        """Time in which weight decay has acted by now."""
        return self.last("tau") if self.now.tau is None else self.now.tau

    @cached_property
    def curvature(self) -> tuple[np.ndarray, ...]:
        """Steps, ratios r and learning rates of the measurements of the curvature, at positive rates."""
        steps, ratios, rates = self.table("step", "stability_ratio", "learning_rate")
        moving = rates > 0
        return steps[moving], ratios[moving], rates[moving]

    @cached_property
    def window(self) -> slice:
        """The late measurements of the curvature: the last quarter, at least three; none before the first step."""
        steps = self.curvature[0]
        after_start = int((steps > 0).sum())
        return slice(len(steps) - min(after_start or len(steps), _late(after_start)), len(steps))

    @cached_property
    def count(self) -> int:
        """Number of late measurements of the curvature after the first step."""
        return int((self.curvature[0][self.window] > 0).sum())

    @property
    def age(self) -> float:
        """Steps since the last measurement of the curvature."""
        return self.step - float(self.curvature[0][-1]) if len(self.curvature[0]) else math.inf

    @property
    def stale(self) -> bool:
        """True where the last measurement is older than two spaces between measurements, and a tenth of the run."""
        steps = self.curvature[0]
        gap = steps[-1] - steps[-2] if len(steps) > 1 else 0.0
        return bool(self.age > max(2 * gap, self.step / 10))

    @property
    def decided(self) -> bool:
        """True where there are enough measurements, and not too old ones, to speak of the present."""
        return self.count >= ENOUGH and not self.stale

    def at_rate(self, rate: float) -> np.ndarray:
        """The measured ratios as they are at another learning rate: the threshold is taken to go as its inverse."""
        _, ratios, rates = self.curvature
        return ratios * (rate / rates)

    @property
    def ratio(self) -> float:
        """The median of the late r at the present rate; not a number where there is none."""
        late = self.at_rate(self.rate)[self.window]
        return float(np.median(late)) if len(late) else math.nan

    @property
    def stable_rate(self) -> float:
        """The median of the late lr/r, the largest stable rate; not a number where no curvature is positive."""
        late = self.at_rate(1.0)[self.window]
        median = float(np.median(late)) if len(late) else math.nan
        return 1 / median if median > 0 else math.nan

    @property
    def varied(self) -> bool:
        """True where the learning rate has changed since the first measurement."""
        rates = self.series("learning_rate")
        return bool(len(rates) and np.ptp([*rates, self.rate, self.largest_rate]) > 1e-6 * self.largest_rate)

    @property
    def steady(self) -> bool:
        """True where the late measurements were taken at about the present learning rate."""
        rates = [*self.curvature[2][self.window], self.rate]
        return max(rates) <= SAME_RATE * min(rates)

    @property
    def late_losses(self) -> np.ndarray:
        """The finite ones of the late losses, as far as they were measured at about the present learning rate."""
        losses, rates = self.table("loss", "learning_rate")
        late = slice(-_late(len(losses)), None)
        kept = np.isfinite(losses[late]) & np.isclose(rates[late], self.rate, rtol=SAME_RATE - 1)
        return losses[late][kept]

    def when(self, name: str = "") -> str:
        """Say how many late measurements a number rests on, and of which steps; of a column, or of the curvature."""
        if name:
            steps = self.table("step", name)[0]
            steps = steps[-_late(len(steps)) :]
        else:
            steps = self.curvature[0][self.window]
        if not len(steps):
            return "no measurement"
        if len(steps) == 1:
            text = f"one measurement, at step {steps[0]:.0f}"
        else:
            text = f"{len(steps)} measurements, steps {steps[0]:.0f} to {steps[-1]:.0f}"
        age = self.step - steps[-1]
        return f"{text}, {ago(age)}" if age > 0 else text

    @property
    def steps_left(self) -> float:
        """Number of steps that are still planned; not a number where it is unknown."""
        return math.nan if self.facts.steps is None else max(self.facts.steps - self.step, 0.0)

    @cached_property
    def coming(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps from now on and their learning rates, where the schedule is known."""
        points = [(s, lr) for s, lr in self.facts.schedule if s >= self.step]
        steps, rates = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, rates

    @property
    def peak_ahead(self) -> tuple[float, float]:
        """Step and value of the largest learning rate that is still to come; not numbers where that is unknown.

        Where the end of the run is unknown, up to where the rate falls next: it may end there.
        """
        steps, rates = self.coming
        if self.facts.steps is None and len(rates):
            rising = int(np.argmax(np.append(np.diff(rates) < 0, True))) + 1
            steps, rates = steps[:rising], rates[:rising]
        return (float(steps[rates.argmax()]), float(rates.max())) if len(rates) else (math.nan, math.nan)

    @property
    def tau_at_end(self) -> float:
        """Intrinsic time τ after all planned steps.

        By the schedule, or at a rate that never changed; not a number where neither is known.
        """
        per_step, rate = self.last("intrinsic_time_per_step"), self.last("learning_rate")
        if not self.steps_left >= 0:
            return math.nan
        if self.steps_left == 0:
            return self.tau
        if len(self.coming[0]) > 1 and rate > 0:
            return self.tau + per_step / rate * float(np.trapezoid(self.coming[1], self.coming[0]))
        return math.nan if self.varied else self.tau + per_step * self.steps_left


def ago(steps: float) -> str:
    """Say how many steps ago something was."""
    return f"{steps:.0f} step{'' if steps == 1 else 's'} ago"


def _late(count: int) -> int:
    """Number of late ones among so many."""
    return max(ENOUGH, count // 4)
