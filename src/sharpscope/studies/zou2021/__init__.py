"""The average of SGD on linear regression overfits benignly when the spectrum falls.

With a constant step and every example used once, the excess risk of the averaged weights is bounded, above and below,
by an effective dimension made of all eigenvalues, and not by the number of weights.  For Gaussian inputs a recursion
gives the expected risk to rounding, and runs of SGD confirm it: the risk stays below the bound and falls as it does.
Minimum-norm least squares on the same examples does not improve where SGD does.  The controls are flat spectra, also
with a dimension that grows with N: there the effective dimension does not fall, and neither may the variance.

H = E xxᵀ with eigenvalues λ, step γ, noise variance σ², N steps, Δ = w_0 - w*, q = 1 - γλ, a = E (w - w*)²:

    a ← a(1 - 2γλ + 2γ²λ²) + γ²λ Σλa + γ²σ²λ
    E ½‖w̄ - w*‖²_H = Σ λ (A + 2C) / 2N²        A ← A + a,  C ← q(C + A)
    D = k/N + Nγ² Σ_{i>k} λ²                    k eigenvalues are at least 1/γN
    excess ≤ 2 (EB + EV)
    EB = Σ_{i≤k} Δ²/λ /(γN)² + Σ_{i>k} λΔ²
    EV = (σ² + 6 (Σ_{i≤k} Δ² + Nγ Σ_{i>k} λΔ²)/Nγ) / (1 - 3γ tr H) · D
"""

from dataclasses import dataclass, replace

import numpy as np

from ...errors import InvalidValue
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import Claim, comparison, control, identity, inequality, labelled, scaling, under
from .._framework.config import demand_positive, seeds
from .._framework.fits import exponent
from .._framework.observe import run
from .._framework.study import Job, Progress
from .linear_sgd import (
    SPECTRA,
    LinearRegression,
    effective_dimension,
    expected_risks,
    expected_tail_risk,
    half_bound,
    least_squares_and_ridge,
    sampled_risks,
)

PAPER = (
    "Zou, Wu, Braverman, Gu & Kakade, Benign Overfitting of Constant-Stepsize SGD for Linear Regression"
    " (COLT 2021, arXiv 2103.12692)"
)
PART = "Excess risk of averaged SGD"
*FALLING, FLAT = SPECTRA
STEEP, GROWING, HALF = "1/i²", "flat, N/4 dimensions", "average of the second half"
OLD_COLUMNS = {"drawn": "excess"}


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    seed: int = 0
    repeats: int = 3
    spectra: tuple[str, ...] = tuple(SPECTRA)
    sizes: tuple[int, ...] = (50, 100, 200, 400, 800, 1600, 3200)  # N
    dimension: int = 2000
    step: float = 0.25
    noise: float = 0.5  # σ
    replicas: int = 2000  # of SGD, in `small` dimensions up to N = 200
    small: int = 200
    shown: int = 20  # replicas of SGD in all dimensions, for the charts
    examples: int = 1600  # drawn at each N in samples of N, for least squares and ridge

    def __post_init__(self) -> None:
        for unknown in set(self.spectra) - set(SPECTRA):
            raise InvalidValue(f"spectra has '{unknown}'; known: {', '.join(SPECTRA)}")
        demand_positive(self, "spectra")
        if not self.step < 1 / 3:
            raise InvalidValue(f"step is {self.step}; the bound needs 3·step·tr H below one, and tr H is 1")


QUICK = Config(repeats=1, spectra=("1/(i log²)", STEEP, FLAT), sizes=(50, 100, 200, 400), replicas=500)


def jobs(config: Config) -> list[Job]:
    found = [Job(GROWING, _grow, {"config": config}, cost=max(config.sizes) / 2000)]
    for spectrum in config.spectra:
        common = {"spectrum": spectrum, "config": config}
        found.append(Job(f"{spectrum}: exact", _exact, common, cost=max(config.sizes) / 4000))
        for seed in seeds(config):
            own = {"seed": seed, **common}
            found.append(Job(f"{spectrum}: other estimators, seed {seed}", _others, own))
            found.append(Job(f"{spectrum}: SGD, seed {seed}", _sample, own, cost=config.replicas / 500))
    return found


