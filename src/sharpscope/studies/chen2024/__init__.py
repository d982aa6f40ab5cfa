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

from dataclasses import dataclass, replace

import numpy as np
import torch

from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, scaling, under
from .._framework.config import demand_positive, seeds
from .._framework.fits import exponent
from .._framework.observe import run
from .._framework.study import Job, Progress
from .meanfield import ResidualNet
from .particles import ParticleFlow, examples, starts, stretching

PAPER = (
    "Chen, Liu, Lu, Chrysos & Cevher, Generalization of Scaled Deep ResNets in the Mean-Field Regime (arXiv 2403.09889)"
)
PART = "Learning and movement of units"
EVERY, STRENGTHS, SHAPES, LAZY, GAPS = "all runs", "output units", "β constant", "β ∝ √K", "gap"
INPUTS, EXAMPLES, BASE, STRENGTH = 5, 20, (8, 32, 64), 4.0  # d, n, (L, M, K) and β where nothing else is said
DRAWS, TESTS = 16, 2000  # networks of each shape, and examples that a gap is measured on
LEARNT = 3e-3  # of the first loss


@dataclass(frozen=True)
class Config:
    """The settings of the study; the defaults are its full size."""

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
    L, M, K = BASE
    shapes = {(l, M, K) for l in config.depths} | {(L, m, K) for m in config.widths}
    shapes |= {(L, M, k) for k in config.outputs}
    found = []
    for seed in seeds(config):
        common, ending = {"seed": seed, "config": config}, f", seed {seed}"
        found.append(Job(f"strengths{ending}", _strengths, common, cost=1.5))
        found.append(Job(f"without scaling{ending}", _stretch, common, cost=0.2))
        for l, m, k in sorted(shapes):
            found.append(
                Job(f"L = {l}, M = {m}, K = {k}{ending}", _shape, {"shape": (l, m, k), **common}, 3 * l * m / 256)
            )
        for n in config.sizes:
            found.append(Job(f"{n} examples{ending}", _gap, {"count": n, **common}, (n / 100) ** 2))
    return found


