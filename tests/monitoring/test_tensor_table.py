"""The table of every tensor: its numbers are those computed by hand, tensor by tensor, from what torch keeps."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from traces import differing, network, seed_all, traces

from sharpscope.autodiff.objective import Objective
from sharpscope.errors import InvalidValue
from sharpscope.measures.columns import column_of
from sharpscope.monitoring.meters import Step
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.tensor_table import TensorTable

FIVE = 5.1e-5
"""Largest relative error of five digits."""


def step(f: Objective, optimizer: torch.optim.Optimizer, batch: Any = None) -> None:
    """One step of training."""
    x, y = next(iter(f.data)) if batch is None else batch
    optimizer.zero_grad()
    f.loss(f.model(x), y).backward()
    optimizer.step()


def read(table: TensorTable, f: Objective, optimizer: torch.optim.Optimizer, number: int = 1) -> Mapping[str, float]:
    """Read one step of training."""
    x, y = next(iter(f.data))
    optimizer.zero_grad()
    f.loss(f.model(x), y).backward()
    table.before(optimizer, f)
    optimizer.step()
    table.after(optimizer, f)
    return table.read(Step(number, f))


def by_hand(w: Tensor, after: Tensor, g: Tensor) -> dict[str, float]:
    cosine = (w * after).sum() / (w.norm() * after.norm())
    return {
        "norm": after.norm().item(),
        "gradient": g.norm().item(),
        "update": ((after - w).square().mean() / w.square().mean()).sqrt().item(),
        "turn": math.acos(min(cosine.item(), 1.0)),
        "unmoved": 0.0,
    }


def of_sgd(p: Tensor, state: Mapping[str, Any]) -> dict[str, float]:
    il = 0.1 * 0.02
    return {
        "law": math.sqrt(2 * il / 1.5),
        "effective_rate": 0.1 / ((1 - il) * p.square().sum().item()),
        "time_left": 6 * il / 0.5,
    }


def of_adam(p: Tensor, state: Mapping[str, Any]) -> dict[str, float]:
    m = state["exp_avg"] / (1 - 0.8**4)
    v = state["exp_avg_sq"] / (1 - 0.95**4)
    return {
        "law": math.sqrt(2 * 0.01 * 0.5 * 0.2 / 1.8),
        "effective_rate": 0.01 / p.norm().item(),
        "time_left": 6 * 0.01 * 0.5,
        "signal": (m / (v.sqrt() + 1e-8)).square().mean().sqrt().item(),
        "age": sum(0.95**i for i in range(4)),
    }


Make = Callable[[Any], torch.optim.Optimizer]
RULES: dict[str, tuple[Make, Callable[[Tensor, Mapping[str, Any]], dict[str, float]]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.02), of_sgd),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.5), of_adam),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_numbers_of_every_tensor(rule: str) -> None:
    """At step 4 of 10, against formulas of norms and of arccos, on tensors of every shape."""
    make, further = RULES[rule]
    f = cases.affine()
    optimizer = make(f.model.parameters())
    table = TensorTable(2, steps=10)
    monitor = Monitor(f, optimizer, every=100, meters=[table])
    for _ in range(3):
        step(f, optimizer)
        monitor.step()
    before = {name: p.detach().clone() for name, p in f.parameters().items()}
    step(f, optimizer)
    monitor.step()
    row = {name: value for name, value in monitor.history.rows[-1].items() if value is not None}
    assert row["step"] == 4
    for name, p in f.parameters().items():
        assert p.grad is not None
        expected = by_hand(before[name], p.detach(), p.grad) | further(p.detach(), optimizer.state[p])
        for quantity, value in expected.items():
            if quantity == "law":  # written at step 2, and the same since
                assert f"law/{name}" not in row
                found = monitor.history.series("training", f"law/{name}").tolist()
                assert found == [pytest.approx(value, rel=FIVE)]
            else:
                # arccos of a number near one loses half the digits
                rel = 1e-4 if quantity == "turn" else FIVE
                assert row[f"{quantity}/{name}"] == pytest.approx(value, rel=rel), (quantity, name)
        assert {c.partition("/")[0] for c in monitor.history.columns if c.endswith(f"/{name}")} >= expected.keys()
    for name in row:
        column_of(name)


def test_a_tensor_that_starts_at_zero_has_no_relative_step() -> None:
    net = nn.Linear(3, 2).double()
    nn.init.zeros_(net.bias)
    f = Objective(net, nn.functional.mse_loss, [(torch.randn(8, 3).double(), torch.randn(8, 2).double())])
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    table = TensorTable(1)
    first, second = read(table, f, sgd), read(table, f, sgd)
    assert "update/bias" not in first and "turn/bias" not in first and first["update/weight"] > 0
    assert second["update/bias"] > 0


def test_a_tensor_without_gradient_or_rate_has_few_columns() -> None:
    net = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)])

    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.parts[0](x) + self.parts[1](x)
            return out

    f = Objective(Used(), nn.functional.mse_loss, [(torch.randn(8, 3), torch.randn(8, 1))])
    still = [*net[0].parameters()]
    others = [*net[1].parameters(), *net[2].parameters()]
    groups: list[dict[str, Any]] = [{"params": still, "lr": 0.0}, {"params": others}]
    sgd = torch.optim.SGD(groups, lr=0.1)
    row = read(TensorTable(1), f, sgd)
    assert {c.partition("/")[0] for c in row if c.endswith("parts.0.weight")} == {"norm", "gradient"}
    assert {c.partition("/")[0] for c in row if c.endswith("parts.1.weight")} >= {"update", "turn", "unmoved"}
    assert row["gradient/parts.2.weight"] == 0.0 and row["update/parts.2.weight"] == 0.0
    assert "unmoved/parts.2.weight" not in row


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_weights_that_low_precision_does_not_move_are_counted(lr: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 8).bfloat16()
    f = Objective(net, nn.functional.mse_loss, [(torch.randn(16, 64).bfloat16(), torch.randn(16, 8).bfloat16())])
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    before = net.weight.detach().clone()
    row = read(TensorTable(1), f, sgd)
    assert net.weight.grad is not None
    still = (before == net.weight) & (net.weight.grad != 0)
    fraction = still.sum().item() / net.weight.grad.count_nonzero().item()
    assert row["unmoved/weight"] == pytest.approx(fraction, rel=FIVE)
    assert (fraction > 0.9) if lr < 1e-3 else (fraction < 0.5)
    moved = (net.weight.float() - before.float()).norm() / before.float().norm()
    assert row["update/weight"] == pytest.approx(moved.item(), rel=FIVE)


def test_small_angles_are_exact() -> None:
    """A turn by 1e-6 in single precision, where one minus the cosine is nothing."""
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0]]))
    f = Objective(net, lambda out, y: (1e-6 * out).mean(), [(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1))])
    row = read(TensorTable(1), f, torch.optim.SGD(net.parameters(), lr=1.0))
    assert row["turn/weight"] == pytest.approx(1e-6, rel=FIVE)


def test_gradients_that_are_sparse_or_complex() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    f = Objective(net, nn.functional.mse_loss, [(torch.tensor([0, 0, 2]), torch.randn(3, 1))])
    row = read(TensorTable(1), f, torch.optim.SGD(net.parameters(), lr=0.1))
    grad = next(net.parameters()).grad
    assert grad is not None
    assert row["gradient/0.weight"] == pytest.approx(grad.to_dense().norm().item(), rel=FIVE)

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0 + 1.0j, 2.0 - 1.0j]))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w).abs().square().sum(1)

    model = Complex()
    f = Objective(model, nn.functional.mse_loss, [(torch.tensor([[1.0, 2.0]]), torch.zeros(1))])
    row = read(TensorTable(1), f, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert row["norm/w"] == pytest.approx(model.w.abs().square().sum().sqrt().item(), rel=FIVE)


def test_clipping_is_read_where_the_norm_is_handed_over() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    table = TensorTable(1)
    monitor = Monitor(f, sgd, every=100, meters=[table])
    x, y = next(iter(f.data))
    norms = []
    for i in range(4):
        sgd.zero_grad()
        f.loss(f.model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(f.model.parameters(), 0.01)
        norms.append(norm.item())
        if i < 3:
            table.unclipped(norm)
        sgd.step()
        monitor.step()
    # torch divides by the norm plus 1e-6
    assert monitor.history.series("training", "clipping") == pytest.approx([0.01 / n for n in norms[:3]], rel=1e-3)


def test_time_that_is_left_follows_the_schedule() -> None:
    f = cases.invariant()
    table = TensorTable(1, steps=5, schedule=lambda step: 6.0 - step)  # 5, 4, 3, 2, 1
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1, weight_decay=0.01)
    left = []
    for number in range(1, 6):
        sgd.param_groups[0]["lr"] = 0.1 * (6 - number)
        left.append(read(table, f, sgd, number).get("time_left/0.weight", 0.0))
    assert left == pytest.approx([0.01 * 0.1 * rest for rest in (10, 6, 3, 1, 0)], rel=FIVE)
    assert "time_left/0.weight" not in read(TensorTable(1), f, sgd)


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD])
def test_an_optimizer_without_a_rule_has_the_columns_that_need_none(kind: Any) -> None:
    """As one whose rate depends on the number of steps."""
    f = cases.plain()
    row = read(TensorTable(1), f, kind(f.model.parameters(), lr=0.1))
    assert {name.partition("/")[0] for name in row} == {"norm", "gradient", "update", "turn", "unmoved"}


def test_gradients_that_a_closure_makes_are_those_of_the_step() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, every=100, meters=[TensorTable(1)])
    x, y = next(iter(f.data))

    def closure() -> float:
        sgd.zero_grad()
        loss = f.loss(f.model(x), y)
        loss.backward()
        return loss.item()

    sgd.step(closure)
    monitor.step()
    grad = next(iter(f.parameters().values())).grad
    assert grad is not None
    assert monitor.history.columns["gradient/0.weight"][-1] == pytest.approx(grad.norm().item(), rel=FIVE)


def test_rows_are_small() -> None:
    """At most 400 bytes of JSON for a tensor, with every column there is."""
    f = cases.affine()
    adam = torch.optim.AdamW(f.model.parameters(), lr=1e-3, weight_decay=0.1)
    table = TensorTable(1, steps=1000)
    rows = [read(table, f, adam, number) for number in (1, 2)]
    assert all(len(json.dumps(row)) <= 400 * len(f.slices) for row in rows)


@pytest.mark.parametrize("numbers", [{"every": 0}, {"steps": 0}])
def test_numbers_that_make_no_sense(numbers: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="at least 1"):
        TensorTable(**numbers)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_a_table_is_the_same_to_the_last_bit(rule: str) -> None:
    def run(monitored: bool) -> dict[str, Any]:
        seed_all()
        net, losses = network(), []
        x, y = torch.randn(32, 4), torch.randn(32, 1)
        optimizer = RULES[rule][0](net.parameters())
        if monitored:
            f = Objective(net, nn.functional.mse_loss, [(x, y)], without_dropout=True)
            monitor = Monitor(f, optimizer, every=3, meters=[TensorTable(1)])
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if monitored:
                monitor.step(loss, (x, y))
        if monitored:
            assert len(monitor.history.series("training", "turn/0.weight")) == 6
        return traces(net, optimizer, losses)

    assert differing(run(False), run(True)) == []
