"""What a Monitor does with large models: rough values afresh, in turns, in the memory that there is.

The models of the tests are small; the size from which on a model is large is lowered.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

from sharpscope.autodiff.curvature import hessian
from sharpscope.autodiff.data import head
from sharpscope.autodiff.objective import Objective
from sharpscope.measures.iterate import Iterate
from sharpscope.monitoring import measuring, memory_plan
from sharpscope.monitoring.memory_plan import free_bytes, plan_memory
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.time_budget import Budget, Ledger, plan_probe
from sharpscope.symmetry.scale_groups import find_groups

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LARGE", 1)


def network(norm: str = "LN") -> tuple[nn.Module, Objective]:
    f = cases.invariant(norm)
    return f.model, f


def trained(f: Objective, optimizer: torch.optim.Optimizer, monitor: Monitor | None, steps: int) -> None:
    ((x, y),) = f.data
    for _ in range(steps):
        optimizer.zero_grad()
        f.loss(f.model(x), y).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()


def adamw(f: Objective) -> torch.optim.Optimizer:
    return torch.optim.AdamW(f.model.parameters(), lr=1e-2)


def test_values_are_right_to_a_few_percent_and_come_in_turns() -> None:
    _, f = network()
    optimizer = adamw(f)
    monitor = Monitor(f, optimizer, every=1, point=lambda before, now: now)
    exact: list[float] = []

    def note(step: int, values: Any) -> None:
        if step:
            exact.append(cases.dense_top(hessian(f, f.weights()).dense()))

    monitor.recorder.sinks = (note,)
    trained(f, optimizer, monitor, 8)
    columns = monitor.history.columns
    assert [v is not None for v in columns["sharpness"]] == [True, False, False, False, True, False, False, False, True]
    assert [v is not None for v in columns["stability_ratio"]] == [False, *[True] * 8]
    spherical = [step for step, v in zip(columns["step"], columns["spherical_sharpness"], strict=True) if v is not None]
    assert spherical == [0, 2, 6]  # at the start it is that of the Hessian, whose sphere holds all weights
    assert columns["sharpness"][4] == pytest.approx(exact[3], rel=0.05)
    assert columns["sharpness"][8] == pytest.approx(exact[7], rel=0.05)


def test_with_one_learning_rate_for_all_weights_sharpness_is_measured_every_time() -> None:
    _, f = network()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.01)
    monitor = Monitor(f, sgd, every=1)
    trained(f, sgd, monitor, 4)
    assert None not in monitor.history.columns["sharpness"]
    assert None not in monitor.history.columns["stability_ratio"]


def test_a_watched_training_is_the_unwatched_one_and_a_resumed_one_the_uninterrupted() -> None:
    def run(stop: int | None, watched: bool = True) -> tuple[Tensor, list[Any]]:
        _, f = network("BN")
        optimizer = adamw(f)
        monitor = Monitor(f, optimizer, every=2) if watched else None
        if stop is None or monitor is None:
            trained(f, optimizer, monitor, 8)
        else:
            trained(f, optimizer, monitor, stop)
            state = monitor.state_dict()
            monitor.close()
            monitor = Monitor(f, optimizer, every=2)
            monitor.load_state_dict(state)
            trained(f, optimizer, monitor, 8 - stop)
        kept = {"sharpness", "stability_ratio", "spherical_sharpness", "loss", "step"}
        rows = [] if monitor is None else monitor.history.rows
        return f.weights(), [{k: v for k, v in row.items() if k in kept} for row in rows]

    (alone, _), (whole, rows), (resumed, again) = run(None, False), run(None), run(3)
    assert torch.equal(alone, whole) and torch.equal(alone, resumed)
    assert rows == again and [row["step"] for row in rows] == [0, 2, 4, 6, 8]


def test_the_pair_of_the_hessian_serves_the_sphere_where_its_vector_lies_in_it() -> None:
    """A bias that hardly matters is outside of the sphere: λ1 of the block is that of the Hessian, or a little less."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12, bias=False), nn.LayerNorm(12, elementwise_affine=False), nn.ReLU()).double()
    shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    net.register_parameter("shift", shift)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    f = Objective(net, lambda out, target: nn.functional.mse_loss(out + 1e-3 * shift, target), [(x, y)])
    w, groups = f.weights(), find_groups(f)
    assert 0 < groups.joint.numel() < f.size
    it = Iterate(f, w, groups=groups, error=1e-2)
    _ = it.top
    found = it.spherical_top
    assert found.num_matvecs == 0
    invariant = w[groups.joint]
    block = hessian(f, w).dense()[groups.joint][:, groups.joint]
    truth = cases.dense_top(block) * invariant.norm().item() ** 2
    assert found.values.item() == pytest.approx(truth, rel=1e-2)
    assert found.lower.item() <= truth
    alone = Iterate(f, w, groups=groups, error=1e-6).spherical_top
    assert alone.num_matvecs > 0 and alone.values.item() == pytest.approx(truth, rel=1e-6)


