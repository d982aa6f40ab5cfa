"""Parameter groups by evidence: their kinds, and that weight decay does to each what its reason says."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import INVARIANT, PLAIN, TOKENS, Words, token_loss
from problems import generator, normal
from scipy.optimize import nnls
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.monitoring.recorder import read_description
from sharpscope.optimizers.weight_kinds import KINDS

NETS = INVARIANT | PLAIN
FREE = ("scale-invariant", "rescaled against invariant")


def names(groups: ss.optimizers.ParamGroups) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in groups}


KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "BN": {
        "scale-invariant": ("0.weight", "3.weight"),
        "matrices": ("6.weight",),
        "gains and other vectors": ("1.weight", "4.weight"),
        "biases": ("1.bias", "4.bias"),
        "no effect": ("0.bias", "3.bias"),
    },
    "Llama": {
        "scale-invariant": ("embed.weight", "a.attention.out.weight", "m.glu.down.weight"),
        "rescaled against invariant": ("a.attention.v.weight", "m.glu.up.weight"),
        "rescaled in pairs": (
            *("a.norm.weight", "a.attention.q.weight", "a.attention.k.weight", "m.norm.weight", "m.glu.gate.weight"),
            *("norm.weight", "head.weight"),
        ),
    },
    "normalized queries and keys": {
        "scale-invariant": ("0.attention.q.weight", "0.attention.k.weight"),
        "rescaled in pairs": ("0.attention.v.weight", "0.attention.out.weight"),
        "matrices": ("2.readout.weight",),
        "gains and other vectors": ("0.attention.norm.weight",),
        "biases": ("0.attention.norm.bias", "2.readout.bias"),
    },
    "weight norm": {
        "scale-invariant": ("0.parametrizations.weight.original1", "2.parametrizations.weight.original1"),
        "matrices": ("0.parametrizations.weight.original0", "2.parametrizations.weight.original0", "4.weight"),
        "biases": ("0.bias",),
    },
    "rectifiers": {
        "rescaled in pairs": ("0.weight", "2.weight", "4.weight"),
        "biases": ("0.bias", "2.bias", "4.bias"),
    },
    "tanh": {"matrices": ("0.weight", "2.weight", "4.weight"), "biases": ("0.bias", "2.bias")},
}


@pytest.mark.parametrize("name", KNOWN)
def test_kinds_worked_out_by_hand(name: str) -> None:
    found = names(ss.param_groups(NETS[name].objective(), 0.1))
    assert {kind: tuple(own) for kind, own in found.items()} == KNOWN[name]


@pytest.mark.parametrize(
    "name", ["ResNet with zero gains", "pre-LN transformer of torch", "vision transformer", "LSTM"]
)
def test_every_parameter_is_in_one_group_in_a_fixed_order(name: str) -> None:
    f = NETS[name].objective()
    groups = ss.param_groups(f, 0.1)
    order, place = list(f.slices), list(KINDS)
    assert sorted(n for own in names(groups).values() for n in own) == sorted(order)
    assert all(own == sorted(own, key=order.index) for own in names(groups).values())
    assert list(names(groups)) == sorted(names(groups), key=place.index)
    assert all(
        p is f.parameters()[n] for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)
    )
    assert names(ss.param_groups(f, 0.1, groups=ss.find_groups(f))) == names(groups)


def euler_products(f: ss.Objective) -> tuple["np.ndarray", "np.ndarray"]:
    """``wᵀ∇`` and ``‖w‖‖∇‖`` of every tensor, at more points ``(m, T)`` than there are tensors."""
    products, sizes = [], []
    for i in range(len(f.slices) + 4):
        w = f.weights() * (1 + normal(f.size, seed=i) / 2)
        g = f.grad(w)
        products.append([float(w[s] @ g[s]) for s in f.slices.values()])
        sizes.append([float(w[s].norm() * g[s].norm()) for s in f.slices.values()])
    return np.array(products), np.array(sizes)


RELATED = ("Llama", "pre-LN transformer of torch", "preactivation ResNet", "BN with rectifiers", "weight norm")


@pytest.mark.parametrize("name", RELATED)
def test_weights_without_a_penalty_may_all_shrink_at_no_cost(name: str) -> None:
    """Some exponents ``a_t ≥ 1`` of ``w_t → c^{a_t} w_t`` leave the loss as it is: ``Σ_t a_t w_tᵀ∇_t = 0`` anywhere."""
    f = NETS[name].objective()
    kinds = {n: kind for kind, own in names(ss.param_groups(f, 0.1)).items() for n in own}
    free = [i for i, n in enumerate(f.slices) if kinds[n] in FREE]
    products, sizes = euler_products(f)
    beyond, rest = nnls(products[:, free], -products[:, free].sum(axis=1))
    assert rest <= 1e-3 * np.linalg.norm(sizes[:, free] * (1 + beyond))  # what the eps of normalizations leaves


PENALIZED = ("rectifiers", "tanh", "linear", "BN with rectifiers", "pre-LN transformer of torch", "Llama", "MLP-Mixer")


@pytest.mark.parametrize("name", PENALIZED)
def test_no_penalized_weights_may_shrink_while_no_others_grow_that_are_decayed(name: str) -> None:
    """No such exponents have ``a_t = 1`` and none below zero on what is decayed, whatever they are on the rest."""
    f = NETS[name].objective()
    groups = ss.param_groups(f, 0.1)
    kinds = {n: kind for kind, own in names(groups).items() for n in own}
    decayed = {n for group in groups for n in group["param_names"] if group["weight_decay"]}
    products, _ = euler_products(f)
    columns = dict(zip(f.slices, products.T, strict=True))
    for n in decayed:
        if kinds[n] not in FREE:
            others = [columns[m] for m in columns if m in decayed and m != n]
            others += [sign * columns[m] for m in columns if m not in decayed for sign in (1, -1)]
            _, rest = nnls(np.stack(others, axis=1), -columns[n])
            assert rest > 0.03 * np.linalg.norm(columns[n]), n  # of the free ones 1e-4 at most


def test_an_optimizer_decays_what_the_groups_say() -> None:
    f = INVARIANT["BN"].objective()
    groups = ss.param_groups(f, 0.5, lr=0.1)
    optimizer = torch.optim.AdamW(groups, lr=9.0)
    before = copy.deepcopy(f.parameters())
    for p in f.parameters().values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group in groups:
        for n, p in zip(group["param_names"], group["params"], strict=True):
            keep = 1 - 0.1 * 0.5 if KINDS[group["name"]].decays else 1.0
            torch.testing.assert_close(p, keep * before[n])
    assert [type(rule).__name__ for rule in ss.optimizers.rules_of(optimizer)] == ["Adam"] * len(groups)


def test_tied_weights_stand_once_and_frozen_ones_nowhere() -> None:
    net = Words(lambda: nn.LayerNorm(8), tied=True).double()
    net.get_parameter("a.attention.v.weight").requires_grad_(False)
    groups = ss.param_groups(ss.Objective(net, token_loss, TOKENS), 0.1)
    every = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in every}) == len(every) == len(list(net.parameters())) - 1
    assert names(groups)["tied"] == ["embed.weight"]
    assert all("a.attention.v.weight" not in own for own in names(groups).values())


def test_embeddings_and_the_parameters_of_a_loss_are_told_by_their_modules() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.scale.square() + F.mse_loss(self.scale * output.tanh(), target)

    net = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Tanh(), nn.Linear(15, 1)).double()
    x = torch.randint(9, (16, 5), generator=generator(0))
    groups = ss.param_groups(ss.Objective(net, Scaled(), [(x, normal(16, 1, seed=1))]), 0.1)
    assert names(groups) == {
        "matrices": ["3.weight"],
        "embeddings": ["0.weight"],
        "gains and other vectors": ["loss.scale"],
        "biases": ["3.bias"],
    }


def test_the_table_counts_and_gives_reasons() -> None:
    groups = ss.param_groups(INVARIANT["BN"].objective(), 0.1, lr=1e-3)
    head, first, *lines = str(groups).splitlines()
    assert head.split() == ["kind", "tensors", "weights", "decay", "reason"]
    assert first.split()[:4] == ["scale-invariant", "2", "128", "0.1"]
    assert first.endswith("(over about 1/(2·lr·wd) = 5000 steps)")
    assert [line[: len("no effect")].strip() for line in lines[-2:]] == ["biases", "no effect"]


ANY: Any = ss


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((nn.Linear(2, 1), 0.1), "this Linear is no Objective; make one of a model, its loss and a few fixed batches"),
        ((INVARIANT["BN"].objective(), -0.1), "weight_decay=-0.1 is to be a number from 0 on, such as 0.1"),
        ((INVARIANT["BN"].objective(), float("inf")), "weight_decay=inf is to be a number from 0 on"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ss.SharpscopeError, match=sentence):
        ANY.param_groups(*arguments)
    with pytest.raises(ValueError, match="lr=0 is to be a positive number"):
        ANY.param_groups(INVARIANT["BN"].objective(), 0.1, lr=0)


MEASURED: dict[str, Callable[[ss.Objective], torch.optim.Optimizer]] = {
    "all alike": lambda f: torch.optim.AdamW(f.parameters().values(), lr=1e-3, weight_decay=0.1),
    "by evidence": lambda f: torch.optim.AdamW(ss.param_groups(f, 0.1), lr=1e-3),
    "no decay": lambda f: torch.optim.SGD(f.parameters().values(), lr=1e-3),
    "matrices only": lambda f: torch.optim.AdamW(
        [
            {"params": [p for p in f.parameters().values() if (p.dim() > 1) == decays], "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ],
        lr=1e-3,
    ),
}
SENTENCES = {
    "all alike": ("18 weights that are biases",),  # of queries, of the hidden layer and of the readout
    "by evidence": (),
    "no decay": (),
    "matrices only": (
        "24 scale-invariant weights have no weight decay",
        "In 3 pairs of tensors (m0.norm.* -> m0.up.weight, ..)",
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_diagnosis_compares_the_live_groups_with_these(name: str, tmp_path: Path) -> None:
    f = INVARIANT["pre-LN transformer"].objective()
    optimizer = MEASURED[name](f)
    monitor = ss.Monitor(f, optimizer, every=1, directory=tmp_path)
    f.model.zero_grad()
    optimizer.step()
    monitor.step()
    found = {finding.name: finding.text for finding in monitor.findings()}
    assert ("decay groups" in found) == bool(SENTENCES[name])
    for sentence in SENTENCES[name]:
        assert sentence in found["decay groups"]
    kept, _ = read_description(tmp_path)
    assert replace(kept, overhead=monitor.facts.overhead) == monitor.facts
