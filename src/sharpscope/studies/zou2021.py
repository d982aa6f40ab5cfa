"""The average of SGD on linear regression overfits benignly when the spectrum falls.

With a constant step and every example used once, the excess risk of the averaged weights is bounded by an effective
dimension made of all eigenvalues, and not by the number of weights; a matching lower bound says that nothing smaller
will do.  For Gaussian inputs the expected risk can be had to rounding from a recursion for the second moments, so the
bound is held against it in every cell, and the recursion against runs of SGD itself.  Minimum-norm least squares on the
same examples does not improve where SGD does.  On a flat spectrum, and with a dimension that grows with the number of
examples, the effective dimension does not fall, and neither may the variance.

H = E xxᵀ with eigenvalues λ, step γ, noise variance σ², N steps, Δ = w_0 - w*, q = 1 - γλ, a = E (w - w*)²:

    a ← a(1 - 2γλ + 2γ²λ²) + γ²λ Σλa + γ²σ²λ
    E ½‖w̄ - w*‖²_H = Σ λ (A + 2C) / 2N²        A ← A + a,  C ← q(C + A)
    D = k/N + Nγ² Σ_{i>k} λ²                    k eigenvalues are at least 1/γN
    excess ≤ 2 (EB + EV)
    EB = Σ_{i≤k} Δ²/λ /(γN)² + Σ_{i>k} λΔ²
    EV = (σ² + 6 (Σ_{i≤k} Δ² + Nγ Σ_{i>k} λΔ²)/Nγ) / (1 - 3γ tr H) · D
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..claims import Claim, Criterion, at_least, at_most, within
from ..history import Track
from ..plots import Chart
from ._stats import Observer, by_seed, over, power
from ._study import Job, Report

PAPER = (
    "Zou, Wu, Braverman, Gu & Kakade, Benign Overfitting of Constant-Stepsize SGD for Linear Regression"
    " (COLT 2021, arXiv 2103.12692)"
)
PART = "Excess risk of averaged SGD"

Array = NDArray[np.float64]
SPECTRA: dict[str, Callable[[Array], Array]] = {
    "1/(i log²)": lambda i: 1 / (i * np.log(i + 1) ** 2),
    "1/i^1.5": lambda i: i**-1.5,
    "1/i²": lambda i: i**-2.0,
    "flat": lambda i: np.ones_like(i),
}
SLUGS = dict(zip(SPECTRA, ("log", "three-halves", "two", "flat"), strict=True))
*FALLING, FLAT = SPECTRA
STEEP = "1/i²"
GROWING = "flat, N/4 dimensions"


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
        for name, value in vars(self).items():
            if name == "spectra":
                for odd in set(value) - set(SPECTRA):
                    raise ValueError(f"{name} has '{odd}'; known: {', '.join(SPECTRA)}")
            elif name != "seed" and not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} is {value}; it must be positive")
        if not self.step < 1 / 3:
            raise ValueError(f"step is {self.step}; the bound needs 3·step·tr H below one, and tr H is 1")


QUICK = Config(repeats=1, spectra=("1/(i log²)", STEEP, FLAT), sizes=(50, 100, 200, 400), replicas=500)


@dataclass(frozen=True)
class Problem:
    """``y = w*ᵀx + σξ`` with x ~ N(0, diag λ): λ ``(d,)``, Δ = w_0 - w* ``(d,)``, σ and the step γ."""

    eigenvalues: Array
    start: Array
    noise: float
    step: float

    @classmethod
    def of(cls, spectrum: str, dimension: int, config: Config) -> "Problem":
        """``tr H = 1``, ``w_0 = 0`` and ``w*_i ∝ 1/i`` with ``w*ᵀHw* = 1``."""
        i = np.arange(1, dimension + 1, dtype=float)
        eigenvalues = SPECTRA[spectrum](i)
        eigenvalues = eigenvalues / eigenvalues.sum()
        start = -1 / i / np.sqrt(eigenvalues @ i**-2)
        return cls(eigenvalues, start, config.noise, config.step)

    def risk(self, difference: Array) -> Array:
        """``½‖w - w*‖²_H`` over the last axis."""
        return np.asarray(difference**2 @ self.eigenvalues / 2)


def moments(p: Problem, a: Array, variance: float) -> Array:
    """``a(1 - 2γλ + 2γ²λ²) + γ²λ Σλa + γ²σ²λ``: second moments of w - w* after one more step."""
    g = p.step * p.eigenvalues
    return a * (1 - 2 * g + 2 * g**2) + p.step * g * (p.eigenvalues @ a + variance)


def expected(p: Problem, sizes: Iterable[int], first: Array, variance: float) -> list[float]:
    """``E ½‖w̄ - w*‖²_H`` at every N of `sizes`, from second moments `first` ``(d,)`` and the noise's variance."""
    q, a, wanted = 1 - p.step * p.eigenvalues, first, sorted(sizes)
    total, crossed = np.zeros_like(a), np.zeros_like(a)
    found = []
    for n in range(1, wanted[-1] + 1):
        crossed = q * (crossed + total)
        total = total + a
        a = moments(p, a, variance)
        if n in wanted:
            found.append(float(p.eigenvalues @ (total + 2 * crossed)) / (2 * n**2))
    return found


