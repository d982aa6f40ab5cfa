"""The first look at a loss: randomness, state and stopped gradients are seen, and nothing is left behind."""

import gc
import itertools
import random
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import normal, relative
from torch import Tensor, nn

from sharpscope import Objective, find_groups, hessian, sharpness
from sharpscope.autodiff import first_look
from sharpscope.autodiff.expansion import kept
from sharpscope.errors import InvalidValue, NoSecondDerivative, NotSymmetric, Random

X, Y = normal(24, 4, seed=0), normal(24, 1, seed=1)
COUNT = 0
QUEUE: list[Tensor] = []


class Noisy(nn.Module):
    """Draws in one of many ways while it is in training mode."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 6), nn.Linear(6, 1), draw
        self.own, self.legacy = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(self.draw(h) if self.training else h)


def numpy_state() -> list[int]:
    return list(np.random.get_state(legacy=True)[1])  # type: ignore[index]


def drop_path(h: Tensor) -> Tensor:
    return h * h.new_empty(len(h), 1).bernoulli_(0.5)


OWN = torch.Generator().manual_seed(3)
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "stochastic depth": drop_path,
    "noise": lambda h: h + torch.randn_like(h),
    "a rectifier": lambda h: F.rrelu(h, training=True),
    "Gumbel": lambda h: F.gumbel_softmax(h),
    "numpy": lambda h: h * np.random.rand(),
    "python": lambda h: h * random.random(),
    "a generator of its own": lambda h: h + torch.randn(h.shape, generator=OWN),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_random_model_is_refused_and_measured_without_it(kind: str) -> None:
    net = Noisy(DRAWS[kind]).double()
    states = torch.get_rng_state(), numpy_state(), random.getstate(), OWN.get_state()
    with pytest.raises(Random, match=r"the loss is random: the model \(Noisy\) draws random numbers"):
        Objective(net, F.mse_loss, [(X, Y)])
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    assert net.training
    found = sharpness(f)
    net.eval()
    assert found == pytest.approx(sharpness(Objective(net, F.mse_loss, [(X, Y)])), rel=1e-9)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(OWN.get_state(), states[3])
    assert numpy_state() == states[1] and random.getstate() == states[2]


def test_noise_that_eval_mode_does_not_stop_is_refused() -> None:
    class Sampler(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + torch.randn_like(input))

    for without in (False, True):
        with pytest.raises(Random, match=r"the loss is random.* in eval mode, too"):
            Objective(Sampler(4, 1).double(), F.mse_loss, [(X, Y)], without_dropout=without)


def test_noise_of_a_loss_function_is_not_blamed_on_the_mode_of_the_model() -> None:
    net = nn.Linear(4, 1).double()
    with pytest.raises(Random, match=r"the loss function, or the model outside .* in eval mode, too.* without noise"):
        Objective(net, lambda out, y: F.mse_loss(out + 0.1 * torch.randn_like(out), y), [(X, Y)])


def test_functional_dropout_that_eval_mode_does_not_stop_is_left_out_where_that_is_wanted() -> None:
    net = nn.Linear(4, 1).double()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(F.dropout(out, 0.2), y)

    with pytest.raises(Random, match="without_dropout=True"):
        Objective(net, loss, [(X, Y)])
    f = Objective(net, loss, [(X, Y)], without_dropout=True)
    assert sharpness(f) == pytest.approx(sharpness(Objective(net, F.mse_loss, [(X, Y)])), rel=1e-9)


class Rare(nn.Module):
    """Drops everything, one time in five."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x if self.training and torch.rand(()) < 0.2 else x


def test_what_is_rarely_random_is_random() -> None:
    """At a rate of 0.2 the first two evaluations are the same two times out of three."""
    net = nn.Sequential(nn.Linear(4, 6), Rare(), nn.Linear(6, 1)).double()
    with pytest.raises(Random, match=r"'1' \(Rare\) draws random numbers"):
        Objective(net, F.mse_loss, [(X, Y)])
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    plain = Objective(nn.Sequential(net[0], net[2]), F.mse_loss, [(X, Y)])
    for _ in range(20):
        assert f.value(f.weights()).equal(plain.value(plain.weights()))
    assert f.check() == ""


