"""Meters of the direction in which the optimizer steps: they cost forward passes, whatever the optimizer.

None of them stands for λ1 of the Hessian, nor λ1 for them: see `measures.along_step` for what they measure.

P parameters.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..autodiff.objective import Objective
from ..errors import InvalidValue, NotConverged, NotFinite
from ..linalg.operators import without_autocast
from ..linalg.vectors import dot, length
from ..measures.along_step import StepGain, batch_sharpness, gain_from, noise_scale, step_gain
from ..optimizers.from_torch import flat
from .meters import Meter, Step

TRUSTED = 0.001
"""Difference from the measured loss and slope, over the slope, up to which those of the loop are used."""

SAME_NORM = 1 - 1e-4
"""Norms of gradients that differ by less are those of gradients clipped to one norm."""

HARMLESS = 5
"""Ties among the largest entries of gradients that were those of the loss, one after the other, that are enough."""

LONGEST = 100
"""Most steps that are read from one comparison of what the loop hands over to the next."""


class Taken:
    """A step while it is taken: the weights before it ``(P,)``, and what the gradients at hand say of it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.start = objective.weights()
        self.optimizers: list[Optimizer] = []
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []  # size of the largest entries of a gradient, and their number

    def add(self, optimizer: Optimizer) -> None:
        """Enter the part of the step that an optimizer has taken, with its gradients."""
        before = self.objective.unflatten(self.start)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in self.objective.parameters().items():
            if id(p) in own and p.grad is not None and not p.grad.is_sparse:
                g, now, w = (flat(t).to(self.start.dtype) for t in (p.grad, p, before[name]))
                self._sums.append(torch.stack([(g * (now - w)).sum(), (g * w).square().sum(), g.square().sum()]))
                size = g.abs()
                self._largest.append(torch.stack([size.amax(), (size == size.amax()).sum().to(size.dtype)]))

    def sums(self) -> tuple[float, float, float]:
        """Slope ``gᵀΔ``, ``‖g ∘ w‖`` and ``‖g‖``, by the gradients that the optimizers were given."""
        if not self._sums:
            return 0.0, 0.0, 0.0
        slope, sensitivity, square = torch.stack(self._sums).sum(0).tolist()
        return slope, math.sqrt(sensitivity), math.sqrt(square)

    def is_tied(self) -> bool:
        """Say whether several entries of the gradients are the largest in size, as after clipping by value."""
        if not self._largest:
            return False
        found = torch.stack(self._largest)
        return bool(found[found[:, 0] == found[:, 0].max(), 1].sum() > 1)


class OfSteps(Meter, ABC):
    """A meter of the whole step from one call of ``monitor.step`` to the next, by however many optimizers.

    It keeps one vector between them.
    """

    _taken: Taken | None = None
    _probe: tuple[Objective, Any] | None = None  # an objective, and its first batch

    def before(self, optimizer: Optimizer, objective: Objective) -> None:
        """Remember the weights before the step."""
        if objective.changes():
            self._taken = None
        elif self._taken is None or self._taken.objective is not objective or optimizer in self._taken.optimizers:
            self._taken = Taken(objective)

    def after(self, optimizer: Optimizer, objective: Objective) -> None:
        """Add the part of this optimizer."""
        if self._taken is not None:
            self._taken.optimizers.append(optimizer)
            self._taken.add(optimizer)

    @without_autocast()
    def read(self, step: Step) -> Mapping[str, float]:
        """Columns of the row of this step; those that have no value are left out."""
        taken, self._taken = self._taken, None
        if taken is None or taken.objective is not step.objective:
            return {}
        now = step.objective.weights()
        (found, *_) = step.objective.processes.each(lambda: self.columns(step, taken, now))  # an error is one on all
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @abstractmethod
    def columns(self, step: Step, taken: Taken, now: Tensor) -> Mapping[str, float]:
        """Measure along the step `taken`, which led to the weights `now` ``(P,)``."""

    def on_batch(self, step: Step) -> Objective:
        """Put the objective on the batch of the step, or on its own first one where the loop gives none."""
        if step.batch is not None:
            return step.objective.on([step.batch])
        if self._probe is None or self._probe[0] is not step.objective:
            with closing(step.objective.batches()) as batches:
                self._probe = step.objective, next(batches).raw
        return step.objective.on([self._probe[1]])


