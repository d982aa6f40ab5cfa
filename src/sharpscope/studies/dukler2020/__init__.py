"""Weight normalization makes a wide ReLU network converge at the rate its kernel predicts.

A two-layer ReLU network whose rows are split into length g and direction v/‖v‖ converges linearly, and the scale α of v
at the start chooses which half of its kernel rules: directions if α is small, lengths if it is large.  Here the kernel
is computed by autograd and by formula, the loss is compared with the bound made of its least eigenvalue, and the time
to converge with α².  Descent never shortens v, so too long a step makes later ones shorter: small α stand far longer
steps than the network without normalization that starts from the same function.  At α = 4 they do not, and need more.

Rows v_k = αw_k and lengths g_k = ‖w_k‖ at the start, w_k ~ N(0, I), r the residuals, loss ½‖r‖², t steps times lr:

    Λ = V/α² + G,   V + G = kernel of the unnormalized network        at the start
    ‖r(t)‖² ≤ ‖r(0)‖² exp(-λ_min(Λ_0) t)                              while λ_min(Λ_t) ≥ ½ λ_min(Λ_0)
    ‖v_k‖² ← ‖v_k‖² + lr²‖∇_{v_k}‖²                                   at every step
"""

from dataclasses import dataclass

import numpy as np

from ...autodiff.batched import gram
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.fits import exponent
from .._framework.observe import Quantity, run
from .._framework.study import Job, Progress
from .weightnorm import MAX_STEPS, ReluNet, relative_difference

PAPER = (
    "Dukler, Gu & Montúfar, Optimization Theory for ReLU Neural Networks Trained with Normalization Layers"
    " (arXiv 2006.06878)"
)
PART = "Convergence and step sizes"
NORMALIZED, UNNORMALIZED, SMALL = "normalized", "unnormalized", "small α"
TRIED = (0.5, 1.0, 4.0)  # α of step sizes and drift
SHOWN = (0.25, 1.0, 4.0)  # α of the curves
LEARNT = 1e-4  # of the first loss


@dataclass(frozen=True)
class Config:
    """The settings of the study; the defaults are its full size."""

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
    for seed in seeds(config):
        common, ending = {"seed": seed, "config": config}, f", seed {seed}"
        found.append(Job(f"convergence{ending}", _converge, common, cost=0.5))
        found.append(Job(f"time{ending}", _time, common, cost=2.0))
        for m in config.widths:
            found.append(Job(f"drift at m = {m}{ending}", _drift, {"width": m, **common}, cost=m / 1500))
        for scale in (None, *TRIED):
            found.append(Job(f"steps, {named(scale)}{ending}", _steps, {"scale": scale, **common}, cost=0.3))
    return found


def named(scale: float | None) -> str:
    """The name of the runs with this α."""
    return f"α = {scale:g}" if scale else UNNORMALIZED


