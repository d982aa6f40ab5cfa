"""Whatever is passed first to a public function: it gives a result, or a sentence of ours that says what to do."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

import sharpscope as ss
from sharpscope.errors import SharpscopeError

WINGS = (ss.linalg, ss.autodiff, ss.symmetry, ss.records, ss.optimizers, ss.measures, ss.flows, ss.monitoring)
CLASSES = {"Objective", "BatchedRuns", "Iterate", "Flow", "ReductionFlow", "Monitor"}
"""Public classes that are made of somebody's model; others are results and rules."""
NO_MODEL = {"label_of", "log_spaced"}
PUBLIC: dict[str, Callable[..., Any]] = {
    name: thing
    for wing in WINGS
    for name, thing in ((name, getattr(wing, name)) for name in wing.__all__)
    if (isinstance(thing, FunctionType) or name in CLASSES) and name not in NO_MODEL
}


QUICKER: dict[str, dict[str, Any]] = {"tune": {"products": 1, "points": 1, "repeats": 1}}
"""Options under which a function takes little time: no machine code is made."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 1))
    return nn.Sequential(*layers).double()


X = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, X[:, :1])]


def objective() -> ss.Objective:
    return ss.Objective(network(), nn.functional.mse_loss, BATCHES)


FIRST: dict[str, Callable[[], Any]] = {
    "a module": network,
    "an objective": objective,
    "an iterate": lambda: ss.measures.Iterate(objective(), objective().weights()),
    "an operator": lambda: ss.hessian(objective()),
    "a tensor": lambda: objective().weights(),
    "None": lambda: None,
    "an optimizer": lambda: torch.optim.SGD(network().parameters(), lr=0.1),
    "a number": lambda: 3,
    "a name": lambda: "resnet20",
}


def others(name: str) -> dict[str, Any]:
    """What else a function needs, by the names of its parameters."""
    f = objective()
    values: dict[str, Any] = {
        "loss": f.loss,
        "data": BATCHES,
        "w": f.weights(),
        "W": torch.zeros(1, f.size, dtype=torch.float64),
        "step": -f.grad(f.weights()),
        "now": f.weights(),
        "like": f.weights(),
        "rule": ss.GD(0.1),
        "rules": ss.GD(0.1),
        "rate": 0.1,
        "weight_decay": 0.1,
        "steps": 30,
        "radii": [1.0, 1.0],
        "c": 2.0,
        "known": torch.optim.AdamW,
        "p": torch.ones(f.size, dtype=torch.float64),
        "project": lambda v: v,
        "indices": torch.arange(3),
        "f": f,
        "v": f.weights(),
        "columns": f.weights()[:, None],
        "slices": f.slices,
        "parameters": list(f.model.parameters()),
        "optimizer": torch.optim.SGD(f.model.parameters(), lr=0.1),
    }
    _, *more = inspect.signature(PUBLIC[name]).parameters.values()
    needed = [p.name for p in more if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return {parameter: values[parameter] for parameter in needed} | QUICKER.get(name, {})


def test_the_functions_of_the_first_hour_are_among_them() -> None:
    named = {"Monitor", "density", "lanczos", "trace", "find_groups", "spherical_sharpness", "sharpness", "central"}
    assert named <= PUBLIC.keys() and len(PUBLIC) > 40


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", PUBLIC)
def test_a_first_argument_of_any_kind_gives_a_result_or_a_sentence(
    name: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        PUBLIC[name](FIRST[first](), **others(name))
    except SharpscopeError as error:
        assert len(str(error)) >= 40, error


ANY: Any = ss
"""The package without its types: what follows is wrong on purpose."""


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: ANY.linalg.density(objective()),
            "this Objective is no SymmetricOperator; of an objective f it is hess",
        ),
        (
            lambda: ANY.find_groups(network()),
            "this Sequential is no Objective; make one of a model, its loss and a few",
        ),
        (
            lambda: ANY.hessian(ss.measures.Iterate(objective(), objective().weights())),
            "Of an Iterate it is .objective",
        ),
        (
            lambda: ANY.rule_of(network()),
            "this Sequential is no torch optimizer, of which an update rule could be read",
        ),
        (lambda: ANY.flows.central(objective(), 0.1), "this float is no update rule; pass one, such as GD(0.1)"),
        (lambda: ANY.Objective(objective(), nn.functional.mse_loss, BATCHES), "this Objective is no torch module"),
        (lambda: ANY.measures.stability_ratio(objective()), "this measure needs an update rule: Iterate(..., rule="),
        (
            lambda: ANY.optimizers.as_rmsprop(ss.Adam(0.1), X),
            "this Adam has no such equivalent; pass a rule of the kind",
        ),
    ],
)
def test_the_sentence_says_what_to_pass(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(SharpscopeError) as caught:
        call()
    assert sentence in str(caught.value)