def effective_dimension(p: Problem, n: int) -> float:
    """``D = k/N + Nγ² Σ_{i>k} λ²``, where k eigenvalues are at least 1/γN."""
    head = p.eigenvalues >= 1 / (p.step * n)
    return float(head.sum() / n + n * p.step**2 * (p.eigenvalues[~head] ** 2).sum())


def bound(p: Problem, n: int) -> float:
    """``EB + EV``: half of what the excess risk cannot exceed."""
    head, scale, delta = p.eigenvalues >= 1 / (p.step * n), p.step * n, p.start**2
    top, tail = delta[head], (p.eigenvalues * delta)[~head].sum()
    bias = (top / p.eigenvalues[head]).sum() / scale**2 + tail
    level = p.noise**2 + 6 * (top.sum() + scale * tail) / scale
    return float(bias + level / (1 - 3 * p.step * p.eigenvalues.sum()) * effective_dimension(p, n))


def averaged(p: Problem, sizes: Sequence[int], replicas: int, rng: np.random.Generator) -> Array:
    """``½‖w̄ - w*‖²_H`` ``(sizes, replicas)`` of SGD itself, each example drawn once."""
    scale = np.sqrt(p.eigenvalues)
    v = np.tile(p.start, (replicas, 1))
    total, found = np.zeros_like(v), []
    for n in range(1, max(sizes) + 1):
        total += v
        x = rng.standard_normal(v.shape)
        x *= scale
        error = np.einsum("rd,rd->r", x, v) - p.noise * rng.standard_normal(replicas)
        x *= p.step * error[:, None]
        v -= x
        if n in sizes:
            found.append(p.risk(total / n))
    return np.array(found)


def least_squares(p: Problem, n: int, penalties: Sequence[float], rng: np.random.Generator) -> list[float]:
    """Excess risk of ``Xᵀ(XXᵀ + μ)⁻¹y`` for every penalty μ, on one sample of n examples; μ = 0 interpolates."""
    x = rng.standard_normal((n, len(p.eigenvalues))) * np.sqrt(p.eigenvalues)
    y = -x @ p.start + p.noise * rng.standard_normal(n)
    values, vectors = np.linalg.eigh(x @ x.T)
    turned = vectors.T @ y
    return [float(p.risk(x.T @ (vectors @ (turned / (values + m))) + p.start)) for m in penalties]


def jobs(config: Config) -> list[Job]:
    longest = max(config.sizes)
    found = [Job(GROWING, _grow, {"config": config}, longest / 2000)]
    for spectrum in config.spectra:
        common = {"spectrum": spectrum, "config": config}
        found.append(Job(f"{spectrum}: exact", _exact, common, longest / 4000))
        for seed in range(config.seed, config.seed + config.repeats):
            found.append(Job(f"{spectrum}: other estimators, seed {seed}", _others, common | {"seed": seed}, 1.0))
            found.append(Job(f"{spectrum}: SGD, seed {seed}", _sample, common | {"seed": seed}, config.replicas / 500))
    return found


