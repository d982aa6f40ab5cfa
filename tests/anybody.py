"""Kinds of models, data and training loops as they are found in anybody's code, small enough for dense references.

A model kind is a function that makes a `Case`: a network of at most 150 weights, the loss it is trained on, and what
else its training changes.  All take a batch ``x (n, 4)``, in double precision, with a target ``y (n, 1)``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sharpscope.autodiff import smooth

Loss = Callable[[Any, Any], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(16, 4, seed=0)
Y = torch.sin(2 * X[:, :1]) + 0.3 * X[:, 1:2] * X[:, 2:3]


@dataclass
class Case:
    """A model with its loss, as a training uses them."""

    model: nn.Module
    loss: Loss = F.mse_loss
    keeps: dict[str, Callable[[], Any]] = field(default_factory=dict)  # state beside that of the model
    plain: tuple[tuple[Any, str], ...] = ()  # attributes that an evaluation changes and a measurement puts back
    twin: Callable[["Case"], "Case"] = lambda case: case  # the same function, in what plain autograd can differentiate

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the optimizer is given."""
        own = list(self.model.parameters())
        return own + (list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else [])

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def modules(self) -> list[nn.Module]:
        return [m for m in (self.model, self.loss) if isinstance(m, nn.Module)]

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model(x), y)


@dataclass(frozen=True)
class Kind:
    """How a model is made, and what is expected of measuring it."""

    make: Callable[[], Case]
    refused: str = ""  # what the error says
    stops: bool = False  # gradients on the way, so that the Jacobian of the gradient is measured
    needs_grad: bool = False  # its forward takes a gradient
    warning: str = ""  # what is said of it
    options: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, Kind] = {}
"""All kinds of models, under their names."""


def kind(**expected: Any) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        MODELS[make.__name__.strip("_").replace("_", " ")] = Kind(make, **expected)
        return make

    return add


class Net(nn.Module):
    """Parts, and a function of them and a batch."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def body(out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, out)).double()


def normed(norm: nn.Module) -> Case:
    return Case(nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 1)).double())


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2)


@kind()
def perceptron() -> Case:
    return Case(body())


@kind()
def batch_norm() -> Case:
    return normed(nn.BatchNorm1d(6))


@kind()
def layer_norm() -> Case:
    return normed(nn.LayerNorm(6))


@kind()
def rms_norm() -> Case:
    return normed(nn.RMSNorm(6))


@kind()
def convolution_with_group_norm() -> Case:
    parts = nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(12, 1)
    return Case(nn.Sequential(nn.Unflatten(1, (1, 4)), *parts).double())


@kind()
def tied_by_a_nested_list() -> Case:
    encode, out = nn.Linear(4, 3).double(), nn.Linear(4, 1).double()
    run = lambda m, x: m.out(torch.tanh(m.encode(x)) @ m.kept[0]["w"])  # noqa: E731
    return Case(Net(run, encode=encode, out=out, kept=[{"w": encode.weight}]))


@kind()
def tied_by_a_bound_default() -> Case:
    encode, scale = nn.Linear(4, 3).double(), weight(1)

    def decode(h: Tensor, w: Tensor = encode.weight) -> Tensor:
        return (h @ w).sum(1, keepdim=True)

    return Case(Net(lambda m, x: m.scale * decode(torch.tanh(m.encode(x))), encode=encode, scale=scale))


class Penalized:
    """A loss that is an object with the model in it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.strength = model, 0.05

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        penalty = sum((p.square().sum() for n, p in self.model.named_parameters() if "bias" not in n), y.new_zeros(()))
        return F.mse_loss(out, y) + self.strength * penalty


@kind()
def decay_in_an_object() -> Case:
    net = body()
    return Case(net, Penalized(net))


@kind()
def anchored_by_fisher_information() -> Case:
    net = body()
    anchors = {name: p.detach().clone() for name, p in net.named_parameters()}
    fisher = {name: torch.rand_like(p) for name, p in anchors.items()}

    def loss(out: Tensor, y: Tensor) -> Tensor:
        now = dict(net.named_parameters())
        return (
            F.mse_loss(out, y) + torch.stack([(fisher[n] * (now[n] - a) ** 2).sum() for n, a in anchors.items()]).sum()
        )

    return Case(net, loss)


