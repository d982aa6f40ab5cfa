"""Choice of a backend for Hessian products: every one is tried, verified against the others, and timed.

Products of exact backends must agree with each other, and with central differences of the gradient, at the present
weights and at moved ones: an operation whose second derivative is silently wrong shows in the latter.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..display import card, progress, report, text
from ..errors import InvalidValue
from .differences import CentralDifferences
from .expansion import Expansion, kept
from .hvp import compiled, differences, forward_over_reverse, linearized, rebuilt
from .objective import Expand, Objective, require_objective, without_second_derivative
from .tracing import first_line

COMPILING = 10.0
"""Seconds of work below which a compiler is not worth trying."""

TRUSTED = 0.05
"""Largest relative error bar with which differences of gradients judge other backends."""


@dataclass(frozen=True)
class Trial:
    """One backend on trial; costs are in gradients, not a number where nothing was measured."""

    name: str
    expand: Expand
    problem: str = ""  # why it is not eligible; empty where it is
    error: float = math.nan  # largest relative deviation from the reference
    product: float = math.nan  # cost of a product
    opening: float = math.nan  # cost of a new point, before any product
    setup: float = 0.0  # seconds, once: tracing, verifying, compiling

    def seconds(self, gradient: float, products: int, points: int) -> float:
        """Return the time of `products` at each of `points`, where a gradient takes `gradient` seconds."""
        return self.setup + gradient * points * (self.opening + products * self.product)


@dataclass(frozen=True)
class Checkup:
    """The findings of `tune`: ``checkup.objective`` uses the chosen backend, and knows its measured cost."""

    objective: Objective
    choice: str
    trials: tuple[Trial, ...]
    gradient: float  # seconds
    graph_bytes: float  # of all kept graphs, predicted
    repaid: float  # products after which the choice has made up for its setup, against the best backend without one
    without_second_derivative: tuple[str, ...]  # modules whose second derivative is missing or wrong
    sentence: str

    def __str__(self) -> str:
        rows = [["backend", "product", "point", "setup", "error", ""]]
        for t in self.trials:
            costs = (f"{x:.2f}" if x == x else "-" for x in (t.product, t.opening))
            error = f"{t.error:.0e}" if t.error == t.error else "-"
            rows.append([t.name, *costs, f"{t.setup:.1f} s", error, t.problem])
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"in gradients of {1e3 * self.gradient:.3g} ms; graphs to keep: about {self.graph_bytes / 2**20:.3g} MiB,"
            f" allowed: {self.objective.memory_budget / 2**20:.3g} MiB"
        )
        if self.without_second_derivative:
            lines.append(f"no right second derivative in {', '.join(self.without_second_derivative)}")
        return "\n".join([*lines, self.sentence])

    def __repr__(self) -> str:
        return f"Checkup(choice={self.choice!r}, {len(self.trials)} backends, gradient={1e3 * self.gradient:.3g} ms)"

    def _repr_html_(self) -> str:
        return card("Backends of second derivatives", text(str(self)))


@progress("backends", "trials")
def tune(f: Objective, *, products: int = 20, points: int = 1000, repeats: int = 5) -> Checkup:
    """Try, verify and time all backends; choose the fastest for `products` at each of `points`.

    The default is monitoring: many points.  Machine code is tried only where the work lasts long enough to repay it.
    The choice is made here, once, and ``checkup.objective`` carries it; the model is left as it was.

    Raises:
        ValueError: fewer than one product, point or repetition, or no backend gives a product that can be believed.

    >>> from torch import nn, ones, zeros
    >>> f = Objective(nn.Linear(2, 1), nn.functional.mse_loss, [(ones(4, 2), zeros(4, 1))])
    >>> [t.name for t in tune(f, products=3, points=1).trials]
    ['kept', 'rebuilt', 'forward over reverse', 'linearized', 'differences', 'compiled']
    """
    require_objective(f)
    if min(products, points, repeats) < 1:
        raise InvalidValue(f"products={products}, points={points}, repeats={repeats}: each is at least 1")
    case = _Case(f)
    trials = {
        "kept": case.tried("kept", kept),
        "rebuilt": case.tried("rebuilt", rebuilt),
        "forward over reverse": case.tried("forward over reverse", forward_over_reverse),
        "linearized": case.tried("linearized", linearized()),
        "differences": case.tried("differences", differences),
    }
    trials = case.judged(trials)
    names = [name for kind in without_second_derivative(f) for name in kind] if trials["kept"].problem else []
    if all(t.problem for t in trials.values()):
        reasons = "; ".join(f"{t.name}: {t.problem}" for t in trials.values())
        raise InvalidValue(f"no backend gives a product that can be believed ({reasons}){_where(names)}")
    gradient, trials = case.timed(trials, repeats)
    least = min(t.seconds(gradient, products, points) for t in trials.values() if not t.problem)
    if trials["linearized"].problem:
        trials["compiled"] = Trial("compiled", compiled(), "needs the linearized program")
    elif least < COMPILING:
        trials["compiled"] = Trial("compiled", compiled(), f"not tried: all products take {least:.2g} s without it")
    else:
        trials["compiled"] = case.tried("compiled", compiled())
        gradient, trials = case.timed(case.judged(trials), repeats)
    eligible = [t for t in trials.values() if not t.problem]
    best = min(eligible, key=lambda t: t.seconds(gradient, products, points))
    chosen = f.using(partial(_at_cost, expand=best.expand, cost=best.product))
    repaid = _repaid(best, eligible, gradient, products)
    return Checkup(
        objective=chosen,
        choice=best.name,
        trials=tuple(trials.values()),
        gradient=gradient,
        graph_bytes=f.graph_bytes_per_example * case.examples,
        repaid=repaid,
        without_second_derivative=tuple(names),
        sentence=_sentence(best, eligible, gradient, products=products, points=points, repaid=repaid) + _where(names),
    )


def _at_cost(f: Objective, w: Tensor, *, expand: Expand, cost: float) -> Expansion:
    """Form products with a backend whose products were found to cost so many gradients."""
    return dataclasses.replace(expand(f, w), cost=cost)


class _Case:
    """An objective at two points with a few directions, and the products found there by name."""

    def __init__(self, f: Objective) -> None:
        self.f = f.using(kept)
        self.w = f.weights()
        g = torch.Generator().manual_seed(0)
        self.v, step = (torch.randn(f.size, generator=g, dtype=torch.float64).to(self.w) for _ in range(2))
        self.points = (self.w, self.w + 0.1 * self.w.square().mean().sqrt() * step)
        self.found: dict[str, list[Tensor]] = {}
        self.bar = math.inf
        self.trials = 0
        self.examples = self.f.at(self.w).examples

    def tried(self, name: str, expand: Expand) -> Trial:
        """Form products at both points; a failure is noted."""
        self.trials += 1
        report(self.trials)
        try:
            if expand is differences:
                pairs = [CentralDifferences(self.f, w)(self.v) for w in self.points]
                found = [product for product, _ in pairs]
                self.bar = max(bar for _, bar in pairs)
            else:
                found = [self.f.using(expand).hvp(w, self.v) for w in self.points]
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return Trial(name, expand, first_line(error))
        self.found[name] = found
        setup = expand.seconds if isinstance(expand, linearized) else 0.0
        return Trial(name, expand, setup=self.f.processes.first(setup))

    def judged(self, trials: Mapping[str, Trial]) -> dict[str, Trial]:
        """Judge the trials: they have to agree with differences, as far as these go, and with the first that does."""
        eps = torch.finfo(self.w.dtype).eps
        trusted = self.bar <= TRUSTED
        exact = [name for name in self.found if name != "differences"]
        out = dict(trials)
        if trusted:
            near = [n for n in exact if self._distance(n, "differences") <= max(20 * self.bar, eps**0.25)]
        else:
            near = [n for n in exact if any(m != n and self._distance(n, m) <= eps**0.5 for m in _others(n, exact))]
        reference = next(iter(near), "differences")
        for name in exact:
            off = self._distance(name, reference)
            against = "differences of gradients" if name not in near and trusted else reference
            problem = "" if name in near and off <= eps**0.5 else f"wrong: differs from {against} by {off:.0e}"
            out[name] = dataclasses.replace(out[name], error=off, problem=problem)
        if "differences" in self.found:
            off = self._distance("differences", reference) if near else self.bar
            problem = "" if trusted else f"too rough a function: error bar {self.bar:.0e}"
            out["differences"] = dataclasses.replace(out["differences"], error=off, problem=problem)
        return out

    def _distance(self, a: str, b: str) -> float:
        """Return the largest distance over the points, relative to the largest product."""
        pairs = list(zip(self.found[a], self.found[b], strict=True))
        size = max(y.norm().item() for _, y in pairs)
        off = max((x - y).norm().item() for x, y in pairs)
        return off / size if size > 0 else float(off > 0)

    def timed(self, trials: Mapping[str, Trial], repeats: int) -> tuple[float, dict[str, Trial]]:
        """Time a gradient, in seconds, and the trials, in gradients: medians of interleaved repetitions."""
        tasks: dict[tuple[str, str], Callable[[], object]] = {("", ""): partial(self.f.grad, self.w)}
        for name, trial in trials.items():
            if trial.problem:
                continue
            f = self.f.using(trial.expand)
            at = f.at(self.w)
            tasks[name, "opening"] = partial(f.at, self.w)
            tasks[name, "product"] = partial(at.hvp, self.v)
        for task in tasks.values():  # to warm up
            task()
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in tasks}
        for _ in range(repeats):
            for key, task in tasks.items():
                began = time.perf_counter()
                task()
                seconds[key].append(time.perf_counter() - began)
        median = self.f.processes.first({key: statistics.median(times) for key, times in seconds.items()})
        gradient = median.pop(("", ""))
        out = dict(trials)
        for (name, what), time_taken in median.items():
            changes: dict[str, Any] = {what: time_taken / gradient}
            out[name] = dataclasses.replace(out[name], **changes)
        return gradient, out


def _others(name: str, exact: Sequence[str]) -> list[str]:
    """Name the backends that are not the same one with other bookkeeping."""
    same = ("kept", "rebuilt")
    return [n for n in exact if n != name and not (n in same and name in same)]


def _repaid(best: Trial, eligible: Sequence[Trial], gradient: float, products: int) -> float:
    def each(t: Trial) -> float:
        return gradient * (t.product + t.opening / products)

    free = [each(t) for t in eligible if t.setup == 0]
    if best.setup == 0 or not free:
        return 0.0
    return best.setup / max(min(free) - each(best), 1e-12)


def _sentence(
    best: Trial, eligible: Sequence[Trial], gradient: float, *, products: int, points: int, repaid: float
) -> str:
    total = best.seconds(gradient, products, points)
    why = f"{products} products at {points} point{'s' if points > 1 else ''} take {total:.3g} s"
    rest = [t for t in eligible if t is not best]
    if rest:
        second = min(rest, key=lambda t: t.seconds(gradient, products, points))
        why += f", with the next best ({second.name}) {second.seconds(gradient, products, points):.3g} s"
    else:
        why += ", and no other backend can be believed"
    once = f"; its setup of {best.setup:.1f} s is repaid after {math.ceil(repaid)} products" if best.setup else ""
    return f"use {best.name}: {best.product:.2f} gradients per product, {why}{once}"


def _where(names: Sequence[str]) -> str:
    return f"; in the way: {', '.join(names)}" if names else ""
