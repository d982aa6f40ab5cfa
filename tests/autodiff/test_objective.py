"""`Objective` against dense derivatives of the same losses by formula; what it leaves untouched; what it refuses."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from problems import CHUNKS, CLASSES, DTYPE, NORMS, normal, relative
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharpscope import Objective, find_groups, hessian
from sharpscope.errors import NotConverged
from sharpscope.linalg import lanczos

LOSSES = tuple(problems.LOSSES)
EXACT = 1e-10  # rounding of double precision, with room for the conditioning of normalization over few examples


def dense_hessian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.func.jacrev(torch.func.grad(f))(at)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_agree_with_dense_ones_of_the_formula(norm: str, loss: str) -> None:
    f, by_formula = problems.objective(norm, loss), problems.reference(norm, loss)
    assert f.size <= 300
    w, u, v = f.weights(), normal(f.size, seed=1), normal(f.size, seed=2)
    at = f.at(w)
    dense = dense_hessian(by_formula, w)

    def curvature(w: Tensor) -> Tensor:
        return u @ torch.func.vjp(torch.func.grad(by_formula), w)[1](v)[0]

    assert relative(f.value(w), by_formula(w)) < EXACT
    assert relative(at.value, by_formula(w)) < EXACT
    assert relative(at.grad, torch.func.grad(by_formula)(w)) < EXACT
    assert relative(at.hvp(v), dense @ v) < EXACT
    assert relative(at.third(u, v), torch.func.grad(curvature)(w)) < EXACT


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_gauss_newton_is_the_curvature_of_the_loss_seen_through_the_jacobian(norm: str, loss: str) -> None:
    f, forward, formula = problems.objective(norm, loss), problems.outputs(norm), problems.LOSSES[loss].formula
    w, v = f.weights(), normal(f.size, seed=2)
    expected = torch.zeros_like(v)
    for x, y in problems.batches(norm, loss):
        z, jacobian = forward(w, x), torch.func.jacrev(partial(forward, x=x))(w).view(-1, f.size)
        bend = dense_hessian(partial(formula, target=y), z).view(z.numel(), -1)
        expected += len(x) / sum(CHUNKS) * (jacobian.T @ (bend @ (jacobian @ v)))
    assert relative(f.gauss_newton(w, v), expected) < EXACT


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_third_derivative_is_the_slope_of_curvature(norm: str, loss: str) -> None:
    f = problems.objective(norm, loss)
    w, u, v, h = f.weights(), normal(f.size, seed=1), normal(f.size, seed=2), 1e-5
    v = v / v.norm()
    slope = (u @ f.hvp(w + h * v, u) - u @ f.hvp(w - h * v, u)) / (2 * h)
    assert (f.third(w, u, u) @ v).item() == pytest.approx(slope.item(), rel=1e-5)  # error h² + 1e-16/h, relatively


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func in forward mode
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_products_agree_with_another_library(loss: nn.Module) -> None:
    """curvlinops weights the chunks itself; without normalization both libraries see one function."""
    curvlinops = pytest.importorskip("curvlinops")
    kind = "MSE" if isinstance(loss, nn.MSELoss) else "cross-entropy"
    f, net = problems.objective("none", kind), problems.model("none")
    v = normal(f.size, seed=2)
    arguments = (net, loss, list(net.parameters()), problems.batches("none", kind))
    assert relative(f.hvp(f.weights(), v), curvlinops.HessianLinearOperator(*arguments) @ v) < EXACT
    assert relative(f.gauss_newton(f.weights(), v), curvlinops.GGNLinearOperator(*arguments) @ v) < EXACT


def test_a_linear_loss_has_no_curvature_beyond_the_model() -> None:
    net = nn.Linear(4, 1, dtype=DTYPE)
    f = Objective(net, lambda out, y: (out * y).mean(), [(normal(3, 4, seed=0), normal(3, 1, seed=1))])
    w, v = f.weights(), normal(5, seed=2)
    for product in (f.hvp(w, v), f.third(w, v, v), f.gauss_newton(w, v)):
        assert product.equal(torch.zeros_like(v))


def test_a_quadratic_has_no_third_derivative() -> None:
    f = Objective(nn.Linear(4, 2, dtype=DTYPE), F.mse_loss, [(normal(3, 4, seed=0), normal(3, 2, seed=1))])
    w, v = f.weights(), normal(10, seed=2)
    assert f.third(w, v, v).norm() <= 1e-14 * f.hvp(w, v).norm()  # the Hessian is constant: rounding only


def test_repeated_products_at_one_point_do_not_wear_out() -> None:
    f = problems.objective("LayerNorm", "cross-entropy")
    at, u, v = f.at(f.weights()), normal(f.size, seed=1), normal(f.size, seed=2)
    first = at.hvp(v), at.third(u, v), at.gauss_newton(v)
    assert all(a.equal(b) for a, b in zip(first, (at.hvp(v), at.third(u, v), at.gauss_newton(v)), strict=True))
    assert not any(t.requires_grad for t in (*first, at.value, at.grad))


def test_products_are_symmetric_and_linear() -> None:
    f = problems.objective("BatchNorm1d", "cross-entropy")
    at, u, v = f.at(f.weights()), normal(f.size, seed=1), normal(f.size, seed=2)
    for product in (at.hvp, at.gauss_newton):
        assert (u @ product(v)).item() == pytest.approx((v @ product(u)).item(), rel=EXACT)
        assert relative(product(2 * u - 3 * v), 2 * product(u) - 3 * product(v)) < EXACT
    assert relative(at.third(u, v), at.third(v, u)) < EXACT


def test_differentiates_where_the_caller_has_turned_gradients_off() -> None:
    f = problems.objective("LayerNorm")
    w, v = f.weights(), normal(f.size, seed=2)
    expected = f.grad(w), f.hvp(w, v), f.third(w, v, v), f.gauss_newton(w, v)
    with torch.no_grad():
        g = problems.objective("LayerNorm", memory_budget=0)
        found = g.grad(w), g.hvp(w, v), g.third(w, v, v), g.gauss_newton(w, v)
        assert not torch.is_grad_enabled()
    assert all(relative(a, b) < EXACT for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("examples", [0, 5, 11, 16])
@pytest.mark.parametrize("norm", ["BatchNorm1d", "MultiheadAttention"])
def test_products_do_not_depend_on_what_is_kept_in_memory(norm: str, examples: int) -> None:
    f = problems.objective(norm, "cross-entropy")
    budget = int(examples * f.graph_bytes_per_example)
    lean = problems.objective(norm, "cross-entropy", memory_budget=budget)
    w, u, v = f.weights(), normal(f.size, seed=1), normal(f.size, seed=2)
    full, part = f.at(w), lean.at(w)
    assert full.cost == 2
    assert part.cost == pytest.approx(3 - {0: 0, 5: 1, 11: 2, 16: 3}[examples] / 3)  # of three batches
    assert relative(part.hvp(v), full.hvp(v)) < EXACT
    assert relative(part.third(u, v), full.third(u, v)) < EXACT
    assert relative(part.gauss_newton(v), full.gauss_newton(v)) < EXACT


def test_the_estimate_of_memory_grows_with_the_batch_not_with_the_model() -> None:
    def estimate(n: int, width: int) -> float:
        net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        net[2].requires_grad_(False)  # frozen weights are in memory anyway
        f = Objective(net.to(DTYPE), F.mse_loss, [(normal(n, 5, seed=0), normal(n, 1, seed=1))])
        return f.graph_bytes_per_example

    wide = estimate(64, 100)
    assert estimate(128, 100) == pytest.approx(wide, rel=0.05)  # up to what does not depend on the batch
    # Two activations and what the backward pass of each leaves: a few vectors of the width, not a matrix.
    assert 2 * 100 * 8 <= wide <= 12 * 100 * 8


class Scaled(nn.Module):
    """Two inputs, so that tuples and dicts have something to name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = problems.model("LayerNorm")

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.inner(x * gain)


