"""Budgets are kept at every moment, or at the end where it is known, and measurements are as frequent as they allow."""

import itertools
from collections.abc import Callable
from typing import Any

import cases
import problems
import pytest
import torch
from torch import nn

from sharpscope.autodiff.data import head
from sharpscope.autodiff.objective import Objective
from sharpscope.monitoring import time_budget
from sharpscope.monitoring.measuring import UNKNOWN_GROUPS
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.schedules import log_spaced
from sharpscope.monitoring.time_budget import ADVANCE, Budget, Ledger, parse_fraction, plan_probe


class Clock:
    """A clock that moves only when it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(
    monkeypatch: pytest.MonkeyPatch,
    budget: float,
    steps: int,
    cost: list[float],
    *,
    steps_known: bool,
    seconds: Callable[[int], float] = lambda step: 1.0,
) -> list[tuple[float, int]]:
    """Overhead and measurements after every step of so many seconds, where these take `cost` seconds in turn."""
    clock = Clock()
    for module in ("monitor", "time_budget", "timetable"):
        monkeypatch.setattr(f"sharpscope.monitoring.{module}.perf_counter", clock)
    monkeypatch.setattr(time_budget, "_gradient_seconds", lambda f, w, n: 0.01 + 0.001 * n)
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, budget=budget, steps=steps if steps_known else None)
    costs = iter(cost)

    def measure(*_: Any, **__: Any) -> None:
        clock.now += next(costs)
        monitor.history.append(run="training", step=monitor.steps)

    monkeypatch.setattr(monitor, "_measure", measure)
    monitor.measuring.groups = UNKNOWN_GROUPS
    out = []
    x, y = next(iter(f.data))
    f.loss(f.model(x), y).backward()
    for step in range(steps):
        sgd.step()
        clock.now += seconds(step)
        monitor.step()
        out.append((monitor.overhead, len(monitor.history)))
    return out


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("steps_known", [True, False], ids=["steps known", "steps unknown"])
def test_the_budget_is_kept_and_used(monkeypatch: pytest.MonkeyPatch, budget: float, steps_known: bool) -> None:
    """Measurements of half a second to one second (a solve from a random start), the first of two."""
    cost = [1.2, *([0.5] * 9 + [1.0]) * 200]
    path = simulated(monkeypatch, budget, 1000, cost, steps_known=steps_known)
    overhead, measurements = path[-1]
    assert 0.7 * budget < overhead <= budget
    assert measurements >= 0.7 * (1000 * budget - 1.2) / 0.55
    assert all(overhead <= budget for overhead, _ in path[200:])
    taken = [n for _, n in path]  # measurements are spread over the run: in each half of it about half of them
    assert taken[500] == pytest.approx(taken[-1] / 2, abs=2 + 0.2 * taken[-1])
    assert taken[20] > 0  # the beginning is seen


def test_a_slow_first_step_is_no_measure_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    path = simulated(monkeypatch, 0.05, 300, [0.5] * 300, steps_known=True, seconds=lambda step: 1.0 if step else 100.0)
    assert path[-1][0] <= 0.05
    assert path[200][0] <= 0.05


def test_steps_that_become_faster_do_not_break_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hundred steps of four seconds, then seven hundred of one."""
    path = simulated(
        monkeypatch, 0.05, 1000, [1.2, *[0.5] * 1000], steps_known=True, seconds=lambda step: 4.0 if step < 300 else 1.0
    )
    assert 0.03 < path[-1][0] <= 0.05


def test_the_advance_counts_on_short_steps() -> None:
    """Sixty steps of 1 to 1.6 seconds, as caches and clocks warm up; at no moment may more be spent than 5 % at 200."""
    durations = [1.0 + (step % 4) / 5 if step < 60 else 1.0 for step in range(ADVANCE)]
    ledger = Ledger()
    for step, seconds in enumerate(durations, 1):
        ledger.add_steps(seconds, 1)
        affordable = Budget(0.05).affordable(ledger, step)
        assert 0.85 * 0.05 * ADVANCE < affordable <= 0.05 * sum(durations)


def test_a_dear_measurement_is_made_up_for_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ten seconds, where half a second was planned: a fifth of the steps so far would have been four."""
    path = simulated(monkeypatch, 0.05, 600, [0.5, 10.0, *[0.5] * 100], steps_known=False)
    dear = next(i for i, (overhead, _) in enumerate(path) if overhead > 0.2)
    later = next(i for i, (_, n) in enumerate(path) if n > path[dear][1])
    assert dear < 50 and later >= 200
    assert all(overhead <= 0.05 for overhead, _ in path[later:])


def test_a_measurement_that_does_not_fit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = [100.0] * 10
    path = simulated(monkeypatch, 0.02, 200, cost, steps_known=False)
    assert path[-1][1] <= 1


def test_a_measurement_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that take ten seconds each, where the plan thinks of milliseconds."""
    clock = Clock()
    for module in ("monitor", "time_budget", "timetable"):
        monkeypatch.setattr(f"sharpscope.monitoring.{module}.perf_counter", clock)
    monkeypatch.setattr(time_budget, "_gradient_seconds", lambda f, w, n: 1e-3)

    def slow() -> None:
        clock.now += 10.0

    f = problems.observed(cases.plain(), slow)
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, budget=0.05, steps=1000)
    x, y = next(iter(f.data))
    f.loss(f.model(x), y).backward()
    for _ in range(1000):
        sgd.step()
        clock.now += 1.0
        monitor.step()
    assert monitor.overhead <= 0.05 + 10 / 1000
    assert set(monitor.history.columns.get("sharpness", [None])) == {None}
    assert "no curvature was found" in monitor.diagnosis()


