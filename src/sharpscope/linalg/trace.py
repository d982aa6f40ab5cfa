"""Trace and diagonal of a symmetric operator, each with an error bar from the spread of its samples.

Trace and diagonal share one estimator.  A sketch ``Q = orth(A Ω)`` takes the outliers out exactly, and independent
random signs v measure what is left:

    A = QQᵀA + AQQᵀ - QQᵀAQQᵀ + Π A Π,    Π = I - QQᵀ,    E[v ∘ Π A Π v] = diag(Π A Π)

Given Q the samples are independent, so their spread is an honest standard error.  Estimators that leave one column out
in turn (XTrace) are up to twice as exact at equal cost, but their samples depend on each other: on decaying spectra
they report an error a quarter too small.

P parameters.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from ..display import progress, report
from ..errors import InvalidValue, NotConverged, NotFinite
from .operators import SymmetricOperator, require_operator, without_autocast
from .units import Unit

SKETCH, WIDEST = 16, 64
"""Numbers of columns of the first sketch and of the widest one."""

PILOT = 16
"""Number of probes before their spread is relied on."""

COLUMNS = 8
"""Number of columns that are multiplied at once."""

LONG = 2**20
"""Length of vectors from which on sketches are narrow, and columns are taken one by one: their algebra costs most."""

NARROW = 8
"""Number of columns of the sketch of long vectors."""


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes and its standard error, both scalars or both ``(P,)``; the error is 0 where exact."""

    value: Tensor
    standard_error: Tensor
    probes: int
    num_matvecs: int

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Ends of the interval that holds the true value (of each entry) for at least 95 % of the seeds.

        Student's t, times ``1 + 1/√(2 dof)``: samples are skewed, and sampling stops where the spread happens to look
        small; both cost plain t intervals up to 4 % of their coverage.
        """
        dof = max(self.probes - 1, 1)
        reach = student(dof) * (1 + (2 * dof) ** -0.5) * self.standard_error
        return self.value - reach, self.value + reach


@without_autocast()
def trace(
    a: SymmetricOperator, *, rtol: float = 0.05, atol: float = 0.0, max_matvecs: int = 1000, seed: int = 0
) -> Estimate:
    """Estimate the trace to a standard error of ``max(rtol |tr A|, atol)`` [N16].

    After Meyer, Musco, Musco & Woodruff (2021).  Where P products are cheaper than the samples that are still needed,
    the trace is taken exactly.

    Raises:
        NotConverged: with the value and the error reached; a trace near zero needs `atol`.
        NotFinite: for an operator whose products are not finite.

    >>> found = trace(SymmetricOperator(lambda v: 3 * v, torch.zeros(1000)))
    >>> found.num_matvecs, bool(found.interval[0] < 3000 < found.interval[1])
    (48, True)
    """
    found = _mean(a, lambda x: a.sum(x.sum(dim=0, keepdim=True)), rtol=rtol, atol=atol, budget=max_matvecs, seed=seed)
    return replace(found, value=found.value[0], standard_error=found.standard_error[0])


@without_autocast()
def diagonal(
    a: SymmetricOperator, *, rtol: float = 0.1, atol: float = 0.0, max_matvecs: int = 1000, seed: int = 0
) -> Estimate:
    """Estimate the diagonal until ``‖standard errors‖ ≤ max(rtol ‖diag A‖, atol)`` [N17].

    After Bekas, Kokiopoulou & Saad (2007).

    Raises:
        NotConverged: with the norms of the diagonal and of the errors reached.
        NotFinite: for an operator whose products are not finite.
    """
    require_operator(a)
    return _mean(a, lambda x: x, rtol=rtol, atol=atol, budget=max_matvecs, seed=seed)


@progress("trace or diagonal")
def _mean(
    a: SymmetricOperator, reduce: Callable[[Tensor], Tensor], *, rtol: float, atol: float, budget: int, seed: int
) -> Estimate:
    """Estimate the mean of ``reduce(v ∘ A v)`` over signs v; `reduce` is linear and takes columns."""
    require_operator(a, spread=True)
    if min(rtol, atol) < 0 or max(rtol, atol) == 0:
        raise InvalidValue(f"rtol={rtol:g} and atol={atol:g} leave no error to stop at; make one of them positive")
    if budget < min(2 * SKETCH + PILOT, a.size):
        raise InvalidValue(f"max_matvecs={budget} is less than a sketch and its first probes: {2 * SKETCH + PILOT}")
    if a.size <= 2 * SKETCH + PILOT:
        return _exact(a, reduce, 0)
    whole, unit = a, Unit()
    sketch, widest = (SKETCH, WIDEST) if a.size < LONG else (NARROW, NARROW)
    a = unit.applied(whole)
    generator = torch.Generator().manual_seed(seed)
    q = z = a.like.new_empty((len(a.like), 0))
    used = 0
    while True:  # once for every sketch; samples of an earlier one have another spread, and are dropped
        wider = min(max(q.shape[1], sketch), widest - q.shape[1])
        y = multiply(a, a.gaussian(wider, generator))
        fresh = a.qr(torch.cat([q, y], dim=1))[0][:, q.shape[1] :]
        q, z = torch.cat([q, fresh], dim=1), torch.cat([z, multiply(a, fresh)], dim=1)
        used += 2 * wider
        known = reduce((q * (2 * z - q @ a.inner(q.T, z.T).to(q))).sum(dim=1, keepdim=True).double())[:, 0]
        moments, more = _Moments(torch.zeros_like(known)), PILOT
        while True:
            for x in _samples(a, q, z, more, generator):
                moments.add(reduce(x.double()))
                used += x.shape[1]
                report(used)
            value, error = known + moments.mean, moments.standard_error
            report(used, standard_error=error.norm().item() / (value.norm().item() or 1.0))
            target = max(rtol * value.norm().item(), atol / unit.size)
            if error.norm().item() <= target:
                return Estimate(unit.size * value, unit.size * error, moments.count, used)
            wanted = moments.count * (error.norm().item() / target) ** 2 if target > 0 else math.inf
            more = math.ceil(min(1.1 * wanted, 1e12)) - moments.count
            doubled = 2 * min(q.shape[1], widest - q.shape[1]) + PILOT
            if doubled > PILOT and more > 3 * used and used + doubled <= budget and 3 * doubled < a.size:
                break
            if more >= a.size and used + a.size <= budget:
                return _exact(whole, reduce, used)
            if used >= budget:
                raise _not_converged(value.norm().item(), error.norm().item(), target, unit.size, used)
            more = min(more, budget - used)


def _not_converged(value: float, error: float, target: float, unit: float, used: int) -> NotConverged:
    return NotConverged(
        f"{unit * value:.6g} is known to a standard error of {unit * error:.3g} after {used} products, not to"
        f" {unit * target:.3g}; raise max_matvecs, rtol or atol"
    )


class _Moments:
    """Mean and standard error of independent columns, kept as running sums."""

    def __init__(self, zero: Tensor) -> None:
        self.count = 0
        self.mean = zero
        self._squares = zero

    def add(self, x: Tensor) -> None:
        count = self.count + x.shape[1]
        shift = x.mean(dim=1) - self.mean
        spread = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=1)
        self._squares = self._squares + spread + shift.square() * (self.count * x.shape[1] / count)
        self.mean = self.mean + shift * (x.shape[1] / count)
        self.count = count

    @property
    def standard_error(self) -> Tensor:
        return (self._squares / (self.count * (self.count - 1))).sqrt()


def _samples(a: SymmetricOperator, q: Tensor, z: Tensor, n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw n samples ``v ∘ Π A Π v`` as columns ``(P, ≤ COLUMNS)``, v random signs and ``z = A q``."""
    at_once, kind = (COLUMNS, torch.int64) if a.size < LONG else (1, torch.int8)
    for done in range(0, n, at_once):
        v = a.drawn(
            min(at_once, n - done),
            lambda shape: 2 * torch.randint(2, shape, generator=generator, dtype=kind) - 1,
        )
        image = multiply(a, v) - z @ a.inner(q.T, v.T).to(q)
        yield v * (image - q @ a.inner(q.T, image.T).to(q))