def _exact(track: Track, report: Report, spectrum: str, config: Config) -> None:
    """What needs no draw: exact risk, its bias and variance, the bound, and the average over the second half."""
    track.resume()
    p = Problem.of(spectrum, config.dimension, config)
    variance, first = p.noise**2, p.start**2
    bias = expected(p, config.sizes, first, 0.0)
    spread = expected(p, config.sizes, 0 * first, variance)
    report(0.4)
    for n, b, v in zip(sorted(config.sizes), bias, spread, strict=True):
        own = {"seed": config.seed, "N": n}
        share = v / (variance * effective_dimension(p, n) / 2)
        track.append(run=f"{spectrum}: exact", excess=b + v, drawn=b + v, bias=b, variance=v, share=share, **own)
        half = bound(p, n)
        track.append(run=f"{spectrum}: bound", drawn=2 * half, slack=half / (b + v), **own)
        a = first
        for _ in range(n // 2):
            a = moments(p, a, variance)
        tail = expected(p, [n - n // 2], a, variance)[0]
        track.append(run=f"{spectrum}: average of the second half", excess=tail, over_exact=tail / (b + v), **own)


def _others(track: Track, report: Report, spectrum: str, seed: int, config: Config) -> None:
    """Minimum-norm least squares and ridge, its penalty chosen by the excess risk itself."""
    track.resume()
    p = Problem.of(spectrum, config.dimension, config)
    rng = np.random.default_rng([101, seed, list(SPECTRA).index(spectrum)])
    sizes = [n for n in sorted(config.sizes) if 2 * n <= config.dimension]  # beyond, the cut of the spectrum shows
    exact = expected(p, sizes, p.start**2, p.noise**2) if sizes else []
    for done, (n, sgd) in enumerate(zip(sizes, exact, strict=True)):
        penalties = [0.0, *(10.0**j * n for j in range(-5, 1))]
        samples = max(config.examples // n, 1)
        risks = np.array([least_squares(p, n, penalties, rng) for _ in range(samples)])
        least, best = float(risks[:, 0].mean()), float(risks[:, 1:].min(axis=1).mean())
        own, first = {"seed": seed, "N": n}, seed == config.seed  # a chart shows one repeat
        track.append(run=f"{spectrum}: least squares", excess=least, drawn=least if first else None, **own)
        track.append(run=f"{spectrum}: ridge", excess=best, drawn=best if first else None, behind=sgd / best, **own)
        report((done + 1) / len(sizes))


def _sample(track: Track, report: Report, spectrum: str, seed: int, config: Config) -> None:
    """SGD itself: many replicas in few dimensions against the recursion, few in all dimensions for the charts."""
    track.resume()
    rng = np.random.default_rng([102, seed, list(SPECTRA).index(spectrum)])
    sizes = [n for n in sorted(config.sizes) if n <= 200] or [min(config.sizes)]
    p = Problem.of(spectrum, config.small, config)
    risks = averaged(p, sizes, config.replicas, rng)
    for n, risk, exact in zip(sizes, risks, expected(p, sizes, p.start**2, p.noise**2), strict=True):
        error = risk.std(ddof=1) / np.sqrt(len(risk))
        row = {"N": n, "mean": float(risk.mean()), "exact": exact, "off": float(abs(risk.mean() - exact) / error)}
        track.append(run=f"{spectrum}: SGD against the recursion", seed=seed, **row)
    report(0.7)
    if seed == config.seed:
        sizes = [n for n in sorted(config.sizes) if n <= 800] or sizes
        p = Problem.of(spectrum, config.dimension, config)
        for n, risk in zip(sizes, averaged(p, sizes, config.shown, rng), strict=True):
            track.append(run=f"{spectrum}: SGD", seed=seed, N=n, drawn=float(risk.mean()))


def _grow(track: Track, report: Report, config: Config) -> None:
    """The variance on a flat spectrum of N/4 dimensions."""
    track.resume()
    for n in (n for n in sorted(config.sizes) if n % 4 == 0):
        p = Problem.of(FLAT, n // 4, config)
        v = expected(p, [n], 0 * p.start, p.noise**2)[0]
        track.append(run=GROWING, seed=config.seed, N=n, variance=v, dimension=effective_dimension(p, n))


def _at(size: int, run: str, column: str = "excess") -> Observer:
    """What a run has at one N."""
    return by_seed(run, lambda n, v: v[n == size][0], "N", column)


def _fall(run: str) -> Observer:
    """The excess at N = 50 over that at N = 400."""
    return over(_at(50, run), _at(400, run))


def _growth(run: str) -> Observer:
    """The variance at the largest N over that at the smallest."""
    return by_seed(run, lambda v: v[-1] / v[0], "variance")


def _range(run: str, column: str) -> Observer:
    """The least and the greatest over all N."""
    return lambda h, config: (float(h.series(run, column).min()), float(h.series(run, column).max()))


def _claim(sentence: str, observe: Observer, criterion: Criterion, kind: str, run: str, deciding: bool = True) -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, (run,), deciding)


def _claims(spectrum: str) -> Iterator[Claim]:
    exact, limit, runs = (f"{spectrum}: {name}" for name in ("exact", "bound", "SGD against the recursion"))
    sentence = f"{spectrum}: the mean of runs of SGD is the recursion's (greatest distance in standard errors)"
    yield _claim(sentence, by_seed(runs, max, "off"), at_most(4), "identity", runs)
    sentence = f"{spectrum}: the bound holds at every N (greatest excess risk over bound)"
    yield _claim(sentence, by_seed(limit, lambda v: 1 / (2 * v.min()), "slack"), at_most(1), "inequality", limit)
    if spectrum in FALLING:
        sentence = f"{spectrum}: half the bound over the excess risk (least and greatest)"
        yield _claim(sentence, _range(limit, "slack"), within(1, 40), "scaling", limit)
        slope = by_seed(limit, lambda n, slack: power(n, slack).slope, "N", "slack")
        sentence = f"{spectrum}: the two fall alike with N (exponent of their ratio)"
        yield _claim(sentence, slope, within(-0.15, 0.15), "scaling", limit)
        sentence = f"{spectrum}: the variance is that of D dimensions (over σ²D/2, least and greatest)"
        yield _claim(sentence, _range(exact, "share"), within(0.2, 1.5), "scaling", exact)


FLAT_RUN, (STEEP_RUN, LEAST, RIDGE, HALF) = (
    f"{FLAT}: exact",
    (f"{STEEP}: {name}" for name in ("exact", "least squares", "ridge", "average of the second half")),
)
CONTROL = "negative control"
CLAIMS = (
    *(claim for spectrum in SPECTRA for claim in _claims(spectrum)),
    _claim("1/i²: SGD improves from N = 50 to 400 (factor)", _fall(STEEP_RUN), at_least(5), "comparison", STEEP_RUN),
    _claim("1/i²: least squares does not (factor)", _fall(LEAST), at_most(1.3), "comparison", LEAST),
    _claim("Flat: the variance does not fall (last over first)", _growth(FLAT_RUN), at_least(1), CONTROL, FLAT_RUN),
    _claim("Flat, N/4 dimensions: nor here (last over first)", _growth(GROWING), at_least(1), CONTROL, GROWING),
    _claim(
        "1/i²: ridge with the best of six penalties is near at N = 400 (SGD's excess risk over ridge's)",
        _at(400, RIDGE, "behind"),
        within(0.5, 2),
        "comparison",
        RIDGE,
        False,
    ),
    _claim(
        "1/i²: the average over the second half does better at N = 50 (its excess risk over that of the whole)",
        _at(50, HALF, "over_exact"),
        at_most(1),
        "comparison",
        HALF,
        False,
    ),
)


def _chart(spectrum: str, caption: str) -> Chart:
    runs = tuple(f"{spectrum}: {name}" for name in ("exact", "SGD", "bound", "least squares", "ridge"))
    slug, title = (
        f"excess-{SLUGS[spectrum]}",
        "Excess risk" + (f", eigenvalues {spectrum}" if spectrum in FALLING else " on a flat spectrum"),
    )
    axes = ("examples N", "excess risk")
    return Chart(slug, title, "N", "drawn", runs, *axes, log_x=True, log_y=True, part=PART, caption=caption)


CHARTS = (
    _chart(
        STEEP,
        "The exact risk of SGD falls as its bound does; minimum-norm least squares does not fall.  Ridge has the best"
        " of six penalties, chosen by the excess risk itself; SGD is the mean of a few runs.",
    ),
    _chart("1/(i log²)", "The same where the eigenvalues fall as slowly as they can while their sum is finite."),
    _chart("1/i^1.5", "The same between the two."),
    _chart(FLAT, "Nothing can be learnt from fewer examples than dimensions."),
    Chart(
        "variance",
        "Variance of the average",
        "N",
        "variance",
        (*(f"{spectrum}: exact" for spectrum in SPECTRA), GROWING),
        "examples N",
        "variance",
        log_x=True,
        log_y=True,
        part=PART,
        caption="It falls where the eigenvalues fall; on flat spectra it grows, or stays where dimensions grow with N.",
    ),
)
