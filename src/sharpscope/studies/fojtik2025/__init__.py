"""The learning rate trades the norm of the weights against their sharpness.

Small learning rates follow the gradient flow, to solutions of small norm; beyond a critical rate the edge of stability
sets in, and the larger the rate, the flatter the solution and the larger its norm.  Both cannot be least at once, and
which bias generalizes better depends on the teacher: for most teachers of a diagonal linear net the best rate lies in
between.  Here one datum and six weights show it, where both extremes are known in closed form, and a small tanh network
on digits.  The control is the teacher that has the least norm itself: for it no rate beats the smallest.

    β = u⊙v,   loss ½ (⟨x, β⟩ - 1)²,   at zero loss and u = v:  λ1 = 2 Σ x_i² |β_i|,  ½ ‖(u, v)‖² = ‖β‖₁
    critical rate η_c = 2/(largest λ1 along the gradient flow);   edge of stability: λ1·η/2 = 1
"""

from collections.abc import Callable, Iterator
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
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import spearman
from .._framework.observe_old import Observer, by_seed
from .._framework.study import Job, Progress
from .._shared.data import flat_digits
from .._shared.deep import Stack, losses
from .datum import Array, X, dense, errors, gain, product, sharpness, summary, sweep

PAPER = (
    "Fojtik, Matveev, Chou, Kutyniok & Maly, Conflicting Biases at the Edge of Stability: Norm versus Sharpness"
    " Regularization (arXiv 2505.21423)"
)
TOY, NET = "A diagonal net with one datum", "A network on digits"
OVER = {"norm ‖(u, v)‖²": "norm_over", "sharpness": "sharp_over"}
TEACHERS = {"least sharp": 0, "in between": 2, "least norm": 5}  # all of β on one coordinate


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 3
    starts: int = 31  # of the toy, in each repeat
    rates: int = 60  # its learning rates, from .1 to 1.95 η_c
    steps: int = 20000
    teachers: int = 2000
    shares: tuple[float, ...] = (0.5, 0.9, 1.3, 1.8, 2.5, 3.2, 4.0, 5.0)  # of η_c, for the network
    target: float = 1e-2  # its training loss

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(repeats=1)


def jobs(config: Config) -> list[Job]:
    seeds = range(config.seed, config.seed + config.repeats)
    works = (("toy", _toy, 3.0), ("network", _network, 20.0))
    return [Job(f"{name}, seed {s}", w, {"seed": s, "config": config}, cost) for s in seeds for name, w, cost in works]


