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

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...errors import InvalidValue
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import power
from .._framework.observe_old import by_seed
from .._framework.study import Job, Progress
from .._shared.diagonal import Array, balanced, drift, flow_of_layers, flow_of_product, growth_by_descent, quasi, spread
from .fisher import Classes

PAPER = "Li, Implicit Bias in Deep Linear Discriminant Analysis (arXiv 2603.02622)"
PART, CONTROL = "Conserved quasi-norm", "negative control"
EXPONENTS = {"2": 2.0, "1": 1.0, "2/3": 2 / 3, "1/2": 0.5}


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

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
    cells = [(depth, seed) for seed in range(config.seed, config.seed + config.repeats) for depth in config.depths]
    return [Job(f"depth {L}, seed {s}", _depth, {"depth": L, "seed": s, "config": config}, 0.3 * L) for L, s in cells]


def _depth(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """All that is seen of one depth, on one sample."""
    log.resume()
    rng, d = np.random.default_rng([103, seed]), config.dimension
    c = Classes.draw((1.0, -0.8, 0.6, 0.5), d, config.examples, rng)
    signs = np.concatenate([[1, -1, 1, 1], rng.choice([-1.0, 1.0], d - 4)])
    w0 = signs * (0.2 + 0.5 * np.abs(rng.standard_normal(d)))
    skew = np.exp(0.7 * rng.standard_normal((depth, d)))
    layers, own, p = balanced(w0, depth), {"seed": seed, "L": depth}, 2 / depth
    at = np.linspace(0, config.time, 201)

    def curve(name: str, times: Array, values: Array) -> None:
        for t, value in zip(times, values / values[0], strict=True):
            if seed == config.seed:
                log.append(run=f"L = {depth}, {name}", time=float(t), ratio=float(value))

    w = flow_of_layers(c.fisher, layers, at).states.prod(1)
    wrong = {name: quasi(w, q) for name, q in EXPONENTS.items() if abs(q - p) > 1e-9}
    row = {"drift": drift(quasi(w, p)), "wrong": min(map(drift, wrong.values()))}
    if depth > 1:
        away = np.linalg.norm(flow_of_product(c.fisher, w0, depth, config.time, at).states - w, axis=1)
        row["apart"] = float((away / np.linalg.norm(w, axis=1)).max())
    log.append(run="flow", **row, **own)
    for name, values in ({f"{p:g}" if depth < 3 else f"2/{depth}": quasi(w, p)} | wrong).items():
        curve(f"p = {name}", at, values)
    progress(0.2)
    if depth > 1:
        u = flow_of_layers(c.fisher, layers * skew / np.prod(skew, axis=0) ** (1 / depth), at).states
        total, norms = quasi(u.prod(1), p), np.square(u).sum(2)
        log.append(run="unbalanced", drift=drift(total), layers=drift(norms), **own)
        curve("unbalanced: Σ|w|^(2/L)", at, total)
        curve("unbalanced: ‖u_1‖²", at, norms[:, 0])
    most = 10 * float(quasi(w0, p))  # the difference loss has no minimum, and w may be infinite before the end
    for name, gradient, until in (("square loss", c.squares, config.time), ("difference loss", c.difference, 1.0)):
        found = flow_of_layers(gradient, layers, np.linspace(0, until, 201), most)
        total = quasi(found.states.prod(1), p)
        log.append(run=name, drift=drift(total), **own)
        if name == "square loss":
            curve(f"{name}: Σ|w|^(2/L)", found.times, total)
    _descend(log, c, layers, config, own)
    progress(0.7)
    _end(log, depth, config, own)


def _descend(log: RunLog, c: Classes, layers: Array, config: Config, own: dict[str, int]) -> None:
    """Gradient descent to time 5 at several rates: how far the norms drift, and the law of a single step."""
    drifts, worst = list[float](), 0.0
    for rate in config.rates:
        grown, off = growth_by_descent(c.fisher, layers, rate, round(5 / rate))
        drifts, worst = [*drifts, grown], max(worst, off)
        if own["seed"] == config.seed:
            log.append(run=f"L = {len(layers)}", rate=rate, drift=grown)
    log.append(run="gradient descent", slope=power(config.rates, drifts).slope, step=worst, **own)


def _end(log: RunLog, depth: int, config: Config, own: dict[str, int]) -> None:
    """From equal weights: the best ratio of the orthant against that of all, and how sparse w is on the way."""
    rng, d = np.random.default_rng([104, own["seed"]]), config.dimension
    c, start = Classes.draw((1.0, 0.8, 0.6, 0.5), d, config.examples, rng), np.full(d, 0.3)
    best, times = c.greatest_within(start), np.geomspace(1e-2, config.end, 100)
    ended = flow_of_product(c.fisher, start, depth, config.end, times)
    near = flow_of_product(c.fisher, start, depth, config.end, residual=lambda w: 0.9 * best - c.ratio(w))
    last, wide = c.ratio(ended.end), spread(near.end) if near.settled else None
    log.append(run="end", spread=wide, best=last / best, free=last / c.greatest(), **own)
    if own["seed"] == config.seed:
        for i, value in enumerate(near.end / np.linalg.norm(near.end)):
            log.append(run=f"L = {depth}", coordinate=i + 1, weight=float(value))
        for t, w in zip(times, ended.states, strict=True):
            log.append(run=f"L = {depth}", time=float(t), share=c.ratio(w) / best)


def _farthest(v: Array) -> float:
    """The value farthest from one."""
    return float(v[np.abs(v - 1).argmax()])


def _claims() -> Iterator[Claim]:
    """Every number is the worst over the depths L."""
    claim, descended = claiming(PART), "gradient descent"
    sentence = "Σ|w_i|^(2/L) stays along the flow (relative drift)"
    yield claim(sentence, by_seed("flow", max, "drift"), at_most(1e-6), "identity", "flow")
    sentence = "Flow of the layers and flow of w alone, by multiplicative steps, are one (relative distance)"
    yield claim(sentence, by_seed("flow", max, "apart"), at_most(1e-6), "identity", "flow")
    sentence = "No other exponent of 2, 1, 2/3, 1/2 is conserved (least relative drift)"
    yield claim(sentence, by_seed("flow", min, "wrong"), at_least(1e-2), CONTROL, "flow")
    sentence = "From unbalanced layers Σ|w_i|^(2/L) drifts (relative)"
    yield claim(sentence, by_seed("unbalanced", min, "drift"), at_least(1e-2), CONTROL, "unbalanced")
    sentence = "Each layer keeps its norm all the same (relative drift of ‖u_l‖²)"
    yield claim(sentence, by_seed("unbalanced", max, "layers"), at_most(1e-6), "identity", "unbalanced")
    for loss in ("square loss", "difference loss"):
        sentence = f"With the {loss}, which depends on the scale of w, Σ|w_i|^(2/L) drifts (relative)"
        yield claim(sentence, by_seed(loss, min, "drift"), at_least(0.1), CONTROL, loss)
    sentence = "Gradient descent grows the norms by exactly η²‖∇‖² a step (relative error)"
    yield claim(sentence, by_seed(descended, max, "step"), at_most(1e-12), "identity", descended)
    sentence = "Over a fixed time this drift is as the rate (exponent)"
    yield claim(sentence, by_seed(descended, _farthest, "slope"), within(0.9, 1.1), "scaling", descended)
    sentence = "At nine tenths of the orthant's best ratio, L = 2 is sparser than L = 1 (ratio of (‖w‖₁/‖w‖₂)²)"
    sparser = by_seed("end", lambda depth, v: v[depth == 2][0] / v[depth == 1][0], "L", "spread")
    yield claim(sentence, sparser, at_most(0.8), "comparison", "end", aside=True)
    sentence = "The flow of L ≥ 2 layers ends at the best ratio of its orthant (J over it)"
    share = by_seed("end", lambda depth, v: _farthest(v[depth > 1]), "L", "best")
    yield claim(sentence, share, within(0.995, 1.005), "comparison", "end", aside=True)
    sentence = "And below that of all directions (J over it)"
    share = by_seed("end", lambda depth, v: v[depth > 1].max(), "L", "free")
    yield claim(sentence, share, at_most(0.95), "comparison", "end", aside=True)


CLAIMS = tuple(_claims())

LABELS = {
    "time": "time",
    "ratio": "value over its start",
    "rate": "learning rate η",
    "drift": "relative drift of Σ|w|^(2/L) to time 5",
    "share": "J over the best of the orthant",
    "coordinate": "coordinate",
    "weight": "w / ‖w‖",
}

CAPTIONS = {
    "exponents": "Three layers conserve p = 2/3 and nothing else.",
    "unbalanced": "Balanced layers keep Σ|w|, on which the norm of an unbalanced layer lies; a loss that depends on the"
    " scale of w keeps nothing.",
    "rates": "Ten times the rate, ten times the drift.",
    "ends": "One layer may change signs and goes on to the best of all directions; deeper networks cannot.",
    "weights": "The means of the classes differ in four coordinates.  Deeper nets spread less over the others.",
}
DEPTHS, TRIED = tuple(f"L = {depth}" for depth in Config.depths), tuple(f"L = 3, p = {p}" for p in EXPONENTS)
KEPT = ("p = 1", "unbalanced: ‖u_1‖²", "unbalanced: Σ|w|^(2/L)", "square loss: Σ|w|^(2/L)")
BEST, ZERO, chart = "the best ratio of the orthant", ((0.0, ""),), charting(PART, LABELS, CAPTIONS)

CHARTS = (
    chart("exponents", "Σ|w|ᵖ along the flow of three layers", "time", "ratio", TRIED),
    chart("unbalanced", "What stays of two layers", "time", "ratio", tuple(f"L = 2, {name}" for name in KEPT)),
    chart("rates", "Drift under gradient descent", "rate", "drift", DEPTHS, log="xy"),
    chart("ends", "The ratio along the flow", "time", "share", DEPTHS, log="x", lines=((1.0, "best of the orthant"),)),
    chart("weights", f"Weights at nine tenths of {BEST}", "coordinate", "weight", DEPTHS, markers=True, lines=ZERO),
)