def test_a_module_that_draws_beside_a_part_that_draws_is_quiet_too() -> None:
    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x if torch.rand(()) < 0.5 and self.training else x  # draws in eval mode, too, to no effect

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = Encoder(), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x * (torch.rand_like(x) > 0.3)
            out: Tensor = self.head(self.inside(x))
            return out

    net = Masked().double()
    f = Objective(net, F.mse_loss, [(X, Y)], without_dropout=True)
    assert sharpness(f) == pytest.approx(sharpness(Objective(net.head, F.mse_loss, [(X, Y)])), rel=1e-9)
    with pytest.raises(Random, match=r"the model \(Masked\), 'inside' \(Encoder\) draw random.*without_dropout=True"):
        Objective(net, F.mse_loss, [(X, Y)])


def test_draws_that_make_no_difference_are_accepted() -> None:
    net = Noisy(lambda h: h + 0 * torch.randn_like(h)).double()
    f = Objective(net, F.mse_loss, [(X, Y)])
    state = torch.get_rng_state()
    f.hvp(f.weights(), f.weights())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_begins_to_draw_later_is_refused_then() -> None:
    net = Noisy(drop_path).double().eval()
    f = Objective(net, F.mse_loss, [(X, Y)])
    net.train()
    with pytest.raises(Random, match="has begun to draw random numbers"):
        f.value(f.weights())


def test_the_innermost_module_that_draws_is_named() -> None:
    class Depth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return drop_path(x)

    net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Depth(), nn.Tanh()), nn.Linear(6, 1)).double()
    with pytest.raises(Random, match=r"'1.0' \(Depth\) draws random numbers"):
        Objective(net, F.mse_loss, [(X, Y)])


