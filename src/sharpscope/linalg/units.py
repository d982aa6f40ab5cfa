"""Powers of two as units of an operator, so that norms of its products neither overflow nor vanish.

In single precision the norm of a vector is infinite from entries of 1e19 on and zero below 1e-23.  A solver therefore
divides every product by a power of two near the size of the first one and multiplies its results by it at the end; both
are exact, so that its answers for ``c A`` are c times those for A.
"""

import math

import torch
from torch import Tensor


def power_of_two(size: float, dtype: torch.dtype) -> float:
    """Return the largest power of two up to `size`, such that it and its inverse are ordinary numbers of that type."""
    most = math.frexp(torch.finfo(dtype).max)[1] - 4
    return math.ldexp(1.0, min(max(math.frexp(size)[1] - 1, -most), most))


class Unit:
    """A power of two near the largest entry of the first product that is not zero; one before there is any."""

    def __init__(self) -> None:
        self.size = 1.0
        self.known = False

    def of(self, image: Tensor) -> Tensor:
        """Divide a product, finite or not, by the unit."""
        if not self.known:
            largest = image.abs().max().item()
            if not 0 < largest < math.inf:
                return image
            self.size, self.known = power_of_two(largest, image.dtype), True
        return image if self.size == 1 else image * (1 / self.size)