class Seldom:
    """Intervals that grow: of what it is called for, number 1 is due, then after `gap`, each time `growth` times that.

    The longest is `LONGEST`.
    """

    def __init__(self, gap: int = LONGEST, growth: int = 1) -> None:
        self._gap, self._growth, self._wait = gap, growth, 0

    def due(self) -> bool:
        """Count one more; say whether it is due."""
        self._wait -= 1
        if self._wait > 0:
            return False
        self._wait, self._gap = self._gap, min(self._growth * self._gap, LONGEST)
        return True


def comparisons() -> Seldom:
    """The numbers 1, 2, 4, .., 128, then one in a hundred: with fewer, autocast gives slopes that are 4 % wrong."""
    return Seldom(1, 2)


class Trust:
    """Trust in what a loop hands over: whether it belongs to the loss that is measured, by comparisons now and then."""

    def __init__(self) -> None:
        self.in_loss = True
        self._suspect = math.inf  # norm of gradients from which on they were not those of the loss
        self._comparisons = comparisons()
        self._harmless = 0  # ties of gradients that were those of the loss

    def in_slope(self, norm: float, tied: bool) -> bool:
        """Say whether the slope by gradients of this norm can be used without a comparison."""
        clipped = tied and self._harmless < HARMLESS
        return not clipped and norm < self._suspect and not self._comparisons.due()

    def compare(self, gain: StepGain, slope: float, norm: float, tied: bool) -> None:
        """Compare the slope by the gradients at hand with the measured one."""
        agrees = abs(slope - gain.slope) <= TRUSTED * abs(gain.slope)
        if tied:
            self._harmless = self._harmless + 1 if agrees else 0
            return
        if agrees and norm >= self._suspect:
            self._suspect = math.inf
        elif not agrees and norm < self._suspect:
            self._suspect = SAME_NORM * norm
            self._comparisons = comparisons()

    def compare_loss(self, loss: float, gain: StepGain) -> None:
        """Compare the loss of the loop with the measured one; one that was another is not trusted again."""
        self.in_loss &= abs(loss - gain.loss) <= max(TRUSTED * abs(gain.slope), gain.rounding)


