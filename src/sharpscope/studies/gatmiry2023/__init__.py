"""Flat deep factorizations of a measured matrix have the least nuclear norm.

Among all deep linear networks that fit linear measurements of a matrix exactly, those with the least trace of the
Hessian have, nearly, the end-to-end matrix of least nuclear norm (sum of singular values), whatever their depth, as
long as the measurements see all matrices of low rank alike; and that matrix is the one that was measured.  Here random
Gaussian measurements of a matrix of rank one are fitted with and without a penalty on the trace, and the result is
compared with the solution of the convex problem.  In the controls it can be another matrix: measurements are too few,
or they are single entries, some of them seen far more often than others.  SGD on noisy labels shows the same pull
without any penalty.

n measurements A_i of a d×d matrix, depth L, M = W_L⋯W_1, W_{b:a} = W_b⋯W_a, loss (1/n) Σ (⟨A_i,M⟩ - b_i)²:

    tr ∇²L = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F     (exact for all weights: M is linear in each entry of W_l)
    mean over Gaussian A = 2 Σ_l ‖W_{L:l+1}‖²_F ‖W_{l-1:1}‖²_F
                         ≥ F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}    (by means and Hölder; balanced factors attain it)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidValue
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, under, wider_claim
from .._framework.config import demand_positive, seeds
from .._framework.observe import joined, run
from .._framework.study import Job, Progress
from .._shared.oracles import least_nuclear_norm
from .factors import (
    MATRICES,
    Solutions,
    distance,
    entrywise,
    gaussian,
    nuclear,
    plain_solution,
    solve,
    start,
    with_label_noise,
)

PAPER = (
    "Gatmiry, Li, Chuang, Reddi, Ma & Jegelka, The Inductive Bias of Flatness Regularization for Deep Matrix"
    " Factorization (arXiv 2306.13239)"
)
PART = "Flat factorizations"
FEW, ENTRIES = ", n = 20", ", entries"  # endings of the names of runs
TOO_FEW, SHOWN = 20, 40  # measurements, for a matrix of rank one with d = 10: of a control, and in charts
NOISY, EXACT = SGD = ("SGD, noisy labels", "SGD, exact labels")


@dataclass(frozen=True)
class Config:
    """The settings of the study; the defaults are its full size."""

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


QUICK = Config(repeats=5, depths=(2,), sizes=(40,), more=False)


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in seeds(config):
        common = {"seed": seed, "config": config}
        for depth in config.depths:
            for n in sorted({*config.sizes, TOO_FEW}):
                name = f"{n} Gaussian measurements, depth {depth}, seed {seed}"
                found.append(Job(name, _gaussian, {"n": n, "depth": depth, **common}, cost=1.2 * depth - 1))
        if config.more:
            for i in range(config.draws):
                found.append(Job(f"entries, draw {i}, seed {seed}", _entries, {"draw": i, **common}, cost=1.4))
            found.append(Job(f"label noise, seed {seed}", _label_noise, common, cost=config.noise_steps / 2000))
    return found


def _gaussian(log: RunLog, progress: Progress, n: int, depth: int, seed: int, config: Config) -> None:
    """Fit Gaussian measurements with and without a penalty on the trace; of the first repeat, also for charts."""
    log.resume()
    problem = gaussian(n, config.dimension, depth, seed)
    found = solve(problem, start(problem, seed), config.penalties, progress)
    _write(log, found, FEW if n == TOO_FEW else "", seed)
    if seed == config.seed and n == SHOWN:
        for penalty, end in zip(config.penalties, found.path, strict=True):
            error = distance(problem.matrix_of(end.weights), problem.truth.numpy())
            log.append(run=f"path, {depth} layers", penalty=penalty, error=error)
        if depth == 2:
            for name, m in found.matrices.items():
                for i, s in enumerate(np.linalg.svd(m, compute_uv=False), 1):
                    log.append(run=f"{name}: singular values", number=i, singular=float(s))
    if seed == config.seed and n == max(config.sizes) and depth == max(config.depths):
        for x in np.geomspace(50, 1000, 60):
            log.append(run="F_L", least=float(x), trace=float(x))


def _entries(log: RunLog, progress: Progress, draw: int, seed: int, config: Config) -> None:
    """Fit single entries; one has 1/d² of the mean square of a Gaussian matrix, so the penalties start higher."""
    log.resume()
    problem = entrywise(config.entries, config.dimension, min(config.depths), seed, draw)
    penalties = (10 * max(config.penalties), *config.penalties)
    _write(log, solve(problem, start(problem, seed), penalties, progress), ENTRIES, seed)


def _write(log: RunLog, found: Solutions, ending: str, seed: int) -> None:
    for name, row in found.rows().items():
        log.append(run=f"{name}{ending}", **row, seed=seed, depth=found.problem.depth, n=len(found.problem.a))


def _label_noise(log: RunLog, progress: Progress, seed: int, config: Config) -> None:
    """Follow SGD from a plain solution of two layers, with noise on the labels and without, side by side."""
    log.resume()
    d, steps = config.dimension, config.noise_steps
    problem = gaussian(SHOWN, d, 2, seed)
    w = plain_solution(problem, start(problem, seed)).weights
    least = nuclear(least_nuclear_norm(problem.a.numpy(), problem.labels.numpy(), (d, d)))

    def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if step % max(steps // 100, 1) == 0:
            progress(step / steps)
            if seed == config.seed:
                for name, trace in zip(SGD, problem.trace(W).tolist(), strict=True):
                    log.append(run=name, step=step, sgd_trace=trace)

    slope = with_label_noise(
        problem,
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        batch=10,
        rate=lambda step: 0.1 if step >= 0.9 * steps else 1.0,
        noisy_steps=round(0.95 * steps),
        seed=seed,
    )
    W = descend(slope, w.expand(2, -1).clone(), GD(2e-3), steps, watch=watch).weights
    for name, trace, m in zip(SGD, problem.trace(W).tolist(), problem.matrix(W).numpy(), strict=True):
        norm = nuclear(m)
        log.append(run=f"{name}: end", seed=seed, nuclear_ratio=norm / least, trace=trace, nuclear=norm)


PLAIN, FLAT = run("plain"), run("flat")  # of all depths and numbers of measurements
WITH_NOISE, WITHOUT_NOISE = run(f"{NOISY}: end"), run(f"{EXACT}: end")

CLAIMS = under(
    PART,
    identity(
        "The trace of the Hessian is its formula, at the start and at both solutions (relative error)",
        joined(*(rows["trace_off"].over_repeats(np.max) for rows in (run("start"), PLAIN, FLAT))) <= 1e-8,
    ),
    identity(
        "Balanced factors have the mean trace F_L (relative error, plain and flat matrices)",
        joined(*(rows["attained_off"].over_repeats(np.max) for rows in (PLAIN, FLAT))) <= 1e-10,
    ),
    inequality(
        "Without a penalty the trace is above F_L of its matrix (ratio, least over depths and measurements)",
        PLAIN["trace_ratio"].min() >= 0.9,
    ),
    comparison(
        "The flat solution has the least mean trace there is for its matrix (mean trace over F_L, greatest)",
        FLAT["mean_ratio"].max() <= 1.1,
    ),
    comparison(
        "And so the least trace, up to the draw of the measurements (trace over F_L, each draw)",
        FLAT["trace_ratio"].within(0.9, 1.1).in_the_median(),
    ),
    comparison(
        "The same in every single draw (least and greatest)",
        FLAT["trace_ratio"].extent().within(0.9, 1.1),
        deciding=False,
        note="The law is about the mean over measurements, which is decided on above.  At n = 40 the trace of single"
        " draws scatters about it by 5 % at depth 2, 9 % at 3 and 13 % at 4.",
    ),
    comparison(
        "The flat solution has the least nuclear norm (its nuclear norm over the least, greatest)",
        FLAT["nuclear_ratio"].max() <= 1.02,
    ),
    comparison(
        "It is the matrix that was measured (relative error, each draw)",
        (FLAT["recovery"] <= 1e-2).in_the_median(),
    ),
    comparison(
        "It is so in every single draw (relative error, greatest)",
        FLAT["recovery"].over_repeats(np.max) <= 1e-2,
        deciding=False,
        note="The convex problem recovers a matrix of rank one with d = 10 in more than half of all draws from n = 36"
        " on, its statistical dimension; at n = 40 it still misses about one in eight, at n = 60 none.",
    ),
    comparison(
        "Without a penalty it is not (nuclear norm over the least, least over depths and measurements)",
        PLAIN["nuclear_ratio"].min() >= 1.2,
    ),
    control(
        "With 20 measurements the flat solution is not that of least nuclear norm (relative distance, each draw)",
        (run(f"flat{FEW}")["off_convex"] >= 0.1).in_the_median(),
    ),
    control(
        "Nor need it be where entries are measured, some more often (relative distance, greatest of the draws)",
        run(f"flat{ENTRIES}")["off_convex"].max() >= 0.1,
    ),
    comparison(
        "Nor is it in half of the draws of entries (relative distance, each draw)",
        (run(f"flat{ENTRIES}")["off_convex"] >= 0.1).in_the_median(),
        deciding=False,
        note="Single draws are a coin toss: in about half of them the convex problem itself recovers the matrix.",
    ),
    comparison(
        "SGD: noise on the labels lowers the trace (with noise over without)",
        WITH_NOISE["trace"].last() / WITHOUT_NOISE["trace"].last() <= 0.8,
    ),
    comparison(
        "And with it the nuclear norm (with noise over without)",
        WITH_NOISE["nuclear"].last() / WITHOUT_NOISE["nuclear"].last() <= 1,
    ),
    wider_claim(
        "Noise on the labels comes to the least nuclear norm by itself (its nuclear norm over the least)",
        WITH_NOISE["nuclear_ratio"].last() <= 1.02,
        note="It is still falling when the run ends.",
    ),
)

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

CHARTS = labelled(
    LABELS,
    *under(
        PART,
        Chart(
            "trace",
            "Trace of the Hessian against the least there is",
            x="least",
            y="trace",
            runs=("flat", "plain", f"flat{FEW}", f"plain{FEW}", "F_L"),
            log="xy",
            markers=True,
            caption=(
                "Flat solutions lie on the line where the trace is the least for their matrix, up to the draw of the"
                " measurements; plain ones lie above it."
            ),
        ),
        Chart(
            "recovery",
            "Error against nuclear norm",
            x="nuclear_ratio",
            y="recovery",
            runs=("flat", "plain", "least Frobenius norm", f"flat{FEW}", f"flat{ENTRIES}"),
            log="y",
            markers=True,
            caption=(
                "The flat solution is the measured matrix where Gaussian measurements are enough; with 20 it is not,"
                " though its nuclear norm is nearly the least.  With entries it mostly is, and its norm is not the"
                " least."
            ),
        ),
        Chart(
            "singular-values",
            "Singular values",
            x="number",
            y="singular",
            runs=tuple(f"{name}: singular values" for name in MATRICES),
            caption=(
                "A matrix of rank one was measured 40 times and fitted by two layers.  The flat solution and that of"
                " least nuclear norm find it, and lie on each other."
            ),
        ),
        Chart(
            "path",
            "Error as the penalty on the trace falls",
            x="penalty",
            y="error",
            runs=tuple(f"path, {depth} layers" for depth in Config.depths),
            log="xy",
            caption=(
                "40 measurements.  The penalty keeps the fit from being exact; the error falls in proportion to it."
            ),
        ),
        Chart(
            "label-noise",
            "SGD from a plain solution of two layers",
            x="step",
            y="sgd_trace",
            runs=SGD,
            caption="Noise on the labels moves the weights along the solutions to flatter ones; exact labels do not.",
        ),
    ),
)
