"""Deep linear discriminant analysis conserves a quasi-norm of its weights.

A linear network of L diagonal layers of equal size, w = u_1⊙…⊙u_L, trained by gradient flow on the Fisher ratio, moves
by multiplicative steps and keeps Σ|w_i|^(2/L).  It does so here to solver precision, because the ratio does not depend
on the scale of w: each layer keeps its norm, balanced or not, and balance makes that norm a quasi-norm of w.  In the
controls, other exponents, unbalanced layers and losses that do depend on the scale, it drifts; so it does in gradient
descent, as the rate.  No weight changes its sign where L ≥ 2: the flow ends at the best ratio within its orthant.

S within classes, Δ between their means, ℓ(w) = -(wᵀΔ)²/(wᵀSw), J = -ℓ, g = ∇ℓ(w):

    u̇_l = -g ⊙ ∏_{k≠l} u_k
    d/dt u_{l,i}² = -2 g_i w_i                     for every l
    ẇ_i = -L g_i |w_i|^(2-2/L)                     from balanced layers
    d/dt Σ|w_i|^(2/L) = -2 gᵀw = 0
    ‖u_l(t+1)‖² = ‖u_l(t)‖² + η²‖∇_{u_l}‖²         gradient descent with rate η
"""

from dataclasses import dataclass

import numpy as np

from ...errors import InvalidValue
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, scaling, under
from .._framework.config import demand_positive, seeds
from .._framework.fits import exponent
from .._framework.observe import run
from .._framework.study import Job, Progress
from .._shared.diagonal import Array, balanced, drift, flow_of_layers, flow_of_product, growth_by_descent, quasi, spread
from .fisher import Classes

PAPER = "Li, Implicit Bias in Deep Linear Discriminant Analysis (arXiv 2603.02622)"
PART = "Conserved quasi-norm"
EXPONENTS = {"2": 2.0, "1": 1.0, "2/3": 2 / 3, "1/2": 0.5}


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    seed: int = 0
    repeats: int = 3
    depths: tuple[int, ...] = (1, 2, 3, 4, 6)  # L
    dimension: int = 20
    examples: int = 400
    time: float = 20.0  # of the flow
    rates: tuple[float, ...] = (0.02, 0.01, 0.005, 0.0025)  # of gradient descent, to time 5
    end: float = 400.0  # time at which the flow is taken to have ended

    def __post_init__(self) -> None:
        demand_positive(self)
        if self.dimension < 4:
            raise InvalidValue(f"dimension is {self.dimension}; four coordinates tell the classes apart")


QUICK = Config(repeats=1, depths=(1, 2, 3))


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in seeds(config):
        for depth in config.depths:
            own = {"depth": depth, "seed": seed, "config": config}
            found.append(Job(f"depth {depth}, seed {seed}", _depth, own, cost=0.3 * depth))
    return found


