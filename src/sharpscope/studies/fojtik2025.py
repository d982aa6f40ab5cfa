"""The learning rate trades the norm of the weights against their sharpness.

Small learning rates follow the gradient flow, to solutions of small norm; beyond a critical rate the edge of stability
sets in, and the larger the rate, the flatter the solution and the larger its norm.  Both cannot be least at once, and
which bias generalizes better depends on the teacher: for most teachers of a diagonal linear net the best rate lies in
between.  Here one datum and six weights show it, where both extremes are known in closed form, and a small tanh network
on digits.  The control is the teacher that has the least norm itself: for it no rate beats the smallest.

β = u⊙v, loss ½ (⟨x, β⟩ - y)², one datum x > 0.  Where the loss is zero,

    sharpness = Σ x_i² (u_i² + v_i²)  (= 2 Σ x_i² |β_i| for u = v),     ½ ‖(u, v)‖² ≥ ‖β‖₁
    least norm: all on the largest x_i          least sharpness: all on the smallest x_i

η_c = 2/(largest sharpness along the gradient flow).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..claims import WIDER, Claim, at_least, at_most, within
from ..eigen import lanczos
from ..history import Track
from ..replicas import Replicas, descend
from ..rules import GD
from ._data import flat_digits
from ._deep import Stack
from ._fields import demand_positive
from ._ode import flow
from ._page import charting, claiming
from ._stats import Observer, by_seed, last, spearman
from ._study import Job, Report

PAPER = (
    "Fojtik, Matveev, Chou, Kutyniok & Maly, Conflicting Biases at the Edge of Stability: Norm versus Sharpness"
    " Regularization (arXiv 2505.21423)"
)
TOY, NET = "A diagonal net with one datum", "A network on digits"
Array = NDArray[np.float64]
X = np.linspace(0.4, 2, 6)
OVER = ("norm ‖(u, v)‖²", "sharpness")
TEACHERS = {"least sharp": 0, "in between": 2, "least norm": 5}  # all of β on one coordinate


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 3
    rates: int = 60  # learning rates of the toy, from .1 to 1.95 η_c
    steps: int = 20000
    teachers: int = 2000
    shares: tuple[float, ...] = (0.5, 0.9, 1.3, 1.8, 2.5, 3.2, 4.0, 5.0)  # of η_c, for the network
    target: float = 1e-2  # its training loss

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(repeats=1)


def jobs(config: Config) -> list[Job]:
    seeds = range(config.seed, config.seed + config.repeats)
    works = {"toy": (_toy, 4), "network": (_network, 20)}
    return [
        Job(f"{name}, seed {s}", work, {"seed": s, "config": config}, cost)
        for s in seeds
        for name, (work, cost) in works.items()
    ]


def losses(W: Tensor) -> Tensor:
    """``½ (⟨x, u⊙v⟩ - 1)²`` ``(R,)`` of weights (u, v) ``(R, 12)``."""
    u, v = W.split(len(X), dim=1)
    return 0.5 * ((u * v) @ torch.as_tensor(X) - 1).square()


def sharpness(w: Array) -> float:
    """λ1 of the Hessian of the toy at w ``(12,)``, in closed form: two 2×2 blocks a coordinate and one rank."""
    u, v = w.reshape(2, -1)
    slope = np.concatenate([X * v, X * u])
    cross = (X @ (u * v) - 1) * np.diag(X)
    return float(np.linalg.eigvalsh(np.outer(slope, slope) + np.block([[0 * cross, cross], [cross, 0 * cross]]))[-1])


def flow_field(w: Array) -> Array:
    """``-∇L``."""
    u, v = w.reshape(2, -1)
    return np.asarray(-(X @ (u * v) - 1) * np.concatenate([X * v, X * u]))


def _toy(track: Track, report: Report, seed: int, config: Config) -> None:
    """Gradient descent at all rates side by side, against the flow from the same start."""
    track.resume()
    start = 0.05 + 1e-3 * np.random.default_rng([921, seed]).standard_normal(2 * len(X))
    path = flow(flow_field, start, 1e4, residual=lambda w: float(abs(X @ (w[:6] * w[6:]) - 1)), small=1e-10)
    critical = 2 / max(map(sharpness, path.states))
    end = path.end
    norm, sharp = float(end @ end), sharpness(end)
    W = torch.as_tensor(start).expand(config.rates, -1)
    track.append(run="toy, two ways", seed=seed, apart=_two_ways(W[:1]))
    shares = np.linspace(0.1, 1.95, config.rates)
    rules = [GD(float(s * critical)) for s in shares]
    done = descend(Replicas(losses).recorded(W), W, rules, config.steps, until=lambda loss: loss < 0.5e-18)
    kept = done.reached.numpy()
    ends, shares = done.weights.numpy()[kept], shares[kept]
    beta = ends[:, :6] * ends[:, 6:]
    errors = {name: _errors(beta, np.eye(6)[i] / X[i]) for name, i in TEACHERS.items()}
    for i, (share, w) in enumerate(zip(shares, ends, strict=True)):
        row = {"share": float(share), "norm": float(w @ w), "sharpness": sharpness(w)}
        row |= {"norm_over": row["norm"] / norm, "sharp_over": row["sharpness"] / sharp}
        row |= {"edge": row["sharpness"] * float(share) * critical / 2, "flow_sharpness": sharp}
        track.append(run="toy", seed=seed, **row, **_shown(row, seed, config))
        if seed == config.seed:
            for name, column in zip(OVER, ("norm_over", "sharp_over"), strict=True):
                track.append(run=name, shown_share=float(share), shown_over=row[column])
            for name, e in errors.items():
                track.append(run=name, shown_share=float(share), shown_error=float(e[i]))
    draws = np.random.default_rng([922, seed]).dirichlet(np.ones(6), config.teachers) / X
    each = np.array([_gain(_errors(beta, b)) for b in draws])
    least, middle = (_gain(errors[name]) for name in ("least norm", "in between"))
    track.append(run="teachers", seed=seed, interior=float((each <= 0.9).mean()), least_norm=least, middle=middle)
    report(1.0)


def _two_ways(W: Tensor) -> float:
    """Sharpness in closed form and from automatic second derivatives (relative difference)."""
    dense = torch.linalg.eigvalsh(Replicas(losses).hessian(W)[0])[-1].item()
    return abs(sharpness(W[0].numpy()) / dense - 1)


def _errors(beta: Array, teacher: Array) -> Array:
    """``‖β - β*‖²`` for each rate."""
    return np.asarray(np.square(beta - teacher).sum(1))


def _gain(errors: Array) -> float:
    """Least error over that of the better end of the range of rates: one where no rate in between is better."""
    return float(errors.min() / min(errors[0], errors[-1]))


def _shown(row: dict[str, float], seed: int, config: Config) -> dict[str, float]:
    """What is drawn, of the first repeat."""
    return {f"shown_{name}": value for name, value in row.items() if seed == config.seed}


def net_losses(stack: Stack, x: Tensor, y: Tensor, W: Tensor) -> Tensor:
    """``½ mean ‖f - y‖²`` ``(R,)``."""
    return 0.5 * (stack(W, x) - y).square().sum(2).mean(1)


def _network(track: Track, report: Report, seed: int, config: Config) -> None:
    """64→24→24→10 with tanh on 150 digits to a training loss of .01, from one start at all rates."""
    track.resume()
    data, stack = flat_digits(150, 1000, 4.0, seed), Stack(64, 24, 2, 10, activation="tanh")
    f = Replicas(partial(net_losses, stack, data.x, data.y))
    start = stack.draw(1, [923, seed], variance=1.0)
    along: list[float] = []

    def watch(t: int, W: Tensor, loss: Tensor, g: Tensor) -> None:
        if t % 400 == 0:
            along.append(_top(f, W[0], 1e-2))
            report(min(t / 7000, 1) / 2)

    def arrived(loss: Tensor) -> Tensor:
        return loss <= config.target

    slow = descend(f.recorded(start), start, GD(0.06), config.steps, until=arrived, watch=watch)
    sharp = _top(f, slow.weights[0])
    critical = 2 / max(*along, sharp)
    W = start.repeat(len(config.shares), 1)
    done = descend(f.recorded(W), W, [GD(s * critical) for s in config.shares], 6000, until=arrived)
    tests = Replicas(partial(net_losses, stack, data.test_x, data.test_y)).value(done.weights).tolist()
    for share, w, ok, test in zip(config.shares, done.weights, done.reached, tests, strict=True):
        if ok:
            top = _top(f, w)
            row = {"share": share, "norm": w.norm().item(), "sharpness": top, "test": test}
            row |= {"edge": top * share * critical / 2, "sharp_over": top / sharp}
            track.append(run="network", seed=seed, **row, **_shown(row, seed, config))


def _top(f: Replicas, w: Tensor, rtol: float = 1e-3) -> float:
    """λ1 of the Hessian; its error is of order rtol²."""
    return lanczos(f.operator(w), rtol=rtol).values[0].item()


def _flow_regime(run: str, column: str) -> Observer:
    """Greatest relative distance from the flow's value below .9 η_c (the network's rate at .9 included)."""
    return by_seed(run, lambda s, v: np.abs(v[s < 0.91] - 1).max(), "share", column)


def _beyond(run: str, reduce: Callable[[Array, Array], float], column: str, above: float = 1.03) -> Observer:
    """A number of the rates beyond η_c and a column."""
    return by_seed(run, lambda s, v: reduce(s[s > above], v[s > above]), "share", column)


def _farthest(centre: float) -> Callable[[Array, Array], float]:
    return lambda s, v: float(v[np.abs(v - centre).argmax()])


def _claims() -> Iterator[Claim]:
    claim = claiming(TOY)
    sentence = "Below .9 η_c the norm is that of the flow (greatest relative distance of ‖(u, v)‖²)"
    yield claim(sentence, _flow_regime("toy", "norm_over"), at_most(0.05), "comparison", "toy")
    sentence = "Below .9 η_c the sharpness is that of the flow (greatest relative distance)"
    yield claim(sentence, _flow_regime("toy", "sharp_over"), at_most(0.05), "comparison", "toy")
    sentence = "Beyond η_c the norm grows with the rate (rank correlation)"
    yield claim(sentence, _beyond("toy", spearman, "norm"), at_least(0.9), "comparison", "toy")
    sentence = "Beyond η_c the sharpness falls with the rate (rank correlation)"
    yield claim(sentence, _beyond("toy", spearman, "sharpness"), at_most(-0.9), "comparison", "toy")
    sentence = "Beyond η_c runs end at the edge of stability (sharpness·η/2, the farthest from .955)"
    note = "On some seeds one rate in thirty, from 1.7 η_c on, is thrown to a flatter solution and leaves the edge."
    edge = _beyond("toy", _farthest(0.955), "edge")
    yield claim(sentence, edge, within(0.9, 1.01), "inequality", "toy", note=note)
    sentence = "… and most rates do on every draw (median of sharpness·η/2)"
    typical = _beyond("toy", lambda s, v: float(np.median(v)), "edge")
    yield claim(sentence, typical, within(0.9, 1.01), "inequality", "toy", aside=True)
    sentence = "Random teachers for whom a rate in between is better than both ends by a tenth (share)"
    yield claim(sentence, last("teachers", "interior"), at_least(0.5), "comparison", "teachers")
    sentence = "Sharpness in closed form and by automatic derivatives (relative difference)"
    yield claim(sentence, last("toy, two ways", "apart"), at_most(1e-10), "identity", "toy, two ways")
    sentence = "For the teacher of least norm no rate is better than the smallest (least error over that at it)"
    yield claim(sentence, last("teachers", "least_norm"), at_least(0.9), "negative control", "teachers")
    claim = claiming(NET)
    sentence = "Beyond η_c training ends at the edge of stability (sharpness·η/2, the farthest from 1)"
    yield claim(sentence, _beyond("network", _farthest(1), "edge", 1.0), within(0.9, 1.1), "inequality", "network")
    sentence = "Beyond η_c the norm grows with the rate (rank correlation over all rates)"
    yield claim(sentence, _beyond("network", spearman, "norm", 0), at_least(0.9), "comparison", "network")
    sentence = "Below η_c the sharpness is that of the flow (greatest relative distance)"
    yield claim(sentence, _flow_regime("network", "sharp_over"), at_most(0.05), "negative control", "network")
    sentence = "A rate in between has the least test loss, by a tenth (least over that at the better end)"
    yield claim(sentence, _beyond("network", lambda s, v: _gain(v), "test", 0), at_most(0.9), WIDER, "network")


CLAIMS = tuple(_claims())
LABELS = {
    "shown_share": "learning rate over η_c",
    "shown_norm": "norm",
    "shown_over": "over the flow's",
    "shown_edge": "sharpness·η/2",
    "shown_error": "‖β - β*‖²",
    "shown_test": "test loss",
}
CAPTIONS = {
    "conflict": "Up to η_c nothing depends on the rate; beyond it the sharpness falls and the norm grows.  Near the end"
    " a few runs are thrown to other solutions, and the largest rates diverge and are left out.",
    "teachers": "Whose weight is all on one coordinate: the smallest x, the third, the largest.",
    "edge": "Beyond η_c the final sharpness is 2/η, below it that of the flow.",
    "net-norm": "The norm of all weights when the training loss has reached .01.",
    "net-test": "Reported: mostly the largest rates do best here, and none in between by much.",
}
toy_chart, net_chart = (charting(part, LABELS, CAPTIONS) for part in (TOY, NET))
AT, EDGE = "shown_share", ((1.0, "edge of stability"),)
CHARTS = (
    toy_chart("conflict", "Norm and sharpness", AT, "shown_over", OVER, markers=True, lines=((1.0, "gradient flow"),)),
    toy_chart("teachers", "Error for three teachers", AT, "shown_error", tuple(TEACHERS), markers=True),
    net_chart(
        "edge", "Distance to the edge", AT, "shown_edge", ("network", "toy"), markers=True, lines=((1.0, "edge"),)
    ),
    net_chart("net-norm", "Norm of the network", AT, "shown_norm", ("network",)),
    net_chart("net-test", "Test loss of the network", AT, "shown_test", ("network",)),
)
