"""The training loop that all studies share: an objective, an update rule, and rows of what is measured on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...autodiff.objective import Objective
from ...errors import NotConverged, NotFinite
from ...linalg.memory import Memory
from ...measures import measures
from ...measures.iterate import Iterate, midpoint
from ...optimizers.base import State, UpdateRule
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...symmetry.scale_groups import find_groups
from ...symmetry.sphere import angle
from .._framework.study import Progress
from .data import Split
from .recorded import recorded

EARLY = {1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300}
"""Steps that are measured whatever the stride: much happens at the start."""

AT_ONCE = 2000
"""Examples that are judged at a time."""

DIVERGED = 1e6
"""A run is given up when its weights have grown by this factor."""


@dataclass(frozen=True)
class LearningProblem:
    """A network, what it is trained on, and how it is judged at other weights.

    `evaluate` takes the network with weights in place, in training mode, and returns columns.  The full batch is one,
    or parts of `chunk` examples, always the same: batch normalization then takes the statistics of each part.
    """

    net: nn.Module
    loss: Callable[[Any, Any], Tensor]
    x: Tensor
    y: Tensor
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    chunk: int | None = None

    @cached_property
    def objective(self) -> Objective:
        size = self.chunk or len(self.x)
        return Objective(self.net, self.loss, list(zip(self.x.split(size), self.y.split(size), strict=True)))

    def columns_at(self, w: Tensor) -> dict[str, float]:
        """The columns of `evaluate` at the weights `w` ``(P,)``."""
        self.objective.load(w)
        with torch.no_grad():
            columns = dict(self.evaluate(self.net.train()))
        self.net.train()
        return columns


@dataclass(frozen=True)
class TrainingPlan:
    """The length of a run and what is measured on the way.

    `steps` in all, a row every `every` steps with the top `k` eigenvalues; mini-batches of `batch` drawn by `seed`.
    The last `cooling` of them are gradient descent at a tenth of the learning rate, without weight decay.
    `rtol` bounds the residuals of eigenpairs relative to λ1; the eigenvalues are then good to about rtol².
    """

    steps: int
    every: int = 50
    k: int = 3
    rtol: float = 1e-2
    batch: int | None = None
    seed: int = 0
    cooling: int = 0

    @property
    def warm(self) -> int:
        """Steps before the run cools."""
        return self.steps - self.cooling

    def rule_at(self, step: int, rule: UpdateRule) -> UpdateRule:
        """The rule of the step after `step` others."""
        if step < self.warm or not isinstance(rule, GD):
            return rule
        return replace(rule, learning_rate=rule.learning_rate / 10, weight_decay=0.0)

    def measures(self, step: int) -> bool:
        """True where a row is due after this step."""
        return step % self.every == 0 or step in EARLY or step in (self.warm, self.steps)


@dataclass
class _Position:
    """The place that a run has come to: all that it needs to go on from there."""

    step: int
    w: Tensor
    state: State
    memories: dict[str, Memory]  # of the eigenvalue solvers
    draw: torch.Generator  # of mini-batches

    @classmethod
    def of(cls, saved: Mapping[str, Tensor]) -> "_Position":
        """The place that a checkpoint holds."""
        solvers = {name.split(":")[1] for name in saved if name.startswith("m:")}
        draw = torch.Generator()
        draw.set_state(saved["draw"])
        return cls(
            step=int(saved["step"]),
            w=saved["w"],
            state={name.removeprefix("r:"): t for name, t in saved.items() if name.startswith("r:")},
            memories={
                solver: Memory.of({key.split(":")[2]: t for key, t in saved.items() if key.startswith(f"m:{solver}:")})
                for solver in solvers
            },
            draw=draw,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The place as tensors for a checkpoint."""
        remembered = {
            f"m:{solver}:{key}": t.contiguous()
            for solver, memory in self.memories.items()
            for key, t in memory.tensors().items()
        }
        named = {f"r:{name}": t for name, t in self.state.items()} | remembered
        return {"step": torch.tensor(self.step), "w": self.w, "draw": self.draw.get_state(), **named}


class _Stopped(Exception):
    """The run ends early, with this text as the note that says why."""


