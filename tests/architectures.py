"""Small networks, and what each of them is blind to, worked out by hand.

A part is a parameter tensor by name, or a range of its rows ``name[a:b]`` or columns ``name[:, a:b]``.  A group is the
parts that may be rescaled together.  A pair ``a -> b``, or ``a -> b + c``, may be rescaled by c and 1/c.  Where
something may be rescaled in either of two places (values or outputs of attention), the later one belongs to the group.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from problems import DTYPE, generator, normal
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sharpscope import Objective

D = 8
"""Width of everything."""

FLAT = [(normal(n, D, seed=10 + i), normal(n, 2, seed=20 + i)) for i, n in enumerate((16, 24))]
IMAGES = [(normal(n, 2, 6, 6, seed=10 + i), normal(n, 2, seed=20 + i)) for i, n in enumerate((8, 10))]
SERIES = [(normal(n, 5, D, seed=10 + i), normal(n, 2, seed=20 + i)) for i, n in enumerate((8, 10))]
WORDS = [torch.randint(9, (n, 5), generator=generator(10 + n)) for n in (8, 10)]
TOKENS = [(x, torch.randint(9, (len(x), 5), generator=generator(30 + len(x)))) for x in WORDS]


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Architecture:
    """A network, its data, and what is to be found."""

    net: Callable[[], nn.Module]
    groups: tuple[tuple[str, ...], ...] = ()
    null: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    data: tuple[tuple[Tensor, Tensor], ...] = tuple(FLAT)

    def objective(self, *, seed: int = 0, dtype: torch.dtype = DTYPE, fresh: bool = False) -> Objective:
        """With weights N(0, 1/fan-in) and vectors off their start, or `fresh` from the constructor."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.net().to(dtype)
        g = generator(seed)
        with torch.no_grad():
            for p in net.parameters() if not fresh else ():
                noise = torch.randn(p.shape, generator=g, dtype=DTYPE).to(dtype)
                p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.3 * noise)
        data = [(x.to(dtype) if x.is_floating_point() else x, y.to(dtype) if y.dim() and y.is_floating_point() else y)
                for x, y in self.data]  # fmt: skip
        return Objective(net, token_loss if self.data[0][0].dtype is torch.long else F.mse_loss, data)


def part(f: Objective, name: str) -> list[int]:
    """Indices of a part."""
    found = re.fullmatch(r"(.*?)(?:\[(:, )?(\d+):(\d+)\])?", name)
    assert found
    tensor, column, start, stop = found.groups()
    s = f.slices[tensor]
    indices = torch.arange(s.start, s.stop).view(f.shapes[tensor])
    if start is not None:
        indices = indices[:, int(start) : int(stop)] if column else indices[int(start) : int(stop)]
    return indices.flatten().tolist()


def indices(f: Objective, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(sorted(i for name in names for i in part(f, name)))


def linear(inside: int = D, out: int = D, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inside, out, bias=bias)


class Blind(nn.Module):
    """``x/√mean x²`` or ``(x - mean)/√var`` over the last axis, no parameter, eps = 0."""

    def __init__(self, *, centre: bool = False) -> None:
        super().__init__()
        self.centre = centre

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centre else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Pooled(nn.Module):
    """The mean over places, and a linear map."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.readout = linear(D, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x.flatten(2).mean(2))


class Named(nn.Module):
    """Modules by name, one after the other."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, module in parts.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class Around(nn.Module):
    """``x + branch(x)``, the branch being its modules in a row."""

    def __init__(self, after: nn.Module | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.names = list(parts)
        for name, module in parts.items():
            self.add_module(name, module)
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for name in self.names:
            h = self.get_submodule(name)(h)
        return self.after(x + h)


class Scale(nn.Module):
    """A factor for each channel of images (ConvNeXt's layer scale), or of the last axis."""

    def __init__(self, size: float, *, images: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), size))
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma.view(-1, 1, 1) if self.images else self.gamma)


