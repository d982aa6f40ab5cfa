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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...optimizers.adaptive import Adam
from ...optimizers.descend import descend
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import line
from .._framework.observe_old import Observer, by_seed, less, worst
from .._framework.study import Job, Progress
from .._shared.data import flat_digits
from .._shared.deep import Stack, hash_of, largest, log_norms, losses, two_ways

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
    """What turns; the defaults are the full study."""

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
    out = []
    for seed in range(config.seed, config.seed + config.repeats):
        own = {"seed": seed, "config": config}
        for act in ("relu", "tanh"):
            out.append(Job(f"prefix, {act}, seed {seed}", _prefix, {"activation": act, **own}, config.weights))
        out.append(Job(f"depth, seed {seed}", _depth, own, 2 * config.weights))
        for gain in (1.0, 2.0) if config.trained else (2.0,):
            for kind in KINDS:
                arguments = {"gain": gain, "kind": kind, **own}
                out.append(Job(f"curvature, c = {gain:g}, {kind}, seed {seed}", _curvature, arguments, 3))
        for depth, gain in TRAINED if config.trained else ():
            arguments = {"depth": depth, "gain": gain, **own}
            out.append(Job(f"training, L = {depth}, c = {gain:g}, seed {seed}", _train, arguments, 2 * depth))
    return out


def _row(log: RunLog, run: str, seed: int, config: Config, place: float, norms: Tensor, bound: Tensor) -> None:
    """Median over inputs, mean over weights; those of the first repeat are drawn."""
    size, upper = (v.median(dim=1).values.mean().item() for v in (norms, bound))
    shown = {"at": place, "shown": size, "shown_bound": upper} if seed == config.seed else {}
    log.append(run=run, seed=seed, place=place, size=size, bound=upper, above=(norms - bound).max().item(), **shown)


def _prefix(log: RunLog, progress: Progress, activation: str, seed: int, config: Config) -> None:
    """Normalizers in the first k layers, k = 0.. depth; for ReLU at gain 2 also in k random ones."""
    log.resume()
    x = _inputs(seed, config)
    rng = np.random.default_rng([911, seed])
    for gain in GAINS:
        for k in range(config.depth + 1):
            stack = _stack(config, range(1, k + 1), activation)
            W = stack.draw(config.weights, [912, seed, round(10 * gain)], gain)
            _row(log, f"{activation}, c = {gain:g}", seed, config, k, *log_norms(stack, W, x))
            if activation == "relu" and gain == 2:
                others = [_stack(config, (rng.permutation(config.depth)[:k] + 1).tolist()) for _ in W]
                each = [log_norms(other, w[None], x) for other, w in zip(others, W, strict=True)]
                norms, bound = (torch.cat(v) for v in zip(*each, strict=True))
                _row(log, "random places, c = 2", seed, config, k, norms, bound)
                if k == config.depth // 2:
                    log.append(run="two ways", seed=seed, apart=two_ways(others[0], W[:1], x[:4]))
        progress(GAINS.index(gain) / 4)


def _stack(config: Config, normalized: object, activation: str = "relu") -> Stack:
    places = frozenset(normalized)  # type: ignore[call-overload]
    return Stack(config.width, config.width, config.depth, norm="LN", normalized=places, activation=activation)


def _inputs(seed: int, config: Config) -> Tensor:
    draw = torch.Generator().manual_seed(hash_of([910, seed]))
    return torch.randn(32, config.width, generator=draw, dtype=torch.float64)


