"""Small cases with known answers: networks as torch modules beside the same functions in elementary operations.

A case is a network with one normalization (or attention) between two linear maps, all in double precision; its
reference is the same output written from the formulas, as a function of the parameters by name.  The data come in
chunks of uneven size, so that weighting by examples matters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sharpscope import Objective
from sharpscope.autodiff.expansion import Expansion
from sharpscope.linalg import SymmetricOperator
from sharpscope.studies._shared import nets

DTYPE = torch.float64
CHUNKS = (4, 7, 5)
CLASSES = 3

Params = Mapping[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=DTYPE)


def _standardized(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    mean = x.mean(tuple(dims), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(tuple(dims), keepdim=True) + eps).sqrt()


def _grouped(x: Tensor, groups: int, eps: float) -> Tensor:
    return _standardized(x.reshape(len(x), groups, -1), (2,), eps).reshape(x.shape)


def _root_mean_square(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _gain(p: Params, x: Tensor) -> Tensor:
    """Gain and shift of each channel, the second dimension."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return x * p["1.weight"].reshape(shape) + p["1.bias"].reshape(shape)


def _dense(norm: Forward) -> Forward:
    def forward(p: Params, x: Tensor) -> Tensor:
        h = x @ p["0.weight"].T + p["0.bias"]
        return torch.tanh(norm(p, h)) @ p["3.weight"].T + p["3.bias"]

    return forward


def _unbiased(norm: Forward) -> Forward:
    return lambda p, x: torch.tanh(norm(p, x @ p["0.weight"].T)) @ p["3.weight"].T + p["3.bias"]


def _image(norm: Forward) -> Forward:
    def forward(p: Params, x: Tensor) -> Tensor:
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (N, channel, row, column, 3, 3)
        h = torch.einsum("ncijab,ocab->noij", patches, p["0.weight"])
        return torch.tanh(norm(p, h)).mean((2, 3)) @ p["5.weight"].T + p["5.bias"]

    return forward


def _dense_net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, CLASSES))


def _own_net(norm: str) -> nn.Module:
    first = nets.Weights((6, 5), generator(0), unit_rows=norm == "WN")
    return nn.Sequential(first, nets.NORMS[norm](6), nn.Tanh(), nn.Linear(6, CLASSES))


def _image_net(norm: nn.Module) -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    return nn.Sequential(conv, norm, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


def _weight_normalized_net() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Identity(), nn.Tanh(), nn.Linear(6, CLASSES))


