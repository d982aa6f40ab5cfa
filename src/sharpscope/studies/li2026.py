"""Deep linear discriminant analysis conserves a quasi-norm of its weights.

A linear network of L diagonal layers, w = u_1⊙…⊙u_L, trained by gradient flow on the Fisher ratio from layers of equal
size, moves by multiplicative steps and keeps Σ|w_i|^(2/L).  The reason is a symmetry: the ratio does not depend on the
scale of w, hence of no layer, so each layer keeps its norm, balanced or not; balance only makes the norm of a layer a
quasi-norm of w.  Here the flow is integrated to solver precision, other exponents, unbalanced layers and losses that do
depend on the scale are the controls, and gradient descent shows how the law is lost at finite steps.  No weight changes
its sign where L ≥ 2: the flow ends at the best ratio within its orthant, and not at that of all directions.

S within classes, Δ between their means, ℓ(w) = -(wᵀΔ)²/(wᵀSw), J = -ℓ, g = ∇ℓ(w):

    u̇_l = -g ⊙ ∏_{k≠l} u_k
    d/dt u_{l,i}² = -2 g_i w_i                     for every l
    ẇ_i = -L g_i |w_i|^(2-2/L)                     from balanced layers
    d/dt Σ|w_i|^(2/L) = -2 gᵀw = 0
    ‖u_l(t+1)‖² = ‖u_l(t)‖² + η²‖∇_{u_l}‖²         gradient descent with rate η
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..claims import Claim, Criterion, at_least, at_most, within
from ..history import Track
from ..plots import Chart
from ._ode import descent, flow
from ._oracles import within_orthant
from ._stats import Observer, by_seed, power
from ._study import Job, Report

PAPER = "Li, Implicit Bias in Deep Linear Discriminant Analysis (arXiv 2603.02622)"
PART = "Conserved quasi-norm"

Array = NDArray[np.float64]
Gradient = Callable[[Array], Array]
EXPONENTS = {"2": 2.0, "1": 1.0, "2/3": 2 / 3, "1/2": 0.5}
exact = partial(flow, rtol=1e-10)


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
        for name, value in vars(self).items():
            if name != "seed" and not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.dimension < 4:
            raise ValueError(f"dimension is {self.dimension}; four coordinates tell the classes apart")


QUICK = Config(repeats=1, depths=(1, 2, 3))


@dataclass(frozen=True)
class Classes:
    """Inputs ``(n, d)``, labels ±1 ``(n,)``; S ``(d, d)`` and Δ ``(d,)`` of the sample."""

    x: Array
    y: Array
    within: Array
    apart: Array

    @classmethod
    def draw(cls, means: tuple[float, ...], config: Config, rng: np.random.Generator) -> "Classes":
        """Two classes N(∓μ/2, I + .15·11ᵀ), μ beginning with `means`, as many of one as of the other."""
        n, d = config.examples, config.dimension
        mu = np.concatenate([means, np.zeros(d - len(means))])
        y = np.where(np.arange(n) % 2, 1.0, -1.0)
        x = rng.standard_normal((n, d)) + np.sqrt(0.15) * rng.standard_normal((n, 1)) + y[:, None] * mu / 2
        middle = np.where(y[:, None] > 0, x[y > 0].mean(0), x[y < 0].mean(0))
        rest = x - middle
        return cls(x, y, rest.T @ rest / n, x[y > 0].mean(0) - x[y < 0].mean(0))

    def ratio(self, w: Array) -> float:
        """``J = (wᵀΔ)²/(wᵀSw)``."""
        return float((w @ self.apart) ** 2 / (w @ self.within @ w))

    def fisher(self, w: Array) -> Array:
        """``∇ℓ = -2 (wᵀΔ)/(wᵀSw) · (Δ - (wᵀΔ)/(wᵀSw) Sw)``."""
        sw = self.within @ w
        share = (w @ self.apart) / (w @ sw)
        return np.asarray(-2 * share * (self.apart - share * sw))

    def squares(self, w: Array) -> Array:
        """Gradient of ``‖Xw - y‖²/2n``, which depends on the scale of w."""
        return np.asarray(self.x.T @ (self.x @ w - self.y) / len(self.y))

    def difference(self, w: Array) -> Array:
        """Gradient of ``wᵀ(S - ΔΔᵀ)w``, which depends on the scale of w."""
        return np.asarray(2 * (self.within @ w - self.apart * (self.apart @ w)))


def layered(gradient: Gradient, depth: int) -> Callable[[Array], Array]:
    """``u̇_l = -g ⊙ ∏_{k≠l} u_k`` of layers ``(L·d,)``."""
    others = [[k for k in range(depth) if k != l] for l in range(depth)]

    def field(y: Array) -> Array:
        u = y.reshape(depth, -1)
        g = gradient(u.prod(0))
        return np.concatenate([-g * u[rest].prod(0) for rest in others])

    return field


def reduced(gradient: Gradient, depth: int, signs: Array) -> Callable[[Array], Array]:
    """``d/dt log|w_i| = -L g_i sign(w_i) |w_i|^(1-2/L)``; in w itself a solver would step through zero."""

    def field(y: Array) -> Array:
        return np.asarray(-depth * signs * gradient(signs * np.exp(y)) * np.exp(y * (1 - 2 / depth)))

    return field


def quasi(w: Array, p: float) -> Array:
    """``Σ_i |w_i|^p`` over the last axis."""
    return np.asarray((np.abs(w) ** p).sum(-1))


def drift(v: Array) -> float:
    """``max_t |v(t)/v(0) - 1|``, the greatest over columns."""
    return float(np.abs(v / v[0] - 1).max())


def balanced(w: Array, depth: int) -> Array:
    """Layers ``|w|^(1/L)`` ``(L, d)``, the signs in the first."""
    layers = np.tile(np.abs(w) ** (1 / depth), (depth, 1))
    layers[0] *= np.sign(w)
    return layers


def jobs(config: Config) -> list[Job]:
    seeds = range(config.seed, config.seed + config.repeats)
    return [
        Job(f"depth {depth}, seed {seed}", _depth, {"depth": depth, "seed": seed, "config": config}, 0.3 * depth)
        for seed in seeds
        for depth in config.depths
    ]


def _depth(track: Track, report: Report, depth: int, seed: int, config: Config) -> None:
    """All that is seen of one depth, on one sample."""
    track.resume()
    rng = np.random.default_rng([103, seed])
    c = Classes.draw((1.0, -0.8, 0.6, 0.5), config, rng)
    d = config.dimension
    signs = np.concatenate([[1, -1, 1, 1], rng.choice([-1.0, 1.0], d - 4)])
    w0 = signs * (0.2 + 0.5 * np.abs(rng.standard_normal(d)))
    skew = np.exp(0.7 * rng.standard_normal((depth, d)))
    layers, own, show = balanced(w0, depth), {"seed": seed, "L": depth}, seed == config.seed
    p, times = 2 / depth, np.linspace(0, config.time, 201)

    def weights(states: Array) -> Array:
        return np.asarray(states.reshape(len(states), depth, d).prod(1))

    def curve(name: str, at: Array, values: Array) -> None:
        if show:
            for t, value in zip(at, values / values[0], strict=True):
                track.append(run=f"L = {depth}, {name}", time=float(t), ratio=float(value))

    w = weights(exact(layered(c.fisher, depth), layers.ravel(), config.time, at=times).states)
    wrong = {name: quasi(w, q) for name, q in EXPONENTS.items() if abs(q - p) > 1e-9}
    row = {"drift": drift(quasi(w, p)), "wrong": min(map(drift, wrong.values()))}
    if depth > 1:
        y = exact(reduced(c.fisher, depth, signs), np.log(np.abs(w0)), config.time, at=times).states
        row["apart"] = float((np.linalg.norm(signs * np.exp(y) - w, axis=1) / np.linalg.norm(w, axis=1)).max())
    track.append(run="flow", **row, **own)
    for name, values in ({{1: "2", 2: "1"}.get(depth, f"2/{depth}"): quasi(w, p)} | wrong).items():
        curve(f"p = {name}", times, values)
    report(0.2)

    if depth > 1:
        uneven = layers * skew / np.prod(skew, axis=0) ** (1 / depth)
        states = exact(layered(c.fisher, depth), uneven.ravel(), config.time, at=times).states
        norms = np.square(states.reshape(len(times), depth, d)).sum(2)
        total = quasi(weights(states), p)
        track.append(run="unbalanced", drift=drift(total), layers=drift(norms), **own)
        curve("unbalanced: Σ|w|^(2/L)", times, total)
        curve("unbalanced: ‖u_1‖²", times, norms[:, 0])
    report(0.4)

    def room(y: Array) -> float:  # the difference loss has no minimum, and w may be infinite before the end
        return float(10 * quasi(w0, p) - quasi(weights(y[None]), p)[0])

    for name, gradient, until in (("square loss", c.squares, config.time), ("difference loss", c.difference, 1.0)):
        at, field = np.linspace(0, until, 201), layered(gradient, depth)
        found = exact(field, layers.ravel(), until, at=at, residual=room, small=0.0)
        total = quasi(weights(found.states), p)
        track.append(run=name, drift=drift(total), **own)
        if name == "square loss":
            curve(f"{name}: Σ|w|^(2/L)", found.times, total)
    report(0.5)

    _descend(track, c, layers, config, own)
    report(0.7)
    _end(track, depth, config, own)


def _descend(track: Track, c: Classes, layers: Array, config: Config, own: dict[str, int]) -> None:
    """Gradient descent to time 5 at several rates: how far the norms drift, and the law of a single step."""
    depth, d = layers.shape
    field, drifts, worst = layered(c.fisher, depth), [], 0.0
    for rate in config.rates:
        states = descent(field, layers.ravel(), rate, round(5 / rate))
        slopes = np.array([field(y) for y in states[:-1]])
        norms, pushes = (np.square(v.reshape(-1, depth, d)).sum(2) for v in (states, slopes))
        worst = max(worst, float(np.abs(np.diff(norms, axis=0) / norms[:-1] - rate**2 * pushes / norms[:-1]).max()))
        total = quasi(states[[0, -1]].reshape(2, depth, d).prod(1), 2 / depth)
        drifts.append(float(total[1] / total[0] - 1))
        if own["seed"] == config.seed:
            track.append(run=f"L = {depth}", rate=rate, drift=drifts[-1])
    track.append(run="gradient descent", slope=power(config.rates, drifts).slope, step=worst, **own)


def _end(track: Track, depth: int, config: Config, own: dict[str, int]) -> None:
    """From equal weights: the best ratio of the orthant against that of all, and how sparse w is on the way."""
    c = Classes.draw((1.0, 0.8, 0.6, 0.5), config, np.random.default_rng([104, own["seed"]]))
    start, times = np.full(config.dimension, 0.3), np.geomspace(1e-2, config.end, 100)
    best = c.ratio(within_orthant(lambda w: (-c.ratio(w), c.fisher(w)), start))
    free = float(c.apart @ np.linalg.solve(c.within, c.apart))

    def weights(y: Array) -> Array:
        return y if depth == 1 else np.exp(y)

    field = layered(c.fisher, 1) if depth == 1 else reduced(c.fisher, depth, np.ones(config.dimension))
    first = start if depth == 1 else np.log(start)
    ended = exact(field, first, config.end, at=times)
    near = exact(field, first, config.end, residual=lambda y: 0.9 * best - c.ratio(weights(y)), small=0.0)
    w = weights(near.end)
    spread = float((np.abs(w).sum() / np.linalg.norm(w)) ** 2)
    last = c.ratio(weights(ended.end))
    track.append(run="end", spread=spread if near.settled else None, best=last / best, free=last / free, **own)
    if own["seed"] == config.seed:
        for i, value in enumerate(w / np.linalg.norm(w)):
            track.append(run=f"L = {depth}", coordinate=i + 1, weight=float(value))
        for t, y in zip(times, ended.states, strict=True):
            track.append(run=f"L = {depth}", time=float(t), share=c.ratio(weights(y)) / best)


def _farthest(v: Array) -> float:
    """The value farthest from one."""
    return float(v[np.abs(v - 1).argmax()])


def _deep(reduce: Callable[[Array], float], column: str) -> Observer:
    """What the flow ends with where L ≥ 2."""
    return by_seed("end", lambda depth, v: reduce(v[depth > 1]), "L", column)


def _claim(sentence: str, observe: Observer, criterion: Criterion, kind: str, run: str, deciding: bool = True) -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, (run,), deciding)


def _claims() -> Iterator[Claim]:
    """Every number is the worst over the depths L."""
    control = "negative control"
    sentence = "Σ|w_i|^(2/L) stays along the flow (relative drift)"
    yield _claim(sentence, by_seed("flow", max, "drift"), at_most(1e-6), "identity", "flow")
    sentence = "Flow of the layers and flow of w alone, by multiplicative steps, are one (relative distance)"
    yield _claim(sentence, by_seed("flow", max, "apart"), at_most(1e-6), "identity", "flow")
    sentence = "No other exponent of 2, 1, 2/3, 1/2 is conserved (least relative drift)"
    yield _claim(sentence, by_seed("flow", min, "wrong"), at_least(1e-2), control, "flow")
    sentence = "From unbalanced layers Σ|w_i|^(2/L) drifts (relative)"
    yield _claim(sentence, by_seed("unbalanced", min, "drift"), at_least(1e-2), control, "unbalanced")
    sentence = "Each layer keeps its norm all the same (relative drift of ‖u_l‖²)"
    yield _claim(sentence, by_seed("unbalanced", max, "layers"), at_most(1e-6), "identity", "unbalanced")
    for loss in ("square loss", "difference loss"):
        sentence = f"With the {loss}, which depends on the scale of w, Σ|w_i|^(2/L) drifts (relative)"
        yield _claim(sentence, by_seed(loss, min, "drift"), at_least(0.1), control, loss)
    sentence = "Gradient descent grows the norms by exactly η²‖∇‖² a step (relative error)"
    yield _claim(sentence, by_seed("gradient descent", max, "step"), at_most(1e-12), "identity", "gradient descent")
    sentence = "Over a fixed time this drift is as the rate (exponent)"
    slope = by_seed("gradient descent", _farthest, "slope")
    yield _claim(sentence, slope, within(0.9, 1.1), "scaling", "gradient descent")
    sentence = "At nine tenths of the orthant's best ratio, L = 2 is sparser than L = 1 (ratio of (‖w‖₁/‖w‖₂)²)"
    sparser = by_seed("end", lambda depth, v: v[depth == 2][0] / v[depth == 1][0], "L", "spread")
    yield _claim(sentence, sparser, at_most(0.8), "comparison", "end", False)
    sentence = "The flow of L ≥ 2 layers ends at the best ratio of its orthant (J over it)"
    yield _claim(sentence, _deep(_farthest, "best"), within(0.995, 1.005), "comparison", "end", False)
    sentence = "And below that of all directions (J over it)"
    yield _claim(sentence, _deep(max, "free"), at_most(0.95), "comparison", "end", False)


CLAIMS = tuple(_claims())
DEPTHS = tuple(f"L = {depth}" for depth in (1, 2, 3, 4, 6))
CHARTS = (
    Chart(
        "exponents",
        "Σ|w|^p along the flow of three layers",
        "time",
        "ratio",
        tuple(f"L = 3, p = {p}" for p in ("2/3", "2", "1", "1/2")),
        "time",
        "Σ|w|^p over its start",
        part=PART,
        caption="Three layers conserve p = 2/3 and nothing else.",
    ),
    Chart(
        "unbalanced",
        "What stays of two layers",
        "time",
        "ratio",
        tuple(
            f"L = 2, {name}"
            for name in ("p = 1", "unbalanced: ‖u_1‖²", "unbalanced: Σ|w|^(2/L)", "square loss: Σ|w|^(2/L)")
        ),
        "time",
        "over its start",
        part=PART,
        caption="Balanced layers keep Σ|w|, on which the norm of an unbalanced layer lies; a loss that depends on the"
        " scale of w keeps nothing.",
    ),
    Chart(
        "rates",
        "Drift under gradient descent",
        "rate",
        "drift",
        DEPTHS,
        "learning rate η",
        "relative drift of Σ|w|^(2/L) to time 5",
        log_x=True,
        log_y=True,
        part=PART,
        caption="Ten times the rate, ten times the drift.",
    ),
    Chart(
        "ends",
        "The ratio along the flow",
        "time",
        "share",
        DEPTHS,
        "time",
        "J over the best of the orthant",
        log_x=True,
        lines=((1.0, "best of the orthant"),),
        part=PART,
        caption="One layer may change signs and goes on to the best of all directions; deeper networks cannot.",
    ),
    Chart(
        "weights",
        "Weights at nine tenths of the best ratio of the orthant",
        "coordinate",
        "weight",
        DEPTHS,
        "coordinate",
        "w / ‖w‖",
        markers=True,
        lines=((0.0, ""),),
        part=PART,
        caption="The means of the classes differ in four coordinates.  Deeper nets spread less over the others.",
    ),
)
