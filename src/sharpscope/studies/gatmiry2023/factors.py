"""Deep factorizations of a measured matrix: their loss, the trace of its Hessian, and the least the trace can be.

n measurements A_i of a d×d matrix M*, depth L, M = W_L⋯W_1, W_{b:a} = W_b⋯W_a, b_i = ⟨A_i,M*⟩:

    loss = (1/n) Σ (⟨A_i,M⟩ - b_i)²
    tr ∇² = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F       exact for all weights: M is linear in each entry of W_l
    mean over Gaussian A = 2 Σ_l ‖W_{L:l+1}‖²_F ‖W_{l-1:1}‖²_F
                         ≥ F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}   by means and Hölder; balanced factors attain it
    W_1 = αD^{½}Vᵀ, W_L = αUD^{½}, others γI, for M = UDVᵀ     balanced factors
    α^L = (d/‖M‖_*)^{L/2-1},  γ² = α²‖M‖_*/d

The trace of one draw of measurements scatters about its mean: by 5, 9 and 13 % at depths 2, 3 and 4, for balanced
factors of a matrix u vᵀ and n = 40.  The layers in between see only uᵀA_iv, one number for each measurement.

R sets of weights side by side, each ``(L·d·d,)``: W_1, .., W_L one after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...autodiff.batched import BatchedRuns, Slope
from .._shared.minimize import LocalMinimum, minimize
from .._shared.oracles import least_frobenius_norm, least_nuclear_norm

Array = NDArray[np.float64]
MATRICES = ("plain", "flat", "least nuclear norm", "least Frobenius norm")


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

    def matrix_of(self, w: Tensor) -> Array:
        """M ``(d, d)`` of one set of weights ``(L·d·d,)``."""
        return np.asarray(self.matrix(w[None])[0].numpy())

    def losses(self, W: Tensor) -> Tensor:
        """``(1/n) Σ (⟨A_i, M⟩ - b_i)²`` ``(R,)``."""
        return (self.matrix(W).flatten(1) @ self.a.T - self.labels).square().mean(1)

    def trace(self, W: Tensor) -> Tensor:
        """``tr ∇² = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F`` ``(R,)``."""
        sides = [((p @ p.mT).flatten(1), (q.mT @ q).flatten(1)) for p, q in self._sides(W)]
        return torch.stack([((p @ self._moments) * q).sum(1) for p, q in sides]).sum(0)

    def dense_trace(self, W: Tensor) -> Tensor:
        """The same ``(R,)`` from all second derivatives."""
        return BatchedRuns(self.losses).hessian(W).diagonal(dim1=1, dim2=2).sum(1)

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


def gaussian(n: int, d: int, depth: int, seed: int) -> Measured:
    """n matrices of N(0, 1) entries, and ``M* = √d u vᵀ/‖u‖‖v‖``."""
    rng = np.random.default_rng([101, seed, n])
    a = rng.standard_normal((n, d * d))
    return Measured(torch.from_numpy(a), _rank_one(rng, d), depth)


def entrywise(n: int, d: int, depth: int, seed: int, draw: int) -> Measured:
    """n different single entries, (i, j) drawn in proportion to p_i p_j with p from .15 to 1."""
    rng = np.random.default_rng([102, seed, draw])
    p = np.linspace(0.15, 1, d)
    weights = np.outer(p, p).ravel()
    picked = rng.choice(d * d, n, replace=False, p=weights / weights.sum())
    return Measured(torch.eye(d * d, dtype=torch.float64)[picked], _rank_one(rng, d), depth)


def _rank_one(rng: np.random.Generator, d: int) -> Tensor:
    u, v = rng.standard_normal((2, d))
    return torch.from_numpy(np.sqrt(d) * np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v))


def start(p: Measured, seed: int) -> Tensor:
    """``N(0, 1/d)`` entries ``(L·d·d,)``."""
    rng = np.random.default_rng([103, seed, p.depth, len(p.a)])
    return torch.from_numpy(rng.standard_normal(p.depth * p.truth.numel()) / np.sqrt(len(p.truth)))


def nuclear(m: Array) -> float:
    """``‖M‖_*``, the sum of singular values."""
    return float(np.linalg.norm(m, "nuc"))


def distance(m: Array, other: Array) -> float:
    """``‖M - M'‖_F / ‖M'‖_F``."""
    return float(np.linalg.norm(m - other) / np.linalg.norm(other))


def least_trace(m: Array, depth: int) -> float:
    """``F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}``."""
    return float(2 * depth * len(m) ** (2 / depth) * nuclear(m) ** (2 - 2 / depth))


def balanced(m: Array, depth: int) -> Tensor:
    """``W_1 = αD^{½}Vᵀ``, ``W_L = αUD^{½}``, others ``γI``: where F_L is attained; weights ``(L·d·d,)``."""
    u, s, vt = np.linalg.svd(m)
    scale = (len(m) / s.sum()) ** ((depth - 2) / (2 * depth))
    middle = scale * np.sqrt(s.sum() / len(m)) * np.eye(len(m))
    layers = [scale * np.sqrt(s)[:, None] * vt, *[middle] * (depth - 2), scale * u * np.sqrt(s)]
    return torch.from_numpy(np.concatenate([w.ravel() for w in layers]))


def plain(p: Measured, w: Tensor) -> LocalMinimum:
    """A zero of the loss by L-BFGS, from w ``(L·d·d,)``."""
    return minimize(BatchedRuns(p.losses).recorded(w[None]), w, below=1e-24)


def flat(p: Measured, w: Tensor, penalties: Sequence[float]) -> list[LocalMinimum]:
    """``argmin loss + λ tr ∇²`` for each penalty λ, from where the last one ended."""
    found = []
    for penalty in penalties:
        f = BatchedRuns(lambda W, penalty=penalty: p.losses(W) + penalty * p.trace(W))
        found.append(minimize(f.recorded(w[None]), w))
        w = found[-1].weights
    return found


@dataclass(frozen=True)
class Solved:
    """What fits one set of measurements: a plain solution, flat ones for each penalty, and two convex problems."""

    p: Measured
    start: Tensor
    plain: LocalMinimum
    path: Sequence[LocalMinimum]
    convex: Array  # of least nuclear norm
    square: Array  # of least Frobenius norm

    @property
    def matrices(self) -> dict[str, Array]:
        """By the names `MATRICES`."""
        ends = (self.p.matrix_of(found.weights) for found in (self.plain, self.path[-1]))
        return dict(zip(MATRICES, (*ends, self.convex, self.square), strict=True))

    def rows(self) -> dict[str, dict[str, float]]:
        """The start, then every matrix, against M*, against the least nuclear norm and, if it is a product, F_L.

        `mean_ratio` is the mean trace over F_L, `attained_off` how far balanced factors of the same M are from F_L.
        """
        p, matrices, ends = self.p, self.matrices, dict(zip(MATRICES, (self.plain, self.path[-1]), strict=False))
        points = torch.stack([self.start, *(found.weights for found in ends.values())])
        traces, dense = p.trace(points).tolist(), p.dense_trace(points).tolist()
        off = [abs(trace / exact - 1) for trace, exact in zip(traces, dense, strict=True)]
        rows = {"start": {"trace_off": off[0]}}
        for i, (name, found) in enumerate(ends.items(), 1):
            m, w = matrices[name], found.weights[None]
            least = least_trace(m, p.depth)
            rows[name] = {
                "residual": p.losses(w).item(),
                "gradient": found.gradient,
                "nuclear": nuclear(m),
                "nuclear_ratio": nuclear(m) / nuclear(self.convex),
                "recovery": distance(m, p.truth.numpy()),
                "off_convex": distance(m, self.convex),
                "trace": traces[i],
                "least": least,
                "trace_ratio": traces[i] / least,
                "mean_ratio": p.mean_trace(w).item() / least,
                "attained_off": abs(p.mean_trace(balanced(m, p.depth)[None]).item() / least - 1),
                "trace_off": off[i],
            }
        for name in MATRICES[2:]:
            m = matrices[name]
            rows[name] = {"recovery": distance(m, p.truth.numpy()), "nuclear_ratio": nuclear(m) / nuclear(self.convex)}
        return rows


def solved(p: Measured, w: Tensor, penalties: Sequence[float], progress: Callable[[float], None]) -> Solved:
    """All solutions, the factorizations from w ``(L·d·d,)``; it reports the share that is done."""
    a, b, (d, _) = p.a.numpy(), p.labels.numpy(), p.truth.shape
    convex, square = least_nuclear_norm(a, b, (d, d)), least_frobenius_norm(a, b, (d, d))
    progress(0.05)
    fitted = plain(p, w)
    progress(0.2)
    path = flat(p, w, penalties)
    progress(0.9)
    return Solved(p, w, fitted, path, convex, square)


def relabelled(p: Measured, noise: Tensor, batch: int, rates: Callable[[int], float], loud: int, seed: int) -> Slope:
    """Gradients on `batch` labels drawn at each step, with noise of deviation `noise` ``(R,)`` until step `loud`."""
    draw = torch.Generator().manual_seed(seed)
    labels = p.labels

    def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        pick = torch.randperm(len(labels), generator=draw)[:batch]
        noisy = labels[pick] + noise[:, None] * (step < loud) * torch.randn(batch, generator=draw, dtype=W.dtype)
        f = BatchedRuns(lambda W: (p.matrix(W).flatten(1) @ p.a[pick].T - noisy).square().mean(1))
        losses, g = f.value_and_grad(W)
        return losses, rates(step) * g

    return slope
