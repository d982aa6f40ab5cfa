"""Flat deep factorizations of a measured matrix have the least nuclear norm.

Among all deep linear networks that fit linear measurements of a matrix exactly, those with the least trace of the
Hessian have, nearly, the end-to-end matrix of least nuclear norm (sum of singular values), whatever their depth, as
long as the measurements see all matrices of low rank alike; and that matrix is the one that was measured.  Here random
Gaussian measurements of a matrix of rank one are fitted with and without a penalty on the trace, and what comes out is
held against the convex problem solved by itself.  With too few measurements, or where single entries are measured and
some of them far more often than others, the flattest solution must be another matrix.  SGD on noisy labels shows the
same pull without any penalty.

n measurements A_i of a d×d matrix, depth L, M = W_L⋯W_1, W_{b:a} = W_b⋯W_a, loss (1/n) Σ (⟨A_i,M⟩ - b_i)²:

    tr ∇²L = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F     (exact for all weights: M is linear in each entry of W_l)
    mean over Gaussian A = 2 Σ_l ‖W_{L:l+1}‖²_F ‖W_{l-1:1}‖²_F
                         ≥ F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}    (by means and Hölder; balanced factors attain it)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..claims import WIDER, Claim, Criterion, at_least, at_most, median, within
from ..history import Track
from ..plots import Chart
from ..replicas import Replicas, Slope, descend
from ..rules import GD
from ._minimize import Minimum, minimize
from ._oracles import least_frobenius_norm, least_nuclear_norm
from ._stats import Observer, by_seed, last, over
from ._study import Job, Report

PAPER = (
    "Gatmiry, Li, Chuang, Reddi, Ma & Jegelka, The Inductive Bias of Flatness Regularization for Deep Matrix"
    " Factorization (arXiv 2306.13239)"
)
PART = "Flat factorizations"

Array = NDArray[np.float64]
GAUSSIAN, FEW, ENTRIES = "", ", n = 20", ", entries"
"""How the names of runs tell measurements apart."""
TOO_FEW = 20  # measurements, for a matrix of rank one with d = 10
SHOWN_SIZE = 40
SPECTRA = ("plain", "flat", "least nuclear norm", "least Frobenius norm")
SGD = ("SGD, noisy labels", "SGD, exact labels")
DIAGONAL = (50.0, 1000.0)


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
        for name, value in vars(self).items():
            parts = value if isinstance(value, tuple) else (value,)
            if name not in ("seed", "more") and not all(v > 0 for v in parts):
                raise ValueError(f"{name} is {value}; it must be positive")
        if min(self.depths) < 2:
            raise ValueError(f"depths is {self.depths}; a factorization has two layers at least")
        if self.entries > self.dimension**2:
            raise ValueError(f"entries is {self.entries}; the matrix has {self.dimension**2}")


QUICK = Config(depths=(2,), sizes=(40,), more=False)


@dataclass(frozen=True)
class Measured:
    """Measurements A ``(n, d·d)`` of a matrix M* ``(d, d)``, fitted by L layers; weights W ``(R, L·d·d)``."""

    a: Tensor
    truth: Tensor
    depth: int

    @cached_property
    def labels(self) -> Tensor:
        """``b_i = ⟨A_i, M*⟩`` ``(n,)``."""
        return self.a @ self.truth.flatten()

    def layers(self, W: Tensor) -> tuple[Tensor, ...]:
        """``W_1, .., W_L``, each ``(R, d, d)``."""
        return W.view(len(W), self.depth, *self.truth.shape).unbind(1)

    def matrix(self, W: Tensor) -> Tensor:
        """``M = W_L⋯W_1`` ``(R, d, d)``."""
        m, *others = self.layers(W)
        for w in others:
            m = w @ m
        return m

    def losses(self, W: Tensor) -> Tensor:
        """``(1/n) Σ (⟨A_i, M⟩ - b_i)²`` ``(R,)``."""
        return (self.matrix(W).flatten(1) @ self.a.T - self.labels).square().mean(1)

    def trace(self, W: Tensor) -> Tensor:
        """``tr ∇²L = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F`` ``(R,)``."""
        sides = [((p @ p.mT).flatten(1), (q.mT @ q).flatten(1)) for p, q in self._sides(W)]
        return torch.stack([((p @ self._moments) * q).sum(1) for p, q in sides]).sum(0)

    def mean_trace(self, W: Tensor) -> Tensor:
        """``2 Σ_l ‖W_{L:l+1}‖²_F ‖W_{l-1:1}‖²_F`` ``(R,)``: the trace in the mean over Gaussian measurements."""
        sides = [p.square().sum((1, 2)) * q.square().sum((1, 2)) for p, q in self._sides(W)]
        return 2 * torch.stack(sides).sum(0)

    @cached_property
    def _moments(self) -> Tensor:
        """``(2/n) Σ_i A_ac A_bd`` as a matrix from cd to ab."""
        d = len(self.truth)
        a = self.a.view(-1, d, d)
        return 2 / len(a) * torch.einsum("iac,ibd->abcd", a, a).reshape(d * d, d * d)

    def _sides(self, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What stands left and right of each layer: ``W_{L:l+1}`` and ``W_{l-1:1}``."""
        layers = self.layers(W)
        left = [torch.eye(len(self.truth), dtype=W.dtype).expand_as(layers[0])]
        right = left[:]
        for below, above in zip(layers[:-1], layers[:0:-1], strict=True):
            right.append(below @ right[-1])
            left.append(left[-1] @ above)
        return list(zip(left[::-1], right, strict=True))


