"""Weight normalization keeps the bias towards sparse solutions when the start is large.

Gradient flow on a diagonal linear model x = u⊙…⊙u with fewer equations than unknowns finds sparse solutions from a
small start, and with u in polar coordinates, u = r·v/‖v‖, from much larger ones.  The reason can be written down: the
normalized flow from u_0 ends where the plain flow ends from κ·u_0, and κ is exponentially small where the radius has
grown.  Both hold here, and the sign of κ - 1 says which flow recovers better; recovery is judged on the median of five
draws.  In the controls, starts larger than the solution, neither flow recovers; from small starts a fast radius harms.

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

from ...errors import InvalidValue
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, median
from .._framework.config import demand_positive
from .._framework.observe_old import Observer, by_seed
from .._framework.study import Job, Progress
from .._shared.diagonal import Array, Sensing, normalized, plain, shrinkage
from .._shared.oracles import basis_pursuit

PAPER = "Chou, Rauhut & Ward, Robust Implicit Regularization via Weight Normalization (arXiv 2305.05448)"
PART, CONTROL = "Recovery of sparse solutions", "negative control"
PLAIN, LINEAR, SLOW, FAST, SHOWN = "plain", "basis pursuit", "normalized, η = 0.1", "normalized, η = 0.5", 0.6


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
        demand_positive(self)
        if not self.sparsity <= self.equations < self.unknowns:
            raise InvalidValue(f"equations is {self.equations}; it must be at least sparsity and below unknowns")


QUICK = Config(radii=(0.05, 0.2, 0.6, 1.5, 2.5), rates=(0.5, 0.1), cubic=False)


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


def draw(config: Config, seed: int) -> Sensing:
    return Sensing.draw(config.equations, config.unknowns, config.sparsity, np.random.default_rng([106, seed]))


def _recover(log: RunLog, progress: Progress, radius: float, seed: int, config: Config) -> None:
    """Both flows from equal entries with r_0² = radius·‖x*‖₁, two layers."""
    log.resume()
    s, first = draw(config, seed), seed == config.seed
    scale, d, flat = float(s.truth.sum()), config.unknowns, s.kernel.sum(1)  # P1, P the projection on ker A
    start = np.full(d, np.sqrt(radius * scale / d))
    r0, own = float(np.linalg.norm(start)), {"seed": seed, "radius": radius}

    def write(run: str, x: Array, **more: float) -> None:
        log.append(run=run, error=s.error(x), drawn=s.error(x) if first else None, **own, **more)
        if first and radius == SHOWN:
            for i, value in enumerate(x):
                log.append(run=run, coordinate=i + 1, weight=float(value))

    base = plain(s, start, 2, config.time)
    write(PLAIN, base.x)
    write(LINEAR, basis_pursuit(s.a, s.a @ s.truth))
    progress(0.2)
    for rate in config.rates:
        end = normalized(s, start, 2, rate * scale, config.time)
        kappa, gain = shrinkage(r0, end.radius, rate * scale), s.error(end.x) / s.error(base.x)
        seen = float(np.exp(flat @ np.log(np.sqrt(end.x) / start) / flat.sum()))  # P1 is as long as 1ᵀP1
        write(_named(rate), end.x, kappa=kappa, seen=seen, gain=gain)
        right = (kappa < 1) == (gain < 1)
        log.append(run="all starts", moved=end.moved, right=float(right), **own)


def _compare(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """The normalized flow from u_0 against the plain one from κ·u_0, where both have solved the equations."""
    log.resume()
    s, rng = draw(config, seed), np.random.default_rng([107, seed])
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
        log.append(run=f"L = {depth}", seed=seed, apart=apart if settled else None, settled=float(settled))
        progress((done + 1) / len(cells))


def _named(rate: float) -> str:
    return f"normalized, η = {rate:g}"


def _over(run: str, column: str, low: float, high: float) -> Observer:
    """The greatest over starts from low to high, in each repeat."""
    return by_seed(run, lambda radius, v: v[(radius >= low) & (radius <= high)].max(), "radius", column)


def _claims() -> Iterator[Claim]:
    """Starts and rates in units of ‖x*‖₁."""
    claim, every = claiming(PART), "all starts"
    for run, layers in (("L = 2", "Two"), ("L = 3", "Three")):
        sentence = f"{layers} layers: the normalized flow ends where the plain one does from κ·u_0 (relative distance)"
        yield claim(sentence, by_seed(run, max, "apart"), at_most(1e-4), "identity", run)
    sentence = "Two layers: log v̂ + r²/2η stays in the kernel of A (greatest change of an entry)"
    yield claim(sentence, by_seed(every, max, "moved"), at_most(1e-5), "identity", every)
    sentence = "η = 0.1, r_0² from 0.05 to 0.6: normalization makes the error small (greatest, relative)"
    note = "Judged on the median over draws of A and x*: about one draw in eight misses .05."
    yield claim(sentence, _over(SLOW, "error", 0.05, 0.6), median(at_most(0.05)), "comparison", SLOW, note=note)
    sentence = "And smaller than that of the plain flow (greatest ratio of errors)"
    yield claim(sentence, _over(SLOW, "gain", 0.05, 0.6), median(at_most(0.2)), "comparison", SLOW)
    sentence = "η = 0.1, r_0² = 2.5: it does not (ratio of errors)"
    yield claim(sentence, _over(SLOW, "gain", 2.5, 2.5), median(at_least(0.8)), CONTROL, SLOW)
    sentence = "Whether κ < 1 names the better flow (share of all starts and rates)"
    yield claim(sentence, lambda h, config: float(h.series(every, "right").mean()), at_least(0.95), "comparison", every)
    sentence = "η = 0.5, r_0² = 0.05: a fast radius harms (ratio of errors)"
    yield claim(sentence, _over(FAST, "gain", 0.05, 0.05), median(at_least(1)), "comparison", FAST, aside=True)
    sentence = "Basis pursuit finds the sparse solution (relative error)"
    yield claim(sentence, by_seed(LINEAR, max, "error"), at_most(1e-6), "comparison", LINEAR, aside=True)
    sentence = "Starts larger than the solution: recovery from r_0² = 1.5, η = 0.1 (relative error)"
    yield claim(sentence, _over(SLOW, "error", 1.5, 1.5), median(at_most(0.05)), WIDER, SLOW)


CLAIMS = tuple(_claims())

LABELS = {
    "radius": "size of the start, r_0²/‖x*‖₁",
    "drawn": "relative error ‖x - x*‖/‖x*‖",
    "kappa": "κ by the formula",
    "gain": "error of the normalized flow over that of the plain",
    "seen": "κ from where the flow ended",
    "coordinate": "coordinate",
    "weight": "x",
}

CAPTIONS = {
    "recovery": "With a slow radius (small η, in units of ‖x*‖₁) the normalized flow recovers from starts up to the"
    " size of the solution, at 1; beyond that neither does.  One draw of five.",
    "kappa": "A dot for every start, rate and repeat: below the line normalization is better, which is where κ < 1.",
    "start": "The plain flow conserves the part of log u in the kernel of A, so its start can be read off its end.",
    "solutions": "Basis pursuit finds the sparse solution.  The plain flow spreads over many coordinates.",
}
RATES, EQUAL = tuple(_named(rate) for rate in Config.rates), ((1.0, "equal"),)
chart = charting(PART, LABELS, CAPTIONS)

CHARTS = (
    chart("recovery", "Recovery of a sparse solution", "radius", "drawn", (PLAIN, *RATES), log="xy"),
    chart("kappa", "Which flow is better", "kappa", "gain", RATES, log="xy", lines=EQUAL, markers=True),
    chart("start", "The start that the plain flow would have needed", "kappa", "seen", RATES, log="xy", markers=True),
    chart(
        "solutions",
        f"Solutions from r_0² = {SHOWN:g} ‖x*‖₁",
        "coordinate",
        "weight",
        (LINEAR, PLAIN, SLOW),
        markers=True,
    ),
)
