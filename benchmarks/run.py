"""The comparison: ``python -m benchmarks.run [--quick] [--only NAME ..]``, or ``make bench``; stopped, it goes on.

Contenders take turns within a round, in one process on one thread, so that what else the machine does falls on all of
them alike.  Peers are used with their defaults, and with the cheapest of several settings that is right on the very
seeds it is judged by: an advantage that a user, who does not know the answer, would not have.  The limit that nobody
can pass on a kept graph, by knowing the answer and the best of several starts, stands beside them.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sharpscope as ss

from . import contenders as c
from . import finished, tables
from .measure import RIGHT, Row, gradient_seconds, peak_memory, truth, weights_are
from .problems import PROBLEMS, Problem, crowded

Settings = dict[str, Any]

DEFAULTS = (
    Row("sharpscope", "ours", c.sharpscope),
    Row("PyHessian", "package", c.pyhessian_power),
    Row("hessian-eigenthings Lanczos", "package", c.eigenthings_lanczos),
    Row("hessian-eigenthings power", "package", c.eigenthings_power),
    Row("curvlinops + eigsh", "package", c.curvlinops_eigsh),
    Row("ARPACK, product rebuilt", "by hand", c.arpack_rebuilt),
    Row("ARPACK, graph kept", "by hand", c.arpack_kept),
)

LOOSE = {"rtol": 1e-2, "gap": 0.1}
"""Enough for 1e-3: a residual of 1e-2, and nothing 10 % larger but for one chance in a thousand."""

MORE = (
    Row("sharpscope", "ours", c.sharpscope, LOOSE),
    Row("sharpscope, tuned before", "ours", c.sharpscope_tuned),
    Row("sharpscope, tuned before", "ours", c.sharpscope_tuned, LOOSE),
)
"""Ours in other ways; none is chosen by knowing the answer."""

ARPACK: tuple[Settings, ...] = tuple({"tol": tol, "ncv": ncv} for tol in (1e-1, 1e-2, 1e-3) for ncv in (8, 14, 20))
LADDERS: dict[c.Make, tuple[Settings, ...]] = {
    c.pyhessian_power: ({"tol": 1e-3, "steps": 100}, {"tol": 1e-4, "steps": 100}, {"tol": 1e-5, "steps": 200}),
    c.eigenthings_lanczos: tuple({"k": 1, "steps": n} for n in (10, 14, 18, 24, 30, 40)),
    c.eigenthings_power: ({"tol": 3e-2, "steps": 100}, {"tol": 1e-2, "steps": 150}),
    c.curvlinops_eigsh: ARPACK,
    c.arpack_rebuilt: ARPACK,
    c.arpack_kept: ARPACK,
}
"""Settings to choose from, from loose to tight."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    seeds: int
    steps: int  # of the tracked run
    every: int  # the stride of contenders that do not remember, and of the checks
    stages: tuple[str, ...]
    crowded_seeds: int
    tune: bool  # whose search takes about a minute per problem


FULL = Extent(seeds=3, steps=50, every=10, stages=("start", "half-way", "edge"), crowded_seeds=5, tune=True)
LARGE = Extent(seeds=1, steps=4, every=2, stages=("edge",), crowded_seeds=0, tune=False)
QUICK = Extent(seeds=2, steps=10, every=5, stages=("edge",), crowded_seeds=3, tune=False)


FEW_PRODUCTS = 40
"""Products up to which memory is measured on a large problem: the profiler keeps every allocation of a measurement."""


def tuned(row: Row, p: Problem, seeds: Sequence[int], exact: float) -> Row:
    """The settings with the fewest products among those that are right on all seeds; else the tightest.

    What is best for ARPACK on a kept graph is best for all that use it: their products are the same.
    """
    best, fewest = None, float("inf")
    settings: Settings = {}
    for settings in LADDERS[row.make]:
        trial = row.fresh(settings=settings)
        for seed in seeds:
            trial.cold(p, seed, exact)
            if trial.failure or trial.errors[-1] > RIGHT or sum(trial.products) >= fewest:
                break
        else:
            best, fewest = settings, sum(trial.products)
            if LADDERS[row.make] is not ARPACK:
                break
    return row.fresh(settings=settings if best is None else best, tuned=True)


def needs_twin(row: Row, p: Problem, exact: float) -> bool:
    """Whether a peer cannot differentiate the model as it is, or measures another function."""
    trial = row.fresh()
    trial.cold(p, 0, exact)
    return bool(trial.failure) or (row.make is c.pyhessian_power and trial.errors[0] > 0.3)


def cold(p: Problem, stage: str, extent: Extent) -> tuple[list[Row], float, float]:
    """Rows, the truth, and the seconds of a gradient at the present weights."""
    exact, w, seeds = truth(p), p.weights(), range(extent.seeds)
    rows = [row.fresh() for row in DEFAULTS]
    if extent.tune:
        c.fastest(p)
    rows[1:1] = [row.fresh() for row in MORE if extent.tune or row.make is c.sharpscope]
    able = [row.fresh(twin=needs_twin(row, p, exact)) for row in DEFAULTS if row.kind != "ours"]
    rows += [row for row in able if row.twin]
    by_arpack = tuned(able[-1], p, seeds, exact).settings
    for row in able:
        shared = LADDERS[row.make] is ARPACK
        rows.append(row.fresh(settings=by_arpack, tuned=True) if shared else tuned(row, p, seeds, exact))
    twin = able[-1].twin
    least = c.fewest_products(p, p.twin if twin else p.model, exact, RIGHT, starts=2 if p.large else 5)
    rows.append(Row("the limit", "limit", c.limit, dict(least), twin=twin))
    gradients = []
    for seed in seeds:
        gradients.append(gradient_seconds(p))
        turn = seed * 5 % len(rows)
        for row in rows[turn:] + rows[:turn]:
            row.cold(p, seed, exact)
    for row in rows if stage == "edge" else []:
        if not p.large or (row.products and max(row.products) <= FEW_PRODUCTS):
            row.memory = peak_memory(row, p)
    if not weights_are(p, w):
        raise RuntimeError(f"a contender changed the weights of {p.name}")
    return rows, exact, min(gradients)


