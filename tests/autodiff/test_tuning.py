"""`tune` finds the eligible backends, names what is in the way, chooses the fastest, and leaves no trace."""

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import normal, relative
from test_hvp import Cube, WrongCube, with_activation
from test_objective import EXACT, assert_same, state
from torch import nn

from sharpscope import Objective, hessian
from sharpscope.autodiff import tune
from sharpscope.autodiff.tuning import Checkup


def rows(checkup: Checkup) -> dict[str, str]:
    return {t.name: t.problem for t in checkup.trials}


@pytest.mark.parametrize("norm", ["BatchNorm1d", "MultiheadAttention", "own BN"])
def test_every_exact_backend_agrees_on_ordinary_networks(norm: str) -> None:
    sizes = problems.CHUNKS if norm == "own BN" else (16,)
    f = problems.objective(norm, "cross-entropy").on(problems.batches(norm, "cross-entropy", sizes=sizes))
    before = state(f.model, f.data)
    checkup = tune(f, products=5, points=2, repeats=2)
    assert_same(before, state(f.model, f.data))
    found = rows(checkup)
    assert found.pop("compiled").startswith("not tried: all products take")
    assert not any(found.values()), found
    assert all(t.error < 1e-8 for t in checkup.trials if t.name not in ("differences", "compiled"))
    assert all(t.product > 0 and t.opening > 0 for t in checkup.trials if t.name != "compiled")
    assert checkup.graph_bytes == pytest.approx(sum(problems.CHUNKS) * f.graph_bytes_per_example)
    v = normal(f.size, seed=1)
    w = f.weights()
    assert relative(checkup.objective.hvp(w, v), f.hvp(w, v)) < EXACT
    chosen = next(t for t in checkup.trials if t.name == checkup.choice)
    assert checkup.objective.at(w).cost == hessian(checkup.objective).cost == chosen.product
    assert checkup.sentence.startswith(f"use {checkup.choice}:") and str(checkup).endswith(checkup.sentence)


def test_what_can_be_differentiated_once_leaves_differences() -> None:
    f = with_activation(Cube.apply)
    checkup = tune(f, products=2, points=1, repeats=1)
    assert checkup.choice == "differences"
    assert checkup.without_second_derivative == ("'2' (Activation)",)
    assert "second derivative does not exist in '2' (Activation)" in rows(checkup)["kept"]
    assert "no other backend can be believed; in the way: '2' (Activation)" in str(checkup)


def test_a_silently_wrong_second_derivative_is_found_out() -> None:
    f = with_activation(WrongCube.apply)
    checkup = tune(f, products=2, points=1, repeats=1)
    assert checkup.choice == "differences"
    assert rows(checkup)["kept"].startswith("wrong: differs from differences")
    assert checkup.without_second_derivative == ("'2' (Activation)",)


def test_single_precision_is_judged_by_its_own_rounding() -> None:
    data = [(x.float(), y.float()) for x, y in problems.batches("LayerNorm")]
    f = Objective(problems.model("LayerNorm").float(), F.mse_loss, data[:1])
    found = rows(tune(f, products=2, points=1, repeats=1))
    assert not any(found[name] for name in ("kept", "rebuilt", "forward over reverse", "linearized")), found


def test_kinks_are_left_to_the_exact_backends() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, problems.CLASSES))
    f = Objective(net.double(), F.mse_loss, problems.batches(sizes=(64,)))
    found = rows(tune(f, products=2, points=1, repeats=1))
    assert not found["kept"] and not found["linearized"]


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="products=0, points=1000, repeats=5: each is at least 1"):
        tune(problems.objective(), products=0)
