"""Small networks for the tests of rules, iterates, monitoring and theory: float64, at most 100 weights."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sharpscope.autodiff.objective import Objective
from sharpscope.studies._shared.nets import BatchNorm, GroupNorm, Readout, Weights, squares

WIDTH = 6
TINY = 1e-30  # torch wants a positive eps for batch normalization; this one is lost in rounding
NORMS = {
    "BN": lambda: BatchNorm(WIDTH),
    "torch BN": lambda: nn.BatchNorm1d(WIDTH, affine=False, eps=TINY, dtype=torch.float64),
    "LN": lambda: GroupNorm(1),
    "torch LN": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False, eps=0.0, dtype=torch.float64),
    "RMSNorm": lambda: GroupNorm(1, centre=False),
    "GN": lambda: GroupNorm(2),
    "WN": nn.Identity,
}
LOSSES = ("mse", "cross-entropy")
SCALES = (0.1, 3.7, 100.0)


def data(loss: str = "mse", *, count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs N(0, I₄) and targets: one smooth number, or one of three classes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g, dtype=torch.float64)
    return x, (torch.tanh(1.5 * x[:, :1]) + 0.5 * torch.sin(x[:, 1:2]) if loss == "mse" else torch.arange(count) % 3)


def layers(norm: str, seed: int = 0) -> list[nn.Module]:
    """4→6→6 with normalization and tanh after each map: 60 weights, all of them scale-invariant."""
    g = torch.Generator().manual_seed(seed)
    first, second = (Weights((WIDTH, n), g, unit_rows=norm == "WN") for n in (4, WIDTH))
    return [first, NORMS[norm](), nn.Tanh(), second, NORMS[norm](), nn.Tanh()]


def invariant(norm: str = "BN", loss: str = "mse", seed: int = 0) -> Objective:
    """A network that is scale-invariant in all its weights, on one batch: fixed readout, no bias, no eps."""
    g = torch.Generator().manual_seed(100 + seed)
    readout = torch.randn(1 if loss == "mse" else 3, WIDTH, generator=g, dtype=torch.float64)
    net = nn.Sequential(*layers(norm, seed), Readout(readout))
    return Objective(net, squares if loss == "mse" else cross_entropy, [data(loss)])


def affine(seed: int = 0) -> Objective:
    """Only the two maps are scale-invariant: batch normalization with gain and bias, and a trained readout."""
    torch.manual_seed(seed)
    bodies = layers("BN", seed)
    bodies[1] = nn.BatchNorm1d(WIDTH, eps=TINY, dtype=torch.float64)
    return Objective(nn.Sequential(*bodies, nn.Linear(WIDTH, 1, dtype=torch.float64)), squares, [data()])


def plain(seed: int = 0) -> Objective:
    """No normalization: nothing is scale-invariant."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
    return Objective(net, squares, [data()])


def dense_top(matrix: Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix."""
    return torch.linalg.eigvalsh(matrix)[-1].item()