def _gram(net: nn.Module, out: Tensor, y: Tensor) -> Tensor:
    w = net.get_parameter("0.weight")
    return F.huber_loss(out, y) + 0.2 * (w.T @ w - torch.eye(4, dtype=w.dtype)).norm().square()


@kind()
def orthogonality_by_a_partial() -> Case:
    net = body()
    return Case(net, partial(_gram, net))


@kind()
def equation_in_the_loss() -> Case:
    net, points = body(), normal(8, 4, seed=3)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        at = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(slope[:, 0].sum(), at, create_graph=True)
        return F.mse_loss(out, y) + 0.3 * (second[:, 0] + net(at)[:, 0]).square().mean()

    return Case(net, loss)


@kind(needs_grad=True)
def energy_and_forces() -> Case:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            energy = m.net(at)
            return energy, -torch.autograd.grad(energy.sum(), at, create_graph=True)[0]

    return Case(Net(run, net=body()), lambda out, y: F.mse_loss(out[0], y) + F.mse_loss(out[1], y.expand(-1, 4)))


def _checkpointed(how: str) -> Case:
    middle = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        if m.how == "in segments":
            return m.last(checkpoint_sequential(m.middle, 2, h, use_reentrant=False))
        return m.last(checkpoint(m.middle, h, use_reentrant=m.how == "again") if m.how else m.middle(h))

    def twin(case: Case) -> Case:
        case.model.how = ""  # type: ignore[assignment]
        return case

    net = Net(run, first=nn.Linear(4, 4), middle=middle, last=nn.Linear(4, 1), how=how)
    return Case(net.double(), twin=twin)


@kind()
def checkpoint_that_enters_again() -> Case:
    return _checkpointed("again")


@kind()
def checkpoint_by_hooks() -> Case:
    return _checkpointed("by hooks")


@kind()
def checkpoint_in_segments() -> Case:
    return _checkpointed("in segments")


@kind()
def two_outputs() -> Case:
    def run(m: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = torch.tanh(m.body(x))
        return m.head(h), [h, m.side(h)]

    def loss(out: tuple[Tensor, list[Tensor]], y: Tensor) -> Tensor:
        return F.mse_loss(out[0], y) + 0.1 * out[1][0].square().mean() + F.l1_loss(out[1][1], y + 9)

    return Case(Net(run, body=nn.Linear(4, 5), head=nn.Linear(5, 1), side=nn.Linear(5, 1)).double(), loss)


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


@kind()
def output_dataclass() -> Case:
    def run(m: Any, x: Tensor) -> Output:
        h = torch.tanh(m.body(x))
        return Output(m.head(h), (x, h))

    def loss(out: Output, y: Tensor) -> Tensor:
        return F.cross_entropy(out.logits, (y[:, 0] > 0).long(), label_smoothing=0.1)

    return Case(Net(run, body=nn.Linear(4, 5), head=nn.Linear(5, 2)).double(), loss)


@kind()
def loss_of_its_own() -> Case:
    def run(m: Any, x: Tensor) -> Output:
        out = m.net(x)
        return Output(out, loss=(out - x).square().mean() + 0.01 * m.net[0].weight.abs().square().sum())

    def loss(out: Output, y: Tensor) -> Tensor:
        assert out.loss is not None
        return out.loss

    return Case(Net(run, net=body(4)), loss)


@kind()
def experts_of_which_one_is_idle() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        gates = m.gate(x).softmax(1)
        chosen = gates[:, :2].argmax(1)
        out = x.new_zeros(len(x), 1)
        for i, expert in enumerate(m.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, gates[rows, i, None] * expert(x[rows]))
        return out

    return Case(Net(run, gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 1) for _ in range(3))).double())


@kind()
def sparse_adjacency() -> Case:
    graph = (normal(4, 4, seed=5) > 0.3).double().to_sparse()
    net = Net(lambda m, x: m.net(torch.sparse.mm(m.graph, x.T).T), net=body())
    net.register_buffer("graph", graph)
    return Case(net)


@kind()
def complex_spectrum() -> Case:
    mix = nn.Parameter(torch.complex(normal(2, 3, seed=1), normal(2, 3, seed=2)))

    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.fft.irfft(torch.fft.rfft(x)[:, None] * m.mix, n=4).flatten(1).tanh())

    return Case(Net(run, mix=mix, out=nn.Linear(8, 1).double()))


