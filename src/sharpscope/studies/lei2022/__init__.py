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

from ...errors import InvalidValue
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import power
from .._framework.observe_old import Observer, by_seed, together, worst
from .._framework.study import Job, Progress
from .._shared.deep import hash_of
from .shallow import BEND, slope, start, two_ways
from .sphere_data import FRESH, INPUTS, RATE, REPLACED, TIMES, WIDTH, along, draw, replaced, risks, singly

PAPER = (
    "Lei, Jin & Ying, Stability and Generalization Analysis of Gradient Methods for Shallow Neural Networks"
    " (arXiv 2209.09298)"
)
PART = "Stability and early stopping"
WIDTHS = SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 1
    draws: int = 5  # data sets and starts that expectations are taken over, at the least
    sizes: tuple[int, ...] = SIZES  # n, each at least 16
    widths: tuple[int, ...] = WIDTHS  # m of the eigenvalue bound
    sgd: bool = True  # also SGD on one example a step

    def __post_init__(self) -> None:
        demand_positive(self)
        if min(self.sizes) < REPLACED:
            raise InvalidValue(f"sizes is {self.sizes}; {REPLACED} examples are replaced one by one")
        if any(m % 2 for m in self.widths):
            raise InvalidValue(f"widths is {self.widths}; units come in pairs")


QUICK = Config(draws=3, sizes=(16, 32, 64, 128), sgd=False)


def jobs(config: Config) -> list[Job]:
    out = list[Job]()
    for seed in range(config.seed, config.seed + config.repeats):
        own = {"seed": seed, "config": config}
        for name, work, cost in (("stability", _stability, 3.0), ("stopping", _stopping, 0.6)):
            out += [Job(f"{name}, n = {n}, seed {seed}", work, {"n": n, **own}, cost) for n in config.sizes]
        out += [Job(f"eigenvalue, m = {m}, seed {seed}", _eigenvalue, {"m": m, **own}, m / 60) for m in config.widths]
    return out


def _stability(log: RunLog, progress: Progress, n: int, seed: int, config: Config) -> None:
    """Means over draws at each time, and the bound on the gap that they give."""
    log.resume()
    draws = []
    many = config.draws * max(2, 96 // n)  # few examples are cheap
    for number in range(many):
        draws.append(replaced(n, torch.Generator().manual_seed(hash_of([931, seed, n, number]))))
        progress((number + 1) / many)
    mean = {t: {name: float(np.mean([d[t][name] for d in draws])) for name in draws[0][t]} for t in TIMES}
    for t, row in mean.items():
        rho = 1 + BEND * max(d[t]["residual"] for d in draws) / WIDTH**0.5
        row["bound"] = (2 * rho * row["loss"] * row["stability"]) ** 0.5 + rho * row["stability"] / 2
        row |= {"walked": max(d[t]["walked"] for d in draws), "over": row["gap"] / row["bound"]}
        row["growth"] = row["stability"] / mean[100]["stability"]
        shown = {f"shown_{name}": row[name] for name in ("stability", "gap") if seed == config.seed}
        log.append(run=f"ηt = {RATE * t:g}", seed=seed, n=n, **row, **shown)


def _stopping(log: RunLog, progress: Progress, n: int, seed: int, config: Config) -> None:
    """Excess risk of runs side by side, each on data of its own, at each one's best time and at the last."""
    log.resume()
    generator, runs = torch.Generator().manual_seed(hash_of([933, seed, n])), max(256 // n, 1) * config.draws
    (x, y), (fresh, _) = draw(n, generator, runs), draw(FRESH, generator)
    first = torch.stack([start(WIDTH, INPUTS, generator) for _ in range(runs)])
    found = risks(lambda W, t: slope(W, x, y), first, fresh)
    best, mean = found.min(0).values.mean().item(), found.mean(1)
    row = {"best": best, "late": mean[-1].item() / best, "late_of_mean": (mean[-1] / mean.min()).item()}
    if config.sgd and n == 64:
        row["sgd"] = risks(singly(x, y, hash_of([934, seed])), first, fresh).min(0).values.mean().item() / best
        log.append(run="SGD", seed=seed, **row)
    log.append(run="best time", seed=seed, n=n, **row)
    if seed == config.seed:
        for t, risk in zip(TIMES, mean.tolist(), strict=True):
            log.append(run=f"n = {n}", shown_time=RATE * t, shown_risk=risk)
    progress(1.0)


def _eigenvalue(log: RunLog, progress: Progress, m: int, seed: int, config: Config) -> None:
    """Least eigenvalue of the Hessian over its bound along training on 32 examples, three draws or more."""
    log.resume()
    at_start: list[float] = []
    for number in range(3 * max(1, 128 // m)):
        generator = torch.Generator().manual_seed(hash_of([932, seed, m, number]))
        x, y = draw(32, generator)
        W = start(m, INPUTS, generator)[None]
        for t, H, bound in along(W, x, y):
            least = torch.linalg.eigvalsh(H)[0].item()
            at_start += [-least] if t == 0 else []
            log.append(run="least eigenvalue", seed=seed, m=m, over=-least / bound)
            if seed == config.seed and number == 0:
                log.append(run=f"m = {m}", shown_time=RATE * t, shown_least=least, shown_limit=-bound)
        if m == min(config.widths) and number == 0:
            log.append(run="two ways", seed=seed, apart=two_ways(W, x, y))
    log.append(run="start", seed=seed, m=m, least=float(np.mean(at_start)))


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
    sentence = "The least eigenvalue keeps its bound along training (greatest of it over the bound)"
    over = by_seed("least eigenvalue", max, "over")
    yield claim(sentence, over, at_most(1), "inequality", "least eigenvalue")
    sentence = "The wider, the closer to convex: exponent in m of the least eigenvalue at the start"
    yield claim(sentence, _power("start", "least", "m"), within(-0.65, -0.3), "scaling", "start")
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
    yield claim(sentence, _power("ηt = 500", "growth"), at_least(0), control, "ηt = 500")
    sentence = (
        "… and with 16 examples what was gained is lost (excess risk at ηt = 500 over that at each run's best time)"
    )
    lost = by_seed("best time", lambda n, v: v[n == 16][0], "n", "late")
    yield claim(sentence, lost, at_least(1.2), control, "best time")
    sentence = "SGD on single examples does about as well with 64 (its excess risk at its best time over GD's)"
    yield claim(sentence, by_seed("SGD", max, "sgd"), within(0.5, 2), "comparison", "SGD", aside=True)


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
    "least": "The least eigenvalue of the Hessian of one network for each width, and its bound.",
    "risk": "With few examples one has to stop early.",
}
chart, BOUND = charting(PART, LABELS, CAPTIONS), (("shown_limit", "bound"),)
OF_N, OF_M = tuple(f"n = {n}" for n in SIZES), tuple(f"m = {m}" for m in (16, 64, 256))

CHARTS = (
    chart("stability", "Stability against examples", "n", "shown_stability", RUNS, log="xy"),
    chart("gap", "Generalization gap against examples", "n", "shown_gap", RUNS, log="xy"),
    chart("risk", "Excess risk along training", "shown_time", "shown_risk", OF_N, log="xy"),
    chart("least", "Nearly convex", "shown_time", "shown_least", OF_M, beside=BOUND),
)
