"""Networks of the size that people train: VGG-11, ResNet-20 and a causal transformer, of any width.

Each in two forms.  Scale-invariant: every map is followed by a normalization without affine parameters, the last one
too, so that the loss does not notice the scale of any weight.  As commonly trained: normalizations with affine
parameters and eps = 1e-5, and a readout with bias behind none.  Where the published ones have ReLU there is GELU here:
among millions of kinks a product with the Hessian is not the slope of the gradient.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from .nets import NORMS, Block, TokenNorm, Weights, later

GAIN = 2**0.5
"""Gain at which rectifying layers about keep the mean square of what passes through them."""

VGG11 = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)
"""Widths of its convolutions as multiples of the first; 0 is a pooling."""


def _normalization(norm: str, width: int, invariant: bool) -> nn.Module:
    if invariant or norm not in ("BN", "LN", "GN"):
        return NORMS[norm](width)
    if norm == "BN":
        return nn.BatchNorm2d(width, momentum=1.0, dtype=torch.float64)  # in eval mode: of the last batch
    return nn.GroupNorm(4 if norm == "GN" and width % 4 == 0 and width >= 16 else 1, width, dtype=torch.float64)


class Layers:
    """Makes the layers of a network of one kind, with weights from one stream of random numbers."""

    def __init__(self, norm: str, seed: int, invariant: bool) -> None:
        self.norm, self.invariant = norm, invariant
        self.generator = torch.Generator().manual_seed(seed)

    def convolution(self, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        """A convolution of 3×3 pixels with its normalization."""
        weights = Weights(
            (outputs, inputs, 3, 3),
            self.generator,
            stride=stride,
            gain=GAIN,
            unit_rows=self.norm == "WN",
            native=True,
        )
        return nn.Sequential(weights, _normalization(self.norm, outputs, self.invariant))

    def readout(self, inputs: int, classes: int) -> nn.Module:
        """The last map: normalized, or plain with a bias."""
        if self.invariant:
            last = Weights((classes, inputs), self.generator, unit_rows=self.norm == "WN")
            return nn.Sequential(last, NORMS[self.norm](classes))
        plain = nn.utils.skip_init(nn.Linear, inputs, classes, dtype=torch.float64)
        with torch.no_grad():
            plain.weight.copy_(torch.randn(classes, inputs, generator=self.generator, dtype=torch.float64))
            plain.weight.mul_(inputs**-0.5)
            plain.bias.zero_()
        return plain


def vgg11(norm: str, seed: int, shape: tuple[int, ...], classes: int, width: int, invariant: bool = True) -> nn.Module:
    """VGG-11: eight convolutions with GELU and five poolings, of `width` channels first, and one map to the classes."""
    layers = Layers(norm, seed, invariant)
    channels, *sides = shape
    parts: list[nn.Module] = []
    for multiple in VGG11:
        if not multiple:
            parts.append(nn.MaxPool2d(2, ceil_mode=True))
            sides = [(side + 1) // 2 for side in sides]
            continue
        parts += [layers.convolution(channels, multiple * width), nn.GELU()]
        channels = multiple * width
    return nn.Sequential(*parts, nn.Flatten(), layers.readout(channels * math.prod(sides), classes))


class Residual(nn.Module):
    """Two normalized convolutions beside a shortcut without weights, which drops places and adds empty channels."""

    def __init__(self, layers: Layers, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.more = outputs - inputs
        self.first = layers.convolution(inputs, outputs, self.stride)
        self.second = layers.convolution(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(gelu(self.first(x)))
        short = x[:, :, :: self.stride, :: self.stride]
        return gelu(h + pad(short, (0, 0, 0, 0, 0, self.more)))


class MeanOverPlaces(nn.Module):
    """The mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def resnet20(
    norm: str, seed: int, shape: tuple[int, ...], classes: int, width: int, invariant: bool = True
) -> nn.Module:
    """ResNet-20: a convolution, three stages of three residual blocks, a mean over places, a map to the classes."""
    layers = Layers(norm, seed, invariant)
    widths = [width, *(multiple * width for multiple in (1, 2, 4) for _ in range(3))]
    blocks = [Residual(layers, a, b) for a, b in pairwise(widths)]
    first = layers.convolution(shape[0], width)
    return nn.Sequential(first, nn.GELU(), *blocks, MeanOverPlaces(), layers.readout(4 * width, classes))


class PreNormBlock(nn.Module):
    """Causal self-attention and a GELU layer as commonly trained: each reads normalized tokens and adds to the sum."""

    def __init__(self, width: int, heads: int, generator: torch.Generator, centre: bool) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = (_affine(width, centre) for _ in range(2))
        self.joint, self.out = Weights((3 * width, width), generator), Weights((width, width), generator)
        self.up, self.down = Weights((4 * width, width), generator), Weights((width, 4 * width), generator)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.joint(self.before(x)).chunk(3, -1))
        scores = q @ k.transpose(2, 3) * (d // self.heads) ** -0.5
        attention = scores.masked_fill(later(t, x.device), -math.inf).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.down(gelu(self.up(self.between(x))))


def _affine(width: int, centre: bool) -> nn.Module:
    if centre:
        return nn.LayerNorm(width, dtype=torch.float64)
    return nn.RMSNorm(width, eps=1e-5, dtype=torch.float64)


class LanguageModel(nn.Module):
    """Logits of the next token ``(n, t, classes)`` from tokens ``(n, t)``; one matrix embeds and reads out.

    Where the blocks are scale-invariant, that matrix is normalized by rows at both ends.
    """

    code: Tensor

    def __init__(self, classes: int, length: int, width: int, last: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(classes, width, generator=generator, dtype=torch.float64))
        self.register_buffer("code", torch.randn(length, width, generator=generator, dtype=torch.float64))
        self.blocks = nn.Sequential()
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.last(self.embedding) if isinstance(self.last, TokenNorm) else self.embedding
        x = self.blocks(rows[tokens] + self.code[: tokens.shape[1]])
        return self.last(x) @ rows.T * rows.shape[1] ** -0.5


def language(
    norm: str, seed: int, shape: tuple[int, ...], classes: int, width: int, invariant: bool = True
) -> nn.Module:
    """A causal transformer with two blocks, heads of 16 and tied embeddings; its norm is LN or RMSNorm."""
    g = torch.Generator().manual_seed(seed)
    centre, heads = norm != "RMSNorm", max(width // 16, 1)
    last = TokenNorm(centre=centre) if invariant else _affine(width, centre)
    net = LanguageModel(classes, shape[0], width, last, g)
    for _ in range(2):
        net.blocks.append(
            Block(width, heads, g, causal=True, centre=centre) if invariant else PreNormBlock(width, heads, g, centre)
        )
    return net