class AlongStep(OfSteps):
    """Distance from the edge along the step, ``1 - ρ`` with the gain ratio ρ of the step's own batch [N60].

    Near zero the step was short; at 1 it did not pay, and beyond the loss of the very batch rises.  It needs no rule
    of the optimizer and is not the ratio of λ1 to its threshold.  There is no value for steps uphill (of momentum),
    for none (skipped), and where rounding hides the change of the loss.

    With ``monitor.step(loss, batch)`` it costs one forward pass, and the weights before the step in memory.  The loss
    must be that of the batch at the weights before the step, and the gradients those of it.  Both are compared with the
    measured ones, by a gradient, at the steps 1, 2, 4, 8, .. of those that are read, then at one in a hundred; rounding
    is measured by three more forward passes at one in a hundred.  Where the loss is another (none handed over, of low
    precision, with dropout), it costs one more forward pass; where gradients are (clipped, scaled, accumulated over
    batches or processes, of low precision, with dropout), a gradient.  Those clipped by their norm are recognized by
    it, those clipped by value by several entries that are the largest in size.  Without a batch, the first of the
    objective is measured, by a gradient and a forward pass.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._trust = Trust()
        self._samples = Seldom()
        self._noise = 0.0  # rounding of the change, where it was measured last

    def columns(self, step: Step, taken: Taken, now: Tensor) -> Mapping[str, float]:
        """Measure the distance from the edge and the slope along the step."""
        gain = self._gain(step, taken, now)
        return {"edge_along_step": gain.edge, "slope_along_step": gain.slope}

    def _gain(self, step: Step, taken: Taken, now: Tensor) -> StepGain:
        f, w, delta = self.on_batch(step), taken.start, now - taken.start
        slope, sensitivity, norm = taken.sums()
        tied = taken.is_tied()
        sampled = self._samples.due()
        noise = None if sampled else self._noise
        if step.batch is not None and self._trust.in_slope(norm, tied):
            loss = step.loss if step.loss is not None and self._trust.in_loss else f.value(w).item()
            gain = gain_from(f, w, delta, loss, slope, sensitivity, noise=noise)
        else:
            gain = step_gain(f, w, delta, noise=noise)
            if step.batch is not None:
                self._trust.compare(gain, slope, norm, tied)
                if step.loss is not None:
                    self._trust.compare_loss(step.loss, gain)
        if sampled:
            self._noise = max(gain.rounding, self._noise / 2)
        return gain


class StepMeter(OfSteps):
    """Measures of the step's batch, each a function of its objective, the weights before the step, and the step.

    They are given by the names of their columns, such as ``{"critical_step": critical_step}``, and cost what they say;
    without a batch they measure the first of the objective.
    """

    def __init__(self, measures: Mapping[str, Callable[[Objective, Tensor, Tensor], float]], every: int = 50) -> None:
        self.measures = dict(measures)
        self.every = every

    def columns(self, step: Step, taken: Taken, now: Tensor) -> Mapping[str, float]:
        """Take all measures; one that does not converge, or makes no sense for this step, has no value."""
        f, found = self.on_batch(step), {}
        for name, measure in self.measures.items():
            with contextlib.suppress(NotConverged, NotFinite, InvalidValue):
                found[name] = measure(f, taken.start, now - taken.start)
        return found


class UpdateCosine(OfSteps):
    """Cosine of the angle between a step and the one before: near -1 where training oscillates, 1 on a straight path.

    No forward pass, but one more vector in memory.  Momentum makes it positive, noise takes it to zero; it is no
    measure of curvature.
    """

    _last: Tensor | None = None

    def columns(self, step: Step, taken: Taken, now: Tensor) -> Mapping[str, float]:
        """Compare the step with the last one."""
        last, self._last = self._last, now - taken.start
        if last is None or last.shape != self._last.shape:
            return {}
        lengths = length(last) * length(self._last)
        return {"update_cosine": dot(last, self._last) / lengths if lengths > 0 else math.nan}


class BatchSharpness(Meter):
    """Batch sharpness over the objective's batches, with its standard error (see `measures.batch_sharpness`).

    3 gradients of each batch, no matter what the loop hands over.  SGD is at its edge where it is 2/lr; it is not λ1.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every

    @without_autocast()
    def read(self, step: Step) -> Mapping[str, float]:
        """Measure at the weights after the step."""
        found = batch_sharpness(step.objective, step.objective.weights())
        columns = {"batch_sharpness": found.value, "batch_sharpness_error": found.standard_error}
        return {name: value for name, value in columns.items() if math.isfinite(value)}


class GradientNoise(Meter):
    """Noise scale of the gradient over the objective's batches, with its interval (see `measures.noise_scale`).

    2 gradients of each batch, no matter what the loop hands over.  It is about the noise of batches, not curvature.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every

    @without_autocast()
    def read(self, step: Step) -> Mapping[str, float]:
        """Measure at the weights after the step."""
        found = noise_scale(step.objective, step.objective.weights())
        low, high = found.interval
        columns = {"noise_scale": found.value, "noise_scale_low": low, "noise_scale_high": high}
        return {name: value for name, value in columns.items() if math.isfinite(value)}
