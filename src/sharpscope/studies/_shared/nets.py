"""Small networks that are scale-invariant in all their weights, and their normalizations.

Every linear map is followed by a normalization without affine parameters and with eps = 0; there are no biases and a
readout is fixed.  Everything is in elementary operations, so that all derivatives are right.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, unfold


class BatchNorm(nn.Module):
    """Normalize each channel over the batch; in eval mode by the statistics of the last batch in training mode.

    A layer that is not quite scale-invariant, as in common use, has `eps` added to the variances.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("var", torch.ones(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        if not self.training:
            return (x - self.mean.view(shape)) * torch.rsqrt(self.var.view(shape) + self.eps)
        dims = (0, *range(2, x.dim()))
        mean = x.mean(dims, keepdim=True)
        centred = x - mean
        var = centred.square().mean(dims, keepdim=True)
        self.mean.copy_(mean.detach().flatten())
        self.var.copy_(var.detach().flatten())
        return centred * torch.rsqrt(var + self.eps)


class GroupNorm(nn.Module):
    """Normalize each example over each of `groups` groups of channels; one group is layer normalization."""

    def __init__(self, groups: int, *, centre: bool = True) -> None:
        super().__init__()
        self.groups, self.centre = groups, centre

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(len(x), self.groups, -1)
        if self.centre:
            parts = parts - parts.mean(2, keepdim=True)
        return (parts * torch.rsqrt(parts.square().mean(2, keepdim=True))).view_as(x)


class Weights(nn.Module):
    """A linear map or a 3×3 convolution, without bias, N(0, gain²/fan-in).

    `unit_rows` divides each row (or filter) by its norm: weight normalization.  With `native` a convolution is torch's
    own, and otherwise a matrix product of patches, whose double backward is faster on a CPU where images are small.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator,
        *,
        stride: int = 2,
        gain: float = 1.0,
        unit_rows: bool = False,
        native: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.native = stride, native
        fan_in = torch.Size(shape[1:]).numel()
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(gain * drawn / fan_in**0.5)
        self.unit_rows = unit_rows

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        if self.unit_rows:
            w = w / w.norm(dim=1, keepdim=True)
        if self.weight.dim() == 2:
            return linear(x, w)
        if self.native or x.is_cuda:
            return conv2d(x, w.view_as(self.weight), padding=1, stride=self.stride)
        patches = unfold(x, kernel_size=3, padding=1, stride=self.stride)
        return (w @ patches).view(len(x), len(w), (x.shape[2] - 1) // self.stride + 1, -1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": BatchNorm,
    "LN": lambda width: GroupNorm(1),
    "RMSNorm": lambda width: GroupNorm(1, centre=False),
    "GN": lambda width: GroupNorm(4 if width % 4 == 0 and width >= 16 else 1),  # groups of two are only signs
    "WN": lambda width: nn.Identity(),
    "none": lambda width: nn.Identity(),
}
"""Normalization of a layer of the given width; weight normalization ("WN") acts in `Weights`."""


class Readout(nn.Module):
    """A fixed linear map without parameters."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix)


def _layer(shape: tuple[int, ...], norm: str, generator: torch.Generator) -> list[nn.Module]:
    return [Weights(shape, generator, unit_rows=norm == "WN"), NORMS[norm](shape[0])]


def regression_net(norm: str, seed: int) -> nn.Module:
    """Two normalized tanh layers, 20→48→48, and a fixed random readout N(0, 1/48) times 1.5."""
    g = torch.Generator().manual_seed(seed)
    hidden = [*_layer((48, 20), norm, g), nn.Tanh(), *_layer((48, 48), norm, g), nn.Tanh()]
    readout = 1.5 * torch.randn(1, 48, generator=g, dtype=torch.float64) / 48**0.5
    return nn.Sequential(*hidden, Readout(readout))


DIGITS = (1, 8, 8)
"""Channels, height and width of the bundled digits."""


def mlp(norm: str, seed: int, shape: tuple[int, ...] = DIGITS, classes: int = 10) -> nn.Module:
    """Three maps, inputs→64→64→classes, with normalization after each, also the last, and GELU between."""
    g = torch.Generator().manual_seed(seed)
    first, second, last = (_layer(sizes, norm, g) for sizes in ((64, math.prod(shape)), (64, 64), (classes, 64)))
    return nn.Sequential(nn.Flatten(), *first, nn.GELU(), *second, nn.GELU(), *last)


def conv(norm: str, seed: int, shape: tuple[int, ...] = DIGITS, classes: int = 10) -> nn.Module:
    """Two 3×3 convolutions of stride 2 (16 and 32 channels) with GELU, then a map to the classes, all normalized."""
    g = torch.Generator().manual_seed(seed)
    channels, *sides = shape
    places = math.prod((side + 3) // 4 for side in sides)
    shapes = ((16, channels, 3, 3), (32, 16, 3, 3), (classes, 32 * places))
    first, second, last = (_layer(sizes, norm, g) for sizes in shapes)
    return nn.Sequential(*first, nn.GELU(), *second, nn.GELU(), nn.Flatten(), *last)


class TokenNorm(nn.Module):
    """Layer normalization of the last axis, or without `centre` RMS normalization."""

    def __init__(self, *, centre: bool = True) -> None:
        super().__init__()
        self.centre = centre

    def forward(self, x: Tensor) -> Tensor:
        if self.centre:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class Block(nn.Module):
    """Self-attention and a GELU layer on tokens ``(n, t, d)``, with residual sums; every map meets a normalization.

    In a `causal` block no token attends to later ones.
    """

    def __init__(
        self, width: int, heads: int, generator: torch.Generator, *, causal: bool = False, centre: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.norm = heads, causal, TokenNorm(centre=centre)
        self.query, self.key, self.value, self.out = (Weights((width, width), generator) for _ in range(4))
        self.up, self.down = Weights((2 * width, width), generator), Weights((width, 2 * width), generator)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            z.view(n, t, self.heads, -1).transpose(1, 2)
            for z in (self.norm(self.query(x)), self.norm(self.key(x)), self.value(x))
        )
        scores = q @ k.transpose(2, 3) * (d // self.heads) ** -0.5
        if self.causal:
            scores = scores.masked_fill(later(t, x.device), -math.inf)
        x = x + self.norm(self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d)))
        hidden = nn.functional.gelu(self.norm(self.up(self.norm(x))))
        return x + self.norm(self.down(hidden))


def later(length: int, device: torch.device) -> Tensor:
    """Mark the pairs ``(t, t)`` of a place and a later one."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


class Tokens(nn.Module):
    """The rows of an image as tokens: a linear map, normalized, plus a fixed random code of the place."""

    code: Tensor

    def __init__(self, rows: int, columns: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.embed, self.norm = Weights((width, columns), generator), TokenNorm()
        self.register_buffer("code", torch.randn(rows, width, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x.transpose(1, 2).flatten(2))) + self.code


class MeanOverTokens(nn.Module):
    """The mean over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Product(nn.Module):
    """Matrix completion with batch normalization: ``X = U Vᵀ`` at given entries, normalized over them."""

    def __init__(self, size: int, scale: float, shift: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.left = nn.Parameter(torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5)
        self.right = nn.Parameter(torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5)

    def matrix(self) -> Tensor:
        """The product ``U Vᵀ`` before normalization."""
        return self.left @ self.right.T

    def forward(self, seen: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Entries `wanted` (default: those seen), normalized with the moments of those seen; flat indices."""
        x = self.matrix().reshape(-1)
        moments = x[seen]
        wanted = seen if wanted is None else wanted
        centred = x[wanted] - moments.mean()
        return self.scale * centred * torch.rsqrt((moments - moments.mean()).square().mean()) + self.shift


def transformer(norm: str, seed: int, shape: tuple[int, ...] = DIGITS, classes: int = 10) -> nn.Module:
    """The rows of an image as tokens of width 24, two blocks with two heads, the mean, a map, layer normalization."""
    g = torch.Generator().manual_seed(seed)
    channels, rows, columns = shape
    blocks = [Block(24, 2, g) for _ in range(2)]
    tokens = Tokens(rows, channels * columns, 24, g)
    return nn.Sequential(tokens, *blocks, MeanOverTokens(), Weights((classes, 24), g), TokenNorm())


def plain(norm: str, seed: int, shape: tuple[int, ...] = DIGITS, classes: int = 10) -> nn.Module:
    """Three maps, inputs→32→32→classes, with tanh, without biases and without normalization."""
    g = torch.Generator().manual_seed(seed)
    first, second, last = (Weights(sizes, g) for sizes in ((32, math.prod(shape)), (32, 32), (classes, 32)))
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), last)


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared distance, ``½ mean ‖output - target‖²``."""
    return 0.5 * (output - target).square().sum(1).mean()


def squares(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, ``mean (output - target)²``."""
    return (output - target).square().mean()


def soft_cross_entropy(output: Tensor, target: Tensor, *, logit: float, smoothing: float) -> Tensor:
    """Binary cross-entropy of ``logit·output`` on the target's sign, softened by `smoothing`."""
    hard = (target > 0).to(output)
    return nn.functional.binary_cross_entropy_with_logits(logit * output, hard * (1 - 2 * smoothing) + smoothing)


def next_token(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the tokens that come next ``(n, t)``, from logits ``(n, t, classes)``."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def cross_entropy(output: Tensor, target: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy on classes (the largest target), with label smoothing."""
    return nn.functional.cross_entropy(output, target.argmax(1), label_smoothing=smoothing)
