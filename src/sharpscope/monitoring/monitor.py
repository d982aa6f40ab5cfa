"""Monitor: measures a running training loop without changing it.

It counts the steps of the optimizer, hands points of the run to be measured, collects the history, and diagnoses it.

P parameters.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.data import keeping_random_states
from ..autodiff.objective import Objective
from ..display import card, cell, silent, sparkline, update_cell
from ..errors import InvalidType, InvalidValue
from ..measures.columns import label_of
from ..measures.iterate import Iterate, midpoint
from ..measures.row import Setting
from ..optimizers.base import UpdateRule
from ..optimizers.from_torch import optimizers_of, wrapped
from ..optimizers.weight_kinds import kinds_of, one_sided, weights_by_kind
from ..records.history import History
from ..report.figures import panels
from ..report.html import write_page
from ..symmetry.scale_groups import ScaleGroups, find_groups
from .diagnosis import diagnose
from .finding import Finding, Findings
from .learning_rates import Profile, rates_ahead
from .measurements import Facts, Now
from .measuring import Measuring, Moment
from .meters import Meter, Meters, Step
from .optimizer_state import OptimizerState, listed, untrained
from .page import charts_of, render_run
from .recorder import RUN, Recorder, Sink
from .schedules import Schedule
from .tensor_kinds import layer_kinds
from .time_budget import Ledger, wait_for_device
from .timetable import Timetable

UNREPORTED_STEPS = 100
"""Steps of the optimizer without a call of the Monitor, or calls without a step, after which it says so."""

MOST_FAILURES = 3
"""Measurements in a row that may fail before no more are taken."""

SECONDS_BETWEEN_VIEWS = 0.5
"""Least time between two views of a run in a cell of a notebook."""

OnFinding = Callable[[Finding, int], None]


class Monitor:
    """Measures `objective` along the steps of `optimizer`, or of several that train it together.

    Where the objective has a `group`, every process has a Monitor and calls it after every step: they measure at the
    same steps, by the clock of the first, and get the same rows.  The first one writes files and calls the sinks.  Only
    `step` and `measure` wait for the others, and `close` where no step was taken.

    Args:
        objective: loss of the model that is being trained, on data that stay the same (a few fixed batches will do).
        optimizer: the live optimizer, with any parameter groups, or a list of several; hyper-parameters are read at
            every measurement, so schedules are followed.  Real steps are counted, so that gradients may be accumulated
            and steps skipped; of several optimizers, those of the one that has taken most.  One without a law of
            stability is observed: its rows have no ratio, and `facts` names it.
        budget: the fraction of the training time that measuring may take, "5%" by default: how often, on how many of
            the objective's examples and how many quantities are measured is planned after a few steps, from the times
            of a step and of gradients.
        every: instead of a budget, the steps between measurements, or a function from the step to whether it is
            measured (`log_spaced`).
        steps: how many steps the run will take, where that is known; what is found about its end needs it.
        scheduler: the scheduler of the learning rate; a copy of it tells the rates to come.
        point: where to measure, from the weights before and after the last step; `midpoint` removes the
            oscillation of the edge of stability from the measurement.
        k: eigenvalues to follow; those after the first are the columns sharpness2, sharpness3, ...
        rule: overrides what is read from the optimizer, for all its parameters.
        meters: what else to read along the steps, each at its own pace; their columns stand in the history.
        on_finding: a function ``(finding, step)`` that gets every finding when it first holds, or holds again.
        sinks: functions ``(step, values)`` that get the numbers of every measurement, such as those of `integrations`;
            those with a method ``finding(finding, step)`` get findings, too.
        directory: where rows are written as they come, for ``sharpscope watch``.

    Raises:
        TypeError: that is no torch optimizer.
        ValueError: no optimizer trains some of the objective's parameters; an argument that makes no sense.

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
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        budget: float | str | None = None,
        every: int | Schedule | None = None,
        steps: int | None = None,
        scheduler: Any = None,
        point: Callable[[Tensor, Tensor], Tensor] = midpoint,
        k: int = 1,
        rule: UpdateRule | None = None,
        meters: Sequence[Meter] = (),
        on_finding: OnFinding | None = None,
        sinks: Sequence[Sink] = (),
        directory: str | Path | None = None,
    ) -> None:
        _check(objective, steps)
        began = perf_counter()
        self.objective = objective
        self.optimizers = optimizers_of(optimizer)
        self.optimizer = self.optimizers[0]
        self.point = point
        self.steps = 0
        self.planned_steps = steps
        self.tau = 0.0
        self.timetable = Timetable(every, budget, steps)
        self.measuring = Measuring(objective, k, searches=self.timetable.budget is None)
        self.scheduler = scheduler
        self._fixed_rule = rule
        self.optimizer_state = OptimizerState(self.optimizers, objective, rule)
        first = objective.processes.rank == 0
        self.recorder = Recorder(sinks if first else (), directory if first else None)
        self._on_finding = on_finding
        self._found: dict[str, Finding] = {}  # that hold at present, by name
        self._largest_rate = 0.0  # so far
        self._profile: Profile | None = None  # of the learning rate
        self._start: Moment | None = None  # that of step 0, where it has not been measured yet
        self._kinds: dict[str, str] = {}  # of the parameters, once the groups are known
        self._weights_before: tuple[int, Tensor] | None = None  # weights after that many steps
        self._setting_at: tuple[int, Setting] | None = None  # how the optimizer was set when it took that step
        self._steps_handled = 0
        self._training_seconds = 0.0  # since the last handled step
        self._unseen = 0  # changes of the weights without a step that was counted
        self._calls_since = 0  # calls of `step` since a step was counted
        self._idle: list[str] = []  # weights that were unfrozen, and that no optimizer trains yet
        self._versions = self._weight_versions()
        self._failures = 0  # of measurements, one after the other
        self._meters = Meters(meters)
        self._read: dict[str, float] = {}  # by the meters, at the step that is being handled
        self._counts = [0] * len(self.optimizers)  # steps of each
        self._within = [0] * len(self.optimizers)  # steps, one calling the next, as a subclass calls its parent's
        self._hooks = self._watch()
        if self.timetable.budget is None:
            self._weights_before = (0, objective.weights())
            if self.timetable.due(0):
                self._start = Moment(self._weights_before[1], 0, 0.0, self.optimizer_state.setting())
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
        if note and self.objective.processes.size > 1:
            self._start = None  # nobody knows whether the others have failed, too
        self._measure_start()
        self.recorder.close(note)
        for one in self.recorder.sinks:
            if isinstance(one, _Cell):
                with suppress(Exception):  # a cell that is gone must not end what is being watched
                    one.show()

    @property
    def history(self) -> History:
        """The rows so far; the one of step 0 is measured when it is first looked at, or after the first step.

        Of several processes one may look without the others: there it is measured after the first step.
        """
        if self.objective.processes.size == 1:
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
        alone = self.objective.processes.size == 1
        if self.measuring.groups is None and self.measuring.searches and alone:
            self.measuring.groups = find_groups(self.objective)
            self._groups_found()
        return self.measuring.known_groups

    @property
    def measured(self) -> Objective:
        """The objective that is measured: the part of the given one that was planned with a budget, or fits."""
        return self.measuring.measured

    @property
    def ledger(self) -> Ledger:
        """The seconds of training and of measuring so far."""
        return self.timetable.ledger

    @property
    def overhead(self) -> float:
        """Time of measuring over time of training, so far."""
        return self.ledger.overhead

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hooks = self._watch()

    @silent()
    def step(self, loss: float | Tensor | None = None, batch: Any = None) -> None:
        """Call this after every step of the optimizer.

        Some meters read the `loss` of the step's batch, as it was before the step, and the `batch` itself, in the form
        of the objective's own.  Of several processes each hands over its part of the batch and the mean loss of that.
        """
        began = perf_counter()
        self._training_seconds += began - self.resumed
        self._within = [0] * len(self.optimizers)  # an error may have ended a step half-way
        self._measure_start()
        self._notice_changes()
        if self.steps > self._steps_handled:
            taken = range(self._steps_handled + 1, self.steps + 1)
            self._steps_handled = self.steps
            due = not self._idle and self.timetable.is_due(taken, self._weights_before is not None)
            waited = wait_for_device(self.optimizer) if due else 0.0  # still time of training
            began += waited
            self.ledger.add_steps(self._training_seconds + waited, len(taken))
            self._training_seconds = 0.0
            self._read_meters(loss, batch)
            if due:
                self._measure_safely()
                spent = perf_counter() - began
                self.ledger.add_measurement(spent)
                began += spent
            if self._read:
                self.recorder.append(self.steps, self._taken())
            prepares = not self._idle and self._next_is_due_safely()
            self._weights_before = (self.steps, self.objective.weights()) if prepares else None
        self.resumed = perf_counter()
        self.ledger.measured += self.resumed - began

    def measure(self, w: Tensor) -> Iterate:
        """Measure at `w` now, whatever the schedule, and add a row to the history.

        Where the loss or a product with its Hessian is not finite, or the solver does not converge, the row has no
        curvature.
        """
        self._measure_start()
        return self._measure(Moment(w, self.steps, self.tau, self.optimizer_state.setting()), None)

    def findings(self) -> Findings:
        """Diagnose this run from the measurements so far; each finding has its numbers and its source."""
        if self._uncounted and not (self._steps_handled and len(self.history)):
            return Findings([self._uncounted])
        if self.timetable.budget is not None and not len(self.history):
            return Findings([self.timetable.waiting(self.measuring.plan)])
        found = diagnose(self.history, RUN, self.facts, self.now)
        return Findings([self._uncounted, *found]) if self._uncounted else found

    def diagnosis(self) -> str:
        """The findings as sentences, one a line."""
        return str(self.findings())

    def report(self, path: str | Path) -> Path:
        """Write the measurements so far as one self-contained HTML page; of several processes the first one does."""
        if self.objective.processes.rank > 0:
            return Path(path)
        page = render_run(self.history, self.facts, self._config(), self.now, self.recorder.found)
        return write_page(path, page)

    def plot(self) -> Any:
        """Draw the curves of the run so far, with marks where findings began to hold, as a figure of matplotlib.

        Raises:
            MissingExtra: matplotlib is not installed.
            InvalidValue: there is no measurement yet.
        """
        return panels(charts_of(self.history, self.recorder.found), self.history.columns)

    def live(self) -> None:
        """Show the run in this cell of the notebook, anew at every measurement; outside a notebook do nothing."""
        handle = cell(self._repr_html_())
        if handle is not None:
            self.recorder.sinks += (_Cell(self, handle),)

    def __repr__(self) -> str:
        model, names = type(self.objective.model).__name__, ", ".join(type(one).__name__ for one in self.optimizers)
        rows = len(self.recorder.history)
        return f"Monitor({model}, {self.objective.size} parameters, {names}, step {self.steps}, {rows} rows)"

    def _repr_html_(self) -> str:
        """Show what is there, and measure nothing for it."""
        history, curves = self.recorder.history, ""
        for name in ("stability_ratio", "sharpness", "loss"):
            if name in history.columns:
                curves += sparkline(label_of(name), *map(np.ndarray.tolist, history.table(RUN, "step", name)))
        found = diagnose(history, RUN, self.facts, self.now) if len(history) else Findings()
        return card(repr(self), curves, found._repr_html_())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts: with them a resumed run goes on as if it had not stopped."""
        ledger, before = self.ledger, self._weights_before
        return {
            "steps": self.steps,
            "tau": self.tau,
            "largest_rate": self._largest_rate,
            "findings": self.recorder.found,
            "rows": [{n: value for n, value in row.items() if value is not None} for row in self.history.rows],
            "before": None if before is None else [before[0], before[1].cpu()],
            "seconds": [ledger.steps, ledger.trained, ledger.measured, ledger.most_expensive],
        } | self.measuring.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; rows on disk become those of the state."""
        self.steps = self._steps_handled = state["steps"]
        self._counts = [self.steps] * len(self.optimizers)
        self.tau = state["tau"]
        self._largest_rate = state.get("largest_rate", 0.0)
        self._start = None
        before = state["before"]
        self._weights_before = None if before is None else (before[0], before[1].to(self.objective.weights()))
        self.measuring.load_state(state)
        self._groups_found()
        self.timetable.ledger = Ledger(*state["seconds"])
        self.recorder.restore(state["rows"], state.get("findings", ()))
        self._describe()

    @property
    def now(self) -> Now:
        """The present moment of the run."""
        rate = self.optimizer_state.learning_rate
        return Now(self.steps, rate, None if rate is None else max(self._largest_rate, rate), self.tau)

    @property
    def facts(self) -> Facts:
        """The counts and other numbers that stay the same along the run."""
        found, decayed = self.measuring.known_groups, self.optimizer_state.decayed
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
            schedule=self._schedule(),
            budget=self.timetable.budget.fraction if self.timetable.budget else None,
            overhead=self.overhead if self.ledger.trained else None,
            groups_known=self.measuring.groups is not None,
            stops_gradients=not self.objective.follows_gradient,
            observed=self.optimizer_state.observed,
            decayed=weights_by_kind(self.objective, self._kinds, decayed),
            undecayed=weights_by_kind(self.objective, self._kinds, self._kinds.keys() - decayed),
            one_sided=tuple(one_sided(self.objective, found, decayed)),
            kinds=layer_kinds(self.objective),
        )

    def _watch(self) -> list[Any]:
        """Be called before and after every step of the optimizers."""
        inside = list(enumerate(map(wrapped, self.optimizers)))
        hooks = [one.register_step_pre_hook(partial(self._stepping, i)) for i, one in inside]
        return hooks + [one.register_step_post_hook(partial(self._stepped, i)) for i, one in inside]

    def _stepping(self, i: int, optimizer: Optimizer, *_: Any) -> None:
        """Let the meters look at what a step starts from."""
        began = perf_counter()
        self._within[i] += 1
        if self._within[i] == 1:
            self._meters.before(max(self.steps, self._counts[i] + 1), optimizer, self.objective)
        self._not_training(perf_counter() - began)

    def _not_training(self, seconds: float) -> None:
        """Enter seconds of measuring that lie within the time of training."""
        self.resumed += seconds
        self.ledger.measured += seconds

    def _read_meters(self, loss: float | Tensor | None, batch: Any) -> None:
        """Read the meters that are due at this step."""
        if self._meters:
            given = None if loss is None else self.objective.processes.mean(loss)
            self._read = self._meters.read(Step(self.steps, self.objective, given, batch))

    def _taken(self) -> dict[str, float]:
        """Take what the meters have read, once."""
        taken, self._read = self._read, {}
        return taken

    def _stepped(self, i: int, optimizer: Optimizer, *_: Any) -> None:
        """Count a real step of an optimizer, and advance the intrinsic time where it is the first with that count."""
        began = perf_counter()
        self._within[i] = max(self._within[i] - 1, 0)
        if self._within[i]:
            return
        self._counts[i] += 1
        if self._counts[i] > self.steps:
            self.steps += 1
            rule = self.optimizer_state.rule
            self.tau += rule.intrinsic_time_per_step if rule and rule.intrinsic_time_per_step > 0 else 0.0
            self._largest_rate = max(self._largest_rate, self.optimizer_state.learning_rate or 0.0)
        self._meters.after(self.steps, optimizer, self.objective)
        if self.timetable.is_due((self.steps,), self._weights_before is not None):
            self._setting_at = (self.steps, self.optimizer_state.setting())
        self._not_training(perf_counter() - began)

    @property
    def _uncounted(self) -> Finding | None:
        """Why there is nothing to say about the steps of this run, where none was seen, or where none was reported."""
        if self.steps == 0 and self._unseen > 0:
            names = " or ".join(type(one).__name__ for one in self.optimizers)
            text = (
                f"No step of {names} was counted, though the weights have changed"
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
        if self._calls_since >= UNREPORTED_STEPS:
            text = (
                f"The optimizer has taken no step for {self._calls_since} calls of monitor.step(), since step"
                f" {self.steps}: gradients are accumulated over as many batches, or steps are skipped, as a GradScaler"
                " skips those whose gradients are not finite."
            )
            remedy = "If none should be, look for the first value that is not finite in the loss or the gradients."
            return Finding("no steps", text, {"calls": float(self._calls_since)}, severity="warning", remedy=remedy)
        return None

    def _weight_versions(self) -> int:
        """A number that changes whenever a weight is written in place."""
        return sum(p._version for p in self.objective.parameters().values())

    def _notice_changes(self) -> None:
        """Notice steps that were not counted, and parameters that have been frozen, unfrozen or replaced."""
        versions = self._weight_versions()
        counted = self.steps > self._steps_handled
        self._unseen += versions != self._versions and not counted
        self._calls_since = 0 if counted or versions != self._versions else self._calls_since + 1
        self._versions = versions
        changes = self.objective.changes()
        idle = untrained(self.optimizers, self.objective) if changes else []
        if idle and idle != self._idle:
            warnings.warn(
                f"the trainable parameters have changed by step {self.steps} ({changes}), and no optimizer trains"
                f" {listed(idle)}: measuring goes on when one does, or when they are frozen again",
                stacklevel=4,
            )
        self._idle = idle
        if idle or not changes:
            return
        warnings.warn(
            f"the trainable parameters have changed by step {self.steps} ({changes}); from here on those of now are"
            " measured",
            stacklevel=4,
        )
        try:
            self.objective = self.objective.renewed()
            self.optimizer_state = OptimizerState(self.optimizers, self.objective, self._fixed_rule)
        except Exception as error:  # a run is not stopped for being watched
            self._give_up(error)
        self._weights_before = None
        self.measuring = Measuring(self.objective, self.measuring.k, searches=self.measuring.searches)
        self._groups_found()
        self._versions = self._weight_versions()

    def _give_up(self, error: Exception) -> None:
        """Measure no more, and say why."""
        self.timetable.stop()
        self._weights_before = None
        warnings.warn(f"no more measurements are taken: {type(error).__name__}: {error}", stacklevel=5)

    def _next_is_due_safely(self) -> bool:
        """Say whether the next step will be measured; what planning raises ends the measuring, not the training."""
        known = self.measuring.groups
        try:
            return self.timetable.next_is_due(self.steps + 1, self.measuring, self.optimizer_state.stability)
        except Exception as error:
            self._give_up(error)
            return False
        finally:
            if self.measuring.groups is not known:
                self._groups_found()

    def _measure_start(self) -> None:
        """Measure at step 0, as it was, if that is still to be done; a run is not stopped for being watched."""
        if self._start is None:
            return
        point, self._start = self._start, None
        began = perf_counter()
        try:
            self._together(lambda: point, None)
        except Exception as error:
            warnings.warn(f"the measurement at the start failed: {type(error).__name__}: {error}", stacklevel=4)
        self.ledger.measured += perf_counter() - began
        self.resumed = perf_counter()

    def _measure_safely(self) -> None:
        """Measure, whatever that raises: a run is not stopped for being watched."""
        try:
            self._together(self._moment, self.timetable.deadline(self.steps))
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures == MOST_FAILURES:
                self._give_up(error)
            else:
                warnings.warn(
                    f"a measurement at step {self.steps} failed: {type(error).__name__}: {error}", stacklevel=4
                )

    def _groups_found(self) -> None:
        """Use the scale-invariant groups that are known now."""
        groups = self.measuring.groups
        self._kinds = {} if groups is None else kinds_of(self.objective, groups)
        self.optimizer_state.use_groups(groups)
        self.recorder.outdate_description()

    def _moment(self) -> Moment:
        """Choose the point between the weights before the last step and those after it, if the former are known."""
        now, turned, setting = self.objective.weights(), None, None
        if self._weights_before and self._weights_before[0] == self.steps - 1:
            turned = (self._weights_before[1], now)
        if self._setting_at and self._setting_at[0] == self.steps:
            setting = self._setting_at[1]
        w = now if turned is None else self.point(*turned)
        at = self.optimizer_state.setting() if setting is None else setting
        return Moment(w, self.steps, self.tau, at, turned, applied=setting is not None)

    @keeping_random_states()  # what a failure draws, too
    def _together(self, moment: Callable[[], Moment], deadline: float | None) -> None:
        """Measure on all processes, or on none: an error on one is an error on all, before they wait for each other."""
        points: list[Moment] = []

        def measure() -> None:
            self._measure(points[0], deadline)

        self.objective.processes.each(lambda: points.append(moment()))
        self.objective.processes.each(measure)

    @silent()
    def _measure(self, point: Moment, deadline: float | None) -> Iterate:
        """Measure a point, and add its row to the history; then see what is new in the diagnosis."""
        known = self.measuring.groups
        it, row = self.measuring.at(point, deadline)
        if self.measuring.groups is not known:
            self._groups_found()
        self.timetable.agree(self.objective.processes)
        if self.ledger.trained:
            row["overhead"] = self.overhead
        if point.step == self.steps:
            row |= self._taken()
        self._describe()
        self.recorder.append(point.step, row)
        self._report_findings()
        return it

    def _report_findings(self) -> None:
        """Hand on the findings that did not hold at the last measurement."""
        if self._on_finding is None and not self.recorder.takes_findings:
            return
        found = {finding.name: finding for finding in diagnose(self.history, RUN, self.facts, self.now)}
        for finding in (one for name, one in found.items() if name not in self._found):
            self.recorder.report(finding, self.steps)
            if self._on_finding is not None:
                try:
                    self._on_finding(finding, self.steps)
                except Exception as error:  # somebody else's code, which must not stop a run for being watched
                    self._on_finding = None
                    warnings.warn(f"on_finding failed, and is not called again: {error!r}", stacklevel=4)
        self._found = found

    def _schedule(self) -> Profile:
        """Learning rates of the leading parameter group to come, where the scheduler is known."""
        if self.scheduler is None or self._profile is not None:
            return self._profile or ()
        until = self.planned_steps or 10 * max(self.steps, 100)
        found = rates_ahead(self.scheduler, self.optimizer_state.leading_group, self.steps, until)
        if found is not None and self.planned_steps is not None:
            self._profile = found
        return found or ()

    def _config(self) -> dict[str, object]:
        rules = self.optimizer_state.descriptions
        config: dict[str, object] = {
            "model": f"{type(self.objective.model).__name__}, {self.objective.size} parameters"
        }
        config |= {f"rule of group {i}" if rules[1:] else "rule": rule for i, rule in enumerate(rules)}
        if observed := self.optimizer_state.observed:
            config["without a law of stability"] = ", ".join(observed)
        if self.timetable.budget is None:
            config["every"] = "a schedule" if callable(self.timetable.every) else self.timetable.every
        else:
            plan = self.measuring.plan
            config["budget"] = f"{self.timetable.budget.fraction:.1%} of the training time"
            config["probe"] = "not planned yet" if plan is None else f"{plan.examples} examples"
        config["k"] = self.measuring.k
        if self.planned_steps is not None:
            config["steps planned"] = self.planned_steps
        return config

    def _describe(self) -> None:
        """Write the description of the run where there is none yet, or groups have been found since."""
        if not self.recorder.described:
            self.recorder.describe(type(self.objective.model).__name__, self.facts, self._config())


class _Cell:
    """A sink that shows the run in a cell of a notebook."""

    def __init__(self, monitor: Monitor, handle: Any) -> None:
        self.monitor, self.handle = monitor, handle
        self.shown = 0.0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if perf_counter() - self.shown >= SECONDS_BETWEEN_VIEWS:
            self.show()

    def show(self) -> None:
        """Show the run as it is now."""
        update_cell(self.handle, self.monitor._repr_html_())
        self.shown = perf_counter()

    def finding(self, finding: Finding, step: int) -> None:
        """Take findings, so that the run is diagnosed at every measurement; the next row shows them."""


def _check(objective: object, steps: int | None) -> None:
    """Raise InvalidValue or InvalidType where the arguments of a Monitor make no sense."""
    if steps is not None and steps < 1:
        raise InvalidValue(f"steps={steps}: the number of steps that are planned is at least 1")
    if not isinstance(objective, Objective):
        raise InvalidType(
            f"a Monitor watches an Objective, not a {type(objective).__name__};"
            " make one of the model, its loss and a few fixed batches: Objective(model, loss, batches)"
        )
