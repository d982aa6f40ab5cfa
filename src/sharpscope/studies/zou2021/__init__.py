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

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...errors import InvalidValue
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claiming import charting, claiming
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import power
from .._framework.observe_old import Observer, by_seed, over
from .._framework.study import Job, Progress
from .linear_sgd import SPECTRA, Problem, averaged, bound, effective_dimension, expected, expected_tail, peers

PAPER = (
    "Zou, Wu, Braverman, Gu & Kakade, Benign Overfitting of Constant-Stepsize SGD for Linear Regression"
    " (COLT 2021, arXiv 2103.12692)"
)
PART, CONTROL = "Excess risk of averaged SGD", "negative control"
*FALLING, FLAT = SPECTRA
STEEP, GROWING, HALF = "1/i²", "flat, N/4 dimensions", "average of the second half"


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

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
        for odd in set(self.spectra) - set(SPECTRA):
            raise InvalidValue(f"spectra has '{odd}'; known: {', '.join(SPECTRA)}")
        demand_positive(self, "spectra")
        if not self.step < 1 / 3:
            raise InvalidValue(f"step is {self.step}; the bound needs 3·step·tr H below one, and tr H is 1")


QUICK = Config(repeats=1, spectra=("1/(i log²)", STEEP, FLAT), sizes=(50, 100, 200, 400), replicas=500)


def jobs(config: Config) -> list[Job]:
    found = [Job(GROWING, _grow, {"config": config}, max(config.sizes) / 2000)]
    for spectrum in config.spectra:
        common = {"spectrum": spectrum, "config": config}
        found.append(Job(f"{spectrum}: exact", _exact, common, max(config.sizes) / 4000))
        for seed in range(config.seed, config.seed + config.repeats):
            found.append(Job(f"{spectrum}: other estimators, seed {seed}", _others, common | {"seed": seed}, 1.0))
            found.append(Job(f"{spectrum}: SGD, seed {seed}", _sample, common | {"seed": seed}, config.replicas / 500))
    return found


def _exact(log: RunLog, progress: Progress, spectrum: str, config: Config) -> None:
    """What needs no draw: exact risk, its bias and variance, the bound, and the average over the second half."""
    log.resume()
    p = Problem.of(spectrum, config.dimension, config.noise, config.step)
    bias, variance = (expected(q, config.sizes) for q in (replace(p, noise=0.0), replace(p, start=0 * p.start)))
    for n, b, v in zip(sorted(config.sizes), bias, variance, strict=True):
        own, half, tail = {"seed": config.seed, "N": n}, bound(p, n), expected_tail(p, n)
        share = v / (p.noise**2 * effective_dimension(p, n) / 2)
        log.append(run=f"{spectrum}: exact", excess=b + v, drawn=b + v, bias=b, variance=v, share=share, **own)
        log.append(run=f"{spectrum}: bound", drawn=2 * half, slack=half / (b + v), **own)
        log.append(run=f"{spectrum}: {HALF}", excess=tail, over_exact=tail / (b + v), **own)


