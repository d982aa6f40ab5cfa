"""Weight normalization makes a wide ReLU network converge at the rate its kernel predicts.

A two-layer ReLU network whose rows are split into length g and direction v/‖v‖ converges linearly, and the scale α of v
at the start chooses which half of its kernel rules: directions if α is small, lengths if it is large.  Here the kernel
is had by autograd and by formula, the loss is held against the bound made of its least eigenvalue, and the time to
converge against α².  Descent never shortens v, so too long a step makes later ones shorter: small α stand far longer
steps than the network without normalization that starts from the same function.  At α = 4 they do not, and need more.

Rows v_k = αw_k and lengths g_k = ‖w_k‖ at the start, w_k ~ N(0, I), r the residuals, loss ½‖r‖², t steps times lr:

    Λ = V/α² + G,   V + G = kernel of the unnormalized network        at the start
    ‖r(t)‖² ≤ ‖r(0)‖² exp(-λ_min(Λ_0) t)                              while λ_min(Λ_t) ≥ ½ λ_min(Λ_0)
    ‖v_k‖² ← ‖v_k‖² + lr²‖∇_{v_k}‖²                                   at every step
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...autodiff.batched import gram
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import power
from .._framework.observe_old import Observer, by_seed, over
from .._framework.study import Job, Progress
from .weightnorm import MOST, ReluNet, apart

PAPER = (
    "Dukler, Gu & Montúfar, Optimization Theory for ReLU Neural Networks Trained with Normalization Layers"
    " (arXiv 2006.06878)"
)
PART, WN, PLAIN = "Convergence and step sizes", "normalized", "unnormalized"
TRIED, SHOWN = (0.5, 1.0, 4.0), (0.25, 1.0, 4.0)  # α of step sizes and drift, and of the curves


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 3
    width: int = 1000
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # α
    small: tuple[float, ...] = (0.125, 0.25, 0.5)  # α of the time's exponent
    widths: tuple[int, ...] = (125, 250, 500, 1000, 2000, 4000)  # m of the kernel's drift
    factors: tuple[float, ...] = (0.5, 0.9, 1.2, 2.0, 4.0, 8.0, 16.0, 32.0)  # k: steps of k·2/λ_max

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(repeats=1, widths=(125, 250, 500, 1000))


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in range(config.seed, config.seed + config.repeats):
        own, end = {"seed": seed, "config": config}, f", seed {seed}"
        found += [Job(f"convergence{end}", _converge, own, 0.5), Job(f"time{end}", _time, own, 2.0)]
        found += [Job(f"drift at m = {m}{end}", _drift, {"width": m, **own}, m / 1500) for m in config.widths]
        found += [Job(f"steps, {_named(a)}{end}", _steps, {"scale": a, **own}, 0.3) for a in (None, *TRIED)]
    return found


def _converge(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Every α, and no normalization, at 1/λ_max: kernels, the bound, and steps to 1e-4 of the first loss."""
    log.resume()
    plain = ReluNet.draw(config.width, (seed,), None)
    unnormalized = gram(plain.outputs, plain.start[None])[0]
    for done, scale in enumerate((None, *config.scales)):
        net = ReluNet.draw(config.width, (seed,), scale)
        (low, high), (V, G) = net.ends(net.start), net.parts(net.start)
        loss, end = net.followed(1 / high, 1e-4)
        time = np.arange(len(loss)) / high
        bound = np.exp(-low * time)
        row = {"steps": float(len(loss) - 1), "kept": net.ends(end)[0] / low}
        row |= {"over_bound": float((loss / bound)[1:].max()), "sum": apart(V + G, unnormalized)}
        row["autograd"] = max(apart(net.kernel(w), gram(net.outputs, w[None])[0]) for w in (net.start, end))
        log.append(run=WN if scale else PLAIN, seed=seed, scale=scale, **row)
        for t, value, most in zip(time[1:], loss[1:], bound[1:], strict=True):
            if seed == config.seed and scale in SHOWN:
                log.append(run=_named(scale), time=float(t), loss=float(value))
                log.append(run=f"{_named(scale)}, bound", time=float(t), loss=float(most))
        progress((done + 1) / (len(config.scales) + 1))