def _in_single(case: Case) -> Case:
    return replace(case, model=copy.deepcopy(case.model).float())


@kind()
def low_body_and_single_norms() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.first(x.to(m.first.weight.dtype)).to(m.norm.weight.dtype))
        return m.last(torch.tanh(h).to(m.last.weight.dtype)).double()

    first, last = nn.Linear(4, 5).bfloat16(), nn.Linear(5, 1).bfloat16()
    return Case(Net(run, first=first, norm=nn.LayerNorm(5), last=last), twin=_in_single)


@kind()
def adapters_on_a_low_base() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.base(x.to(m.base.weight.dtype)).float() + m.up(m.down(x.float()))
        return m.head(torch.tanh(h)).double()

    base = nn.Linear(4, 5).bfloat16().requires_grad_(False)
    down, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
    return Case(Net(run, base=base, down=down, up=up, head=nn.Linear(5, 1)), twin=_in_single)


@kind()
def autocast_inside() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=m.low):
            return m.net(x.float()).double()

    def twin(case: Case) -> Case:
        case.model.low = False  # type: ignore[assignment]
        return case

    return Case(Net(run, net=body().float(), low=True), twin=twin)


@kind()
def compiled() -> Case:
    net = body()
    return Case(torch.compile(net, backend="aot_eager"), twin=lambda case: replace(case, model=net))  # type: ignore[arg-type]


@kind()
def data_parallel() -> Case:
    return Case(nn.DataParallel(normed(nn.GroupNorm(3, 6)).model))


