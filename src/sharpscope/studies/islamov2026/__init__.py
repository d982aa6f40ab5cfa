"""Descent in any norm settles at its edge of stability along the step, whatever the largest eigenvalue.

Steepest descent in a norm takes steps ``Δ = -η ‖∇L‖* d``, with d of norm one and ``∇Lᵀd = -‖∇L‖*``: gradient descent,
signs of the gradient for the largest entry as the norm, orthogonal factors of matrices for the largest spectral norm.
The directional smoothness D along the step rises to 2/η and stays, where the loss no longer falls along a step.  One
less the gain ratio of the step is the same number; it needs no norm, and settles near one for RMSprop, Adam and Muon,
too.  λ1 of the Hessian times the length of the step over that of the gradient is at its threshold for gradient descent
alone: others train at several times that, and two are far below their edge with λ1 above the threshold.

    1 - ρ = 1 - (L(w + Δ) - L(w)) / ∇LᵀΔ = η D/2,    D = 2 (L(w + Δ) - L(w) - ∇LᵀΔ) / ‖Δ‖²
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...autodiff.objective import Objective
from ...linalg.memory import Memory
from ...measures import measures
from ...measures.along_step import StepGain, gain_from
from ...measures.iterate import Iterate, midpoint
from ...optimizers.adaptive import Adam, RMSprop
from ...optimizers.base import UpdateRule
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, scaling, under
from .._framework.config import demand_positive
from .._framework.observe import Quantity, run
from .._framework.study import Job, Progress
from .._shared.networks import Variant, problem_of

PAPER = (
    "Islamov, Crawshaw, Cohen & Gower, Non-Euclidean Gradient Descent Operates at the Edge of Stability"
    " (2026, arXiv 2603.05002)"
)
PART = "Edge along the step"
ALONG, EUCLIDEAN_RATIO = "edge_along_step", "euclidean"
SHORT = 50
"""Factor by which the steps of the controls are shorter."""

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm of weights by tensor, its dual, and the direction of steepest descent, of norm one."""

    norm: Callable[[Named], Tensor]
    dual: Callable[[Named], Tensor]
    steepest: Callable[[Named], Named]


def _norm_of_all(named: Named) -> Tensor:
    return torch.cat([t.flatten() for t in named.values()]).norm()


