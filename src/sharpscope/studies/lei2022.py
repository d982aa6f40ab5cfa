"""Gradient descent on shallow networks is stable, and early stopping makes it consistent.

One example more or less moves what gradient descent finds only a little: the loss of a wide network is nearly convex
along the path, since its least Hessian eigenvalue is at least -O(m^(-1/2)) for m units, and that makes the training
stable, bounds the gap between population and training loss, and with early stopping the excess risk.  Here networks are
trained beside copies in which one example was replaced, over numbers of examples n and times, and the least eigenvalue
is held against its bound over widths.  Far past the best time near-convexity is used up: there stability must fall off
slower with n, and few examples must have lost what they had gained.

    λ_min(∇²L) ≥ -(B/√m) mean|r| ≥ -(B/√m) √(2L),   B = max|tanh''|        ‖W_t - W_0‖² ≤ 2ηt L(W_0)
    E gap = E (1/n) Σ_i [ℓ(W^(i); z_i) - ℓ(W; z_i)]                         W^(i): trained with z_i replaced
    E gap ≤ √(2ρ L ε²) + ρε²/2,   ε² = (1/n) Σ_i E ‖W - W^(i)‖²,   ρ = 1 + B|r|/√m
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..claims import Claim, at_least, at_most, within
from ..history import Track
from ..replicas import Replicas, Slope, descend
from ..rules import GD
from ._deep import hash_of
from ._fields import demand_positive
from ._page import charting, claiming
from ._shallow import BEND, hessian, output, slope, start
from ._stats import Observer, by_seed, last, less, over, power, together, worst
from ._study import Job, Report

PAPER = (
    "Lei, Jin & Ying, Stability and Generalization Analysis of Gradient Methods for Shallow Neural Networks"
    " (arXiv 2209.09298)"
)
PART = "Stability and early stopping"
RATE, INPUTS, WIDTH, NOISE = 0.5, 5, 64, 0.3
TIMES = (10, 30, 100, 300, 1000)
WIDTHS = SIZES = (16, 32, 64, 128, 256)
REPLACED, FRESH = 16, 4000


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 1
    draws: int = 5  # data sets and starts that expectations are taken over
    sizes: tuple[int, ...] = SIZES  # n, each at least 16
    widths: tuple[int, ...] = WIDTHS  # m of the eigenvalue bound
    sgd: bool = True  # also SGD on one example a step

    def __post_init__(self) -> None:
        demand_positive(self)
        if min(self.sizes) < REPLACED:
            raise ValueError(f"sizes is {self.sizes}; {REPLACED} examples are replaced one by one")
        if any(m % 2 for m in self.widths):
            raise ValueError(f"widths is {self.widths}; units come in pairs")


QUICK = Config(draws=3, sizes=(16, 32, 64, 128), sgd=False)


def jobs(config: Config) -> list[Job]:
    out = []
    for seed in range(config.seed, config.seed + config.repeats):
        own = {"seed": seed, "config": config}
        out += [Job(f"n = {n}, seed {seed}", _stability, {"n": n, **own}, n * config.draws / 40) for n in config.sizes]
        out += [Job(f"m = {m}, seed {seed}", _eigenvalue, {"m": m, **own}, m / 40) for m in config.widths]
        if config.sgd:
            out.append(Job(f"SGD, seed {seed}", _sgd, own, 3))
    return out


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n inputs on the unit sphere and ``sin 2x₁ + ½ x₂`` plus noise."""
    x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    return x, teacher(x) + NOISE * torch.randn(n, generator=generator, dtype=torch.float64)


def teacher(x: Tensor) -> Tensor:
    """``sin 2x₁ + ½ x₂``."""
    return torch.sin(2 * x[..., 0]) + 0.5 * x[..., 1]


def excess(W: Tensor, x: Tensor) -> Tensor:
    """``½ mean (f - teacher)²`` on fresh inputs ``(R,)``: the population loss less that of the noise."""
    return 0.5 * (output(W, x) - teacher(x)).square().mean(1)


def replaced(n: int, generator: torch.Generator) -> dict[int, dict[str, float]]:
    """Training beside 16 copies with one example replaced each, on one draw: what is seen at each time."""
    x, y = draw(n, generator)
    other_x, other_y = draw(REPLACED, generator)
    fresh, _ = draw(FRESH, generator)
    X, Y, own = x.repeat(REPLACED + 1, 1, 1), y.repeat(REPLACED + 1, 1), torch.arange(REPLACED)
    X[own + 1, own], Y[own + 1, own] = other_x, other_y
    first = start(WIDTH, INPUTS, generator)
    begin = slope(first[None], x, y)[0].item()
    seen: dict[int, dict[str, float]] = {}

    def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if t in TIMES:
            r = output(W, x) - y
            seen[t] = {
                "stability": (W[1:] - W[0]).square().sum(1).mean().item(),
                "gap": 0.5 * (r[own + 1, own].square() - r[0, own].square()).mean().item(),
                "loss": losses[0].item(),
                "residual": r.abs().max().item(),
                "excess": excess(W[:1], fresh).item(),
                "walked": ((W[0] - first).square().sum() / (2 * RATE * t * begin)).item(),
            }

    descend(lambda W, t: slope(W, X, Y), first.repeat(REPLACED + 1, 1), GD(RATE), max(TIMES), watch=watch)
    return seen