def large(n: int) -> Objective:
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 1)
    return Objective(net, nn.functional.mse_loss, [(torch.randn(n // 4, 3, generator=g), torch.zeros(n // 4, 1))] * 4)


@pytest.mark.parametrize(
    ("fraction", "examples", "full"), [(1.0, 400, True), (0.3, 140, True), (0.1, 85, False), (0.001, 4, False)]
)
def test_the_plan_grows_with_the_budget(
    monkeypatch: pytest.MonkeyPatch, fraction: float, examples: int, full: bool
) -> None:
    monkeypatch.setattr(time_budget, "_gradient_seconds", lambda f, w, n: 0.1 + 0.01 * n)
    f = large(400)
    ledger = Ledger()
    for _ in range(5):
        ledger.add_steps(10.0 if fraction == 1.0 else 4.0, 1)
    planned = plan_probe(f, f.weights(), ledger, Budget(fraction, 1000), solves=2, k=3)
    assert planned.examples == pytest.approx(examples, rel=0.25)
    assert planned.full == full
    assert planned.k == (3 if fraction == 1.0 else 1)
    assert sum(len(y) for _, y in planned.objective.data) == planned.examples
    assert planned.first_seconds > planned.usual_seconds > 0


def test_the_head_of_the_data_is_their_first_examples() -> None:
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
    data = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    assert [len(b) for _, b in head(data, 6)] == [4, 2]
    assert torch.cat([b for _, b in head(data, 6)]).tolist() == [0, 1, 2, 3, 4, 5]
    assert [len(b) for _, b in head(data, 100)] == [4, 4, 2]
    nested = [{"ids": x, "more": [y, {"n": torch.tensor(3.0)}]}]
    (cut,) = head(nested, 3)
    assert len(cut["ids"]) == len(cut["more"][0]) == 3 and cut["more"][1]["n"] == 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    assert torch.equal(head(loader, 5)[0][0], head(loader, 5)[0][0])
    assert torch.equal(before, torch.get_rng_state())


def test_a_probe_of_batches_with_a_form_and_weights_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time comes first: a probe has whole sequences, and weighs as they are counted."""
    monkeypatch.setattr(time_budget, "_gradient_seconds", lambda f, w, n: 1e-3)
    x, y = torch.randn(6, 32, 3), torch.randn(6, 32, 1)
    net = nn.Linear(3, 1)
    data = [(x[:, :24], None, y[:, :24]), (x[:, 24:], None, y[:, 24:])]
    f = Objective(net, nn.functional.mse_loss, data, batch=lambda b: (b[0], b[2]), examples=lambda b: b[0].shape[1])
    ledger = Ledger()
    ledger.add_steps(1e-4, 1)
    plan = plan_probe(f, f.weights(), ledger, Budget(0.01, 1000), solves=1, k=1)
    (batch,) = plan.objective.data
    assert plan.examples == batch[0].shape[1] == 16 and batch[0].shape[0] == 6
    value = plan.objective.value(f.weights()).item()
    assert value == pytest.approx(
        nn.functional.mse_loss(net(x[:, :16]), y[:, :16]).item(), rel=1e-6
    )  # single precision
    ledger.add_steps(1000.0, 1)
    plan = plan_probe(f, f.weights(), ledger, Budget(1.0, 1000), solves=1, k=1)
    assert plan.examples == 32
    assert plan.objective.value(f.weights()).item() == pytest.approx(nn.functional.mse_loss(net(x), y).item(), rel=1e-6)


def test_fractions() -> None:
    assert parse_fraction("5%") == parse_fraction(" 5 %") == parse_fraction(0.05) == parse_fraction("0.05") == 0.05


def test_log_spaced_steps() -> None:
    due = log_spaced(10)
    steps = [step for step in range(10_000) if due(step)]
    assert steps[:6] == [0, 1, 2, 3, 4, 5]
    assert len(steps) < 42
    ratios = [b / a for a, b in itertools.pairwise(steps[10:])]
    assert max(ratios) < 1.35
    with pytest.raises(ValueError, match="per_decade=0"):
        log_spaced(0)
