"""Monitor: measures a running training loop without changing it.

It decides when to measure, keeps the vectors that make the next measurement cheap, and collects the history.

P parameters.
"""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidValue, NotConverged, NotFinite
from ..linalg.eigenpairs import Memory
from ..measures import measures
from ..measures.iterate import Iterate, midpoint
from ..measures.row import Setting, angles, curvature, setting_of
from ..optimizers.base import Stability, UpdateRule
from ..optimizers.from_torch import rules_of, stability_of
from ..records.history import History
from ..records.run_log import RunLog
from ..report.html import write_page
from ..symmetry.scale_groups import ScaleGroups, find_groups
from .diagnosis import Facts, Finding, diagnose
from .page import RUN, page, render_run
from .schedules import Schedule, every_nth
from .time_budget import Budget, Ledger, Plan, limited, plan, share_of

__all__ = ["RUN", "Monitor", "Sink", "page"]

Sink = Callable[[int, Mapping[str, float]], None]
"""What gets the numbers of every reading: ``sink(step, values)``."""

UNASKED = ScaleGroups({}, {}, {}, torch.empty(0, dtype=torch.long), 1.0)
"""As long as nobody has asked which weights are invariant."""


class Monitor:
    """Measures `objective` along the steps of `optimizer`.

    Args:
        objective: loss of the model that is being trained, on data that stay the same (a few fixed batches will do).
        optimizer: the live optimizer, with any parameter groups; its hyper-parameters are read at every measurement, so
            schedules are followed.  Its real steps are counted, so that gradients may be accumulated and steps skipped.
        every: steps between measurements, or a function from the step to whether it is measured (`log_spaced`).
        budget: instead of `every`, the share of the training time that measuring may take ("5%", or .05): how often,
            on how many of the objective's examples and how many quantities are measured is planned after a few steps,
            from the times of a step and of gradients.
        steps: how many steps the run will take, where that is known; what is said of its end needs it.
        point: where to measure, from the weights before and after the last step; `midpoint` removes the
            oscillation of the edge of stability from the reading.
        k: eigenvalues to follow; those after the first are the columns sharpness2, sharpness3, ...
        rule: overrides what is read from the optimizer, for all its parameters.
        sinks: functions ``(step, values)`` that get the numbers of every reading, such as those of `integrations`.
        directory: where rows are written as they come, for ``sharpscope watch`` and `page`.

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
        sinks: Sequence[Sink] = (),
        directory: str | Path | None = None,
    ) -> None:
        if every is not None and budget is not None:
            raise InvalidValue("give either every= or budget=, not both")
        if steps is not None and steps < 1:
            raise InvalidValue(f"steps={steps}: the number of steps that are planned is at least 1")
        _check_trains(optimizer, objective)
        began = perf_counter()
        self.objective, self.optimizer, self.point, self.k, self.sinks = objective, optimizer, point, k, tuple(sinks)
        self._due = every_nth(20) if every is None else every if callable(every) else every_nth(every)
        self._every = every if isinstance(every, int) else 20 if every is None else "a schedule"
        self.budget = None if budget is None else Budget(share_of(budget), steps)
        self.history = History()
        self.steps, self.tau, self.planned_steps = 0, 0.0, steps
        self.ledger = Ledger()
        self.plan: Plan | None = None
        self._groups: ScaleGroups | None = None
        self._described: ScaleGroups | None = None  # the groups that are on disk
        self._fixed_rule, self._leading = rule, 0
        self._rules: list[UpdateRule | None] = []
        self._seen: list[Any] | None = None
        self._read_rules()
        self._memories: dict[str, Memory] = {}
        self._before: tuple[int, Tensor] | None = None  # weights after that many steps
        self._handled, self._idle = 0, 0.0  # steps that were looked at, seconds of training since
        self._taken: tuple[int, Setting] | None = None  # how the optimizer was set when it took that step
        self._log = None if directory is None else _fresh_log(Path(directory))
        self._hook = optimizer.register_step_post_hook(self._stepped)
        self._resumed = perf_counter()
        if self.budget is None:
            self._before = (0, objective.weights())
            if self._due(0):
                self.measure(self._before[1])
            self._resumed = perf_counter()
        self.ledger.measured += self._resumed - began

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close("" if error is None else f"{type(error).__name__}: {error}")

    def close(self, note: str = "") -> None:
        """Stop watching the optimizer; a run on disk is marked as finished."""
        self._hook.remove()
        if self._log is not None and not self._log.finished:
            self._log.finish(note)

    @property
    def rule(self) -> UpdateRule | None:
        """What the optimizer does at present to the scale-invariant weights, or to most weights where there are none.

        None while their learning rate is zero, as at the ends of a schedule.
        """
        self._read_rules()
        return self._rules[self._leading]

    @property
    def groups(self) -> ScaleGroups:
        """The scale-invariant groups: found at the first reading or, with a budget, when it allows; none before."""
        if self._groups is None and self.budget is None:
            self._groups, self._seen = find_groups(self.objective), None
        return UNASKED if self._groups is None else self._groups

    @property
    def measured(self) -> Objective:
        """What is measured: the objective, or with a budget the part of it that was planned."""
        return self.objective if self.plan is None else self.plan.objective

    @property
    def overhead(self) -> float:
        """Time of measuring over time of training, so far."""
        return self.ledger.overhead

    def step(self) -> None:
        """Call this after every step of the optimizer."""
        began = perf_counter()
        passed = began - self._resumed
        self._idle += passed
        if self.steps > self._handled:
            taken = range(self._handled + 1, self.steps + 1)
            self._handled = self.steps
            due = self._wanted(taken)
            waited = self._wait() if due else 0.0
            began += waited
            self.ledger.stepped(self._idle + waited, len(taken))
            self._idle = 0.0
            if due:
                self._read(began)
            self._before = (self.steps, self.objective.weights()) if self._coming(self.steps + 1) else None
        self._resumed = perf_counter()
        self.ledger.measured += self._resumed - began

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """After every real step of the optimizer: counts it and moves the clock."""
        began = perf_counter()
        self.steps += 1
        rule = self.rule
        self.tau += rule.intrinsic_time_per_step if rule and rule.intrinsic_time_per_step > 0 else 0.0
        if self._wanted((self.steps,)):
            self._taken = (self.steps, self._setting())
        spent = perf_counter() - began
        self._resumed += spent  # not time of training
        self.ledger.measured += spent

    def _wanted(self, steps: Sequence[int]) -> bool:
        """Whether one of these steps is to be measured."""
        if self.budget is not None:
            return self._before is not None
        return any(map(self._due, steps))

    def _coming(self, step: int) -> bool:
        """Whether the next step will be measured, so that the weights before it are needed."""
        if self.budget is None:
            return self._due(step)
        if self.plan is None:
            if len(self.ledger.lately) < 5:
                return False
            stability = self._stability()
            solves = 2 if stability is None or stability.uniform else 3  # plain and on the sphere; in the steps' metric
            self.plan = plan(self.objective, self.objective.weights(), self.ledger, self.budget, solves, self.k)
            self.k = self.plan.k
        if self._groups is None and self.budget.affords(self.ledger, step, self.plan.answer):
            began = perf_counter()
            self._groups, self._seen = find_groups(self.plan.asking), None
            self.ledger.begun += perf_counter() - began
        return self.budget.allows(self.ledger, step, self.plan.first, self.plan.usual)

    def _wait(self) -> float:
        """Seconds until all that was sent to a device is done: still those of training."""
        device = next(p for group in self.optimizer.param_groups for p in group["params"]).device
        if device.type != "cuda":
            return 0.0
        began = perf_counter()
        torch.cuda.synchronize(device)
        return perf_counter() - began

    def _stability(self) -> Stability | None:
        return stability_of(self.optimizer, self._parameters(), self._rules)

    def _read(self, began: float) -> None:
        """A reading between the weights before the last step and those after it, if the former are known."""
        now = self.objective.weights()
        before = self._before[1] if self._before and self._before[0] == self.steps - 1 else None
        turned = None if before is None else (before, now)
        setting = self._taken[1] if self._taken and self._taken[0] == self.steps else None
        self._measure(now if turned is None else self.point(*turned), turned, setting)
        self.ledger.note(perf_counter() - began)

    def measure(self, w: Tensor) -> Iterate:
        """Measure at `w` now, whatever the schedule, and add a row to the history.

        A run is never stopped by being watched: where the loss or a product with its Hessian is not finite, or the
        solver does not converge, the row has no curvature.
        """
        return self._measure(w, None, None)

    def _setting(self) -> Setting:
        """How the optimizer is set at present: what a schedule does after its step is about the next one."""
        return setting_of(self.optimizer, self._parameters(), self.rule, self._rules, self._leading)

    def _parameters(self) -> list[Tensor]:
        model = dict(self.objective.model.named_parameters())
        return [model[name] for name in self.objective.slices]

    def _measure(self, w: Tensor, turned: tuple[Tensor, Tensor] | None, setting: Setting | None) -> Iterate:
        """`turned` are the weights before and after the last step."""
        began = perf_counter()
        groups, at = self.groups, self._setting() if setting is None else setting
        rule = at.rule
        f, rtol = self.measured, 1e-4
        if self.budget is not None:
            f, rtol = f.using(limited(f.expand, began + self.budget.whole(self.ledger) - self.ledger.measured)), 2e-2
        it = Iterate(f, w, rule, {}, self.steps, groups, self.k, rtol, start=self._memories, stability=at.stability)
        row: dict[str, Any] = {"tau": self.tau, "loss": measures.loss(it), "learning_rate": at.learning_rate}
        if rule is not None:
            row |= {"clock": rule.intrinsic_time_per_step, "equilibrium": rule.equilibrium}
        if setting is not None and setting.gradient is not None:
            row["applied_gradient"] = setting.gradient
        if math.isfinite(row["loss"]):
            with contextlib.suppress(NotConverged, NotFinite):
                curvature(it, at, row, full=self.plan is None or self.plan.full)
            self._memories |= it.memories
            row |= {f"rotation/{name}": a for name, a in angles(it.scale_groups, turned).items()}
        if self.ledger.trained:
            row["overhead"] = self.overhead
        self._append({"run": RUN, "step": self.steps, **row})
        return it

    def _append(self, row: dict[str, Any]) -> None:
        self.history.append(**row)
        if self._log is not None:
            if len(self.history) == 1 or self._groups is not self._described:
                self._describe()
            self._log.append(**{name: value for name, value in row.items() if name != "run"})
        numbers = {n: float(v) for n, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        for sink in self.sinks:
            try:
                sink(self.steps, numbers)
            except Exception as error:  # somebody else's code, which must not stop a run for being watched
                self.sinks = tuple(s for s in self.sinks if s is not sink)
                warnings.warn(f"a sink of the monitor failed, and gets no more readings: {error!r}", stacklevel=3)

    def findings(self) -> list[Finding]:
        """What the readings so far say about this run, each with its numbers and its source."""
        waiting = [] if self.budget is None or len(self.history) else [self._waiting(self.budget)]
        return waiting or diagnose(self.history, RUN, self.facts)

    def _waiting(self, budget: Budget) -> Finding:
        first = math.nan if self.plan is None else self.plan.first
        numbers = {"seconds of training": self.ledger.trained, "share": budget.share, "seconds of a reading": first}
        text = "No reading has been taken yet: "
        if self.plan is None:
            return Finding("waiting", text + "the plan waits for a few steps of the optimizer.", numbers)
        text += (
            f"the first takes about {first:.2g} s, and {budget.share:.0%} of the training so far are"
            f" {budget.share * self.ledger.trained:.2g} s. Raise the budget, or wait."
        )
        return Finding("waiting", text, numbers)

    def diagnosis(self) -> str:
        """The findings as sentences, one a line."""
        return "\n".join(map(str, self.findings()))

    @property
    def facts(self) -> Facts:
        """What stays the same along the run."""
        found, f = self.groups, self.objective
        decayed = {id(p) for group in self.optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
        params = dict(f.model.named_parameters())
        null = {name: len(i) for name, i in found.null.items()}
        return Facts(
            size=f.size,
            invariant=found.joint.numel(),
            defect=found.joint_defect,
            groups={name: len(i) for name, i in found.groups.items()},
            null=null,
            decayed_null=sum(n for name, n in null.items() if id(params.get(name.partition("[")[0])) in decayed),
            pairs=tuple(found.pairs),
            steps=self.planned_steps,
            overhead=self.overhead if self.ledger.trained else None,
            asked=self._groups is not None,
        )

    def report(self, path: str | Path) -> Path:
        """Write the readings so far as one self-contained HTML page."""
        return write_page(path, render_run(self.history, self.facts, self._config()))

    def _config(self) -> dict[str, object]:
        model = f"{type(self.objective.model).__name__}, {self.objective.size} parameters"
        self._read_rules()
        rules: dict[str, object] = {f"rule of group {i}": str(rule) for i, rule in enumerate(self._rules)}
        pace: dict[str, object] = {"every": self._every}
        if self.budget is not None:
            pace = {"budget": f"{self.budget.share:.1%} of the training time"}
            pace |= {"probe": "not planned yet" if self.plan is None else f"{self.plan.examples} examples"}
        steps: dict[str, object] = {} if self.planned_steps is None else {"steps planned": self.planned_steps}
        rules = rules if len(rules) > 1 else {"rule": str(self._rules[0])}
        return {"model": model, **rules, **pace, "k": self.k, **steps}

    def _describe(self) -> None:
        """What `page` needs beside the rows, written whole or not at all."""
        assert self._log is not None
        path = self._log.path.parent / "monitor.json"
        words = {"kind": "monitor", "title": type(self.objective.model).__name__}
        self._described = self._groups
        facts = asdict(replace(self.facts, overhead=None))  # that of the latest row
        text = json.dumps(words | {"facts": facts, "config": self._config()}, default=str)
        temporary = path.with_name(f".monitor.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts: with them a resumed run goes on as if it had not stopped."""
        groups = self._groups
        return {
            "steps": self.steps,
            "tau": self.tau,
            "rows": [{n: value for n, value in row.items() if value is not None} for row in self.history.rows],
            "memories": {name: memory.tensors() for name, memory in self._memories.items()},
            "before": None if self._before is None else [self._before[0], self._before[1].cpu()],
            "groups": None if groups is None else asdict(groups),
            "seconds": [self.ledger.steps, self.ledger.trained, self.ledger.measured, self.ledger.dearest],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; rows on disk become those of the state."""
        like = self.objective.weights()
        self.steps = self._handled = state["steps"]
        self.tau = state["tau"]
        self.history = History(state["rows"])
        self._memories = {name: Memory.of(tensors).to(like) for name, tensors in state["memories"].items()}
        self._before = None if state["before"] is None else (state["before"][0], state["before"][1].to(like))
        self._groups = None if state["groups"] is None else ScaleGroups(**state["groups"])
        self.ledger = Ledger(*state["seconds"])
        if self._log is not None:
            self._log.path.write_bytes(b"")
            for row in state["rows"]:
                self._log.append(**{name: value for name, value in row.items() if name != "run"})
            self._describe()

    def _read_rules(self) -> None:
        """The rule of every parameter group, read anew when a hyper-parameter has changed."""
        groups = self.optimizer.param_groups
        key = [_plain(v) for group in groups for name, v in group.items() if name != "params"]
        if key == self._seen:
            return
        fixed: list[UpdateRule | None] = [self._fixed_rule] * len(groups)
        try:
            self._rules = rules_of(self.optimizer) if self._fixed_rule is None else fixed
        except (TypeError, ValueError) as error:
            if not self._rules:
                raise
            warnings.warn(f"the optimizer was set to what no rule describes: {error}", stacklevel=4)
            self._rules = [None] * len(groups)  # a run is not stopped for being watched
        self._leading, self._seen = self._largest_group(), key

    def _largest_group(self) -> int:
        """The parameter group that holds most of the scale-invariant weights, or of all where there are none."""
        groups = self.optimizer.param_groups
        if len(groups) == 1 or self._groups is None:
            return 0
        params = dict(self.objective.model.named_parameters())
        joint = torch.zeros(self.objective.size, dtype=torch.bool)
        joint[self._groups.joint] = True
        weight = {id(params[n]): int(joint[s].sum()) for n, s in self.objective.slices.items()}
        if not any(weight.values()):
            weight = {id(params[n]): s.stop - s.start for n, s in self.objective.slices.items()}
        held = [sum(weight.get(id(p), 0) for p in group["params"]) for group in groups]
        return held.index(max(held))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _fresh_log(directory: Path) -> RunLog:
    """An empty log; the one of an earlier run is moved aside."""
    log = RunLog(directory, RUN)
    if log.path.exists() and log.path.stat().st_size:
        n = 1
        while (aside := log.path.with_suffix(f".{n}.jsonl")).exists():
            n += 1
        os.replace(log.path, aside)
    return log


def _check_trains(optimizer: Optimizer, objective: Objective) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = dict(objective.model.named_parameters())
    idle = [name for name in objective.slices if id(params[name]) not in trained]
    if idle:
        raise InvalidValue(
            f"the optimizer does not train {', '.join(idle)}: pass the optimizer of this model, or freeze what is not"
            " trained by requires_grad_(False) before making the Objective"
        )
