"""In deep random networks gradients and curvature vanish together, and gradient descent waits.

With He's or Xavier's start the variance of what a deep network computes is kept, but its median is not: unless the
width grows with the depth, typical outputs, gradients and Hessians fall exponentially.  Gradient descent then sits on a
plateau as long as the curvature is small, while adaptive methods walk off it, and residuals or layer normalization
prevent it.  Here chains of single weights, the forward pass and small ReLU networks are held against exact laws, and
chains are trained until they escape.  Wide networks, residuals and layer normalization are the controls, where nothing
may vanish.

    chain  f = ∏ w_i, w ~ N(0, 1):  E f² = 1, but E log|w| = -(γ + ln 2)/2 = -.635 a layer
    ReLU, He, width d:  ‖h_l‖² = ‖h_{l-1}‖² Y,  Y = (2/d) χ²_k, k ~ Bin(d, ½):  E Y = 1, Var Y = 5/d,
                        E log Y = E[ψ(k/2)] + ln(4/d) for k ≥ 1:  about -5/(2d) a layer
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ...autodiff.batched import BatchedRuns
from ...optimizers.adaptive import Adam
from ...optimizers.base import UpdateRule
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import line
from .._framework.observe_old import Observer, by_seed, last, over, together
from .._framework.study import Job, Progress
from .._shared.deep import Stack, hash_of, largest, losses
from .normalized_gd import NormalizedGD
from .starts import chain_derivatives, chain_losses, chain_two_ways, forward, forward_two_ways, law, sample

PAPER = (
    "Orvieto, Kohler, Pavllo, Hofmann & Lucchi, Vanishing Curvature and the Power of Adaptive Methods in Randomly"
    " Initialized Deep Networks (arXiv 2106.03763)"
)
PART = "Vanishing gradients and curvature"

NETS = {
    "d = 8": Stack(8, 8, 1, 1),
    "d = 16": Stack(8, 16, 1, 1),
    "d = 32": Stack(8, 32, 1, 1),
    "layer norm": Stack(8, 8, 1, 1, norm="LN"),
    "residual": Stack(8, 8, 1, 1, residual=True),
    "batch norm": Stack(8, 8, 1, 1, norm="BN"),
}

RATES: dict[str, tuple[type[UpdateRule], tuple[float, ...]]] = {
    "GD": (GD, (0.01, 0.1, 0.3, 1, 3)),
    "Adam": (Adam, (1e-3, 1e-2, 3e-2)),
    "normalized GD": (NormalizedGD, (1e-2, 3e-2, 1e-1)),
}
CHAIN = ("|f|", "‖∇L‖", "largest |λ|")
FORWARD = {f"forward, d = {d}": d for d in (8, 16, 32, 64)}
WIDE = tuple(run for run, d in FORWARD.items() if d >= 16)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 1
    chains: int = 2000
    forward: int = 4000  # sets of weights for the forward law
    nets: int = 20  # for gradients; half as many for curvature
    depths: tuple[int, ...] = (4, 8, 12, 16, 24)  # of the chains that are trained; 8 and 16 are compared
    steps: int = 5000
    trained: bool = True  # also networks of width 12

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(depths=(4, 8, 12, 16), trained=False)


def jobs(config: Config) -> list[Job]:
    out = []
    for seed in range(config.seed, config.seed + config.repeats):
        own = {"seed": seed, "config": config}
        out += [Job(f"chains, seed {seed}", _chains, own, 1), Job(f"forward, seed {seed}", _forward, own, 2)]
        out += [Job(f"{name}, seed {seed}", _net, {"name": name, **own}, 3) for name in NETS]
        out += [Job(f"escape, L = {L}, seed {seed}", _escape, {"depth": L, **own}, 3) for L in config.depths]
        for L in (4, 16, 32) if config.trained else ():
            out.append(Job(f"training, L = {L}, seed {seed}", _train, {"depth": L, **own}, L / 8))
    return out


def _row(log: RunLog, run: str, seed: int, config: Config, **values: float) -> None:
    """A row for the claims; those of the first repeat are drawn as well (columns ``shown_…``)."""
    shown = {f"shown_{name}": value for name, value in values.items() if seed == config.seed}
    log.append(run=run, seed=seed, **values, **shown)


def _chains(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Medians at the start, of closed forms; at the least depth also against automatic derivatives."""
    log.resume()
    for L in (4, 8, 16, 24, 32, 48):
        draw = torch.Generator().manual_seed(hash_of([901, seed, L]))
        W = torch.randn(config.chains, L, generator=draw, dtype=torch.float64)
        f, slope, H = chain_derivatives(W)
        few = -(-config.chains // 5)
        g = (f - 1)[:, None] * slope
        sizes = (f.abs(), g.norm(dim=1), torch.linalg.eigvalsh(H[:few]).abs().amax(1))
        for name, v in zip(CHAIN, sizes, strict=True):
            _row(log, f"chain, {name}", seed, config, depth=L, size=v.log().median().item())
        if L == 4:
            log.append(run="chain, derivatives", seed=seed, apart=chain_two_ways(W[:few]))
        progress(L / 48)


def _forward(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Median and variance of log ‖h_L‖² over sets of weights; for one width and depth also with matrices."""
    log.resume()
    rng = np.random.default_rng([902, seed])
    for run, d in FORWARD.items():
        mean, variance = law(d)
        for L, logs in forward(d, (8, 16, 32, 64, 128), config.forward, rng).items():
            alive = logs[np.isfinite(logs)]
            size = float(np.median(logs))
            row = {"median": size, "variance": float(alive.var()), "law": mean, "law2": variance}
            _row(log, run, seed, config, share=L / d, **row)
    apart = forward_two_ways(config.forward // 10, seed, rng)
    log.append(run="forward, two ways", seed=seed, apart=apart)


def _net(log: RunLog, progress: Progress, name: str, seed: int, config: Config) -> None:
    """Medians over starts: gradient of the middle layer, and largest |eigenvalue| in the hidden weights."""
    log.resume()
    x, y = sample(seed)
    for L in (8, 16, 32, 64):
        stack = Stack(**vars(NETS[name]) | {"depth": L})
        W = stack.draw(config.nets, [905, seed, L, stack.width])
        f = BatchedRuns(partial(losses, stack, x, y))
        middle = f.grad(W)[:, stack.place(L // 2 - 1)].norm(dim=1).median().item()
        curved = [largest(f, w, stack.width) for w in W[: -(-config.nets // 2)]]
        with np.errstate(divide="ignore"):  # a dead network: minus infinity
            logs = {"log_middle": float(np.log(middle)), "curvature": float(np.median(np.log(curved)))}
        _row(log, name, seed, config, depth=L, share=L / stack.width, middle=middle, **logs)
        progress(L / 64)


def _escape(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """200 chains until their loss is below .05, with each method at the rate by which most escape."""
    log.resume()
    draw = torch.Generator().manual_seed(hash_of([906, seed, depth]))
    W = torch.randn(200, depth, generator=draw, dtype=torch.float64)
    for i, (name, (kind, rates)) in enumerate(RATES.items()):
        every = W.repeat(len(rates), 1)
        rules = [kind(rate) for rate in rates for _ in W]  # type: ignore[call-arg]  # each takes its rate first
        slope = BatchedRuns(chain_losses).recorded(every)
        found = descend(slope, every, rules, config.steps, until=lambda loss: loss < 0.05)
        took = torch.where(found.reached, found.steps, config.steps + 1).double().view(len(rates), -1)
        shares = found.reached.double().view(len(rates), -1).mean(1)
        best = max(range(len(rates)), key=lambda r: (shares[r].item(), -took[r].median().item()))
        row = {"steps": took[best].median().item(), "escaped": shares[best].item(), "rate": rates[best]}
        _row(log, name, seed, config, depth=depth, **row)
        if depth == 24:
            log.append(run=f"{name}, L = 24", seed=seed, escaped=row["escaped"])
        progress((i + 1) / 3)


def _train(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """A network of width 12 for 200 full-batch steps: the least loss over rates, in variances of the target."""
    log.resume()
    x, y = sample(seed)
    stack = Stack(8, 12, depth, 1)
    for name, kind, rates in (("GD", GD, (0.01, 0.03, 0.1, 0.3)), ("Adam", Adam, (1e-3, 3e-3, 1e-2))):
        W = stack.draw(1, [907, seed, depth]).repeat(len(rates), 1)
        rules = [kind(rate) for rate in rates]
        found = descend(BatchedRuns(partial(losses, stack, x, y)).slope, W, rules, 200)
        least = found.losses.where(~found.diverged, torch.inf).min().item() / (0.5 * y.var(correction=0).item())
        _row(log, f"{name}, width 12", seed, config, depth=depth, loss=least)


def _slope(run: str, x: str, y: str) -> Observer:
    return by_seed(run, lambda a, b: line(a, b).slope, x, y)


def _over_law(column: str, exact: str) -> Observer:
    """Slope of a column in L/d over the exact law, for each width from 16 on."""

    def ratio(share: Array, v: Array, law: Array) -> float:
        return line(share, v).slope / law[0]

    return together(*(by_seed(run, ratio, "share", column, exact) for run in WIDE))


def _at(run: str, column: str, depth: int) -> Observer:
    return by_seed(run, lambda d, v: v[d == depth][0], "depth", column)


def _growth(run: str) -> Observer:
    return by_seed(run, lambda d, v: v[d == 16][0] / v[d == 8][0], "depth", "steps")


claim, CONTROL = claiming(PART), "negative control"


def _claims() -> Iterator[Claim]:
    for what, low, high in zip(CHAIN, (-0.685, -0.75, -0.75), (-0.585, -0.4, -0.4), strict=True):
        sentence = f"Chains: median of {what} (slope of its log, a layer; the law of |f| is -.635)"
        slope = _slope(f"chain, {what}", "depth", "size")
        yield claim(sentence, slope, within(low, high), "scaling", f"chain, {what}")
    sentence, run = "Chains: derivatives in closed form and automatic ones (relative difference)", "chain, derivatives"
    yield claim(sentence, by_seed(run, max, "apart"), at_most(1e-10), "identity", run)
    sentence = "ReLU: median of log ‖h‖² falls by the exact law (slope in L/d over it, widths 16 to 64)"
    yield claim(sentence, _over_law("median", "law"), within(0.9, 1.1), "scaling", *WIDE)
    sentence = "ReLU: its variance grows by the exact law (slope in L/d over it, widths 16 to 64)"
    yield claim(sentence, _over_law("variance", "law2"), within(0.85, 1.15), "scaling", *WIDE)
    sentence, run = "ReLU: the law without matrices and networks with them (standard errors apart)", "forward, two ways"
    yield claim(sentence, by_seed(run, max, "apart"), at_most(4), "identity", run)
    sentence = "Width 8: the largest |eigenvalue| vanishes (slope of its median log in L/d)"
    yield claim(sentence, _slope("d = 8", "share", "curvature"), at_most(-0.6), "scaling", "d = 8")
    for narrow, wide in (("d = 8", "d = 16"), ("d = 16", "d = 32")):
        sentence = f"Depth 32: gradients are larger at {wide} than at {narrow} (ratio of medians)"
        pair = over(_at(wide, "middle", 32), _at(narrow, "middle", 32))
        yield claim(sentence, pair, at_least(1), "comparison", narrow, wide)
    for name in ("layer norm", "residual"):
        sentence = f"Width 8, {name}: the largest |eigenvalue| does not vanish (slope of its median log in L/d)"
        yield claim(sentence, _slope(name, "share", "curvature"), at_least(-0.4), CONTROL, name)
    sentence = "Width 32, depth 8: gradients do not vanish (median)"
    yield claim(sentence, _at("d = 32", "middle", 8), at_least(np.exp(-1)), CONTROL, "d = 32")
    yield claim("GD: steps to escape grow from 8 to 16 layers (factor)", _growth("GD"), at_least(5), "scaling", "GD")
    for name in ("Adam", "normalized GD"):
        sentence = f"{name}: they do not (factor)"
        yield claim(sentence, _growth(name), at_most(3), "comparison", name)
    for name, criterion in (("GD", at_most(0.5)), ("Adam", at_least(0.95))):
        sentence, run = f"{name}: share of chains of 24 layers that escape", f"{name}, L = 24"
        yield claim(sentence, last(run, "escaped"), criterion, "comparison", run)
    sentence = "Width 12, 32 layers: Adam trains what GD does not (its loss over that of GD after 200 steps)"
    runs = ("Adam, width 12", "GD, width 12")
    both = over(_at(runs[0], "loss", 32), _at(runs[1], "loss", 32))
    yield claim(sentence, both, at_most(0.5), "comparison", *runs, aside=True)
    sentence = "Batch normalization repairs it as well (slope of the median log |eigenvalue| in L/d)"
    yield claim(sentence, _slope("batch norm", "share", "curvature"), within(-0.4, 0.4), WIDER, "batch norm")
    sentence = "Layer normalization keeps the gradient of the middle layer too (slope of its median log in L/d)"
    yield claim(sentence, _slope("layer norm", "share", "log_middle"), at_least(-0.4), WIDER, "layer norm")


CLAIMS = tuple(_claims())

LABELS = {
    "shown_depth": "layers L",
    "shown_share": "L/d",
    "shown_size": "median of the log",
    "shown_median": "median of log ‖h_L‖²/‖h_0‖²",
    "shown_curvature": "median of log largest |eigenvalue|",
    "shown_steps": "median steps to a loss of .05",
}

CAPTIONS = {
    "escape": "200 chains, each method at the rate by which most escape.  Where fewer than half escape, the median is"
    " above all steps that were taken.",
    "chains": "Of 2000 random chains.  The mean of f² is one at every depth.",
    "forward": "One line for all widths from 16 on: -2.5 L/d and a little less, as the exact law has it.",
    "curvature": "Networks of width 8.  Batch normalization does not cure it: there the curvature explodes.",
}
NARROW = tuple(name for name, net in NETS.items() if net.width == 8)
chart = charting(PART, LABELS, CAPTIONS)

CHARTS = (
    chart("escape", "Steps to leave the plateau", "shown_depth", "shown_steps", tuple(RATES), log="y"),
    chart("chains", "Chains of random weights", "shown_depth", "shown_size", tuple(f"chain, {c}" for c in CHAIN)),
    chart("forward", "Forward through ReLU layers", "shown_share", "shown_median", tuple(FORWARD)),
    chart("curvature", "Curvature of deep networks", "shown_share", "shown_curvature", NARROW),
)
