"""A table of every tensor: its norm, how far a step moves and turns it, and how much of the step arrives.

w are the weights of a tensor before a step, w' those after it, Δ = w' - w, g its gradient as it was applied.  Nothing
here needs a product with the Hessian.

n weights in a tensor.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidType, InvalidValue
from ..measures.row import applied_gradient
from ..optimizers.adaptive import Adam
from ..optimizers.base import UpdateRule
from ..optimizers.declared import seen_as_known
from ..optimizers.from_torch import flat, number, rules_of
from .meters import Meter, Step

SELDOM = ("law/", "age/")
"""Columns that a row has only where they have changed since they were written."""


class TensorTable(Meter):
    """Reads every tensor at every `every`-th step; the columns are one family for each quantity, ``update/NAME``.

    A step that is read costs a copy of the weights and a few passes over weights, gradients and averages.

    Args:
        every: steps between two that are read.
        steps: how many steps the run will take, where that is known: the time of weight decay that is left needs it.
        schedule: the learning rate at a step, up to a factor; constant by default.

    Raises:
        InvalidValue: `every` or `steps` is less than one.
    """

    def __init__(
        self, every: int = 50, *, steps: int | None = None, schedule: Callable[[int], float] = lambda step: 1.0
    ) -> None:
        if every < 1 or (steps is not None and steps < 1):
            raise InvalidValue(f"every={every} and steps={steps}: both are at least 1")
        self.every = every
        self._rates = None if steps is None else [schedule(step) for step in range(1, steps + 1)]
        self._ahead = [0.0] if self._rates is None else [*accumulate(reversed(self._rates), initial=0.0)][::-1]
        self._start: dict[str, Tensor] = {}
        self._row: dict[str, float] = {}
        self._settings: dict[str, tuple[UpdateRule, float]] = {}  # rule and norm of each tensor that has moved
        self._written: dict[str, float] = {}
        self._unclipped: float | Tensor | None = None

    def unclipped(self, norm: float | Tensor) -> None:
        """Hand over the norm of the gradient before it was clipped, as ``clip_grad_norm_`` returns it."""
        self._unclipped = norm

    def before(self, optimizer: Optimizer, objective: Objective) -> None:
        """Copy the weights."""
        self._start |= {name: flat(p).clone() for name, p in _trained(optimizer, objective).items()}

    def after(self, optimizer: Optimizer, objective: Objective) -> None:
        """Compare the weights with those before the step."""
        params = _trained(optimizer, objective)
        optimizer = seen_as_known(optimizer)
        start = [self._start.pop(name) for name in params]
        gradients = [_gradient(p) for p in params.values()]
        groups = optimizer.param_groups
        where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        numbers = _numbers([flat(p) for p in params.values()], start, gradients)
        rules = _rules(optimizer)
        for (name, p), (norm, dot, step, still, gradient) in zip(params.items(), numbers, strict=True):
            self._row |= {f"norm/{name}": norm, f"gradient/{name}": gradient}
            if number(groups[where[id(p)]].get("lr")) == 0:
                continue
            self._row |= _motion(name, norm, dot, step) | ({f"unmoved/{name}": still} if gradient > 0 else {})
            rule = rules[where[id(p)]]
            if rule is not None:
                self._settings[name] = (rule, norm)
        self._row |= _of_adam(optimizer, params, {name: rules[where[id(p)]] for name, p in params.items()})
        norm_applied = applied_gradient(objective.parameters().values())
        if self._unclipped is not None and norm_applied is not None:
            before = float(self._unclipped)
            self._row |= {"clipping": norm_applied.item() / before} if before > 0 else {}
        self._unclipped = None

    def read(self, step: Step) -> Mapping[str, float]:
        """Give the columns of all tensors, to five digits."""
        row, self._row = self._row, {}
        for name, (rule, norm) in self._settings.items():
            row |= _of_rule(name, rule, norm)
            left = rule.intrinsic_time_per_step * self._left(step.number)
            row |= {f"time_left/{name}": left} if left > 0 else {}
        self._settings = {}
        row = {name: float(f"{value:.5g}") for name, value in row.items() if math.isfinite(value)}
        known = {name for name in row if name.startswith(SELDOM) and self._written.get(name) == row[name]}
        self._written |= {name: value for name, value in row.items() if name.startswith(SELDOM)}
        return {name: value for name, value in row.items() if name not in known}

    def _left(self, step: int) -> float:
        """Steps that are left, each counted as the learning rate then over the one now; zero where unknown."""
        if self._rates is None or not step <= len(self._rates) or not self._rates[step - 1] > 0:
            return 0.0
        return self._ahead[step] / self._rates[step - 1]


def _trained(optimizer: Optimizer, objective: Objective) -> dict[str, Tensor]:
    """The parameters of the objective that an optimizer trains."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in objective.parameters().items() if id(p) in own}


def _rules(optimizer: Optimizer) -> Sequence[UpdateRule | None]:
    """The rule of each parameter group; None for all where one of them is not known."""
    try:
        return rules_of(optimizer)
    except (InvalidType, InvalidValue):
        return [None] * len(optimizer.param_groups)