class Smoothly(nn.Module):
    """A model whose native kernels have a wrong second derivative."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        with smooth():
            return self.net(x)


def _smoothly(case: Case) -> Case:
    return replace(case, model=Smoothly(case.model))


@kind()
def weight_normalization() -> Case:
    net = body()
    parametrizations.weight_norm(net[0], dim=1)
    return Case(net, twin=_smoothly)


@kind(stops=True)
def spectral_normalization() -> Case:
    net = body()
    parametrizations.spectral_norm(net[0])
    return Case(net)


@kind()
def orthogonal_by_cayley() -> Case:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    parametrizations.orthogonal(net[0], orthogonal_map="cayley")
    return Case(net)


@kind()
def pruned() -> Case:
    net = body()
    prune.global_unstructured([(net[0], "weight"), (net[2], "weight")], prune.L1Unstructured, amount=0.4)
    return Case(net)


def _tokens(x: Tensor) -> Tensor:
    return (x[:, :2] > 0).long() + torch.tensor([0, 2])


@kind()
def embedding_of_bounded_norm() -> Case:
    def formula(m: Any, x: Tensor) -> Tensor:
        rows = m.rows.weight * (0.7 / (m.rows.weight.norm(dim=1, keepdim=True) + 1e-7)).clamp_max(1)
        return m.out(rows[_tokens(x)].flatten(1).tanh())

    rows, out = nn.Embedding(4, 3, max_norm=0.7).double(), nn.Linear(6, 1).double()
    net = Net(lambda m, x: m.out(m.rows(_tokens(x)).flatten(1).tanh()), rows=rows, out=out)
    return Case(net, twin=lambda case: replace(case, model=Net(formula, rows=rows, out=out)))


@kind()
def sparse_gradients() -> Case:
    rows, out = nn.Embedding(4, 3, sparse=True).double(), nn.Linear(6, 1).double()
    net = Net(lambda m, x: m.out(m.rows(_tokens(x)).flatten(1).tanh()), rows=rows, out=out)
    return Case(net, twin=_smoothly)


@kind()
def clamped_weights() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        for p in m.net.parameters():
            p.data.clamp_(-0.4, 0.4)
        return m.net(x)

    return Case(Net(run, net=body()))


@kind()
def inputs_written_in_place() -> Case:
    return Case(Net(lambda m, x: m.net(x.sub_(x.mean(0))), net=body()))


@kind(refused="the loss is random")
def dropout() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 1)).double())


def _without_dropping(case: Case) -> Case:
    net = copy.deepcopy(case.model)
    for m in net.modules():
        if isinstance(m, nn.Dropout | Skip):
            m.eval()
    return replace(case, model=net)


@kind(options={"without_dropout": True})
def dropout_left_out() -> Case:
    return replace(dropout(), twin=_without_dropping)


class Skip(nn.Module):
    """Skips a branch at random."""

    def forward(self, h: Tensor) -> Tensor:
        return h * (torch.rand(len(h), 1) < 0.7) / 0.7 if self.training else h


@kind(options={"without_dropout": True})
def stochastic_depth_left_out() -> Case:
    net = Net(lambda m, x: m.out(x + m.skip(m.net(x))), net=body(4), skip=Skip(), out=nn.Linear(4, 1).double())
    return Case(net, twin=_without_dropping)


@kind(refused="the loss is random")
def noise() -> Case:
    draws = np.random.default_rng(3)
    net = Net(lambda m, x: m.net(x + 0.1 * torch.from_numpy(draws.standard_normal(x.shape))), net=body())
    return Case(net, keeps={"draws": lambda: draws.bit_generator.state})


@kind(stops=True)
def siamese() -> Case:
    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        a, b = m.net(x), m.net(x + 0.3 * x.roll(1, 1))
        return m.predict(a), m.predict(b), a.detach(), b.detach()

    def loss(out: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return -(F.cosine_similarity(out[0], out[3]) + F.cosine_similarity(out[1], out[2])).mean() / 2

    return Case(Net(run, net=body(3), predict=nn.Linear(3, 3).double()), loss)


@kind(stops=True)
def temporal_differences() -> Case:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ahead = m.net(0.8 * x.flip(1))
        return m.net(x), 0.9 * ahead

    return Case(Net(run, net=body()), lambda out, y: F.smooth_l1_loss(out[0], y + out[1]))


@kind(warning="a rounding passes gradients straight through")
def straight_through() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        w = m.w + (torch.round(8 * m.w) / 8 - m.w).detach()
        return m.out(torch.tanh(x @ w))

    return Case(Net(run, w=weight(4, 5), out=nn.Linear(5, 1).double()))


class RunningCentre(nn.Module):
    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.5 * self.centre + 0.5 * out.detach().mean(0)
        return (out - self.centre - y).square().mean() + 0.1 * out.square().mean()


@kind(stops=True)
def loss_with_a_running_centre() -> Case:
    return Case(body(3), RunningCentre())


@kind()
def discriminator_in_the_loss() -> Case:
    critic = normed(nn.BatchNorm1d(6)).model
    gradients = lambda: [None if p.grad is None else p.grad.clone() for p in critic.parameters()]  # noqa: E731
    loss = lambda out, y: F.softplus(-critic(out)).mean() + 0.1 * out.square().mean()  # noqa: E731
    return Case(body(4), loss, {"critic": critic.state_dict, "gradients": gradients})


@kind()
def counter_as_an_attribute() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        if m.training:
            m.calls += 1
        return m.net(x) * (1 - 0.5**m.calls)

    net = Net(run, net=body(), calls=0)
    return Case(net, keeps={"calls": lambda: net.calls}, plain=((net, "calls"),))


@kind(stops=True)
def average_as_a_plain_tensor() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        out = m.net(x)
        if m.training:
            m.size = 0.5 * m.size + 0.5 * out.detach().square().mean().sqrt()
        return out / m.size

    net = Net(run, net=body(), size=torch.ones((), dtype=torch.float64))
    return Case(net, keeps={"size": lambda: net.size}, plain=((net, "size"),))


@kind(stops=True)
def momentum_encoder() -> Case:
    """Frozen weights that the forward itself moves, and a queue of what they gave."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if m.training:
                for old, new in zip(m.slow.parameters(), m.net.parameters(), strict=True):
                    old.data = 0.9 * old.data + 0.1 * new.data
            keys = m.slow(x)
            if m.training:
                m.queue[m.at : m.at + 1] = keys[:1]
                m.at = (m.at + 1) % len(m.queue)
        return m.net(x), torch.cat([keys.mean(0, keepdim=True), m.queue])

    net = Net(run, net=body(2), slow=body(2).requires_grad_(False), at=0)
    net.register_buffer("queue", normal(3, 2, seed=8))
    return Case(
        net,
        lambda out, y: F.softplus(out[0] @ out[1].T).mean() + F.mse_loss(out[0][:, :1], y),
        {"at": lambda: net.at},
        ((net, "at"),),
    )


class Uncertain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spread = weight(1)

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return ((out - y).square() * torch.exp(-self.spread) + self.spread).mean()


