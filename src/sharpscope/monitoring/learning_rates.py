"""Learning rates of steps to come, from a scheduler of torch: a copy of it is run ahead, on a stand-in optimizer."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

LONGEST = 50_000
"""Number of steps of a scheduler that are run ahead one by one."""

POINTS = 256
"""Number of evenly spaced points that are kept of the rates to come, and as many where they jump."""

Profile = tuple[tuple[float, float], ...]


def rates_ahead(scheduler: Any, group: dict[str, Any], taken: int, until: int) -> Profile | None:
    """Points (step, learning rate) of a parameter group, from the `taken` steps of now to `until`.

    The scheduler may step once a step or once an epoch: which of them, is seen from its own count.  Empty where its
    rates depend on what is not known yet, such as a loss; None where it has not stepped, so that it is not known how
    often it will.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        return ()
    own = [i for i, g in enumerate(scheduler.optimizer.param_groups) if g is group]
    if not own:
        return ()
    if scheduler.last_epoch < 1 or taken < 2:
        return None
    unit = 1.0 if scheduler.last_epoch >= taken - 1 else taken / scheduler.last_epoch  # steps per step of the schedule
    try:
        rates = _run_ahead(scheduler, own[0], max(round((until - taken) / unit), 1))
    except Exception:  # somebody else's schedule may do anything
        return ()
    return tuple((taken + i * unit, rate) for i, rate in _thinned(rates))


def _run_ahead(scheduler: LRScheduler, group: int, steps: int) -> dict[int, float]:
    """Learning rates by the number of steps from now on."""
    if type(scheduler) is LambdaLR:  # any step can be had at once
        base, law, now = scheduler.base_lrs[group], scheduler.lr_lambdas[group], scheduler.last_epoch
        stride = max(steps // LONGEST, 1)
        return {i: float(base * law(now + i)) for i in [*range(0, steps, stride), steps]}
    twin_optimizer = _stand_in(scheduler.optimizer)
    twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): twin_optimizer})
    rates = {0: _number(twin_optimizer.param_groups[group]["lr"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it steps before its optimizer does
        for i in range(1, min(steps, LONGEST) + 1):
            try:
                twin.step()
            except ValueError:  # the schedule ends here
                break
            rates[i] = _number(twin_optimizer.param_groups[group]["lr"])
    return rates


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same settings and no parameters."""
    twin = object.__new__(type(optimizer))
    groups = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    twin.__dict__ = {"param_groups": [copy.deepcopy(g) | {"params": []} for g in groups], "state": {}, "defaults": {}}
    return twin


def _thinned(rates: dict[int, float]) -> Sequence[tuple[int, float]]:
    """Evenly spaced points, the ends, and both sides of jumps."""
    points = list(rates.items())
    largest = max(rates.values(), default=0.0)
    picked = {*range(0, len(points), max(len(points) // POINTS, 1)), len(points) - 1}
    jumps = [i for i in range(1, len(points)) if abs(points[i][1] - points[i - 1][1]) > 0.05 * largest]
    peak = max(range(len(points)), key=lambda i: points[i][1])
    picked |= {peak, *(j for i in jumps[: POINTS // 2] for j in (i - 1, i))}
    return [points[i] for i in sorted(picked)]


def _number(value: float | Tensor) -> float:
    return float(value)