def least_trace(m: Array, depth: int) -> float:
    """``F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}``."""
    return float(2 * depth * len(m) ** (2 / depth) * nuclear(m) ** (2 - 2 / depth))


def balanced(m: Array, depth: int) -> Tensor:
    """``W_1 = αD^{½}Vᵀ``, ``W_L = αUD^{½}``, others ``γI``, for M = UDVᵀ: where F_L is attained; weights ``(L·d·d,)``.

    ``α^L = (d/‖M‖_*)^{L/2-1}``, ``γ² = α²‖M‖_*/d``.
    """
    u, s, vt = np.linalg.svd(m)
    scale = (len(m) / s.sum()) ** ((depth - 2) / (2 * depth))
    middle = scale * np.sqrt(s.sum() / len(m)) * np.eye(len(m))
    layers = [scale * np.sqrt(s)[:, None] * vt, *[middle] * (depth - 2), scale * u * np.sqrt(s)]
    return torch.from_numpy(np.concatenate([w.ravel() for w in layers]))


def nuclear(m: Array) -> float:
    """``‖M‖_*``, the sum of singular values."""
    return float(np.linalg.norm(m, "nuc"))


def distance(m: Array, other: Array) -> float:
    """``‖M - M'‖_F / ‖M'‖_F``."""
    return float(np.linalg.norm(m - other) / np.linalg.norm(other))


def gaussian(n: int, seed: int, config: Config, depth: int) -> Measured:
    """n matrices of N(0, 1) entries, and ``M* = √d u vᵀ/‖u‖‖v‖``."""
    rng = np.random.default_rng([101, seed, n])
    a = rng.standard_normal((n, config.dimension**2))
    return Measured(torch.from_numpy(a), _rank_one(rng, config.dimension), depth)


def entrywise(seed: int, draw: int, config: Config, depth: int) -> Measured:
    """Different single entries, (i, j) drawn in proportion to p_i p_j with p from .15 to 1."""
    d = config.dimension
    rng = np.random.default_rng([102, seed, draw])
    p = np.linspace(0.15, 1, d)
    weights = np.outer(p, p).ravel()
    picked = rng.choice(d * d, config.entries, replace=False, p=weights / weights.sum())
    return Measured(torch.eye(d * d, dtype=torch.float64)[picked], _rank_one(rng, d), depth)


def _rank_one(rng: np.random.Generator, d: int) -> Tensor:
    u, v = rng.standard_normal((2, d))
    return torch.from_numpy(np.sqrt(d) * np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v))


def start(p: Measured, seed: int) -> Tensor:
    """``N(0, 1/d)`` entries ``(L·d·d,)``."""
    rng = np.random.default_rng([103, seed, p.depth, len(p.a)])
    return torch.from_numpy(rng.standard_normal(p.depth * p.truth.numel()) / np.sqrt(len(p.truth)))


def plain(p: Measured, w: Tensor) -> Minimum:
    """``L = 0`` by L-BFGS, from w ``(P,)``."""
    return minimize(Replicas(p.losses).recorded(w[None]), w, below=1e-24)


