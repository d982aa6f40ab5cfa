"""The learning rate trades the norm of the weights against their sharpness.

Small learning rates follow the gradient flow, to solutions of small norm; beyond a critical rate the edge of stability
sets in, and the larger the rate, the flatter the solution and the larger its norm.  Which bias generalizes better
depends on the teacher.

For most teachers of a diagonal linear net the best rate lies in between.  Here one datum and six weights show it, where
both extremes are known in closed form, then a small tanh network on digits, and one on images of MNIST.  One of the
controls is the teacher that has the least norm itself: for it no rate beats the smallest.

That the rate balances norm and sharpness, and that neither bias alone is best for diagonal linear nets, is what the
abstract says.  A note on the paper tells of MNIST with squared loss, of an ℓ₁ norm that grows about linearly with the
rate, of a test loss in the form of a U, and of a diagonal net with shared weights, ``β = w⊙w``: here u and v start
alike and stay so.  The rest is derived.

    β = u⊙v,   loss ½ (⟨x, β⟩ - 1)²,   at zero loss and u = v:  λ1 = 2 Σ x_i² |β_i|,  ½ ‖(u, v)‖² = ‖β‖₁
    critical rate η_c = 2/(largest λ1 along the gradient flow);   edge of stability: λ1·η/2 = 1
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...linalg.lanczos import lanczos
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.fits import line, spearman
from .._framework.observe import joined, run
from .._framework.study import Job, Progress
from .._shared.data import Split, describe, examples, flat, flat_digits
from .._shared.deep import Stack, losses
from .datum import X, dense_sharpness, errors, from_shared, gain, product, sharpness, summary, sweep

PAPER = (
    "Fojtik, Matveev, Chou, Kutyniok & Maly, Conflicting Biases at the Edge of Stability: Norm versus Sharpness"
    " Regularization (arXiv 2505.21423)"
)
TOY, NET, MNIST = "A diagonal net with one datum", "A network on digits", "A network on MNIST"
OVER_FLOW = {"norm ‖(u, v)‖²": "norm_over", "sharpness": "sharp_over"}
TEACHERS = {"least sharp": 0, "in between": 2, "least norm": 5}  # all of β on one coordinate


SHARED = 5
"""Starts of the toy that are compared with shared weights."""

MNIST_TESTS = 4000


@dataclass(frozen=True)
class Config:
    """The settings of the study; the defaults are its full size."""

    seed: int = 0
    repeats: int = 3
    starts: int = 31  # of the toy, in each repeat
    rates: int = 60  # its learning rates, from .1 to 1.95 η_c
    steps: int = 20000
    teachers: int = 2000
    fractions: tuple[float, ...] = (0.5, 0.9, 1.3, 1.8, 2.5, 3.2, 4.0, 5.0)  # of η_c, for the network
    target: float = 1e-2  # its training loss
    images: int = 1000  # of MNIST to train on
    mnist_fractions: tuple[float, ...] = (0.9, 1.3, 1.8, 2.5, 3.2, 4.0, 5.0, 5.5, 6.0, 6.5, 7.0)
    mnist_target: float = 5e-2

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(repeats=1, images=500)


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        found.append(Job(f"toy, seed {seed}", _toy, common, cost=3.0))
        found.append(Job(f"network, seed {seed}", _network, common, cost=20.0))
        data = partial(describe, "mnist5k", config.images, MNIST_TESTS)
        found.append(Job(f"MNIST, seed {seed}", _mnist, common, cost=0.05 * config.images, data=data))
    return found


def _toy(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Descend from all starts at all rates side by side, and compare with the flow from the same starts."""
    log.resume()
    starts = 0.05 + 1e-3 * np.random.default_rng([921, seed]).standard_normal((config.starts, 2 * len(X)))
    fractions = np.linspace(0.1, 1.95, config.rates)
    runs = sweep(starts, fractions, config.steps)
    columns = {"norm_over": runs.norm, "sharp_over": runs.sharp, "stability_ratio": runs.stability_ratio}
    for i in np.flatnonzero(2 * runs.converged.sum(0) > len(starts)):  # rates at which most converge
        fraction = float(fractions[i])
        medians = {name: float(np.median(v[runs.converged[:, i], i])) for name, v in columns.items()}
        log.append(run="toy", seed=seed, share=fraction, **medians)
        for name, column in OVER_FLOW.items():
            log.append(run=name, seed=seed, share=fraction, over=medians[column])
    draws = np.random.default_rng([922, seed]).dirichlet(np.ones(len(X)), config.teachers) / X
    for k, start in enumerate(starts):
        mismatch = float(abs(sharpness(start) / dense_sharpness(start) - 1))
        log.append(run="starts", seed=seed, apart=mismatch, **summary(runs, k, fractions, draws))
    for start in starts[:SHARED]:
        off, by_noise = from_shared(start, fractions, config.steps)
        log.append(run="shared", seed=seed, shared_off=off, shared_norm=by_noise)
    converged = runs.converged[0]
    products = product(runs.ends[0, converged])
    for name, j in TEACHERS.items():
        teacher = np.eye(len(X))[j] / X[j]
        for fraction, error in zip(fractions[converged], errors(products, teacher), strict=True):
            log.append(run=name, seed=seed, share=float(fraction), error=float(error))
    progress(1.0)


