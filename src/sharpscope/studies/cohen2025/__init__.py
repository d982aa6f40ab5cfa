"""Central flows: what gradient descent does on average at the edge of stability.

At the edge the weights oscillate, and the oscillation pushes them: on average gradient descent follows its loss plus
half the covariance of the oscillation times the curvature, with the least covariance that keeps every eigenvalue of the
Hessian at or below the threshold.  That flow is integrated here beside the optimizer, on networks with and without
normalization, and beside the stable flow, which knows nothing of the oscillation.  Where it stops being right is shown
too, and what it costs to go as far as gradient descent when the intrinsic rate is small.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from ...autodiff.curvature import hessian
from ...flows.central import central
from ...flows.implicit import implicit
from ...flows.integrate import integrate
from ...linalg.warm_start import warm_started
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, scaling, under
from .._framework.config import demand_positive
from .._framework.observe import Quantity, run
from .._framework.study import Job, Progress
from .._shared.forecast import Forecast, claims, end_error, late, mean_ratio, runs
from .._shared.networks import SECONDS_PER_STEP, Variant, problem_of
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
    """Sizes of all parts; the defaults are the full study."""

    steps: int = 1000  # predicted, per network
    points: int = 50  # measurements
    start: int = 1000  # steps of training before; half as many without normalization, which leaves the edge again
    rates: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)  # intrinsic rates of the cost
    walked: float = 1e-5  # least intrinsic rate at which gradient descent is run too
    expensive: bool = True  # also the transformer, and where the flow ends
    seed: int = 0  # of data and weights

    def __post_init__(self) -> None:
        demand_positive(self)


OLD_COLUMNS = {"line": "spherical_threshold"}
OLD_FIELDS = {"dear": "expensive"}
QUICK = Config(steps=400, points=20, rates=(1e-3, 1e-4, 1e-5), expensive=False)
MLP = Variant("mlp", "BN", "half squares", learning_rate=0.2, weight_decay=5e-4)
PLAIN = "MLP without normalization"
LARGE = "learning rate too large"

NETS = {
    PLAIN: Variant("plain", "none", "half squares", learning_rate=0.2, weight_decay=0.0),
    "MLP with BN": MLP,
    "convolutions with GN": replace(MLP, net="conv", norm="GN", train=250),
    "transformer with LN": replace(MLP, net="transformer", norm="LN", train=200),
}

FAILING = {
    LARGE: replace(MLP, learning_rate=4.0, weight_decay=2.5e-4),
    "cross-entropy, late": replace(MLP, loss="cross-entropy", learning_rate=4.0, weight_decay=2.5e-5),
}


def jobs(config: Config) -> list[Job]:
    predicted = [forecast.job(name) for name, forecast in forecasts(config).items()]
    return predicted + [_cost_job(config, il) for il in config.rates]


def forecasts(config: Config) -> dict[str, Forecast]:
    """The forecasts of a configuration, by name."""
    out = {}
    for name, variant in (NETS | FAILING).items():
        if config.expensive or not (name in FAILING or variant.net == "transformer"):
            start = (config.start + 1) // 2 if name == PLAIN else config.start
            out[name] = Forecast(replace(variant, seed=config.seed), start, config.steps, config.points)
    return out


def _cost_job(config: Config, il: float) -> Job:
    walk = il >= config.walked
    steps = 5000 + (1 / il if walk else 0) + (9 / il if il >= EXPLICIT_RATE else 0)  # an explicit one costs nine
    arguments = {"il": il, "walk": walk, "seed": config.seed}
    return Job(f"cost, il {il:g}", _cost, arguments, cost=3 + 0.6 * SECONDS_PER_STEP["regression"] * steps)


def _cost(log: RunLog, progress: Progress, il: float, walk: bool, seed: int) -> None:
    """Flows and optimizer over τ = 1 from step 5000 (20 000 for il ≤ 1e-5), regression network with 40 examples."""
    log.resume()
    rule = GD(0.5, il / 0.5)
    variant = Variant("regression", "BN", "squares", rule.learning_rate, rule.weight_decay, train=40, seed=seed)
    problem = problem_of(variant)
    early, steps = max(round(0.2 / max(il, 1e-5)), 5000), round(1 / il)
    f = recorded(problem.objective, early)

    def step(w: Tensor) -> Tensor:
        return rule.step(w, f.grad(w), {})[0]

    def walked(w: Tensor, steps: int, low: float, high: float) -> Tensor:
        """The weights after so many steps, during which progress goes from `low` to `high`."""
        for i in range(steps):
            w = step(w)
            if i % 1000 == 0:
                progress(low + (high - low) * i / steps)
        return w

    def averaged(w: Tensor) -> Tensor:
        """The mean of three iterates that cancels an oscillation with period two."""
        after = step(w)
        return (w + 2 * after + step(after)) / 4

    def write(name: str, w: Tensor, gradients: float) -> None:
        judged = problem.columns_at(w)
        sharpness = warm_started(hessian(f, w)).values[0].item() * (w @ w).item()
        row = {"il": il, "spherical_sharpness": sharpness, "gradients": gradients, "step": steps, **judged}
        log.append(**({"run": name, "moved": (w - start).norm().item()} | row))

    w = walked(f.weights(), early, 0.0, 0.1)
    start = averaged(w)
    path = integrate(central(f, rule), start, steps, method=implicit())
    write("cost: implicit flow", path.weights[-1], path.gradients)
    if il >= EXPLICIT_RATE:
        explicit = integrate(central(f, rule), start, steps)
        write("cost: explicit flow", explicit.weights[-1], explicit.gradients)
    if walk:
        end = averaged(walked(w, steps, 0.2, 1.0))
        write("cost: gradient descent", end, steps)
        distance = (path.weights[-1] - end).norm().item() / (end - start).norm().item()
        log.append(run="cost: distance of the ends", il=il, error=distance, step=steps)
    else:
        log.append(run="cost: gradient descent", il=il, gradients=steps, step=steps)


def distance_to_edge(name: str, flow: str) -> Quantity:
    """The column lr·λ1/2 along a flow, from a tenth of the way on."""
    return late(name, flow, "sharpness") * NETS[name].learning_rate / 2


def at_rate(il: float, name: str, column: str) -> Quantity:
    """A column of one of the runs that cost is measured on, at an intrinsic rate."""
    return run(f"cost: {name}").at(il=il)[column]


def flow_over_descent(column: str) -> Quantity:
    """A column of the implicit flow over that of gradient descent."""
    return at_rate(1e-5, "implicit flow", column) / at_rate(1e-5, "gradient descent", column)


CLAIMS = (
    *under(
        BOTH,
        *(claim for name in NETS for claim in claims(name, with_control=name != PLAIN)),
        identity(
            f"{PLAIN}: lr·λ1/2 along the flow", distance_to_edge(PLAIN, "central flow").extent().within(0.99, 1.01)
        ),
        control(
            f"{PLAIN}: the stable flow leaves the threshold (greatest lr·λ1/2)",
            distance_to_edge(PLAIN, "stable flow").max() >= 1.01,
        ),
    ),
    *under(
        ENDS,
        control(
            f"{LARGE}: averaged weights are sharper than the flow (its sharpness over theirs)",
            mean_ratio(LARGE, "sharpness") <= 0.95,
            note="lr is 20 times that of the MLP above, and 20 modes or more are at the edge.",
        ),
        *(
            comparison(
                f"{name}: distance of the flow's end over the distance moved", end_error(name) <= 0.12, deciding=False
            )
            for name in FAILING
        ),
    ),
    *under(
        COST,
        comparison(
            "At il = 1e-5 the implicit flow reaches τ = 1 with fewer gradients (factor)",
            at_rate(1e-5, "gradient descent", "gradients") / at_rate(1e-5, "implicit flow", "gradients") >= 10,
        ),
        comparison(
            "It ends at the spherical sharpness of gradient descent (ratio)",
            flow_over_descent("spherical_sharpness").within(0.95, 1.05),
        ),
        comparison("It ends at its test loss (ratio)", flow_over_descent("test_loss").within(0.95, 1.05)),
        scaling(
            "Its cost does not grow as il falls (from il = 1e-3 to 1e-5, factor)",
            at_rate(1e-5, "implicit flow", "gradients") / at_rate(1e-3, "implicit flow", "gradients") <= 2,
        ),
        control(
            "That of explicit steps does: they are no longer than the optimizer's (gradients over its steps, least)",
            (run("cost: explicit flow")["gradients"] / run("cost: explicit flow")["step"]).min() >= 1,
        ),
        control(
            "From il = 1e-3 to 1e-4 it grows in proportion, or nearly (factor)",
            at_rate(1e-4, "explicit flow", "gradients") / at_rate(1e-3, "explicit flow", "gradients") >= 3,
            deciding=False,
            note="A path at il = 1e-3 may start with a dozen modes at the edge, and to follow them costs more than its"
            " steps.",
        ),
    ),
)

LABELS = {
    "step": "step",
    "sharpness": "λ1",
    "spherical_sharpness": "λ1",
    "loss": "loss",
    "error": "distance / distance moved",
    "il": "il = lr · wd",
    "gradients": "gradients",
}
CHARTS = labelled(
    LABELS,
    *under(
        BOTH,
        Chart(
            "plain-sharpness",
            "Sharpness without normalization",
            x="step",
            y="sharpness",
            runs=runs(PLAIN),
            lines=((10.0, "2/lr"),),
            caption="The optimizer's swings about 2/lr, where the central flow is; the flow that knows no edge rises.",
        ),
        Chart(
            "bn-spherical-sharpness",
            "Spherical sharpness with BN",
            x="step",
            y="spherical_sharpness",
            runs=runs("MLP with BN"),
            caption="The central flow falls with the optimizer; the stable flow, which knows no edge, rises.",
        ),
        Chart(
            "bn-loss",
            "Training loss with BN, averaged over the oscillation",
            x="step",
            y="loss",
            runs=runs("MLP with BN"),
        ),
        Chart(
            "distance",
            "Distance of the central flow from the optimizer",
            x="step",
            y="error",
            runs=tuple(f"{name}: central flow" for name in NETS),
            caption="In units of what the optimizer has moved.",
        ),
    ),
    *under(
        ENDS,
        Chart(
            "ends",
            "The same where it ends",
            x="step",
            y="error",
            runs=tuple(f"{name}: central flow" for name in FAILING),
        ),
    ),
    *under(
        COST,
        Chart(
            "cost",
            "Gradients for τ = 1",
            x="il",
            y="gradients",
            runs=("cost: implicit flow", "cost: gradient descent", "cost: explicit flow"),
            log="xy",
            caption="Descent needs 1/il of them, the implicit flow about as many at any il.",
        ),
    ),
)