def _polar(g: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    return u @ v


def _steepest_block(named: Named) -> Named:
    best = max(named, key=lambda name: named[name].norm().item())
    return {name: -g / g.norm() if name == best else torch.zeros_like(g) for name, g in named.items()}


EUCLIDEAN = Norm(_norm_of_all, _norm_of_all, lambda named: {n: -g / _norm_of_all(named) for n, g in named.items()})
SIGNS = Norm(
    lambda named: torch.stack([t.abs().max() for t in named.values()]).max(),
    lambda named: torch.stack([g.abs().sum() for g in named.values()]).sum(),
    lambda named: {name: -g.sign() for name, g in named.items()},
)
SPECTRAL = Norm(
    lambda named: torch.stack([torch.linalg.matrix_norm(t, 2) for t in named.values()]).max(),
    lambda named: torch.stack([torch.linalg.matrix_norm(g, "nuc") for g in named.values()]).sum(),
    lambda named: {name: -_polar(g) for name, g in named.items()},
)
BLOCKS = Norm(
    lambda named: torch.stack([t.norm() for t in named.values()]).sum(),
    lambda named: torch.stack([g.norm() for g in named.values()]).max(),
    _steepest_block,
)

DESCENTS = {
    "gradient descent": (EUCLIDEAN, 1.0),
    "sign descent": (SIGNS, 2e-3),
    "spectral descent": (SPECTRAL, 0.08),
    "block descent": (BLOCKS, 2.0),
}
"""Descents with a norm, and their learning rates η."""

RULES: dict[str, UpdateRule] = {
    "heavy ball": GD(1.0, momentum=0.9),
    "RMSprop": RMSprop(3e-3, decay=0.99),
    "Adam": Adam(1e-2, beta2=0.99),
}
MUON = "Muon"
BELOW = ("block descent", "heavy ball")
AT_THE_EDGE = (*(name for name in (*DESCENTS, *RULES) if name not in BELOW), MUON)


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    steps: int = 4000
    every: int = 25  # steps between rows
    train: int = 100  # examples
    seed: int = 0  # of data and weights

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(steps=700)


def jobs(config: Config) -> list[Job]:
    cost = 1.5e-3 * config.steps
    runs = [
        Job(name, _descend, {"name": name, "factor": 1.0, "config": config}, cost) for name in (*AT_THE_EDGE, *BELOW)
    ]
    shorter = replace(config, steps=max(config.steps // 4, config.every))
    return runs + [
        Job(f"{name}, short steps", _descend, {"name": name, "factor": 1 / SHORT, "config": shorter}, cost / 4)
        for name in AT_THE_EDGE
    ]


def _descend(log: RunLog, progress: Progress, name: str, factor: float, config: Config) -> None:
    """Take steps, and write a row of every few of them: medians along the steps, and λ1 midway of the last."""
    log.resume()
    f = problem_of(Variant("plain", "none", "squares", 0.1, 0.0, train=config.train, seed=config.seed)).objective
    w, step = f.weights(), _steps(f, name, factor)
    memories: dict[str, Memory] = {}
    edges: list[float] = []
    for number in range(1, config.steps + 1):
        loss, g = f.value_and_grad(w)
        delta, smoothness = step(w, g)
        slope = (g @ delta).item()
        gain = gain_from(f, w, delta, loss.item(), slope, 0.0, noise=0.0)
        edges.append(gain.edge)
        if number % config.every == 0:
            it = Iterate(f, midpoint(w, w + delta), rtol=1e-2, start=memories)
            row = {"loss": loss.item(), ALONG: _median(edges)}
            row[EUCLIDEAN_RATIO] = measures.sharpness(it) * (delta.norm() / g.norm()).item() / 2
            memories |= it.memories
            if smoothness is not None:
                row["off"] = abs(smoothness(gain) - gain.edge)
            log.append(step=number, **row)
            edges.clear()
            progress(number / config.steps)
        w = w + delta


Taken = tuple[Tensor, Callable[[StepGain], float] | None]


def _steps(f: Objective, name: str, factor: float) -> Callable[[Tensor, Tensor], Taken]:
    """Steps from weights and gradient ``(P,)``, each with η D/2 from its gain, where the descent has a norm."""
    if name in DESCENTS:
        norm, rate = DESCENTS[name]
        return lambda w, g: _steepest(f, norm, factor * rate, g)
    if name == MUON:
        return _orthogonal(f, factor * 0.03, 0.9)
    rule = RULES[name]
    state = rule.init(f.weights())

    def step(w: Tensor, g: Tensor) -> Taken:
        nonlocal state
        after, state = rule.step(w, g, state)
        return factor * (after - w), None

    return step


def _orthogonal(f: Objective, rate: float, momentum: float) -> Callable[[Tensor, Tensor], Taken]:
    """Steps of one length along the orthogonal factors of a sum of gradients."""
    total = torch.zeros(f.size, dtype=f.dtype)

    def step(w: Tensor, g: Tensor) -> Taken:
        total.mul_(momentum).add_(g)
        return -rate * torch.cat([_polar(t).flatten() for t in f.unflatten(total).values()]), None

    return step


def _steepest(f: Objective, norm: Norm, rate: float, g: Tensor) -> Taken:
    """Step of steepest descent in a norm, ``-η ‖g‖* d``."""
    named = f.unflatten(g)
    direction = norm.steepest(named)
    delta = rate * norm.dual(named) * torch.cat([direction[name].flatten() for name in f.slices])
    square = norm.norm(f.unflatten(delta)).item() ** 2
    return delta, lambda gain: rate * (gain.change - gain.slope) / square


def _median(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else math.nan


def late(name: str, column: str) -> Quantity:
    """The median of a column over the last quarter of the rows of a run."""
    return run(name)[column].reduce(lambda values: statistics.median(values[-len(values) // 4 :]))


CLAIMS = under(
    PART,
    *(
        identity(f"{name}: 1 - ρ is η D/2 in its norm (greatest difference)", run(name)["off"].max() <= 1e-6)
        for name in DESCENTS
    ),
    *(
        scaling(f"{name}: it settles at the edge along its steps (1 - ρ)", late(name, ALONG).within(0.9, 1.1))
        for name in AT_THE_EDGE
    ),
    scaling(
        "gradient descent: λ1 with the length of the step is at its threshold, too",
        late("gradient descent", EUCLIDEAN_RATIO).within(0.95, 1.1),
    ),
    *(
        comparison(f"{name}: λ1 with the length of the step is above it", late(name, EUCLIDEAN_RATIO) >= 1.2)
        for name in AT_THE_EDGE[1:]
    ),
    *(
        claim
        for name in BELOW
        for claim in (
            comparison(f"{name}: λ1 with the length of the step is above it", late(name, EUCLIDEAN_RATIO) >= 1.2),
            control(f"{name}: and the steps are far from the edge along them (1 - ρ)", late(name, ALONG) <= 0.2),
        )
    ),
    *(
        claim
        for name in AT_THE_EDGE
        for claim in (
            control(
                f"{name}, steps {SHORT} times shorter: far from the edge along them (greatest 1 - ρ)",
                run(f"{name}, short steps")[ALONG].max() <= 0.2,
            ),
            control(
                f"{name}, steps {SHORT} times shorter: λ1 with the length of the step (greatest)",
                run(f"{name}, short steps")[EUCLIDEAN_RATIO].max() <= 0.5,
            ),
        )
    ),
)

CHARTS = under(
    PART,
    *labelled(
        {"step": "step", ALONG: "1 - ρ", EUCLIDEAN_RATIO: "λ1 ‖Δ‖ / 2 ‖∇L‖", "loss": "loss"},
        Chart(
            "along",
            "Edge along the step",
            x="step",
            y=ALONG,
            runs=(*AT_THE_EDGE, *BELOW),
            lines=((1.0, "the step no longer pays"),),
            caption="One less the gain ratio of a step, half the learning rate times the directional smoothness.",
        ),
        Chart(
            "spectral",
            "Largest eigenvalue with the length of the step",
            x="step",
            y=EUCLIDEAN_RATIO,
            runs=(*AT_THE_EDGE, *BELOW),
            lines=((1.0, "edge of gradient descent"),),
            log="y",
            caption="The ratio of λ1 to its threshold, were the steps those of gradient descent of the same length.",
        ),
        Chart("loss", "Loss", x="step", y="loss", runs=(*AT_THE_EDGE, *BELOW), log="y"),
    ),
)