@kind()
def learnable_loss() -> Case:
    return Case(body(), Uncertain())


def _note(log: list[Any]) -> Callable[..., None]:
    return lambda module, before, after: log.append(after[0].detach().norm().item())


@kind()
def hooks_that_record() -> Case:
    net, log = body(), list[Any]()
    net[0].register_forward_hook(lambda m, args, out: log.append(out.detach().std()))
    net[2].register_full_backward_hook(_note(log))
    return Case(net, keeps={"log": lambda: list(log)})


@kind()
def hooks_that_compute() -> Case:
    net = body()
    net[1].register_forward_hook(lambda m, args, out: out + 0.5 * args[0])
    net[2].register_forward_pre_hook(lambda m, args: (2 * args[0],))
    return Case(net)


@kind()
def recurrent() -> Case:
    run = lambda m, x: m.out(m.cell(x.view(-1, 2, 2))[0][:, -1])  # noqa: E731
    return Case(Net(run, cell=nn.GRU(2, 3, batch_first=True), out=nn.Linear(3, 1)).double())


@kind()
def attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.enter(x[:, :, None])
        return m.out(m.mix(h, h, h, need_weights=False)[0].mean(1))

    parts = {"enter": nn.Linear(1, 4), "mix": nn.MultiheadAttention(4, 2, batch_first=True), "out": nn.Linear(4, 1)}
    return Case(Net(run, **parts).double(), twin=_smoothly)


@kind()
def frozen_part() -> Case:
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.ReLU(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)
    )
    net[0].requires_grad_(False)
    return Case(net.double())


@kind(needs_grad=True)
def gradients_per_example() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        slope = torch.vmap(torch.func.grad(lambda row: m.net(row).sum()))(x)
        return m.net(x) + 0.5 * slope.square().sum(1, keepdim=True)

    return Case(Net(run, net=body()))


@kind(refused="lazy and has no shape yet")
def lazy() -> Case:
    return Case(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 1)).double())


@kind(refused="scripted or traced")
def traced() -> Case:
    return Case(torch.jit.trace(body(), X))


@dataclass
class Data:
    """Batches, how a training takes them apart, and the state that reading them changes."""

    batches: Any
    state: Callable[[], Any] = lambda: None
    options: Mapping[str, Any] = field(default_factory=dict)

    def split(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and target of a batch."""
        return self.options["batch"](raw) if "batch" in self.options else raw


class Examples(Dataset[Any]):
    """Adds noise from a generator of its own, and counts what is read."""

    def __init__(self) -> None:
        self.draws, self.reads = np.random.default_rng(7), 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return X[i] + 0.1 * torch.from_numpy(self.draws.standard_normal(4)), Y[i]


class Stream(IterableDataset[Any]):
    """Goes on where it stopped."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(16):
            self.at += 1
            yield X[(5 * self.at) % 16] + self.at / 50, Y[(5 * self.at) % 16]


def _cut(*sizes: int) -> list[Any]:
    return [(x.clone(), y.clone()) for x, y in zip(X.split(sizes), Y.split(sizes), strict=True)]


def _own_generator() -> Data:
    examples = Examples()
    return Data(DataLoader(examples, 6), lambda: (examples.draws.bit_generator.state, examples.reads))


def _stream() -> Data:
    stream = Stream()
    return Data(DataLoader(stream, 6), lambda: stream.at)


def _named() -> Data:
    rows = [{"x": x, "y": y, "name": str(i)} for i, (x, y) in enumerate(zip(X, Y, strict=True))]
    return Data(DataLoader(rows, 7, shuffle=True), options={"batch": lambda b: (b["x"], b["y"])})  # type: ignore[arg-type]


PLAIN = TensorDataset(X, Y)
DATA: dict[str, Callable[[], Data]] = {
    "one batch": lambda: Data(_cut(16)),
    "uneven batches": lambda: Data(_cut(7, 4, 5)),
    "a loader": lambda: Data(DataLoader(PLAIN, 6)),
    "a loader that shuffles": lambda: Data(DataLoader(PLAIN, 6, shuffle=True)),
    "persistent workers": lambda: Data(DataLoader(PLAIN, 8, shuffle=True, num_workers=1, persistent_workers=True)),
    "a generator of its own": _own_generator,
    "named parts": _named,
    "a stream": _stream,
}
"""All kinds of data."""