def _time(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Steps times step size to 1e-4 of the first loss, with steps a fifth as long; larger α beside the small."""
    log.resume()
    times, scales = list[float](), sorted({*config.small, *config.scales})
    for scale in scales:
        net = ReluNet.draw(config.width, (seed,), scale)
        rate = 0.2 / net.ends(net.start)[1]
        (end,) = net.swept([rate], 1e-4)
        times.append(end.steps * rate if end.converged else np.nan)
        law = times[0] * (scale / scales[0]) ** 2
        for run, time in (("small α" if scale in config.small else "larger α", times[-1]), ("∝ α²", law)):
            log.append(run=run, seed=seed, scale=scale, **_shown(seed, config, time=time))
        progress(len(times) / len(scales))


def _drift(log: RunLog, progress: Progress, width: int, seed: int, config: Config) -> None:
    """``‖Λ_end - Λ_0‖₂ / λ_max(Λ_0)`` at 1e-3 of the first loss, the mean of several networks."""
    log.resume()
    for scale in TRIED:
        drift = float(np.mean([ReluNet.draw(width, (seed, width, i), scale).drift(1e-3) for i in range(3)]))
        log.append(run=_named(scale), seed=seed, m=width, **_shown(seed, config, drift=drift))


def _steps(log: RunLog, progress: Progress, scale: float | None, seed: int, config: Config) -> None:
    """Steps to 1e-4 of the first loss at k·2/λ_max, and how ‖v‖² has grown; at k = 2, the law of its growth."""
    log.resume()
    net = ReluNet.draw(config.width, (seed,), scale)
    edge = 2 / net.ends(net.start)[1]
    for k, end in zip(config.factors, net.swept([k * edge for k in config.factors], 1e-4), strict=True):
        row = {"needed": end.steps, "growth": end.growth} if end.converged else {"needed": MOST}
        log.append(run=_named(scale), seed=seed, k=k, converged=float(end.converged), **_shown(seed, config, **row))
    if scale:
        log.append(run=_named(scale), seed=seed, lengths=net.lengthened(2 * edge, 50))


def _shown(seed: int, config: Config, **row: float) -> dict[str, float]:
    """The row, and of the first repeat what charts show of it."""
    return row | {f"shown_{name}": value for name, value in row.items() if seed == config.seed}


def _named(scale: float | None) -> str:
    return f"α = {scale:g}" if scale else PLAIN


def _reach(run: str) -> Observer:
    """The largest k with which a run converges, over that without normalization."""
    return over(*(by_seed(name, lambda k, good: k[good == 1].max(), "k", "converged") for name in (run, PLAIN)))


HALF, ONE, FOUR = map(_named, TRIED)
claim, CONTROL = claiming(PART), "negative control"


def _claims() -> Iterator[Claim]:
    sentence = "V + G at the start is the kernel of the unnormalized network (greatest relative difference)"
    yield claim(sentence, by_seed(WN, max, "sum"), at_most(1e-10), "identity", WN)
    sentence = "The kernel by autograd is V/α² + G, at the start and the end (greatest relative difference)"
    yield claim(sentence, by_seed(WN, max, "autograd"), at_most(1e-10), "identity", WN)
    sentence = "Every step, also at k = 2, adds lr²‖∇‖² to ‖v‖² (greatest relative difference)"
    yield claim(sentence, by_seed(HALF, max, "lengths"), at_most(1e-10), "identity", HALF)
    sentence = "The loss stays below exp(-λ_min(Λ_0) t) for every α (greatest loss over bound)"
    yield claim(sentence, by_seed(WN, max, "over_bound"), at_most(1), "inequality", WN)
    sentence = "λ_min of the kernel does not fall by half (end over start, the least of all α)"
    yield claim(sentence, by_seed(WN, min, "kept"), at_least(0.5), "inequality", WN)
    sentence = "Small α: the time to converge is that of V/α² (exponent of the time in α)"
    exponent = by_seed("small α", lambda scale, time: power(scale, time).slope, "scale", "time")
    yield claim(sentence, exponent, within(1.8, 2.2), "scaling", "small α")
    for run in (HALF, ONE, FOUR):
        sentence = f"{run}: the wider the network, the less its kernel moves (exponent in the width)"
        exponent = by_seed(run, lambda m, drift: power(m, drift).slope, "m", "drift")
        yield claim(sentence, exponent, at_most(-0.4), "scaling", run)
    sentence = "α = 0.5 stands longer steps (longest that converges, over that without normalization)"
    yield claim(sentence, _reach(HALF), at_least(4), "comparison", HALF, PLAIN)
    sentence = "α = 4 does not (longest step that converges, over that without normalization)"
    yield claim(sentence, _reach(FOUR), at_most(3.99), CONTROL, FOUR, PLAIN)
    sentence = "α = 4 needs more steps of 1/λ_max (over those without normalization)"
    needed, plain = by_seed(WN, lambda scale, v: v[scale == 4][0], "scale", "steps"), by_seed(PLAIN, max, "steps")
    yield claim(sentence, over(needed, plain), at_least(1.001), CONTROL, WN, PLAIN)
    sentence = "Normalization needs fewer steps of 1/λ_max at the best α (over those without)"
    yield claim(sentence, over(by_seed(WN, min, "steps"), plain), at_most(0.8), WIDER, WN, PLAIN)


CLAIMS = tuple(_claims())

LABELS = {
    "time": "flow time, steps × step size",
    "loss": "loss over its start",
    "scale": "α",
    "shown_time": "flow time to 1e-4 of the first loss",
    "k": "k, steps of k · 2/λ_max",
    "shown_needed": "steps to 1e-4 of the first loss",
    "shown_growth": "‖v‖² at the end over the start",
    "m": "width m",
    "shown_drift": "‖Λ_end - Λ_0‖ over λ_max(Λ_0)",
}

CAPTIONS = {
    "loss": "No network is slower than its bound, half the rate of its first kernel.  Steps of 1/λ_max.",
    "time": "Up to α = 1 the time grows with α²; beyond, G takes over, which does not depend on α.",
    "steps": "Beyond k = 1 a quadratic diverges.  Too long a step lengthens v and so shortens the next.",
    "growth": "Of the runs that converge.  Without normalization v is w.",
    "drift": "At 1e-3 of the first loss, the mean of six networks.",
}
CURVES = tuple(f"{_named(scale)}{what}" for scale in SHOWN for what in ("", ", bound"))
RUNS, GIVEN_UP = (PLAIN, HALF, ONE, FOUR), ((MOST, "did not converge"),)
chart = charting(PART, LABELS, CAPTIONS)

CHARTS = (
    chart("loss", "Loss and the bound of its kernel", "time", "loss", CURVES, log="xy"),
    chart("time", "Time to converge", "scale", "shown_time", ("∝ α²", "small α", "larger α"), log="xy"),
    chart("steps", "Steps to converge", "k", "shown_needed", RUNS, log="xy", lines=GIVEN_UP),
    chart("growth", "How much ‖v‖² has grown", "k", "shown_growth", RUNS, log="xy"),
    chart("drift", "Movement of the kernel", "m", "shown_drift", (HALF, ONE, FOUR), log="xy"),
)
