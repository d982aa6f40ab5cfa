"""Gradient descent on shallow networks is stable, and early stopping makes it consistent.

One example more or less moves what gradient descent finds only a little: the loss of a wide network is nearly convex
along the path, since its least Hessian eigenvalue is at least -O(m^(-1/2)) for m units, and that makes the training
stable, bounds the gap between population and training loss, and with early stopping the excess risk.  Here networks are
trained beside copies in which one example was replaced, over numbers of examples n and times, and the least eigenvalue
is compared with its bound over widths.  Far past the best time near-convexity is used up: there stability must fall off
slower with n, and few examples must have lost what they had gained.

    λ_min(∇²L) ≥ -(B/√m) mean|r| ≥ -(B/√m) √(2L),   B = max|tanh''|        ‖W_t - W_0‖² ≤ 2ηt L(W_0)
    E gap = E (1/n) Σ_i [ℓ(W^(i); z_i) - ℓ(W; z_i)]                         W^(i): trained with z_i replaced
    E gap ≤ √(2ρ L ε²) + ρε²/2,   ε² = (1/n) Σ_i E ‖W - W^(i)‖²,   ρ = 1 + B|r|/√m
"""

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import InvalidValue
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under
from .._framework.config import demand_positive, seeds
from .._framework.fits import exponent
from .._framework.observe import Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.streams import stream
from .shallow import MAX_BEND, derivatives_mismatch, slope, start
from .sphere_data import (
    FRESH,
    INPUTS,
    RATE,
    REPLACED,
    TIMES,
    WIDTH,
    draw,
    excess_risks,
    hessians_along_training,
    on_single_examples,
    replace_examples,
)

PAPER = (
    "Lei, Jin & Ying, Stability and Generalization Analysis of Gradient Methods for Shallow Neural Networks"
    " (arXiv 2209.09298)"
)
PART = "Stability and early stopping"
WIDTHS = SIZES = (16, 32, 64, 128, 256)
RUNS = tuple(f"ηt = {RATE * t:g}" for t in TIMES)
EARLY = tuple(f"ηt = {RATE * t:g}" for t in TIMES if RATE * t <= 150)


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

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
    found = []
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        for n in config.sizes:
            found.append(Job(f"stability, n = {n}, seed {seed}", _stability, {"n": n, **common}, cost=3.0))
        for n in config.sizes:
            found.append(Job(f"stopping, n = {n}, seed {seed}", _stopping, {"n": n, **common}, cost=0.6))
        for m in config.widths:
            found.append(Job(f"eigenvalue, m = {m}, seed {seed}", _eigenvalue, {"m": m, **common}, cost=m / 60))
    return found