def flat(p: Measured, w: Tensor, penalties: Sequence[float]) -> list[Minimum]:
    """``argmin L + λ tr ∇²L`` for each penalty λ, from where the last one ended."""
    found = []
    for penalty in penalties:
        f = Replicas(lambda W, penalty=penalty: p.losses(W) + penalty * p.trace(W))
        found.append(minimize(f.recorded(w[None]), w))
        w = found[-1].weights
    return found


def relabelled(p: Measured, noise: Tensor, batch: int, rates: Callable[[int], float], loud: int, seed: int) -> Slope:
    """Gradients on `batch` labels drawn at each step, with noise of deviation `noise` ``(R,)`` until step `loud`."""
    draw = torch.Generator().manual_seed(seed)
    labels = p.labels

    def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        pick = torch.randperm(len(labels), generator=draw)[:batch]
        noisy = labels[pick] + noise[:, None] * (step < loud) * torch.randn(batch, generator=draw, dtype=W.dtype)
        f = Replicas(lambda W: (p.matrix(W).flatten(1) @ p.a[pick].T - noisy).square().mean(1))
        losses, g = f.value_and_grad(W)
        return losses, rates(step) * g

    return slope


def jobs(config: Config) -> list[Job]:
    found = []
    for seed in range(config.seed, config.seed + config.repeats):
        for depth in config.depths:
            own = {"seed": seed, "depth": depth, "config": config}
            for n in sorted({*config.sizes, TOO_FEW}):
                name = f"{n} Gaussian measurements, depth {depth}, seed {seed}"
                found.append(Job(name, _fit, own | {"n": n}, 1.2 * depth - 1))
        if config.more:
            for draw in range(config.draws):
                own = {"seed": seed, "depth": min(config.depths), "config": config, "draw": draw}
                found.append(Job(f"entries, draw {draw}, seed {seed}", _fit, own, 1.4))
            own = {"seed": seed, "config": config}
            found.append(Job(f"label noise, seed {seed}", _label_noise, own, config.noise_steps / 2000))
    return found


def _fit(track: Track, report: Report, seed: int, depth: int, config: Config, n: int = 0, draw: int = 0) -> None:
    """One set of measurements: the convex problem, plain and flat factorizations; n = 0 measures entries."""
    track.resume()
    p = gaussian(n, seed, config, depth) if n else entrywise(seed, draw, config, depth)
    setting = {0: ENTRIES, TOO_FEW: FEW}.get(n, GAUSSIAN)
    a, truth, shape = p.a.numpy(), p.truth.numpy(), (config.dimension,) * 2
    convex = least_nuclear_norm(a, p.labels.numpy(), shape)
    square = least_frobenius_norm(a, p.labels.numpy(), shape)
    report(0.05)
    w = start(p, seed)
    fitted = plain(p, w)
    report(0.2)
    # An entry has 1/d² of the mean square of a Gaussian matrix, so its penalties start higher.
    penalties = config.penalties if n else (10 * max(config.penalties), *config.penalties)
    path = flat(p, w, penalties)
    report(0.9)
    points = torch.stack([w, fitted.weights, path[-1].weights])
    traces, exact = p.trace(points), Replicas(p.losses).hessian(points).diagonal(dim1=1, dim2=2).sum(1)
    own = {"seed": seed, "depth": depth, "n": len(a)}
    track.append(run=f"start{setting}", trace_off=abs(traces[0].item() / exact[0].item() - 1), **own)
    for i, (name, found) in enumerate((("plain", fitted), ("flat", path[-1])), 1):
        m = p.matrix(points[i : i + 1])[0].numpy()
        least = least_trace(m, depth)
        lowest = p.mean_trace(balanced(m, depth)[None]).item()
        track.append(
            run=f"{name}{setting}",
            residual=p.losses(points[i : i + 1]).item(),
            gradient=found.gradient,
            nuclear=nuclear(m),
            nuclear_ratio=nuclear(m) / nuclear(convex),
            recovery=distance(m, truth),
            off_convex=distance(m, convex),
            trace=traces[i].item(),
            least=least,
            trace_ratio=traces[i].item() / least,
            mean_ratio=p.mean_trace(points[i : i + 1]).item() / least,
            trace_off=abs(traces[i].item() / exact[i].item() - 1),
            attained_off=abs(lowest / least - 1),
            **own,
        )
    for name, m in (("least nuclear norm", convex), ("least Frobenius norm", square)):
        norm = nuclear(m) / nuclear(convex)
        track.append(run=f"{name}{setting}", recovery=distance(m, truth), nuclear_ratio=norm, **own)
    if seed == config.seed and n == SHOWN_SIZE:
        for penalty, found in zip(penalties, path, strict=True):
            error = distance(p.matrix(found.weights[None])[0].numpy(), truth)
            track.append(run=f"path, {depth} layers", penalty=penalty, error=error)
        ends = p.matrix(points[1:]).numpy()
        for name, m in zip(SPECTRA, (*ends, convex, square), strict=True):
            for i, s in enumerate(np.linalg.svd(m, compute_uv=False) if depth == 2 else (), 1):
                track.append(run=f"{name}: singular values", number=i, singular=float(s))
    if seed == config.seed and n == max(config.sizes) and depth == max(config.depths):
        for x in np.geomspace(*DIAGONAL, 60):
            track.append(run="F_L", least=float(x), trace=float(x))