@dataclass
class Record:
    logits: Tensor
    note: str = ""


class Wrapped(nn.Module):
    """Returns its output inside something else."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = problems.model("LayerNorm"), wrap

    def forward(self, x: Tensor, **ignored: Tensor) -> Any:
        return self.wrap(self.inner(x))


def same_products(f: Objective, g: Objective) -> None:
    w, u, v = f.weights(), normal(f.size, seed=1), normal(f.size, seed=2)
    assert w.equal(g.weights())
    assert relative(f.value(w), g.value(w)) < EXACT
    assert relative(f.hvp(w, v), g.hvp(w, v)) < EXACT
    assert relative(f.third(w, u, v), g.third(w, u, v)) < EXACT
    assert relative(f.gauss_newton(w, v), g.gauss_newton(w, v)) < EXACT


INPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, gain: (x / gain, gain),
    "list": lambda x, gain: [x / gain, gain],
    "dict": lambda x, gain: {"gain": gain, "x": x / gain},
}


@pytest.mark.parametrize("form", INPUTS)
def test_inputs_are_tuples_and_dicts_as_well_as_tensors(form: str) -> None:
    gain = normal(5, seed=7)
    data = [(INPUTS[form](x, gain), y) for x, y in problems.batches("LayerNorm")]
    same_products(Objective(Scaled(), F.mse_loss, data), problems.objective("LayerNorm"))


def test_a_batch_that_is_a_dict_goes_to_model_and_loss() -> None:
    data = [{"x": x, "labels": y} for x, y in problems.batches("LayerNorm")]
    f = Objective(Wrapped(lambda z: {"logits": z}), lambda out, batch: F.mse_loss(out["logits"], batch["labels"]), data)
    same_products(f, problems.objective("LayerNorm"))


def test_a_model_may_compute_its_own_loss() -> None:
    class WithLoss(Wrapped):
        def forward(self, x: Tensor, **batch: Tensor) -> Any:
            z = self.inner(x)
            return {"loss": F.mse_loss(z, batch["labels"]), "logits": z}

    data = [{"x": x, "labels": y} for x, y in problems.batches("LayerNorm")]
    f = Objective(WithLoss(lambda z: z), lambda out, batch: out["loss"], data)
    same_products(f, problems.objective("LayerNorm"))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda z: (z, None), lambda out: out[0]),
    "dict": (lambda z: {"a": [z]}, lambda out: out["a"][0]),
    "dataclass": (Record, lambda out: out.logits),
    "one tensor twice": (lambda z: (z, z), lambda out: (out[0] + out[1]) / 2),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_are_trees_of_tensors(form: str) -> None:
    wrap, read = OUTPUTS[form]
    f = Objective(Wrapped(wrap), lambda out, y: F.mse_loss(read(out), y), problems.batches("LayerNorm"))
    same_products(f, problems.objective("LayerNorm"))


def test_gauss_newton_names_an_output_without_tensors() -> None:
    class Opaque:
        def __init__(self, z: Tensor) -> None:
            self.z = z

    f = Objective(Wrapped(Opaque), lambda out, y: F.mse_loss(out.z, y), problems.batches("LayerNorm"))
    with pytest.raises(ValueError, match=r"output \(Opaque\) holds no tensor that depends on the weights"):
        f.gauss_newton(f.weights(), f.weights())


def test_integers_in_and_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4, dtype=DTYPE), nn.Linear(4, 5, bias=False, dtype=DTYPE)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(x)))

    with torch.random.fork_rng(devices=[]):
        net = Tied()
    x, y = torch.tensor([0, 3, 1, 2]), torch.tensor([1, 2, 4, 0])
    f = Objective(net, F.cross_entropy, [(x, y)])
    assert f.slices == {"embed.weight": slice(0, 20)}

    def by_formula(w: Tensor) -> Tensor:
        table = w.view(5, 4)
        return problems.surprise(torch.tanh(table[x]) @ table.T, y)

    w, v = f.weights(), normal(20, seed=1)
    assert relative(f.hvp(w, v), dense_hessian(by_formula, w) @ v) < EXACT


def test_frozen_parameters_are_constants() -> None:
    net = problems.model("LayerNorm")
    net.get_parameter("0.weight").requires_grad_(False)
    f, full = Objective(net, F.mse_loss, problems.batches("LayerNorm")), problems.objective("LayerNorm")
    assert list(f.slices) == [name for name in full.slices if name != "0.weight"]
    free = torch.cat([torch.arange(full.size)[s] for name, s in full.slices.items() if name != "0.weight"])
    v = normal(f.size, seed=1)
    wide = torch.zeros(full.size, dtype=DTYPE).index_copy(0, free, v)
    assert relative(f.hvp(f.weights(), v), full.hvp(full.weights(), wide)[free]) < EXACT


def test_weights_load_and_unflatten_are_each_others_inverse() -> None:
    f = problems.objective("MultiheadAttention")
    w = normal(f.size, seed=1)
    f.load(w)
    assert f.weights().equal(w)
    assert sum(part.numel() for part in f.unflatten(w).values()) == f.size
    for name, p in f.model.named_parameters():
        assert p.equal(f.unflatten(w)[name]) and p.flatten().equal(w[f.slices[name]])
        assert p.requires_grad and p.is_leaf and p.grad is None
    w.zero_()
    assert not f.weights().equal(w)  # a copy, both ways


def test_other_data_under_the_same_model() -> None:
    f, (first, *rest) = problems.objective("LayerNorm"), problems.batches("LayerNorm")
    w = f.weights()
    n = [len(x) for x, _ in (first, *rest)]
    parts = n[0] * f.on([first]).value(w) + sum(n[1:]) * f.on(rest).value(w)
    assert relative(parts / sum(n), f.value(w)) < EXACT
    assert f.on([first]).model is f.model and len(f.data) == 3  # type: ignore[arg-type]


def test_single_precision_differs_by_rounding() -> None:
    f = problems.objective("LayerNorm")
    data = [(x.float(), y.float()) for x, y in problems.batches("LayerNorm")]
    g = Objective(problems.model("LayerNorm").float(), F.mse_loss, data)
    v = normal(f.size, seed=1)
    product = g.hvp(g.weights(), v.float())
    assert product.dtype == torch.float32
    assert relative(product.double(), f.hvp(f.weights(), v)) < 1e-4  # 1e-7 times the conditioning of few features


def loader(*, shuffle: bool, own: bool = False, size: int = 8) -> DataLoader[Any]:
    data = TensorDataset(normal(16, 5, seed=0), normal(16, CLASSES, seed=1))
    return DataLoader(data, batch_size=size, shuffle=shuffle, generator=problems.generator(5) if own else None)


class RandomReads(list[Any]):
    """Pairs that draw from every global generator when they are read, as augmentation does."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            random.random()
            torch.rand(())
            yield batch


