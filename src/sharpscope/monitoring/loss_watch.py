"""Loss spikes: the loss of the batch of every step, where it jumps, and what was different just before.

A spike begins at a loss that is higher than all of the last `WINDOW` and above their median by more than a margin, six
scaled median deviations or a fifth of the median, whichever is more, while some loss of the last few steps was below
half the margin, so that a slow rise is none.  It is over after `CALM` losses in a row below half the margin.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidValue
from ..linalg.operators import without_autocast
from ..measures.row import applied_gradient
from ..optimizers.declared import seen_as_known
from ..optimizers.from_torch import flat
from .meters import Meter, Step
from .tensor_table import norms_over_root

WINDOW = 50
"""Number of losses that a new one is compared with."""

FEWEST = 20
"""Number of losses before a spike can be noticed."""

BEFORE = 8
"""Steps before a spike in which its causes are searched: spikes follow a lag of v by 1 to 8 (arXiv 2304.13013)."""

TAIL = 2.0
"""Multiple of the largest deviation among the last losses that a spike exceeds: small batches have heavy tails."""

RISE = 5
"""Steps in which a loss rises where it is a spike."""

CALM = 5
"""Losses in a row below half the margin after which a spike is over."""

LONGEST = 200
"""Steps after which a loss that has stayed high is no spike any more but a new level."""


@dataclass(frozen=True)
class LossAt:
    """A step: loss and gradient of its batch, lag of v behind the gradient, learning rate.

    The gradient is that before clipping where the loop hands its norm over.  Not a number where it is unknown.
    """

    step: int
    loss: float
    gradient: float = math.nan
    lag: float = math.nan
    rate: float = math.nan


@dataclass
class Spike:
    """A spike of the loss as it goes on: the median before it, the margin above that, and its columns so far."""

    median: float
    margin: float
    columns: dict[str, float]
    calm: list[LossAt] = field(default_factory=list)


class SpikeFinder:
    """Finds spikes in a series of losses; it sees one after the other."""

    def __init__(self) -> None:
        self.quiet: deque[LossAt] = deque(maxlen=WINDOW)
        self.spike: Spike | None = None

    def see(self, now: LossAt) -> dict[str, float]:
        """Take in a step; columns of a spike where one has begun or ended with it, otherwise none."""
        if not math.isfinite(now.loss):
            return {}
        if self.spike is not None:
            return self._within(self.spike, now)
        losses = [m.loss for m in self.quiet]
        if len(losses) >= FEWEST and now.loss > max(losses):
            median, margin = _level(losses)
            margin = max(margin, TAIL * (max(losses) - median))
            if now.loss > median + margin and min(losses[-RISE:]) <= median + margin / 2:
                self.spike = Spike(median, margin, {"spike": float(now.step), "spike_loss": now.loss})
                self.spike.columns |= {"spike_base": median} | _causes(list(self.quiet), now)
                return dict(self.spike.columns)
        self.quiet.append(now)
        return {}

    def _within(self, spike: Spike, now: LossAt) -> dict[str, float]:
        """Follow a spike until it is over."""
        spike.columns["spike_loss"] = max(spike.columns["spike_loss"], now.loss)
        calm = now.loss <= spike.median + spike.margin / 2
        spike.calm = [*spike.calm, now] if calm else []
        began = spike.columns["spike"]
        if len(spike.calm) == CALM:
            spike.columns["spike_length"] = spike.calm[0].step - began
            self.quiet.extend(spike.calm)
        elif now.step - began < LONGEST:
            return {}
        else:
            self.quiet.clear()
        self.spike = None
        return spike.columns


class LossWatch(Meter):
    """Watches the loss that the loop hands over, ``monitor.step(loss)``, for spikes.

    At a spike the loss of the objective's own data is evaluated, once, to tell an unusual batch from damaged weights.
    Where training runs on an accelerator, losses and norms stay there until they are read together, at every
    `rows`-th step; a spike that has passed by then has no such evaluation.

    Args:
        rows: steps between two rows with the loss of the batch and the norm of the gradient.

    Raises:
        InvalidValue: `rows` is less than one; when it is read, the loop hands over no loss.
    """

    def __init__(self, rows: int = 20) -> None:
        if rows < 1:
            raise InvalidValue(f"rows={rows}: the number of steps between two rows is at least 1")
        self.rows = rows
        self._finder = SpikeFinder()
        self._gradient: Tensor | None = None  # as it was applied
        self._unclipped: float | Tensor | None = None
        self._lag: Tensor | None = None
        self._rate: float | Tensor = math.nan
        self._waiting: list[tuple[int, list[float | Tensor]]] = []
        self._latest = LossAt(0, math.nan)
        self._events: deque[dict[str, float]] = deque()

    def unclipped(self, norm: float | Tensor) -> None:
        """Hand over the norm of the gradient before it is clipped, as ``clip_grad_norm_`` returns it, at every step."""
        self._unclipped = norm

    def after(self, optimizer: Optimizer, objective: Objective) -> None:
        """Keep the norm of the gradient, the lag of v behind it, and the learning rate, on their device."""
        self._gradient = applied_gradient(objective.parameters().values())
        self._lag = lag_of_squares(optimizer)
        self._rate = optimizer.param_groups[0]["lr"]

    def read(self, step: Step) -> Mapping[str, float]:
        """Give the loss of the batch and the norm of the gradient where a row is due, and a spike where one is seen."""
        if step.given is None:
            if self._latest.step == 0 and not self._waiting:
                raise InvalidValue("the loop hands over no loss; call monitor.step(loss)")
            return {}
        given = step.given.detach() if isinstance(step.given, Tensor) else step.given
        whole = self._gradient if self._unclipped is None else self._unclipped
        self._unclipped = None
        parts = [given, *(math.nan if t is None else t for t in (whole, self._lag)), self._rate]
        self._waiting.append((step.number, parts))
        due = step.number % self.rows == 0
        if due or not on_accelerator(parts):
            self._look_through(step)
        row = self._events.popleft() if self._events else {}
        if due:
            row |= {"batch_loss": self._latest.loss}
            row |= {} if self._gradient is None else {"applied_gradient": self._gradient.item()}
        return {name: float(f"{value:.7g}") for name, value in row.items() if math.isfinite(value)}

    def _look_through(self, step: Step) -> None:
        """Read what waits on the device, and look for spikes."""
        values = _numbers([part for _, parts in self._waiting for part in parts])
        for i, (number, parts) in enumerate(self._waiting):
            self._latest = LossAt(number, *values[i * len(parts) : (i + 1) * len(parts)])
            found = self._finder.see(self._latest)
            if found:
                self._events.append(found)
        self._waiting = []
        spike = self._finder.spike
        if spike is not None and "spike_probe" not in spike.columns:
            with without_autocast():
                spike.columns["spike_probe"] = step.objective.value(step.objective.weights()).item()
            self._events[-1] = dict(spike.columns)


def on_accelerator(numbers: Sequence[float | Tensor]) -> bool:
    """Say whether any of these numbers would have to be waited for."""
    return any(isinstance(t, Tensor) and t.device.type != "cpu" for t in numbers)


def lag_of_squares(optimizer: Optimizer) -> Tensor | None:
    """Rms of g/√v̂ in the matrix in which it is largest: above one where v of Adam lags behind the gradient g.

    A scalar on the device of the weights; None for other optimizers.  (StableAdamW, Wortsman et al. 2023, arXiv
    2304.13013, divides the learning rate by it.)
    """
    optimizer = seen_as_known(optimizer)
    there = [
        (p, optimizer.state[p], group)
        for group in optimizer.param_groups
        for p in group["params"]
        if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        if p.grad is not None and not p.grad.is_sparse and "exp_avg_sq" in optimizer.state.get(p, {})
    ]
    there = [entry for entry in there if entry[0].dim() > 1] or there
    if not there:
        return None
    g, v = [flat(p.grad) for p, *_ in there], [flat(state["exp_avg_sq"]) for _, state, _ in there]
    norms = list(norms_over_root(g, v, [group["eps"] for *_, group in there]))
    factors = [_correction(state["step"], float(group["betas"][1])) / p.numel() ** 0.5 for p, state, group in there]
    lags: Tensor = torch.stack([norm * factor for norm, factor in zip(norms, factors, strict=True)])
    return lags.max()


def _correction(step: Tensor, beta2: float) -> float | Tensor:
    """The factor ``√(1 - β2^t)`` of √v; a number unless the step count t is on a device, which it stays on."""
    t = step.item() if step.device.type == "cpu" else step
    return (1 - beta2**t) ** 0.5


def _level(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the margin above it that noise stays within: six scaled median deviations, or a fifth of it."""
    median = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(np.array(values) - median)))
    return median, max(6 * deviation, 0.2 * abs(median))


def _causes(quiet: Sequence[LossAt], now: LossAt) -> dict[str, float]:
    """Columns that say what was different at the steps before a spike, and at the spike itself."""
    before = quiet[-BEFORE:]
    row = {}
    gradients = [m.gradient for m in quiet if math.isfinite(m.gradient)]
    if gradients and len(gradients) == len(quiet):
        median, margin = _level(gradients)
        high = [now.step - m.step for m in before if m.gradient > median + max(margin, median)]
        row = {"spike_lead": float(max(high, default=0))}
        if median > 0:
            row["spike_gradient"] = now.gradient / median
            row["spike_gradient_before"] = max(m.gradient for m in before) / median
    rates = [m.rate for m in quiet]
    usual = float(np.median(rates))
    if usual > 0:
        row["spike_rate"] = max(m.rate for m in before) / usual
    return row | {"spike_lag": max(m.lag for m in before)}


def _numbers(scalars: Sequence[float | Tensor]) -> list[float]:
    """Read numbers, those on a device with one transfer."""
    tensors = [s.reshape(()) for s in scalars if isinstance(s, Tensor)]
    read = iter(torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(s, Tensor) else float(s) for s in scalars]
