"""Normalizers undo the gain of the layers before them, exponentially in depth.

Without normalization the Lipschitz constant of a network in its inputs can grow exponentially with depth; normalizers
whose inputs have a large deviation σ divide it by σ each.  Here the Jacobians of random ReLU networks with gain c are
followed as layer normalizations are inserted, against the slope -log c a layer that homogeneity predicts and against
the bound by norms and deviations, and so is the curvature of the loss with depth.  The sign is that of log c: below one
normalization raises the Lipschitz constant, at one it does nothing, and normalizers at random places do not follow the
law, since the last one alone erases all gains before it.

    ‖∂f/∂x‖ ≤ ∏_l ‖W_l‖ · ∏_{l normalized} 1/σ_l(x),   σ = ‖z - z̄‖/√d             for activations of slope at most one
    log ‖∂f/∂x‖ = (depth - place of the last normalizer)·log c + O(1)              for ReLU, W_l = c·(He's start)

‖∂f/∂x‖ at single inputs is a lower estimate of the Lipschitz constant, the product of norms an upper one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...optimizers.adaptive import Adam
from ...optimizers.descend import descend
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.fits import slope
from .._framework.observe import Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.data import flat_digits
from .._shared.deep import Stack, jacobian_mismatch, largest_curvature, log_norms, losses
from .._shared.streams import stream

PAPER = (
    "Than, The Hidden Power of Normalization: Exponential Capacity Control in Deep Neural Networks (arXiv 2511.00958)"
)
PART = "Gain, depth and normalizers"
GAINS = (0.5, 1.0, 2.0, 3.0)
DEPTHS = (2, 4, 8, 12, 16, 24)
KINDS = {"plain": "none", "LN": "LN"}
TRAINED = tuple((depth, gain) for depth in (3, 6) for gain in (1.0, 2.0))
RATES = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    seed: int = 0
    repeats: int = 1
    weights: int = 5  # sets of weights, averaged over
    width: int = 32
    depth: int = 12  # where normalizers are inserted one by one
    curved: tuple[int, ...] = (2, 4, 6, 8)  # depths at which curvature is measured
    trained: bool = True  # also networks after training, and curvature at gain 1

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(trained=False)


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        for act in ("relu", "tanh"):
            arguments = {"activation": act, **common}
            found.append(Job(f"prefix, {act}, seed {seed}", _prefix, arguments, cost=config.weights))
        found.append(Job(f"depth, seed {seed}", _depth, common, cost=2 * config.weights))
        for gain in (1.0, 2.0) if config.trained else (2.0,):
            for kind in KINDS:
                arguments = {"gain": gain, "kind": kind, **common}
                found.append(Job(f"curvature, c = {gain:g}, {kind}, seed {seed}", _curvature, arguments, cost=3))
        for depth, gain in TRAINED if config.trained else ():
            arguments = {"depth": depth, "gain": gain, **common}
            found.append(Job(f"training, L = {depth}, c = {gain:g}, seed {seed}", _train, arguments, cost=2 * depth))
    return found


def _stack(config: Config, places: Iterable[int], activation: str = "relu") -> Stack:
    """A square network with normalizers in the layers `places`, the first of which is 1."""
    square = Stack(config.width, config.width, config.depth, activation=activation)
    return replace(square, norm="LN", normalized=frozenset(places))


def _inputs(seed: int, config: Config) -> Tensor:
    return torch.randn(32, config.width, generator=stream(910, seed), dtype=torch.float64)


def _summary(norms: Tensor, bound: Tensor) -> dict[str, float]:
    """Log norms of Jacobians and their bounds ``(R, n)``: median over inputs, mean over weights."""
    size, upper = (v.median(dim=1).values.mean().item() for v in (norms, bound))
    return {"size": size, "bound": upper, "above": (norms - bound).max().item()}


def _prefix(log: RunLog, progress: Progress, activation: str, seed: int, config: Config) -> None:
    """Normalizers in the first k layers, k = 0.. depth; for ReLU at gain 2 also in k random ones."""
    log.resume()
    x = _inputs(seed, config)
    rng = np.random.default_rng([911, seed])
    for number, gain in enumerate(GAINS, start=1):
        for k in range(config.depth + 1):
            stack = _stack(config, range(1, k + 1), activation)
            W = stack.draw(config.weights, [912, seed, round(10 * gain)], gain)
            row = _summary(*log_norms(stack, W, x))
            log.append(run=f"{activation}, c = {gain:g}", seed=seed, place=k, **row)
            if activation == "relu" and gain == 2:
                others = [_stack(config, (rng.permutation(config.depth)[:k] + 1).tolist()) for _ in W]
                pairs = [log_norms(other, w[None], x) for other, w in zip(others, W, strict=True)]
                norms, bound = (torch.cat(v) for v in zip(*pairs, strict=True))
                log.append(run="random places, c = 2", seed=seed, place=k, **_summary(norms, bound))
                if k == config.depth // 2:
                    log.append(run="two ways", seed=seed, apart=jacobian_mismatch(others[0], W[:1], x[:4]))
        progress(number / len(GAINS))


def _depth(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Depth by depth, without normalizers and with one in every layer."""
    log.resume()
    x = _inputs(seed, config)
    for gain in GAINS:
        for depth in DEPTHS:
            for kind, places in (("plain", ()), ("LN", range(1, depth + 1))):
                stack = replace(_stack(config, places), depth=depth)
                W = stack.draw(config.weights, [913, seed, depth, round(10 * gain)], gain)
                row = _summary(*log_norms(stack, W, x))
                log.append(run=f"{kind}, c = {gain:g}", seed=seed, place=depth, **row)