class NumpyReads:
    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        np.random.rand()
        return iter(RandomReads(self.data))


def state(net: nn.Module, data: Any) -> dict[str, Any]:
    """Everything that a measurement might touch, copied."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {
        **{f"state {name}": t.clone() for name, t in net.state_dict().items()},
        **{f"grad {name}": None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()},
        **{f"trained {name}": (p.requires_grad, p.is_leaf, id(p)) for name, p in net.named_parameters()},
        **{f"mode {name}": module.training for name, module in net.named_modules()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (numpy["state"]["pos"], numpy["state"]["key"].tolist()),
        "loader": data.generator.get_state() if isinstance(data, DataLoader) and data.generator else None,
    }


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = value.equal(after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name


def measure(f: Objective) -> None:
    w = f.weights()
    v = torch.ones_like(w)
    f.value(w)
    f.value_and_grad(w)
    f.hvp(w, v)
    f.third(w, v, v)
    f.gauss_newton(w, v)
    find_groups(f)
    with suppress(NotConverged):
        lanczos(hessian(f), 2, max_matvecs=8)


DATA: dict[str, Callable[[], Any]] = {
    "list": problems.batches,
    "loader": lambda: loader(shuffle=False),
    "shuffling loader": lambda: loader(shuffle=True),
    "shuffling loader with its own generator": lambda: loader(shuffle=True, own=True),
    "reads that draw": lambda: RandomReads(problems.batches()),
    "reads that draw from NumPy": lambda: NumpyReads(problems.batches()),
}


@pytest.mark.parametrize("source", DATA)
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_a_measurement_changes_nothing(source: str, budget: int) -> None:
    net, data = problems.model("BatchNorm1d"), DATA[source]()
    net.get_submodule("3").requires_grad_(False)
    net.get_parameter("0.weight").grad = normal(6, 5, seed=4)
    before = state(net, data)
    measure(Objective(net, F.mse_loss, data, memory_budget=budget))
    assert_same(before, state(net, data))


@pytest.mark.parametrize("norm", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm2d", "BatchNorm2d eval", "own BN"])
def test_running_statistics_and_modes_stay_as_they_are(norm: str) -> None:
    f = problems.objective(norm)
    before = state(f.model, f.data)
    measure(f)
    f.check()
    assert_same(before, state(f.model, f.data))


def test_a_failed_measurement_changes_nothing_either() -> None:
    class Spoiled(RandomReads):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            raise OSError("the disk is gone")

    net = problems.model("BatchNorm1d")
    f = Objective(net, F.mse_loss, problems.batches())
    before = state(net, None)
    with pytest.raises(OSError, match="the disk is gone"):
        f.on(Spoiled(problems.batches())).grad(f.weights())
    assert_same(before, state(net, None))


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffling_loader_gives_one_order_within_a_measurement(own: bool) -> None:
    """Chunks rebuilt for a product are those of the value, whichever generator shuffles."""
    net, data = problems.model("BatchNorm1d"), loader(shuffle=True, own=own)
    kept, rebuilt = Objective(net, F.mse_loss, data), Objective(net, F.mse_loss, data, memory_budget=0)
    w, v = kept.weights(), normal(kept.size, seed=1)
    assert relative(rebuilt.hvp(w, v), kept.hvp(w, v)) < EXACT


@pytest.mark.parametrize("own", [False, True])
def test_check_catches_a_shuffling_loader(own: bool) -> None:
    f = Objective(problems.model("BatchNorm1d"), F.mse_loss, loader(shuffle=True, own=own))
    before = state(f.model, f.data)
    with pytest.raises(ValueError, match=r"two passes over the same weights gave losses .* shuffled or augmented anew"):
        f.check()
    assert_same(before, state(f.model, f.data))


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random, np.random.rand])
def test_check_catches_augmentation_whatever_it_draws_from(draw: Callable[[], float]) -> None:
    class Augmented:
        def __iter__(self) -> Iterator[Any]:
            return iter([(x * draw(), y) for x, y in problems.batches()])

    with pytest.raises(ValueError, match="fix the batches"):
        Objective(problems.model("none"), F.mse_loss, Augmented()).check()


def test_check_accepts_fixed_data_and_refuses_a_loss_that_is_not_finite() -> None:
    net = problems.model("BatchNorm1d")
    Objective(net, F.mse_loss, loader(shuffle=False)).check()
    (x, y), *rest = problems.batches()
    f = Objective(net, F.mse_loss, [(x, y), (torch.full_like(x, torch.nan), y), *rest])  # finite in the first batch
    with pytest.raises(ValueError, match="the loss is nan at the current weights"):
        f.check()


Refused = tuple[Callable[[Tensor, Tensor], Any], str]

BAD_LOSSES: dict[str, Refused] = {
    "not reduced": (lambda z, y: (z - y).square(), r"the loss has shape \(4, 3\), not \(\)"),
    "one number in a list": (lambda z, y: (z - y).square().mean().view(1), r"the loss has shape \(1,\), not \(\)"),
    "a float": (lambda z, y: (z - y).square().mean().item(), "the loss is a float, not a tensor"),
    "a tuple": (lambda z, y: (F.mse_loss(z, y),), "the loss is a tuple, not a tensor"),
    "detached": (lambda z, y: F.mse_loss(z, y).detach(), "the loss cannot be differentiated"),
    "counted": (lambda z, y: (z > y).sum(), "the loss cannot be differentiated"),
    "not a number": (lambda z, y: F.mse_loss(z, y) * torch.nan, "the loss is nan at the start"),
    "infinite": (lambda z, y: F.mse_loss(z, y) / 0, "the loss is inf at the start"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_loss_without_curvature_is_refused(kind: str) -> None:
    loss, sentence = BAD_LOSSES[kind]
    with pytest.raises(ValueError, match=sentence):
        Objective(problems.model("none"), loss, problems.batches())


def test_a_model_without_trainable_parameters_is_refused() -> None:
    for net in (nn.Tanh(), problems.model("none").requires_grad_(False)):
        with pytest.raises(ValueError, match=f"{type(net).__name__} has no trainable parameter"):
            Objective(net, F.mse_loss, problems.batches())


def test_parameters_on_two_devices_are_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, CLASSES, device="meta"))
    with pytest.raises(ValueError, match=r"on the meta device|several devices"):
        Objective(net, F.mse_loss, problems.batches())


DROPOUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25)),
        r"dropout is on in '1' \(Dropout, p=0.25\)",
    ),
    "channels": (lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.5)), r"in '1' \(AlphaDropout, p=0.5\)"),
    "attention": (
        lambda: nn.ModuleDict({"mix": nn.MultiheadAttention(4, 2, dropout=0.1)}),
        r"in 'mix' \(MultiheadAttention, p=0.1\)",
    ),
    "a transformer layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)),
        r"in '0.self_attn' \(MultiheadAttention, p=0.1\)",
    ),
    "a transformer layer, attention off": (
        lambda: nn.Sequential(without_attention_dropout()),
        r"in '0.dropout' \(Dropout, p=0.1\)",
    ),
}


def without_attention_dropout() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    layer.self_attn.dropout = 0.0
    return layer


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_is_refused_while_it_is_on(kind: str) -> None:
    build, sentence = DROPOUTS[kind]
    with torch.random.fork_rng(devices=[]):
        net = build().to(DTYPE)
    data = [(normal(2, 3, 4, seed=0), normal(2, 3, 4, seed=1))]
    with pytest.raises(ValueError, match=sentence):
        Objective(net, F.mse_loss, data)
    if kind != "attention":
        f = Objective(net.eval(), F.mse_loss, data)
        net.train()
        with pytest.raises(ValueError, match=sentence):  # turned on later
            f.value(f.weights())


def test_a_transformer_layer_in_eval_mode_has_all_derivatives() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, activation="gelu", batch_first=True, dtype=DTYPE)
    f = Objective(layer.eval(), F.mse_loss, [(normal(2, 3, 4, seed=0), normal(2, 3, 4, seed=1))])
    w, u, v, h = f.weights(), normal(f.size, seed=1), normal(f.size, seed=2), 1e-5
    v = v / v.norm()
    assert relative(f.value(w), f.at(w).value) < EXACT  # torch has a fused path for passes without gradients
    slope = (u @ f.hvp(w + h * v, u) - u @ f.hvp(w - h * v, u)) / (2 * h)
    assert (f.third(w, u, u) @ v).item() == pytest.approx(slope.item(), rel=1e-5)  # error h² + 1e-16/h, relatively


def one_batch() -> tuple[Tensor, Tensor]:
    return normal(4, 5, seed=0), normal(4, CLASSES, seed=1)


class Once:
    """An iterable that yields its batches only the first time."""

    def __init__(self, kind: Callable[..., Iterator[Any]] = iter) -> None:
        self.rest = kind([one_batch(), one_batch()])

    def __iter__(self) -> Iterator[Any]:
        return self.rest


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty list": (list, "the data hold no batch"),
    "a generator": (lambda: (one_batch() for _ in range(2)), "a generator, which can be read only once"),
    "an iterator": (lambda: iter([one_batch()]), "a list_iterator, which can be read only once"),
    "a zip": (lambda: zip([one_batch()[0]], [one_batch()[1]], strict=True), "a zip, which can be read only once"),
    "a pair of tensors": (one_batch, r"the data are one batch, .* pass \[\(inputs, target\)\]"),
    "a dict and a tensor": (lambda: ({"input": one_batch()[0]}, one_batch()[1]), "the data are one batch"),
    "a tensor": (lambda: one_batch()[0], "the data are one batch"),
    "a list of two tensors": (lambda: list(one_batch()), r"a batch is a Tensor, not a pair .* pass \[\(x, y\)\]"),
    "a dict of tensors": (lambda: {"input": one_batch()[0]}, "a batch is a str, not a pair"),
    "triples": (lambda: [(*one_batch(), one_batch()[1])], "a batch is a tuple, not a pair"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_are_not_batches_are_refused(kind: str) -> None:
    build, sentence = BAD_DATA[kind]
    with pytest.raises(ValueError, match=sentence):
        Objective(problems.model("none"), F.mse_loss, build())


def test_data_that_are_used_up_when_they_are_read_are_read_from_copies() -> None:
    """An iterator over a list can be copied, a generator cannot."""
    data, (x, y) = Once(), one_batch()
    f = Objective(net := problems.model("none"), F.mse_loss, data)
    w = f.weights()
    for _ in range(2):
        assert f.value(w).item() == pytest.approx(F.mse_loss(net(x), y).item(), rel=1e-12)
    assert len(list(data)) == 2
    with pytest.raises(ValueError, match=r"the data .* cannot be copied .*pass a few fixed batches as a list"):
        Objective(net, F.mse_loss, Once(lambda batches: (batch for batch in batches)))
    with pytest.raises(ValueError, match="no batch"):
        f.on([]).value(w)


def test_a_data_set_of_single_examples_is_refused() -> None:
    examples = TensorDataset(normal(8, 5, seed=1), normal(8, problems.CLASSES, seed=2))
    with pytest.raises(ValueError, match="the data are a TensorDataset, not an iterable of batches"):
        Objective(problems.model("none"), F.mse_loss, examples)  # type: ignore[arg-type]


def test_shuffled_data_are_one_function() -> None:
    """With batch statistics the partition into batches matters: every pass must see the same one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    data = torch.utils.data.TensorDataset(torch.randn(24, 4).double(), torch.randn(24, 1).double())
    for own in (None, torch.Generator().manual_seed(5)):
        f = Objective(net, nn.functional.mse_loss, torch.utils.data.DataLoader(data, 8, shuffle=True, generator=own))
        w, before = f.weights(), f.value(f.weights())
        torch.rand(3)
        if own is not None:
            torch.rand(3, generator=own)
        assert f.value(w) == before
        with pytest.raises(ValueError, match="two passes"):
            f.check()


def test_a_summed_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction='sum'"):
        Objective(nn.Linear(2, 1), nn.MSELoss(reduction="sum"), [(torch.ones(3, 2), torch.ones(3, 1))])
