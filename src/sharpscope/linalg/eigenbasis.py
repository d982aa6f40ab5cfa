"""An eigenbasis of everything in an operator that is not negligible.

P parameters, m dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import SymmetricOperator, without_autocast
from .units import Unit

DENSE = 300
"""Up to this size the Hessian is decomposed as a matrix."""


@dataclass(frozen=True)
class Basis:
    """Eigenpairs that span the range of a Hessian, largest first."""

    values: Tensor  # (m,)
    vectors: Tensor  # (P, m)
    rest: float  # what is left of the operator, by the last step of the Krylov space
    num_matvecs: int


@without_autocast()
def eigenbasis(a: SymmetricOperator, floor: float, max_dimensions: int, seed: int = 0) -> Basis:
    """Find all eigenpairs of `a` that matter: from the matrix if it is small, else from one Krylov space.

    The space, kept orthogonal to rounding, grows until what is left of the operator is below `floor` or it has
    `max_dimensions`.  Its Ritz pairs are not all eigenpairs; as a whole they stand for the operator on the space.
    """
    if a.size <= DENSE:
        m = a.dense()
        values, vectors = torch.linalg.eigh((m + m.T) / 2)
        return Basis(values.flip(0), vectors.flip(1), 0.0, a.size)
    unit = Unit()
    a = unit.applied(a)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(a.size, generator=generator, dtype=torch.float64).to(a.like)
    start = a @ random
    if not start.any():
        start = random
    basis = a.like.new_empty(max_dimensions, a.size)
    basis[0] = start / start.norm()
    size = 0.0  # of the operator, as far as it has shown
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    n = 0
    while True:
        z = a @ basis[n]
        diagonal.append((z @ basis[n]).item())
        size = max(size, z.norm().item())
        for _ in range(2):
            z = z - basis[: n + 1].T @ (basis[: n + 1] @ z)
        rest = z.norm().item()
        n += 1
        if rest <= max(floor / unit.size, 32 * torch.finfo(z.dtype).eps * size) or n == max_dimensions:
            break
        off_diagonal.append(rest)
        basis[n] = z / rest
    off = torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), 1)
    values, rotation = torch.linalg.eigh(torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off + off.T)
    vectors = (basis[:n].T @ rotation.to(basis)).flip(1)
    return Basis((unit.size * values.flip(0)).to(basis), vectors, unit.size * rest, n + 1)