def _stability(log: RunLog, progress: Progress, n: int, seed: int, config: Config) -> None:
    """Means over draws at each time, and the bound on the gap that they give."""
    log.resume()
    draws = []
    num_draws = config.draws * max(2, 96 // n)  # few examples are cheap
    for number in range(num_draws):
        draws.append(replace_examples(n, stream(931, seed, n, number)))
        progress((number + 1) / num_draws)
    mean = {t: {name: float(np.mean([d[t][name] for d in draws])) for name in draws[0][t]} for t in TIMES}
    for t, row in mean.items():
        rho = 1 + MAX_BEND * max(d[t]["residual"] for d in draws) / WIDTH**0.5
        row["bound"] = (2 * rho * row["loss"] * row["stability"]) ** 0.5 + rho * row["stability"] / 2
        row["walked"] = max(d[t]["walked"] for d in draws)
        row["over"] = row["gap"] / row["bound"]
        row["growth"] = row["stability"] / mean[100]["stability"]
        log.append(run=f"ηt = {RATE * t:g}", seed=seed, n=n, **row)


def _stopping(log: RunLog, progress: Progress, n: int, seed: int, config: Config) -> None:
    """Excess risk of runs side by side, each on data of its own, at each one's best time and at the last."""
    log.resume()
    generator = stream(933, seed, n)
    runs = max(256 // n, 1) * config.draws
    x, y = draw(n, generator, runs)
    fresh, _ = draw(FRESH, generator)
    first = torch.stack([start(WIDTH, INPUTS, generator) for _ in range(runs)])
    found = excess_risks(lambda W, t: slope(W, x, y), first, fresh)
    best, mean = found.min(0).values.mean().item(), found.mean(1)
    row = {"best": best, "late": mean[-1].item() / best, "late_of_mean": (mean[-1] / mean.min()).item()}
    if config.sgd and n == 64:
        by_sgd = excess_risks(on_single_examples(x, y, stream(934, seed)), first, fresh)
        row["sgd"] = by_sgd.min(0).values.mean().item() / best
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
        generator = stream(932, seed, m, number)
        x, y = draw(32, generator)
        W = start(m, INPUTS, generator)[None]
        for t, H, bound in hessians_along_training(W, x, y):
            least = torch.linalg.eigvalsh(H)[0].item()
            if t == 0:
                at_start.append(-least)
            log.append(run="least eigenvalue", seed=seed, m=m, over=-least / bound)
            if seed == config.seed and number == 0:
                log.append(run=f"m = {m}", shown_time=RATE * t, shown_least=least, shown_limit=-bound)
        if m == min(config.widths) and number == 0:
            log.append(run="two ways", seed=seed, apart=derivatives_mismatch(W, x, y))
    log.append(run="start", seed=seed, m=m, least=float(np.mean(at_start)))


def _early_exponents(column: str) -> Quantity:
    """Exponents of a column in the number of examples, at every ηt up to 150."""
    return joined(*(run(name).reduce(exponent, "n", column) for name in EARLY))


def _greatest(column: str) -> Quantity:
    """The greatest value of a column over all numbers of examples and all times."""
    return joined(*(run(name)[column].max() for name in RUNS)).over_repeats(np.max)


CLAIMS = under(
    PART,
    inequality(
        "The least eigenvalue keeps its bound along training (greatest of it over the bound)",
        run("least eigenvalue")["over"].max() <= 1,
    ),
    scaling(
        "The wider, the closer to convex: exponent in m of the least eigenvalue at the start",
        run("start").reduce(exponent, "m", "least").within(-0.65, -0.3),
    ),
    inequality(
        "Weights move no farther than their bound (greatest ‖W_t - W_0‖² over 2ηt L(W_0))", _greatest("walked") <= 1
    ),
    scaling(
        "Stability: exponent of ε² in the number of examples, ηt from 5 to 150",
        _early_exponents("stability").within(-2.3, -1.7),
    ),
    scaling(
        "Exponent of the gap between population and training loss, ηt from 5 to 150",
        _early_exponents("gap").within(-1.3, -0.7),
    ),
    inequality("The gap keeps the bound that stability gives (greatest of it over the bound)", _greatest("over") <= 1),
    scaling(
        "Stopped at the best time, more examples lower the excess risk (exponent in n)",
        run("best time").reduce(exponent, "n", "best") <= -0.4,
    ),
    identity(
        "Gradient and Hessian in closed form and automatic ones (relative difference)",
        run("two ways")["apart"].max() <= 1e-10,
    ),
    control(
        "Far past the best time stability falls off slower (exponent at ηt = 500 less that at 50)",
        run("ηt = 500").reduce(exponent, "n", "growth") >= 0,
    ),
    control(
        "… and with 16 examples what was gained is lost (excess risk at ηt = 500 over that at each run's best time)",
        run("best time").at(n=16)["late"] >= 1.2,
    ),
    comparison(
        "SGD on single examples does about as well with 64 (its excess risk at its best time over GD's)",
        run("SGD")["sgd"].max().within(0.5, 2),
        deciding=False,
    ),
)

LABELS = {
    "n": "examples n",
    "stability": "ε² = mean ‖W - W^(i)‖²",
    "gap": "population less training loss",
    "shown_time": "ηt",
    "shown_least": "least eigenvalue",
    "shown_risk": "excess risk",
}

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "stability",
            "Stability against examples",
            x="n",
            y="stability",
            runs=RUNS,
            log="xy",
            repeats="first",
            caption="How far one example moves what is found: as 1/n², until near-convexity is used up.",
        ),
        Chart(
            "gap",
            "Generalization gap against examples",
            x="n",
            y="gap",
            runs=RUNS,
            log="xy",
            repeats="first",
            caption="By replacing examples, which tells it from noise: as 1/n.",
        ),
        Chart(
            "risk",
            "Excess risk along training",
            x="shown_time",
            y="shown_risk",
            runs=tuple(f"n = {n}" for n in SIZES),
            log="xy",
            caption="With few examples one has to stop early.",
        ),
        Chart(
            "least",
            "Nearly convex",
            x="shown_time",
            y="shown_least",
            runs=tuple(f"m = {m}" for m in (16, 64, 256)),
            beside=(("shown_limit", "bound"),),
            caption="The least eigenvalue of the Hessian of one network for each width, and its bound.",
        ),
    ),
)
