"""In deep random networks gradients and curvature vanish together, and gradient descent waits.

With He's or Xavier's start the variance of what a deep network computes is kept, but its median is not: unless the
width grows with the depth, typical outputs, gradients and Hessians fall exponentially.  Gradient descent then sits on a
plateau as long as the curvature is small, while adaptive methods walk off it, and residuals or layer normalization
prevent it.  Here chains of single weights, the forward pass and small ReLU networks are compared with exact laws, and
chains are trained until they escape.  Wide networks, residuals and layer normalization are the controls, where nothing
may vanish.

    chain  f = ∏ w_i, w ~ N(0, 1):  E f² = 1, but E log|w| = -(γ + ln 2)/2 = -.635 a layer
    ReLU, He, width d:  ‖h_l‖² = ‖h_{l-1}‖² Y,  Y = (2/d) χ²_k, k ~ Bin(d, ½):  E Y = 1, Var Y = 5/d,
                        E log Y = E[ψ(k/2)] + ln(4/d) for k ≥ 1:  about -5/(2d) a layer
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ...autodiff.batched import BatchedRuns
from ...optimizers.adaptive import Adam
from ...optimizers.base import UpdateRule
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, labelled, scaling, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.fits import slope
from .._framework.observe import Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.deep import Stack, largest_curvature, losses
from .._shared.streams import stream
from .normalized_gd import NormalizedGD
from .starts import chain_derivatives, chain_losses, chain_mismatch, forward, forward_mismatch, law, sample

PAPER = (
    "Orvieto, Kohler, Pavllo, Hofmann & Lucchi, Vanishing Curvature and the Power of Adaptive Methods in Randomly"
    " Initialized Deep Networks (arXiv 2106.03763)"
)
PART = "Vanishing gradients and curvature"

NARROW = Stack(inputs=8, width=8, depth=1, outputs=1)
NETS = {
    "d = 8": NARROW,
    "d = 16": replace(NARROW, width=16),
    "d = 32": replace(NARROW, width=32),
    "layer norm": replace(NARROW, norm="LN"),
    "residual": replace(NARROW, residual=True),
    "batch norm": replace(NARROW, norm="BN"),
}

RATES: dict[str, tuple[Callable[[float], UpdateRule], tuple[float, ...]]] = {
    "GD": (GD, (0.01, 0.1, 0.3, 1, 3)),
    "Adam": (Adam, (1e-3, 1e-2, 3e-2)),
    "normalized GD": (NormalizedGD, (1e-2, 3e-2, 1e-1)),
}
CHAIN = ("|f|", "‖∇L‖", "largest |λ|")
FORWARD = {f"forward, d = {d}": d for d in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

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
    found = []
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        found.append(Job(f"chains, seed {seed}", _chains, common, cost=1))
        found.append(Job(f"forward, seed {seed}", _forward, common, cost=2))
        for name in NETS:
            found.append(Job(f"{name}, seed {seed}", _net, {"name": name, **common}, cost=3))
        for L in config.depths:
            found.append(Job(f"escape, L = {L}, seed {seed}", _escape, {"depth": L, **common}, cost=3))
        for L in (4, 16, 32) if config.trained else ():
            found.append(Job(f"training, L = {L}, seed {seed}", _train, {"depth": L, **common}, cost=L / 8))
    return found


def _chains(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Medians over random chains, from closed forms, which at the least depth are compared with autograd."""
    log.resume()
    few = -(-config.chains // 5)
    for L in (4, 8, 16, 24, 32, 48):
        W = torch.randn(config.chains, L, generator=stream(901, seed, L), dtype=torch.float64)
        f, derivative, H = chain_derivatives(W)
        g = (f - 1)[:, None] * derivative
        sizes = (f.abs(), g.norm(dim=1), torch.linalg.eigvalsh(H[:few]).abs().amax(1))
        for name, v in zip(CHAIN, sizes, strict=True):
            log.append(run=f"chain, {name}", seed=seed, depth=L, size=v.log().median().item())
        if L == 4:
            log.append(run="chain, derivatives", seed=seed, apart=chain_mismatch(W[:few]))
        progress(L / 48)


def _forward(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Median and variance of log ‖h_L‖² over sets of weights; for one width and depth also with matrices."""
    log.resume()
    rng = np.random.default_rng([902, seed])
    for name, d in FORWARD.items():
        mean, variance = law(d)
        for L, logs in forward(d, (8, 16, 32, 64, 128), config.forward, rng).items():
            alive = logs[np.isfinite(logs)]
            row = {"median": float(np.median(logs)), "variance": float(alive.var()), "law": mean, "law2": variance}
            log.append(run=name, seed=seed, share=L / d, **row)
    log.append(run="forward, two ways", seed=seed, apart=forward_mismatch(config.forward // 10, seed, rng))


def _net(log: RunLog, progress: Progress, name: str, seed: int, config: Config) -> None:
    """Medians over starts: gradient of the middle layer, and largest |eigenvalue| in the hidden weights."""
    log.resume()
    x, y = sample(seed)
    for L in (8, 16, 32, 64):
        stack = replace(NETS[name], depth=L)
        W = stack.draw(config.nets, [905, seed, L, stack.width])
        f = BatchedRuns(partial(losses, stack, x, y))
        middle = f.grad(W)[:, stack.entries(L // 2 - 1)].norm(dim=1).median().item()
        curvatures = [largest_curvature(f, w, fixed=stack.width) for w in W[: -(-config.nets // 2)]]
        with np.errstate(divide="ignore"):  # a dead network: minus infinity
            logs = {"log_middle": float(np.log(middle)), "curvature": float(np.median(np.log(curvatures)))}
        log.append(run=name, seed=seed, depth=L, share=L / stack.width, middle=middle, **logs)
        progress(L / 64)


def _escape(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """Train 200 chains until their loss is below .05, with each method at the rate by which most escape."""
    log.resume()
    W = torch.randn(200, depth, generator=stream(906, seed, depth), dtype=torch.float64)
    for i, (name, (rule, rates)) in enumerate(RATES.items()):
        at_all_rates = W.repeat(len(rates), 1)
        rules = [rule(rate) for rate in rates for _ in W]
        gradients = BatchedRuns(chain_losses).recorded(at_all_rates)
        found = descend(gradients, at_all_rates, rules, config.steps, until=lambda loss: loss < 0.05)
        took = torch.where(found.reached, found.steps, config.steps + 1).double()
        steps = took.view(len(rates), -1).median(1).values.tolist()
        escaped = found.reached.double().view(len(rates), -1).mean(1).tolist()
        best = max(range(len(rates)), key=lambda r: (escaped[r], -steps[r]))
        log.append(run=name, seed=seed, depth=depth, steps=steps[best], escaped=escaped[best], rate=rates[best])
        if depth == 24:
            log.append(run=f"{name}, L = 24", seed=seed, escaped=escaped[best])
        progress((i + 1) / 3)


def _train(log: RunLog, progress: Progress, depth: int, seed: int, config: Config) -> None:
    """A network of width 12 for 200 full-batch steps: the least loss over rates, in variances of the target."""
    log.resume()
    x, y = sample(seed)
    stack = Stack(inputs=8, width=12, depth=depth, outputs=1)
    rates: dict[str, list[UpdateRule]] = {
        "GD": [GD(rate) for rate in (0.01, 0.03, 0.1, 0.3)],
        "Adam": [Adam(rate) for rate in (1e-3, 3e-3, 1e-2)],
    }
    for name, rules in rates.items():
        W = stack.draw(1, [907, seed, depth]).repeat(len(rules), 1)
        found = descend(BatchedRuns(partial(losses, stack, x, y)).slope, W, rules, 200)
        least = found.losses.where(~found.diverged, torch.inf).min().item() / (0.5 * y.var(correction=0).item())
        log.append(run=f"{name}, width 12", seed=seed, depth=depth, loss=least)


def _over_law(column: str, exact: str) -> Quantity:
    """Slope of a column in L/d over the exact law, for each width from 16 on."""
    wide = [run(name) for name, d in FORWARD.items() if d >= 16]
    return joined(*(rows.reduce(slope, "share", column) / rows[exact].first() for rows in wide))


def _growth(method: str) -> Quantity:
    """Factor by which the steps to escape grow from 8 to 16 layers."""
    return run(method).at(depth=16)["steps"] / run(method).at(depth=8)["steps"]


CLAIMS = under(
    PART,
    *(
        scaling(
            f"Chains: median of {what} (slope of its log, a layer; the law of |f| is -.635)",
            run(f"chain, {what}").reduce(slope, "depth", "size").within(low, high),
        )
        for what, low, high in zip(CHAIN, (-0.685, -0.75, -0.75), (-0.585, -0.4, -0.4), strict=True)
    ),
    identity(
        "Chains: derivatives in closed form and automatic ones (relative difference)",
        run("chain, derivatives")["apart"].max() <= 1e-10,
    ),
    scaling(
        "ReLU: median of log ‖h‖² falls by the exact law (slope in L/d over it, widths 16 to 64)",
        _over_law("median", "law").within(0.9, 1.1),
    ),
    scaling(
        "ReLU: its variance grows by the exact law (slope in L/d over it, widths 16 to 64)",
        _over_law("variance", "law2").within(0.85, 1.15),
    ),
    identity(
        "ReLU: the law without matrices and networks with them (standard errors apart)",
        run("forward, two ways")["apart"].max() <= 4,
    ),
    scaling(
        "Width 8: the largest |eigenvalue| vanishes (slope of its median log in L/d)",
        run("d = 8").reduce(slope, "share", "curvature") <= -0.6,
    ),
    *(
        comparison(
            f"Depth 32: gradients are larger at {wide} than at {narrow} (ratio of medians)",
            run(wide).at(depth=32)["middle"] / run(narrow).at(depth=32)["middle"] >= 1,
        )
        for narrow, wide in (("d = 8", "d = 16"), ("d = 16", "d = 32"))
    ),
    *(
        control(
            f"Width 8, {name}: the largest |eigenvalue| does not vanish (slope of its median log in L/d)",
            run(name).reduce(slope, "share", "curvature") >= -0.4,
        )
        for name in ("layer norm", "residual")
    ),
    control("Width 32, depth 8: gradients do not vanish (median)", run("d = 32").at(depth=8)["middle"] >= np.exp(-1)),
    scaling("GD: steps to escape grow from 8 to 16 layers (factor)", _growth("GD") >= 5),
    *(comparison(f"{name}: they do not (factor)", _growth(name) <= 3) for name in ("Adam", "normalized GD")),
    comparison("GD: share of chains of 24 layers that escape", run("GD, L = 24")["escaped"].last() <= 0.5),
    comparison("Adam: share of chains of 24 layers that escape", run("Adam, L = 24")["escaped"].last() >= 0.95),
    comparison(
        "Width 12, 32 layers: Adam trains what GD does not (its loss over that of GD after 200 steps)",
        run("Adam, width 12").at(depth=32)["loss"] / run("GD, width 12").at(depth=32)["loss"] <= 0.5,
        deciding=False,
    ),
    wider_claim(
        "Batch normalization repairs it as well (slope of the median log |eigenvalue| in L/d)",
        run("batch norm").reduce(slope, "share", "curvature").within(-0.4, 0.4),
    ),
    wider_claim(
        "Layer normalization keeps the gradient of the middle layer too (slope of its median log in L/d)",
        run("layer norm").reduce(slope, "share", "log_middle") >= -0.4,
    ),
)

LABELS = {
    "depth": "layers L",
    "share": "L/d",
    "size": "median of the log",
    "median": "median of log ‖h_L‖²/‖h_0‖²",
    "curvature": "median of log largest |eigenvalue|",
    "steps": "median steps to a loss of .05",
}

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "escape",
            "Steps to leave the plateau",
            x="depth",
            y="steps",
            runs=tuple(RATES),
            log="y",
            repeats="first",
            caption="200 chains, each method at the rate by which most escape.  Where fewer than half escape, the"
            " median is above all steps that were taken.",
        ),
        Chart(
            "chains",
            "Chains of random weights",
            x="depth",
            y="size",
            runs=tuple(f"chain, {what}" for what in CHAIN),
            repeats="first",
            caption="Of 2000 random chains.  The mean of f² is one at every depth.",
        ),
        Chart(
            "forward",
            "Forward through ReLU layers",
            x="share",
            y="median",
            runs=tuple(FORWARD),
            repeats="first",
            caption="One line for all widths from 16 on: -2.5 L/d and a little less, as the exact law has it.",
        ),
        Chart(
            "curvature",
            "Curvature of deep networks",
            x="share",
            y="curvature",
            runs=tuple(name for name, net in NETS.items() if net.width == 8),
            repeats="first",
            caption="Networks of width 8.  Batch normalization does not cure it: there the curvature explodes.",
        ),
    ),
)
