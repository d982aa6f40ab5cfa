"""Optimizers of others that take the steps of one of torch's: the same rows, or a sentence."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import normal
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sharpscope import Monitor, Objective
from sharpscope.errors import InvalidType, InvalidValue
from sharpscope.monitoring import TensorTable
from sharpscope.optimizers import rule_of, same_steps, state_of
from sharpscope.optimizers.declared import _known_as

X, Y = normal(32, 4, seed=0), normal(32, 1, seed=1)


class FusedAdam(Optimizer):
    """AdamW written anew: it counts its steps in the group, and knows of no amsgrad."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = t = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m, v = (self.state[p].setdefault(n, torch.zeros_like(p)) for n in ("exp_avg", "exp_avg_sq"))
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m / (1 - b1**t), (v / (1 - b2**t)).sqrt() + group["eps"], value=-lr)


class Renamed(FusedAdam):
    """Keeps its averages under names of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for entry in self.state.values():
            entry.update({"exp_avg": entry.pop("m"), "exp_avg_sq": entry.pop("v")})
        super().step()
        for entry in self.state.values():
            entry.update({"m": entry.pop("exp_avg"), "v": entry.pop("exp_avg_sq")})


@pytest.fixture(autouse=True)
def none_declared() -> Iterator[None]:
    yield
    _known_as.clear()


def trained(kind: type[Optimizer]) -> tuple[Monitor, Optimizer, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    make: Any = kind
    optimizer = make(net.parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    monitor = Monitor(Objective(net, F.mse_loss, [(X, Y)]), optimizer, every=3, meters=[TensorTable(every=3)])
    for _ in range(9):
        optimizer.zero_grad()
        F.mse_loss(net(X), Y).backward()
        optimizer.step()
        monitor.step()
        schedule.step()
    return monitor, optimizer, [p.detach() for p in net.parameters()]


def test_a_declared_optimizer_has_the_rows_of_the_known_one() -> None:
    same_steps(FusedAdam, AdamW)
    (found, fused, ours), (expected, known, theirs) = trained(FusedAdam), trained(AdamW)
    assert found.facts.observed == () and str(rule_of(fused)) == str(rule_of(known))
    assert fused.param_groups[0].keys() == {"params", "lr", "betas", "eps", "weight_decay", "step", "initial_lr"}
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for mine, other in zip(found.history.rows, expected.history.rows, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            same = pytest.approx(value, rel=1e-6, nan_ok=True) if isinstance(value, float) else value
            assert mine[name] == same or name == "overhead", name  # sums in another order, and a clock
    assert "stability_ratio" in found.history.columns


def test_an_undeclared_one_is_observed_and_the_remedy_is_named() -> None:
    monitor, *_ = trained(FusedAdam)
    assert monitor.facts.observed == ("FusedAdam",)
    assert "optimizers.same_steps(FusedAdam, AdamW)" in monitor.diagnosis()


@pytest.mark.parametrize("known", [Adam, SGD])
def test_steps_that_differ_are_no_same_steps(known: type[Optimizer]) -> None:
    with pytest.raises(InvalidValue, match=f"FusedAdam does not take the steps of {known.__name__}: after 5 of them"):
        same_steps(FusedAdam, known)
    assert not _known_as


def test_what_cannot_be_tried_is_declared_untried() -> None:
    class OnAnotherMachine(FusedAdam):
        def __init__(self, params: Any, **kwargs: Any) -> None:
            raise RuntimeError("no such device")

    with pytest.raises(InvalidValue, match="OnAnotherMachine could not be tried: RuntimeError: no such device"):
        same_steps(OnAnotherMachine, AdamW)
    same_steps(OnAnotherMachine, AdamW, check=False)
    assert OnAnotherMachine in _known_as


@pytest.mark.parametrize("wrong", [None, nn.Module, SGD([nn.Parameter(torch.ones(1))], lr=0.1)])
def test_only_classes_of_optimizers_are_taken(wrong: Any) -> None:
    with pytest.raises(InvalidType, match="is no class of optimizers"):
        same_steps(wrong, AdamW)


def test_a_state_that_is_not_there_or_in_a_code_is_refused() -> None:
    same_steps(Renamed, AdamW)
    with pytest.warns(UserWarning, match=r"keeps no exp_avg(, exp_avg_sq)? of its parameters"):
        monitor, optimizer, _ = trained(Renamed)
    assert monitor.facts.observed == ("Renamed",)
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p]["exp_avg"] = torch.zeros(p.shape, dtype=torch.uint8)
    with pytest.raises(InvalidType, match="Renamed keeps exp_avg in a code of its own"):
        state_of(optimizer, [p])