def _toy(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Gradient descent from all starts at all rates side by side, against the flow from the same starts."""
    log.resume()
    starts = 0.05 + 1e-3 * np.random.default_rng([921, seed]).standard_normal((config.starts, 2 * len(X)))
    shares = np.linspace(0.1, 1.95, config.rates)
    runs = sweep(starts, shares, config.steps)
    for i in np.flatnonzero(2 * runs.kept.sum(0) > len(starts)):  # rates at which most converge
        columns = {"norm_over": runs.norm, "sharp_over": runs.sharp, "stability_ratio": runs.stability_ratio}
        row = {name: float(np.median(v[runs.kept[:, i], i])) for name, v in columns.items()}
        log.append(run="toy", seed=seed, share=float(shares[i]), **row, **_shown(row, shares[i], seed, config))
        for name, column in OVER.items():
            log.append(run=name, **_shown({"over": row[column]}, shares[i], seed, config))
    draws = np.random.default_rng([922, seed]).dirichlet(np.ones(len(X)), config.teachers) / X
    for k, start in enumerate(starts):
        apart = float(abs(sharpness(start) / dense(start) - 1))
        log.append(run="starts", seed=seed, apart=apart, **summary(runs, k, shares, draws))
    ok = runs.kept[0]
    for name, j in TEACHERS.items():
        for share, e in zip(shares[ok], errors(product(runs.ends[0, ok]), np.eye(len(X))[j] / X[j]), strict=True):
            log.append(run=name, **_shown({"error": float(e)}, share, seed, config))
    progress(1.0)


def _shown(row: dict[str, float], share: float, seed: int, config: Config) -> dict[str, float]:
    """What is drawn, of the first repeat."""
    return {f"shown_{name}": v for name, v in {"share": float(share), **row}.items() if seed == config.seed}


def _network(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """64→24→24→10 with tanh on 150 digits to a training loss of .01, from one start at all rates."""
    log.resume()
    data, stack = flat_digits(150, 1000, 4.0, seed), Stack(64, 24, 2, 10, activation="tanh")
    f = BatchedRuns(partial(losses, stack, data.x, data.y))
    start = stack.draw(1, [923, seed], variance=1.0)
    along = list[float]()

    def watch(t: int, W: Tensor, loss: Tensor, g: Tensor) -> None:
        if t % 400 == 0:
            along.append(_top(f, W[0], 1e-2))
            progress(min(t / 7000, 1) / 2)

    until = partial(torch.ge, torch.tensor(config.target))
    slow = descend(f.recorded(start), start, GD(0.06), config.steps, until=until, watch=watch)
    sharp = _top(f, slow.weights[0])
    critical = 2 / max(*along, sharp)
    W = start.repeat(len(config.shares), 1)
    done = descend(f.recorded(W), W, [GD(s * critical) for s in config.shares], 6000, until=until)
    tests = BatchedRuns(partial(losses, stack, data.test_x, data.test_y)).value(done.weights).tolist()
    for share, w, ok, test in zip(config.shares, done.weights, done.reached, tests, strict=True):
        if ok:
            top = _top(f, w)
            row = {"norm": w.norm().item(), "sharp_over": top / sharp, "test": test}
            row["stability_ratio"] = top * share * critical / 2
            log.append(run="network", seed=seed, share=share, **row, **_shown(row, share, seed, config))


def _top(f: BatchedRuns, w: Tensor, rtol: float = 1e-3) -> float:
    """λ1 of the Hessian; its error is of order rtol²."""
    return lanczos(f.operator(w), rtol=rtol).values[0].item()


def _beyond(run: str, reduce: Callable[[Array], float], column: str, above: float) -> Observer:
    """A number of a column at the rates above so many η_c."""
    return by_seed(run, lambda share, v: reduce(v[share > above]), "share", column)


def _farthest(centre: float) -> Callable[[Array], float]:
    return lambda v: float(v[np.abs(v - centre).argmax()])


def _claims() -> Iterator[Claim]:
    claim, run = claiming(TOY), "starts"
    sentence = "Below .9 η_c the norm is that of the flow (greatest relative distance of ‖(u, v)‖²)"
    yield claim(sentence, by_seed(run, max, "norm_apart"), at_most(0.05), "comparison", run)
    sentence = "Below .9 η_c the sharpness is that of the flow (greatest relative distance)"
    yield claim(sentence, by_seed(run, max, "sharp_apart"), at_most(0.05), "comparison", run)
    sentence = "Beyond η_c the norm grows with the rate (rank correlation)"
    yield claim(sentence, by_seed(run, min, "norm_order"), at_least(0.9), "comparison", run)
    sentence = "Beyond η_c the sharpness falls with the rate (rank correlation)"
    yield claim(sentence, by_seed(run, max, "sharp_order"), at_most(-0.9), "comparison", run)
    sentence = "Beyond η_c runs end at the edge of stability (sharpness·η/2, median of the starts, farthest from .955)"
    yield claim(
        sentence, _beyond("toy", _farthest(0.955), "stability_ratio", 1.03), within(0.9, 1.01), "inequality", "toy"
    )
    sentence = "Single runs beyond η_c that end at the edge (share)"
    yield claim(sentence, by_seed(run, np.mean, "at_edge"), at_least(0.9), "comparison", run, aside=True, note=JUMP)
    sentence = "Random teachers for whom a rate in between is better than both ends by a tenth (share)"
    yield claim(sentence, by_seed(run, np.median, "interior"), at_least(0.5), "comparison", run)
    sentence = "Sharpness in closed form and by automatic derivatives (relative difference)"
    yield claim(sentence, by_seed(run, max, "apart"), at_most(1e-10), "identity", run)
    sentence = "For the teacher of least norm the smallest rate is best (least error over that at it)"
    yield claim(sentence, by_seed(run, min, "least_norm"), at_least(1), "negative control", run)
    claim, run = claiming(NET), "network"
    sentence = "Beyond η_c training ends at the edge of stability (sharpness·η/2, the farthest from 1)"
    yield claim(sentence, _beyond(run, _farthest(1), "stability_ratio", 1), within(0.9, 1.1), "inequality", run)
    sentence = "The larger the rate, the larger the norm (rank correlation)"
    yield claim(sentence, by_seed(run, spearman, "share", "norm"), at_least(0.9), "comparison", run)
    sentence = "Below η_c the sharpness is that of the flow (greatest relative distance)"
    apart = by_seed(run, lambda share, v: np.abs(v[share < 1] - 1).max(), "share", "sharp_over")
    yield claim(sentence, apart, at_most(0.05), "negative control", run)
    sentence = "A rate in between has the least test loss, by a tenth (least over that at the better end)"
    yield claim(sentence, by_seed(run, lambda v: float(gain(v)), "test"), at_most(0.9), WIDER, run)


JUMP = "Just before the largest rate that converges, some runs jump past the edge to flatter solutions."
CLAIMS = tuple(_claims())

LABELS = {
    "shown_share": "learning rate over η_c",
    "shown_norm": "norm",
    "shown_over": "over the flow's",
    "shown_stability_ratio": "sharpness·η/2",
    "shown_error": "‖β - β*‖²",
    "shown_test": "test loss",
}

CAPTIONS = {
    "conflict": "Up to η_c nothing depends on the rate; beyond it sharpness falls, norm grows.  Medians over starts.",
    "teachers": "Whose weight is all on one coordinate: smallest x, third, largest.  One start; the last rates jump.",
    "edge": "Beyond η_c the final sharpness is 2/η, below it that of the flow.",
    "net-norm": "The norm of all weights when the training loss has reached .01.",
    "net-test": "Reported: mostly the largest rates do best here, and none in between by much.",
}
AT, toy, net = "shown_share", charting(TOY, LABELS, CAPTIONS), charting(NET, LABELS, CAPTIONS)
FLOW, EDGE = ((1.0, "gradient flow"),), ((1.0, "edge of stability"),)

OLD_COLUMNS = {"edge": "stability_ratio", "shown_edge": "shown_stability_ratio"}

CHARTS = (
    toy("conflict", "Norm and sharpness against the rate", AT, "shown_over", tuple(OVER), lines=FLOW, markers=True),
    toy("teachers", "Error for three teachers", AT, "shown_error", tuple(TEACHERS), markers=True),
    net("edge", "Distance to the edge", AT, "shown_stability_ratio", ("network", "toy"), lines=EDGE, markers=True),
    net("net-norm", "Norm of the network", AT, "shown_norm", ("network",), markers=True),
    net("net-test", "Test loss of the network", AT, "shown_test", ("network",), markers=True),
)
