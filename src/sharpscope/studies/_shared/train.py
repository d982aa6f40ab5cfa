"""The one training loop of all studies: an objective, an update rule, and what is written down on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...autodiff.objective import Objective
from ...errors import NotConverged, NotFinite
from ...linalg.eigenpairs import Memory
from ...measures import measures
from ...measures.iterate import Iterate, midpoint
from ...optimizers.base import State, UpdateRule
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...symmetry.scale_groups import find_groups
from ...symmetry.sphere import angle
from .._framework.study import Progress
from .recorded import recorded

EARLY = {1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300}
"""Steps that are measured whatever the stride: much happens at the start."""

DIVERGED = 1e6
"""A run is given up when its weights have grown by this factor."""


@dataclass(frozen=True)
class Task:
    """A network, what it is trained on in one batch, and how it is judged at other weights.

    `evaluate` takes the network with weights in place, in training mode, and returns columns.
    """

    net: nn.Module
    loss: Callable[[Any, Any], Tensor]
    x: Tensor
    y: Tensor
    evaluate: Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Schedule:
    """`steps` in all, a row every `every` steps with the top `k` eigenvalues; mini-batches of `batch` drawn by `seed`.

    `rtol` bounds the residuals of eigenpairs relative to λ1; the eigenvalues are then good to about rtol².
    """

    steps: int
    every: int = 50
    k: int = 3
    rtol: float = 1e-2
    batch: int | None = None
    seed: int = 0


def train(
    log: RunLog, progress: Progress, task: Task, rule: UpdateRule, schedule: Schedule, *, unit_start: bool = False
) -> None:
    """Run `rule` on `task`; rows at midpoints ``(w_{t-1} + w_t)/2``, resumable.

    A run that diverges, or whose eigenvalues cannot be found, ends there with a note that says so.
    `loss` is that of the iterate w_{t-1}, `midpoint_loss` that of the midpoint, as are all columns about curvature,
    accuracy and test loss.  `balance/g` is ``⟨lr²‖∇_g‖²⟩ / ⟨(2il - il²)‖w_g‖²⟩`` over the steps since the last row.
    """
    f = Objective(task.net, task.loss, [(task.x, task.y)])
    groups = find_groups(f)
    draw = torch.Generator().manual_seed(schedule.seed)
    first = f.weights()
    if unit_start:
        first = first / first.norm()
    first_norm = first.norm().item()
    saved = log.resume()
    if saved:
        done, w = int(saved["step"]), saved["w"]
        state: State = {name[2:]: t for name, t in saved.items() if name.startswith("r:")}
        names = {name.split(":")[1] for name in saved if name.startswith("m:")}
        memories = {
            name: Memory.of({key.split(":")[2]: t for key, t in saved.items() if key.startswith(f"m:{name}:")})
            for name in names
        }
        draw.set_state(saved["draw"])
    else:
        done, w, state, memories = 0, first, rule.init(first), {}

    def measure(step: int, w: Tensor, state: State, **more: float) -> bool:
        """Add a row; False where the run ends because its curvature could not be measured."""
        it = Iterate(f, w, rule, state, step, groups, schedule.k, schedule.rtol, memories)
        try:
            row = {
                "tau": step * rule.intrinsic_time_per_step,
                "midpoint_loss": measures.loss(it),
                **_curvature(it, rule),
            }
        except (NotConverged, NotFinite) as error:
            log.finish(f"stopped at step {step}: {error}")
            return False
        row |= {f"radius/{name}": w[s].norm().item() for name, s in f.slices.items()}
        f.load(w)
        with torch.no_grad():
            row |= task.evaluate(task.net.train())
        task.net.train()
        log.append(step=step, radius=w.norm().item(), **row, **more)
        memories.update(it.memories)
        return True

    if not saved and not measure(0, w, state, loss=f.value(w).item()):
        return
    sums = w.new_zeros(2, len(f.slices))
    fast = recorded(f, schedule.steps)
    sizes = [s.stop - s.start for s in f.slices.values()]
    for step in range(done + 1, schedule.steps + 1):
        batch = fast
        if schedule.batch is not None:
            picked = torch.randperm(len(task.x), generator=draw)[: schedule.batch]
            batch = fast.on([(task.x[picked], task.y[picked])])
        loss, g = batch.value_and_grad(w)
        new, state = rule.step(w, g, state)
        size = new.norm().item()
        if not (loss.isfinite() and size < DIVERGED * first_norm):
            log.finish(f"diverged at step {step}: loss {loss.item():.3g}, ‖w‖ {size:.3g} from {first_norm:.3g}")
            return
        sums += torch.stack([torch.stack([part.square().sum() for part in v.split(sizes)]) for v in (g, w)])
        if step % schedule.every == 0 or step in EARLY or step == schedule.steps:
            more = {"loss": loss.item(), "angle": angle(w, new).item(), **_balance(f, rule, sums)}
            if not measure(step, midpoint(w, new), state, **more):
                return
            sums.zero_()
            named = {f"r:{name}": t for name, t in state.items()} | {
                f"m:{name}:{key}": t.contiguous()
                for name, memory in memories.items()
                for key, t in memory.tensors().items()
            }
            log.checkpoint(step=torch.tensor(step), w=new, draw=draw.get_state(), **named)
            progress(step / schedule.steps)
        w = new
    log.finish()


def _curvature(it: Iterate, rule: UpdateRule) -> dict[str, float]:
    pairs = it.top
    row = {"sharpness": measures.sharpness(it)}
    if it.scale_groups.joint.numel():
        row["spherical_sharpness"] = measures.spherical_sharpness(it)
        row["eta_lambda"] = measures.eta_lambda(it)
        row["threshold"] = rule.edge / measures.effective_learning_rate(it)
        row |= {f"spherical_sharpness{i}": v for i, v in enumerate(it.spherical_top.values[1:].tolist(), start=2)}
    else:
        row["eta_lambda"] = measures.stability_ratio(it) * rule.edge
    row["residual"] = (pairs.residuals[0] / pairs.values[0].abs()).item()
    return row


def _balance(f: Objective, rule: UpdateRule, sums: Tensor) -> dict[str, float]:
    """Rotational balance per group: gradient growth of the norm over its decay."""
    if not isinstance(rule, GD) or not rule.weight_decay or rule.momentum:
        return {}
    il, lr = rule.intrinsic_rate, rule.learning_rate
    ratio = lr**2 * sums[0] / ((2 * il - il**2) * sums[1])
    return {f"balance/{name}": r for name, r in zip(f.slices, ratio.tolist(), strict=True)}


def judge(
    loss: Callable[[Any, Any], Tensor], x: Tensor, labels: Tensor, test_x: Tensor, test_y: Tensor, test_labels: Tensor
) -> Callable[[nn.Module], dict[str, float]]:
    """Accuracies and test loss; batch statistics for the test set are those of the training set at these weights."""

    def hits(output: Tensor, labels: Tensor) -> float:
        guess = output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()
        return (guess == labels).double().mean().item()

    def evaluate(net: nn.Module) -> dict[str, float]:
        fit = net(x)
        output = net.eval()(test_x)
        return {
            "train_accuracy": hits(fit, labels),
            "test_accuracy": hits(output, test_labels),
            "test_loss": loss(output, test_y).item(),
        }

    return evaluate
