"""Eigenpairs with their residuals and bounds, and what a warm start remembers of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .bounds import Comparison, compare_to_threshold

CONFIDENCE = 0.999
"""Probability with which `Eigenpairs.upper` holds."""

POOL = 5
"""Ritz pairs remembered beyond the wanted ones."""


@dataclass(frozen=True)
class Pool:
    """What is known of an operator: approximate eigenvectors, best first, and a Krylov space that is being built.

    An image is a product with the operator as it was some calls ago, or a combination of such.
    """

    vectors: Tensor = field(repr=False)  # (P, m), orthonormal
    images: Tensor = field(repr=False)  # (P, m)
    values: Tensor  # (m,)
    ages: Tensor  # (m,): calls since the images were taken
    rates: Tensor  # (m,): rise of a value in one call, when last seen
    scout: Tensor = field(repr=False)  # (P, 0 to 2), orthonormal: x, and the direction in which it moved
    scout_images: Tensor = field(repr=False)
    products: int = 0  # in the scout's space
    searches: int = 0  # one where it is the scout's turn

    @classmethod
    def of(cls, vectors: Tensor, images: Tensor, values: Tensor) -> "Pool":
        """Of images taken in this call, with no scout yet."""
        zeros = torch.zeros_like(values)
        vectors, images = vectors.contiguous(), images.contiguous()  # as from a checkpoint: layouts round differently
        return cls(vectors, images, values, zeros, zeros, vectors[:, :0], vectors[:, :0])


@dataclass(frozen=True)
class Memory:
    """What `track` carries from call to call."""

    last: Pool  # after the last call
    before: Pool  # after the one before
    lag: int = 0  # 1 or 2: which of them foretold the last answer better; 0 at first
    doubt: float = 0.0  # grows from call to call; at one it is time for a solve from a random start
    k: int = 1  # pairs found
    drift: float = 0.0  # ‖(A_t - A_{t-1}) v‖ for the remembered vectors, as seen lately

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        pools = {"last": self.last, "before": self.before}
        parts = {f"{name} {part}": torch.as_tensor(t) for name, pool in pools.items() for part, t in vars(pool).items()}
        counts = torch.tensor([self.lag, self.doubt, self.k, self.drift], dtype=torch.float64)
        return {**parts, "counts": counts}

    def to(self, like: Tensor) -> "Memory":
        """With its vectors on the device of `like`; what is counted stays on the processor."""
        parts = self.tensors()
        wide = {name for name in parts if name.endswith(("vectors", "images", "scout"))}
        return Memory.of({name: t.to(like.device) if name in wide else t for name, t in parts.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Memory":
        """From a checkpoint; copied, since products round by the alignment of what a file was mapped to."""

        def pool(name: str) -> Pool:
            parts: dict[str, Any] = {part.name: tensors[f"{name} {part.name}"].clone() for part in fields(Pool)}
            counts: dict[str, Any] = {part: int(t) for part, t in parts.items() if t.dim() == 0}
            return Pool(**parts | counts)

        lag, doubt, k, drift = tensors["counts"].tolist()
        return cls(pool("last"), pool("before"), int(lag), doubt, int(k), drift)


@dataclass(frozen=True)
class Eigenpairs:
    """The k algebraically largest eigenpairs, largest first, and how far to trust them.

    ``values[i]`` is the Rayleigh quotient of ``vectors[:, i]``, so that ``lower[i] = values[i] - floor`` is never above
    the true i-th eigenvalue.  *Some* eigenvalue lies within ``residuals[i]`` of ``values[i]``, which need not be the
    i-th.  The largest eigenvalue is at most `upper` with probability `confidence`, by the randomness of the start;
    `upper` is infinite after a solve that has no such start.  `floor` is the rounding seen in the products.
    """

    values: Tensor  # (k,)
    vectors: Tensor = field(repr=False)  # (P, k), orthonormal columns
    residuals: Tensor  # (k,)  ‖A v - λ v‖
    num_matvecs: int
    upper: float = math.inf
    floor: float = 0.0
    num_gradients: float = math.nan  # cost of the products in gradients, where the operator knows it
    memory: Memory | None = field(default=None, repr=False)
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        rows = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        lines = [f"λ{i} = {value:.6g}, residual {residual:.1e}" for i, (value, residual) in enumerate(rows, start=1)]
        if math.isfinite(self.upper):
            lines[0] += f"; at most {self.upper:.6g} with probability {self.confidence:.1%}"
        return "\n".join([*lines, f"{self.num_matvecs} products, rounding {self.floor:.0e}"])

    @property
    def lower(self) -> Tensor:
        """``(k,)``: the i-th largest eigenvalue is at least this (Courant-Fischer), up to the rounding `floor`."""
        return self.values - self.floor

    def against(self, threshold: float) -> Comparison:
        """Is the largest eigenvalue above `threshold`: proved, improbable, or undecided and at what price."""
        return compare_to_threshold(
            self.lower[0].item(), self.values[0].item(), self.upper, threshold, self.confidence, self.num_matvecs
        )

    def scaled(self, c: float) -> "Eigenpairs":
        """Those of ``c A``, c > 0."""
        return replace(
            self, values=c * self.values, residuals=c * self.residuals, upper=c * self.upper, floor=c * self.floor
        )
