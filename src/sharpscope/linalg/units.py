"""Powers of two as units of an operator, so that norms of its products neither overflow nor vanish.

In single precision the norm of a vector is infinite from entries of 1e19 on and zero below 1e-23.  A solver therefore
divides every product by a power of two near the size of the first one and multiplies its results by it at the end; both
are exact, so that its answers for ``c A`` are c times those for A.
"""

import math

import torch
from torch import Tensor

from .operators import Linear, SymmetricOperator

FAR = 2.0**40
"""Ratio of a first product to the expected unit, either side of one, beyond which the unit is chosen anew."""


def power_of_two(size: float, dtype: torch.dtype) -> float:
    """Return the largest power of two up to `size`, such that it and its inverse are ordinary numbers of that type."""
    most = math.frexp(torch.finfo(dtype).max)[1] - 4
    return math.ldexp(1.0, min(max(math.frexp(size)[1] - 1, -most), most))


class Unit:
    """A power of two near the largest entry of the first product that is not zero.

    An expected unit is kept if it is near, and until there is such a product.
    """

    def __init__(self, expected: float | None = None) -> None:
        self.size = 1.0 if expected is None else expected
        self._expected = expected is not None
        self._known = False

    def applied(self, a: SymmetricOperator) -> SymmetricOperator:
        """Measure an operator in this unit."""
        return a.sandwiched(a.like, lambda v: v, lambda image: self.of(image, a.sum))

    def of(self, image: Tensor, total: Linear = lambda numbers: numbers) -> Tensor:
        """Divide a product, finite or not, by the unit; `total` sums over the processes that have parts of it."""
        if not self._known:
            largest = total(image.abs().amax().double().cpu()).item()
            self._known = 0 < largest < math.inf
            if self._known and not (self._expected and 1 / FAR < largest / self.size < FAR):
                self.size = power_of_two(largest, image.dtype)
        return image if self.size == 1 else image * (1 / self.size)
