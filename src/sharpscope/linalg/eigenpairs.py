"""Eigenpairs with the residuals and bounds that say how far to trust them."""

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..display import card, text
from .bounds import Comparison, compare_to_threshold
from .memory import Memory

CONFIDENCE = 0.999
"""Probability with which `Eigenpairs.upper` holds."""


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
    num_gradients: float = math.nan  # cost of the products in gradients, where that of the operator is known
    memory: Memory | None = field(default=None, repr=False)
    confidence: float = CONFIDENCE
    error: float = math.nan  # what the first value may lack, by an estimate, where there is one

    def __str__(self) -> str:
        rows = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        lines = [f"λ{i} = {value:.6g}, residual {residual:.1e}" for i, (value, residual) in enumerate(rows, start=1)]
        if math.isfinite(self.error):
            lines[0] += f", error of the value about {self.error:.0e}"
        if math.isfinite(self.upper):
            lines[0] += f"; at most {self.upper:.6g} with probability {self.confidence:.1%}"
        return "\n".join([*lines, f"{self.num_matvecs} products, rounding {self.floor:.0e}"])

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.6g}" for value in self.values.tolist())
        residual = self.residuals.max().item() if len(self.residuals) else math.nan
        return f"Eigenpairs(values=[{values}], residual={residual:.1e}, num_matvecs={self.num_matvecs})"

    def _repr_html_(self) -> str:
        return card("Largest eigenvalues", text(str(self)))

    @property
    def lower(self) -> Tensor:
        """Lower bounds ``(k,)``: the i-th largest eigenvalue is at least the i-th (Courant-Fischer)."""
        return self.values - self.floor

    def against(self, threshold: float) -> Comparison:
        """Tell whether λ1 is above `threshold`: proved, improbable, or undecided and at what price."""
        return compare_to_threshold(
            threshold,
            lower=self.lower[0].item(),
            value=self.values[0].item(),
            upper=self.upper,
            confidence=self.confidence,
            num_matvecs=self.num_matvecs,
        )

    def scaled(self, c: float) -> "Eigenpairs":
        """Return the eigenpairs of ``c A``, c > 0."""
        return replace(
            self,
            values=c * self.values,
            residuals=c * self.residuals,
            upper=c * self.upper,
            floor=c * self.floor,
            error=c * self.error,
            memory=None if self.memory is None else replace(self.memory, unit=c * self.memory.unit),
        )