def _label_noise(track: Track, report: Report, seed: int, config: Config) -> None:
    """SGD from a plain solution of two layers, with noise on the labels and without, side by side."""
    track.resume()
    p = gaussian(SHOWN_SIZE, seed, config, depth=2)
    w = plain(p, start(p, seed)).weights
    steps, every = config.noise_steps, max(config.noise_steps // 100, 1)
    convex = least_nuclear_norm(p.a.numpy(), p.labels.numpy(), (config.dimension,) * 2)

    def read(W: Tensor) -> list[dict[str, float]]:
        norms = [nuclear(m) for m in p.matrix(W).numpy()]
        return [{"trace": t, "nuclear": norm} for t, norm in zip(p.trace(W).tolist(), norms, strict=True)]

    def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if step % every == 0:
            report(step / steps)
            for name, row in zip(SGD, read(W) if seed == config.seed else (), strict=False):
                track.append(run=name, step=step, sgd_trace=row["trace"])

    noise = torch.tensor([1.0, 0.0], dtype=torch.float64)
    slope = relabelled(p, noise, 10, lambda step: 0.1 if step >= 0.9 * steps else 1.0, round(0.95 * steps), seed)
    end = descend(slope, w.expand(2, -1).clone(), GD(2e-3), steps, watch=watch)
    for name, row in zip(SGD, read(end.weights), strict=True):
        track.append(run=f"{name}: end", seed=seed, nuclear_ratio=row["nuclear"] / nuclear(convex), **row)


def _every(run: str, column: str, reduce: Callable[..., float] = max) -> Observer:
    """The greatest (or what `reduce` makes of them) over depths and measurements, once for each repeat."""
    return by_seed(run, reduce, column)


def _greatest(runs: Sequence[str], column: str) -> Observer:
    """The greatest in several runs."""
    return lambda h, config: tuple(float(h.series(run, column).max()) for run in runs)


def _draws(run: str, column: str, reduce: Callable[[Array], Array] = np.asarray) -> Observer:
    """Every value, or what `reduce` makes of them."""
    return lambda h, config: tuple(reduce(h.series(run, column)).tolist())


def _claim(
    sentence: str, observe: Observer, criterion: Criterion, kind: str, *runs: str, note: str = "", deciding: bool = True
) -> Claim:
    return Claim(sentence, observe, criterion, kind, PART, runs, deciding, note)


def _claims() -> Iterator[Claim]:
    same, control, points = "comparison", "negative control", ("start", "plain", "flat")
    sentence = "The trace of the Hessian is its formula, at the start and at both solutions (relative error)"
    yield _claim(sentence, _greatest(points, "trace_off"), at_most(1e-8), "identity", *points)
    sentence = "Balanced factors have the mean trace F_L (relative error, plain and flat matrices)"
    yield _claim(sentence, _greatest(points[1:], "attained_off"), at_most(1e-10), "identity", *points[1:])
    sentence = "Without a penalty the trace is above F_L of its matrix (ratio, least over depths and measurements)"
    yield _claim(sentence, _every("plain", "trace_ratio", min), at_least(0.9), "inequality", "plain")
    sentence = "The flat solution has the least mean trace there is for its matrix (mean trace over F_L, greatest)"
    yield _claim(sentence, _every("flat", "mean_ratio"), at_most(1.1), same, "flat")
    sentence = "And so the least trace, up to the draw of the measurements (trace over F_L, each draw)"
    yield _claim(sentence, _draws("flat", "trace_ratio"), median(within(0.9, 1.1)), same, "flat")
    sentence = "The same in every single draw (least and greatest)"
    ends = _draws("flat", "trace_ratio", lambda v: np.array([v.min(), v.max()]))
    note = "With 40 to 60 measurements the trace scatters about its mean by 3 to 10 percent."
    yield _claim(sentence, ends, within(0.9, 1.1), same, "flat", note=note, deciding=False)
    sentence = "The flat solution has the least nuclear norm (its nuclear norm over the least, greatest)"
    yield _claim(sentence, _every("flat", "nuclear_ratio"), at_most(1.02), same, "flat")
    sentence = "It is the matrix that was measured (relative error, greatest)"
    yield _claim(sentence, _every("flat", "recovery"), at_most(1e-2), same, "flat")
    sentence = "Without a penalty it is not (nuclear norm over the least, least over depths and measurements)"
    yield _claim(sentence, _every("plain", "nuclear_ratio", min), at_least(1.2), same, "plain")

    few, entries = f"flat{FEW}", f"flat{ENTRIES}"
    sentence = "With 20 measurements the flat solution is not that of least nuclear norm (relative distance, each draw)"
    yield _claim(sentence, _draws(few, "off_convex"), median(at_least(0.1)), control, few)
    sentence = "Nor need it be where entries are measured, some more often (relative distance, greatest of the draws)"
    yield _claim(sentence, _every(entries, "off_convex"), at_least(0.1), control, entries)

    noisy, exact = (f"{name}: end" for name in SGD)
    sentence = "SGD: noise on the labels lowers the trace (with noise over without)"
    yield _claim(sentence, over(last(noisy, "trace"), last(exact, "trace")), at_most(0.8), same, noisy, exact)
    sentence = "And with it the nuclear norm (with noise over without)"
    yield _claim(sentence, over(last(noisy, "nuclear"), last(exact, "nuclear")), at_most(1), same, noisy, exact)
    sentence = "Noise on the labels comes to the least nuclear norm by itself (its nuclear norm over the least)"
    note = "It is still falling when the run ends."
    yield _claim(sentence, last(noisy, "nuclear_ratio"), at_most(1.02), WIDER, noisy, note=note, deciding=False)


CLAIMS = tuple(_claims())
ERROR = "‖M - M*‖_F/‖M*‖_F"
CHARTS = (
    Chart(
        "trace",
        "Trace of the Hessian against the least there is",
        "least",
        "trace",
        ("flat", "plain", f"flat{FEW}", f"plain{FEW}", "F_L"),
        "F_L of the end-to-end matrix",
        "tr ∇²L",
        log_x=True,
        log_y=True,
        markers=True,
        part=PART,
        caption="Flat solutions lie on the line where the trace is the least for their matrix, up to the draw of the"
        " measurements; plain ones lie above it.",
    ),
    Chart(
        "recovery",
        "Error against nuclear norm",
        "nuclear_ratio",
        "recovery",
        ("flat", "plain", "least Frobenius norm", f"flat{FEW}", f"flat{ENTRIES}"),
        "nuclear norm over the least",
        ERROR,
        log_y=True,
        markers=True,
        part=PART,
        caption="The flat solution is the measured matrix where Gaussian measurements are enough; with 20 it is not,"
        " though its nuclear norm is nearly the least.  With entries it mostly is, and its norm is not the least.",
    ),
    Chart(
        "singular-values",
        "Singular values",
        "number",
        "singular",
        tuple(f"{name}: singular values" for name in SPECTRA),
        "number",
        "singular value",
        part=PART,
        caption="A matrix of rank one was measured 40 times and fitted by two layers.  The flat solution and that of"
        " least nuclear norm find it, and lie on each other.",
    ),
    Chart(
        "path",
        "Error as the penalty on the trace falls",
        "penalty",
        "error",
        tuple(f"path, {depth} layers" for depth in (2, 3, 4)),
        "penalty λ",
        ERROR,
        log_x=True,
        log_y=True,
        part=PART,
        caption="40 measurements.  The penalty keeps the fit from being exact; the error falls in proportion to it.",
    ),
    Chart(
        "label-noise",
        "SGD from a plain solution of two layers",
        "step",
        "sgd_trace",
        SGD,
        "step",
        "tr ∇²L",
        part=PART,
        caption="Noise on the labels moves the weights along the solutions to flatter ones; exact labels do not.",
    ),
)