def _curvature(log: RunLog, progress: Progress, gain: float, kind: str, seed: int, config: Config) -> None:
    """Largest |eigenvalue| of the Hessian at the start on 300 digits, to a few percent, and the gradient."""
    log.resume()
    data = flat_digits(300, 1000, 8.0, seed)
    for depth in config.curved:
        stack = Stack(64, 48, depth, outputs=10, norm=KINDS[kind])
        f = BatchedRuns(partial(losses, stack, data.x, data.y))
        W = stack.draw(2, [914, seed, depth], gain)
        row = {
            "curvature": float(np.mean([np.log(largest_curvature(f, w)) for w in W])),
            "gradient": f.grad(W).norm(dim=1).log().mean().item(),
        }
        log.append(run=f"curvature, {kind}, c = {gain:g}", seed=seed, place=depth, **row)


def _train(log: RunLog, progress: Progress, depth: int, gain: float, seed: int, config: Config) -> None:
    """Deviations and Jacobians after 300 full-batch steps of Adam, at the rate of least training loss."""
    log.resume()
    data = flat_digits(300, 1000, 8.0, seed)
    row = {"seed": seed, "place": depth, "gain": gain}
    sizes = {}
    for kind, norm in KINDS.items():
        stack = Stack(64, 48, depth, outputs=10, norm=norm)
        W = stack.draw(1, [915, seed, depth], gain).repeat(len(RATES), 1)
        f = BatchedRuns(partial(losses, stack, data.x, data.y))
        found = descend(f.slope, W, [Adam(rate) for rate in RATES], 300)
        best = found.weights[found.losses.nan_to_num(torch.inf).argmin()][None]
        norms = torch.linalg.matrix_norm(stack.jacobian(best, data.test_x[:100]), 2)
        hits = (stack(best, data.test_x)[0].argmax(1) == data.test_labels).double().mean().item()
        sizes[kind] = norms.median().item(), norms.max().item()
        log.append(run=f"trained, {kind}", accuracy=hits, median=sizes[kind][0], largest=sizes[kind][1], **row)
        if norm == "LN":
            row["deviation"] = stack.deviations(best, data.x).mean((1, 2)).min().item()
        progress(0.5)
    median, largest = (a / b for a, b in zip(sizes["LN"], sizes["plain"], strict=True))
    log.append(run="trained", median=median, largest=largest, **row)


def _slope(name: str, column: str = "size") -> Quantity:
    """Slope of the log of a size over the number of layers."""
    return run(name).reduce(slope, "place", column)


def _num_smaller(column: str) -> Quantity:
    """Number of trained networks whose size with normalizers is below that without."""
    return run("trained")[column].reduce(lambda ratios: (ratios < 1).sum())


NORMS = [run(f"{kind}, c = {c:g}") for kind in ("relu", "tanh", "plain", "LN") for c in GAINS]

