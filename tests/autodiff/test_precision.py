"""Objectives in double precision: the same function with more digits, and an original that is left as it was."""

from typing import Any

import problems
import pytest
import torch
from problems import generator, normal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharpscope.autodiff.hvp import differences
from sharpscope.autodiff.objective import Objective

mse = nn.functional.mse_loss
DATA = [(normal(n, 5, seed=n).float(), normal(n, 3, seed=n + 1).float()) for n in (6, 9)]


def single(norm: str = "LayerNorm", data: Any = DATA, loss: Any = mse, **options: Any) -> Objective:
    return Objective(problems.model(norm).float(), loss, data, **options)


def written_in_double(f: Objective, loss: Any = mse) -> Objective:
    """The same function made from a model and data that are in double precision from the start."""
    net = problems.model("LayerNorm")
    net.load_state_dict(f.model.state_dict())  # the numbers of single precision
    return Objective(net, loss, [(x.double(), y.double()) for x, y in DATA])


def test_it_is_the_objective_of_a_model_and_data_in_double() -> None:
    f = single()
    double, expected = f.in_double(), written_in_double(f)
    w, v = f.weights().double(), normal(f.size, seed=3)
    assert double.weights().dtype == torch.float64 and torch.equal(double.weights(), w)
    for found, other in zip(double.value_and_grad(w), expected.value_and_grad(w), strict=True):
        assert torch.equal(found, other)
    assert torch.equal(double.hvp(w, v), expected.hvp(w, v))
    assert double.value(w).item() == pytest.approx(f.value(f.weights()).item(), rel=1e-6)  # some eps of 1.2e-7


def test_a_loss_with_weights_follows_and_integers_stay_integers() -> None:
    """Class weights in single precision do not meet outputs in double: torch refuses that."""
    weights = torch.tensor([1.0, 2.0, 3.0])
    data = [(x, torch.arange(len(x)) % 3) for x, _ in DATA]
    loss = nn.CrossEntropyLoss(weight=weights)
    f = single(data=data, loss=loss)
    double = f.in_double()
    assert double.value(f.weights().double()).dtype == torch.float64
    assert loss.weight is not None and loss.weight.dtype == torch.float32


def test_batches_keep_their_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor | None = None, label: Tensor | None = None) -> Tensor:
            return self.layer(x if y is None else x + y)

    (x, t), net = DATA[0], Two()
    forms: list[tuple[Any, Any]] = [
        ((x, t), mse),
        (((x, x), t), mse),
        (({"x": x, "y": x}, t), mse),
        ({"x": x, "label": t}, lambda out, batch: mse(out, batch["label"])),
    ]
    for batch, loss in forms:
        f = Objective(net, loss, [batch])
        found = f.in_double().value(f.weights().double())
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(f.value(f.weights()).item(), rel=1e-6)


def test_the_original_and_its_data_are_left_as_they_were() -> None:
    own = generator(5)
    examples = TensorDataset(normal(32, 5, seed=1).float(), normal(32, 3, seed=2).float())
    f = single("BatchNorm1d", DataLoader(examples, 8, shuffle=True, generator=own))
    state = {name: t.clone() for name, t in f.model.state_dict().items()}
    before, random, value = own.get_state(), torch.get_rng_state(), f.value(f.weights())
    double = f.in_double()
    w = f.weights().double()
    assert torch.equal(double.value(w), double.value(w))  # one function, although the loader shuffles
    assert double.value(w).item() == pytest.approx(value.item(), rel=1e-6)  # over the same batches
    assert torch.equal(own.get_state(), before) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in f.model.state_dict().items())
    assert torch.equal(f.value(f.weights()), value)


def test_options_of_the_objective_are_kept() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    f = Objective(net, mse, DATA, without_dropout=True, memory_budget=1000).using(differences)
    double, w = f.in_double(), f.weights().double()
    assert double.value(w).item() == pytest.approx(f.value(f.weights()).item(), rel=1e-6)
    assert double.expand is differences and double.memory_budget == 1000


def test_graphs_of_twice_the_size_are_kept_within_the_same_budget() -> None:
    f = single()

    def least_budget(g: Objective) -> int:
        """The smallest power of two within which both batches are kept."""
        for power in range(40):
            g.memory_budget = 2**power
            if g.at(g.weights()).cost == 2:  # gradients a product, where no graph is built anew
                return g.memory_budget
        return 0

    assert least_budget(f.in_double()) == 2 * least_budget(f) > 0


def test_a_model_that_torch_cannot_copy_is_taken_to_double_as_well() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.scale = self.layer.bias * 1.0  # not a leaf: torch copies none of these

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    net = Bound()
    double = Objective(net, mse, DATA).in_double()
    w = double.weights()
    weight, bias = w[:15].view(3, 5), w[15:]
    examples = sum(len(x) for x, _ in DATA)
    expected = sum(len(x) / examples * mse(x.double() @ weight.T + bias, y.double()) for x, y in DATA)
    assert double.value(w).item() == pytest.approx(float(expected), rel=1e-14)


def test_conversions_inside_the_model_are_left_out() -> None:
    class Upcast(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float().type(torch.float32)).float()

    f = Objective(Upcast(5, 3), mse, DATA)
    w = f.weights().double()
    plain = Objective(nn.Linear(5, 3), mse, DATA).in_double()
    assert torch.equal(f.in_double().grad(w), plain.grad(w))
