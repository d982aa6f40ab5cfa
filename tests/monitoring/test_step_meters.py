"""Meters along the step: the value in double precision, the cost counted, whatever the loop does to its gradients."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from architectures import Attention, pre
from problems import normal
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpscope import Objective
from sharpscope.measures.along_step import batch_sharpness, critical_step, curvature_along_step, noise_scale, step_gain
from sharpscope.measures.columns import column_of
from sharpscope.monitoring.along_step import AlongStep, BatchSharpness, GradientNoise, StepMeter, UpdateCosine
from sharpscope.monitoring.meters import Meter, Step
from sharpscope.monitoring.monitor import Monitor

Batch = tuple[Tensor, Tensor]
NAME = "edge_along_step"


class Lion(Optimizer):
    """Chen et al. 2023: the sign of a mean of gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.lerp_(p.grad, 0.01)


def muon(params: list[nn.Parameter]) -> list[Optimizer]:
    matrices, others = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.005)]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = {
    "GD": lambda p: [torch.optim.SGD(p, lr=0.3)],
    "heavy ball": lambda p: [torch.optim.SGD(p, lr=0.1, momentum=0.9)],
    "AdamW": lambda p: [torch.optim.AdamW(p, lr=0.01)],
    "RMSprop": lambda p: [torch.optim.RMSprop(p, lr=0.005)],
    "Muon": muon,
    "Lion": lambda p: [Lion(p, lr=0.003)],
}