def _depth(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Depth by depth, without normalizers and with one in every layer."""
    log.resume()
    x = _inputs(seed, config)
    for gain in GAINS:
        for depth in DEPTHS:
            for kind, places in (("plain", ()), ("LN", range(1, depth + 1))):
                stack = replace(_stack(config, places), depth=depth)
                W = stack.draw(config.weights, [913, seed, depth, round(10 * gain)], gain)
                _row(log, f"{kind}, c = {gain:g}", seed, config, depth, *log_norms(stack, W, x))


def _curvature(log: RunLog, progress: Progress, gain: float, kind: str, seed: int, config: Config) -> None:
    """Largest |eigenvalue| of the Hessian at the start on 300 digits, to a few percent, and the gradient."""
    log.resume()
    data = flat_digits(300, 1000, 8.0, seed)
    for depth in config.curved:
        stack = Stack(64, 48, depth, 10, norm=KINDS[kind])
        f = BatchedRuns(partial(losses, stack, data.x, data.y))
        W = stack.draw(2, [914, seed, depth], gain)
        logs = []
        for w in W:
            logs.append(np.log(largest(f, w)))
        size = float(np.mean(logs))
        row = {"curvature": size, "gradient": f.grad(W).norm(dim=1).log().mean().item()}
        shown = {"at": depth, "shown_curvature": size} if seed == config.seed else {}
        log.append(run=f"curvature, {kind}, c = {gain:g}", seed=seed, place=depth, **row, **shown)


def _train(log: RunLog, progress: Progress, depth: int, gain: float, seed: int, config: Config) -> None:
    """300 full-batch steps of Adam, at the rate of least training loss: deviations and Jacobians after it."""
    log.resume()
    data = flat_digits(300, 1000, 8.0, seed)
    row = {"seed": seed, "place": depth, "gain": gain}
    sizes = {}
    for kind, norm in KINDS.items():
        stack = Stack(64, 48, depth, 10, norm=norm)
        W = stack.draw(1, [915, seed, depth], gain).repeat(len(RATES), 1)
        found = descend(BatchedRuns(partial(losses, stack, data.x, data.y)).slope, W, [Adam(r) for r in RATES], 300)
        best = found.weights[found.losses.nan_to_num(torch.inf).argmin()][None]
        norms = torch.linalg.matrix_norm(stack.jacobian(best, data.test_x[:100]), 2)
        hits = (stack(best, data.test_x)[0].argmax(1) == data.test_labels).double().mean().item()
        sizes[kind] = norms.median().item(), norms.max().item()
        log.append(run=f"trained, {kind}", accuracy=hits, median=sizes[kind][0], largest=sizes[kind][1], **row)
        if norm == "LN":
            row["deviation"] = stack.deviations(best, data.x).mean((1, 2)).min().item()
        progress(0.5)
    ratios = [a / b for a, b in zip(sizes["LN"], sizes["plain"], strict=True)]
    log.append(run="trained", median=ratios[0], largest=ratios[1], **row)


def _slope(run: str, column: str = "size", plus: float = 0.0) -> Observer:
    """Slope of a log, plus a number."""
    return by_seed(run, lambda a, b: line(a, b).slope + plus, "place", column)


claim, CONTROL = claiming(PART), "negative control"


def _claims() -> Iterator[Claim]:
    every = tuple(f"{act}, c = {c:g}" for act in ("relu", "tanh", "plain", "LN") for c in GAINS)

    def highest(h: object, config: object) -> tuple[float, ...]:
        return tuple(worst(by_seed(run, max, "above"))(h, config) for run in every)  # type: ignore[arg-type,misc]

    sentence = "No Jacobian exceeds the bound by norms and deviations (greatest log of their ratio)"
    yield claim(sentence, worst(highest), at_most(1e-9), "inequality", *every)
    sentence = "Jacobians carried forward and automatic ones (relative difference)"
    yield claim(sentence, by_seed("two ways", max, "apart"), at_most(1e-10), "identity", "two ways")
    for c in (0.5, 2.0, 3.0):
        run, plus = f"relu, c = {c:g}", float(np.log(c))
        sentence = f"ReLU, c = {c:g}: each normalizer of a prefix divides ‖∂f/∂x‖ by c (slope of its log, plus log c)"
        yield claim(sentence, _slope(run, plus=plus), within(-0.1, 0.1), "scaling", run)
    sentence = "c = 2: with a normalizer in every layer depth does nothing (slope of log ‖∂f/∂x‖ a layer)"
    yield claim(sentence, _slope("LN, c = 2"), within(-0.1, 0.1), "scaling", "LN, c = 2")
    sentence = "c = 2: without normalizers it grows with depth (the same slope over log c)"
    grows = by_seed("plain, c = 2", lambda a, b: line(a, b).slope / np.log(2), "place", "size")
    yield claim(sentence, grows, at_least(0.8), "scaling", "plain, c = 2")
    for kind, criterion in (("plain", at_least(1)), ("LN", at_most(0.5))):
        run = f"curvature, {kind}, c = 2"
        sentence = (
            f"c = 2, {kind}: the curvature of the loss {'explodes' if kind == 'plain' else 'does not'} with depth"
        )
        sentence += " (slope of log largest |eigenvalue| a layer)"
        yield claim(sentence, _slope(run, "curvature"), criterion, "scaling", run)
    sentence = "After training every normalizer's input has a deviation above one (least, over nets and layers)"
    yield claim(sentence, by_seed("trained", min, "deviation"), at_least(1), "inequality", "trained")
    sentence = "After training the median ‖∂f/∂x‖ is smaller with normalizers (in so many of 4 nets)"
    smaller = by_seed("trained", lambda v: float((v < 1).sum()), "median")
    yield claim(sentence, smaller, at_least(3), "comparison", "trained")
    sentence = "c = 0.5: normalizers raise ‖∂f/∂x‖ (slope of its log)"
    yield claim(sentence, _slope("relu, c = 0.5"), at_least(0.1), CONTROL, "relu, c = 0.5")
    sentence = "c = 1: they change nothing (slope of its log)"
    yield claim(sentence, _slope("relu, c = 1"), within(-0.1, 0.1), CONTROL, "relu, c = 1")
    run = "random places, c = 2"
    sentence = "c = 2, at random places: the slope is not -log c (slope plus log c)"
    yield claim(sentence, _slope(run, plus=float(np.log(2))), at_least(0.1), CONTROL, run)
    sentence = "tanh, c = 2: each normalizer of a prefix divides ‖∂f/∂x‖ by c (slope of its log, plus log c)"
    yield claim(sentence, _slope("tanh, c = 2", plus=float(np.log(2))), within(-0.1, 0.1), WIDER, "tanh, c = 2")
    pair = ("curvature, LN, c = 1", "curvature, plain, c = 1")
    smoother = less(*(by_seed(run, np.mean, "curvature") for run in pair))
    sentence = "c = 1: the loss is smoother with normalizers too (log curvature less that without, mean over depth)"
    yield claim(sentence, smoother, at_most(0), WIDER, *pair)
    sentence = "c = 1: with normalizers the curvature does not grow with depth at all (slope of its log a layer)"
    yield claim(sentence, _slope(pair[0], "curvature"), at_most(0), WIDER, pair[0])
    sentence = "After training the largest ‖∂f/∂x‖ is smaller too (in so many of 4 nets)"
    tail = by_seed("trained", lambda v: float((v < 1).sum()), "largest")
    yield claim(sentence, tail, at_least(3), WIDER, "trained")


CLAIMS = tuple(_claims())
RELU = tuple(f"relu, c = {c:g}" for c in GAINS)
LABELS = {"at": "layers", "shown": "log ‖∂f/∂x‖", "shown_bound": "log of the bound", "shown_curvature": "log |λ|"}

CAPTIONS = {
    "prefix": "Layer normalization in the first k of 12 layers: each takes one gain c away, also where c < 1.  Median"
    " over inputs, mean over weights.",
    "places": "In the first layers the law is a line; at random places the last normalizer decides.",
    "bound": "The bound by norms and deviations falls alike, far above.",
    "depth": "At c = 2, a normalizer in every layer or none.",
    "curvature": "Largest |eigenvalue| of the Hessian at the start, on handwritten digits.  With normalizers gains of 1"
    " and 2 hardly differ.",
}
chart = charting(PART, LABELS, CAPTIONS)
CURVED = tuple(f"curvature, {kind}, c = {c}" for c in (2, 1) for kind in KINDS)

CHARTS = (
    chart("prefix", "Normalizers in the first layers", "at", "shown", RELU),
    chart("places", "Where they are matters", "at", "shown", ("relu, c = 2", "random places, c = 2", "tanh, c = 2")),
    chart("bound", "The bound", "at", "shown_bound", RELU),
    chart(
        "depth", "Jacobians with depth", "at", "shown", ("plain, c = 2", "LN, c = 2", "plain, c = 0.5", "LN, c = 0.5")
    ),
    chart("curvature", "Curvature with depth", "at", "shown_curvature", CURVED),
)