def _exact(a: SymmetricOperator, reduce: Callable[[Tensor], Tensor], used: int) -> Estimate:
    entries = torch.zeros_like(a.like)
    start = 0 if a.layout is None else a.layout.start
    for first in range(-start, a.size - start, COLUMNS):
        columns = a.like.new_zeros((len(a.like), min(COLUMNS, a.size - start - first)))
        own = range(max(first, 0), max(min(first + columns.shape[1], len(a.like)), 0))
        for row in own:
            columns[row, row - first] = 1
        image = multiply(a, columns)
        for row in own:
            entries[row] = image[row, row - first]
        report(used + start + first + columns.shape[1], total=used + a.size)
    value = reduce(entries.double()[:, None])[:, 0]
    return Estimate(value, torch.zeros_like(value), 0, used + a.size)


def multiply(a: SymmetricOperator, v: Tensor) -> Tensor:
    """Multiply, and raise NotFinite where the product is not finite."""
    image = a @ v
    if a.sum((~image.isfinite()).any().double().cpu()).item():
        raise NotFinite("a product with the operator is not finite: its spectrum is not defined at these weights")
    return image


def student(dof: int) -> float:
    """Return the t that Student's ``|T|`` exceeds in 5 % of cases.

    Fisher's series, right to 1 % from 3 degrees of freedom on.
    """
    z, n = NormalDist().inv_cdf(0.975), dof
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