class Attention(nn.Module):
    """Two heads; `norm` is applied to queries and keys of each head; `fused`: one tensor for all three."""

    def __init__(self, *, bias: bool = True, norm: nn.Module | None = None, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = linear(D, 3 * D, bias=bias)
        else:
            self.q, self.k, self.v = (linear(bias=bias) for _ in range(3))
        self.out = linear(bias=bias)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        maps = self.qkv(x).split(d, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (z.view(n, t, 2, -1).transpose(1, 2) for z in maps)
        share = (self.norm(q) @ self.norm(k).transpose(2, 3) / 2).softmax(-1)
        return self.out((share @ v).transpose(1, 2).reshape(n, t, d))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(D, 2, batch_first=True)
        with torch.no_grad():
            self.mha.in_proj_bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Places(nn.Module):
    """A learned vector added at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(0.1 * torch.randn(5, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.code


class MeanReadout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.readout = linear(D, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x.mean(1))


def pre(attention: Callable[[], nn.Module], *, act: Callable[[], nn.Module] = nn.GELU, depth: int = 1) -> nn.Module:
    """A pre-LN transformer on series."""
    layers: dict[str, nn.Module] = {"embed": linear(bias=True), "places": Places()}
    for i in range(depth):
        layers[f"a{i}"] = Around(norm=nn.LayerNorm(D), attention=attention())
        layers[f"m{i}"] = Around(norm=nn.LayerNorm(D), up=linear(bias=True), act=act(), down=linear(bias=True))
    return Named(**layers, norm=nn.LayerNorm(D), head=MeanReadout())


def post(act: Callable[[], nn.Module]) -> nn.Module:
    """A post-LN transformer on series."""
    return Named(
        embed=linear(bias=True),
        a=Around(after=nn.LayerNorm(D), attention=Attention()),
        m=Around(after=nn.LayerNorm(D), up=linear(bias=True), act=act(), down=linear(bias=True)),
        head=MeanReadout(),
    )


class TorchRMS(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(D, eps=1e-6)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(D, 12), linear(D, 12), linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Words(nn.Module):
    """A language model: words, blocks on their vectors, and a head that may share its weights with the words."""

    def __init__(self, norm: Callable[[], nn.Module], *, tied: bool = False, cosine: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, D)
        self.a = Around(norm=norm(), attention=Attention(bias=False))
        self.m = Around(norm=norm(), glu=SwiGLU())
        self.norm = norm()
        self.head = linear(D, 9)
        self.cosine = cosine
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.m(self.a(self.embed(x))))
        return 3 * F.linear(h, F.normalize(self.head.weight, dim=1)) if self.cosine else self.head(h)


class Vision(nn.Module):
    """Patches, a class token, a pre-LN block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, D, 3, stride=3)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(0.1 * torch.randn(1, 5, D))
        self.a = Around(norm=nn.LayerNorm(D), attention=TorchAttention())
        self.m = Around(norm=nn.LayerNorm(D), up=linear(bias=True), act=nn.GELU(), down=linear(bias=True))
        self.norm, self.head = nn.LayerNorm(D), linear(D, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.m(self.a(x))[:, 0]))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def mixer() -> nn.Module:
    tokens = Around(
        norm=nn.LayerNorm(D), t=Transposed(), up=linear(5, 6, bias=True), act=nn.GELU(),
        down=linear(6, 5, bias=True), back=Transposed(),
    )  # fmt: skip
    channels = Around(norm=nn.LayerNorm(D), up=linear(bias=True), act=nn.GELU(), down=linear(bias=True))
    return Named(stem=linear(bias=True), tokens=tokens, channels=channels, norm=nn.LayerNorm(D), head=MeanReadout())


def conv(inside: int = D, *, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, D, 3, padding=1, bias=bias, groups=groups)


class Residual(nn.Module):
    """The basic block of a ResNet: ``relu(x + bn2(conv2(relu(bn1(conv1(x))))))``, with zero gains in bn2."""

    def __init__(self, *, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(D), conv(), nn.BatchNorm2d(D)
        nn.init.zeros_(self.bn2.weight)
        self.shortcut = nn.Sequential(nn.Conv2d(D, D, 1, bias=False), nn.BatchNorm2d(D)) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + h)


def resnet() -> nn.Module:
    return Named(
        conv=conv(2), bn=nn.BatchNorm2d(D), act=nn.ReLU(), one=Residual(), two=Residual(shortcut=True), head=Pooled()
    )


