"""Decides which steps of a run are measured: by a schedule, or by a fraction of the time of training."""

import math
from collections.abc import Callable, Sequence
from time import perf_counter

from ..autodiff.processes import Processes
from ..errors import InvalidValue
from ..optimizers.base import Stability
from ..symmetry.scale_groups import find_groups
from .finding import Finding
from .measuring import FirstLook, Measuring, first_look
from .schedules import Schedule, every_nth, never
from .time_budget import Budget, Ledger, ProbePlan, parse_fraction, plan_probe

AGREEING = 1e-3
"""Fraction of the training time that several processes may take to agree on whether to measure."""

RARELY = 100
"""Steps after which they agree at the latest."""

DEFAULT_BUDGET = "5%"
"""Fraction of the training time that measuring may take where nothing else is wanted."""


class Timetable:
    """The steps to measure, and the ledger of the seconds that this takes.

    Raises:
        ValueError: both `every` and `budget` are given, or one that makes no sense.
    """

    def __init__(self, every: int | Schedule | None, budget: float | str | None, steps: int | None) -> None:
        if every is not None and budget is not None:
            raise InvalidValue("give either every= or budget=, not both")
        self.every = every
        self.due: Schedule = never if every is None else every if callable(every) else every_nth(every)
        self.budget = (
            None if every is not None else Budget(parse_fraction(DEFAULT_BUDGET if budget is None else budget), steps)
        )
        self.ledger = Ledger()
        self.look: FirstLook | None = None
        self._stopped = False
        self._wait = 1  # steps from one agreement of several processes to the next
        self._next_agreement = 0

    def stop(self) -> None:
        """Measure no more."""
        self._stopped = True

    def is_due(self, steps: Sequence[int], prepared: bool) -> bool:
        """Say whether one of these steps, which were taken, is to be measured; with a budget, if it was `prepared`."""
        if self._stopped:
            return False
        return prepared if self.budget is not None else any(map(self.due, steps))

    def next_is_due(self, step: int, measuring: Measuring, stability: Callable[[], Stability | None]) -> bool:
        """Say whether the next `step` will be measured; with a budget, do before that what can be afforded."""
        if self._stopped or self.budget is None:
            return not self._stopped and self.due(step)
        if not self._agreed(step, measuring.objective.processes):
            return False
        if measuring.plan is None:
            if len(self.ledger.latest_steps) < 5:
                return False
            f, present = measuring.objective, stability()
            solves = 2 if present is None or present.uniform else 3  # plain and on the sphere; in the steps' metric
            measuring.follow(plan_probe(f, f.weights(), self.ledger, self.budget, solves, measuring.k))
        plan = measuring.plan
        assert plan is not None
        if measuring.groups is None and self.budget.allows_once(self.ledger, plan.groups_seconds, step):
            measuring.groups = find_groups(plan.groups_objective)
            return False  # what that took is entered first
        early = not self.ledger.most_expensive and self.look is None
        if early and self.budget.allows_look(self.ledger, step, plan):
            self.look = first_look(plan.look, step - 1, stability())
            return False
        return self.budget.allows(self.ledger, step, plan, saving=measuring.groups is None)

    def agree(self, processes: Processes) -> None:
        """Take over the ledger of the first process, so that all decide alike."""
        if processes.size > 1:
            self.ledger, self._wait = processes.first((self.ledger, self._wait))

    def _agreed(self, step: int, processes: Processes) -> bool:
        """Agree with the other processes before a decision, as often as may be; say whether it was done, or not due."""
        if processes.size == 1:
            return True
        if step < self._next_agreement:
            return False
        began = perf_counter()
        self.agree(processes)
        self._next_agreement = step + self._wait
        seconds = perf_counter() - began
        allowed = AGREEING * max(self.ledger.typical_step, 1e-9)
        self._wait = min(max(math.ceil(seconds / allowed), self._wait // 2, 1), RARELY)
        return True

    def deadline(self, step: int) -> float | None:
        """Time on the clock of `perf_counter` at which a measurement that begins now is given up; None: never."""
        if self.budget is None:
            return None
        return perf_counter() + self.budget.affordable(self.ledger, step) - self.ledger.measured

    def waiting(self, plan: ProbePlan | None) -> Finding:
        """Why there is no measurement yet, and what a first look has shown."""
        assert self.budget is not None
        trained, fraction = self.ledger.trained, self.budget.fraction
        first = math.nan if plan is None else plan.first_seconds
        numbers = {"seconds of training": trained, "fraction": fraction, "seconds of a measurement": first}
        text = "No measurement has been taken yet: "
        if plan is None:
            return Finding("waiting", text + "the plan waits for a few steps of the optimizer.", numbers)
        text += (
            f"the first takes about {first:.2g} s, and {fraction:.0%} of the training so far"
            f" are {fraction * trained:.2g} s."
        )
        if self.look is not None:
            look = self.look
            numbers |= {f"{look.name} on a few examples": look.value, "examples": float(look.examples)}
            numbers["step"] = float(look.step)
            text += (
                f" A first look on {look.examples} examples only, at step {look.step}: {look.name} was about"
                f" {look.value:.2g} there; on so few it may be far from that of all."
            )
        return Finding("waiting", text, numbers, remedy="Raise the budget, or wait.")
