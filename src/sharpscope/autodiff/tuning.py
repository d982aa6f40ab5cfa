"""Which way to form Hessian products suits a case: every way is tried, verified against the others, and timed.

Products of exact ways must agree with each other, and with central differences of the gradient, at the present weights
and at moved ones: an operation whose second derivative is silently wrong shows in the latter.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from .hvp import Calibrated, compiled, differences, forward_over_reverse, kept, linearized, rebuilt
from .objective import Expand, Objective, without_second_derivative
from .tracing import first_line

COLUMNS = 4
COMPILING = 10.0  # seconds: what lasts less is not worth trying a compiler for
TRUSTED = 0.05  # largest relative error bar with which differences of gradients judge other ways


@dataclass(frozen=True)
class Trial:
    """One way to form products; costs are in gradients, not a number where nothing was measured."""

    name: str
    expand: Expand
    obstacle: str = ""  # why it is not eligible; empty where it is
    error: float = math.nan  # largest relative deviation from the reference
    product: float = math.nan  # cost of a product
    column: float = math.nan  # cost of one of four columns together
    opening: float = math.nan  # cost of a new point, before any product
    setup: float = 0.0  # seconds, once: tracing, verifying, compiling

    def seconds(self, gradient: float, products: int, points: int) -> float:
        """For `products` at each of `points`, where a gradient takes `gradient` seconds."""
        return self.setup + gradient * points * (self.opening + products * self.product)


@dataclass(frozen=True)
class Checkup:
    """What `tune` found: ``checkup.objective`` uses the chosen way, and knows its measured cost."""

    objective: Objective
    choice: str
    trials: tuple[Trial, ...]
    gradient: float  # seconds
    graph_bytes: float  # of all kept graphs, predicted
    repaid: float  # products after which the choice has made up for its setup, against the best way without one
    obstacles: tuple[str, ...]  # modules whose second derivative is missing or wrong
    sentence: str

    def __str__(self) -> str:
        rows = [["way", "product", "column", "point", "setup", "error", ""]]
        for t in self.trials:
            costs = (f"{x:.2f}" if x == x else "-" for x in (t.product, t.column, t.opening))
            error = f"{t.error:.0e}" if t.error == t.error else "-"
            rows.append([t.name, *costs, f"{t.setup:.1f} s", error, t.obstacle])
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"in gradients of {1e3 * self.gradient:.3g} ms; graphs to keep: about {self.graph_bytes / 2**20:.3g} MiB,"
            f" allowed: {self.objective.memory_budget / 2**20:.3g} MiB"
        )
        if self.obstacles:
            lines.append(f"no right second derivative in {', '.join(self.obstacles)}")
        return "\n".join([*lines, self.sentence])


def tune(f: Objective, *, products: int = 20, points: int = 1000, repeats: int = 5) -> Checkup:
    """Try, verify and time the ways to form products; choose the fastest for `products` at each of `points`.

    The default is monitoring: many points.  Machine code is tried only where the work lasts long enough to repay it.
    The choice is made here, once, and ``checkup.objective`` carries it; the model is left as it was.

    Raises:
        ValueError: fewer than one product, point or repetition, or no way gives a product that can be believed.

    >>> from torch import nn, ones, zeros
    >>> f = Objective(nn.Linear(2, 1), nn.functional.mse_loss, [(ones(4, 2), zeros(4, 1))])
    >>> [t.name for t in tune(f, products=3, points=1).trials]
    ['kept', 'rebuilt', 'forward over reverse', 'linearized', 'differences', 'compiled']
    """
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
    names = tuple(without_second_derivative(f)) if trials["kept"].obstacle else ()
    if all(t.obstacle for t in trials.values()):
        reasons = "; ".join(f"{t.name}: {t.obstacle}" for t in trials.values())
        raise InvalidValue(f"no way gives a product that can be believed ({reasons}){_where(names)}")
    gradient, trials = case.timed(trials, repeats)
    least = min(t.seconds(gradient, products, points) for t in trials.values() if not t.obstacle)
    if trials["linearized"].obstacle:
        trials["compiled"] = Trial("compiled", compiled(), "needs the linearized program")
    elif least < COMPILING:
        trials["compiled"] = Trial("compiled", compiled(), f"not tried: all products take {least:.2g} s without it")
    else:
        trials["compiled"] = case.tried("compiled", compiled())
        gradient, trials = case.timed(case.judged(trials), repeats)
    eligible = [t for t in trials.values() if not t.obstacle]
    best = min(eligible, key=lambda t: t.seconds(gradient, products, points))
    together = best.column < 0.9 * best.product
    chosen = f.using(Calibrated(best.expand, best.product, together))
    repaid = _repaid(best, eligible, gradient, products)
    return Checkup(
        chosen,
        best.name,
        tuple(trials.values()),
        gradient,
        f._graph_bytes_per_example * case.examples,
        repaid,
        names,
        _sentence(best, eligible, gradient, products, points, repaid) + _where(names),
    )


class _Case:
    """An objective at two points with a few directions, and the products found there by name."""

    def __init__(self, f: Objective) -> None:
        self.f, self.w = f.using(kept), f.weights()
        g = torch.Generator().manual_seed(0)
        random = torch.randn((COLUMNS + 1, f.size), generator=g, dtype=torch.float64).to(self.w)
        self.columns, self.v = random[:COLUMNS].T, random[0]
        self.points = (self.w, self.w + 0.1 * self.w.square().mean().sqrt() * random[COLUMNS])
        self.found: dict[str, list[Tensor]] = {}
        self.bar = math.inf
        self.examples = sum(batch.examples for batch in f._batches(self.w.device))

    def tried(self, name: str, expand: Expand) -> Trial:
        """Products at both points; what fails is noted."""
        f, bars = self.f.using(expand), []
        try:
            found = []
            for w in self.points:
                at = f.at(w)
                found.append(at.hvp(self.v))
                bars.append(at.error if isinstance(at, differences) else 0.0)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return Trial(name, expand, first_line(error))
        if name == "differences":
            self.bar = max(bars)
        self.found[name] = found
        return Trial(name, expand, setup=expand.seconds if isinstance(expand, linearized) else 0.0)

    def judged(self, trials: Mapping[str, Trial]) -> dict[str, Trial]:
        """Those that agree with differences, as far as these go, and with the first of those that do."""
        eps = torch.finfo(self.w.dtype).eps
        trusted = self.bar <= TRUSTED
        exact = [name for name in self.found if name != "differences"]
        out = dict(trials)
        if trusted:
            near = [n for n in exact if self._apart(n, "differences") <= max(20 * self.bar, eps**0.25)]
        else:
            near = [n for n in exact if any(m != n and self._apart(n, m) <= eps**0.5 for m in _others(n, exact))]
        reference = next(iter(near), "differences")
        for name in exact:
            off = self._apart(name, reference)
            against = "differences of gradients" if name not in near and trusted else reference
            obstacle = "" if name in near and off <= eps**0.5 else f"wrong: differs from {against} by {off:.0e}"
            out[name] = dataclasses.replace(out[name], error=off, obstacle=obstacle)
        if "differences" in self.found:
            off = self._apart("differences", reference) if near else self.bar
            obstacle = "" if trusted else f"too rough a function: error bar {self.bar:.0e}"
            out["differences"] = dataclasses.replace(out["differences"], error=off, obstacle=obstacle)
        return out

    def _apart(self, a: str, b: str) -> float:
        """Largest distance over the points, relative to the largest product."""
        pairs = list(zip(self.found[a], self.found[b], strict=True))
        size = max(y.norm().item() for _, y in pairs)
        off = max((x - y).norm().item() for x, y in pairs)
        return off / size if size > 0 else float(off > 0)

    def timed(self, trials: Mapping[str, Trial], repeats: int) -> tuple[float, dict[str, Trial]]:
        """Seconds of a gradient, and the trials with their costs: medians of interleaved repetitions."""
        tasks: dict[tuple[str, str], Callable[[], object]] = {("", ""): lambda: self.f.grad(self.w)}
        for name, trial in trials.items():
            if trial.obstacle:
                continue
            f = self.f.using(trial.expand)
            at = f.at(self.w)
            tasks[name, "opening"] = lambda f=f: f.at(self.w)  # type: ignore[misc]
            tasks[name, "product"] = lambda at=at: at.hvp(self.v)  # type: ignore[misc]
            if name in ("kept", "linearized"):
                at.together = True
                tasks[name, "column"] = lambda at=at: at.columns(self.columns)  # type: ignore[misc]
        for key in [key for key, task in tasks.items() if not _runs(task)]:
            del tasks[key]
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in tasks}
        for _ in range(repeats):
            for key, task in tasks.items():
                began = time.perf_counter()
                task()
                seconds[key].append(time.perf_counter() - began)
        median = {key: statistics.median(times) for key, times in seconds.items()}
        gradient = median.pop(("", ""))
        out = dict(trials)
        for (name, what), time_taken in median.items():
            share = COLUMNS if what == "column" else 1
            changes: dict[str, Any] = {what: time_taken / gradient / share}
            out[name] = dataclasses.replace(out[name], **changes)
        return gradient, out


def _others(name: str, exact: Sequence[str]) -> list[str]:
    """Compositions that are not the same one with other bookkeeping."""
    same = ("kept", "rebuilt")
    return [n for n in exact if n != name and not (n in same and name in same)]


def _runs(task: Callable[[], object]) -> bool:
    """Once, to warm up; columns may have no batched form."""
    try:
        task()
    except RuntimeError:
        return False
    return True


def _repaid(best: Trial, eligible: Sequence[Trial], gradient: float, products: int) -> float:
    def each(t: Trial) -> float:
        return gradient * (t.product + t.opening / products)

    free = [each(t) for t in eligible if t.setup == 0]
    if best.setup == 0 or not free:
        return 0.0
    return best.setup / max(min(free) - each(best), 1e-12)


def _sentence(
    best: Trial, eligible: Sequence[Trial], gradient: float, products: int, points: int, repaid: float
) -> str:
    total = best.seconds(gradient, products, points)
    why = f"{products} products at {points} point{'s' if points > 1 else ''} take {total:.3g} s"
    rest = [t for t in eligible if t is not best]
    if rest:
        second = min(rest, key=lambda t: t.seconds(gradient, products, points))
        why += f", with the next best ({second.name}) {second.seconds(gradient, products, points):.3g} s"
    else:
        why += ", and no other way can be believed"
    once = f"; its setup of {best.setup:.1f} s is repaid after {math.ceil(repaid)} products" if best.setup else ""
    return f"use {best.name}: {best.product:.2f} gradients per product, {why}{once}"


def _where(names: Sequence[str]) -> str:
    return f"; in the way: {', '.join(names)}" if names else ""