def preactivation() -> nn.Module:
    blocks = {
        name: Around(
            bn1=nn.BatchNorm2d(D), r1=nn.ReLU(), conv1=conv(), bn2=nn.BatchNorm2d(D), r2=nn.ReLU(), conv2=conv()
        )
        for name in ("one", "two")
    }
    return Named(conv=conv(2), **blocks, bn=nn.BatchNorm2d(D), act=nn.ReLU(), head=Pooled())


def rectified(*, eps: float, depth: int = 4) -> nn.Module:
    """Convolutions with biases, each with a rectifier and then batch normalization, whose eps many channels feel."""
    layers: dict[str, nn.Module] = {}
    for k in range(depth):
        layers |= {f"c{k}": conv(D if k else 2, bias=True), f"r{k}": nn.ReLU(), f"b{k}": nn.BatchNorm2d(D, eps=eps)}
    return Named(**layers, pool=nn.MaxPool2d(2), head=Pooled())


def convnext(*, bias: bool, scale: float = 1e-6) -> nn.Module:
    block = Around(
        depthwise=conv(bias=bias, groups=D), norm=ChannelNorm(D), up=nn.Conv2d(D, 2 * D, 1), act=nn.GELU(),
        down=nn.Conv2d(2 * D, D, 1), scale=Scale(scale),
    )  # fmt: skip
    return Named(
        stem=nn.Conv2d(2, D, 2, stride=2), stem_norm=ChannelNorm(D), block=block, norm=ChannelNorm(D), head=Pooled()
    )


class Standardized(nn.Conv2d):
    """Scaled weight standardization: ``gain (W - mean)/√(var fan-in)`` for each filter."""

    def __init__(self, inside: int) -> None:
        super().__init__(inside, D, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(D, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        scale = torch.rsqrt((var * self.weight[0].numel()).clamp_min(1e-4)) * self.gain
        return F.conv2d(x, (self.weight - mean) * scale, self.bias, padding=1)


class Cosine(nn.Module):
    """``s cos(feature, row)``: both are normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.s = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class PartlyNormalized(nn.Module):
    """A matrix of which three rows are normalized one by one, or four columns together, the others not at all."""

    def __init__(self, *, by_rows: bool) -> None:
        super().__init__()
        self.weight, self.by_rows = nn.Parameter(torch.randn(D, D)), by_rows
        self.readout = linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.weight
        if self.by_rows:
            w = torch.cat([F.normalize(w[:3], dim=1), w[3:]])
        else:
            w = torch.cat([2 * w[:, :4] / w[:, :4].norm(), w[:, 4:]], dim=1)
        return self.readout(torch.tanh(F.linear(x, w)))


class Columns(nn.Module):
    """``x W`` with the columns of W at unit norm, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.readout = nn.Parameter(torch.randn(D, 6)), linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(x @ (self.weight / self.weight.norm(dim=0))))


class Shared(nn.Module):
    """One map used twice, with its own normalization each time."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.first, self.second = linear(), nn.BatchNorm1d(D), nn.LayerNorm(D)
        self.readout = linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.second(self.map(torch.tanh(self.first(self.map(x)))))))


class TwoStreams(nn.Module):
    """Two residual streams, each normalized where it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (linear() for _ in range(4))
        self.left, self.right = linear(D, 2), linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = F.layer_norm(self.a(x) + torch.relu(self.b(x)), (D,))
        two = F.rms_norm(self.c(one) + torch.relu(self.d(x)), (D,), eps=1e-6)
        return self.left(torch.tanh(one)) + self.right(torch.tanh(two))


class Tied(nn.Module):
    """An autoencoder with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.readout = nn.Parameter(torch.randn(D, D)), linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.T)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.core, self.readout = kind(D, D, batch_first=True), linear(D, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.core(x)[0][:, -1])


class SideBranch(nn.Module):
    """``norm(h + share branch(norm(h)))``: nearly blind to the scale of h, but not quite."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.stem, self.branch, self.readout, self.share = linear(), linear(), linear(D, 2), share

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.readout(F.layer_norm(h + self.share * torch.tanh(self.branch(F.layer_norm(h, (D,)))), (D,)))


class NormalizedInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,))