def _strengths(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Train one network under every β, with the checks of the kernel and of the divergence."""
    log.resume()
    x, y = examples(EXAMPLES, INPUTS, (seed, EXAMPLES))
    net = ResidualNet.scaled(INPUTS, *BASE, torch.tensor(config.strengths, dtype=torch.float64)[:, None])
    start = starts(net, seed)
    one = ParticleFlow(replace(net, strength=STRENGTH), x, y, start, fraction=LEARNT, volumes=True).run()
    progress(0.3)
    flow = ParticleFlow(net, x, y, start.expand(len(config.strengths), -1), fraction=LEARNT).run()
    log.append(run=EVERY, seed=seed, **flow.evidence)
    log.append(run=STRENGTHS, seed=seed, by_volume=one.by_volume, **flow.gaps)
    kl, msd = flow.movement()
    for i, beta in enumerate(config.strengths):
        row = {"KL": float(kl[i]), "MSD": float(msd[i]), "time": float(flow.times[i])} if flow.arrived else {}
        log.append(run=STRENGTHS, seed=seed, beta=beta, **row)
        log.append(run="∝ β⁻²", seed=seed, beta=beta, KL=float(msd[-1]) * (beta / config.strengths[-1]) ** -2)
        if seed == config.seed:
            for point in flow.curves(i):
                log.append(run=f"β = {beta:g}", **point)
    for t in np.linspace(0, flow.longest, 50):
        log.append(run="bound", t=float(t), loss=float(np.exp(-t)))


def _shape(log: RunLog, progress: Progress, shape: tuple[int, int, int], seed: int, config: Config) -> None:
    """Measure distances in networks of one shape; where only K differs, under a β that grows with √K, too."""
    log.resume()
    x, y = examples(EXAMPLES, INPUTS, (seed, EXAMPLES))
    L, M, K = shape
    net = ResidualNet.scaled(INPUTS, L, M, K, STRENGTH)
    only_K_differs = BASE[:2] == (L, M) and K in config.outputs
    strengths = {SHAPES: STRENGTH}
    if only_K_differs:
        strengths[LAZY] = STRENGTH * (K / min(config.outputs)) ** 0.5
    for name, beta in strengths.items():
        start = starts(net, seed, *shape, count=DRAWS)
        flow = ParticleFlow(replace(net, strength=beta), x, y, start, fraction=LEARNT).run()
        log.append(run=EVERY, seed=seed, **flow.evidence)
        distance = float(flow.movement(raw=True)[1].mean()) if flow.arrived else np.nan
        units = K if only_K_differs else None  # of those that are drawn
        log.append(run=name, seed=seed, L=L, M=M, K=K, distance=distance, units=units)


def _gap(log: RunLog, progress: Progress, count: int, seed: int, config: Config) -> None:
    """Measure test loss minus training loss of one network, at a training loss of 1e-3."""
    log.resume()
    x, y = examples(count, INPUTS, (seed, count))
    net = ResidualNet.scaled(INPUTS, *BASE[:2], units=128, strength=2 * STRENGTH)
    flow = ParticleFlow(net, x, y, starts(net, seed, 1), fraction=2e-3 / float(y.square().mean())).run()
    log.append(run=EVERY, seed=seed, **flow.evidence)
    unseen = net.evaluate(flow.weights, *examples(TESTS, INPUTS, (seed, TESTS, 1))).losses
    gap = float(unseen - flow.losses) if flow.arrived else np.nan
    log.append(run=GAPS, seed=seed, n=count, gap=gap)
    if count == min(config.sizes):
        for n in config.sizes:
            log.append(run="∝ n^-½", seed=seed, n=n, gap=gap * (n / count) ** -0.5)


def _stretch(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Measure spectral norms of ``∂z_L/∂x`` at the start, the median over inputs, under three divisors of a block."""
    log.resume()
    x, _ = examples(TESTS // 20, INPUTS, (seed, TESTS, 2))
    _, M, K = BASE
    for L in (4, 16, 64):
        for name, scale in (("scaled", 1 / (L * M)), ("1/M", 1 / M), ("1/√M", M**-0.5)):
            net = ResidualNet(INPUTS, L, M, K, strength=1.0, block_scale=scale)
            lipschitz, gap = stretching(net, starts(net, seed, 2, L)[0], x)
            log.append(run=name, seed=seed, L=L, lipschitz=lipschitz, gap=gap)


LARGE = run(STRENGTHS).where("beta", lambda beta: beta >= 4)

CLAIMS = under(
    PART,
    identity(
        "The kernel by autograd is the formula's, after training (greatest relative difference)",
        run(STRENGTHS)["kernel_gap"].max() <= 1e-10,
    ),
    identity(
        "The divergence of the velocity is the trace of its Jacobian by autograd (greatest, relative)",
        run(STRENGTHS)["divergence_gap"].max() <= 1e-10,
    ),
    identity(
        "β = 4: KL by volumes, determinants of the steps in place of divergences (over KL)",
        run(STRENGTHS)["by_volume"].max().within(0.95, 1.05),
        deciding=False,
    ),
    identity(
        "The Jacobian of the blocks in the input, by autograd and by formula (greatest relative difference)",
        run("scaled")["gap"].max() <= 1e-10,
    ),
    inequality(
        "Every run learns, to 3e-3 of the first loss or to a loss of 1e-3 (share of runs)",
        run(EVERY)["arrived"].mean() >= 1,
    ),
    inequality(
        "The loss stays below exp(-λ_min(G_0) t/n) in every run (greatest loss over bound)",
        run(EVERY)["over_bound"].max() <= 1,
    ),
    inequality(
        "λ_min of the kernel never falls by half (least over its start, in any run)", run(EVERY)["kept"].min() >= 0.5
    ),
    inequality(
        "KL of output units from their start, computed, is positive (the least)", run(STRENGTHS)["KL"].min() >= 1e-9
    ),
    *(
        scaling(
            f"{what} falls as β⁻² (exponent from β = 4)",
            LARGE.reduce(exponent, "beta", column).within(-2.3, -1.7),
            deciding=column == "KL",
        )
        for what, column in (("KL", "KL"), ("Mean square distance", "MSD"), ("Time", "time"))
    ),
    comparison(
        "Distances do not depend on depth, width or number of output units (greatest over least mean square)",
        run(SHAPES)["distance"].max() / run(SHAPES)["distance"].min() <= 1.5,
    ),
    control(
        "Lazy, β ∝ √K: the more units, the less they move (exponent of the mean square distance in K)",
        run(LAZY).reduce(exponent, "K", "distance").within(-1.4, -0.7),
    ),
    scaling(
        "The gap between test and training loss falls at least as fast as n^-½ (exponent in n)",
        run(GAPS).reduce(exponent, "n", "gap") <= -0.5,
    ),
    comparison(
        "Deep networks stretch inputs no more than shallow ones (Lipschitz constants, L = 64 over L = 4)",
        run("scaled").at(L=64)["lipschitz"] / run("scaled").at(L=4)["lipschitz"] <= 1.2,
    ),
    control(
        "Blocks divided by √M alone: deep networks do (Lipschitz constants, L = 64 over L = 4)",
        run("1/√M").at(L=64)["lipschitz"] / run("1/√M").at(L=4)["lipschitz"] >= 10,
    ),
)

LABELS = {
    "t": "flow time in units of n/λ_min(G_0)",
    "loss": "loss over its start",
    "kernel": "λ_min(G_t)/λ_min(G_0)",
    "beta": "β",
    "KL": "KL divergence, and mean square distance in deviations",
    "units": "output units K",
    "distance": "mean square distance of an output unit",
    "n": "examples n",
    "gap": "test loss minus training loss",
}
CURVES = ("β = 2", "β = 4", "β = 16", "β = 64")
OLD_COLUMNS = {"shown_K": "units"}

CHARTS = labelled(
    LABELS,
    *under(
        PART,
        Chart(
            "loss",
            "Loss and the bound of the kernel",
            x="t",
            y="loss",
            runs=(*CURVES, "bound"),
            log="y",
            caption="What is learnt lies mostly along eigenvalues larger than the least, which makes the bound.",
        ),
        Chart(
            "kernel",
            "The least eigenvalue of the kernel",
            x="t",
            y="kernel",
            runs=CURVES,
            lines=((0.5, "half"),),
            caption="It grows where units move, and hardly changes under large β.",
        ),
        Chart(
            "movement",
            "Movement of output units",
            x="beta",
            y="KL",
            runs=(STRENGTHS, "∝ β⁻²"),
            repeats="first",
            log="xy",
            beside=(("MSD", "mean square distance"),),
            caption="Between the laws after and before training, computed along the paths of the units.",
        ),
        Chart(
            "units",
            "Distance against the number of output units",
            x="units",
            y="distance",
            runs=(SHAPES, LAZY),
            repeats="first",
            log="xy",
            caption=(
                "A unit moves as far whatever their number; in the lazy regime, β ∝ √K, it stands still in the limit."
            ),
        ),
        Chart(
            "gap",
            "Generalization gap",
            x="n",
            y="gap",
            runs=(GAPS, "∝ n^-½"),
            repeats="first",
            log="xy",
            caption="It falls faster than the bound, which is one-sided.",
        ),
    ),
)