class Counting(nn.Module):
    """Keeps state of many kinds beside parameters and buffers."""

    centre: Tensor
    total = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Linear(4, 1), kind
        self.calls, self.average, self.queue = 0, torch.ones((), dtype=torch.float64), deque[Tensor](maxlen=3)
        self.seen: dict[str, Any] = {"n": 0, "t": torch.ones((), dtype=torch.float64)}
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("centre", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        scale: Any = 1.0
        now = out.detach().std()
        if self.kind == "a counter":
            self.calls += 1
            scale = 1 + self.calls
        elif self.kind == "an average that is replaced":
            self.average = 0.9 * self.average + 0.1 * now
            scale = self.average
        elif self.kind == "an average in place":
            self.average.mul_(0.9).add_(0.1 * now)
            scale = self.average
        elif self.kind == "a queue":
            self.queue.append(now)
            scale = torch.stack(list(self.queue)).sum()
        elif self.kind == "a dictionary":
            self.seen["n"] += 1
            self.seen["t"].add_(now)
            scale = self.seen["n"] + self.seen["t"]
        elif self.kind == "a buffer that is replaced":
            self.centre = 0.9 * self.centre + now
            scale = self.centre
        elif self.kind == "an attribute of the class":
            Counting.total += 1
            scale = Counting.total
        elif self.kind == "a mode":
            self.train(not self.training)
            scale = 1.0 + self.training
        return out * scale


KINDS = [
    *("a counter", "an average that is replaced", "an average in place", "a queue", "a dictionary"),
    *("a buffer that is replaced", "a mode", "an attribute of the class"),
]


def state_of(net: Counting) -> list[Any]:
    numbers = [net.calls, net.average.item(), [t.item() for t in net.queue], net.seen["n"], net.seen["t"].item()]
    return [*numbers, net.centre.item(), net.training, Counting.total]


@pytest.mark.parametrize("kind", KINDS)
def test_state_beside_buffers_is_put_back(kind: str) -> None:
    net = Counting(kind).double()
    net(X)
    before, identities = state_of(net), (id(net.average), id(net.queue), id(net.seen["t"]))
    f = Objective(net, F.mse_loss, [(X, Y)])
    w = f.weights()
    values = [f.value(w).item() for _ in range(3)]
    assert len(set(values)) == 1 and torch.equal(f.grad(w), f.grad(w))
    f.hvp(w, w)
    assert state_of(net) == before
    assert (id(net.average), id(net.queue), id(net.seen["t"])) == identities
    assert values[0] == F.mse_loss(net(X), Y).item()  # what the next step of training sees


def count() -> float:
    global COUNT
    COUNT += 1
    return float(COUNT)


def captured_losses() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], Any]]]:
    calls = 0
    bag: dict[str, float] = {}
    norm = nn.BatchNorm1d(1).double()

    def counted(out: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(out, y) * calls

    def filled(out: Tensor, y: Tensor) -> Tensor:
        bag[str(len(bag))] = out.detach().mean().item()
        return F.mse_loss(out, y) * len(bag)

    def queued(out: Tensor, y: Tensor) -> Tensor:
        QUEUE.append(out.detach())
        return F.mse_loss(out, y) * len(QUEUE)

    def weighted(by: list[float], out: Tensor, y: Tensor) -> Tensor:
        by[0] += 1
        return F.mse_loss(out, y) * by[0]

    given = [1.0]
    return {
        "a closure": (counted, lambda: calls),
        "a dictionary in a closure": (filled, lambda: dict(bag)),
        "a global list": (queued, lambda: len(QUEUE)),
        "a global number": (lambda out, y: F.mse_loss(out, y) * count(), lambda: COUNT),
        "an argument bound to the loss": (partial(weighted, given), lambda: list(given)),
        "a network in a closure": (
            lambda out, y: F.softplus(-norm(out)).mean(),
            lambda: {name: t.tolist() for name, t in norm.state_dict().items()},
        ),
    }


@pytest.mark.parametrize("kind", sorted(captured_losses()))
def test_state_around_the_loss_is_put_back(kind: str) -> None:
    loss, state = captured_losses()[kind]
    net = nn.Linear(4, 1).double()
    loss(net(X), Y)
    before = state()
    f = Objective(net, loss, [(X, Y)])
    w = f.weights()
    assert torch.equal(f.value(w), f.value(w))
    f.hvp(w, w)
    assert state() == before
    assert relative(f.value(w), loss(net(X), Y).detach()) < 1e-12


def test_the_state_of_a_loss_that_is_a_module_is_a_buffer_like_any_other() -> None:
    class Centred(nn.Module):
        centre: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            self.centre.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
            return (out - self.centre).square().mean()

    loss, net = Centred(), nn.Linear(4, 3).double()
    f = Objective(net, loss, [(X, Y)])
    w = f.weights()
    assert torch.equal(f.value(w), f.value(w)) and not loss.centre.any()
    assert f.value(w).item() == pytest.approx(loss(net(X), Y).item(), rel=1e-15)  # sums depend on where vectors lie


def test_state_that_nothing_can_put_back_is_refused() -> None:
    class Hidden:
        __slots__ = ("n",)

        def __init__(self) -> None:
            self.n = 0

        def __call__(self, out: Tensor, y: Tensor) -> Tensor:
            self.n += 1
            return F.mse_loss(out, y) * self.n

    with pytest.raises(InvalidValue, match="two evaluations at the same weights gave losses"):
        Objective(nn.Linear(4, 1).double(), Hidden(), [(X, Y)])


def two_layers(width: int, out: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, out)).double()


class Siamese(nn.Module):
    """Two views, each predicted from the other, whose own representation stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.f = two_layers(5, 3)
        self.h = nn.Linear(3, 3).double()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        z, other = self.f(a), self.f(b)
        return self.h(z), self.h(other), z.detach(), other.detach()


def siamese_loss(out: tuple[Tensor, ...], _: Any) -> Tensor:
    return -(F.cosine_similarity(out[0], out[3]) + F.cosine_similarity(out[1], out[2])).mean()


class Bootstrap(nn.Module):
    """Temporal differences: the target is the model's own, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.q = two_layers(6, 1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = 0.9 * self.q(b)
        return self.q(a), target


