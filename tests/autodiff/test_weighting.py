"""Whether the batches weigh right: the weights that `check` names give the loss of all data in one batch."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal
from test_data import CLASS_WEIGHTS, IGNORED, LABELS, C, X, Y, made
from torch import Tensor, nn

from sharpscope import Objective

mse = nn.functional.mse_loss
EXACT = 1e-10  # rounding of double precision


def summed(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


class Tokens(nn.Module):
    """Predicts the next token, and computes its loss as language models do: without the first label."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(5, 5)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        scores = self.layer(ids)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(scores, labels[:, 1:].flatten())


def split(cut: int, *parts: Tensor, axis: int = 0) -> list[tuple[Tensor, ...]]:
    pieces = [part.split([cut, part.shape[axis] - cut], axis) for part in parts]
    return list(zip(*pieces, strict=True))


def point() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))


IDS = torch.arange(60).view(10, 6) % 5
TOKENS = torch.where(torch.arange(60).view(10, 6) % 7 < torch.arange(10)[:, None] // 2, -100, IDS)
MASK = (torch.arange(40)[:, None] > 15).double()
MASKED = split(20, C, torch.cat([normal(40, 1, seed=8), MASK], 1))


def masked(output: Tensor, target: Any) -> Tensor:
    y, mask = target
    return ((output - y).square() * mask).sum() / mask.sum()


CASES: dict[str, tuple[Callable[[], nn.Module], Any, list[Any], Any, str]] = {
    "time first": (point, mse, split(8, X, Y, axis=1), (X, Y), "lambda b: b[0].shape[1]"),
    "ignored targets": (
        *(lambda: nn.Linear(3, 4), nn.CrossEntropyLoss(), split(20, C, IGNORED), (C, IGNORED)),
        "lambda b: int((b[1] != -100).sum())",
    ),
    "padding of zero": (
        *(lambda: nn.Linear(3, 4), nn.CrossEntropyLoss(ignore_index=0), split(16, C, LABELS), (C, LABELS)),
        "lambda b: int((b[1] != 0).sum())",
    ),
    "class weights": (
        *(lambda: nn.Linear(3, 4), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), split(20, C, LABELS), (C, LABELS)),
        "lambda b: float(loss.weight[b[1]].sum())",
    ),
    "next tokens": (
        *(
            Tokens,
            lambda loss, batch: loss,
            [dict(zip(("ids", "labels"), p, strict=True)) for p in split(4, IDS, TOKENS)],
        ),
        *({"ids": IDS, "labels": TOKENS}, 'lambda b: int((b["labels"][:, 1:] != -100).sum())'),
    ),
    "a mask": (
        *(lambda: nn.Linear(3, 1), masked, [(x, (t[:, :1], t[:, 1:])) for x, t in MASKED]),
        *((C, (torch.cat([t[:, :1] for _, t in MASKED]), MASK)), "lambda b: float(b[1][1].sum())"),
    ),
}


NAMED: dict[str, Callable[[Any, Any], float]] = {
    "time first": lambda b, loss: b[0].shape[1],
    "ignored targets": lambda b, loss: int((b[1] != -100).sum()),
    "padding of zero": lambda b, loss: int((b[1] != 0).sum()),
    "class weights": lambda b, loss: float(loss.weight[b[1]].sum()),
    "next tokens": lambda b, loss: int((b["labels"][:, 1:] != -100).sum()),
    "a mask": lambda b, loss: float(b[1][1].sum()),
}
"""The functions whose texts `check` is to name, each of a batch and the loss."""


@pytest.mark.parametrize("case", CASES)
def test_check_names_the_weights_that_give_the_loss_of_all_data(case: str) -> None:
    build, loss, data, whole, text = CASES[case]
    net = made(build)
    f, exact = Objective(net, loss, data), Objective(net, loss, [whole])
    wanted = exact.value(exact.weights()).item()
    assert abs(f.value(f.weights()).item() - wanted) > 1e-3
    with pytest.raises(ValueError, match=re.escape(f"examples={text} gives the loss of all data")):
        f.check()
    right = Objective(net, loss, data, examples=lambda b: NAMED[case](b, loss))
    assert right.value(right.weights()).item() == pytest.approx(wanted, rel=EXACT)
    assert right.check() == ""
    assert Objective(net, loss, [whole]).check() == ""


def test_check_says_that_the_weights_given_are_wrong() -> None:
    f = Objective(made(point), mse, split(8, X, Y, axis=1), examples=lambda b: 1)
    with pytest.raises(ValueError, match=r"do not weigh what examples= says; examples=lambda b: b\[0\].shape\[1\]"):
        f.check()


def test_check_names_batch_normalization() -> None:
    net = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    f = Objective(net, mse, split(16, C, normal(40, 1, seed=5)))
    assert "BatchNorm1d in training mode makes the examples of a batch depend on each other" in f.check()
    net.eval()
    assert f.check() == ""


def test_check_says_that_examples_depend_on_each_other() -> None:
    def contrastive(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output @ target.T, torch.arange(len(output)))

    f = Objective(made(lambda: nn.Linear(3, 3)), contrastive, split(16, C, normal(40, 3, seed=5)))
    assert "model or loss make the examples of a batch depend on each other" in f.check()


def test_a_sum_in_a_function_is_refused_where_batches_are_several() -> None:
    net, y = made(lambda: nn.Linear(3, 1)), normal(40, 1, seed=5)
    data = split(16, C, y)
    with pytest.raises(ValueError, match="the loss sums over the examples"):
        Objective(net, summed, data)
    with pytest.raises(ValueError, match="reduction='sum'"):
        Objective(net, nn.MSELoss(reduction="sum"), data)
    one = Objective(net, summed, [(C, y)])
    assert one.value(one.weights()).item() == pytest.approx(summed(net(C), y).item(), rel=EXACT)
    f = Objective(net, summed, data, examples=lambda b: 1)  # the mean over batches of their sums
    assert f.value(f.weights()).item() == pytest.approx(summed(net(C), y).item() / 2, rel=EXACT)


def test_finding_a_sum_costs_no_gradient() -> None:
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    net, y = made(lambda: Counted(3, 1)), normal(40, 1, seed=5)
    Objective(net, mse, [(C, y)])
    one = sum(calls)
    calls.clear()
    Objective(net, mse, split(20, C, y))
    assert sum(calls) <= one / 2 + 40  # the first batch and its halves once more, forwards: a gradient costs three
