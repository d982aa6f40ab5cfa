"""Recorded programs, and torch's interpreter of them: the same kernels, so the same bits; what it refuses."""

import gc
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import normal, relative
from test_objective import EXACT
from torch import Tensor, fx

from sharpscope.autodiff import hvp, tracing
from sharpscope.autodiff.hvp import linearized
from sharpscope.autodiff.tracing import interpreted, record
from sharpscope.errors import CannotTrace


def convolved(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The gradient of a convolution, whose backward takes lists of numbers and of truth values."""
    with torch.enable_grad():
        kernel = y[:, :2, :3, :3].detach().requires_grad_()
        out = F.conv2d(x[:, :2], kernel, stride=2, padding=1).square().sum()
        return (torch.autograd.grad(out, kernel)[0],)


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "numbers": lambda x, y: (2 * x + y / 3 - 1, x.clamp(min=0), torch.where(x > 0.5, x, float("inf"))),
    "lists": lambda x, y: (torch.cat([x, y], dim=1), *x.split([1, 2, 1], dim=1), torch.stack([x, y])),
    "several results": lambda x, y: (x.max(dim=1)[0], x.max(dim=1)[1] * 1.0, *torch.var_mean(y, (0, 2), correction=0)),
    "a number's shape": lambda x, y: (x.sum().view([]), y.mean().reshape(()).expand(3)),
    "other types": lambda x, y: (
        x.float(),
        (x > y).to(torch.int64).sum().double(),
        x.to(memory_format=torch.channels_last),
    ),
    "indices": lambda x, y: (x[:, torch.tensor([0, 2])], y.gather(1, (x > 0).long()), x[0, ..., None]),
    "constants": lambda x, y: (x + torch.arange(5.0, dtype=x.dtype), torch.ones(3, dtype=x.dtype)),
    "convolution": convolved,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_interpreter_gives_the_bits_of_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Callable[..., Any]] = []

    def noted(program: Any) -> Callable[..., Any]:
        made.append(interpreted(program))
        return made[-1]

    monkeypatch.setattr(tracing, "interpreted", noted)
    inputs = (normal(3, 4, 5, 5, seed=0), normal(3, 4, 5, 5, seed=1))
    fast = record(FUNCTIONS[name], inputs, factored=())
    assert fast in made  # and not the module
    for move in (0.0, 1.0):
        moved = tuple(x + move for x in inputs)
        for found, expected in zip(fast(*moved), FUNCTIONS[name](*moved), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_what_is_no_operation_of_torch_is_refused() -> None:
    program: Any = fx.symbolic_trace(torch.nn.ReLU())  # a call of a module
    with pytest.raises(CannotTrace, match="no interpreted program"):
        interpreted(program)


def test_a_program_that_the_interpreter_cannot_run_is_run_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, and functions that are recorded."""

    def fails_later(program: object) -> Callable[..., Any]:
        return lambda *_: torch.zeros(1).view(2)

    def fails_at_once(program: object) -> Callable[..., Any]:
        raise CannotTrace("no interpreted program")

    f = problems.objective("LayerNorm").on(problems.batches("LayerNorm", sizes=(7,)))
    w, v = f.weights(), normal(f.size, seed=1)
    for broken in (fails_later, fails_at_once):
        monkeypatch.setattr(hvp, "interpreted", broken)
        assert relative(f.using(linearized()).hvp(w, v), f.hvp(w, v)) < EXACT
        monkeypatch.setattr(tracing, "interpreted", broken)
        assert record(lambda x: (x.exp(),), (v,))(w)[0].equal(w.exp())


def test_an_expansion_holds_one_vector_beside_the_weights() -> None:
    """Kept graphs hold the places of gradients, not their numbers."""
    f = problems.objective("LayerNorm", "cross-entropy")
    w = f.weights()
    for make in (lambda: f, lambda: f.using(linearized())):
        before = vectors(f.size)
        at = make().at(w)
        assert vectors(f.size) - before == {at.grad.untyped_storage().data_ptr()}


def vectors(size: int) -> set[int]:
    """The memory of all tensors with so many entries."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (size,)]
    return {t.untyped_storage().data_ptr() for t in found}
