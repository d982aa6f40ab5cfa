"""The networks that are measured, and the points of their training at which they are.

Three ordinary problems (batch, group and layer normalization; squares and cross-entropy), four larger ones up to thirty
million weights, and one in which several eigenvalues crowd around 2/lr.  Each is trained by full-batch gradient descent
from a seed, and measured at the start, half-way, and at the edge of stability; the largest after a few steps.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, scaled_dot_product_attention

from sharpscope.studies._shared import nets
from sharpscope.studies._shared.data import digits


class HalfSquares(nn.Module):
    """``½ mean ‖output - target‖²``, as the module that curvlinops asks for."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1).mean()


@dataclass(frozen=True, eq=False)
class Problem:
    """A network with its data in one batch, and the gradient descent it is trained by.

    `stages` names the numbers of steps after which it is measured.  `twin` is the same function of the same parameters
    written so that every peer can differentiate it: what a user of theirs would have to write.
    """

    name: str
    about: str
    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor
    lr: float
    wd: float
    stages: dict[str, int]
    large: bool = False  # where a gradient takes seconds, so that less is measured, and peers have a limit
    twin: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twin", _twin(self.model))

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    def gradient(self) -> tuple[Tensor, ...]:
        """``∇L`` as a training step computes it: the unit of cost."""
        return torch.autograd.grad(self.loss(self.model(self.x), self.y), self.params)

    def step(self) -> None:
        """``w ← w - lr (∇L + wd w)``."""
        slope = self.gradient()
        with torch.no_grad():
            for p, g in zip(self.params, slope, strict=True):
                p.sub_(g + self.wd * p, alpha=self.lr)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params])

    def load(self, w: Tensor) -> None:
        parts = w.split([p.numel() for p in self.params])
        with torch.no_grad():
            for p, part in zip(self.params, parts, strict=True):
                p.copy_(part.view_as(p))

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """The weights at each stage, on the way."""
        done = 0
        for stage, steps in self.stages.items():
            for _ in range(steps - done):
                self.step()
            done = steps
            yield stage, self.weights()


class PlainBatchNorm(nn.Module):
    """Batch normalization without running statistics, the same in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        return centred * torch.rsqrt(centred.square().mean(0))


class PlainGroupNorm(nn.Module):
    """A given group normalization in elementary operations."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(len(x), self.groups, -1)
        centred = parts - parts.mean(2, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + self.eps)
        return normed.view_as(x) * self.weight[:, None, None] + self.bias[:, None, None]