def _weight_normalized(p: Params, x: Tensor) -> Tensor:
    g, v = (p[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
    h = x @ (g * v / v.square().sum(1, keepdim=True).sqrt()).T + p["0.bias"]
    return torch.tanh(h) @ p["3.weight"].T + p["3.bias"]


class AttentionNet(nn.Module):
    """Self-attention with a residual connection, layer normalization, and a mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.readout = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + self.attention(x, x, x, need_weights=False)[0]
        return self.readout(torch.tanh(self.norm(mixed)).mean(1))


def _attention(p: Params, x: Tensor) -> Tensor:
    projected = x @ p["attention.in_proj_weight"].T + p["attention.in_proj_bias"]
    q, k, v = (part.reshape(len(x), -1, 2, 2).transpose(1, 2) for part in projected.split(4, dim=2))
    scores = torch.exp(q @ k.transpose(2, 3) / 2**0.5)
    seen = (scores / scores.sum(3, keepdim=True) @ v).transpose(1, 2).reshape(x.shape)
    mixed = x + seen @ p["attention.out_proj.weight"].T + p["attention.out_proj.bias"]
    h = _standardized(mixed, (2,), 1e-5) * p["norm.weight"] + p["norm.bias"]
    return torch.tanh(h).mean(1) @ p["readout.weight"].T + p["readout.bias"]


def _eval_stats(channels: int) -> tuple[Tensor, Tensor]:
    return normal(channels, seed=1), normal(channels, seed=2).square() + 0.5


def _in_eval_mode(norm: nn.Module) -> nn.Module:
    mean, var = _eval_stats(norm.get_buffer("running_mean").numel())
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(var)
    return norm.eval()


def _by_stats(p: Params, x: Tensor) -> Tensor:
    mean, var = (v.reshape((1, -1) + (1,) * (x.dim() - 2)) for v in _eval_stats(x.shape[1]))
    return _gain(p, (x - mean) / (var + 1e-5).sqrt())


@dataclass(frozen=True)
class Case:
    """A network, its output by formula, and the shape of one example."""

    net: Callable[[], nn.Module]
    forward: Forward
    shape: tuple[int, ...] = (5,)


FLAT, IMAGE, SEQUENCE = (5,), (2, 4, 4), (3, 4)

CASES: dict[str, Case] = {
    "none": Case(lambda: _dense_net(nn.Identity()), _dense(lambda p, h: h)),
    "BatchNorm1d": Case(
        lambda: _dense_net(nn.BatchNorm1d(6, dtype=DTYPE)), _dense(lambda p, h: _gain(p, _standardized(h, (0,), 1e-5)))
    ),
    "BatchNorm1d eval": Case(lambda: _dense_net(_in_eval_mode(nn.BatchNorm1d(6, dtype=DTYPE))), _dense(_by_stats)),
    "BatchNorm1d without statistics": Case(
        lambda: _dense_net(nn.BatchNorm1d(6, track_running_stats=False, momentum=None).eval()),
        _dense(lambda p, h: _gain(p, _standardized(h, (0,), 1e-5))),
    ),
    "LayerNorm": Case(lambda: _dense_net(nn.LayerNorm(6)), _dense(lambda p, h: _gain(p, _standardized(h, (1,), 1e-5)))),
    "RMSNorm": Case(
        lambda: _dense_net(nn.RMSNorm(6, eps=1e-5)), _dense(lambda p, h: p["1.weight"] * _root_mean_square(h, 1e-5))
    ),
    "GroupNorm": Case(lambda: _dense_net(nn.GroupNorm(2, 6)), _dense(lambda p, h: _gain(p, _grouped(h, 2, 1e-5)))),
    "weight_norm": Case(_weight_normalized_net, _weight_normalized),
    "BatchNorm2d": Case(
        lambda: _image_net(nn.BatchNorm2d(4, momentum=None, dtype=DTYPE)),
        _image(lambda p, h: _gain(p, _standardized(h, (0, 2, 3), 1e-5))),
        IMAGE,
    ),
    "BatchNorm2d eval": Case(
        lambda: _image_net(_in_eval_mode(nn.BatchNorm2d(4, dtype=DTYPE))), _image(_by_stats), IMAGE
    ),
    "GroupNorm of images": Case(
        lambda: _image_net(nn.GroupNorm(2, 4)), _image(lambda p, h: _gain(p, _grouped(h, 2, 1e-5))), IMAGE
    ),
    "LayerNorm of images": Case(
        lambda: _image_net(nn.LayerNorm((4, 4, 4), elementwise_affine=False)),
        _image(lambda p, h: _standardized(h, (1, 2, 3), 1e-5)),
        IMAGE,
    ),
    "InstanceNorm2d": Case(
        lambda: _image_net(nn.InstanceNorm2d(4, affine=True, track_running_stats=True, dtype=DTYPE)),
        _image(lambda p, h: _gain(p, _standardized(h, (2, 3), 1e-5))),
        IMAGE,
    ),
    "InstanceNorm2d eval": Case(
        lambda: _image_net(_in_eval_mode(nn.InstanceNorm2d(4, affine=True, track_running_stats=True, dtype=DTYPE))),
        _image(_by_stats),
        IMAGE,
    ),
    "MultiheadAttention": Case(AttentionNet, _attention, SEQUENCE),
    "MultiheadAttention eval": Case(lambda: AttentionNet().eval(), _attention, SEQUENCE),
    "own BN": Case(lambda: _own_net("BN"), _unbiased(lambda p, h: _standardized(h, (0,), 0))),
    "own LN": Case(lambda: _own_net("LN"), _unbiased(lambda p, h: _standardized(h, (1,), 0))),
    "own GN": Case(lambda: _own_net("GN"), _unbiased(lambda p, h: _grouped(h, 1, 0))),
    "own RMSNorm": Case(lambda: _own_net("RMSNorm"), _unbiased(lambda p, h: _root_mean_square(h, 0))),
    "own WN": Case(
        lambda: _own_net("WN"),
        lambda p, x: _unbiased(lambda p, h: h)(
            {**p, "0.weight": p["0.weight"] / p["0.weight"].square().sum(1, keepdim=True).sqrt()}, x
        ),
    ),
}
NORMS = tuple(CASES)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / output.numel()


def surprise(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy by formula."""
    return (output.exp().sum(1).log() - output[torch.arange(len(output)), target]).sum() / len(output)


@dataclass(frozen=True)
class LossCase:
    """A loss of torch, the same by formula, and its targets."""

    loss: Callable[[Tensor, Tensor], Tensor]
    formula: Callable[..., Tensor]
    targets: Callable[[int, int], Tensor]


LOSSES = {
    "MSE": LossCase(F.mse_loss, squares, lambda n, seed: normal(n, CLASSES, seed=seed)),
    "cross-entropy": LossCase(
        nn.CrossEntropyLoss(), surprise, lambda n, seed: torch.randint(CLASSES, (n,), generator=generator(seed))
    ),
}


def model(norm: str) -> nn.Module:
    """The network of a case with weights of ordinary size, the same at every call, the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        net = CASES[norm].net().to(DTYPE)
    g = generator(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g, dtype=DTYPE))
    return net


def batches(norm: str = "none", loss: str = "MSE", sizes: Sequence[int] = CHUNKS) -> list[tuple[Tensor, Tensor]]:
    shape = CASES[norm].shape
    return [(normal(n, *shape, seed=10 + i), LOSSES[loss].targets(n, 20 + i)) for i, n in enumerate(sizes)]


def objective(norm: str = "none", loss: str = "MSE", **options: Any) -> Objective:
    return Objective(model(norm), LOSSES[loss].loss, batches(norm, loss), **options)


def observed(f: Objective, note: Callable[[], None]) -> Objective:
    """The same objective, which calls `note` before every product with the Hessian."""

    def expand(objective: Objective, w: Tensor) -> Expansion:
        at = f.expand(objective, w)

        def hvp(v: Tensor) -> Tensor:
            note()
            return at.hvp(v)

        return replace(at, hvp=hvp)

    return f.using(expand)


def reference(norm: str, loss: str = "MSE") -> Callable[[Tensor], Tensor]:
    """``L(w)`` by formula: parameters in the order of the module, cut from `w` here."""
    shapes = {name: p.shape for name, p in model(norm).named_parameters()}
    data = batches(norm, loss)

    def total(w: Tensor) -> Tensor:
        cut = w.split([shape.numel() for shape in shapes.values()])
        p = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), cut, strict=True)}
        terms = [len(x) * LOSSES[loss].formula(CASES[norm].forward(p, x), y) for x, y in data]
        return sum(terms, w.new_zeros(())) / sum(CHUNKS)

    return total


def outputs(norm: str) -> Callable[..., Tensor]:
    """The network's output ``(n, classes)`` by formula, at flat weights and an input."""
    shapes = {name: p.shape for name, p in model(norm).named_parameters()}

    def forward(w: Tensor, x: Tensor) -> Tensor:
        cut = w.split([shape.numel() for shape in shapes.values()])
        return CASES[norm].forward(
            {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), cut, strict=True)}, x
        )

    return forward


def symmetric(values: Tensor, seed: int = 0) -> tuple[Tensor, SymmetricOperator]:
    """A matrix of the given spectrum in a random basis, and its operator."""
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (q * values.to(DTYPE)) @ q.T
    matrix = ((matrix + matrix.T) / 2).to(values.dtype)
    return matrix, SymmetricOperator(lambda v: matrix @ v, torch.zeros_like(values))


def relative(a: Tensor, b: Tensor) -> float:
    """``‖a - b‖ / ‖b‖``."""
    return ((a - b).norm() / b.norm()).item()
