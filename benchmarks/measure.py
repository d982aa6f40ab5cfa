"""One measurement of one contender, its cost and its error; and the truth it is held against."""

import math
import signal
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from . import contenders
from .contenders import Make, Measure
from .problems import Problem, in_float64

RIGHT = 1e-3
"""A contender is right where its worst relative error over the seeds is at most this."""

PATIENCE = 120.0
"""Seconds after which a peer is given up on a large problem."""


@dataclass
class Row:
    """A contender with its settings, and its measurements: one per seed (cold) or per step (tracked)."""

    name: str
    kind: str  # "ours", "package" (a peer), "by hand", or "limit"
    make: Make
    settings: dict[str, Any] = field(default_factory=dict)
    twin: bool = False
    tuned: bool = False
    every: int = 1  # in a tracked run: the stride at which it is measured
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    memory: float = float("nan")
    setup: float = float("nan")  # seconds before the first step of a tracked run
    failure: str = ""

    def fresh(self, **changes: Any) -> "Row":
        """The same contender without measurements."""
        same = {"settings": self.settings, "twin": self.twin, "tuned": self.tuned, "every": self.every} | changes
        return Row(self.name, self.kind, self.make, **same)

    @property
    def right(self) -> bool:
        return not self.failure and bool(self.errors) and max(self.errors) <= RIGHT

    @property
    def label(self) -> str:
        given = ", ".join(f"{key}={value:g}" for key, value in self.settings.items() if not isinstance(value, bool))
        return self.name + (f" ({given})" if given else "") + (" †" if self.twin else "")

    def prepare(self, p: Problem) -> Measure:
        """Everything that comes before the first number."""
        self.products.append(0)

        def count(n: int) -> None:
            self.products[-1] += n

        return self.make(p, p.twin if self.twin else p.model, count, **self.settings)

    def attempt(self, work: Callable[[], float], truth: float | None, p: Problem) -> None:
        """Time `work`, which gives an eigenvalue of `p`; a failure is kept as its first line."""
        if self.failure:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.process_time()
            try:
                with within(PATIENCE if p.large and self.kind != "ours" else math.inf):
                    value = work()
            except Exception as error:
                self.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                return
            self.seconds.append(time.process_time() - start)
        self.values.append(value)
        if truth is not None:
            self.errors.append(abs(value / truth - 1))

    def cold(self, p: Problem, seed: int, truth: float) -> None:
        """One number from nothing."""
        self.attempt(lambda: self.prepare(p)(seed), truth, p)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds of this process, between two operations."""
    if math.isinf(seconds):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def truth(p: Problem, seeds: Sequence[int] = (101, 102), tol: float = 1e-10) -> float:
    """λ1 in float64 by ARPACK on a kept graph, from two starts that must agree; of large problems to 1e-5, from one."""
    seeds, tol, ncv = (seeds[:1], max(tol, 1e-5), 12) if p.large else (seeds, tol, 30)
    twice = in_float64(p)
    slope = torch.autograd.grad(twice.loss(twice.twin(twice.x), twice.y), twice.params, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        return contenders._vjp(slope, twice.params, torch.from_numpy(v.reshape(-1).copy())).numpy()

    a = LinearOperator((p.size, p.size), matvec=product, dtype=np.float64)
    found = [
        eigsh(a, k=1, which="LA", v0=np.random.default_rng(s).standard_normal(p.size), tol=tol, ncv=ncv)[0][0]
        for s in seeds
    ]
    if abs(found[0] / found[-1] - 1) > 1e-7:
        raise RuntimeError(f"the reference on {p.name} depends on its start: {found}")
    return float(found[0])


def gradient_seconds(p: Problem, repeats: int = 3) -> float:
    """Seconds of one plain gradient, now."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        p.gradient()
        times.append(time.process_time() - start)
    return statistics.median(times)


def peak_memory(row: Row, p: Problem) -> float:
    """MiB at the highest point of one cold measurement: tensors by torch's profiler plus numpy arrays by tracemalloc.

    In two runs, since the profiler's own bookkeeping is Python too.
    """
    tracemalloc.start()
    row.fresh().cold(p, 0, 1.0)
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    probe = row.fresh()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        probe.cold(p, 0, 1.0)
    if probe.failure:
        return float("nan")
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return float(max(np.cumsum(sizes), default=0) + arrays) / 2**20


def weights_are(p: Problem, w: Tensor) -> bool:
    """Nobody may change what is measured."""
    return bool(torch.equal(p.weights(), w))
