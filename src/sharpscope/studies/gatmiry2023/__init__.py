"""Flat deep factorizations of a measured matrix have the least nuclear norm.

Among all deep linear networks that fit linear measurements of a matrix exactly, those with the least trace of the
Hessian have, nearly, the end-to-end matrix of least nuclear norm (sum of singular values), whatever their depth, as
long as the measurements see all matrices of low rank alike; and that matrix is the one that was measured.  Here random
Gaussian measurements of a matrix of rank one are fitted with and without a penalty on the trace, and what comes out is
held against the convex problem solved by itself.  In the controls it can be another matrix: measurements are too few,
or they are single entries, some of them seen far more often than others.  SGD on noisy labels shows the same pull
without any penalty.

n measurements A_i of a d×d matrix, depth L, M = W_L⋯W_1, W_{b:a} = W_b⋯W_a, loss (1/n) Σ (⟨A_i,M⟩ - b_i)²:

    tr ∇²L = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F     (exact for all weights: M is linear in each entry of W_l)
    mean over Gaussian A = 2 Σ_l ‖W_{L:l+1}‖²_F ‖W_{l-1:1}‖²_F
                         ≥ F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}    (by means and Hölder; balanced factors attain it)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidValue
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from .._framework.claiming import charting, claiming
from .._framework.claims import WIDER, Claim, at_least, at_most, median, within
from .._framework.config import demand_positive
from .._framework.observe_old import Observer, by_seed, last, over, together, worst
from .._framework.study import Job, Progress
from .._shared.oracles import least_nuclear_norm
from .factors import MATRICES, Solved, distance, entrywise, gaussian, nuclear, plain, relabelled, solved, start

PAPER = (
    "Gatmiry, Li, Chuang, Reddi, Ma & Jegelka, The Inductive Bias of Flatness Regularization for Deep Matrix"
    " Factorization (arXiv 2306.13239)"
)
PART, FEW, ENTRIES = "Flat factorizations", ", n = 20", ", entries"  # the latter end the names of runs
TOO_FEW, SHOWN = 20, 40  # measurements, for a matrix of rank one with d = 10: of a control, and in charts
NOISY, EXACT = SGD = ("SGD, noisy labels", "SGD, exact labels")


@dataclass(frozen=True)
class Config:
    """What turns; the defaults are the full study."""

    seed: int = 0
    repeats: int = 2
    dimension: int = 10
    depths: tuple[int, ...] = (2, 3, 4)
    sizes: tuple[int, ...] = (40, 60)  # numbers of Gaussian measurements; those of the control come on top
    penalties: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)  # on the trace, each from where the last ended
    entries: int = 60  # of the matrix, measured one by one
    draws: int = 8  # sets of entries, for each repeat
    noise_steps: int = 40000  # of SGD on noisy labels
    more: bool = True  # also measured entries, and SGD on noisy labels

    def __post_init__(self) -> None:
        demand_positive(self)
        if min(self.depths) < 2:
            raise InvalidValue(f"depths is {self.depths}; a factorization has two layers at least")
        if self.entries > self.dimension**2:
            raise InvalidValue(f"entries is {self.entries}; the matrix has {self.dimension**2}")


QUICK = Config(depths=(2,), sizes=(40,), more=False)


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in range(config.seed, config.seed + config.repeats):
        own = {"seed": seed, "config": config}
        for depth in config.depths:
            for n in sorted({*config.sizes, TOO_FEW}):
                name = f"{n} Gaussian measurements, depth {depth}, seed {seed}"
                found.append(Job(name, _gaussian, {"n": n, "depth": depth, **own}, 1.2 * depth - 1))
        if config.more:
            sets = range(config.draws)
            found += [Job(f"entries, draw {i}, seed {seed}", _entries, {"draw": i, **own}, 1.4) for i in sets]
            found.append(Job(f"label noise, seed {seed}", _label_noise, own, config.noise_steps / 2000))
    return found


def _gaussian(log: RunLog, progress: Progress, n: int, depth: int, seed: int, config: Config) -> None:
    """Gaussian measurements; of the first repeat also what charts show."""
    log.resume()
    p = gaussian(n, config.dimension, depth, seed)
    found = solved(p, start(p, seed), config.penalties, progress)
    _write(log, found, FEW if n == TOO_FEW else "", seed)
    if seed == config.seed and n == SHOWN:
        for penalty, end in zip(config.penalties, found.path, strict=True):
            error = distance(p.matrix_of(end.weights), p.truth.numpy())
            log.append(run=f"path, {depth} layers", penalty=penalty, error=error)
        for name, m in found.matrices.items() if depth == 2 else ():
            for i, s in enumerate(np.linalg.svd(m, compute_uv=False), 1):
                log.append(run=f"{name}: singular values", number=i, singular=float(s))
    if seed == config.seed and n == max(config.sizes) and depth == max(config.depths):
        for x in np.geomspace(50, 1000, 60):
            log.append(run="F_L", least=float(x), trace=float(x))


def _entries(log: RunLog, progress: Progress, draw: int, seed: int, config: Config) -> None:
    """Single entries; one has 1/d² of the mean square of a Gaussian matrix, so the penalties start higher."""
    log.resume()
    p = entrywise(config.entries, config.dimension, min(config.depths), seed, draw)
    _write(log, solved(p, start(p, seed), (10 * max(config.penalties), *config.penalties), progress), ENTRIES, seed)


def _write(log: RunLog, found: Solved, setting: str, seed: int) -> None:
    for name, row in found.rows().items():
        log.append(run=f"{name}{setting}", **row, seed=seed, depth=found.p.depth, n=len(found.p.a))


def _label_noise(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """SGD from a plain solution of two layers, with noise on the labels and without, side by side."""
    log.resume()
    p, steps = gaussian(SHOWN, config.dimension, 2, seed), config.noise_steps
    w, noise = plain(p, start(p, seed)).weights, torch.tensor([1.0, 0.0], dtype=torch.float64)
    least = nuclear(least_nuclear_norm(p.a.numpy(), p.labels.numpy(), (config.dimension,) * 2))

    def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if step % max(steps // 100, 1) == 0:
            progress(step / steps)
            for name, trace in zip(SGD, p.trace(W).tolist() if seed == config.seed else (), strict=False):
                log.append(run=name, step=step, sgd_trace=trace)

    slope = relabelled(p, noise, 10, lambda step: 0.1 if step >= 0.9 * steps else 1.0, round(0.95 * steps), seed)
    W = descend(slope, w.expand(2, -1).clone(), GD(2e-3), steps, watch=watch).weights
    for name, trace, norm in zip(SGD, p.trace(W).tolist(), map(nuclear, p.matrix(W).numpy()), strict=True):
        log.append(run=f"{name}: end", seed=seed, nuclear_ratio=norm / least, trace=trace, nuclear=norm)


def _draws(run: str, column: str) -> Observer:
    """Every value."""
    return lambda h, config: tuple(h.series(run, column).tolist())


def _claims() -> Iterator[Claim]:
    """What is not said of each draw is the worst over depths and numbers of measurements."""
    claim, same, control, solutions = claiming(PART), "comparison", "negative control", ("plain", "flat")
    sentence = "The trace of the Hessian is its formula, at the start and at both solutions (relative error)"
    off = together(*(worst(by_seed(run, max, "trace_off")) for run in ("start", *solutions)))
    yield claim(sentence, off, at_most(1e-8), "identity", "start", *solutions)
    sentence = "Balanced factors have the mean trace F_L (relative error, plain and flat matrices)"
    off = together(*(worst(by_seed(run, max, "attained_off")) for run in solutions))
    yield claim(sentence, off, at_most(1e-10), "identity", *solutions)
    sentence = "Without a penalty the trace is above F_L of its matrix (ratio, least over depths and measurements)"
    yield claim(sentence, by_seed("plain", min, "trace_ratio"), at_least(0.9), "inequality", "plain")
    sentence = "The flat solution has the least mean trace there is for its matrix (mean trace over F_L, greatest)"
    yield claim(sentence, by_seed("flat", max, "mean_ratio"), at_most(1.1), same, "flat")
    sentence = "And so the least trace, up to the draw of the measurements (trace over F_L, each draw)"
    yield claim(sentence, _draws("flat", "trace_ratio"), median(within(0.9, 1.1)), same, "flat")
    sentence = "The same in every single draw (least and greatest)"
    ends = together(*(worst(by_seed("flat", pick, "trace_ratio"), pick) for pick in (min, max)))
    yield claim(sentence, ends, within(0.9, 1.1), same, "flat", note=SCATTER)
    sentence = "The flat solution has the least nuclear norm (its nuclear norm over the least, greatest)"
    yield claim(sentence, by_seed("flat", max, "nuclear_ratio"), at_most(1.02), same, "flat")
    sentence = "It is the matrix that was measured (relative error, greatest)"
    yield claim(sentence, by_seed("flat", max, "recovery"), at_most(1e-2), same, "flat")
    sentence = "Without a penalty it is not (nuclear norm over the least, least over depths and measurements)"
    yield claim(sentence, by_seed("plain", min, "nuclear_ratio"), at_least(1.2), same, "plain")

    few, entries, noisy, exact = f"flat{FEW}", f"flat{ENTRIES}", f"{NOISY}: end", f"{EXACT}: end"
    sentence = "With 20 measurements the flat solution is not that of least nuclear norm (relative distance, each draw)"
    yield claim(sentence, _draws(few, "off_convex"), median(at_least(0.1)), control, few)
    sentence = "Nor need it be where entries are measured, some more often (relative distance, greatest of the draws)"
    yield claim(sentence, by_seed(entries, max, "off_convex"), at_least(0.1), control, entries)
    sentence = "Nor is it in half of the draws of entries (relative distance, each draw)"
    yield claim(sentence, _draws(entries, "off_convex"), median(at_least(0.1)), same, entries, aside=True, note=COIN)

    sentence = "SGD: noise on the labels lowers the trace (with noise over without)"
    yield claim(sentence, over(last(noisy, "trace"), last(exact, "trace")), at_most(0.8), same, noisy, exact)
    sentence = "And with it the nuclear norm (with noise over without)"
    yield claim(sentence, over(last(noisy, "nuclear"), last(exact, "nuclear")), at_most(1), same, noisy, exact)
    sentence = "Noise on the labels comes to the least nuclear norm by itself (its nuclear norm over the least)"
    yield claim(sentence, last(noisy, "nuclear_ratio"), at_most(1.02), WIDER, noisy, note=FALLING)


SCATTER = (
    "At n = 40 the trace of single draws scatters about its mean by 5 % at depth 2, 9 % at 3 and 13 % at 4: about 2 of"
    " 10 seeds miss this in quick size, and most in full size, which has more and deeper draws."
)
COIN = "Single draws are a coin toss: in about half of them the convex problem itself recovers the matrix."
FALLING = "It is still falling when the run ends."
CLAIMS = tuple(_claims())

LABELS = {
    "least": "F_L of the end-to-end matrix",
    "trace": "tr ∇²L",
    "nuclear_ratio": "nuclear norm over the least",
    "recovery": "‖M - M*‖_F/‖M*‖_F",
    "number": "number",
    "singular": "singular value",
    "penalty": "penalty λ",
    "error": "‖M - M*‖_F/‖M*‖_F",
    "step": "step",
    "sgd_trace": "tr ∇²L",
}

CAPTIONS = {
    "trace": "Flat solutions lie on the line where the trace is the least for their matrix, up to the draw of the"
    " measurements; plain ones lie above it.",
    "recovery": "The flat solution is the measured matrix where Gaussian measurements are enough; with 20 it is not,"
    " though its nuclear norm is nearly the least.  With entries it mostly is, and its norm is not the least.",
    "singular-values": "A matrix of rank one was measured 40 times and fitted by two layers.  The flat solution and"
    " that of least nuclear norm find it, and lie on each other.",
    "path": "40 measurements.  The penalty keeps the fit from being exact; the error falls in proportion to it.",
    "label-noise": "Noise on the labels moves the weights along the solutions to flatter ones; exact labels do not.",
}
chart, PATHS = charting(PART, LABELS, CAPTIONS), tuple(f"path, {depth} layers" for depth in Config.depths)
LEAST, FOUND = "Trace of the Hessian against the least there is", ("flat", "plain", f"flat{FEW}", f"plain{FEW}", "F_L")
NORMS = ("flat", "plain", "least Frobenius norm", f"flat{FEW}", f"flat{ENTRIES}")
SINGULAR = tuple(f"{name}: singular values" for name in MATRICES)

CHARTS = (
    chart("trace", LEAST, "least", "trace", FOUND, log="xy", markers=True),
    chart("recovery", "Error against nuclear norm", "nuclear_ratio", "recovery", NORMS, log="y", markers=True),
    chart("singular-values", "Singular values", "number", "singular", SINGULAR),
    chart("path", "Error as the penalty on the trace falls", "penalty", "error", PATHS, log="xy"),
    chart("label-noise", "SGD from a plain solution of two layers", "step", "sgd_trace", SGD),
)
