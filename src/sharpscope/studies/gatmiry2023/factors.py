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

from ...autodiff.batched import BatchedRuns, GradientFunction
from .._shared.minimize import LocalMinimum, minimize
from .._shared.oracles import least_frobenius_norm, least_nuclear_norm

Array = NDArray[np.float64]
MATRICES = ("plain", "flat", "least nuclear norm", "least Frobenius norm")


@dataclass(frozen=True)
class MatrixSensing:
    """Linear measurements of a matrix, fitted by a product of L layers; weights are W ``(R, L·d·d)``."""

    a: Tensor  # A (n, d·d)
    truth: Tensor  # M* (d, d)
    depth: int  # L

    @cached_property
    def labels(self) -> Tensor:
        """The values that were measured, ``b_i = ⟨A_i, M*⟩`` ``(n,)``."""
        return self.a @ self.truth.flatten()

    def layers(self, W: Tensor) -> tuple[Tensor, ...]:
        """Split weights into the layers ``W_1, .., W_L``, each ``(R, d, d)``."""
        return W.view(len(W), self.depth, *self.truth.shape).unbind(1)

    def matrix(self, W: Tensor) -> Tensor:
        """Multiply the layers, ``M = W_L⋯W_1`` ``(R, d, d)``."""
        m, *others = self.layers(W)
        for w in others:
            m = w @ m
        return m

    def matrix_of(self, w: Tensor) -> Array:
        """Multiply the layers of one set of weights ``(L·d·d,)``, M ``(d, d)``."""
        return np.asarray(self.matrix(w[None])[0].numpy())

    def losses(self, W: Tensor) -> Tensor:
        """Compute the losses ``(1/n) Σ (⟨A_i, M⟩ - b_i)²`` ``(R,)``."""
        return (self.matrix(W).flatten(1) @ self.a.T - self.labels).square().mean(1)

    def trace(self, W: Tensor) -> Tensor:
        """Compute the trace of the Hessian by its formula ``(R,)``.

        ``tr ∇² = (2/n) Σ_i Σ_l ‖W_{L:l+1}ᵀ A_i W_{l-1:1}ᵀ‖²_F``
        """
        sides = [((p @ p.mT).flatten(1), (q.mT @ q).flatten(1)) for p, q in self._sides(W)]
        return torch.stack([((p @ self._moments) * q).sum(1) for p, q in sides]).sum(0)

    def dense_trace(self, W: Tensor) -> Tensor:
        """Compute the trace of the Hessian from all second derivatives ``(R,)``."""
        return BatchedRuns(self.losses).hessian(W).diagonal(dim1=1, dim2=2).sum(1)

    def mean_trace(self, W: Tensor) -> Tensor:
        """Compute the mean of the trace over Gaussian measurements ``(R,)``.

        ``2 Σ_l ‖W_{L:l+1}‖²_F ‖W_{l-1:1}‖²_F``
        """
        sides = [p.square().sum((1, 2)) * q.square().sum((1, 2)) for p, q in self._sides(W)]
        return 2 * torch.stack(sides).sum(0)

    @cached_property
    def _moments(self) -> Tensor:
        """The second moments of the measurements, ``(2/n) Σ_i A_ac A_bd``, as a matrix from cd to ab."""
        d = len(self.truth)
        a = self.a.view(-1, d, d)
        return 2 / len(a) * torch.einsum("iac,ibd->abcd", a, a).reshape(d * d, d * d)

    def _sides(self, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Multiply the layers left and right of each layer, ``W_{L:l+1}`` and ``W_{l-1:1}``."""
        layers = self.layers(W)
        left = [torch.eye(len(self.truth), dtype=W.dtype).expand_as(layers[0])]
        right = left[:]
        for below, above in zip(layers[:-1], layers[:0:-1], strict=True):
            right.append(below @ right[-1])
            left.append(left[-1] @ above)
        return list(zip(left[::-1], right, strict=True))


def gaussian(n: int, d: int, depth: int, seed: int) -> MatrixSensing:
    """Measure ``M* = √d u vᵀ/‖u‖‖v‖`` by n matrices of N(0, 1) entries."""
    rng = np.random.default_rng([101, seed, n])
    a = rng.standard_normal((n, d * d))
    return MatrixSensing(torch.from_numpy(a), _rank_one(rng, d), depth)


def entrywise(n: int, d: int, depth: int, seed: int, draw: int) -> MatrixSensing:
    """Measure n different single entries, (i, j) drawn in proportion to p_i p_j with p from .15 to 1."""
    rng = np.random.default_rng([102, seed, draw])
    p = np.linspace(0.15, 1, d)
    weights = np.outer(p, p).ravel()
    picked = rng.choice(d * d, n, replace=False, p=weights / weights.sum())
    return MatrixSensing(torch.eye(d * d, dtype=torch.float64)[picked], _rank_one(rng, d), depth)


def _rank_one(rng: np.random.Generator, d: int) -> Tensor:
    u, v = rng.standard_normal((2, d))
    return torch.from_numpy(np.sqrt(d) * np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v))


def start(problem: MatrixSensing, seed: int) -> Tensor:
    """Draw initial weights ``(L·d·d,)`` from ``N(0, 1/d)``."""
    rng = np.random.default_rng([103, seed, problem.depth, len(problem.a)])
    return torch.from_numpy(rng.standard_normal(problem.depth * problem.truth.numel()) / np.sqrt(len(problem.truth)))


def nuclear(m: Array) -> float:
    """Compute the nuclear norm, ``‖M‖_*``: the sum of singular values."""
    return float(np.linalg.norm(m, "nuc"))


def distance(m: Array, other: Array) -> float:
    """Compute the relative distance of two matrices, ``‖M - M'‖_F / ‖M'‖_F``."""
    return float(np.linalg.norm(m - other) / np.linalg.norm(other))


def least_trace(m: Array, depth: int) -> float:
    """Compute the least mean trace of all factorizations of a matrix, ``F_L(M) = 2L d^{2/L} ‖M‖_*^{2-2/L}``."""
    return float(2 * depth * len(m) ** (2 / depth) * nuclear(m) ** (2 - 2 / depth))


def balanced(m: Array, depth: int) -> Tensor:
    """Factor a matrix so that F_L is attained; weights ``(L·d·d,)``.

    ``W_1 = αD^{½}Vᵀ``, ``W_L = αUD^{½}``, others ``γI``
    """
    u, s, vt = np.linalg.svd(m)
    scale = (len(m) / s.sum()) ** ((depth - 2) / (2 * depth))
    middle = scale * np.sqrt(s.sum() / len(m)) * np.eye(len(m))
    layers = [scale * np.sqrt(s)[:, None] * vt, *[middle] * (depth - 2), scale * u * np.sqrt(s)]
    return torch.from_numpy(np.concatenate([w.ravel() for w in layers]))


def plain_solution(problem: MatrixSensing, w: Tensor) -> LocalMinimum:
    """Find a zero of the loss by L-BFGS, from w ``(L·d·d,)``."""
    return minimize(BatchedRuns(problem.losses).recorded(w[None]), w, below=1e-24)


def flat_solutions(problem: MatrixSensing, w: Tensor, penalties: Sequence[float]) -> list[LocalMinimum]:
    """Find ``argmin loss + λ tr ∇²`` for each penalty λ, from where the last one ended."""
    found = []
    for penalty in penalties:
        f = BatchedRuns(lambda W, penalty=penalty: problem.losses(W) + penalty * problem.trace(W))
        found.append(minimize(f.recorded(w[None]), w))
        w = found[-1].weights
    return found


@dataclass(frozen=True)
class Solutions:
    """The matrices that fit one set of measurements, by factorizations and by convex problems."""

    problem: MatrixSensing
    start: Tensor
    plain: LocalMinimum
    path: Sequence[LocalMinimum]  # flat solutions, one for each penalty
    convex: Array  # of least nuclear norm
    square: Array  # of least Frobenius norm

    @property
    def matrices(self) -> dict[str, Array]:
        """The four matrices by their names in `MATRICES`."""
        plain, flat = (self.problem.matrix_of(found.weights) for found in (self.plain, self.path[-1]))
        return dict(zip(MATRICES, (plain, flat, self.convex, self.square), strict=True))

    def rows(self) -> dict[str, dict[str, float]]:
        """Compare the start and every matrix with M*, with the least nuclear norm and, if it is a product, with F_L."""
        ends = (self.plain, self.path[-1])
        points = torch.stack([self.start, *(end.weights for end in ends)])
        traces, dense = self.problem.trace(points).tolist(), self.problem.dense_trace(points).tolist()
        mismatches = [abs(trace / exact - 1) for trace, exact in zip(traces, dense, strict=True)]
        rows = {name: self._compared(m) for name, m in self.matrices.items()}
        for i, (name, end) in enumerate(zip(MATRICES[:2], ends, strict=True), 1):
            rows[name] |= self._of_factors(end, traces[i]) | {"trace_off": mismatches[i]}
        return {"start": {"trace_off": mismatches[0]}, **rows}

    def _compared(self, m: Array) -> dict[str, float]:
        ratio = nuclear(m) / nuclear(self.convex)
        return {"recovery": distance(m, self.problem.truth.numpy()), "nuclear_ratio": ratio}

    def _of_factors(self, end: LocalMinimum, trace: float) -> dict[str, float]:
        """Compare the trace of a product, and its mean over measurements, with F_L.

        `attained_off` is how far balanced factors of the same matrix are from F_L.
        """
        problem, w = self.problem, end.weights[None]
        m = problem.matrix_of(end.weights)
        least = least_trace(m, problem.depth)
        return {
            "residual": problem.losses(w).item(),
            "gradient": end.gradient,
            "nuclear": nuclear(m),
            "off_convex": distance(m, self.convex),
            "trace": trace,
            "least": least,
            "trace_ratio": trace / least,
            "mean_ratio": problem.mean_trace(w).item() / least,
            "attained_off": abs(problem.mean_trace(balanced(m, problem.depth)[None]).item() / least - 1),
        }


def solve(
    problem: MatrixSensing, w: Tensor, penalties: Sequence[float], progress: Callable[[float], None]
) -> Solutions:
    """Find all solutions, the factorizations from w ``(L·d·d,)`` on."""
    a, b, shape = problem.a.numpy(), problem.labels.numpy(), (len(problem.truth), len(problem.truth))
    convex, square = least_nuclear_norm(a, b, shape), least_frobenius_norm(a, b, shape)
    progress(0.05)
    plain = plain_solution(problem, w)
    progress(0.2)
    path = flat_solutions(problem, w, penalties)
    progress(0.9)
    return Solutions(problem, w, plain, path, convex, square)


def with_label_noise(
    problem: MatrixSensing, noise: Tensor, *, batch: int, rate: Callable[[int], float], noisy_steps: int, seed: int
) -> GradientFunction:
    """Give gradients on mini-batches whose labels are drawn with noise at each step, times a rate for each step.

    The noise has deviation `noise` ``(R,)`` and ends after `noisy_steps` steps.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = problem.labels

    def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        pick = torch.randperm(len(labels), generator=draw)[:batch]
        normal = torch.randn(batch, generator=draw, dtype=W.dtype)
        noisy = labels[pick] + noise[:, None] * (step < noisy_steps) * normal
        f = BatchedRuns(lambda W: (problem.matrix(W).flatten(1) @ problem.a[pick].T - noisy).square().mean(1))
        losses, g = f.value_and_grad(W)
        return losses, rate(step) * g

    return slope
