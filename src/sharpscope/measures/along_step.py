"""Measures along one step of training, of any optimizer: whether it pays, and how far from the edge it is.

With Δ the step taken at w, and slope ``s = ∇L(w)ᵀΔ``:

    ρ = (L(w + Δ) - L(w)) / s                    gain ratio of trust-region methods
    1 - ρ = ΔᵀHΔ / (-2 s) + third order          0 for tiny steps, 1 where a step no longer pays

That is curvature along the step's own direction.  It does not stand for λ1 of the Hessian, nor λ1 for it: where λ1 is
at its threshold, the curvature along the gradient may be nearly as large or a hundred times smaller.

P parameters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autodiff.objective import Objective, require_objective
from ..errors import InvalidValue, NotConverged
from ..linalg.trace import student
from ..linalg.vectors import dot, length

CLOSE = (2.0**-8, -(2.0**-8), 2.0**-9)
"""Fractions of a step at which the loss is compared with its parabola along the step: what differs is rounding."""

ROUNDING = 0.05
"""Error of the change of the loss by rounding beyond which there is no value, relative to change or slope."""


@dataclass(frozen=True)
class StepGain:
    """Change of a loss by a step, beside the slope of the loss along it.

    The change is ``L(w + Δ) - L(w)``, the slope ``∇L(w)ᵀΔ``.  `loss` is that before the step, and `rounding` estimates
    the error of the change by the arithmetic.
    """

    loss: float
    change: float
    slope: float
    rounding: float

    @property
    def ratio(self) -> float:
        """Gain ratio ρ, the change over the slope: 1 for tiny steps, 0 where a step no longer pays."""
        return 1 - self.edge

    @property
    def edge(self) -> float:
        """Distance from the edge along the step, ``1 - ρ`` [N60].

        Not a number where the loss does not fall to first order (no step, or one uphill, as momentum takes them), and
        where rounding hides the change.
        """
        largest = max(abs(self.change), abs(self.slope))
        if not (self.slope < 0 and math.isfinite(largest) and self.rounding <= ROUNDING * largest):
            return math.nan
        return 1 - self.change / self.slope


def step_gain(f: Objective, w: Tensor, step: Tensor, *, noise: float | None = None) -> StepGain:
    """Measure the gain ratio of a `step` ``(P,)`` taken at `w` ``(P,)``: one gradient and one forward pass [N60].

    Rounding is estimated from three more forward passes close to w, or taken from an earlier call as `noise`.

    >>> from torch import nn, ones, zeros
    >>> f = Objective(nn.Linear(2, 1, bias=False), nn.functional.mse_loss, [(ones(4, 2), zeros(4, 1))])
    >>> w = ones(2)  # L = (w1 + w2)², its curvature along the gradient 4, so that the edge is at lr = 2/4
    >>> round(step_gain(f, w, -0.25 * f.grad(w)).edge, 4), round(step_gain(f, w, -0.5 * f.grad(w)).edge, 4)
    (0.5, 1.0)
    """
    _check(f, w, step)
    loss, g = f.value_and_grad(w)
    return gain_from(f, w, step, loss.item(), dot(g, step), length(g * w), noise=noise)


def gain_from(
    f: Objective, w: Tensor, step: Tensor, loss: float, slope: float, sensitivity: float, *, noise: float | None = None
) -> StepGain:
    """Measure the gain ratio where the `loss` at w and the `slope` of the step are known: one forward pass.

    `sensitivity` is ``‖∇L(w) ∘ w‖``: rounding is as if every weight were off by its unit of rounding.  Logarithms of
    probabilities near one lose more, so that the loss is also compared with its parabola close to w, by three more
    forward passes, unless `noise` is the rounding of an earlier call.
    """
    end = f.value(w + step).item()
    if noise is None:
        parabola = {c: loss + c * slope + c**2 * (end - loss - slope) for c in CLOSE}
        noise = max(abs(f.value(w + c * step).item() - parabola[c]) for c in CLOSE)
    floor = torch.finfo(f.dtype).eps * (max(abs(loss), abs(end)) + sensitivity)
    return StepGain(loss, end - loss, slope, max(floor, noise))


def curvature_along_step(f: Objective, w: Tensor, step: Tensor) -> float:
    """Measure the curvature along a step over that at which it stops paying, ``ΔᵀHΔ / (-2 ∇LᵀΔ)`` [N60].

    Costs a gradient that is kept and one product with the Hessian, 3 gradients.  It is the second-order part of
    `StepGain.edge`, without what the loss does beyond its parabola; not a number for steps uphill.
    """
    _check(f, w, step)
    at = f.at(w)
    slope = dot(at.grad, step)
    return dot(step, at.hvp(step)) / (-2 * slope) if slope < 0 else math.nan


def critical_step(f: Objective, w: Tensor, step: Tensor, *, rtol: float = 0.01, max_forwards: int = 12) -> float:
    """Find the factor c at which the loss of w is met again along a step, ``L(w + c Δ) = L(w)``, c > 0 [N60].

    Costs one gradient and 2 forward passes on a parabola, 4 to 6 as a rule.  The search is for the root of the gain
    ratio of c Δ, which falls from one at c = 0, to within `rtol` of zero: the first root that it brackets, so that a
    loss that is not convex along the step may have met its old value before.  It is not 2/λ1 over the learning rate.

    Raises:
        NotConverged: no such c within `max_forwards`, as where the loss falls on and on.
        ValueError: the step does not go downhill.

    >>> from torch import nn, ones, zeros
    >>> f = Objective(nn.Linear(2, 1, bias=False), nn.functional.mse_loss, [(ones(4, 2), zeros(4, 1))])
    >>> round(critical_step(f, ones(2), -0.1 * f.grad(ones(2))), 3)  # stable up to lr = 0.5
    5.0
    """
    _check(f, w, step)
    value, g = f.value_and_grad(w)
    start, slope = value.item(), dot(g, step)
    if not slope < 0:
        raise InvalidValue(f"the loss has slope {slope:.3g} along the step: only a step downhill has a critical length")

    def ratio(c: float) -> float:
        return (f.value(w + c * step).item() - start) / (c * slope)

    low, high = (0.0, 1.0), (math.inf, -1.0)  # factors, and the ratios there
    c = 1.0
    for _ in range(max_forwards):
        r = ratio(c)
        if abs(r) <= rtol:
            return c
        if r > 0:
            low = (c, r)
        else:
            high = (c, r if math.isfinite(r) else -1.0)
        c = _between(low, high)
    raise NotConverged(f"no length at which the step stops paying within {max_forwards} forward passes, up to {c:.3g}")


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Choose the next factor: by the line through both ends, well inside; beyond `low` where there is no other."""
    (a, r), (b, s) = low, high
    if math.isinf(b):
        return min(a / (1 - r), 4 * a) if r < 1 else 4 * a
    return min(max(a + (b - a) * r / (r - s), a + 0.05 * (b - a)), b - 0.05 * (b - a))