def _stability(track: Track, report: Report, n: int, seed: int, config: Config) -> None:
    """Means over draws at each time, and the bound on the gap that they give."""
    track.resume()
    draws = []
    many = config.draws * max(1, 64 // n)  # few examples are cheap, and scatter most
    for number in range(many):
        draws.append(replaced(n, torch.Generator().manual_seed(hash_of([931, seed, n, number]))))
        report((number + 1) / many)
    mean = {t: {name: float(np.mean([d[t][name] for d in draws])) for name in draws[0][t]} for t in TIMES}
    for t, row in mean.items():
        rho = 1 + BEND * max(d[t]["residual"] for d in draws) / WIDTH**0.5
        row["bound"] = (2 * rho * row["loss"] * row["stability"]) ** 0.5 + rho * row["stability"] / 2
        row["walked"] = max(d[t]["walked"] for d in draws)
        shown = {f"shown_{name}": row[name] for name in ("stability", "gap") if seed == config.seed}
        track.append(run=f"ηt = {RATE * t:g}", seed=seed, n=n, over=row["gap"] / row["bound"], **row, **shown)
        if seed == config.seed:
            track.append(run=f"n = {n}", shown_time=RATE * t, shown_risk=row["excess"])
    best = min(row["excess"] for row in mean.values())
    track.append(run="best time", seed=seed, n=n, best=best, late=mean[max(TIMES)]["excess"] / best)


def _eigenvalue(track: Track, report: Report, m: int, seed: int, config: Config) -> None:
    """Least eigenvalue of the Hessian over its bound along training on 32 examples, three draws or more."""
    track.resume()
    for number in range(3 * max(1, 128 // m)):
        generator = torch.Generator().manual_seed(hash_of([932, seed, m, number]))
        x, y = draw(32, generator)
        W = start(m, INPUTS, generator)[None]
        for t, H, bound in _along(W, x, y):
            least = torch.linalg.eigvalsh(H)[0].item()
            track.append(run="least eigenvalue", seed=seed, m=m, step=t, least=-least, over=-least / bound)
            if seed == config.seed and number == 0:
                track.append(run=f"m = {m}", shown_time=RATE * t, shown_least=least, shown_limit=-bound)
        if m == min(config.widths) and number == 0:
            track.append(run="two ways", seed=seed, apart=two_ways(W, x, y))


def _along(W: Tensor, x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, float]]:
    """Step, Hessian, and ``(B/√m) mean|r|`` on the way of gradient descent."""
    done = 0
    for t in (0, 10, 30, 100):
        W = descend(lambda W, t: slope(W, x, y), W, GD(RATE), t - done).weights
        done, bend = t, BEND / (W.shape[1] // INPUTS) ** 0.5
        yield t, hessian(W, x, y)[0], bend * (output(W, x) - y).abs().mean().item()


def two_ways(W: Tensor, x: Tensor, y: Tensor) -> float:
    """Gradient and Hessian in closed form against automatic ones (largest difference over the largest entry)."""
    f = Replicas(lambda W: 0.5 * (output(W, x) - y).square().mean(1))
    pairs = ((f.grad(W), slope(W, x, y)[1]), (f.hessian(W), hessian(W, x, y)))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _sgd(track: Track, report: Report, seed: int, config: Config) -> None:
    """One example a step, n = 64: least mean excess risk over the times, against gradient descent's."""
    track.resume()
    found = []
    for number in range(config.draws):
        generator = torch.Generator().manual_seed(hash_of([931, seed, 64, number]))  # the data of n = 64 above
        (x, y), _, (fresh, _) = draw(64, generator), draw(REPLACED, generator), draw(FRESH, generator)
        order = torch.randint(64, (max(TIMES),), generator=torch.Generator().manual_seed(number))
        found.append(_risks(singly(x, y, order), fresh, start(WIDTH, INPUTS, generator)))
    track.append(run="SGD", seed=seed, n=64, best=float(np.mean(found, axis=0).min()))


def singly(x: Tensor, y: Tensor, order: Tensor) -> Slope:
    """The slope on one example a step."""
    return lambda W, t: slope(W, x[order[t % len(order), None]], y[order[t % len(order), None]])


def _risks(step: Slope, fresh: Tensor, first: Tensor) -> list[float]:
    """Excess risk at the times."""
    risks: list[float] = []

    def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if t in TIMES:
            risks.append(excess(W, fresh).item())

    descend(step, first[None], GD(RATE), max(TIMES), watch=watch)
    return risks


def _power(run: str, column: str, x: str = "n") -> Observer:
    """Exponent of a column."""
    return by_seed(run, lambda a, b: power(a, b).slope, x, column)


def _early(column: str) -> Observer:
    """Its exponent in n at every ηt up to 150."""
    return together(*(_power(run, column) for run in EARLY))


def _greatest(column: str) -> Observer:
    """The greatest value over all n and times."""
    return worst(together(*(by_seed(run, max, column) for run in RUNS)))


RUNS = tuple(f"ηt = {RATE * t:g}" for t in TIMES)
EARLY = tuple(run for run, t in zip(RUNS, TIMES, strict=True) if RATE * t <= 150)


def _claims() -> Iterator[Claim]:
    claim, control = claiming(PART), "negative control"
    sentence, run = (
        "The least eigenvalue keeps its bound along training (greatest of it over the bound)",
        "least eigenvalue",
    )
    yield claim(sentence, by_seed(run, max, "over"), at_most(1), "inequality", run)
    sentence = "The wider, the closer to convex: exponent in m of the least eigenvalue at the start"
    first = by_seed(run, lambda m, t, v: power(m[t == 0], v[t == 0]).slope, "m", "step", "least")
    yield claim(sentence, first, within(-0.65, -0.3), "scaling", run)
    sentence = "Weights move no farther than their bound (greatest ‖W_t - W_0‖² over 2ηt L(W_0))"
    yield claim(sentence, _greatest("walked"), at_most(1), "inequality", *RUNS)
    sentence = "Stability: exponent of ε² in the number of examples, ηt from 5 to 150"
    yield claim(sentence, _early("stability"), within(-2.3, -1.7), "scaling", *EARLY)
    sentence = "Exponent of the gap between population and training loss, ηt from 5 to 150"
    yield claim(sentence, _early("gap"), within(-1.3, -0.7), "scaling", *EARLY)
    sentence = "The gap keeps the bound that stability gives (greatest of it over the bound)"
    yield claim(sentence, _greatest("over"), at_most(1), "inequality", *RUNS)
    sentence = "Stopped at the best time, more examples lower the excess risk (exponent in n)"
    yield claim(sentence, _power("best time", "best"), at_most(-0.4), "scaling", "best time")
    sentence = "Gradient and Hessian in closed form and automatic ones (relative difference)"
    yield claim(sentence, by_seed("two ways", max, "apart"), at_most(1e-10), "identity", "two ways")
    sentence = "Far past the best time stability falls off slower (exponent at ηt = 500 less that at 50)"
    late, early = _power("ηt = 500", "stability"), _power("ηt = 50", "stability")
    yield claim(sentence, less(late, early), at_least(0), control, "ηt = 500", "ηt = 50")
    sentence = "… and 16 examples have lost what they had gained (excess risk at ηt = 500 over its best)"
    lost = by_seed("best time", lambda n, v: v[n == 16][0], "n", "late")
    yield claim(sentence, lost, at_least(1.2), control, "best time")
    sentence = "SGD on single examples does about as well with 64 (its excess risk at its best time over GD's)"
    ours = by_seed("best time", lambda n, v: v[n == 64][0], "n", "best")
    yield claim(sentence, over(last("SGD", "best"), ours), within(0.5, 2), "comparison", "SGD", "best time", aside=True)


CLAIMS = tuple(_claims())
LABELS = {
    "n": "examples n",
    "shown_stability": "ε² = mean ‖W - W^(i)‖²",
    "shown_gap": "population less training loss",
    "shown_time": "ηt",
    "shown_least": "least eigenvalue",
    "shown_risk": "excess risk",
}
CAPTIONS = {
    "stability": "How far one example moves what is found: as 1/n², until near-convexity is used up.",
    "gap": "By replacing examples, which tells it from noise: as 1/n.",
    "least": "The least eigenvalue of the Hessian of one network for each width, and below it the bound.",
    "risk": "With few examples one has to stop early.",
}
chart = charting(PART, LABELS, CAPTIONS)
CHARTS = (
    chart("stability", "Stability against examples", "n", "shown_stability", RUNS, log="xy"),
    chart("gap", "Generalization gap against examples", "n", "shown_gap", RUNS, log="xy"),
    chart("risk", "Excess risk along training", "shown_time", "shown_risk", tuple(f"n = {n}" for n in SIZES), log="xy"),
    chart(
        "least",
        "Nearly convex",
        "shown_time",
        "shown_least",
        tuple(f"m = {m}" for m in WIDTHS),
        beside=(("shown_limit", "bound"),),
    ),
)