CLAIMS = under(
    PART,
    inequality(
        "No Jacobian exceeds the bound by norms and deviations (greatest log of their ratio)",
        joined(*(rows["above"].max() for rows in NORMS)).over_repeats(np.max) <= 1e-9,
    ),
    identity(
        "Jacobians carried forward and automatic ones (relative difference)", run("two ways")["apart"].max() <= 1e-10
    ),
    *(
        scaling(
            f"ReLU, c = {c:g}: each normalizer of a prefix divides ‖∂f/∂x‖ by c (slope of its log, plus log c)",
            (_slope(f"relu, c = {c:g}") + np.log(c)).within(-0.1, 0.1),
        )
        for c in (0.5, 2.0, 3.0)
    ),
    scaling(
        "c = 2: with a normalizer in every layer depth does nothing (slope of log ‖∂f/∂x‖ a layer)",
        _slope("LN, c = 2").within(-0.1, 0.1),
    ),
    scaling(
        "c = 2: without normalizers it grows with depth (the same slope over log c)",
        _slope("plain, c = 2") / np.log(2) >= 0.8,
    ),
    scaling(
        "c = 2, plain: the curvature of the loss explodes with depth (slope of log largest |eigenvalue| a layer)",
        _slope("curvature, plain, c = 2", "curvature") >= 1,
    ),
    scaling(
        "c = 2, LN: the curvature of the loss does not with depth (slope of log largest |eigenvalue| a layer)",
        _slope("curvature, LN, c = 2", "curvature") <= 0.5,
    ),
    inequality(
        "After training every normalizer's input has a deviation above one (least, over nets and layers)",
        run("trained")["deviation"].min() >= 1,
    ),
    comparison(
        "After training the median ‖∂f/∂x‖ is smaller with normalizers (in so many of 4 nets)",
        _num_smaller("median") >= 3,
    ),
    control("c = 0.5: normalizers raise ‖∂f/∂x‖ (slope of its log)", _slope("relu, c = 0.5") >= 0.1),
    control("c = 1: they change nothing (slope of its log)", _slope("relu, c = 1").within(-0.1, 0.1)),
    control(
        "c = 2, at random places: the slope is not -log c (slope plus log c)",
        _slope("random places, c = 2") + np.log(2) >= 0.1,
    ),
    wider_claim(
        "tanh, c = 2: each normalizer of a prefix divides ‖∂f/∂x‖ by c (slope of its log, plus log c)",
        (_slope("tanh, c = 2") + np.log(2)).within(-0.1, 0.1),
    ),
    wider_claim(
        "c = 1: the loss is smoother with normalizers too (log curvature less that without, mean over depth)",
        run("curvature, LN, c = 1")["curvature"].mean() - run("curvature, plain, c = 1")["curvature"].mean() <= 0,
    ),
    wider_claim(
        "c = 1: with normalizers the curvature does not grow with depth at all (slope of its log a layer)",
        _slope("curvature, LN, c = 1", "curvature") <= 0,
    ),
    wider_claim(
        "After training the largest ‖∂f/∂x‖ is smaller too (in so many of 4 nets)", _num_smaller("largest") >= 3
    ),
)

RELU = tuple(f"relu, c = {c:g}" for c in GAINS)
LABELS = {"place": "layers", "size": "log ‖∂f/∂x‖", "bound": "log of the bound", "curvature": "log |λ|"}

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "prefix",
            "Normalizers in the first layers",
            x="place",
            y="size",
            runs=RELU,
            repeats="first",
            caption="Layer normalization in the first k of 12 layers: each takes one gain c away, also where c < 1."
            "  Median over inputs, mean over weights.",
        ),
        Chart(
            "places",
            "Where they are matters",
            x="place",
            y="size",
            runs=("relu, c = 2", "random places, c = 2", "tanh, c = 2"),
            repeats="first",
            caption="In the first layers the law is a line; at random places the last normalizer decides.",
        ),
        Chart(
            "bound",
            "The bound",
            x="place",
            y="bound",
            runs=RELU,
            repeats="first",
            caption="The bound by norms and deviations falls alike, far above.",
        ),
        Chart(
            "depth",
            "Jacobians with depth",
            x="place",
            y="size",
            runs=("plain, c = 2", "LN, c = 2", "plain, c = 0.5", "LN, c = 0.5"),
            repeats="first",
            caption="At c = 2, a normalizer in every layer or none.",
        ),
        Chart(
            "curvature",
            "Curvature with depth",
            x="place",
            y="curvature",
            runs=tuple(f"curvature, {kind}, c = {c}" for c in (2, 1) for kind in KINDS),
            repeats="first",
            caption="Largest |eigenvalue| of the Hessian at the start, on handwritten digits.  With normalizers gains"
            " of 1 and 2 hardly differ.",
        ),
    ),
)
