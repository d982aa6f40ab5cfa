"""Scaled deep residual networks learn linearly, and how far their units move does not depend on their size.

Where every block is divided by depth times width and every unit learns at a rate of its own, a residual network of any
size is a sample of one law of units, and its training is a flow of that law.  With the output multiplied by β, the time
to learn falls as β⁻², and so do the squared distance of units from their start and the KL divergence of their law,
which is computed along their paths, whatever the depth, width and number of units; if β grows with the root of that
number, distances shrink: the lazy regime.  The gap between test and training loss has to fall as n^-½ or faster.

L blocks of M units (u, w, b), K output units ω = (a, c, e), x of norm 1, residuals r, loss R = ‖r‖²/2n, kernel G:

    z_l = z_{l-1} + (1/LM) Σ_m u_lm tanh(w_lm·z_{l-1} + b_lm),  z_0 = x,   f = (β/K) Σ_k a_k tanh(c_k·z_L + e_k)
    R(t) ≤ R(0) exp(-λ_min(G_0) t/n)                             while λ_min(G_t) ≥ ½ λ_min(G_0)
    KL = mean(½‖ω_T/σ‖² - ½‖ω_0/σ‖²) - mean ∫ div ω̇ dt           σ: deviations at the start
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.config import demand_positive
from .._framework.fits import power
from .._framework.observe_old import Observer, by_seed
from .._framework.study import Job, Progress
from .meanfield import ResidualNet
from .particles import Flow, examples, starts, stretching

PAPER = (
    "Chen, Liu, Lu, Chrysos & Cevher, Generalization of Scaled Deep ResNets in the Mean-Field Regime (arXiv 2403.09889)"
)
PART = "Learning and movement of units"
EVERY, STRENGTHS, SHAPES, LAZY, GAPS = "all runs", "output units", "β constant", "β ∝ √K", "gap"
INPUTS, EXAMPLES, BASE, STRENGTH = 5, 20, (8, 32, 64), 4.0  # d, n, (L, M, K) and β where nothing else is said
DRAWS, TESTS = 16, 2000  # networks of each shape, and examples that a gap is measured on


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 3
    strengths: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # β
    depths: tuple[int, ...] = (2, 8, 32)  # L
    widths: tuple[int, ...] = (8, 32, 128)  # M
    outputs: tuple[int, ...] = (32, 64, 128, 256, 512)  # K
    sizes: tuple[int, ...] = (20, 40, 80, 160, 320)  # n of the generalization gap

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(repeats=1, sizes=(20, 40, 80, 160))


def jobs(config: Config) -> list[Job]:
    found, (L, M, K) = [], BASE
    shapes = {(l, M, K) for l in config.depths} | {(L, m, K) for m in config.widths}
    shapes |= {(L, M, k) for k in config.outputs}
    for seed in range(config.seed, config.seed + config.repeats):
        own, end = {"seed": seed, "config": config}, f", seed {seed}"
        found += [Job(f"strengths{end}", _strengths, own, 1.5), Job(f"without scaling{end}", _stretch, own, 0.2)]
        for l, m, k in sorted(shapes):
            found.append(Job(f"L = {l}, M = {m}, K = {k}{end}", _shape, {"shape": (l, m, k), **own}, 3 * l * m / 256))
        found += [Job(f"{n} examples{end}", _gap, {"count": n, **own}, (n / 100) ** 2) for n in config.sizes]
    return found


def _shown(seed: int, config: Config, **row: float) -> dict[str, float]:
    """The row, and of the first repeat what charts show of it."""
    return row | {f"shown_{name}": value for name, value in row.items() if seed == config.seed}


def _strengths(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """One network under every β; the kernel by autograd, and the divergence as the trace of a Jacobian."""
    log.resume()
    x, y = examples(EXAMPLES, INPUTS, (seed, EXAMPLES))
    net = ResidualNet.scaled(INPUTS, *BASE, torch.tensor(config.strengths, dtype=torch.float64)[:, None])
    start = starts(net, seed)
    one = Flow(replace(net, strength=STRENGTH), x, y, start, 3e-3, volumes=True).run()
    progress(0.3)
    flow = Flow(net, x, y, start.expand(len(config.strengths), -1), 3e-3).run()
    log.append(run=EVERY, seed=seed, **flow.evidence)
    log.append(run=STRENGTHS, seed=seed, by_volume=one.by_volume, **flow.gaps)
    kl, msd = flow.movement()
    for i, beta in enumerate(config.strengths):
        row = {"KL": float(kl[i]), "MSD": float(msd[i]), "time": float(flow.times[i])} if flow.arrived else {}
        log.append(run=STRENGTHS, seed=seed, **_shown(seed, config, beta=beta, **row))
        guide = float(msd[-1]) * (beta / config.strengths[-1]) ** -2
        log.append(run="∝ β⁻²", seed=seed, **_shown(seed, config, beta=beta, KL=guide))
        for point in flow.curves(i) if seed == config.seed else ():
            log.append(run=f"β = {beta:g}", **point)
    for t in np.linspace(0, flow.longest, 50):
        log.append(run="bound", t=float(t), loss=float(np.exp(-t)))


def _shape(log: RunLog, progress: Progress, shape: tuple[int, int, int], seed: int, config: Config) -> None:
    """Distances in networks of one shape, and where only K differs, under a β that grows with √K, too."""
    log.resume()
    x, y = examples(EXAMPLES, INPUTS, (seed, EXAMPLES))
    (L, M, K), net = shape, ResidualNet.scaled(INPUTS, *shape, STRENGTH)
    lazy = {LAZY: STRENGTH * (K / min(config.outputs)) ** 0.5} if BASE[:2] == (L, M) and K in config.outputs else {}
    for run, beta in {SHAPES: STRENGTH, **lazy}.items():
        flow = Flow(replace(net, strength=beta), x, y, starts(net, seed, *shape, count=DRAWS), 3e-3).run()
        log.append(run=EVERY, seed=seed, **flow.evidence)
        row = {"K": K, "distance": float(flow.movement(raw=True)[1].mean()) if flow.arrived else np.nan}
        log.append(run=run, seed=seed, L=L, M=M, **(_shown(seed, config, **row) if lazy else row))


def _gap(log: RunLog, progress: Progress, count: int, seed: int, config: Config) -> None:
    """Test loss minus training loss of one network, at a training loss of 1e-3."""
    log.resume()
    x, y = examples(count, INPUTS, (seed, count))
    net = ResidualNet.scaled(INPUTS, *BASE[:2], 128, 2 * STRENGTH)
    flow = Flow(net, x, y, starts(net, seed, 1), 2e-3 / float(y.square().mean())).run()
    log.append(run=EVERY, seed=seed, **flow.evidence)
    unseen = net.evaluate(flow.weights, *examples(TESTS, INPUTS, (seed, TESTS, 1))).losses
    gap = float(unseen - flow.losses) if flow.arrived else np.nan
    log.append(run=GAPS, seed=seed, **_shown(seed, config, n=count, gap=gap))
    for n in config.sizes if count == min(config.sizes) else ():
        log.append(run="∝ n^-½", seed=seed, **_shown(seed, config, n=n, gap=gap * (n / count) ** -0.5))


def _stretch(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Spectral norms of ``∂z_L/∂x`` at the start, the median over inputs, under three divisors of a block."""
    log.resume()
    x, _ = examples(TESTS // 20, INPUTS, (seed, TESTS, 2))
    for L in (4, 16, 64):
        for run, share in (("scaled", 1 / (L * BASE[1])), ("1/M", 1 / BASE[1]), ("1/√M", BASE[1] ** -0.5)):
            net = ResidualNet(INPUTS, L, *BASE[1:], 1.0, share)
            lipschitz, gap = stretching(net, starts(net, seed, 2, L)[0], x)
            log.append(run=run, seed=seed, L=L, lipschitz=lipschitz, gap=gap)


claim, CONTROL = claiming(PART), "negative control"


def _claims() -> Iterator[Claim]:
    def exponent(run: str, x: str, y: str, least: float = 0.0) -> Observer:
        return by_seed(run, lambda a, b: power(a[a >= least], b[a >= least]).slope, x, y)

    sentence = "The kernel by autograd is the formula's, after training (greatest relative difference)"
    yield claim(sentence, by_seed(STRENGTHS, max, "kernel_gap"), at_most(1e-10), "identity", STRENGTHS)
    sentence = "The divergence of the velocity is the trace of its Jacobian by autograd (greatest, relative)"
    yield claim(sentence, by_seed(STRENGTHS, max, "divergence_gap"), at_most(1e-10), "identity", STRENGTHS)
    sentence = "β = 4: KL by volumes, determinants of the steps in place of divergences (over KL)"
    yield claim(sentence, by_seed(STRENGTHS, max, "by_volume"), within(0.95, 1.05), "identity", STRENGTHS, aside=True)
    sentence = "The Jacobian of the blocks in the input, by autograd and by formula (greatest relative difference)"
    yield claim(sentence, by_seed("scaled", max, "gap"), at_most(1e-10), "identity", "scaled")
    sentence = "Every run learns, to 3e-3 of the first loss or to a loss of 1e-3 (share of runs)"
    yield claim(sentence, by_seed(EVERY, np.mean, "arrived"), at_least(1), "inequality", EVERY)
    sentence = "The loss stays below exp(-λ_min(G_0) t/n) in every run (greatest loss over bound)"
    yield claim(sentence, by_seed(EVERY, max, "over_bound"), at_most(1), "inequality", EVERY)
    sentence = "λ_min of the kernel never falls by half (least over its start, in any run)"
    yield claim(sentence, by_seed(EVERY, min, "kept"), at_least(0.5), "inequality", EVERY)
    sentence = "KL of output units from their start, computed, is positive (the least)"
    yield claim(sentence, by_seed(STRENGTHS, min, "KL"), at_least(1e-9), "inequality", STRENGTHS)
    for y, what, decides in (("KL", "KL", True), ("MSD", "Mean square distance", False), ("time", "Time", False)):
        sentence, slope = f"{what} falls as β⁻² (exponent from β = 4)", exponent(STRENGTHS, "beta", y, 4)
        yield claim(sentence, slope, within(-2.3, -1.7), "scaling", STRENGTHS, aside=not decides)
    sentence = "Distances do not depend on depth, width or number of output units (greatest over least mean square)"
    spread = by_seed(SHAPES, lambda v: v.max() / v.min(), "distance")
    yield claim(sentence, spread, at_most(1.5), "comparison", SHAPES)
    sentence = "Lazy, β ∝ √K: the more units, the less they move (exponent of the mean square distance in K)"
    yield claim(sentence, exponent(LAZY, "K", "distance"), within(-1.4, -0.7), CONTROL, LAZY)
    sentence = "The gap between test and training loss falls at least as fast as n^-½ (exponent in n)"
    yield claim(sentence, exponent(GAPS, "n", "gap"), at_most(-0.5), "scaling", GAPS)
    for run, what, criterion, kind in (
        ("scaled", "Deep networks stretch inputs no more than shallow ones", at_most(1.2), "comparison"),
        ("1/√M", "Blocks divided by √M alone: deep networks do", at_least(10), CONTROL),
    ):
        deeper = by_seed(run, lambda L, v: v[L.argmax()] / v[L.argmin()], "L", "lipschitz")
        yield claim(f"{what} (Lipschitz constants, L = 64 over L = 4)", deeper, criterion, kind, run)


CLAIMS = tuple(_claims())
LABELS = {"t": "flow time in units of n/λ_min(G_0)", "loss": "loss over its start", "kernel": "λ_min(G_t)/λ_min(G_0)"}
LABELS |= {"shown_beta": "β", "shown_KL": "KL divergence, and mean square distance in deviations"}
LABELS |= {"shown_K": "output units K", "shown_distance": "mean square distance of an output unit"}
LABELS |= {"shown_n": "examples n", "shown_gap": "test loss minus training loss"}

CAPTIONS = {
    "loss": "What is learnt lies mostly along eigenvalues larger than the least, which makes the bound.",
    "kernel": "It grows where units move, and hardly changes under large β.",
    "movement": "Between the laws after and before training, computed along the paths of the units.",
    "units": "A unit moves as far whatever their number; in the lazy regime, β ∝ √K, it stands still in the limit.",
    "gap": "It falls faster than the bound, which is one-sided.",
}
CURVES, BESIDE = ("β = 2", "β = 4", "β = 16", "β = 64"), (("shown_MSD", "mean square distance"),)
chart = charting(PART, LABELS, CAPTIONS)

CHARTS = (
    chart("loss", "Loss and the bound of the kernel", "t", "loss", (*CURVES, "bound"), log="y"),
    chart("kernel", "The least eigenvalue of the kernel", "t", "kernel", CURVES, lines=((0.5, "half"),)),
    chart("movement", "Movement of output units", "shown_beta", "shown_KL", (STRENGTHS, "∝ β⁻²"), "xy", beside=BESIDE),
    chart("units", "Distance against the number of output units", "shown_K", "shown_distance", (SHAPES, LAZY), "xy"),
    chart("gap", "Generalization gap", "shown_n", "shown_gap", (GAPS, "∝ n^-½"), "xy"),
)