def _converge(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Descend at 1/λ_max for every α and without normalization, and compare kernels and the bound."""
    log.resume()
    plain = ReluNet.draw(config.width, (seed,), None)
    unnormalized = gram(plain.outputs, plain.start[None])[0]
    for done, scale in enumerate((None, *config.scales)):
        net = ReluNet.draw(config.width, (seed,), scale)
        low, high = net.kernel_range(net.start)
        V, G = net.kernel_parts(net.start)
        loss, end = net.descent(1 / high, LEARNT)
        time = np.arange(len(loss)) / high
        bound = np.exp(-low * time)
        kernels = [(net.kernel(w), gram(net.outputs, w[None])[0]) for w in (net.start, end)]
        log.append(
            run=NORMALIZED if scale else UNNORMALIZED,
            seed=seed,
            scale=scale,
            steps=float(len(loss) - 1),
            kept=net.kernel_range(end)[0] / low,
            over_bound=float((loss / bound)[1:].max()),
            sum=relative_difference(V + G, unnormalized),
            autograd=max(relative_difference(formula, exact) for formula, exact in kernels),
        )
        if seed == config.seed and scale in SHOWN:
            for t, value, limit in zip(time[1:], loss[1:], bound[1:], strict=True):
                log.append(run=named(scale), time=float(t), loss=float(value))
                log.append(run=f"{named(scale)}, bound", time=float(t), loss=float(limit))
        progress((done + 1) / (len(config.scales) + 1))


def _time(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Measure steps times step size until the loss has fallen, with steps a fifth as long."""
    log.resume()
    times, scales = list[float](), sorted({*config.small, *config.scales})
    for scale in scales:
        net = ReluNet.draw(config.width, (seed,), scale)
        rate = 0.2 / net.kernel_range(net.start)[1]
        (end,) = net.descents([rate], LEARNT)
        times.append(end.steps * rate if end.converged else np.nan)
        law = times[0] * (scale / scales[0]) ** 2
        log.append(run=SMALL if scale in config.small else "larger α", seed=seed, scale=scale, time=times[-1])
        log.append(run="∝ α²", seed=seed, scale=scale, time=law)
        progress(len(times) / len(scales))


def _drift(log: RunLog, progress: Progress, width: int, seed: int, config: Config) -> None:
    """Measure how far the kernel has moved at 1e-3 of the first loss, the mean of several networks."""
    log.resume()
    for scale in TRIED:
        nets = [ReluNet.draw(width, (seed, width, i), scale) for i in range(3)]
        drift = float(np.mean([net.kernel_drift(1e-3) for net in nets]))
        log.append(run=named(scale), seed=seed, m=width, drift=drift)


def _steps(log: RunLog, progress: Progress, scale: float | None, seed: int, config: Config) -> None:
    """Count steps at k·2/λ_max, and measure how ‖v‖² has grown; at k = 2, compare its growth with the law."""
    log.resume()
    net = ReluNet.draw(config.width, (seed,), scale)
    edge = 2 / net.kernel_range(net.start)[1]
    ends = net.descents([k * edge for k in config.factors], LEARNT)
    for k, end in zip(config.factors, ends, strict=True):
        row = {"needed": end.steps, "growth": end.growth} if end.converged else {"needed": MAX_STEPS}
        log.append(run=named(scale), seed=seed, k=k, converged=float(end.converged), **row)
    if scale:
        log.append(run=named(scale), seed=seed, lengths=net.length_mismatch(2 * edge, 50))


def longest_step(name: str) -> Quantity:
    """The largest k with which a run converges."""
    return run(name).where("converged", lambda converged: converged == 1)["k"].max()


HALF, ONE, FOUR = map(named, TRIED)
STEPS_WITHOUT = run(UNNORMALIZED)["steps"].last()

CLAIMS = under(
    PART,
    identity(
        "V + G at the start is the kernel of the unnormalized network (greatest relative difference)",
        run(NORMALIZED)["sum"].max() <= 1e-10,
    ),
    identity(
        "The kernel by autograd is V/α² + G, at the start and the end (greatest relative difference)",
        run(NORMALIZED).reduce(max, "autograd") <= 1e-10,
    ),
    identity(
        "Every step, also at k = 2, adds lr²‖∇‖² to ‖v‖² (greatest relative difference)",
        run(HALF)["lengths"].last() <= 1e-10,
    ),
    inequality(
        "The loss stays below exp(-λ_min(Λ_0) t) for every α (greatest loss over bound)",
        run(NORMALIZED)["over_bound"].max() <= 1,
    ),
    inequality(
        "λ_min of the kernel does not fall by half (end over start, the least of all α)",
        run(NORMALIZED)["kept"].min() >= 0.5,
    ),
    scaling(
        "Small α: the time to converge is that of V/α² (exponent of the time in α)",
        run(SMALL).reduce(exponent, "scale", "time").within(1.8, 2.2),
    ),
    *(
        scaling(
            f"{name}: the wider the network, the less its kernel moves (exponent in the width)",
            run(name).reduce(exponent, "m", "drift") <= -0.4,
        )
        for name in (HALF, ONE, FOUR)
    ),
    comparison(
        "α = 0.5 stands longer steps (longest that converges, over that without normalization)",
        longest_step(HALF) / longest_step(UNNORMALIZED) >= 4,
    ),
    control(
        "α = 4 does not (longest step that converges, over that without normalization)",
        longest_step(FOUR) / longest_step(UNNORMALIZED) <= 3.99,
    ),
    control(
        "α = 4 needs more steps of 1/λ_max (over those without normalization)",
        run(NORMALIZED).at(scale=4)["steps"] / STEPS_WITHOUT >= 1.001,
    ),
    wider_claim(
        "Normalization needs fewer steps of 1/λ_max at the best α (over those without)",
        run(NORMALIZED)["steps"].min() / STEPS_WITHOUT <= 0.8,
    ),
)

LABELS = {
    "time": "flow time, steps × step size",
    "loss": "loss over its start",
    "scale": "α",
    "k": "k, steps of k · 2/λ_max",
    "needed": "steps to 1e-4 of the first loss",
    "growth": "‖v‖² at the end over the start",
    "m": "width m",
    "drift": "‖Λ_end - Λ_0‖ over λ_max(Λ_0)",
}

CHARTS = labelled(
    LABELS,
    *under(
        PART,
        Chart(
            "loss",
            "Loss and the bound of its kernel",
            x="time",
            y="loss",
            runs=tuple(f"{named(scale)}{what}" for scale in SHOWN for what in ("", ", bound")),
            log="xy",
            caption="No network is slower than its bound, half the rate of its first kernel.  Steps of 1/λ_max.",
        ),
        Chart(
            "time",
            "Time to converge",
            x="scale",
            y="time",
            y_label="flow time to 1e-4 of the first loss",
            runs=("∝ α²", SMALL, "larger α"),
            repeats="first",
            log="xy",
            caption="Up to α = 1 the time grows with α²; beyond, G takes over, which does not depend on α.",
        ),
        Chart(
            "steps",
            "Steps to converge",
            x="k",
            y="needed",
            runs=(UNNORMALIZED, HALF, ONE, FOUR),
            repeats="first",
            log="xy",
            lines=((MAX_STEPS, "did not converge"),),
            caption="Beyond k = 1 a quadratic diverges.  Too long a step lengthens v and so shortens the next.",
        ),
        Chart(
            "growth",
            "How much ‖v‖² has grown",
            x="k",
            y="growth",
            runs=(UNNORMALIZED, HALF, ONE, FOUR),
            repeats="first",
            log="xy",
            caption="Of the runs that converge.  Without normalization v is w.",
        ),
        Chart(
            "drift",
            "Movement of the kernel",
            x="m",
            y="drift",
            runs=(HALF, ONE, FOUR),
            repeats="first",
            log="xy",
            caption="At 1e-3 of the first loss, the mean of three networks.",
        ),
    ),
)