def train(
    log: RunLog,
    progress: Progress,
    problem: LearningProblem,
    rule: UpdateRule,
    plan: TrainingPlan,
    *,
    unit_start: bool = False,
) -> None:
    """Run `rule` on `problem`, with rows at midpoints ``(w_{t-1} + w_t)/2``; an interrupted run goes on.

    A run that diverges, or whose eigenvalues cannot be found, ends there with a note that says so.
    `loss` is that of the iterate w_{t-1}, `midpoint_loss` that of the midpoint, as are all columns about curvature,
    accuracy and test loss; `tau` stands still while the run cools.  `balance/g` is ``⟨lr²‖∇_g‖²⟩ / ⟨(2il -
    il²)‖w_g‖²⟩`` over the steps since the last row.
    """
    f = problem.objective
    groups = find_groups(f)
    first = f.weights()
    if unit_start:
        first = first / first.norm()
    saved = {name: t if name == "draw" else t.to(first.device) for name, t in log.resume().items()}
    draw = torch.Generator().manual_seed(plan.seed)
    now = _Position.of(saved) if saved else _Position(0, first, rule.init(first), {}, draw)

    def measure(w: Tensor, **more: float) -> None:
        last = plan.rule_at(now.step - 1, rule)
        it = Iterate(f, w, last, now.state, now.step, groups, plan.k, plan.rtol, now.memories)
        tau = min(now.step, plan.warm) * rule.intrinsic_time_per_step
        log.append(step=now.step, radius=w.norm().item(), tau=tau, **_row(it, last, problem), **more)
        now.memories.update(it.memories)

    try:
        if not saved:
            measure(first, loss=f.value(first).item())
        fast = recorded(f, plan.steps)
        squares = first.new_zeros(2, len(f.slices))
        while now.step < plan.steps:
            before = now.w
            loss, g = _next_batch(fast, problem, plan, now.draw).value_and_grad(before)
            now.w, now.state = plan.rule_at(now.step, rule).step(before, g, now.state)
            now.step += 1
            _check_growth(now, loss, first)
            squares += _squared_norms(f, g, before)
            if plan.measures(now.step):
                of_step = {"loss": loss.item(), "angle": angle(before, now.w).item()}
                measure(midpoint(before, now.w), **of_step, **_balance(f, plan.rule_at(now.step - 1, rule), squares))
                squares.zero_()
                log.checkpoint(**now.tensors())
                progress(now.step / plan.steps)
    except _Stopped as reason:
        log.finish(str(reason))
    else:
        log.finish()


def _row(it: Iterate, rule: UpdateRule, problem: LearningProblem) -> dict[str, float]:
    """The columns that depend on the weights of `it` alone."""
    f = it.objective
    try:
        row = {"midpoint_loss": measures.loss(it), **_curvature(it, rule)}
    except (NotConverged, NotFinite) as error:
        raise _Stopped(f"stopped at step {it.step}: {error}") from error
    row |= {f"radius/{name}": it.w[s].norm().item() for name, s in f.slices.items()}
    return row | problem.columns_at(it.w)


def _curvature(it: Iterate, rule: UpdateRule) -> dict[str, float]:
    pairs = it.top
    row = {"sharpness": measures.sharpness(it)}
    if it.scale_groups.joint.numel():
        row["spherical_sharpness"] = measures.spherical_sharpness(it)
        row["eta_lambda"] = measures.eta_lambda(it)
        row["spherical_threshold"] = rule.edge / measures.effective_learning_rate(it)
        row |= {f"spherical_sharpness{i}": v for i, v in enumerate(it.spherical_top.values[1:].tolist(), start=2)}
    else:
        row["eta_lambda"] = measures.stability_ratio(it) * rule.edge
    row["relative_residual"] = (pairs.residuals[0] / pairs.values[0].abs()).item()
    return row


def _next_batch(f: Objective, problem: LearningProblem, plan: TrainingPlan, draw: torch.Generator) -> Objective:
    """The objective of the next step: on all examples, or on some that are drawn."""
    if plan.batch is None:
        return f
    picked = torch.randperm(len(problem.x), generator=draw)[: plan.batch]
    return f.on([(problem.x[picked], problem.y[picked])])


def _check_growth(now: _Position, loss: Tensor, first: Tensor) -> None:
    size, first_size = now.w.norm().item(), first.norm().item()
    if not (loss.isfinite() and size < DIVERGED * first_size):
        note = f"loss {loss.item():.3g}, ‖w‖ {size:.3g} from {first_size:.3g}"
        raise _Stopped(f"diverged at step {now.step}: {note}")


def _squared_norms(f: Objective, g: Tensor, w: Tensor) -> Tensor:
    """Squared norms of gradient and weights, by parameter ``(2, G)``."""
    sizes = [s.stop - s.start for s in f.slices.values()]
    return torch.stack([torch.stack([part.square().sum() for part in v.split(sizes)]) for v in (g, w)])


def _balance(f: Objective, rule: UpdateRule, squares: Tensor) -> dict[str, float]:
    """Rotational balance per group: gradient growth of the norm over its decay."""
    if not isinstance(rule, GD) or not rule.weight_decay or rule.momentum:
        return {}
    il, lr = rule.intrinsic_rate, rule.learning_rate
    ratio = lr**2 * squares[0] / ((2 * il - il**2) * squares[1])
    return {f"balance/{name}": r for name, r in zip(f.slices, ratio.tolist(), strict=True)}


def judge(loss: Callable[[Any, Any], Tensor], data: Split) -> Callable[[nn.Module], dict[str, float]]:
    """Accuracies and test loss; batch statistics for the test set are those of the training set at these weights."""

    def hits(output: Tensor, labels: Tensor) -> float:
        guess = output.argmax(-1) if output.shape[-1] > 1 else (output[:, 0] > 0).long()
        return (guess == labels).double().mean().item()

    def evaluate(net: nn.Module) -> dict[str, float]:
        fit = net(data.x)
        net.eval()
        output = torch.cat([net(part) for part in data.test_x.split(AT_ONCE)])
        return {
            "train_accuracy": hits(fit, data.labels),
            "test_accuracy": hits(output, data.test_labels),
            "test_loss": loss(output, data.test_y).item(),
        }

    return evaluate