def mlp(dropout: float = 0.0) -> nn.Module:
    norm, drop = nn.BatchNorm1d(16), [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(8, 16), norm, nn.Tanh(), *drop, nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def conv() -> nn.Module:
    first, second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    body = [first, nn.GroupNorm(2, 8), nn.ReLU(), second, nn.GroupNorm(2, 8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BN MLP": (mlp, (8,)),
    "GN conv net": (conv, (2, 6, 6)),
    "LN transformer": (lambda: pre(Attention), (5, 8)),
}


def data(*shape: int, count: int = 3, n: int = 32) -> list[Batch]:
    xs = [normal(n, *shape, seed=i).float() for i in range(count)]
    return [(x, torch.tanh(1.5 * x.flatten(1)[:, :2])) for x in xs]


def problem(net: str = "BN MLP", **options: Any) -> Objective:
    make, shape = NETS[net]
    torch.manual_seed(0)
    return Objective(make(), F.mse_loss, data(*shape), **options)


def reference(f: Objective, batch: Batch, before: Tensor, now: Tensor) -> tuple[float, float]:
    """``1 - ρ`` and the slope in double precision, by plain autograd, without dropout."""
    twin = copy.deepcopy(f.model).double()
    for m in twin.modules():
        m.training &= not isinstance(m, nn.Dropout)
    x, y = (t.double() for t in batch)

    def loss(w: Tensor) -> Tensor:
        parts = w.double().split([p.numel() for p in twin.parameters()])
        own = {n: part.view_as(p) for part, (n, p) in zip(parts, twin.named_parameters(), strict=True)}
        return F.mse_loss(torch.func.functional_call(twin, own, (x,)), y)

    before = before.double().requires_grad_()
    start = loss(before)
    (g,) = torch.autograd.grad(start, before)
    slope = (g @ (now.double() - before)).item()
    return 1 - (loss(now) - start).item() / slope, slope


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers of forward passes and of gradients that objectives have taken."""
    counts = {"forward": 0, "gradient": 0}
    evaluate, gradient = Objective.evaluate, Objective.value_and_grad

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Objective, "evaluate", counted("forward", evaluate))
    monkeypatch.setattr(Objective, "value_and_grad", counted("gradient", gradient))
    return counts


def train(
    meter: Meter,
    f: Objective,
    optimizers: list[Optimizer],
    steps: int,
    *,
    change: Callable[[int, list[nn.Parameter]], object] = lambda step, params: None,
    given: Callable[[Tensor, Batch], tuple[float | None, Batch | None]] = lambda loss, batch: (loss.item(), batch),
    autocast: bool = False,
) -> list[tuple[Mapping[str, float], Batch, Tensor, Tensor]]:
    """Read the meter at every step: what it read, the batch, and the weights before and after."""
    rows, params = [], list(f.model.parameters())
    batches = list(f.data)
    for number in range(1, steps + 1):
        batch, before = batches[number % len(batches)], f.weights()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = f.loss(f.model(batch[0]), batch[1])
        loss.backward()
        change(number, params)
        for optimizer in optimizers:
            meter.before(optimizer, f)
            optimizer.step()
            meter.after(optimizer, f)
        rows.append((meter.read(Step(number, f, *given(loss, batch))), batch, before, f.weights()))
    return rows


def assert_right(
    f: Objective, rows: list[tuple[Mapping[str, float], Batch, Tensor, Tensor]], absolute: float = 0.0005
) -> list[float]:
    """Each value is within 1 % of that in double precision where it exceeds .05, and missing for steps uphill."""
    values = []
    for found, batch, before, now in rows:
        value, slope = reference(f, batch, before, now)
        assert (NAME in found) == (slope < 0)
        assert found["slope_along_step"] == pytest.approx(slope, rel=0.01, abs=1e-6)
        if slope < 0:
            assert found[NAME] == pytest.approx(value, rel=0.01, abs=absolute)
            values.append(found[NAME])
    return values


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_one_forward_pass_whatever_the_optimizer(net: str, name: str, cost: dict[str, int]) -> None:
    f = problem(net)
    optimizers = OPTIMIZERS[name](list(f.model.parameters()))
    cost["forward"] = 0
    rows = train(AlongStep(), f, optimizers, 40)
    checks = 6  # at 1, 2, 4, .., 32
    assert cost == {"forward": 40 + checks + 3, "gradient": checks}  # 3 for rounding
    assert max(assert_right(f, rows)) > 0.05


def test_one_comparison_in_a_hundred(cost: dict[str, int]) -> None:
    f = problem()
    cost["forward"] = 0
    rows = train(AlongStep(), f, OPTIMIZERS["GD"](list(f.model.parameters())), 400)
    assert cost == {"forward": 400 + 10 + 3 * 4, "gradient": 10}  # 1, 2, 4, .., 128, 228, 328
    assert all(NAME in found for found, *_ in rows)


def clip(step: int, params: list[nn.Parameter]) -> Any:
    return nn.utils.clip_grad_norm_(params, 0.25)


CHANGES: dict[str, Callable[[int, list[nn.Parameter]], object]] = {
    "clipped by norm": clip,
    "clipped by value": lambda step, params: nn.utils.clip_grad_value_(params, 1e-3),
    "scaled": lambda step, params: [p.grad.mul_(0.5) for p in params if p.grad is not None],
    "accumulated": lambda step, params: [p.grad.add_(0.01 * torch.sign(p)) for p in params if p.grad is not None],
    "gone": lambda step, params: [p.__setattr__("grad", None) for p in params[::2]],  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_are_not_those_of_the_loss(change: str) -> None:
    """They cost a gradient, and the value is right."""
    f = problem()
    rows = train(AlongStep(), f, [torch.optim.SGD(f.model.parameters(), lr=0.1)], 30, change=CHANGES[change])
    assert_right(f, rows)


def test_clipping_now_and_then_is_recognized_by_its_norm(cost: dict[str, int]) -> None:
    f, norms = problem(), []

    def clipped(step: int, params: list[nn.Parameter]) -> None:
        norms.append(nn.utils.clip_grad_norm_(params, 0.15).item())

    cost["gradient"] = 0
    assert_right(f, train(AlongStep(), f, [torch.optim.AdamW(f.model.parameters(), lr=0.05)], 100, change=clipped))
    count = sum(norm > 0.15 for norm in norms)
    assert 20 <= count <= 80
    assert count <= cost["gradient"] <= count + 12


def test_clipping_by_value_now_and_then_is_recognized_by_ties(cost: dict[str, int]) -> None:
    """At the steps 40 to 49 and 69 to 74, none of which is compared otherwise."""
    f = problem()
    clipped = [*range(40, 50), *range(69, 75)]

    def change(step: int, params: list[nn.Parameter]) -> None:
        if step in clipped:
            nn.utils.clip_grad_value_(params, 1e-3)

    cost["gradient"] = 0
    assert_right(f, train(AlongStep(), f, [torch.optim.SGD(f.model.parameters(), lr=0.1)], 100, change=change))
    assert cost["gradient"] == 7 + len(clipped)  # 1, 2, 4, .., 64


def test_dropout_costs_a_gradient() -> None:
    torch.manual_seed(0)
    f = Objective(mlp(0.3), F.mse_loss, data(8), without_dropout=True)
    assert_right(f, train(AlongStep(), f, OPTIMIZERS["GD"](list(f.model.parameters())), 30))


def test_autocast_costs_a_gradient() -> None:
    """Slopes of low precision that happen to be right to a thousandth are used."""
    f = problem()
    rows = train(AlongStep(), f, OPTIMIZERS["GD"](list(f.model.parameters())), 40, autocast=True)
    assert_right(f, rows, absolute=0.0015)


def test_a_loop_without_loss_costs_a_forward_pass_and_one_without_a_batch_a_gradient(cost: dict[str, int]) -> None:
    f = problem()
    optimizers = OPTIMIZERS["AdamW"](list(f.model.parameters()))
    cost["forward"] = 0
    assert_right(f, train(AlongStep(), f, optimizers, 20, given=lambda loss, batch: (None, batch)))
    assert cost == {"forward": 2 * 20 + 3, "gradient": 5}
    rows = train(AlongStep(), f, optimizers, 20, given=lambda loss, batch: (loss.item(), None))
    first = next(iter(f.data))
    assert_right(f, [(found, first, before, now) for found, _, before, now in rows])
    assert cost["gradient"] == 25


def test_a_loss_that_is_another_is_not_used() -> None:
    f = problem()
    rows = train(
        AlongStep(), f, OPTIMIZERS["GD"](list(f.model.parameters())), 20,
        given=lambda loss, batch: (loss.bfloat16().item(), batch),
    )  # fmt: skip
    assert_right(f, rows)


def test_steps_that_do_not_move_or_are_not_seen_have_no_value() -> None:
    f = problem()
    (sgd,) = OPTIMIZERS["GD"](list(f.model.parameters()))
    meter = AlongStep()
    ((found, *_),) = train(meter, f, [torch.optim.SGD(f.model.parameters(), lr=0.0)], 1)
    assert found == {"slope_along_step": 0.0}
    assert meter.read(Step(2, f)) == {}  # no step in between
    before = f.weights()
    for _ in range(2):  # a step that was never read, and the next: only the latter counts
        sgd.zero_grad()
        loss = f.loss(f.model(f.data[0][0]), f.data[0][1])  # type: ignore[index]
        loss.backward()
        before = f.weights()
        meter.before(sgd, f)
        sgd.step()
        meter.after(sgd, f)
    batch = next(iter(f.data))
    assert_right(f, [(meter.read(Step(4, f, loss.item(), batch)), batch, before, f.weights())])


def test_frozen_weights_end_no_run() -> None:
    f = problem()
    (sgd,) = OPTIMIZERS["GD"](list(f.model.parameters()))
    monitor = Monitor(f, sgd, every=100, meters=[AlongStep()])
    batch = next(iter(f.data))

    def step() -> None:
        sgd.zero_grad()
        loss = F.mse_loss(f.model(batch[0]), batch[1])
        loss.backward()
        sgd.step()
        monitor.step(loss, batch)

    step()
    next(f.model.parameters()).requires_grad_(False)
    with pytest.warns(UserWarning, match="parameters have changed"):
        step()
    step()
    steps, values = monitor.history.table("training", "step", NAME)
    assert steps.tolist() == [1, 3] and (values > 0).all()


def large(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient overflows at the largest scale."""
    return 100 * F.mse_loss(output, target)


ALL: Callable[[], list[Meter]] = lambda: [  # noqa: E731
    AlongStep(),
    StepMeter({"critical_step": critical_step, "curvature_along_step": curvature_along_step}, every=3),
    UpdateCosine(),
    BatchSharpness(every=4),
    GradientNoise(every=4),
]


@pytest.mark.parametrize("variant", ["float32", "GradScaler", "bfloat16 autocast"])
def test_a_watched_run_is_the_unwatched_one_bit_for_bit(variant: str) -> None:
    """Weights, buffers, gradients, state of the optimizer and random numbers; with dropout and batch normalization."""

    def run(watched: bool) -> tuple[Any, Monitor | None]:
        torch.manual_seed(0)
        net = mlp(0.3)
        adam = torch.optim.AdamW(net.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", enabled=variant == "GradScaler", init_scale=2.0**127, growth_interval=3)
        f = Objective(net, large, data(8), without_dropout=True)
        monitor = Monitor(f, adam, every=5, meters=ALL()) if watched else None
        for i in range(20):
            batch = data(8)[i % 3]
            adam.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled="auto" in variant):
                loss = large(net(batch[0]), batch[1])
                scaler.scale(loss).backward()
                scaler.step(adam)
                scaler.update()
                if monitor is not None:
                    monitor.step(loss, batch)
        state = adam.state_dict()["state"], net.state_dict(), [p.grad for p in net.parameters()], torch.get_rng_state()
        return state, monitor

    (mine, monitor), (plain, _) = run(True), run(False)
    leaves = [torch.utils._pytree.tree_leaves(state) for state in (mine, plain)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*leaves, strict=True))
    assert monitor is not None
    taken = monitor.steps
    assert taken < 20 if variant == "GradScaler" else taken == 20  # steps that the scaler has left out
    history = monitor.history
    assert len(history.series("training", NAME)) >= taken - 2
    for name in history.columns:
        column_of(name)
    assert {"critical_step", "update_cosine", "batch_sharpness", "noise_scale_low"} <= set(history.columns)


def test_a_run_that_diverges_is_not_ended() -> None:
    f = problem("LN transformer")
    sgd = torch.optim.SGD(f.model.parameters(), lr=3.0)
    monitor, batches = Monitor(f, sgd, every=100, meters=ALL()), list(f.data)
    for i in range(20):
        batch = batches[i % 3]
        sgd.zero_grad()
        loss = F.mse_loss(f.model(batch[0]), batch[1])
        loss.backward()
        sgd.step()
        monitor.step(loss, batch)
    assert not math.isfinite(loss.item())
    steps, values = monitor.history.table("training", "step", NAME)
    assert 1 < len(steps) < 15 and math.isfinite(max(values)) and max(values) > 1
    assert monitor._meters._meters  # none has failed, so that none was left out


def test_measures_of_a_step() -> None:
    f = problem()
    measures = {"critical_step": critical_step, "twice": lambda f, w, step: 2 * step_gain(f, w, step).slope}
    rows = train(StepMeter(measures), f, OPTIMIZERS["GD"](list(f.model.parameters())), 3)
    for found, batch, before, now in rows:
        one = f.on([batch])
        assert found["critical_step"] == critical_step(one, before, now - before)
        assert found["twice"] == 2 * step_gain(one, before, now - before).slope


def test_cosine_of_successive_steps() -> None:
    f = cases.plain()
    rows = train(UpdateCosine(), f, [torch.optim.SGD(f.model.parameters(), lr=0.1, momentum=0.5)], 5)
    steps = [now - before for _, _, before, now in rows]
    assert rows[0][0] == {}
    for (found, *_), a, b in zip(rows[1:], steps, steps[1:], strict=False):
        assert found["update_cosine"] == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-12)


def test_measures_over_batches() -> None:
    f = problem()
    optimizers = OPTIMIZERS["GD"](list(f.model.parameters()))
    ((found, _, _, now),) = train(BatchSharpness(), f, optimizers, 1)
    expected = batch_sharpness(f, now)
    assert found == {"batch_sharpness": expected.value, "batch_sharpness_error": expected.standard_error}
    ((found, _, _, now),) = train(GradientNoise(), f, optimizers, 1)
    scale = noise_scale(f, now)
    assert found["noise_scale"] == scale.value and found["noise_scale_low"] == scale.interval[0]
    assert math.isinf(scale.interval[1]) == ("noise_scale_high" not in found)
