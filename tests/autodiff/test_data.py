"""Batches of any form and weight against the loss of all data by plain autograd, and their parts."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from problems import normal
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from sharpscope import Objective, hessian
from sharpscope.autodiff.data import BatchForm, head, map_tensors
from sharpscope.autodiff.hvp import linearized
from sharpscope.measures import error_budget
from sharpscope.symmetry.scale_groups import find_groups

mse, cross_entropy = nn.functional.mse_loss, nn.functional.cross_entropy
EXACT = 1e-10  # rounding of double precision


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


def dense(net: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and its Hessian by plain autograd, row by row."""
    params = list(net.parameters())
    slopes = torch.autograd.grad(loss(), params, create_graph=True)
    g = torch.cat([s.reshape(-1) for s in slopes])
    rows = [torch.autograd.grad(x, params, retain_graph=True, materialize_grads=True) for x in g]
    return loss().detach(), torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def agrees(f: Objective, loss: Callable[[], Tensor]) -> None:
    """Value and Hessian are those of a loss written out."""
    value, expected = dense(f.model, loss)
    w = f.weights()
    assert f.value(w).item() == pytest.approx(value.item(), rel=EXACT)
    found = torch.stack([f.hvp(w, e) for e in torch.eye(f.size).double()])
    assert (found - expected).norm() <= EXACT * expected.norm()


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.layer, self.out = nn.GRU(3, 2, batch_first=batch_first), nn.Linear(2, 1)

    def forward(self, x: Any) -> Tensor:
        return self.out(self.layer(x)[1][-1])