def bootstrap_loss(out: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
    return F.mse_loss(out[0], reward + out[1])


class Scaled(nn.Module):
    """Divides by its own size, taken as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.q = two_layers(6, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out = self.q(a)
        return out / out.std().item()


STOPPED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "siamese": (Siamese, siamese_loss),
    "bootstrap": (Bootstrap, bootstrap_loss),
    "a number": (Scaled, F.mse_loss),
}


def jacobian(f: Objective) -> Tensor:
    w, h = f.weights(), 1e-6
    units = torch.eye(f.size, dtype=torch.float64)
    return torch.stack([(f.grad(w + h * e) - f.grad(w - h * e)) / (2 * h) for e in units], dim=1)


@pytest.mark.parametrize("kind", STOPPED)
def test_stopped_gradients_are_measured_by_the_jacobian_of_the_update(kind: str) -> None:
    make, loss = STOPPED[kind]
    net = make()
    b = X + 0.1 * normal(24, 4, seed=5)
    f = Objective(net, loss, [((X, b), Y)])
    assert not f.follows_gradient
    expected = jacobian(f)
    rightmost = torch.linalg.eigvals(expected).real.max().item()
    assert sharpness(f) == pytest.approx(rightmost, rel=2e-3, abs=1e-4 * expected.norm().item())
    at, v = f.at(f.weights()), normal(f.size, seed=6)
    assert relative(at.hvp(v), expected @ v) < 1e-5  # differences of differences
    with pytest.raises(NotSymmetric, match="gradients are stopped on the way"):
        hessian(f)
    with pytest.raises(NoSecondDerivative, match="gradients are stopped on the way"):
        at.third(v, v)
    assert hessian(f.using(kept)) is not None  # who wants autograd's products names them
    assert find_groups(f).num_gradients > 0


def test_numbers_taken_out_for_a_log_stop_nothing() -> None:
    log: list[float] = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(out, y)
        log.append(value.item())
        log.append(out.detach().mean().item())
        return value

    net = two_layers(6, 1)
    f = Objective(net, loss, [(X, Y)])
    assert f.follows_gradient and not log
    plain = Objective(net, F.mse_loss, [(X, Y)])
    w = f.weights()
    assert torch.equal(f.hvp(w, w), plain.hvp(w, w))


def by_slice(z: Tensor) -> Tensor:
    memory = z.new_zeros(2)
    memory[:1] = z.detach().std()
    return memory[0]


def by_memory(z: Tensor) -> Tensor:
    memory = z.new_zeros(2)
    memory.view(1, 2)[0].add_(z.detach().std())
    return memory[1]


def by_sum(z: Tensor) -> Tensor:
    size = z.new_zeros(())
    size += z.detach().std()
    return size


def by_out(z: Tensor) -> Tensor:
    size = z.new_zeros(())
    with torch.no_grad():
        torch.add(z.std(), 0.0, out=size)
    return size


def by_batches(z: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row.detach())(z).std()


ROADS: dict[str, Callable[[Tensor], Tensor]] = {
    "a list": lambda z: torch.stack([z.detach().std(), z.new_ones(())]).prod(),
    "a keyword": lambda z: torch.mul(z.new_ones(()), other=z.detach().std()),
    "an array": lambda z: torch.as_tensor(np.asarray(z.detach()).std(ddof=1)),
    "data": lambda z: z.data.std(),
    "a slice": by_slice,
    "memory": by_memory,
    "a sum": by_sum,
    "out": by_out,
    "vmap": by_batches,
}


@pytest.mark.parametrize("road", ROADS)
def test_what_was_stopped_is_found_on_its_way_back(road: str) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = two_layers(6, 1)

        def forward(self, a: Tensor) -> Tensor:
            out = self.q(a)
            return out / ROADS[road](out)

    assert not Objective(Sized(), F.mse_loss, [(X, Y)]).follows_gradient


class Averaging(nn.Module):
    """Keeps running averages of its own by one of several ways, and a log."""

    centre: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q = two_layers(6, 1)
        self.register_buffer("centre", torch.zeros(4, dtype=torch.float64))
        self.log: list[Tensor] = []

    def forward(self, a: Tensor) -> Tensor:
        hidden = torch.tanh(self.q[0](a))
        mean = hidden.mean(0)
        out = self.q[2](hidden - mean) + self.centre[0]  # of before
        if self.kind == "detach":
            self.centre.mul_(0.9).add_(mean.detach()[:4], alpha=0.1)
        elif self.kind == "no_grad":
            with torch.no_grad():
                self.centre[:] = 0.9 * self.centre + 0.1 * mean[:4]
        else:
            self.log.append(hidden.detach().std(0) * 2)
        mask = hidden.detach() > 0
        return out + torch.where(mask, hidden, -hidden).sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["detach", "no_grad", "log"])
def test_averages_and_logs_need_no_comparison(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    monkeypatch.setattr(first_look._Looking, "_compare_with_differences", lambda self: compared.append(True))
    f = Objective(Averaging(kind), F.mse_loss, [(X, Y)])
    assert f.follows_gradient and not compared
    w = f.weights()
    v = normal(f.size, seed=6)
    assert relative(f.hvp(w, v), (f.grad(w + 1e-6 * v) - f.grad(w - 1e-6 * v)) / 2e-6) < 1e-6


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return (w * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_straight_through_products_follow_the_backward_and_say_so() -> None:
    class Quantized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.tanh(F.linear(input, Rounded.apply(self.weight), self.bias))

    net = Quantized(4, 1).double()
    with pytest.warns(UserWarning, match="a rounding passes gradients straight through"):
        f = Objective(net, F.mse_loss, [(X, Y)])
    rounded = nn.Sequential(nn.Linear(4, 1), nn.Tanh()).double()
    with torch.no_grad():
        rounded.get_parameter("0.weight").copy_((net.weight * 4).round() / 4)
        rounded.get_parameter("0.bias").copy_(net.bias)
    assert sharpness(f) == pytest.approx(sharpness(Objective(rounded, F.mse_loss, [(X, Y)])), rel=1e-9)


@pytest.mark.parametrize(("kind", "most"), [("plain", 2), ("siamese", 6)])
def test_the_first_look_costs_at_most_six_gradients(kind: str, most: int) -> None:
    """Counted in passes through the model; one of them is differentiated twice, which costs two gradients more."""
    passes = itertools.count()  # which nothing puts back

    def counted(*inputs: Any) -> Any:
        next(passes)
        return forward(*inputs)

    net: nn.Module = two_layers(6, 1) if kind == "plain" else Siamese()
    forward = net.forward
    net.forward = counted
    Objective(net, *((F.mse_loss, [(X, Y)]) if kind == "plain" else (siamese_loss, [((X, X + 0.1), Y)])))
    assert next(passes) <= most


def test_the_look_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(net, F.mse_loss, [(X, Y)])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in net.parameters())


def test_the_graph_of_the_first_look_is_freed() -> None:
    """An activation whose backward reads its output is saved by its own graph, which must not hold it."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def alive() -> int:
        gc.collect()
        return sum(type(t) is Tensor for t in gc.get_objects())

    Objective(net, F.mse_loss, [(X, Y)])
    before = alive()
    Objective(net, F.mse_loss, [(X, Y)])
    assert alive() == before


def test_kinks_that_lie_dense_are_no_disagreement() -> None:
    """Rectifiers whose slopes rise at every 1.5e-6, by a tenth of the curvature on average: autograd sees none of it.

    A difference over 1e-7 crosses some of them, and one over 1e-3 many; the gradient is nobody else's for that.
    """

    class Kinks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.5, 1.5, 50, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            spacing = 1.5e-6
            passed = self.w.detach() / spacing
            passed = passed - passed.remainder(1.0)  # kinks below w
            kinks = 0.1 * spacing * (passed * self.w - spacing * passed * (passed + 1) / 2)
            return (self.w.square() / 2 + kinks).sum() + 0 * x.sum()

    f = Objective(Kinks(), lambda output, target: output, [(torch.zeros(1, 1), torch.zeros(1, 1))])
    v = torch.ones(50, dtype=torch.float64)
    assert f.follows_gradient
    torch.testing.assert_close(f.hvp(f.weights(), v), v)
