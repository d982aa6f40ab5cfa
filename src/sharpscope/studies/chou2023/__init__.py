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

from dataclasses import dataclass

import numpy as np

from ...errors import InvalidValue
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.observe import run
from .._framework.study import Job, Progress
from .._shared.diagonal import Array, Sensing, normalized_flow, plain_flow, shrinkage
from .._shared.oracles import basis_pursuit

PAPER = "Chou, Rauhut & Ward, Robust Implicit Regularization via Weight Normalization (arXiv 2305.05448)"
PART = "Recovery of sparse solutions"
PLAIN, LINEAR, ALL = "plain", "basis pursuit", "all starts"
SHOWN = 0.6  # r_0²/‖x*‖₁ of the solutions in a chart


@dataclass(frozen=True)
class Config:
    """The settings of the study; the defaults are its full size."""

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
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        for radius in config.radii:
            found.append(Job(f"start {radius:g}, seed {seed}", _recover, {"radius": radius, **common}, cost=0.5))
        found.append(Job(f"two layers, seed {seed}", _compare, {"depth": 2, **common}, cost=2.0))
        if config.cubic:
            found.append(Job(f"three layers, seed {seed}", _compare, {"depth": 3, **common}, cost=2.0))
    return found


def draw(config: Config, seed: int) -> Sensing:
    return Sensing.draw(config.equations, config.unknowns, config.sparsity, np.random.default_rng([106, seed]))


def normalized(rate: float) -> str:
    """The name of the runs with this rate of the radius."""
    return f"normalized, η = {rate:g}"


def _recover(log: RunLog, progress: Progress, radius: float, seed: int, config: Config) -> None:
    """Follow both flows of two layers from equal entries with r_0² = radius·‖x*‖₁."""
    log.resume()
    sensing = draw(config, seed)
    scale = float(sensing.truth.sum())
    start = np.full(config.unknowns, np.sqrt(radius * scale / config.unknowns))
    r0 = float(np.linalg.norm(start))

    def write(name: str, x: Array, **more: float) -> None:
        log.append(run=name, error=sensing.error(x), seed=seed, radius=radius, **more)
        if seed == config.seed and radius == SHOWN:
            for i, value in enumerate(x):
                log.append(run=name, coordinate=i + 1, weight=float(value))

    plain = plain_flow(sensing, start, 2, config.time)
    write(PLAIN, plain.x)
    write(LINEAR, basis_pursuit(sensing.a, sensing.a @ sensing.truth))
    progress(0.2)
    flat = sensing.kernel.sum(1)  # P1, P the projection on ker A
    for rate in config.rates:
        end = normalized_flow(sensing, start, 2, rate * scale, config.time)
        kappa = shrinkage(r0, end.radius, rate * scale)
        gain = sensing.error(end.x) / sensing.error(plain.x)
        seen = float(np.exp(flat @ np.log(np.sqrt(end.x) / start) / flat.sum()))  # P1 is as long as 1ᵀP1
        write(normalized(rate), end.x, kappa=kappa, seen=seen, gain=gain)
        right = (kappa < 1) == (gain < 1)
        log.append(run=ALL, moved=end.moved, right=float(right), seed=seed, radius=radius)