@dataclass(frozen=True)
class BatchMean:
    """A mean over batches, with its standard error (not a number for one batch)."""

    value: float
    standard_error: float
    batches: int


def batch_sharpness(f: Objective, w: Tensor) -> BatchMean:
    """Measure batch sharpness, ``E[gᵀHg / ‖g‖²]`` with gradient g and Hessian H of one batch [N61].

    (Andreyev & Beneventano 2024, arXiv 2412.20553: SGD settles where it is 2/lr.)  The mean is over the objective's
    batches, which should have the size of those of the training; each costs a gradient and a product, 3 gradients.  It
    is not λ1, neither of a batch nor of the mean loss.
    """
    require_objective(f)

    def along_gradients() -> list[float]:
        found = []
        for one in _by_batch(f.local(), w):
            at = one.at(w)
            square = dot(at.grad, at.grad)
            if square > 0:
                found.append(dot(at.grad, at.hvp(at.grad)) / square)
        return found

    found = [value for own in f.processes.each(along_gradients) for value in own]
    if not found:
        return BatchMean(math.nan, math.nan, 0)
    values = torch.tensor(found, dtype=torch.float64)
    n = len(values)
    return BatchMean(values.mean().item(), values.std().item() / n**0.5 if n > 1 else math.nan, n)