class SelfGated(nn.Module):
    """``norm(x) · h``: the normalized part is only a factor, and h keeps its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.readout = linear(bias=True), linear(bias=True), linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.value(x)
        return self.readout(torch.tanh(torch.sigmoid(self.gate(x)) * h + F.layer_norm(h, (D,))))


def row(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def mlp(norm: Callable[[], nn.Module], *, bias: bool = False, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return row(linear(bias=bias), norm(), act(), linear(bias=bias), norm(), act(), linear(D, 2))


STREAM = ("embed.weight", "embed.bias", "places.code", "m0.down.weight", "m0.down.bias")
V = "parametrizations.weight.original1"

INVARIANT: dict[str, Architecture] = {
    "BN": Architecture(
        lambda: mlp(lambda: nn.BatchNorm1d(D), bias=True),
        (("0.weight",), ("3.weight",)),
        ("0.bias", "3.bias"),
        (),
    ),
    "LN": Architecture(
        lambda: mlp(lambda: nn.LayerNorm(D), bias=True), (("0.weight", "0.bias"), ("3.weight", "3.bias"))
    ),
    "RMSNorm": Architecture(lambda: mlp(TorchRMS, bias=True), (("0.weight", "0.bias"), ("3.weight", "3.bias"))),
    "GN of vectors": Architecture(lambda: mlp(lambda: nn.GroupNorm(2, D)), (("0.weight",), ("3.weight",))),
    "BN with rectifiers": Architecture(
        lambda: mlp(lambda: nn.BatchNorm1d(D), act=nn.ReLU),
        (("0.weight",), ("3.weight",), ("1.weight", "1.bias")),
        (),
        ("4.* -> 6.weight",),
    ),
    "everything normalized": Architecture(
        lambda: row(linear(), Blind(), nn.Tanh(), linear(D, 4), Blind(centre=True), linear(4, 2), Blind()),
        (("0.weight",), ("3.weight",), ("5.weight",)),
    ),
    "rectifiers before one LN": Architecture(
        lambda: row(linear(), nn.ReLU(), linear(), nn.LayerNorm(D), nn.Tanh(), linear(D, 2)),
        (("0.weight",), ("2.weight",)),
    ),
    "rectifiers with biases before one LN": Architecture(
        lambda: row(linear(bias=True), nn.ReLU(), linear(bias=True), nn.LayerNorm(D), nn.Tanh(), linear(D, 2)),
        (("2.weight", "2.bias"),),
        (),
        (),
    ),
    "convolutions and BN": Architecture(
        lambda: Named(
            c1=conv(2), b1=nn.BatchNorm2d(D), r1=nn.ReLU(), c2=conv(), b2=nn.BatchNorm2d(D), r2=nn.ReLU(), head=Pooled()
        ),
        (("c1.weight",), ("c2.weight",), ("b1.weight", "b1.bias")),
        (),
        ("b2.* -> head.readout.weight",),
        tuple(IMAGES),
    ),
    "rectified convolutions before BN": Architecture(
        lambda: rectified(eps=1e-3),
        tuple((f"c{k}.weight", f"c{k}.bias") for k in range(4)),
        (),
        ("b3.* -> head.readout.weight",),
        tuple(IMAGES),
    ),
    "sandwich norm": Architecture(
        lambda: Named(
            embed=linear(bias=True),
            m=Around(
                norm=nn.LayerNorm(D), up=linear(bias=True), act=nn.GELU(), down=linear(bias=True), post=nn.LayerNorm(D)
            ),
            norm=nn.LayerNorm(D),
            a=nn.Tanh(),
            head=linear(D, 2),
        ),
        (("m.down.weight", "m.down.bias"), ("embed.weight", "embed.bias", "m.post.weight", "m.post.bias")),
    ),
    "grouped convolution and BN": Architecture(
        lambda: Named(c0=conv(2), a0=nn.Tanh(), c=conv(groups=4), b=nn.BatchNorm2d(D), a=nn.Tanh(), head=Pooled()),
        (("c.weight",),),
        data=tuple(IMAGES),
    ),
    "convolution with bias and GN": Architecture(
        lambda: Named(c=conv(2, bias=True), n=nn.GroupNorm(2, D), a=nn.Tanh(), head=Pooled()),
        (("c.weight", "c.bias"),),
        data=tuple(IMAGES),
    ),
    "instance norm": Architecture(
        lambda: Named(c=conv(2, bias=True), n=nn.InstanceNorm2d(D, affine=True), a=nn.Tanh(), head=Pooled()),
        (("c.weight",),),
        ("c.bias",),
        data=tuple(IMAGES),
    ),
    "ResNet with zero gains": Architecture(
        resnet,
        (
            *(("conv.weight",), ("one.conv1.weight",), ("one.conv2.weight",), ("two.conv1.weight",)),
            *(("two.conv2.weight",), ("two.shortcut.0.weight",)),
            *(("one.bn1.weight", "one.bn1.bias"), ("two.bn1.weight", "two.bn1.bias")),
            ("bn.weight", "bn.bias", "one.bn2.weight", "one.bn2.bias"),
        ),
        data=tuple(IMAGES),
    ),
    "preactivation ResNet": Architecture(
        preactivation,
        (
            *(("one.conv1.weight",), ("two.conv1.weight",)),
            *(("one.bn1.weight", "one.bn1.bias"), ("two.bn1.weight", "two.bn1.bias")),
            ("conv.weight", "one.conv2.weight", "two.conv2.weight"),
        ),
        (),
        ("one.bn2.* -> one.conv2.weight", "two.bn2.* -> two.conv2.weight", "bn.* -> head.readout.weight"),
        tuple(IMAGES),
    ),
    "ConvNeXt": Architecture(
        lambda: convnext(bias=True),
        (("stem.weight", "stem.bias"), ("block.depthwise.weight", "block.depthwise.bias")),
        (),
        ("block.norm.* -> block.up.weight", "block.down.* -> block.scale.gamma", "norm.* -> head.readout.weight"),
        tuple(IMAGES),
    ),
    "ConvNeXt without bias before the norm": Architecture(
        lambda: convnext(bias=False),
        (
            ("stem.weight", "stem.bias"),
            ("block.depthwise.weight",),
            ("stem_norm.weight", "stem_norm.bias", "block.scale.gamma"),
        ),
        (),
        ("block.norm.* -> block.up.weight", "block.down.* -> block.scale.gamma", "norm.* -> head.readout.weight"),
        tuple(IMAGES),
    ),
    "pre-LN transformer": Architecture(
        lambda: pre(Attention),
        ((*STREAM, "a0.attention.out.weight", "a0.attention.out.bias"),),
        ("a0.attention.k.bias",),
        (
            *("a0.attention.q.* -> a0.attention.k.weight", "a0.attention.v.* -> a0.attention.out.weight"),
            *("m0.norm.* -> m0.up.weight", "norm.* -> head.readout.weight"),
            "a0.norm.* -> a0.attention.q.weight + a0.attention.k.weight + a0.attention.v.weight",
        ),
        tuple(SERIES),
    ),
    "two pre-LN layers": Architecture(
        lambda: pre(Attention, depth=2),
        (
            (
                *(*STREAM, "m1.down.weight", "m1.down.bias", "a0.attention.out.weight", "a0.attention.out.bias"),
                *("a1.attention.out.weight", "a1.attention.out.bias"),
            ),
        ),
        ("a0.attention.k.bias", "a1.attention.k.bias"),
        data=tuple(SERIES),
    ),
    "pre-LN transformer of torch": Architecture(
        lambda: pre(TorchAttention, act=nn.ReLU),
        ((*STREAM, "a0.attention.mha.out_proj.weight", "a0.attention.mha.out_proj.bias"),),
        ("a0.attention.mha.in_proj_bias[8:16]",),
        (
            "a0.norm.* -> a0.attention.mha.in_proj_weight",
            "a0.attention.mha.*[0:8] -> a0.attention.mha.in_proj_weight[8:16]",
            "a0.attention.mha.*[16:24] -> a0.attention.mha.out_proj.weight",
            "m0.norm.* -> m0.up.weight",
            "m0.up.* -> m0.down.weight",
            "norm.* -> head.readout.weight",
        ),
        tuple(SERIES),
    ),
    "post-LN transformer with rectifiers": Architecture(
        lambda: post(nn.ReLU),
        (("a.after.weight", "a.after.bias", "m.up.bias", "m.down.bias"),),
        ("a.attention.k.bias",),
        data=tuple(SERIES),
    ),
    "post-norm branches": Architecture(
        lambda: Named(
            embed=linear(bias=True),
            a=Around(attention=Attention(), norm=nn.LayerNorm(D)),
            m=Around(up=linear(bias=True), act=nn.GELU(), down=linear(bias=True), norm=nn.LayerNorm(D)),
            head=MeanReadout(),
        ),
        (("a.attention.out.weight", "a.attention.out.bias"), ("m.down.weight", "m.down.bias")),
        ("a.attention.k.bias",),
        data=tuple(SERIES),
    ),
    "normalized queries and keys": Architecture(
        lambda: row(Around(attention=Attention(bias=False, norm=nn.LayerNorm(4, eps=1e-6))), nn.Tanh(), MeanReadout()),
        (("0.attention.q.weight",), ("0.attention.k.weight",)),
        (),
        ("0.attention.v.weight -> 0.attention.out.weight",),
        tuple(SERIES),
    ),
    "normalized queries and keys in one tensor": Architecture(
        lambda: row(
            Around(attention=Attention(bias=False, fused=True, norm=nn.RMSNorm(4, eps=1e-6))), nn.Tanh(), MeanReadout()
        ),
        tuple((f"0.attention.qkv.weight[{a}:{a + 4}]",) for a in (0, 4, 8, 12)),
        data=tuple(SERIES),
    ),
    "normalized queries and keys in one tensor with biases": Architecture(
        lambda: row(Around(attention=Attention(fused=True, norm=Blind())), nn.Tanh(), MeanReadout()),
        tuple((f"0.attention.qkv.weight[{a}:{a + 4}]", f"0.attention.qkv.bias[{a}:{a + 4}]") for a in (0, 4, 8, 12)),
        data=tuple(SERIES),
    ),
    "Llama": Architecture(
        lambda: Words(TorchRMS),
        (("embed.weight", "a.attention.out.weight", "m.glu.down.weight"),),
        (),
        (
            *("a.attention.q.weight -> a.attention.k.weight", "a.attention.v.weight -> a.attention.out.weight"),
            *("m.glu.up.weight -> m.glu.down.weight", "norm.weight -> head.weight"),
            "a.norm.weight -> a.attention.q.weight + a.attention.k.weight + a.attention.v.weight",
            "m.norm.weight -> m.glu.gate.weight + m.glu.up.weight",
        ),
        tuple(TOKENS),
    ),
    "tied weights under a cosine head": Architecture(
        lambda: Words(TorchRMS, tied=True, cosine=True),
        (("embed.weight", "a.attention.out.weight", "m.glu.down.weight"),),
        data=tuple(TOKENS),
    ),
    "cosine head on words": Architecture(
        lambda: Words(TorchRMS, cosine=True),
        (("head.weight",), ("embed.weight", "a.attention.out.weight", "m.glu.down.weight")),
        data=tuple(TOKENS),
    ),
    "vision transformer": Architecture(
        Vision,
        (
            (
                *("patch.weight", "patch.bias", "token", "places", "m.down.weight", "m.down.bias"),
                *("a.attention.mha.out_proj.weight", "a.attention.mha.out_proj.bias"),
            ),
        ),
        ("a.attention.mha.in_proj_bias[8:16]",),
        data=tuple(IMAGES),
    ),
    "MLP-Mixer": Architecture(
        mixer,
        (
            (
                *("stem.weight", "stem.bias", "tokens.down.weight"),
                *("channels.down.weight", "channels.down.bias"),
            ),
        ),
        ("tokens.down.bias",),  # the same in all channels, which layer normalization does not see
        data=tuple(SERIES),
    ),
    "weight norm": Architecture(
        lambda: row(weight_norm(linear(bias=True)), nn.Tanh(), weight_norm(linear()), nn.Tanh(), linear(D, 2)),
        ((f"0.{V}",), (f"2.{V}",)),
    ),
    "weight norm of convolutions": Architecture(
        lambda: Named(c=weight_norm(conv(2)), a=nn.ReLU(), d=weight_norm(conv(bias=True)), b=nn.GELU(), head=Pooled()),
        ((f"c.{V}",), (f"d.{V}",)),
        (),
        ("c.parametrizations.weight.original0 -> d.parametrizations.weight.original0",),
        tuple(IMAGES),
    ),
    "spectral norm": Architecture(
        lambda: row(spectral_norm(linear(bias=True)), nn.Tanh(), spectral_norm(linear()), nn.Tanh(), linear(D, 2)),
        (("0.parametrizations.weight.original",), ("2.parametrizations.weight.original",)),
    ),
    "scaled weight standardization": Architecture(
        lambda: Named(
            stem=Standardized(2), act=nn.GELU(), block=Around(a=nn.GELU(), conv=Standardized(D)), head=Pooled()
        ),
        (("stem.weight",), ("block.conv.weight",)),
        data=tuple(IMAGES),
    ),
    "cosine head": Architecture(
        lambda: row(linear(), nn.Tanh(), linear(bias=True), Cosine()), (("2.weight", "2.bias"), ("3.weight",))
    ),
    "rows normalized in part": Architecture(
        lambda: PartlyNormalized(by_rows=True), (("weight[0:1]",), ("weight[1:2]",), ("weight[2:3]",))
    ),
    "columns normalized in part": Architecture(lambda: PartlyNormalized(by_rows=False), (("weight[:, 0:4]",),)),
    "columns normalized": Architecture(Columns, (("weight",),)),
    "one map twice": Architecture(Shared, (("map.weight",),)),
    "two streams": Architecture(TwoStreams, (("a.weight", "b.weight"), ("c.weight", "d.weight"))),
    "words normalized one by one": Architecture(
        lambda: Named(
            e=nn.Embedding(9, D), norm=nn.LayerNorm(D), mix=linear(bias=True), a=nn.Tanh(), head=linear(D, 9)
        ),
        (("e.weight",),),
        data=tuple(TOKENS),
    ),
}

PLAIN: dict[str, Architecture] = {
    "tanh": Architecture(lambda: row(linear(bias=True), nn.Tanh(), linear(bias=True), nn.Tanh(), linear(D, 2))),
    "rectifiers": Architecture(
        lambda: row(linear(bias=True), nn.ReLU(), linear(bias=True), nn.ReLU(), linear(D, 2, bias=True)),
        pairs=("0.* -> 2.weight", "2.* -> 4.weight"),
    ),
    "linear": Architecture(
        lambda: row(linear(), linear(), linear(D, 2)), pairs=("0.weight -> 1.weight", "1.weight -> 2.weight")
    ),
    "one layer": Architecture(lambda: row(linear(D, 2, bias=True))),
    "BN in eval mode": Architecture(lambda: mlp(lambda: nn.BatchNorm1d(D).eval())),
    "normalized input": Architecture(lambda: row(NormalizedInput(), linear(bias=True), nn.GELU(), linear(D, 2))),
    "convolutions": Architecture(lambda: Named(c=conv(2, bias=True), a=nn.GELU(), head=Pooled()), data=tuple(IMAGES)),
    "residual": Architecture(
        lambda: row(linear(), Around(up=linear(bias=True), act=nn.Tanh(), down=linear(bias=True)), linear(D, 2))
    ),
    "LSTM": Architecture(lambda: Recurrent(nn.LSTM), data=tuple(SERIES)),
    "GRU": Architecture(lambda: Recurrent(nn.GRU), data=tuple(SERIES)),
    "transformer without norm": Architecture(
        lambda: row(Around(attention=Attention()), nn.Tanh(), MeanReadout()),
        null=("0.attention.k.bias",),
        pairs=("0.attention.q.* -> 0.attention.k.weight", "0.attention.v.* -> 0.attention.out.weight"),
        data=tuple(SERIES),
    ),
    "post-LN transformer": Architecture(lambda: post(nn.GELU), null=("a.attention.k.bias",), data=tuple(SERIES)),
    "tied weights": Architecture(lambda: Words(TorchRMS, tied=True), data=tuple(TOKENS)),
    "autoencoder": Architecture(Tied),
    "SwiGLU": Architecture(lambda: row(linear(), SwiGLU(), linear(D, 2))),
    "strong side branch": Architecture(lambda: SideBranch(0.3)),
    "weak side branch": Architecture(lambda: SideBranch(0.05)),
    "very weak side branch": Architecture(lambda: SideBranch(1e-3)),
    "norm beside what it normalizes": Architecture(SelfGated),
}