def _compare(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """Compare the normalized flow from u_0 with the plain one from κ·u_0, where both have solved the equations."""
    log.resume()
    sensing, rng = draw(config, seed), np.random.default_rng([107, seed])
    scale, d = float(sensing.truth.sum()), config.unknowns
    if depth == 3:
        cells = [(x, rate) for x in (0.01, 0.1) for rate in (1.0, 0.5)]
    else:
        cells = [(radius * scale / d, rate * scale) for radius in (0.2, 1.5) for rate in config.rates]
    for done, (x, rate) in enumerate(cells):
        start = x ** (1 / depth) * np.exp(0.1 * rng.standard_normal(d))
        end = normalized_flow(sensing, start, depth, rate, 5 * config.time)
        kappa = shrinkage(float(np.linalg.norm(start)), end.radius, rate)
        other = plain_flow(sensing, kappa * start, depth, 5 * config.time)
        settled = end.settled and other.settled
        distance = float(np.linalg.norm(end.x - other.x) / np.linalg.norm(other.x)) if settled else None
        log.append(run=f"L = {depth}", seed=seed, apart=distance, settled=float(settled))
        progress((done + 1) / len(cells))


SLOW, FAST = run(normalized(0.1)), run(normalized(0.5))
MODERATE = SLOW.between(radius=(0.05, 0.6))

CLAIMS = under(  # starts and rates in units of ‖x*‖₁
    PART,
    *(
        identity(
            f"{layers} layers: the normalized flow ends where the plain one does from κ·u_0 (relative distance)",
            run(name)["apart"].max() <= 1e-4,
        )
        for name, layers in (("L = 2", "Two"), ("L = 3", "Three"))
    ),
    identity(
        "Two layers: log v̂ + r²/2η stays in the kernel of A (greatest change of an entry)",
        run(ALL)["moved"].max() <= 1e-5,
    ),
    comparison(
        "η = 0.1, r_0² from 0.05 to 0.6: normalization makes the error small (greatest, relative)",
        (MODERATE["error"].max() <= 0.05).in_the_median(),
        note="Judged on the median over draws of A and x*: about one draw in eight misses .05.",
    ),
    comparison(
        "And smaller than that of the plain flow (greatest ratio of errors)",
        (MODERATE["gain"].max() <= 0.2).in_the_median(),
    ),
    control("η = 0.1, r_0² = 2.5: it does not (ratio of errors)", (SLOW.at(radius=2.5)["gain"] >= 0.8).in_the_median()),
    comparison(
        "Whether κ < 1 names the better flow (share of all starts and rates)",
        run(ALL)["right"].over_repeats(np.mean) >= 0.95,
    ),
    comparison(
        "η = 0.5, r_0² = 0.05: a fast radius harms (ratio of errors)",
        (FAST.at(radius=0.05)["gain"] >= 1).in_the_median(),
        deciding=False,
    ),
    comparison(
        "Basis pursuit finds the sparse solution (relative error)", run(LINEAR)["error"].max() <= 1e-6, deciding=False
    ),
    wider_claim(
        "Starts larger than the solution: recovery from r_0² = 1.5, η = 0.1 (relative error)",
        (SLOW.at(radius=1.5)["error"] <= 0.05).in_the_median(),
    ),
)

LABELS = {
    "radius": "size of the start, r_0²/‖x*‖₁",
    "error": "relative error ‖x - x*‖/‖x*‖",
    "kappa": "κ by the formula",
    "gain": "error of the normalized flow over that of the plain",
    "seen": "κ from where the flow ended",
    "coordinate": "coordinate",
    "weight": "x",
}
RATES = tuple(normalized(rate) for rate in Config.rates)

CHARTS = labelled(
    LABELS,
    *under(
        PART,
        Chart(
            "recovery",
            "Recovery of a sparse solution",
            x="radius",
            y="error",
            runs=(PLAIN, *RATES),
            repeats="first",
            log="xy",
            caption=(
                "With a slow radius (small η, in units of ‖x*‖₁) the normalized flow recovers from starts up to the"
                " size of the solution, at 1; beyond that neither does.  One draw of five."
            ),
        ),
        Chart(
            "kappa",
            "Which flow is better",
            x="kappa",
            y="gain",
            runs=RATES,
            log="xy",
            lines=((1.0, "equal"),),
            markers=True,
            caption=(
                "A dot for every start, rate and repeat: below the line normalization is better, which is where κ < 1."
            ),
        ),
        Chart(
            "start",
            "The start that the plain flow would have needed",
            x="kappa",
            y="seen",
            runs=RATES,
            log="xy",
            markers=True,
            caption=(
                "The plain flow conserves the part of log u in the kernel of A, so its start can be read off its end."
            ),
        ),
        Chart(
            "solutions",
            f"Solutions from r_0² = {SHOWN:g} ‖x*‖₁",
            x="coordinate",
            y="weight",
            runs=(LINEAR, PLAIN, normalized(0.1)),
            markers=True,
            caption="Basis pursuit finds the sparse solution.  The plain flow spreads over many coordinates.",
        ),
    ),
)