@dataclass(frozen=True)
class NoiseScale:
    """The number of examples at which noise and gradient balance, ``tr Σ / ‖G‖²``, and an interval of 95 %.

    The upper end is infinite where these batches do not tell the gradient from zero.
    """

    value: float
    interval: tuple[float, float]
    noise: float  # tr Σ, of the gradient of one example
    square: float  # ‖G‖², without the part of the noise


def noise_scale(f: Objective, w: Tensor) -> NoiseScale:
    """Estimate the simple noise scale of the gradient, ``B = tr Σ / ‖G‖²``, from two sizes of batches [N62].

    (McCandlish et al. 2018, arXiv 1812.06162.)  The small size is that of the objective's batches, which must be equal
    (a shorter last one is left out), the big one all of them: ``‖G_b‖² = ‖G‖² + tr Σ / b``.  The interval is Fieller's,
    with the batches left out in turn.  It costs two gradients of each batch, two vectors, and the data in memory.  It
    says how much noise a batch has, and nothing of curvature.

    Raises:
        ValueError: fewer than three batches of one size.
    """
    require_objective(f)
    own = [(batch.raw, batch.examples) for batch in f.batches(w.device)]
    sizes = [n for part in f.processes.each(lambda: [n for _, n in own]) for n in part]
    b, k = sizes[0], len(sizes) - (sizes[-1] < sizes[0])
    if k < 3 or set(sizes[:k]) != {b}:
        raise InvalidValue(f"a noise scale needs three batches or more, all of one size; these have {sizes[:8]}")
    equal = [raw for raw, n in own if n == b]
    total = k * f.on(equal).grad(w)

    def products() -> list[tuple[float, float]]:
        gradients = (f.local().on([raw]).grad(w) for raw in equal)
        return [(dot(total, g), dot(g, g)) for g in gradients]

    pairs = [pair for part in f.processes.each(products) for pair in part]
    inner, squares = torch.tensor(pairs, dtype=torch.float64).T
    whole = inner.sum()  # ‖Σ g‖²
    value = _sizes_compared(whole, squares.sum(), k, b)
    others = _sizes_compared(whole - 2 * inner + squares, squares.sum() - squares, k - 1, b)
    covariance = torch.cov(torch.stack(others)) * (k - 1) ** 2 / k  # of the jackknife
    noise, square = (v.item() for v in value)
    return NoiseScale(noise / square if square > 0 else math.inf, _fieller(noise, square, covariance, k), noise, square)


def _sizes_compared(whole: Tensor, squares: Tensor, k: int, b: float) -> tuple[Tensor, Tensor]:
    """Estimate tr Σ and ‖G‖² from ``‖Σ g‖²`` and ``Σ ‖g‖²`` of k gradients of b examples, without bias."""
    small, big = squares / k, whole / k**2
    noise = (small - big) / (1 / b - 1 / (k * b))
    return noise, big - noise / (k * b)


def _fieller(noise: float, square: float, covariance: Tensor, k: int) -> tuple[float, float]:
    """Interval of a ratio: all x for which ``noise - x square`` is within its error of zero."""
    t2 = student(k - 1) ** 2
    a = square * square - t2 * covariance[1, 1].item()
    b = noise * square - t2 * covariance[0, 1].item()
    c = noise * noise - t2 * covariance[0, 0].item()
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a <= 0 or square <= 0:
        return (c / (b + root) if c > 0 and a <= 0 else 0.0), math.inf
    return max((b - root) / a, 0.0), (b + root) / a


def _by_batch(f: Objective, w: Tensor) -> Iterator[Objective]:
    """Put the loss on each batch by itself."""
    return (f.on([batch.raw]) for batch in f.batches(w.device))


def _check(f: Objective, w: Tensor, step: Tensor) -> None:
    """Raise InvalidType or InvalidValue where this is no objective with its weights and a step."""
    require_objective(f)
    if not w.shape == step.shape == (f.size,):
        raise InvalidValue(
            f"weights {tuple(w.shape)} and step {tuple(step.shape)} must be the flat vectors ({f.size},) of this"
            " objective: f.weights() before the step, and f.weights() after it less those"
        )