class PlainAttention(nn.Module):
    """A model with the attention kernel that has second derivatives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(x)


def _twin(model: nn.Module) -> nn.Module:
    """`model` with its parameters shared and its normalizations and attention replaced by the plain ones above."""
    if not isinstance(model, nn.Sequential):
        return PlainAttention(model)
    layers = []
    for layer in model:
        if isinstance(layer, nets.BatchNorm):
            layer = PlainBatchNorm()
        elif isinstance(layer, nn.GroupNorm):
            layer = PlainGroupNorm(layer)
        layers.append(layer)
    return nn.Sequential(*layers)


def in_float64(problem: Problem) -> Problem:
    """A copy of `problem` in double precision, for the reference."""
    double = copy.deepcopy(problem)
    double.model.double()
    x = double.x.double() if double.x.is_floating_point() else double.x
    y = double.y.double() if double.y.is_floating_point() else double.y
    return Problem(
        double.name, double.about, double.model, double.loss, x, y, double.lr, double.wd, double.stages, double.large
    )


def bn_mlp() -> Problem:
    """The reference run of the study of Lyu et al.: 500 digits, batch normalization, squares, float64."""
    data = digits(500, 0)
    stages = {"start": 0, "half-way": 10, "edge": 200}
    about = "MLP, batch normalization, 500 digits, half squares"
    return Problem("BN MLP", about, nets.mlp("BN", 0), HalfSquares(), data.x, data.y, 0.2, 5e-4, stages)


def gn_conv(name: str = "GN conv", widths: tuple[int, int, int] = (24, 48, 64), lr: float = 0.008) -> Problem:
    """Three convolutions of stride 2 on colored digits of 32×32 pixels, group normalization, float32."""
    torch.manual_seed(0)
    data = digits(48, 1)
    tint = torch.rand(48, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    x = interpolate(data.x.float(), size=(32, 32), mode="bilinear") * tint

    def layer(c: int, d: int) -> list[nn.Module]:
        return [nn.Conv2d(c, d, 3, stride=2, padding=1), nn.GroupNorm(4, d), nn.GELU()]

    channels = (3, *widths)
    layers = [m for c, d in itertools.pairwise(channels) for m in layer(c, d)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    stages = {"start": 0, "half-way": 60, "edge": 120}
    about = "3 convolutions, group normalization, 48 images 3×32×32, cross-entropy"
    return Problem(name, about, net, nn.CrossEntropyLoss(), x, data.labels, lr, 0.0, stages)


class Block(nn.Module):
    """Attention and a hidden layer, each behind a layer normalization and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, 2))
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Blocks on embedded tokens; classes are read from the mean over positions, or the next token from each."""

    def __init__(
        self,
        tokens: int,
        length: int,
        classes: int,
        *,
        width: int = 48,
        hidden: int = 128,
        depth: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, 4, hidden, causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(tokens) + self.position))
        return self.head(x).flatten(0, 1) if self.causal else self.head(x.mean(1))


def ln_transformer(
    name: str = "LN transformer", sequences: int = 64, lr: float = 0.15, large: bool = False, **sizes: int
) -> Problem:
    """Sequences of 16 tokens; the class is which of four letters comes most often, float32."""
    torch.manual_seed(0)
    x = torch.randint(16, (sequences, 16))
    y = nn.functional.one_hot(x % 4, 4).sum(1).argmax(1)
    stages = {"start": 0, "half-way": 25, "edge": 45}
    depth = sizes.get("depth", 2)
    about = f"{depth} blocks, layer normalization, fused attention, {sequences} sequences of 16 tokens, cross-entropy"
    net = Transformer(16, 16, 4, **sizes)
    return Problem(name, about, net, nn.CrossEntropyLoss(), x, y, lr, 0.0, {"edge": 4} if large else stages, large)


def language_model() -> Problem:
    """Four sequences of 32 random tokens of 4096, each of which is predicted from those before, float32."""
    torch.manual_seed(0)
    x = torch.randint(4096, (4, 33))
    net = Transformer(4096, 32, 4096, width=480, hidden=1920, depth=9, causal=True)
    about = "causal transformer of 9 blocks, layer normalization, fused attention, 4 sequences of 32 tokens"
    loss, y = nn.CrossEntropyLoss(), x[:, 1:].flatten()
    return Problem("language model 29M", about, net, loss, x[:, :-1], y, 0.1, 0.0, {"edge": 4}, large=True)


def crowded() -> Problem:
    """A plain tanh MLP on digits, trained past the edge, where several eigenvalues crowd around 2/lr."""
    torch.manual_seed(0)
    data = digits(500, 0)
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
    net = nn.Sequential(nn.Flatten(), *layers).double()
    about = "Tanh MLP without normalization, 500 digits, half squares"
    return Problem("tanh MLP", about, net, HalfSquares(), data.x, data.y, 0.2, 0.0, {"edge": 590})


PROBLEMS: tuple[Callable[[], Problem], ...] = (
    bn_mlp,
    gn_conv,
    ln_transformer,
    partial(ln_transformer, "LN transformer 70k", width=64, hidden=128),
    partial(gn_conv, "GN conv 0.8M", widths=(108, 216, 288), lr=0.004),
    partial(ln_transformer, "LN transformer 9M", 16, 0.02, True, width=384, hidden=1536, depth=5),
    language_model,
)