def _depth(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """Flows, descent and the end of a flow at one depth, on one sample."""
    log.resume()
    rng, d = np.random.default_rng([103, seed]), config.dimension
    c = Classes.draw((1.0, -0.8, 0.6, 0.5), d, config.examples, rng)
    signs = np.concatenate([[1, -1, 1, 1], rng.choice([-1.0, 1.0], d - 4)])
    w0 = signs * (0.2 + 0.5 * np.abs(rng.standard_normal(d)))
    skew = np.exp(0.7 * rng.standard_normal((depth, d)))
    own = {"seed": seed, "L": depth}
    _flow(log, c, w0, own, config)
    progress(0.2)
    if depth > 1:
        layers = balanced(w0, depth) * skew / np.prod(skew, axis=0) ** (1 / depth)
        _unbalanced(log, c, layers, own, config)
    _other_losses(log, c, w0, own, config)
    _descend(log, c, w0, own, config)
    progress(0.7)
    _end(log, own, config)


def _flow(log: RunLog, c: Classes, w0: Array, own: dict[str, int], config: Config) -> None:
    """The flow of balanced layers: what it conserves, what not, and its distance from the flow of w alone."""
    depth, p = own["L"], 2 / own["L"]
    times = np.linspace(0, config.time, 201)
    w = flow_of_layers(c.fisher, balanced(w0, depth), times).states.prod(1)
    wrong = {name: quasi(w, q) for name, q in EXPONENTS.items() if abs(q - p) > 1e-9}
    row = {"drift": drift(quasi(w, p)), "wrong": min(map(drift, wrong.values()))}
    if depth > 1:
        alone = flow_of_product(c.fisher, w0, depth, config.time, times).states
        row["apart"] = float((np.linalg.norm(alone - w, axis=1) / np.linalg.norm(w, axis=1)).max())
    log.append(run="flow", **row, **own)
    if own["seed"] == config.seed:
        right = f"{p:g}" if depth < 3 else f"2/{depth}"
        for name, values in ({right: quasi(w, p)} | wrong).items():
            _curve(log, f"L = {depth}, p = {name}", times, values)


def _unbalanced(log: RunLog, c: Classes, layers: Array, own: dict[str, int], config: Config) -> None:
    """The flow of layers of other sizes: the quasi-norm of their product drifts, their norms stay."""
    depth, times = own["L"], np.linspace(0, config.time, 201)
    u = flow_of_layers(c.fisher, layers, times).states
    total, norms = quasi(u.prod(1), 2 / depth), np.square(u).sum(2)
    log.append(run="unbalanced", drift=drift(total), layers=drift(norms), **own)
    if own["seed"] == config.seed:
        _curve(log, f"L = {depth}, unbalanced: Σ|w|^(2/L)", times, total)
        _curve(log, f"L = {depth}, unbalanced: ‖u_1‖²", times, norms[:, 0])


def _other_losses(log: RunLog, c: Classes, w0: Array, own: dict[str, int], config: Config) -> None:
    """The flow on losses that depend on the scale of w."""
    depth, p = own["L"], 2 / own["L"]
    limit = 10 * float(quasi(w0, p))  # the difference loss has no minimum, and w may be infinite before the end
    for name, gradient, until in (("square loss", c.squares, config.time), ("difference loss", c.difference, 1.0)):
        found = flow_of_layers(gradient, balanced(w0, depth), np.linspace(0, until, 201), limit)
        total = quasi(found.states.prod(1), p)
        log.append(run=name, drift=drift(total), **own)
        if name == "square loss" and own["seed"] == config.seed:
            _curve(log, f"L = {depth}, {name}: Σ|w|^(2/L)", found.times, total)


def _curve(log: RunLog, name: str, times: Array, values: Array) -> None:
    """Values over their start, for the charts."""
    for t, value in zip(times, values / values[0], strict=True):
        log.append(run=name, time=float(t), ratio=float(value))


def _descend(log: RunLog, c: Classes, w0: Array, own: dict[str, int], config: Config) -> None:
    """Gradient descent to time 5 at several rates: how far the norms drift, and the law of a single step."""
    drifts, worst = list[float](), 0.0
    for rate in config.rates:
        growth, error = growth_by_descent(c.fisher, balanced(w0, own["L"]), rate, round(5 / rate))
        drifts.append(growth)
        worst = max(worst, error)
        if own["seed"] == config.seed:
            log.append(run=f"L = {own['L']}", rate=rate, drift=growth)
    log.append(run="gradient descent", slope=exponent(config.rates, drifts), step=worst, **own)


def _end(log: RunLog, own: dict[str, int], config: Config) -> None:
    """From equal weights: the best ratio of the orthant against that of all, and how sparse w is before the end."""
    depth, d = own["L"], config.dimension
    rng, start = np.random.default_rng([104, own["seed"]]), np.full(d, 0.3)
    c = Classes.draw((1.0, 0.8, 0.6, 0.5), d, config.examples, rng)
    best, times = c.best_ratio_within(start), np.geomspace(1e-2, config.end, 100)
    ended = flow_of_product(c.fisher, start, depth, config.end, times)
    near = flow_of_product(c.fisher, start, depth, config.end, residual=lambda w: 0.9 * best - c.ratio(w))
    last = c.ratio(ended.end)
    sparsity = spread(near.end) if near.settled else None
    log.append(run="end", spread=sparsity, best=last / best, free=last / c.best_ratio(), **own)
    if own["seed"] == config.seed:
        for i, value in enumerate(near.end / np.linalg.norm(near.end)):
            log.append(run=f"L = {depth}", coordinate=i + 1, weight=float(value))
        for t, w in zip(times, ended.states, strict=True):
            log.append(run=f"L = {depth}", time=float(t), share=c.ratio(w) / best)


END = run("end")
DEEP = END.where("L", lambda depth: depth > 1)

CLAIMS = under(
    PART,
    identity("Σ|w_i|^(2/L) stays along the flow (relative drift)", run("flow")["drift"].max() <= 1e-6),
    identity(
        "Flow of the layers and flow of w alone, by multiplicative steps, are one (relative distance)",
        run("flow")["apart"].max() <= 1e-6,
    ),
    control(
        "No other exponent of 2, 1, 2/3, 1/2 is conserved (least relative drift)", run("flow")["wrong"].min() >= 1e-2
    ),
    control("From unbalanced layers Σ|w_i|^(2/L) drifts (relative)", run("unbalanced")["drift"].min() >= 1e-2),
    identity(
        "Each layer keeps its norm all the same (relative drift of ‖u_l‖²)", run("unbalanced")["layers"].max() <= 1e-6
    ),
    *(
        control(
            f"With the {loss}, which depends on the scale of w, Σ|w_i|^(2/L) drifts (relative)",
            run(loss)["drift"].min() >= 0.1,
        )
        for loss in ("square loss", "difference loss")
    ),
    identity(
        "Gradient descent grows the norms by exactly η²‖∇‖² a step (relative error)",
        run("gradient descent")["step"].max() <= 1e-12,
    ),
    scaling(
        "Over a fixed time this drift is as the rate (exponent)",
        run("gradient descent")["slope"].farthest_from(1).within(0.9, 1.1),
    ),
    comparison(
        "At nine tenths of the orthant's best ratio, L = 2 is sparser than L = 1 (ratio of (‖w‖₁/‖w‖₂)²)",
        END.at(L=2)["spread"] / END.at(L=1)["spread"] <= 0.8,
        deciding=False,
    ),
    comparison(
        "The flow of L ≥ 2 layers ends at the best ratio of its orthant (J over it)",
        DEEP["best"].farthest_from(1).within(0.995, 1.005),
        deciding=False,
    ),
    comparison("And below that of all directions (J over it)", DEEP["free"].max() <= 0.95, deciding=False),
)

LABELS = {
    "time": "time",
    "ratio": "value over its start",
    "rate": "learning rate η",
    "drift": "relative drift of Σ|w|^(2/L) to time 5",
    "share": "J over the best of the orthant",
    "coordinate": "coordinate",
    "weight": "w / ‖w‖",
}
DEPTHS = tuple(f"L = {depth}" for depth in Config.depths)

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "exponents",
            "Σ|w|ᵖ along the flow of three layers",
            x="time",
            y="ratio",
            runs=tuple(f"L = 3, p = {p}" for p in EXPONENTS),
            caption="Three layers conserve p = 2/3 and nothing else.",
        ),
        Chart(
            "unbalanced",
            "What stays of two layers",
            x="time",
            y="ratio",
            runs=(
                "L = 2, p = 1",
                "L = 2, unbalanced: ‖u_1‖²",
                "L = 2, unbalanced: Σ|w|^(2/L)",
                "L = 2, square loss: Σ|w|^(2/L)",
            ),
            caption="Balanced layers keep Σ|w|, on which the norm of an unbalanced layer lies; a loss that depends on"
            " the scale of w keeps nothing.",
        ),
        Chart(
            "rates",
            "Drift under gradient descent",
            x="rate",
            y="drift",
            runs=DEPTHS,
            log="xy",
            caption="Ten times the rate, ten times the drift.",
        ),
        Chart(
            "ends",
            "The ratio along the flow",
            x="time",
            y="share",
            runs=DEPTHS,
            log="x",
            lines=((1.0, "best of the orthant"),),
            caption="One layer may change signs and goes on to the best of all directions; deeper networks cannot.",
        ),
        Chart(
            "weights",
            "Weights at nine tenths of the best ratio of the orthant",
            x="coordinate",
            y="weight",
            runs=DEPTHS,
            markers=True,
            lines=((0.0, ""),),
            caption="The means of the classes differ in four coordinates.  Deeper nets spread less over the others.",
        ),
    ),
)
