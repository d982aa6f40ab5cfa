"""The memory of an operator from which a warm start goes on.

P parameters, m remembered vectors, s of a search.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POOL = 5
"""Ritz pairs remembered beyond the wanted ones."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Approximate eigenvectors of an operator, best first, and a Krylov space in which others are searched for.

    An image is a product with the operator as it was some calls ago, or a combination of such.
    """

    vectors: Tensor = field(repr=False)  # (m + s, P), orthonormal; the search's are x and where it moved, s = 0 to 2
    images: Tensor = field(repr=False)  # (m + s, P)
    products: Numbers  # (m + s, m + s), of vectors with images
    values: Numbers  # (m,)
    ages: Numbers  # (m,): calls since the images were taken
    rates: Numbers  # (m,): rise of a value in one call, when last measured
    search_products: int = 0  # in the space that is searched
    search_turn: int = 0  # one where the next product is the search's

    @classmethod
    def of(cls, vectors: Tensor, images: Tensor, values: Tensor) -> "Pool":
        """Make a pool of columns ``(P, m)`` with images taken in this call, and no search yet."""
        vectors, images = (t.T.clone(memory_format=torch.contiguous_format) for t in (vectors, images))
        zeros = np.zeros(len(values))
        return cls(vectors, images, _products(vectors, images), values.double().numpy(), zeros, zeros)

    def scaled(self, c: float) -> "Pool":
        """Return what would be remembered of ``c A``."""
        return replace(
            self, images=c * self.images, products=c * self.products, values=c * self.values, rates=c * self.rates
        )


def _products(vectors: Tensor, images: Tensor) -> Numbers:
    found: Numbers = (vectors @ images.T).cpu().double().numpy()
    return found


def _tensor(numbers: Numbers | int) -> Tensor:
    """Copy numbers to a tensor that strides as tensors do, also where it is empty."""
    return torch.as_tensor(numbers).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Memory:
    """The state that `warm_started` carries from call to call; images and values are in multiples of `unit`."""

    last: Pool  # after the last call
    before: Pool  # after the one before
    lag: int = 0  # 1 or 2: which of them predicted the last answer better; 0 at first
    unverified: float = 0.0  # grows from call to call; at one it is time for a solve from a random start
    k: int = 1  # pairs found
    drift: float = 0.0  # ‖(A_t - A_{t-1}) v‖ for the remembered vectors, as measured lately
    unit: float = 1.0

    def in_unit(self, unit: float) -> "Memory":
        """Express the same in another unit."""
        c = self.unit / unit
        if c == 1:
            return self
        return replace(self, last=self.last.scaled(c), before=self.before.scaled(c), drift=c * self.drift, unit=unit)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by name, for a checkpoint."""
        pools = {"last": self.last, "before": self.before}
        parts = {
            f"{name} {part}": t if isinstance(t, Tensor) else _tensor(t)
            for name, pool in pools.items()
            for part, t in vars(pool).items()
        }
        counts = torch.tensor([self.lag, self.unverified, self.k, self.drift, self.unit], dtype=torch.float64)
        return {**parts, "counts": counts}

    def to(self, like: Tensor) -> "Memory":
        """Move the vectors to the device of `like`; what is counted stays on the processor."""
        parts = self.tensors()
        wide = {name for name in parts if name.endswith(("vectors", "images"))}
        return Memory.of({name: t.to(like.device) if name in wide else t for name, t in parts.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Memory":
        """Read what `tensors` wrote; copied, since products round by the alignment of what a file was mapped to."""

        def pool(name: str) -> Pool:
            parts: dict[str, Any] = {
                key.removeprefix(f"{name} "): t.clone() for key, t in tensors.items() if name in key
            }
            if "search_vectors" in parts:  # of a memory of columns, with those of the search by themselves
                for part in ("vectors", "images"):
                    parts[part] = torch.cat([parts[part], parts.pop(f"search_{part}")], dim=1).T.contiguous()
                parts["products"] = torch.as_tensor(_products(parts["vectors"], parts["images"]))
            small = {part: parts[part].numpy() for part in ("products", "values", "ages", "rates")}
            counts = {part: int(parts[part]) for part in ("search_products", "search_turn")}
            return Pool(**parts | small | counts)

        lag, unverified, k, drift, *units = tensors["counts"].tolist()
        unit = units[0] if units else 1.0  # of a memory that was kept before there were units
        return cls(pool("last"), pool("before"), int(lag), unverified, int(k), drift, unit)
