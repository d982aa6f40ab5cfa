"""Split the error of a sharpness into those of the solver, of the sample of the data, and of rounding.

    solver    r²/gap of the top Ritz pair, r its residual; r where no gap is seen, and never beyond `Eigenpairs.upper`
    sample    λ1 of these n examples, for λ1 of what they were drawn from: first order in the noise of H the standard
              error of vᵀHv over disjoint groups; second order a bias upward, since λ1 is convex in H
    rounding  the error of vᵀHv by the arithmetic

The bias comes from the mean λ1 of halves and quarters of the data, which convexity orders: λ1(all) ≤ halves ≤ quarters.
It falls like ``1/n`` where the noise is small and more slowly, at least like ``1/√n``, where it is not.  P parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..autodiff.curvature import hessian
from ..autodiff.objective import Objective, require_objective
from ..errors import InvalidValue
from ..linalg.eigenpairs import Eigenpairs
from ..linalg.lanczos import lanczos
from ..linalg.operators import SymmetricOperator
from ..linalg.trace import student

QUARTERS = 4
"""Number of parts of the data in each of which λ1 is solved for."""

MAX_GROUPS = 16
"""Number of groups that the standard error is computed over, at most."""


@dataclass(frozen=True)
class ErrorBudget:
    """The sharpness of a sample of the data, ``λ1(∇²L)``, and its errors.

    Those of the sample are against all data that might be drawn.  ``means`` holds the mean λ1 of disjoint subsets by
    their (mean) number of examples, all of them first, then halves and quarters; ``bias = λ1 - limit`` follows from
    them with the exponent that they show, between 1/2 and 1.
    """

    sharpness: float
    solver: float
    standard_error: float
    bias: float
    rounding: float
    examples: float
    groups: int
    means: Mapping[float, float]
    advice: str
    note: str
    num_matvecs: float  # in products with the Hessian of all examples

    @property
    def corrected(self) -> float:
        """Estimate of the sharpness for unlimited data: that of the sample less its bias."""
        return self.sharpness - self.bias

    @property
    def interval(self) -> tuple[float, float]:
        """Interval that holds the sharpness for unlimited data with 95 %.

        Student's t around `corrected`, widened by the bias and the other errors.
        """
        reach = student(self.groups - 1) * self.standard_error + self.bias + self.solver + self.rounding
        return self.corrected - reach, self.corrected + reach

    def __str__(self) -> str:
        low, high = self.interval
        rows = (
            ("solver", f"± {self.solver:.2g}"),
            ("sample", f"± {self.standard_error:.2g} (standard error over {self.groups} groups)"),
            ("bias", f"+ {self.bias:.2g} (a finite sample reads high)"),
            ("rounding", f"± {self.rounding:.2g}"),
        )
        lines = [f"sharpness {self.sharpness:.6g} of {self.examples} examples"]
        lines += [f"  {name:9}{text}" for name, text in rows]
        means = ", ".join(f"{value:.4g} on {n:.4g}" for n, value in self.means.items())
        lines += [f"  mean over subsets of the examples: {means}"]
        lines += [
            f"  unlimited data of this kind: {self.corrected:.4g}, in [{low:.4g}, {high:.4g}] at 95 %",
            self.advice,
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def error_budget(f: Objective, w: Tensor | None = None, *, rtol: float = 1e-4, seed: int = 0) -> ErrorBudget:
    """Measure the errors of ``λ1(∇²L(w))`` by solver, sample and rounding, and which of them to reduce [N20].

    Costs two further solves (afresh: the top vector of a subset may be another one) and one pass in float64, and holds
    all data in memory.  Batches are taken for random draws, and stay whole (batch normalization sees them whole); fewer
    than four are cut.  Where the data are all that one wants to know about, as in full-batch training, the sample's
    error does not apply.

    Raises:
        NotConverged: a solve did not reach rtol.
        ValueError: fewer than four examples.
    """
    require_objective(f)
    w = f.weights() if w is None else w.detach()
    batches = [batch.raw for batch in f.batches(w.device)]
    weight = f.form.weight
    pairs = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in f.model.modules())
    pieces, note = _pieces(batches, f, least=2 if pairs else 1)
    weights = f.processes.each(lambda: [weight(piece) for piece in pieces])
    before, number = sum(map(len, weights[: f.processes.rank])), sum(map(len, weights))
    n = sum(map(sum, weights))
    whole = f.on(batches)
    a = hessian(whole, w)
    top = lanczos(a, min(2, a.size), rtol=rtol, seed=seed)
    value, residual = top.values[0].item(), top.residuals[0].item()
    v = top.vectors[:, 0]
    gap = value - (top.values[1] + top.residuals[1]).item() if a.size > 1 else math.inf
    solver = min(residual, residual**2 / gap if gap > 0 else residual, max(top.upper - value, 0.0))

    flat = [size for own in weights for size in own]
    groups = _dealt(pieces, min(number, MAX_GROUPS), before)
    sizes = torch.tensor([*map(sum, _dealt(flat, len(groups)))], dtype=torch.float64)
    curvatures = torch.tensor([_curvature(hessian(f.on(group), w), v) for group in groups], dtype=torch.float64)
    standard_error = _standard_error(sizes / n, curvatures)

    means, spent = {float(n): value}, float(top.num_matvecs) + 1
    for parts in (2, QUARTERS):
        means[n / parts], products = _mean_over(
            [f.on(group) for group in _dealt(pieces, parts, before)],
            [sum(own) / n for own in _dealt(flat, parts)],
            lambda g: lanczos(hessian(g, w), rtol=rtol, seed=seed),
        )
        spent += products
    bias = _bias(*means.values())
    rounding = _rounding(whole, a, w, v, value, seed)
    sample = math.hypot(standard_error, bias)
    advice = _advice(value, solver, sample, rounding, examples=n, rtol=rtol, dtype=w.dtype)
    return ErrorBudget(
        sharpness=value,
        solver=solver,
        standard_error=standard_error,
        bias=bias,
        rounding=rounding,
        examples=n,
        groups=len(groups),
        means=means,
        advice=advice,
        note=note,
        num_matvecs=spent + 2,
    )


def _mean_over(
    subsets: list[Objective], fractions: list[float], solve: Callable[[Objective], Eigenpairs]
) -> tuple[float, float]:
    """Average λ1 over subsets, the fractions of all examples; return the products with the Hessian of all, too."""
    mean, products = 0.0, 0.0
    for subset, fraction in zip(subsets, fractions, strict=True):
        found = solve(subset)
        mean += fraction * found.values[0].item()
        products += fraction * found.num_matvecs
    return mean, products


def _standard_error(fractions: Tensor, values: Tensor) -> float:
    """Standard error of the mean of values ``(k,)``, each of a fraction of the examples."""
    k, centre = len(values), (fractions * values).sum()
    return ((fractions * (values - centre)).square().sum() * k / (k - 1)).sqrt().item()


def _bias(whole: float, halves: float, quarters: float) -> float:
    """Extrapolate the bias c from ``whole = limit + c``, ``halves = limit + 2^p c``, ``quarters = limit + 4^p c``.

    The exponent p is taken within [1/2, 1].
    """
    first, second = max(halves - whole, 0.0), max(quarters - halves, 0.0)
    p = math.log2(second / first) if first > 0 and second > 0 else 1.0
    return first / (2 ** min(max(p, 0.5), 1.0) - 1)


def _curvature(a: SymmetricOperator, v: Tensor) -> float:
    """Curvature along a vector, ``vᵀAv/vᵀv``, with the sums in float64."""
    v64 = v.double()
    return ((v64 @ (a @ v).double()) / (v64 @ v64)).item()


def _rounding(f: Objective, a: SymmetricOperator, w: Tensor, v: Tensor, value: float, seed: int) -> float:
    """Rounding error of the sharpness: ``|vᵀHv - λ|`` with H in float64.

    Where H is in float64 already, it is how far its products are from symmetric.
    """
    if w.dtype != torch.float64:
        return abs(_curvature(hessian(f.in_double(), w.double()), v.double()) - value)
    z = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=v.dtype).to(v.device)
    u = v + z / z.norm()  # partly along v: products with a vector at right angles to it are small, and so their errors
    return abs(((u @ (a @ v)) - (v @ (a @ u))) / u.norm()).item()


def _pieces(batches: list[Any], f: Objective, least: int) -> tuple[list[Any], str]:
    """Return the batches as they are, or (with a note) cut into `least` examples or more where they are under four.

    They are those of this process, and counted over all.
    """
    form, each = f.form, f.processes.each
    counts = [count for own in each(lambda: [form.size(batch) for batch in batches]) for count in own]
    if sum(counts) < QUARTERS:
        raise InvalidValue(f"an error by sampling needs at least {QUARTERS} examples; the data hold {sum(counts)}")
    if len(counts) >= QUARTERS:
        return batches, ""
    pieces = []
    for batch in batches:
        whole = math.ceil(2 * QUARTERS / len(counts))
        parts = min(form.size(batch) // least, whole) if form.can_be_cut(batch) else 1
        pieces += [form.cut(batch, slice(i, None, parts)) for i in range(parts)]
    number = sum(each(lambda: len(pieces)))
    if number < QUARTERS:
        raise InvalidValue(f"{len(counts)} batches of {counts} examples cannot be cut into {QUARTERS} parts")
    return pieces, (
        f"There were fewer than {QUARTERS} batches: subsets are made of {number} parts of them, which batch"
        " normalization in training mode sees as batches of their own."
    )


def _dealt(batches: list[Any], parts: int, before: int = 0) -> list[list[Any]]:
    """Deal the batches to `parts` groups in turn, so that an order in the data reaches all of them.

    Of several processes each deals its own, after those `before`.
    """
    return [batches[(i - before) % parts :: parts] for i in range(parts)]


def _advice(
    value: float, solver: float, sample: float, rounding: float, *, examples: float, rtol: float, dtype: torch.dtype
) -> str:
    worst = max(solver, sample, rounding)
    size = f"{worst / abs(value):.1%}" if value else f"{worst:.2g}"
    if worst == sample:
        return f"The sample is the largest error ({size}): four times the {examples} examples about halve it."
    if worst == solver:
        return f"The solver is the largest error ({size}): lower rtol from {rtol:g} to {rtol / 10:g}."
    if dtype != torch.float64:
        return f"Rounding is the largest error ({size}): bring model and data to float64."
    return f"Rounding is the largest error ({size}), in float64 already: nothing is left to reduce."
