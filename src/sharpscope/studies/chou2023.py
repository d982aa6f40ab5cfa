"""Weight normalization keeps the bias towards sparse solutions when the start is large.

A diagonal linear model x = u⊙…⊙u with fewer equations than unknowns: gradient flow from a small start finds sparse
solutions, from a larger one it does not.  With u in polar coordinates, u = r·v/‖v‖, it does so from much larger starts.
The reason can be written down: the normalized flow from u_0 ends where the plain flow ends from κ·u_0, and κ is
exponentially small where the radius has grown.  That law is tested here on both sides of its threshold: the sign of
κ - 1 says which flow recovers better.  Normalization helps where the start is smaller than the solution and the radius
slow; from larger starts neither flow recovers, and from small ones a fast radius harms.

ℓ = ½‖Ax - y‖², g = Aᵀ(Ax - y), η the rate of r over that of v, v̂ = v/‖v‖, L layers:

    u̇ = -∇_u ℓ                                             plain
    ṙ = -η v̂ᵀ∇_u ℓ,  v̇ = -(r/‖v‖)(I - v̂v̂ᵀ)∇_u ℓ             normalized
    P_{ker A}(log v̂ + r²/2η)                                 conserved, L = 2
    κ = (r_∞/r_0) exp(-(r_∞² - r_0²)/2η)
    κ < 1  iff  r_0 < r_∞ and η < m, or r_0 > r_∞ and η > m,    m = (r_∞² - r_0²)/log(r_∞²/r_0²)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..claims import WIDER, Claim, Criterion, at_least, at_most, median
from ..history import Track
from ..plots import Chart
from ._ode import flow
from ._oracles import basis_pursuit
from ._stats import Observer, by_seed
from ._study import Job, Report

PAPER = "Chou, Rauhut & Ward, Robust Implicit Regularization via Weight Normalization (arXiv 2305.05448)"
PART = "Recovery of sparse solutions"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 5
    radii: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5)  # r_0²/‖x*‖₁
    rates: tuple[float, ...] = (1.0, 0.5, 0.1, 0.05)  # η/‖x*‖₁
    unknowns: int = 60
    equations: int = 25
    sparsity: int = 3
    time: float = 2e4  # after which a flow that has not solved the equations is left
    cubic: bool = True  # also L = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            fine = isinstance(value, bool) or all(v > 0 for v in (value if isinstance(value, tuple) else (value,)))
            if name != "seed" and not fine:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not self.sparsity <= self.equations < self.unknowns:
            raise ValueError(f"equations is {self.equations}; it must be at least sparsity and below unknowns")


QUICK = Config(radii=(0.05, 0.2, 0.6, 1.5, 2.5), rates=(0.5, 0.1), cubic=False)


@dataclass(frozen=True)
class Sensing:
    """``A x* = y`` with A ``(n, d)`` of N(0, 1/n) and x* of a few entries from U(½, 3/2)."""

    a: Array
    truth: Array

    @classmethod
    def draw(cls, config: Config, seed: int) -> "Sensing":
        rng = np.random.default_rng([106, seed])
        n, d = config.equations, config.unknowns
        truth = np.zeros(d)
        truth[rng.choice(d, config.sparsity, replace=False)] = rng.uniform(0.5, 1.5, config.sparsity)
        return cls(rng.standard_normal((n, d)) / np.sqrt(n), truth)

    def misfit(self, x: Array) -> Array:
        """``Ax - y``."""
        return np.asarray(self.a @ (x - self.truth))

    def error(self, x: Array) -> float:
        """``‖x - x*‖/‖x*‖``."""
        return float(np.linalg.norm(x - self.truth) / np.linalg.norm(self.truth))


@dataclass(frozen=True)
class End:
    """Where a flow ended: x ``(d,)``, r, whether Ax = y there, and how far its invariant has moved at most."""

    x: Array
    radius: float
    settled: bool
    moved: float = 0.0


def plain(s: Sensing, start: Array, depth: int, until: float, small: float = 1e-8) -> End:
    """``d/dt log u_i = -L u_i^(L-2) g_i``: the flow of u in its logarithm, so that no entry steps through zero."""

    def field(z: Array) -> Array:
        return np.asarray(-depth * np.exp((depth - 2) * z) * (s.a.T @ s.misfit(np.exp(depth * z))))

    def residual(z: Array) -> float:
        return float(np.linalg.norm(s.misfit(np.exp(depth * z))))

    found = flow(field, np.log(start), until, residual=residual, small=small, method="LSODA")
    u = np.exp(found.end)
    return End(u**depth, float(np.linalg.norm(u)), found.settled)


def normalized(s: Sensing, start: Array, depth: int, rate: float, until: float, small: float = 1e-8) -> End:
    """``ṙ = -η v̂ᵀ∇``, ``d/dt log v_i = -(r/‖v‖)(∇_i - v̂_i v̂ᵀ∇)/v_i`` with ``∇ = L u^(L-1) g``, ``‖v_0‖ = 1``."""
    kernel = np.eye(len(start)) - np.linalg.pinv(s.a) @ s.a

    def parts(y: Array) -> tuple[float, Array, float]:
        v = np.exp(y[1:])
        size = float(np.linalg.norm(v))
        return float(y[0]), v / size, size

    def field(y: Array) -> Array:
        r, v, size = parts(y)
        pull = depth * (r * v) ** (depth - 2) * r * (s.a.T @ s.misfit((r * v) ** depth))  # ∇_i / v̂_i
        radial = float(v**2 @ pull)
        return np.concatenate([[-rate * radial], -(r / size**2) * (pull - radial)])

    def residual(y: Array) -> float:
        r, v, _ = parts(y)
        return float(np.linalg.norm(s.misfit((r * v) ** depth)))

    r0 = float(np.linalg.norm(start))
    found = flow(field, np.append(r0, np.log(start / r0)), until, residual=residual, small=small, method="LSODA")
    r, v, _ = parts(found.end)
    logs = found.states[:, 1:] - np.log(np.linalg.norm(np.exp(found.states[:, 1:]), axis=1, keepdims=True))
    kept = (logs + found.states[:, :1] ** 2 / (2 * rate)) @ kernel
    return End((r * v) ** depth, r, found.settled, float(np.abs(kept - kept[0]).max()))


def shrinkage(r0: float, r: float, rate: float) -> float:
    """``κ = (r/r_0) exp(-(r² - r_0²)/2η)``."""
    return float(r / r0 * np.exp(-(r**2 - r0**2) / (2 * rate)))


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in range(config.seed, config.seed + config.repeats):
        common = {"seed": seed, "config": config}
        for radius in config.radii:
            found.append(Job(f"start {radius:g}, seed {seed}", _recover, {"radius": radius, **common}, 0.5))
        found.append(Job(f"two layers, seed {seed}", _compare, {"depth": 2, **common}, 2.0))
        if config.cubic:
            found.append(Job(f"three layers, seed {seed}", _compare, {"depth": 3, **common}, 2.0))
    return found


def _recover(track: Track, report: Report, radius: float, seed: int, config: Config) -> None:
    """Both flows from equal entries with r_0² = radius·‖x*‖₁, two layers."""
    track.resume()
    s, first = Sensing.draw(config, seed), seed == config.seed
    scale, d = float(s.truth.sum()), config.unknowns
    start = np.full(d, np.sqrt(radius * scale / d))
    r0, own = float(np.linalg.norm(start)), {"seed": seed, "radius": radius}
    flat = (np.eye(d) - np.linalg.pinv(s.a) @ s.a).sum(1)  # of ones, what lies in ker A

    def write(run: str, x: Array, **more: float) -> None:
        track.append(run=run, error=s.error(x), drawn=s.error(x) if first else None, **own, **more)
        if first and radius == SHOWN:
            for i, value in enumerate(x):
                track.append(run=run, coordinate=i + 1, weight=float(value))

    base = plain(s, start, 2, config.time)
    write(PLAIN, base.x)
    write(LINEAR, basis_pursuit(s.a, s.a @ s.truth))
    report(0.2)
    for rate in config.rates:
        end = normalized(s, start, 2, rate * scale, config.time)
        kappa, gain = shrinkage(r0, end.radius, rate * scale), s.error(end.x) / s.error(base.x)
        seen = float(np.exp(flat @ np.log(np.sqrt(end.x) / start) / flat.sum()))  # P1 is as long as 1ᵀP1
        write(_named(rate), end.x, kappa=kappa, seen=seen, gain=gain)
        right = (kappa < 1) == (gain < 1)
        track.append(run="all starts", moved=end.moved, right=float(right), **own)


def _compare(track: Track, report: Report, depth: int, seed: int, config: Config) -> None:
    """The normalized flow from u_0 against the plain one from κ·u_0, where both have solved the equations."""
    track.resume()
    s, rng = Sensing.draw(config, seed), np.random.default_rng([107, seed])
    scale, d = float(s.truth.sum()), config.unknowns
    cells = [(radius * scale / d, rate * scale) for radius in (0.2, 1.5) for rate in config.rates]
    if depth == 3:
        cells = [(x, rate) for x in (0.01, 0.1) for rate in (1.0, 0.5)]
    for done, (x, rate) in enumerate(cells):
        start = x ** (1 / depth) * np.exp(0.1 * rng.standard_normal(d))
        end = normalized(s, start, depth, rate, 5 * config.time)
        kappa = shrinkage(float(np.linalg.norm(start)), end.radius, rate)
        other = plain(s, kappa * start, depth, 5 * config.time)
        apart = float(np.linalg.norm(end.x - other.x) / np.linalg.norm(other.x))
        settled = end.settled and other.settled
        track.append(run=f"L = {depth}", seed=seed, apart=apart if settled else None, settled=float(settled))
        report((done + 1) / len(cells))


def _named(rate: float) -> str:
    return f"normalized, η = {rate:g}"


PLAIN, LINEAR, SLOW, FAST, SHOWN = "plain", "basis pursuit", "normalized, η = 0.1", "normalized, η = 0.5", 0.6


def _over(run: str, column: str, low: float, high: float) -> Observer:
    """The greatest over starts from low to high, in each repeat."""
    return by_seed(run, lambda radius, v: v[(radius >= low) & (radius <= high)].max(), "radius", column)


def _claim(sentence: str, observe: Observer, criterion: Criterion, kind: str, run: str, deciding: bool = True) -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, (run,), deciding)


def _claims() -> Iterator[Claim]:
    """Starts and rates in units of ‖x*‖₁."""
    for depth in (2, 3):
        run, layers = f"L = {depth}", {2: "Two", 3: "Three"}[depth]
        sentence = f"{layers} layers: the normalized flow ends where the plain one does from κ·u_0 (relative distance)"
        yield _claim(sentence, by_seed(run, max, "apart"), at_most(1e-4), "identity", run)
    sentence = "Two layers: log v̂ + r²/2η stays in the kernel of A (greatest change of an entry)"
    yield _claim(sentence, by_seed("all starts", max, "moved"), at_most(1e-5), "identity", "all starts")
    sentence = "η = 0.1, r_0² from 0.05 to 0.6: normalization makes the error small (greatest, relative)"
    yield _claim(sentence, _over(SLOW, "error", 0.05, 0.6), median(at_most(0.05)), "comparison", SLOW)
    sentence = "And smaller than that of the plain flow (greatest ratio of errors)"
    yield _claim(sentence, _over(SLOW, "gain", 0.05, 0.6), median(at_most(0.2)), "comparison", SLOW)
    sentence = "η = 0.1, r_0² = 2.5: it does not (ratio of errors)"
    yield _claim(sentence, _over(SLOW, "gain", 2.5, 2.5), median(at_least(0.8)), "negative control", SLOW)
    sentence = "Whether κ < 1 names the better flow (share of all starts and rates)"
    yield _claim(
        sentence,
        lambda h, config: float(h.series("all starts", "right").mean()),
        at_least(0.95),
        "comparison",
        "all starts",
    )
    sentence = "η = 0.5, r_0² = 0.05: a fast radius harms (ratio of errors)"
    yield _claim(sentence, _over(FAST, "gain", 0.05, 0.05), median(at_least(1)), "comparison", FAST, False)
    sentence = "Basis pursuit finds the sparse solution (relative error)"
    yield _claim(sentence, by_seed(LINEAR, max, "error"), at_most(1e-6), "comparison", LINEAR, False)
    sentence = "Starts larger than the solution: recovery from r_0² = 1.5, η = 0.1 (relative error)"
    yield _claim(sentence, _over(SLOW, "error", 1.5, 1.5), median(at_most(0.05)), WIDER, SLOW, False)


CLAIMS = tuple(_claims())
NORMALIZED = tuple(_named(rate) for rate in (1.0, 0.5, 0.1, 0.05))
CHARTS = (
    Chart(
        "recovery",
        "Recovery of a sparse solution",
        "radius",
        "drawn",
        (PLAIN, *NORMALIZED),
        "r_0² over ‖x*‖₁",
        "relative error",
        log_x=True,
        log_y=True,
        part=PART,
        caption="With a slow radius (small η, in units of ‖x*‖₁) the normalized flow recovers from starts up to the"
        " size of the solution, at 1; beyond that neither does.",
    ),
    Chart(
        "kappa",
        "Which flow is better",
        "kappa",
        "gain",
        NORMALIZED,
        "κ",
        "error of the normalized flow over that of the plain",
        log_x=True,
        log_y=True,
        lines=((1.0, "equal"),),
        markers=True,
        part=PART,
        caption="A dot for every start, rate and repeat: below the line normalization is better, which is where κ < 1.",
    ),
    Chart(
        "start",
        "The start that the plain flow would have needed",
        "kappa",
        "seen",
        NORMALIZED,
        "κ by the formula",
        "κ from where the flow ended",
        log_x=True,
        log_y=True,
        markers=True,
        part=PART,
        caption="The plain flow conserves the part of log u in the kernel of A, so its start can be read off its end.",
    ),
    Chart(
        "solutions",
        f"Solutions from r_0² = {SHOWN:g} ‖x*‖₁",
        "coordinate",
        "weight",
        (LINEAR, PLAIN, SLOW),
        "coordinate",
        "x",
        markers=True,
        part=PART,
        caption="Basis pursuit finds the sparse solution.  The plain flow spreads over many coordinates.",
    ),
)