def _exact(log: RunLog, progress: Progress, spectrum: str, config: Config) -> None:
    """Exact risk, its bias and variance, the bound, and the average over the second half: nothing is drawn."""
    log.resume()
    p = LinearRegression.of(spectrum, config.dimension, config.noise, config.step)
    biases = expected_risks(replace(p, noise=0.0), config.sizes)
    variances = expected_risks(replace(p, start=0 * p.start), config.sizes)
    for n, bias, variance in zip(sorted(config.sizes), biases, variances, strict=True):
        excess, half, tail = bias + variance, half_bound(p, n), expected_tail_risk(p, n)
        row = {
            "excess": excess,
            "bias": bias,
            "variance": variance,
            "share": variance / (p.noise**2 * effective_dimension(p, n) / 2),
        }
        own = {"seed": config.seed, "N": n}
        log.append(run=f"{spectrum}: exact", **row, **own)
        log.append(run=f"{spectrum}: bound", excess=2 * half, slack=half / excess, **own)
        log.append(run=f"{spectrum}: {HALF}", excess=tail, over_exact=tail / excess, **own)


def _others(log: RunLog, progress: Progress, spectrum: str, seed: int, config: Config) -> None:
    """Minimum-norm least squares and ridge, its penalty chosen by the excess risk itself."""
    log.resume()
    p = LinearRegression.of(spectrum, config.dimension, config.noise, config.step)
    rng = np.random.default_rng([101, seed, list(SPECTRA).index(spectrum)])
    sizes = [n for n in sorted(config.sizes) if 2 * n <= config.dimension]  # beyond, the cut of the spectrum shows
    for done, (n, sgd) in enumerate(zip(sizes, expected_risks(p, sizes), strict=True)):
        least_squares, ridge = least_squares_and_ridge(p, n, max(config.examples // n, 1), rng)
        own = {"seed": seed, "N": n}
        log.append(run=f"{spectrum}: least squares", excess=least_squares, **own)
        log.append(run=f"{spectrum}: ridge", excess=ridge, behind=sgd / ridge, **own)
        progress((done + 1) / len(sizes))


def _sample(log: RunLog, progress: Progress, spectrum: str, seed: int, config: Config) -> None:
    """SGD itself: many replicas in few dimensions against the recursion, few in all dimensions for the charts."""
    log.resume()
    rng = np.random.default_rng([102, seed, list(SPECTRA).index(spectrum)])
    sizes = [n for n in sorted(config.sizes) if n <= 200] or [min(config.sizes)]
    p = LinearRegression.of(spectrum, config.small, config.noise, config.step)
    risks = sampled_risks(p, sizes, config.replicas, rng)
    for n, risk, exact in zip(sizes, risks, expected_risks(p, sizes), strict=True):
        mean, error = float(risk.mean()), float(risk.std(ddof=1)) / len(risk) ** 0.5
        row = {"N": n, "mean": mean, "exact": exact, "off": abs(mean - exact) / error}
        log.append(run=f"{spectrum}: SGD against the recursion", seed=seed, **row)
    progress(0.7)
    if seed == config.seed:
        sizes = [n for n in sorted(config.sizes) if n <= 800] or sizes
        p = LinearRegression.of(spectrum, config.dimension, config.noise, config.step)
        for n, risk in zip(sizes, sampled_risks(p, sizes, config.shown, rng), strict=True):
            log.append(run=f"{spectrum}: SGD", seed=seed, N=n, excess=float(risk.mean()))


def _grow(log: RunLog, progress: Progress, config: Config) -> None:
    """The variance on a flat spectrum of N/4 dimensions."""
    log.resume()
    for n in sorted(config.sizes):
        if n % 4 == 0:
            p = LinearRegression.of(FLAT, n // 4, config.noise, config.step)
            (variance,) = expected_risks(replace(p, start=0 * p.start), [n])
            log.append(run=GROWING, seed=config.seed, N=n, variance=variance, dimension=effective_dimension(p, n))


def _about(spectrum: str) -> tuple[Claim, ...]:
    """The claims about one spectrum: those that hold for every one, and those for one that falls."""
    exact, limit, sampled = (run(f"{spectrum}: {name}") for name in ("exact", "bound", "SGD against the recursion"))
    every = (
        identity(
            f"{spectrum}: the mean of runs of SGD is the recursion's (greatest distance in standard errors)",
            sampled["off"].max() <= 4,
        ),
        inequality(
            f"{spectrum}: the bound holds at every N (greatest excess risk over bound)",
            limit["slack"].min().reduce(lambda least: 1 / (2 * least)) <= 1,
        ),
    )
    falling = (
        scaling(
            f"{spectrum}: half the bound over the excess risk (least and greatest)",
            limit["slack"].extent().within(1, 40),
        ),
        scaling(
            f"{spectrum}: the two fall alike with N (exponent of their ratio)",
            limit.reduce(exponent, "N", "slack").within(-0.15, 0.15),
        ),
        scaling(
            f"{spectrum}: the variance is that of D dimensions (over σ²D/2, least and greatest)",
            exact["share"].extent().within(0.2, 1.5),
        ),
    )
    return (*every, *falling) if spectrum in FALLING else every


SGD, LEAST_SQUARES = run(f"{STEEP}: exact"), run(f"{STEEP}: least squares")

CLAIMS = under(
    PART,
    *(claim for spectrum in SPECTRA for claim in _about(spectrum)),
    comparison("1/i²: SGD improves from N = 50 to 400 (factor)", SGD.at(N=50)["excess"] / SGD.at(N=400)["excess"] >= 5),
    comparison(
        "1/i²: least squares does not (factor)",
        LEAST_SQUARES.at(N=50)["excess"] / LEAST_SQUARES.at(N=400)["excess"] <= 1.3,
    ),
    *(
        control(f"{what} (last over first)", run(name)["variance"].last() / run(name)["variance"].first() >= 1)
        for what, name in (
            ("Flat: the variance does not fall", f"{FLAT}: exact"),
            ("Flat, N/4 dimensions: nor here", GROWING),
        )
    ),
    comparison(
        "1/i²: ridge with the best of six penalties is near at N = 400 (SGD's excess risk over ridge's)",
        run(f"{STEEP}: ridge").at(N=400)["behind"].within(0.5, 2),
        deciding=False,
    ),
    comparison(
        "1/i²: the average over the second half does better at N = 50 (its excess risk over that of the whole)",
        run(f"{STEEP}: {HALF}").at(N=50)["over_exact"] <= 1,
        deciding=False,
    ),
)


def _excess(slug: str, spectrum: str, where: str, caption: str) -> Chart:
    """Excess risk of all estimators on one spectrum."""
    return Chart(
        f"excess-{slug}",
        f"Excess risk{where}",
        x="N",
        y="excess",
        runs=tuple(f"{spectrum}: {name}" for name in ("bound", "least squares", "SGD", "exact", "ridge")),
        log="xy",
        repeats="first",
        caption=caption,
    )


CHARTS = under(
    PART,
    *labelled(
        {"N": "examples N", "excess": "excess risk", "variance": "variance"},
        _excess(
            "two",
            STEEP,
            ", eigenvalues 1/i²",
            "The exact risk of SGD falls as its bound does; minimum-norm least squares does not fall.  Ridge has the"
            " best of six penalties, chosen by the excess risk itself; SGD is the mean of a few runs.",
        ),
        _excess(
            "log",
            "1/(i log²)",
            ", eigenvalues 1/(i log²)",
            "The same where the eigenvalues fall as slowly as they can while their sum is finite.",
        ),
        _excess("three-halves", "1/i^1.5", ", eigenvalues 1/i^1.5", "The same between the two."),
        _excess("flat", FLAT, " on a flat spectrum", "Nothing can be learnt from fewer examples than dimensions."),
        Chart(
            "variance",
            "Variance of the average",
            x="N",
            y="variance",
            runs=(*(f"{spectrum}: exact" for spectrum in SPECTRA), GROWING),
            log="xy",
            caption="It falls where the eigenvalues fall; on flat spectra it grows, or stays where dimensions grow"
            " with N.",
        ),
    ),
)