def _gradient(p: Tensor) -> Tensor | None:
    """The gradient ``(n,)`` of a parameter, of a sparse one the entries that are there; None where it has none."""
    if p.grad is None:
        return None
    return flat(p.grad.coalesce().values() if p.grad.is_sparse else p.grad)


def _numbers(
    now: Sequence[Tensor], start: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[tuple[float, float, float, float, float]]:
    """For each tensor ‖w'‖, ⟨w', Δ⟩, ‖Δ‖, the fraction of weights that stood still, and ‖g‖; `start` is overwritten.

    That fraction is of those whose gradient is not zero.
    """
    back = list(start)
    torch._foreach_sub_(back, list(now))  # -Δ: no memory beyond the copy
    there = [g for g in gradients if g is not None]
    of_gradient = iter(torch._foreach_norm(there) if there else [])
    lengths = [now[0].new_zeros(()) if g is None else next(of_gradient) for g in gradients]
    columns = [
        torch._foreach_norm(list(now)),
        [torch.dot(w, d) for w, d in zip(now, back, strict=True)],
        torch._foreach_norm(back),
        [d.count_nonzero() for d in back],
        lengths,
    ]
    rows = zip(*(_read(column) for column in columns), strict=True)
    found = []
    for (norm, dot, step, moved, length), d, g in zip(rows, back, gradients, strict=True):
        still = 0.0
        if moved < d.numel() and g is not None and g.numel() == d.numel() and length > 0:
            still = (((d == 0) & (g != 0)).sum() / g.count_nonzero()).item()
        found.append((norm, -dot, step, still, length))
    return found


def _read(scalars: Iterable[Tensor]) -> list[float]:
    """Values of scalars, with one transfer from the device."""
    scalars = list(scalars)
    values: list[float] = torch.stack([s.to(scalars[0].device) for s in scalars]).tolist()
    return values


def _motion(name: str, norm: float, dot: float, step: float) -> dict[str, float]:
    """Relative length of a step and its angle, from ‖w'‖, ⟨w', Δ⟩ and ‖Δ‖.

    The angle is that of a triangle whose side Δ is split into a part along w and one across; neither is a difference of
    nearly equal numbers, so that small angles are as exact as the norms.
    """
    start = norm**2 - 2 * dot + step**2
    if not start > 1e-6 * step**2:
        return {}  # from zero: no direction to turn from
    before = math.sqrt(start)
    along = (dot - step**2) / before
    across = math.sqrt(max(step**2 - along**2, 0.0))
    return {f"update/{name}": step / before, f"turn/{name}": math.atan2(across, before + along)}


def _of_rule(name: str, rule: UpdateRule, norm: float) -> dict[str, float]:
    """Law of the turn and effective learning rate: lr/‖w‖ where steps have no length that follows the gradient's."""
    row = {f"law/{name}": rule.equilibrium} if rule.equilibrium > 0 else {}
    if norm > 0:
        try:
            row[f"effective_rate/{name}"] = rule.effective_learning_rate(norm, {})
        except InvalidType:
            row[f"effective_rate/{name}"] = getattr(rule, "learning_rate", math.nan) / norm
        except KeyError:  # it depends on the state, such as the number of steps
            return row
    return row


AVERAGES = {"exp_avg", "exp_avg_sq", "step"}
"""Names of what Adam keeps of a parameter that has moved."""


def _of_adam(
    optimizer: Optimizer, params: Mapping[str, Tensor], rules: Mapping[str, UpdateRule | None]
) -> dict[str, float]:
    """The rms of m̂/(√v̂ + eps), and the number of gradients that v averages, ``(1 - β2^t)/(1 - β2)``."""
    row: dict[str, float] = {}
    kept = {name: optimizer.state.get(p, {}).keys() for name, p in params.items()}
    there = {name: rule for name, rule in rules.items() if isinstance(rule, Adam) and kept[name] >= AVERAGES}
    if not there:
        return row
    states = [optimizer.state[params[name]] for name in there]
    ages = _read(state["step"] for state in states)
    corrections = [1 - rule.beta2**t for rule, t in zip(there.values(), ages, strict=True)]
    norms = norms_over_root(
        [flat(state["exp_avg"]) for state in states],
        [flat(state["exp_avg_sq"]) for state in states],
        [rule.eps * math.sqrt(c) for rule, c in zip(there.values(), corrections, strict=True)],
    )
    for (name, rule), t, c, norm in zip(there.items(), ages, corrections, _read(norms), strict=True):
        row[f"signal/{name}"] = norm * math.sqrt(c / flat(params[name]).numel()) / (1 - rule.beta1**t)
        row[f"age/{name}"] = c / (1 - rule.beta2)
    return row


def norms_over_root(x: Sequence[Tensor], v: Sequence[Tensor], eps: Sequence[float]) -> Sequence[Tensor]:
    """Norms of x/(√v + eps) of several tensors, as scalars on their devices."""
    ratios = torch._foreach_sqrt(list(v))
    torch._foreach_add_(ratios, [max(e, 1e-30) for e in eps])
    torch._foreach_reciprocal_(ratios)
    torch._foreach_mul_(ratios, list(x))
    return torch._foreach_norm(ratios)