def _network(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Train 64→24→24→10 with tanh on 150 digits to a training loss of .01, from one start at all rates."""
    log.resume()
    stack = Stack(64, 24, 2, 10, activation="tanh")
    setting = Rates("network", stack, flat_digits(150, 1000, 4.0, seed), 0.06, config.target, config.fractions)
    _at_all_rates(log, progress, setting, seed, config.steps)


def _mnist(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Train 196→32→32→10 with tanh on images of MNIST to a training loss of .05, from one start at all rates."""
    log.resume()
    data = flat(examples("mnist5k"), config.images, MNIST_TESTS, 4.0, seed).to("cpu", torch.float32)
    stack = Stack(196, 32, 2, 10, activation="tanh")
    setting = Rates("MNIST", stack, data, 0.1, config.mnist_target, config.mnist_fractions)
    _at_all_rates(log, progress, setting, seed, config.steps)


@dataclass(frozen=True)
class Rates:
    """A network, its data, the rate that stands for the flow, the training loss to reach, and rates over η_c."""

    run: str
    stack: Stack
    data: Split
    slow: float
    target: float
    fractions: tuple[float, ...]


def _at_all_rates(log: RunLog, progress: Progress, setting: Rates, seed: int, steps: int) -> None:
    """Descend from one start, slowly and at all rates, and write where each run reaches the training loss."""
    data, stack = setting.data, setting.stack
    f = BatchedRuns(partial(losses, stack, data.x, data.y))
    start = stack.draw(1, [923, seed], variance=1.0).to(data.x.dtype)
    along_the_flow = list[float]()

    def watch(t: int, W: Tensor, loss: Tensor, g: Tensor) -> None:
        if t % 400 == 0:
            along_the_flow.append(_sharpness(f, W[0], 1e-2))
            progress(min(t / 7000, 1) / 2)

    until = partial(torch.ge, torch.tensor(setting.target))
    slow = descend(f.recorded(start), start, GD(setting.slow), steps, until=until, watch=watch)
    of_flow = _sharpness(f, slow.weights[0])
    critical = 2 / max(*along_the_flow, of_flow)
    W = start.repeat(len(setting.fractions), 1)
    rules = [GD(fraction * critical) for fraction in setting.fractions]
    done = descend(f.recorded(W), W, rules, 6000, until=until)
    fractions = (*setting.fractions, setting.slow / critical)
    ends, reached = torch.cat([done.weights, slow.weights]), (*done.reached.tolist(), *slow.reached.tolist())
    outputs = stack(ends, data.test_x)
    tests = 0.5 * (outputs - data.test_y).square().sum(2).mean(1)
    hits = (outputs.argmax(2) == data.test_labels).double().mean(1)
    for i in [i for i in np.argsort(fractions) if reached[i]]:
        top = _sharpness(f, ends[i])
        log.append(
            run=setting.run if i < len(done.weights) else f"{setting.run}, flow",
            seed=seed,
            share=fractions[i],
            norm=ends[i].norm().item(),
            l1=ends[i].abs().sum().item(),
            sharp_over=top / of_flow,
            test=tests[i].item(),
            accuracy=hits[i].item(),
            stability_ratio=top * fractions[i] * critical / 2,
        )


def _sharpness(f: BatchedRuns, w: Tensor, rtol: float = 1e-3) -> float:
    """Compute λ1 of the Hessian; its error is of order rtol²."""
    return lanczos(f.operator(w), rtol=rtol).values[0].item()


STARTS, NETWORK, ON_MNIST = run("starts"), run("network"), run("MNIST")
MNIST_FLOW = run("MNIST, flow")
BEYOND = run("toy").where("share", lambda rate: rate > 1.03)

CLAIMS = (
    *under(
        TOY,
        comparison(
            "Below .9 η_c the norm is that of the flow (greatest relative distance of ‖(u, v)‖²)",
            STARTS["norm_apart"].max() <= 0.05,
        ),
        comparison(
            "Below .9 η_c the sharpness is that of the flow (greatest relative distance)",
            STARTS["sharp_apart"].max() <= 0.05,
        ),
        comparison("Beyond η_c the norm grows with the rate (rank correlation)", STARTS["norm_order"].min() >= 0.9),
        comparison(
            "Beyond η_c the sharpness falls with the rate (rank correlation)", STARTS["sharp_order"].max() <= -0.9
        ),
        inequality(
            "Beyond η_c runs end at the edge of stability (sharpness·η/2, median of the starts, farthest from .955)",
            BEYOND["stability_ratio"].farthest_from(0.955).within(0.9, 1.01),
        ),
        comparison(
            "Single runs beyond η_c that end at the edge (share)",
            STARTS["at_edge"].mean() >= 0.9,
            deciding=False,
            note="Just before the largest rate that converges, some runs jump past the edge to flatter solutions.",
        ),
        comparison(
            "Random teachers for whom a rate in between is better than both ends by a tenth (share)",
            STARTS["interior"].median() >= 0.5,
        ),
        identity(
            "Sharpness in closed form and by automatic derivatives (relative difference)",
            STARTS["apart"].max() <= 1e-10,
        ),
        identity(
            "It is the net with shared weights, β = w⊙w, at half of the rate (difference of β, median of the rates)",
            run("shared")["shared_off"].max() <= 1e-6,
        ),
        comparison(
            "The noise of its start changes little of that (relative difference of the norm, median of the rates)",
            run("shared")["shared_norm"].median() <= 0.05,
        ),
        control(
            "For the teacher of least norm the smallest rate is best (least error over that at it)",
            STARTS["least_norm"].min() >= 1,
        ),
    ),
    *under(
        NET,
        inequality(
            "Beyond η_c training ends at the edge of stability (sharpness·η/2, the farthest from 1)",
            NETWORK.where("share", lambda rate: rate > 1)["stability_ratio"].farthest_from(1).within(0.9, 1.1),
        ),
        comparison(
            "The larger the rate, the larger the norm (rank correlation)",
            NETWORK.reduce(spearman, "share", "norm") >= 0.9,
        ),
        control(
            "Below η_c the sharpness is that of the flow (greatest relative distance)",
            abs(NETWORK.where("share", lambda rate: rate < 1)["sharp_over"] - 1).max() <= 0.05,
        ),
        wider_claim(
            "A rate in between has the least test loss, by a tenth (least over that at the better end)",
            NETWORK["test"].reduce(gain) <= 0.9,
        ),
    ),
    *under(
        MNIST,
        inequality(
            "Beyond η_c training ends at the edge of stability (sharpness·η/2, the farthest from 1)",
            ON_MNIST.where("share", lambda rate: rate > 1)["stability_ratio"].farthest_from(1).within(0.9, 1.15),
        ),
        comparison(
            "The larger the rate, the larger the ℓ₁ norm (rank correlation)",
            ON_MNIST.reduce(spearman, "share", "l1") >= 0.9,
        ),
        scaling(
            "Beyond η_c the ℓ₁ norm is about linear in the rate (R² of a line)",
            ON_MNIST.where("share", lambda rate: rate > 1).reduce(lambda x, y: line(x, y).r2, "share", "l1") >= 0.95,
        ),
        control(
            "Below η_c the ℓ₁ norm does not depend on the rate (relative difference)",
            abs(ON_MNIST["l1"].first() / MNIST_FLOW["l1"].last() - 1) <= 0.05,
        ),
        wider_claim(
            "The test loss has the form of a U: a rate in between has the least (least over that at the better end)",
            joined(MNIST_FLOW["test"], ON_MNIST["test"]).reduce(gain) <= 0.99,
        ),
        wider_claim(
            "By a tenth, as in the toy (the same ratio)",
            joined(MNIST_FLOW["test"], ON_MNIST["test"]).reduce(gain) <= 0.9,
        ),
    ),
)

LABELS = {
    "share": "learning rate over η_c",
    "norm": "norm",
    "over": "over the flow's",
    "stability_ratio": "sharpness·η/2",
    "error": "‖β - β*‖²",
    "test": "test loss",
    "l1": "ℓ₁ norm",
}
OLD_FIELDS = {"shares": "fractions"}
OLD_COLUMNS = {"edge": "stability_ratio", "shown_share": "share", "shown_over": "over", "shown_error": "error"}

CHARTS = labelled(
    LABELS,
    *under(
        TOY,
        Chart(
            "conflict",
            "Norm and sharpness against the rate",
            rank=1,
            x="share",
            y="over",
            runs=tuple(OVER_FLOW),
            repeats="first",
            lines=((1.0, "gradient flow"),),
            markers=True,
            caption=(
                "Up to η_c nothing depends on the rate; beyond it sharpness falls, norm grows.  Medians over starts."
            ),
        ),
        Chart(
            "teachers",
            "Error for three teachers",
            x="share",
            y="error",
            runs=tuple(TEACHERS),
            repeats="first",
            markers=True,
            caption=(
                "Whose weight is all on one coordinate: smallest x, third, largest.  One start; the last rates jump."
            ),
        ),
    ),
    *under(
        NET,
        Chart(
            "edge",
            "Distance to the edge",
            x="share",
            y="stability_ratio",
            runs=("network", "toy"),
            repeats="first",
            lines=((1.0, "edge of stability"),),
            markers=True,
            caption="Beyond η_c the final sharpness is 2/η, below it that of the flow.",
        ),
        Chart(
            "net-norm",
            "Norm of the network",
            x="share",
            y="norm",
            runs=("network",),
            repeats="first",
            markers=True,
            caption="The norm of all weights when the training loss has reached .01.",
        ),
        Chart(
            "net-test",
            "Test loss of the network",
            x="share",
            y="test",
            runs=("network",),
            repeats="first",
            markers=True,
            caption="Reported: mostly the largest rates do best here, and none in between by much.",
        ),
    ),
    *under(
        MNIST,
        Chart(
            "mnist-norm",
            "ℓ₁ norm on MNIST",
            x="share",
            y="l1",
            runs=("MNIST", "MNIST, flow"),
            repeats="first",
            markers=True,
            rank=2,
            caption="The norm of all weights when the training loss has reached .05: about linear beyond η_c.",
        ),
        Chart(
            "mnist-test",
            "Test loss on MNIST",
            x="share",
            y="test",
            runs=("MNIST", "MNIST, flow"),
            repeats="first",
            markers=True,
            rank=3,
            caption="Reported: a U whose arms are some percent high.",
        ),
    ),
)