def _others(log: RunLog, progress: Progress, spectrum: str, seed: int, config: Config) -> None:
    """Minimum-norm least squares and ridge, its penalty chosen by the excess risk itself."""
    log.resume()
    p = Problem.of(spectrum, config.dimension, config.noise, config.step)
    rng = np.random.default_rng([101, seed, list(SPECTRA).index(spectrum)])
    sizes = [n for n in sorted(config.sizes) if 2 * n <= config.dimension]  # beyond, the cut of the spectrum shows
    for done, (n, sgd) in enumerate(zip(sizes, expected(p, sizes), strict=True)):
        least, best = peers(p, n, max(config.examples // n, 1), rng)
        own, first = {"seed": seed, "N": n}, seed == config.seed  # a chart shows one repeat
        log.append(run=f"{spectrum}: least squares", excess=least, drawn=least if first else None, **own)
        log.append(run=f"{spectrum}: ridge", excess=best, drawn=best if first else None, behind=sgd / best, **own)
        progress((done + 1) / len(sizes))


def _sample(log: RunLog, progress: Progress, spectrum: str, seed: int, config: Config) -> None:
    """SGD itself: many replicas in few dimensions against the recursion, few in all dimensions for the charts."""
    log.resume()
    rng = np.random.default_rng([102, seed, list(SPECTRA).index(spectrum)])
    sizes = [n for n in sorted(config.sizes) if n <= 200] or [min(config.sizes)]
    p = Problem.of(spectrum, config.small, config.noise, config.step)
    for n, risk, exact in zip(sizes, averaged(p, sizes, config.replicas, rng), expected(p, sizes), strict=True):
        mean, error = float(risk.mean()), float(risk.std(ddof=1)) / len(risk) ** 0.5
        row = {"N": n, "mean": mean, "exact": exact, "off": abs(mean - exact) / error}
        log.append(run=f"{spectrum}: SGD against the recursion", seed=seed, **row)
    progress(0.7)
    if seed == config.seed:
        sizes = [n for n in sorted(config.sizes) if n <= 800] or sizes
        p = Problem.of(spectrum, config.dimension, config.noise, config.step)
        for n, risk in zip(sizes, averaged(p, sizes, config.shown, rng), strict=True):
            log.append(run=f"{spectrum}: SGD", seed=seed, N=n, drawn=float(risk.mean()))


def _grow(log: RunLog, progress: Progress, config: Config) -> None:
    """The variance on a flat spectrum of N/4 dimensions."""
    log.resume()
    for n in (n for n in sorted(config.sizes) if n % 4 == 0):
        p = Problem.of(FLAT, n // 4, config.noise, config.step)
        (variance,) = expected(replace(p, start=0 * p.start), [n])
        log.append(run=GROWING, seed=config.seed, N=n, variance=variance, dimension=effective_dimension(p, n))


def _at(size: int, run: str, column: str = "excess") -> Observer:
    """What a run has at one N."""
    return by_seed(run, lambda n, v: v[n == size][0], "N", column)


def _range(run: str, column: str) -> Observer:
    """The least and the greatest over all N."""
    return lambda h, config: (float(h.series(run, column).min()), float(h.series(run, column).max()))


def _claims() -> Iterator[Claim]:
    claim = claiming(PART)
    for spectrum in SPECTRA:
        exact, limit, runs = (f"{spectrum}: {name}" for name in ("exact", "bound", "SGD against the recursion"))
        sentence = f"{spectrum}: the mean of runs of SGD is the recursion's (greatest distance in standard errors)"
        yield claim(sentence, by_seed(runs, max, "off"), at_most(4), "identity", runs)
        sentence = f"{spectrum}: the bound holds at every N (greatest excess risk over bound)"
        yield claim(sentence, by_seed(limit, lambda v: 1 / (2 * v.min()), "slack"), at_most(1), "inequality", limit)
        if spectrum in FALLING:
            sentence = f"{spectrum}: half the bound over the excess risk (least and greatest)"
            yield claim(sentence, _range(limit, "slack"), within(1, 40), "scaling", limit)
            sentence = f"{spectrum}: the two fall alike with N (exponent of their ratio)"
            slope = by_seed(limit, lambda n, slack: power(n, slack).slope, "N", "slack")
            yield claim(sentence, slope, within(-0.15, 0.15), "scaling", limit)
            sentence = f"{spectrum}: the variance is that of D dimensions (over σ²D/2, least and greatest)"
            yield claim(sentence, _range(exact, "share"), within(0.2, 1.5), "scaling", exact)
    sgd, least, ridge, half = (f"{STEEP}: {name}" for name in ("exact", "least squares", "ridge", HALF))
    sentence = "1/i²: SGD improves from N = 50 to 400 (factor)"
    yield claim(sentence, over(_at(50, sgd), _at(400, sgd)), at_least(5), "comparison", sgd)
    sentence = "1/i²: least squares does not (factor)"
    yield claim(sentence, over(_at(50, least), _at(400, least)), at_most(1.3), "comparison", least)
    flat = f"{FLAT}: exact"
    for what, run in (("Flat: the variance does not fall", flat), ("Flat, N/4 dimensions: nor here", GROWING)):
        growth = by_seed(run, lambda v: v[-1] / v[0], "variance")
        yield claim(f"{what} (last over first)", growth, at_least(1), CONTROL, run)
    sentence = "1/i²: ridge with the best of six penalties is near at N = 400 (SGD's excess risk over ridge's)"
    yield claim(sentence, _at(400, ridge, "behind"), within(0.5, 2), "comparison", ridge, aside=True)
    sentence = "1/i²: the average over the second half does better at N = 50 (its excess risk over that of the whole)"
    yield claim(sentence, _at(50, half, "over_exact"), at_most(1), "comparison", half, aside=True)


CLAIMS = tuple(_claims())

CAPTIONS = {
    "excess-two": "The exact risk of SGD falls as its bound does; minimum-norm least squares does not fall.  Ridge has"
    " the best of six penalties, chosen by the excess risk itself; SGD is the mean of a few runs.",
    "excess-log": "The same where the eigenvalues fall as slowly as they can while their sum is finite.",
    "excess-three-halves": "The same between the two.",
    "excess-flat": "Nothing can be learnt from fewer examples than dimensions.",
    "variance": "It falls where the eigenvalues fall; on flat spectra it grows, or stays where dimensions grow with N.",
}
chart = charting(PART, {"N": "examples N", "drawn": "excess risk", "variance": "variance"}, CAPTIONS)


def _excess(slug: str, spectrum: str, what: str) -> Chart:
    runs = tuple(f"{spectrum}: {name}" for name in ("bound", "least squares", "SGD", "exact", "ridge"))
    return chart(f"excess-{slug}", f"Excess risk{what}", "N", "drawn", runs, log="xy")


EXACT = (*(f"{spectrum}: exact" for spectrum in SPECTRA), GROWING)

CHARTS = (
    _excess("two", STEEP, ", eigenvalues 1/i²"),
    _excess("log", "1/(i log²)", ", eigenvalues 1/(i log²)"),
    _excess("three-halves", "1/i^1.5", ", eigenvalues 1/i^1.5"),
    _excess("flat", FLAT, " on a flat spectrum"),
    chart("variance", "Variance of the average", "N", "variance", EXACT, log="xy"),
)