def test_a_direction_of_before_saves_products() -> None:
    f = cases.plain()
    w = f.weights()
    first = Iterate(f, w, error=1e-3)
    top = first.top
    again = Iterate(f, 1.001 * w, error=1e-3, directions={"top": top.vectors[:, 0]}).top
    assert again.values.item() == pytest.approx(cases.dense_top(hessian(f, 1.001 * w).dense()), rel=1e-3)
    assert again.num_matvecs <= top.num_matvecs
    assert Iterate(f, w, error=1e-3, vectors=False).top.vectors.shape == (f.size, 0)


def test_memory_is_planned_before_anything_is_allocated() -> None:
    _, f = network()
    vector = 8 * f.size
    plenty = plan_memory(f, 3, 1e12)
    assert (plenty.objective, plenty.k, plenty.note) == (f, 3, "")
    f.memory_budget = 1000
    fewer = plan_memory(f, 3, (60 * vector + 1000) / memory_plan.PART)
    assert (fewer.objective, fewer.k) == (f, 1) and "one eigenvalue is followed in place of 3" in fewer.note
    f.memory_budget = 2 << 30
    room = memory_plan.VECTORS * vector + 4.5 * f.graph_bytes_per_example
    part = plan_memory(f, 1, room / memory_plan.PART)
    assert part.objective is not None and part.objective.memory_budget < f.memory_budget
    assert [batch.examples for batch in part.objective.batches()] == [4]
    assert "4 examples are measured" in part.note
    nothing = plan_memory(f, 1, vector)
    assert nothing.objective is None and "nothing is measured but the loss" in nothing.note
    assert 2**20 < free_bytes(torch.device("cpu")) < math.inf


def test_without_memory_a_run_goes_on_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 1000.0)
    _, f = network()
    optimizer = adamw(f)
    monitor = Monitor(f, optimizer, every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(f, optimizer, monitor, 6)
    assert [str(w.message) for w in caught if "nothing is measured" in str(w.message)] and len(caught) == 1
    assert len(monitor.history) == 4
    assert "sharpness" not in monitor.history.columns
    assert None not in monitor.history.columns["loss"]


def test_a_first_look_comes_where_the_first_measurement_has_to_wait() -> None:
    _, f = network()
    optimizer = adamw(f)
    monitor = Monitor(f, optimizer, budget="5%")
    ledger = Ledger()
    ledger.add_steps(10.0, 10)
    budget = Budget(0.05)
    plan = plan_probe(f, f.weights(), ledger, budget, 2, 1)
    slow = type(plan)(**{**vars(plan), "first_seconds": 30.0, "look_seconds": 1.0})
    assert budget.allows_look(ledger, 10, slow)  # 200 steps of a second are to come, and 5 % of them are spent ahead
    assert not budget.allows_look(ledger, 210, slow)  # 5 % of 10 s are less than a second
    ledger.add_steps(50.0, 50)
    assert budget.allows_look(ledger, 210, slow)
    assert not budget.allows_look(ledger, 10, type(plan)(**{**vars(plan), "first_seconds": 2.0, "look_seconds": 1.0}))
    monitor.measuring.follow(slow)
    monitor.timetable.look = look = measuring.first_look(slow.look, 0, None)
    assert look is not None and look.examples == 4
    few = f.on(head(f.source, 4, f.form))
    assert look.value == pytest.approx(cases.dense_top(hessian(few, f.weights()).dense()), rel=0.3)
    text = monitor.diagnosis()
    assert "A first look on 4 examples only, at step 0: λ1 was about" in text
    assert len(monitor.history) == 0