class Two(nn.Module):
    """Takes two arguments, a named tuple of two, an object or a dict of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Any, z: Any = None) -> Tensor:
        if isinstance(x, dict | OrderedDict):
            x, z = x["left"], x["right"]
        elif z is None:
            x, z = x.left, x.right
        return self.a(x) * self.b(z).tanh()


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Record:
    left: Tensor
    right: Tensor
    y: Tensor


@dataclass(slots=True)
class Slotted:
    left: Tensor
    right: Tensor
    y: Tensor


class Graph:
    """What batches of graphs are: an object that can be moved, which happens in place."""

    def __init__(self, left: Tensor, right: Tensor, y: Tensor) -> None:
        self.left, self.right, self.y = left, right, y

    def to(self, device: Any) -> "Graph":
        self.left, self.right, self.y = (t.to(device) for t in (self.left, self.right, self.y))
        return self


class Changing(Graph):
    """The same, with a function that changes its tensors in place."""

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Graph":
        self.left, self.right, self.y = change(self.left), change(self.right), change(self.y)
        return self


def triple(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(n, 3, seed=seed), normal(n, 3, seed=seed + 1), normal(n, 1, seed=seed + 2)


TRIPLES = [triple(4, 1), triple(6, 4)]


def by_field(b: Any) -> Any:
    return (b.left, b.right), b.y


FORMS: dict[str, tuple[Callable[..., Any], Any]] = {
    "a triple": (lambda x, z, y: (x, z, y), lambda b: ((b[0], b[1]), b[2])),
    "a list of three": (lambda x, z, y: [x, z, y], lambda b: (b[:2], b[2])),
    "keywords": (lambda x, z, y: {"y": y, "x": x, "z": z}, lambda b: ({"x": b["x"], "z": b["z"]}, b["y"])),
    "a named tuple as one argument": (lambda x, z, y: (Pair(x, z), y), None),
    "a dict as one argument": (lambda x, z, y: ({"left": x, "right": z}, y), None),
    "an ordered dict as one argument": (lambda x, z, y: (OrderedDict(left=x, right=z), y), None),
    "a dict with keys that are no names": (lambda x, z, y: {"left": x, "right": z, 3: y}, lambda b: ((b,), b[3])),
    "a data class": (Record, by_field),
    "a data class with slots": (Slotted, by_field),
    "a data class as one argument": (lambda x, z, y: (Record(x, z, y), y), None),
    "an object": (Graph, lambda b: (b, b.y)),
    "an object with apply": (Changing, lambda b: (b, b.y)),
    "an object as one argument": (lambda x, z, y: (Graph(x, z, y), y), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(form: str) -> None:
    build, batch = FORMS[form]
    net, data = made(Two), [build(*parts) for parts in TRIPLES]
    f = Objective(net, mse, data, batch=batch)
    x, z, y = (torch.cat(parts) for parts in zip(*TRIPLES, strict=True))
    agrees(f, lambda: mse(net(x, z), y))
    agrees(f.on([data[1]]), lambda: mse(net(*TRIPLES[1][:2]), TRIPLES[1][2]))
    assert f.check() == ""


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_in_double_precision(form: str) -> None:
    build, batch = FORMS[form]
    single = [build(*(t.float() for t in parts)) for parts in TRIPLES]
    f = Objective(made(Two).float(), mse, single, batch=batch)
    double = f.in_double()
    twin = made(Two)
    twin.load_state_dict(f.model.state_dict())
    written = Objective(twin, mse, [tuple(t.float().double() for t in p) for p in TRIPLES], batch=FORMS["a triple"][1])
    w = double.weights()
    assert torch.equal(double.grad(w), written.grad(w))
    assert double.on(single[:1]).value(w) == written.on(written.data[:1]).value(w)  # type: ignore[index]


def test_objects_of_the_user_are_left_where_they_are() -> None:
    graph = Graph(*TRIPLES[0])
    before = dict(vars(graph))
    map_tensors(graph, lambda t: t + 1)
    map_tensors(Changing(*TRIPLES[0]), lambda t: t + 1)
    Objective(made(Two), mse, [graph], batch=lambda b: (b, b.y)).in_double().grad(made_weights())
    assert all(vars(graph)[name] is t for name, t in before.items())


def made_weights() -> Tensor:
    return torch.zeros(8).double()


def test_batches_without_a_target() -> None:
    net, (x, z, _) = made(lambda: nn.Linear(3, 3)), TRIPLES[1]
    whole = torch.cat([x, z])
    f = Objective(net, mse, [x, z], batch=lambda b: (b, b))
    agrees(f, lambda: mse(net(whole), whole))
    loader = DataLoader(TensorDataset(whole), 5)  # batches of 5, 5 and 2
    agrees(Objective(net, mse, loader, batch=lambda b: (b[0], b[0])), lambda: mse(net(whole), whole))
    agrees(
        Objective(net, lambda o, _: o.square().mean(), loader, batch=lambda b: (b[0], None)),
        lambda: net(whole).square().mean(),
    )


def packed(lengths: list[int], seed: int, in_order: bool) -> tuple[list[Tensor], PackedSequence]:
    parts = [normal(n, 3, seed=seed + i) for i, n in enumerate(lengths)]
    return parts, pack_sequence(parts, enforce_sorted=in_order)


@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_are_one_argument(in_order: bool) -> None:
    net = made(Recurrent)
    a, first = packed([5, 3, 2] if in_order else [3, 5, 2], 1, in_order)
    b, second = packed([4, 2], 7, in_order)
    y = normal(5, 1, seed=20)

    def one_by_one() -> Tensor:
        return torch.stack([mse(net(x[None])[0], t) for x, t in zip(a + b, y, strict=True)]).mean()

    f = Objective(net, mse, [(first, y[:3]), (second, y[3:])])
    agrees(f, one_by_one)
    agrees(Objective(net, mse, [((first,), y[:3]), ((second,), y[3:])]), one_by_one)
    assert f.check() == ""
    # three sequences, the last batch cut
    (_, _), (cut, target) = head(f.source, 4, f.form)
    assert torch.equal(net(cut)[0], net(b[0][None])[0]) and torch.equal(target, y[3:4])
    assert error_budget(f).examples == 5


def test_what_is_what_in_a_batch_is_shown_where_it_is_missing() -> None:
    x, z, y = TRIPLES[0]
    shown: dict[str, list[Any]] = {
        r"batch=lambda b: \(\(b\[0\], b\[1\]\), b\[2\]\)": [(x, z, y)],
        r"batch=lambda b: \(b\[0\], b\[0\]\)": [[x]],
        r"batch=lambda b: \(b, b\)": [x],
        r"batch=lambda b: \(\(b.left, b.right\), b.y\)": [Record(x, z, y)],
        r"batch=lambda b: \(b, b.y\)": [Graph(x, z, y)],
    }
    for sentence, data in shown.items():
        with pytest.raises(ValueError, match=sentence):
            Objective(made(Two), mse, data)
    with pytest.raises(ValueError, match=r"batch= returns a Tensor, not a pair \(inputs, target\)"):
        Objective(made(Two), mse, [x], batch=lambda b: b)


def test_keywords_stay_keywords_where_a_name_fits() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        Objective(made(Two), mse, [({"x": TRIPLES[0][0], "other": TRIPLES[0][1]}, TRIPLES[0][2])])


X, Y = normal(6, 10, 3, seed=1), 3 * normal(6, 10, 1, seed=2)
C, LABELS = normal(40, 3, seed=3), torch.arange(40) // 10
IGNORED = torch.where(torch.arange(40) < 15, -100, torch.arange(40) % 4)
CLASS_WEIGHTS = torch.tensor([10.0, 1, 1, 1]).double()


def graphs(sizes: list[int], seed: int) -> dict[str, Tensor]:
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return {"x": normal(sum(sizes), 3, seed=seed), "batch": owner, "y": normal(len(sizes), 1, seed=seed + 1)}


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, batch: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.zeros(len(y), 4).double().index_add(0, batch, self.layer(x).tanh()))


def test_examples_says_how_much_a_batch_weighs() -> None:
    """Each loss is that of all data in one batch."""
    net = made(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)))
    time_first = [(X[:, :8], Y[:, :8]), (X[:, 8:], Y[:, 8:])]
    agrees(Objective(net, mse, time_first, examples=lambda b: b[0].shape[1]), lambda: mse(net(X), Y))

    classes = made(lambda: nn.Linear(3, 4))
    halves = [(C[:20], IGNORED[:20]), (C[20:], IGNORED[20:])]
    f = Objective(classes, nn.CrossEntropyLoss(), halves, examples=lambda b: (b[1] != -100).sum())
    agrees(f, lambda: cross_entropy(classes(C), IGNORED))

    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    f = Objective(
        classes, loss, [(C[:20], LABELS[:20]), (C[20:], LABELS[20:])], examples=lambda b: CLASS_WEIGHTS[b[1]].sum()
    )
    agrees(f, lambda: loss(classes(C), LABELS))
    assert f.check() == ""

    pooled, a, b = made(Pooled), graphs([2, 3, 2, 3, 2, 3], 5), graphs([30, 40], 7)
    f = Objective(pooled, lambda o, b: mse(o, b["y"]), [a, b], examples=lambda b: b["y"].shape[0])
    agrees(f, lambda: (6 * mse(pooled(**a), a["y"]) + 2 * mse(pooled(**b), b["y"])) / 8)


def test_the_weights_stay_with_the_objective() -> None:
    """On other data, in double precision, in a traced program, and without the parameters that are not invariant."""
    classes = made(lambda: nn.Linear(3, 4)).float()
    loss, data = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.float()), [(C.float()[i::3], LABELS[i::3]) for i in range(3)]
    f = Objective(classes, loss, data, examples=lambda b: CLASS_WEIGHTS[b[1]].sum())
    twin = made(lambda: nn.Linear(3, 4))
    twin.load_state_dict(classes.state_dict())
    exact = cross_entropy(twin(C.float().double()), LABELS, CLASS_WEIGHTS)
    double = f.in_double()
    assert double.value(double.weights()).item() == pytest.approx(exact.item(), rel=EXACT)
    part = torch.cat([LABELS[0::3], LABELS[2::3]]), torch.cat([C[0::3], C[2::3]]).float().double()
    exact = cross_entropy(twin(part[1]), part[0], CLASS_WEIGHTS)
    assert double.on([data[0], data[2]]).value(double.weights()).item() == pytest.approx(exact.item(), rel=EXACT)
    traced = double.using(linearized())
    w, v = double.weights(), normal(double.size, seed=3)
    assert torch.allclose(traced.hvp(w, v), double.hvp(w, v), rtol=1e-9)
    assert find_groups(double).groups == find_groups(Objective(twin, loss.double(), [(C, LABELS)])).groups
    assert error_budget(double).examples == pytest.approx(CLASS_WEIGHTS[LABELS].sum().item(), rel=1e-12)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), None, "three", True, torch.zeros(2)])
def test_weights_that_make_no_mean_are_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"examples= gives .* a positive finite number"):
        Objective(made(Two), mse, [(Pair(*TRIPLES[0][:2]), TRIPLES[0][2])], examples=lambda b: weight)


def test_a_head_is_cut_along_the_examples_or_not_at_all() -> None:
    net = made(lambda: nn.Linear(3, 1))
    form = BatchForm(net, weigh=lambda b: b[0].shape[1])
    ((x, y),) = head([(X, Y)], 4, form)
    assert torch.equal(x, X[:, :4]) and torch.equal(y, Y[:, :4])
    ((x, y),) = head([(X, Y[0])], 4, form)  # a target for each sequence
    assert torch.equal(x, X[:, :4]) and torch.equal(y, Y[0, :4])
    square = normal(6, 6, 3, seed=9)
    ((x, y),) = head([(square, square[..., :1])], 4, form)  # as long as it is wide
    assert torch.equal(x, square[:, :4]) and torch.equal(y, square[:, :4, :1])
    tokens = BatchForm(net, weigh=lambda b: int((b["labels"] != -100).sum()))
    ids = {"ids": torch.arange(20).view(4, 5), "labels": torch.where(torch.arange(20) % 3 == 0, -100, 1).view(4, 5)}
    (cut,) = head([ids], 2, tokens)
    assert torch.equal(cut["ids"], ids["ids"][:2]) and torch.equal(cut["labels"], ids["labels"][:2])
    whole = graphs([2, 3, 2], 1)
    for form in (BatchForm(net), BatchForm(net, weigh=lambda b: b["y"].shape[0])):
        (cut,) = head([whole], 2, form)
        assert all(torch.equal(cut[name], t) for name, t in whole.items())
    adjacent = [((normal(6, 2, seed=1), torch.eye(6).to_sparse()), normal(6, 1, seed=2))]
    assert len(head(adjacent, 2, BatchForm(net))[0][1]) == 6


def test_data_made_in_inference_mode_are_ordinary_when_they_are_read() -> None:
    net = made(Recurrent)
    parts, y = [normal(n, 3, seed=n) for n in (4, 2)], normal(2, 1, seed=7)

    class Fresh(list[Any]):
        """Makes its tensors when it is read."""

        def __iter__(self) -> Any:
            return iter([(pack_sequence([p + 0 for p in parts]), y + 0)])

    expected = hessian(Objective(net, mse, [(pack_sequence(parts), y)])) @ torch.ones(net_size(net)).double()
    with torch.inference_mode():
        made_here = [(pack_sequence([p + 0 for p in parts]), y + 0)]
    assert made_here[0][1].is_inference()
    for data in (made_here, Fresh([0])):
        f = Objective(net, mse, data)
        with torch.inference_mode():
            (batch,) = list(f.batches())
        assert not any(t.is_inference() for t in (batch.args[0].data, batch.args[0].batch_sizes, batch.target))
        assert torch.equal(hessian(f) @ torch.ones(f.size).double(), expected)


def net_size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_a_model_that_draws_from_numpy_leaves_it_as_it_was() -> None:
    import numpy as np

    class Draws(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 0 * np.random.rand())

    f = Objective(Draws(3, 1).double(), mse, [(X[0], Y[0])])
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]  # type: ignore[index]
    f.grad(f.weights()), f.on([(X[1], Y[1])]).value(f.weights())
    after = np.random.get_state()
    assert (after[1] == before[0]).all() and after[2] == before[1]  # type: ignore[index]
