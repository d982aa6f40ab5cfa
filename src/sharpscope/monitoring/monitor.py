"""Monitor: measures a running training loop without changing it.

It decides when to measure, keeps the vectors that make the next measurement cheap, and collects the history.

P parameters.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidType, InvalidValue, NotConverged, NotFinite
from ..linalg.memory import Memory
from ..linalg.operators import without_autocast
from ..measures import measures
from ..measures.iterate import LARGE, Iterate, midpoint
from ..measures.row import Setting, angles, curvature
from ..optimizers.base import UpdateRule
from ..optimizers.from_torch import unwrapped, wrapped
from ..records.history import History
from ..report.html import write_page
from ..symmetry.scale_groups import ScaleGroups, find_groups
from .diagnosis import Facts, Finding, diagnose
from .memory_plan import MemoryPlan, free_bytes, plan_memory
from .meters import Meter, Meters, Step
from .optimizer_state import OptimizerState
from .page import render_run
from .recorder import RUN, Recorder, Sink
from .schedules import Schedule, every_nth, never
from .time_budget import (
    Budget,
    FirstLook,
    Ledger,
    ProbePlan,
    limited,
    parse_fraction,
    plan_probe,
    wait_for_device,
    waiting,
)

UNKNOWN_GROUPS = ScaleGroups({}, {}, {}, torch.empty(0, dtype=torch.long), 1.0)
"""The scale-invariant groups before `find_groups` has run."""


ROUGH = 0.05
"""Estimated relative error of eigenvalues of large models, those of at least `LARGE` weights."""

UNREPORTED_STEPS = 100
"""Steps of the optimizer after which a Monitor that was never called says so."""

MOST_FAILURES = 3
"""Measurements in a row that may fail before no more are taken."""


class Monitor:
    """Measures `objective` along the steps of `optimizer`.

    Args:
        objective: loss of the model that is being trained, on data that stay the same (a few fixed batches will do).
        optimizer: the live optimizer, with any parameter groups; its hyper-parameters are read at every measurement, so
            schedules are followed.  Its real steps are counted, so that gradients may be accumulated and steps skipped.
        every: steps between measurements, or a function from the step to whether it is measured (`log_spaced`).
        budget: instead of `every`, the fraction of the training time that measuring may take ("5%", or .05): how often,
            on how many of the objective's examples and how many quantities are measured is planned after a few steps,
            from the times of a step and of gradients.
        steps: how many steps the run will take, where that is known; what is reported of its end needs it.
        point: where to measure, from the weights before and after the last step; `midpoint` removes the
            oscillation of the edge of stability from the measurement.
        k: eigenvalues to follow; those after the first are the columns sharpness2, sharpness3, ...
        rule: overrides what is read from the optimizer, for all its parameters.
        meters: what else to read along the steps, each at its own pace; their columns stand in the history.
        sinks: functions ``(step, values)`` that get the numbers of every measurement, such as those of `integrations`.
        directory: where rows are written as they come, for ``sharpscope watch``.

    Raises:
        TypeError: no rule describes the optimizer.
        ValueError: it does not train the objective's parameters; an argument that makes no sense.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> f = Objective(net, torch.nn.functional.mse_loss, [(torch.randn(16, 4), torch.randn(16, 1))])
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> monitor = Monitor(f, sgd, every=5)
    >>> for _ in range(10):
    ...     sgd.zero_grad()
    ...     f.loss(net(f.data[0][0]), f.data[0][1]).backward()
    ...     sgd.step()
    ...     monitor.step()
    >>> monitor.history.series("training", "step").tolist()
    [0.0, 5.0, 10.0]
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        *,
        every: int | Schedule | None = None,
        budget: float | str | None = None,
        steps: int | None = None,
        point: Callable[[Tensor, Tensor], Tensor] = midpoint,
        k: int = 1,
        rule: UpdateRule | None = None,
        meters: Sequence[Meter] = (),
        sinks: Sequence[Sink] = (),
        directory: str | Path | None = None,
    ) -> None:
        _check(objective, every, budget, steps)
        began = perf_counter()
        self.objective = objective
        self.optimizer = optimizer = unwrapped(optimizer)
        self.point = point
        self.k = k
        self._every = 20 if every is None else every
        self._due = self._every if callable(self._every) else every_nth(self._every)
        self.budget = None if budget is None else Budget(parse_fraction(budget), steps)
        self.steps = 0
        self.planned_steps = steps
        self.tau = 0.0
        self.ledger = Ledger()
        self.plan: ProbePlan | None = None
        self._fixed_rule = rule
        self.optimizer_state = OptimizerState(optimizer, objective, rule)
        self.recorder = Recorder(sinks, directory)
        self._groups: ScaleGroups | None = None
        self._memories: dict[str, Memory] = {}
        self._directions: dict[str, Tensor] = {}  # top eigenvectors of large models
        self.first_look: FirstLook | None = None
        self._turn = 0  # which of the quantities of a large model were measured last
        self._fitted: MemoryPlan | None = None  # what of the objective fits into memory
        self._at_start: tuple[Tensor, Setting] | None = None  # a measurement of step 0 that has not been taken yet
        self._weights_before: tuple[int, Tensor] | None = None  # weights after that many steps
        self._setting_at: tuple[int, Setting] | None = None  # how the optimizer was set when it took that step
        self._steps_handled = 0
        self._training_seconds = 0.0  # since the last handled step
        self._unseen = 0  # changes of the weights without a step that was counted
        self._versions = self._weight_versions()
        self._failures = 0  # of measurements, one after the other
        self._meters = Meters(meters)
        self._read: dict[str, float] = {}  # by the meters, at the step that is being handled
        self._hooks = self._watch(optimizer)
        if self.budget is None:
            self._weights_before = (0, objective.weights())
            if self._due(0):
                self._at_start = (self._weights_before[1], self.optimizer_state.setting())
        self.resumed = perf_counter()  # when the training went on after measuring
        self.ledger.measured += self.resumed - began

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close("" if error is None else f"{type(error).__name__}: {error}")

    def close(self, note: str = "") -> None:
        """Stop watching the optimizer; a run on disk is marked as finished."""
        for hook in self._hooks:
            hook.remove()
        self._measure_start()
        self.recorder.close(note)

    @property
    def history(self) -> History:
        """The rows so far; the one of step 0 is measured when it is first looked at, or after the first step."""
        self._measure_start()
        return self.recorder.history

    @property
    def rule(self) -> UpdateRule | None:
        """The present rule of the scale-invariant weights, or of most weights where there are none.

        None while their learning rate is zero, as at the ends of a schedule.
        """
        return self.optimizer_state.rule

    @property
    def groups(self) -> ScaleGroups:
        """The scale-invariant groups: found at the first measurement or, with a budget, when it allows; none before."""
        if self._groups is None and self.budget is None:
            self._use_groups(find_groups(self.objective))
        return UNKNOWN_GROUPS if self._groups is None else self._groups

    @property
    def measured(self) -> Objective:
        """The objective that is measured: the part of the given one that was planned with a budget, or fits."""
        if self.plan is not None:
            return self.plan.objective
        fitted = None if self._fitted is None else self._fitted.objective
        return self.objective if fitted is None else fitted

    @property
    def overhead(self) -> float:
        """Time of measuring over time of training, so far."""
        return self.ledger.overhead

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hooks = self._watch(self.optimizer)

    def step(self, loss: float | Tensor | None = None, batch: Any = None) -> None:
        """Call this after every step of the optimizer.

        Some meters read the `loss` of the step's batch, as it was before the step, and the `batch` itself, in the form
        of the objective's own.
        """
        began = perf_counter()
        self._training_seconds += began - self.resumed
        self._measure_start()
        self._notice_changes()
        if self.steps > self._steps_handled:
            taken = range(self._steps_handled + 1, self.steps + 1)
            self._steps_handled = self.steps
            due = self._is_due(taken)
            waited = wait_for_device(self.optimizer) if due else 0.0  # still time of training
            began += waited
            self.ledger.add_steps(self._training_seconds + waited, len(taken))
            self._training_seconds = 0.0
            self._read_meters(loss, batch)
            if due:
                self._measure_safely()
                self.ledger.add_measurement(perf_counter() - began)
            if self._read:
                self.recorder.append(self.steps, self._taken())
            self._weights_before = (self.steps, self.objective.weights()) if self._next_is_due_safely() else None
        self.resumed = perf_counter()
        self.ledger.measured += self.resumed - began

    def measure(self, w: Tensor) -> Iterate:
        """Measure at `w` now, whatever the schedule, and add a row to the history.

        A run is never stopped by being watched: where the loss or a product with its Hessian is not finite, or the
        solver does not converge, the row has no curvature.
        """
        self._measure_start()
        return self._measure(w, None, None)

    def findings(self) -> list[Finding]:
        """Diagnose this run from the measurements so far; each finding has its numbers and its source."""
        if self._uncounted:
            return [self._uncounted]
        if self.budget is not None and not len(self.history):
            return [waiting(self.budget, self.ledger, self.plan, self.first_look)]
        return diagnose(self.history, RUN, self.facts)

    def diagnosis(self) -> str:
        """The findings as sentences, one a line."""
        return "\n".join(map(str, self.findings()))

    def report(self, path: str | Path) -> Path:
        """Write the measurements so far as one self-contained HTML page."""
        return write_page(path, render_run(self.history, self.facts, self._config()))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts: with them a resumed run goes on as if it had not stopped."""
        ledger, before = self.ledger, self._weights_before
        return {
            "steps": self.steps,
            "tau": self.tau,
            "rows": [{n: value for n, value in row.items() if value is not None} for row in self.history.rows],
            "memories": {name: memory.tensors() for name, memory in self._memories.items()},
            "directions": {name: v.cpu() for name, v in self._directions.items()},
            "before": None if before is None else [before[0], before[1].cpu()],
            "groups": None if self._groups is None else asdict(self._groups),
            "turn": self._turn,
            "seconds": [ledger.steps, ledger.trained, ledger.measured, ledger.most_expensive],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; rows on disk become those of the state."""
        like = self.objective.weights()
        self.steps = self._steps_handled = state["steps"]
        self.tau = state["tau"]
        self._memories = {name: Memory.of(tensors).to(like) for name, tensors in state["memories"].items()}
        self._directions = {name: v.to(like) for name, v in state.get("directions", {}).items()}
        self._at_start, self._turn = None, state.get("turn", 0)
        self._weights_before = None if state["before"] is None else (state["before"][0], state["before"][1].to(like))
        self._use_groups(None if state["groups"] is None else ScaleGroups(**state["groups"]))
        self.ledger = Ledger(*state["seconds"])
        self.recorder.restore(state["rows"])
        self._describe()

    @property
    def facts(self) -> Facts:
        """The counts and other numbers that stay the same along the run."""
        found, decayed = self.groups, self.optimizer_state.decayed
        null = {name: len(i) for name, i in found.null.items()}
        return Facts(
            size=self.objective.size,
            invariant=found.joint.numel(),
            defect=found.joint_defect,
            groups={name: len(i) for name, i in found.groups.items()},
            null=null,
            decayed_null=sum(n for name, n in null.items() if name.partition("[")[0] in decayed),
            pairs=tuple(found.pairs),
            steps=self.planned_steps,
            overhead=self.overhead if self.ledger.trained else None,
            groups_known=self._groups is not None,
            stops_gradients=not self.objective.follows_gradient,
        )

    def _watch(self, optimizer: Optimizer) -> list[Any]:
        """Be called before and after every step of an optimizer."""
        inside = wrapped(optimizer)
        hooks = [inside.register_step_post_hook(self._stepped)]
        return [*hooks, inside.register_step_pre_hook(self._stepping)] if self._meters else hooks

    def _stepping(self, optimizer: Optimizer, *_: Any) -> None:
        """Let the meters look at what a step starts from."""
        began = perf_counter()
        self._meters.before(self.steps + 1, optimizer, self.objective)
        self._not_training(perf_counter() - began)

    def _not_training(self, seconds: float) -> None:
        """Enter seconds of measuring that lie within the time of training."""
        self.resumed += seconds
        self.ledger.measured += seconds

    def _read_meters(self, loss: float | Tensor | None, batch: Any) -> None:
        """Read the meters that are due at this step."""
        if self._meters:
            number = loss.item() if isinstance(loss, Tensor) else loss
            self._read = self._meters.read(Step(self.steps, self.objective, number, batch))

    def _taken(self) -> dict[str, float]:
        """Take what the meters have read, once."""
        taken, self._read = self._read, {}
        return taken

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """Count a real step of the optimizer, and advance the intrinsic time."""
        began = perf_counter()
        self.steps += 1
        self._meters.after(self.steps, optimizer, self.objective)
        rule = self.optimizer_state.rule
        self.tau += rule.intrinsic_time_per_step if rule and rule.intrinsic_time_per_step > 0 else 0.0
        if self._is_due((self.steps,)):
            self._setting_at = (self.steps, self.optimizer_state.setting())
        self._not_training(perf_counter() - began)

    @property
    def _uncounted(self) -> Finding | None:
        """Why there is nothing to say about the steps of this run, where none was seen, or where none was reported."""
        if self.steps == 0 and self._unseen > 0:
            text = (
                f"No step of {type(self.optimizer).__name__} was counted, though the weights have changed"
                f" {self._unseen} times: pass the optimizer whose step() is called. Of a wrapper with steps of its own,"
                " such as one of two phases, this is the optimizer inside."
            )
            return Finding("no steps", text, {"changes of the weights": float(self._unseen)})
        if self._steps_handled == 0 and self.steps >= UNREPORTED_STEPS:
            text = (
                f"{self.steps} steps of the optimizer were counted, but monitor.step() was never called: call it after"
                " every optimizer.step()."
            )
            return Finding("not called", text, {"steps": float(self.steps)})
        return None

    def _weight_versions(self) -> int:
        """A number that changes whenever a weight is written in place."""
        return sum(p._version for p in self.objective.parameters().values())

    def _notice_changes(self) -> None:
        """Notice steps that were not counted, and parameters that have been frozen, unfrozen or replaced."""
        versions = self._weight_versions()
        if versions != self._versions and self.steps == self._steps_handled:
            self._unseen += 1
        self._versions = versions
        changes = self.objective.changes()
        if not changes:
            return
        warnings.warn(
            f"the trainable parameters have changed by step {self.steps} ({changes}); from here on those of now are"
            " measured",
            stacklevel=3,
        )
        try:
            self.objective = self.objective.renewed()
            self.optimizer_state = OptimizerState(self.optimizer, self.objective, self._fixed_rule)
        except Exception as error:  # a run is not stopped for being watched
            self._give_up(error)
        self._memories, self._directions, self._weights_before = {}, {}, None
        self.plan, self._fitted = None, None
        self._use_groups(None)
        self._versions = self._weight_versions()

    def _give_up(self, error: Exception) -> None:
        """Measure no more, and say why."""
        self._due = never
        self.budget = None
        self._weights_before = None
        warnings.warn(f"no more measurements are taken: {type(error).__name__}: {error}", stacklevel=4)

    def _is_due(self, steps: Sequence[int]) -> bool:
        """Say whether one of these steps, which were taken, is to be measured."""
        if self.budget is not None:
            return self._weights_before is not None
        return any(map(self._due, steps))

    def _next_is_due(self) -> bool:
        """Say whether the next step will be measured, so that the weights before it are needed."""
        step = self.steps + 1
        if self.budget is None:
            return self._due(step)
        if self.plan is None:
            if len(self.ledger.latest_steps) < 5:
                return False
            self.plan = self._plan(self.budget)
            self.k = self.plan.k
        if self._groups is None and self.budget.allows_once(self.ledger, self.plan.groups_seconds):
            began = perf_counter()
            self._use_groups(find_groups(self.plan.groups_objective))
            self.ledger.measured_at_first += perf_counter() - began
        if self.budget.allows(self.ledger, step, self.plan):
            return True
        early = not self.ledger.most_expensive and self.first_look is None
        if early and self.budget.allows_look(self.ledger, self.plan):
            self._take_first_look(self.plan.look)
        return False

    def _take_first_look(self, f: Objective) -> None:
        """Find λ1 on a few examples: the first useful number, long before a measurement can be afforded."""
        with without_autocast():
            it = Iterate(f, f.weights(), step=self.steps, error=0.1)
            self.first_look = FirstLook(self.steps, sum(map(f.form.size, f.data)), measures.sharpness(it))

    def _next_is_due_safely(self) -> bool:
        """As `_next_is_due`; what planning raises ends the measuring, not the training."""
        try:
            return self._next_is_due()
        except Exception as error:
            self._give_up(error)
            return False

    def _measure_start(self) -> None:
        """Measure at step 0, as it was, if that is still to be done; a run is not stopped for being watched."""
        if self._at_start is None:
            return
        (w, setting), self._at_start = self._at_start, None
        began = perf_counter()
        try:
            self._measure(w, None, setting, when=(0, 0.0))
        except Exception as error:
            warnings.warn(f"the measurement at the start failed: {type(error).__name__}: {error}", stacklevel=4)
        self.ledger.measured += perf_counter() - began
        self.resumed = perf_counter()

    def _measure_safely(self) -> None:
        """Measure, whatever that raises: a run is not stopped for being watched."""
        try:
            self._measure_step()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures == MOST_FAILURES:
                self._give_up(error)
            else:
                warnings.warn(
                    f"a measurement at step {self.steps} failed: {type(error).__name__}: {error}", stacklevel=4
                )

    def _plan(self, budget: Budget) -> ProbePlan:
        stability = self.optimizer_state.stability()
        solves = 2 if stability is None or stability.uniform else 3  # plain and on the sphere; in the steps' metric
        return plan_probe(self.objective, self.objective.weights(), self.ledger, budget, solves, self.k)

    def _use_groups(self, groups: ScaleGroups | None) -> None:
        self._groups = groups
        self.optimizer_state.use_groups(groups)
        self.recorder.outdate_description()

    def _measure_step(self) -> None:
        """Measure between the weights before the last step and those after it, if the former are known."""
        now = self.objective.weights()
        turned, setting = None, None
        if self._weights_before and self._weights_before[0] == self.steps - 1:
            turned = (self._weights_before[1], now)
        if self._setting_at and self._setting_at[0] == self.steps:
            setting = self._setting_at[1]
        self._measure(now if turned is None else self.point(*turned), turned, setting)

    @without_autocast()
    def _measure(
        self,
        w: Tensor,
        turned: tuple[Tensor, Tensor] | None,
        setting: Setting | None,
        when: tuple[int, float] | None = None,
    ) -> Iterate:
        """Measure at `w`, by default now; `when` are the step and the intrinsic time of an earlier moment.

        The weights before and after the last step and its setting are given where they are known.
        """
        began = perf_counter()
        step, tau = when or (self.steps, self.tau)
        at = self.optimizer_state.setting() if setting is None else setting
        fits = self._fits()
        options: dict[str, Any] = {"k": self.k, "rtol": 1e-4, "start": self._memories, "stability": at.stability}
        groups = self.groups if fits else UNKNOWN_GROUPS
        f = self.measured
        if self.budget is not None:
            f = f.using(limited(f.expand, began + self.budget.whole(self.ledger) - self.ledger.measured))
            options["rtol"] = 2e-2
        if f.size >= LARGE:
            options |= {"error": ROUGH, "rtol": 2e-2, "directions": self._directions}
        it = Iterate(f, w, at.rule, step=step, groups=groups, **options)
        row: dict[str, Any] = {"tau": tau, "loss": measures.loss(it), "learning_rate": at.learning_rate}
        if at.rule is not None:
            row |= {"intrinsic_time_per_step": at.rule.intrinsic_time_per_step, "equilibrium": at.rule.equilibrium}
        if setting is not None and setting.gradient is not None:
            row["applied_gradient"] = setting.gradient
        if fits and math.isfinite(row["loss"]):
            with contextlib.suppress(NotConverged, NotFinite):
                plain, sphere = self._wanted(it)
                curvature(it, at, row, plain=plain, sphere=sphere)
            self._memories |= it.memories
            if it.error is not None and it.k == 1:
                self._directions |= {name: pairs.vectors[:, 0] for name, pairs in it.found.items()}
            row |= {f"rotation/{name}": a for name, a in angles(it.scale_groups, turned).items()}
        if self.ledger.trained:
            row["overhead"] = self.overhead
        if step == self.steps:
            row |= self._taken()
        self._describe()
        self.recorder.append(step, row)
        return it

    def _wanted(self, it: Iterate) -> tuple[bool, bool]:
        """Say whether to measure the plain and the spherical sharpness: of large models in turns.

        What is measured every time is what says how stable the next step is.
        """
        if self.plan is not None:
            return self.plan.full, self.plan.full
        if it.error is None or it.k > 1:
            return True, True
        self._turn = (self._turn + 1) % 4
        return self._turn == 1, self._turn == 3

    def _fits(self) -> bool:
        """Plan the memory of measurements, once; say whether there is enough, and warn where there is little."""
        if self._fitted is None:
            free = free_bytes(next(iter(self.objective.parameters().values())).device)
            self._fitted = plan_memory(self.objective, self.k, free)
            self.k = self._fitted.k
            if self._fitted.note:
                warnings.warn(self._fitted.note, stacklevel=5)
        return self._fitted.objective is not None

    def _config(self) -> dict[str, object]:
        rules = self.optimizer_state.rules
        config: dict[str, object] = {
            "model": f"{type(self.objective.model).__name__}, {self.objective.size} parameters"
        }
        config |= {f"rule of group {i}" if rules[1:] else "rule": str(rule) for i, rule in enumerate(rules)}
        if self.budget is None:
            config["every"] = "a schedule" if callable(self._every) else self._every
        else:
            config["budget"] = f"{self.budget.fraction:.1%} of the training time"
            config["probe"] = "not planned yet" if self.plan is None else f"{self.plan.examples} examples"
        config["k"] = self.k
        if self.planned_steps is not None:
            config["steps planned"] = self.planned_steps
        return config

    def _describe(self) -> None:
        """Write the description of the run where there is none yet, or groups have been found since."""
        if not self.recorder.described:
            self.recorder.describe(type(self.objective.model).__name__, self.facts, self._config())


def _check(objective: object, every: object, budget: object, steps: int | None) -> None:
    """Raise InvalidValue or InvalidType where the arguments of a Monitor make no sense."""
    if every is not None and budget is not None:
        raise InvalidValue("give either every= or budget=, not both")
    if steps is not None and steps < 1:
        raise InvalidValue(f"steps={steps}: the number of steps that are planned is at least 1")
    if not isinstance(objective, Objective):
        raise InvalidType(
            f"a Monitor watches an Objective, not a {type(objective).__name__};"
            " make one of the model, its loss and a few fixed batches: Objective(model, loss, batches)"
        )