def tracked(p: Problem, extent: Extent, at_edge: list[Row]) -> tuple[list[Row], float]:
    """Consecutive steps of training from the present weights, measured at each; rows, and seconds of a gradient.

    On large problems only contenders take part that were right at the edge.
    """
    rows = [Row("sharpscope tracked", "ours", c.sharpscope_tracked)]
    if extent.tune:
        rows.append(Row("sharpscope tracked, tuned before", "ours", c.sharpscope_tracked, {"tune": True}))
    for row in at_edge:
        unfit = row.failure or (p.large and not row.right)
        if unfit or row.kind == "limit" or row.make is c.sharpscope_tuned:
            continue
        rows.append(row.fresh(every=extent.every))
        if row.tuned and row.make in (c.curvlinops_eigsh, c.arpack_kept, c.eigenthings_power):
            warm = row.fresh(settings=row.settings | {"warm": True})
            warm.name += ", warm"
            rows.append(warm)
    ready = []
    for row in rows:
        start = time.process_time()
        ready.append(row.prepare(p))
        row.setup = c.fastest(p)[1] if row.settings.get("tune") else time.process_time() - start
        row.products.clear()
    gradients = []
    for step in range(extent.steps):
        checked = step % extent.every == 0
        exact = truth(p, tol=1e-5) if checked else None
        gradients.append(gradient_seconds(p, 1))
        for row, measure in zip(rows, ready, strict=True):
            if step % row.every == 0:
                row.products.append(0)
                row.attempt(partial(measure, step), exact, p)
        p.step()
    return rows, min(gradients)


def crowd(extent: Extent) -> tables.Crowd:
    """Which side of 2/lr everybody's default says, where it lies among several eigenvalues.

    The place is the first midpoint of two steps, from step 590 on, at which λ1 is .3 to 1.5 % above 2/lr and λ3 at most
    3 % below λ1; where there is none within 300 steps, the last.
    """
    p = crowded()
    list(p.trained())
    f = ss.Objective(p.model, p.loss, [(p.x, p.y)])
    for _ in range(300):
        before = p.weights()
        p.step()
        after = p.weights()
        p.load((before + after) / 2)
        top = ss.linalg.lanczos(ss.hessian(f, p.weights()), k=3, rtol=1e-2).values * p.lr / 2
        if 1.003 < top[0] < 1.015 and top[2] > 0.97 * top[0]:
            break
        p.load(after)
    exact = truth(p)
    rows = [row.fresh() for row in (DEFAULTS[0], MORE[0], *DEFAULTS[1:])]
    for seed in range(extent.crowded_seeds):
        for row in rows:
            row.cold(p, seed, exact)
    return tables.Crowd(p, exact, (top[1:] / top[0]).tolist(), rows)


def sections(whole: Extent, only: Sequence[str]) -> Iterator[tables.Section]:
    """Everything that is measured, one problem and stage after another; what is finished is not measured again."""
    for make in PROBLEMS:
        p = make()
        if only and p.name not in only:
            continue
        extent = LARGE if p.large else whole
        path = finished.place(p, extent)
        if path.exists():
            yield from finished.load(path, p)
            continue
        done = list[tables.Section]()
        for section in measured(p, extent):
            done.append(section)
            yield section
        finished.save(path, done)


def measured(p: Problem, extent: Extent) -> Iterator[tables.Section]:
    """One problem, a stage after another."""
    rows: list[Row] = []
    for stage, _ in p.trained():
        if stage in extent.stages:
            start = time.monotonic()
            rows, exact, gradient = cold(p, stage, extent)
            yield tables.Section(p, stage, "cold", rows, gradient, exact * p.lr / 2, time.monotonic() - start)
    start = time.monotonic()
    rows, gradient = tracked(p, extent, rows)
    yield tables.Section(p, "edge", "tracked", rows, gradient, float("nan"), time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the edge of stability only, fewer seeds and steps")
    parser.add_argument("--out", type=Path, help="where the tables go")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these problems only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    extent = QUICK if options.quick else FULL
    out = options.out or Path("runs/bench-quick.md" if options.quick else "benchmarks/RESULTS.md")
    start, done = time.monotonic(), list[tables.Section]()
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(crowded: tables.Crowd | None = None) -> None:
        out.write_text(tables.page(done, crowded, extent.seeds, extent.steps))

    for section in sections(extent, options.only):
        done.append(section)
        write()  # the largest take long, and what there is should not be lost
        print(f"{time.monotonic() - start:5.0f} s  {tables.headline(section)}", flush=True)
    if not options.only:
        write(crowd(extent))
    print(f"The tables are in {out}")


if __name__ == "__main__":
    main()
