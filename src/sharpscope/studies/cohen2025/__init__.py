"""Central flows: what gradient descent does on average at the edge of stability.

At the edge the weights oscillate, and the oscillation pushes them: on average gradient descent follows its loss plus
half the covariance of the oscillation times the curvature, with the least covariance that keeps every eigenvalue of the
Hessian at or below the threshold.  That flow is integrated here beside the optimizer, on networks with and without
normalization, and beside the stable flow, which knows nothing of the oscillation.  Where it stops being right is shown
too, and what it costs to go as far as gradient descent when the intrinsic rate is small.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autodiff.curvature import hessian
from ...autodiff.objective import Objective
from ...flows.central import central
from ...flows.implicit import implicit
from ...flows.integrate import integrate
from ...linalg.warm_start import warm_started
from ...optimizers.gd import GD
from ...records.history import History
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.study import Job, Progress
from .._shared.forecast import Forecast, Observer, beside, claims, ends, runs
from .._shared.networks import SECONDS_PER_STEP, Variant, task_of
from .._shared.recorded import recorded

PAPER = (
    "Cohen, Damian, Talwalkar, Kolter & Lee, Understanding Optimization in Deep Learning with Central Flows"
    " (ICLR 2025, arXiv 2410.24206)"
)
BOTH = "Beside the optimizer"
ENDS = "Where it ends"
COST = "The cost of a path"

EXPLICIT_RATE = 1e-4
"""Least intrinsic rate at which explicit steps are taken too."""


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    steps: int = 1000  # predicted, per network
    points: int = 50  # readings
    start: int = 1000  # steps of training before, and twice as many without normalization
    rates: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)  # intrinsic rates of the cost
    walked: float = 1e-5  # least intrinsic rate at which gradient descent is run too
    dear: bool = True  # also the transformer, and where the flow ends
    seed: int = 0  # of data and weights

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(steps=400, points=20, rates=(1e-3, 1e-4, 1e-5), dear=False)
MLP = Variant("mlp", "BN", "half squares", 0.2, 5e-4)

NETS = {
    "MLP without normalization": Variant("plain", "none", "half squares", 0.2, 0.0),
    "MLP with BN": MLP,
    "convolutions with GN": replace(MLP, net="conv", norm="GN", train=250),
    "transformer with LN": replace(MLP, net="transformer", norm="LN", train=200),
}

FAILING = {
    "learning rate too large": replace(MLP, learning_rate=4.0, weight_decay=2.5e-4),
    "cross-entropy, late": replace(MLP, loss="cross-entropy", learning_rate=4.0, weight_decay=2.5e-5),
}


def jobs(config: Config) -> list[Job]:
    forecasts = {
        name: Forecast(v, config.start * (1 + (v.net == "plain")), config.steps, config.points)
        for name, v in ((name, replace(v, seed=config.seed)) for name, v in (NETS | FAILING).items())
        if config.dear or not (name in FAILING or v.net == "transformer")
    }
    return [
        *(forecast.job(name) for name, forecast in forecasts.items()),
        *(_cost_job(config, il) for il in config.rates),
    ]


def _cost_job(config: Config, il: float) -> Job:
    walk = il >= config.walked
    steps = 5000 + (1 / il if walk else 0) + (9 / il if il >= EXPLICIT_RATE else 0)  # an explicit one is dear
    arguments = {"il": il, "walk": walk, "seed": config.seed}
    return Job(f"cost, il {il:g}", _cost, arguments, 3 + 0.6 * SECONDS_PER_STEP["regression"] * steps)


def _cost(log: RunLog, progress: Progress, il: float, walk: bool, seed: int) -> None:
    """Flows and optimizer over τ = 1 from step 5000 (20 000 for il ≤ 1e-5), regression network with 40 examples."""
    log.resume()
    variant = Variant("regression", "BN", "squares", 0.5, il / 0.5, train=40, seed=seed)
    task = task_of(variant)
    early, steps = max(round(0.2 / max(il, 1e-5)), 5000), round(1 / il)
    f, rule = recorded(Objective(task.net, task.loss, [(task.x, task.y)]), early), GD(0.5, il / 0.5)
    w = f.weights()

    def walked(w: Any, steps: int, low: float, high: float) -> Any:
        for step in range(steps):
            w, _ = rule.step(w, f.grad(w), {})
            if step % 1000 == 0:
                progress(low + (high - low) * step / steps)
        return w

    def average(w: Any) -> Any:
        one = walked(w, 1, 1, 1)
        return (w + 2 * one + walked(one, 1, 1, 1)) / 4

    def read(name: str, w: Any, gradients: float) -> None:
        f.load(w)
        judged = task.evaluate(task.net.train())
        task.net.train()
        sharpness = warm_started(hessian(f, w)).values[0].item() * (w @ w).item()
        row = {"il": il, "spherical_sharpness": sharpness, "gradients": gradients, "step": steps, **judged}
        distance = (w - start).norm().item()
        log.append(**({"run": name, "moved": distance} | row))

    w = walked(w, early, 0.0, 0.1)
    start = average(w)
    path = integrate(central(f, rule), start, steps, method=implicit())
    read("cost: implicit flow", path.weights[-1], path.gradients)
    if il >= EXPLICIT_RATE:
        slow = integrate(central(f, rule), start, steps)
        read("cost: explicit flow", slow.weights[-1], slow.gradients)
    if walk:
        end = average(walked(w, steps, 0.2, 1.0))
        read("cost: gradient descent", end, steps)
        apart = (path.weights[-1] - end).norm().item() / (end - start).norm().item()
        log.append(run="cost: distance of the ends", il=il, error=apart, step=steps)
    else:
        log.append(run="cost: gradient descent", il=il, gradients=steps, step=steps)


def _held(name: str, flow: str) -> Observer:
    """Least and greatest lr·λ1/2 along a flow, from a tenth of the way on."""

    def read(h: History, config: Any) -> tuple[float, float]:
        values = h.series(f"{name}: {flow}", "sharpness") * NETS[name].learning_rate / 2
        late = values[len(values) // 10 + 1 :]
        return float(late.min()), float(late.max())

    return read


def _at(il: float, run: str, column: str) -> Callable[[History], float]:
    def read(h: History) -> float:
        rates, values = h.table(f"cost: {run}", "il", column)
        return float(values[np.abs(rates / il - 1).argmin()])

    return read


def _cost_ratio(column: str, il: float = 1e-5, *, upside: bool = False) -> Observer:
    """The flow's number over gradient descent's at an intrinsic rate."""

    def read(h: History, config: Any) -> float:
        flow, real = (_at(il, run, column)(h) for run in ("implicit flow", "gradient descent"))
        return real / flow if upside else flow / real

    return read


LARGE, _ = FAILING
COSTS = ("cost: implicit flow", "cost: gradient descent")
EXPLICIT = "cost: explicit flow"
PLAIN = "MLP without normalization"

CLAIMS = (
    *(claim for name in NETS for claim in claims(name, BOTH, control=name != PLAIN)),
    Claim(
        f"{PLAIN}: lr·λ1/2 along the flow",
        _held(PLAIN, "central flow"),
        within(0.99, 1.01),
        "identity",
        BOTH,
        runs(PLAIN),
    ),
    Claim(
        f"{PLAIN}: the stable flow leaves the threshold (greatest lr·λ1/2)",
        lambda h, config: _held(PLAIN, "stable flow")(h, config)[1],
        at_least(1.01),
        "negative control",
        BOTH,
        runs(PLAIN),
    ),
    Claim(
        f"{LARGE}: averaged weights are sharper than the flow (its sharpness over theirs)",
        beside(LARGE, "sharpness", mean=True),
        at_most(0.95),
        "negative control",
        ENDS,
        runs(LARGE),
        note="lr is 20 times that of the MLP above, and 20 modes or more are at the edge.",
    ),
    *(
        Claim(
            f"{name}: distance of the flow's end over the distance moved",
            ends(name),
            at_most(0.12),
            "comparison",
            ENDS,
            runs(name),
            deciding=False,
        )
        for name in FAILING
    ),
    Claim(
        "At il = 1e-5 the implicit flow reaches τ = 1 with fewer gradients (factor)",
        _cost_ratio("gradients", upside=True),
        at_least(10),
        "comparison",
        COST,
        COSTS,
    ),
    Claim(
        "It ends at the spherical sharpness of gradient descent (ratio)",
        _cost_ratio("spherical_sharpness"),
        within(0.95, 1.05),
        "comparison",
        COST,
        COSTS,
    ),
    Claim("It ends at its test loss (ratio)", _cost_ratio("test_loss"), within(0.95, 1.05), "comparison", COST, COSTS),
    Claim(
        "Its cost does not grow as il falls (from il = 1e-3 to 1e-5, factor)",
        lambda h, config: _at(1e-5, "implicit flow", "gradients")(h) / _at(1e-3, "implicit flow", "gradients")(h),
        at_most(2),
        "scaling",
        COST,
        COSTS,
    ),
    Claim(
        "That of explicit steps does (from il = 1e-3 to 1e-4, factor)",
        lambda h, config: _at(1e-4, "explicit flow", "gradients")(h) / _at(1e-3, "explicit flow", "gradients")(h),
        at_least(3),
        "negative control",
        COST,
        (EXPLICIT,),
    ),
)


def _chart(name: str, title: str, of: str, y: str, y_label: str, **more: Any) -> Chart:
    return Chart(f"{name}-{y.replace('_', '-')}", title, "step", y, runs(of), "step", y_label, **more)


CHARTS = (
    _chart(
        "plain",
        "Sharpness without normalization",
        "MLP without normalization",
        "sharpness",
        "λ1",
        part=BOTH,
        lines=((10.0, "2/lr"),),
    ),
    _chart("bn", "Spherical sharpness with BN", "MLP with BN", "spherical_sharpness", "λ1", part=BOTH),
    _chart("bn", "Training loss with BN, averaged over the oscillation", "MLP with BN", "loss", "loss", part=BOTH),
    Chart(
        "distance",
        "Distance of the central flow from the optimizer",
        "step",
        "error",
        tuple(f"{name}: central flow" for name in NETS),
        "step",
        "distance / distance moved",
        part=BOTH,
    ),
    Chart(
        "ends",
        "The same where it ends",
        "step",
        "error",
        tuple(f"{name}: central flow" for name in FAILING),
        "step",
        "distance / distance moved",
        part=ENDS,
    ),
    Chart(
        "cost",
        "Gradients for τ = 1",
        "il",
        "gradients",
        (*COSTS, EXPLICIT),
        "il = lr · wd",
        "gradients",
        log_x=True,
        log_y=True,
        part=COST,
    ),
)
