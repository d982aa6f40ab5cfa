"""What a monitored run looks like from outside: any optimizer, any loop, and not a bit changed."""

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from traces import same

from sharpscope.autodiff.objective import Objective
from sharpscope.measures import measures
from sharpscope.measures.iterate import Iterate
from sharpscope.monitoring.finding import Finding
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.page import charts_of, render_directory
from sharpscope.monitoring.recorder import FINDINGS, RUN
from sharpscope.optimizers.adaptive import Adam
from sharpscope.optimizers.base import Stability
from sharpscope.optimizers.from_torch import rules_of, stability_of
from sharpscope.optimizers.gd import GD
from sharpscope.records.run_log import RunLog

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

ADAM: dict[str, Any] = {"lr": 2e-3, "betas": (0.8, 0.95)}
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "SGD, dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, weight_decay=1e-2, **ADAM),
    "AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.5, **ADAM),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, weight_decay=0.5, foreach=True, **ADAM),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, weight_decay=0.5, fused=True, **ADAM),
    "SGD, groups": lambda p: torch.optim.SGD(
        [{"params": p[:1], "weight_decay": 1e-2}, {"params": p[1:], "lr": 0.02, "momentum": 0.5}], lr=0.1, momentum=0.9
    ),
    "SGD, a frozen group": lambda p: torch.optim.SGD(
        [{"params": p[:1], "lr": 0.1}, {"params": p[1:], "lr": 0.0}], lr=0.1
    ),
    "AdamW, groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "weight_decay": 0.5}, {"params": p[1:], "weight_decay": 0.0}], **ADAM
    ),
}


def diagonals(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """M and D of the law ``λ1(M^-½ (H + D) M^-½) = 1`` at the edge, from torch's own state, entry by entry."""
    metric, decay = [], []
    for p in parameters:
        group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
        lr, wd, one = group["lr"], group["weight_decay"], torch.ones_like(p).flatten()
        state = optimizer.state[p]
        if isinstance(optimizer, torch.optim.SGD):
            mom, d = group["momentum"], group["dampening"]
            top = 2 * (1 + mom) / (1 + 2 * mom) if group["nesterov"] else 2 * (1 + mom) / (1 - d)
            metric.append(one * (top / lr if lr else float("inf")))
        elif isinstance(optimizer, torch.optim.RMSprop):
            mom = group["momentum"]
            metric.append(2 * (1 + mom) * (state["square_avg"].sqrt() + group["eps"]).flatten() / lr)
        else:
            b1, b2 = group["betas"]
            root = (state["exp_avg_sq"] / (1 - b2 ** float(state["step"]))).sqrt() + group["eps"]
            root = (1 - b1 ** float(state["step"])) * root
            il = lr * wd if isinstance(optimizer, torch.optim.AdamW) else 0.0
            metric.append((2 - il) * (1 + b1) / (1 - b1) * root.flatten() / lr)
        decoupled = isinstance(optimizer, torch.optim.AdamW) or lr == 0
        decay.append(one * (0.0 if decoupled else wd))
    return torch.cat(metric).detach(), torch.cat(decay)


def descend(f: Objective, optimizer: torch.optim.Optimizer, monitor: Monitor, steps: int) -> None:
    x, y = next(iter(f.data))
    for _ in range(steps):
        optimizer.zero_grad()
        f.loss(f.model(x), y).backward()
        optimizer.step()
        monitor.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ratio_is_that_of_the_hessian_in_the_metric_of_the_steps(name: str) -> None:
    """Against a dense eigenvalue problem with diagonals from the optimizer's own state."""
    f = cases.affine()
    parameters = list(f.model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    monitor = Monitor(f, optimizer, every=6, point=lambda before, after: after)
    descend(f, optimizer, monitor, 6)
    metric, decay = diagonals(optimizer, parameters)
    hessian = Iterate(f, f.weights()).hessian.dense() + torch.diag(decay)
    root = metric.rsqrt()
    exact = cases.dense_top(root[:, None] * hessian * root)
    found = float(monitor.history.series(RUN, "stability_ratio")[-1])
    if name.startswith("SGD") and "groups" not in name and "frozen" not in name:
        threshold = (metric - decay)[0].item()  # here it is λ1/(M - D) instead of (λ1 + D)/M, the same at the edge
        exact = exact * metric[0].item() / threshold - decay[0].item() / threshold
    assert found == pytest.approx(exact, rel=1e-6)  # rtol² over the gap


@pytest.mark.parametrize("second", [(0.02, 0.5, 0.0), (0.3, 0.0, 0.5), (0.1, 0.9, 2.0)], ids=str)
def test_groups_that_differ_are_stable_up_to_one(second: tuple[float, float, float]) -> None:
    """Heavy ball with other rates, momenta and decays on a quadratic that couples the groups: the map's own radius."""
    h = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    lr, mom, wd = second
    sgd = torch.optim.SGD(
        [{"params": [a], "momentum": 0.9}, {"params": [b], "lr": lr, "momentum": mom, "weight_decay": wd}], lr=0.1
    )
    s = stability_of(sgd, [a, b])
    assert s is not None
    metric, decay = (t.expand(2) for t in (s.metric, s.decay))

    def ratio(c: float) -> float:
        root = metric.rsqrt()
        return cases.dense_top(root[:, None] * (c * h + torch.diag(decay)) * root)

    def radius(c: float) -> float:
        """Of ``b' = μ b + (H + D) w,  w' = w - lr b'``."""
        mu, rates = torch.diag(torch.tensor([0.9, mom])).double(), torch.diag(torch.tensor([0.1, lr])).double()
        g = c * h + torch.diag(decay)
        top = torch.cat([torch.eye(2).double() - rates @ g, -rates @ mu], dim=1)
        return torch.linalg.eigvals(torch.cat([top, torch.cat([g, mu], dim=1)])).abs().max().item()

    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    assert radius(0.999 * low) < 1 < radius(1.001 * low)


def test_weights_that_were_never_stepped_do_not_move() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([a, b])
    assert stability_of(adam, [a, b]) is None
    a.grad = torch.ones(2)
    adam.step()
    s = stability_of(adam, [a, b])
    assert s is not None and not s.uniform and s.threshold is None
    assert s.metric[2:].tolist() == [float("inf")] * 3
    b.grad = torch.ones(3)
    adam.step()  # now they differ in age
    s = stability_of(adam, [b, a])
    assert s is not None and bool(s.metric.isfinite().all())
    with pytest.raises(ValueError, match="does not train 1 of the 2 parameters"):
        stability_of(adam, [a, nn.Parameter(torch.ones(1))])


def test_rules_of_groups() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([{"params": [a], "weight_decay": 0.1}, {"params": [b], "lr": 0.0}], lr=0.1)
    assert rules_of(sgd) == [GD(0.1, 0.1), None]
    assert [len(group["params"]) for group in sgd.param_groups] == [1, 1]  # as it was


class SignDescent(torch.optim.Optimizer):
    """Somebody's own optimizer."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad.sign()


def test_a_users_own_optimizer_is_one_class_in_their_file() -> None:
    class Sign(GD):
        reads = SignDescent  # type: ignore[assignment]

        @classmethod
        def read(cls, optimizer: torch.optim.Optimizer) -> GD:
            return GD(optimizer.param_groups[0]["lr"])

    f = cases.plain()
    optimizer = SignDescent(list(f.model.parameters()), 1e-3)
    monitor = Monitor(f, optimizer, every=2)
    descend(f, optimizer, monitor, 4)
    assert monitor.history.columns["step"] == [0, 2, 4]
    ratio, sharp = monitor.history.table(RUN, "stability_ratio", "sharpness")
    assert (sharp / ratio).tolist() == pytest.approx([2000.0] * 3)


class Net(nn.Module):
    """Batch normalization in training mode, dropout, a bias that has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def run(monitored: bool, *, workers: int = 0, bf16: bool = False, optimizer: str = "SGD", **options: Any) -> Any:
    """A mini-batch run with everything in it; all that it leaves behind."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    net = Net()
    x, y = (t.float() for t in cases.data(count=48))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers)
    steps = OPTIMIZERS[optimizer](list(net.parameters()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, 50)
    scaler = torch.amp.GradScaler("cpu", enabled=bf16)
    monitor = None
    if monitored:
        f = Objective(net, nn.functional.mse_loss, [(x[:16], y[:16])], without_dropout=True)
        monitor = Monitor(f, steps, **(options or {"every": 3}))
    losses, grads = [], []
    for _ in range(2):
        for a, b in loader:
            steps.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = nn.functional.mse_loss(net(a), b)
                scaler.scale(value).backward()
                scaler.unscale_(steps)
                nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                scaler.step(steps)
                scaler.update()
                if monitor is not None:
                    monitor.step()  # inside autocast too
            schedule.step()
            losses.append(value.item() + random.random() + float(np.random.rand()))
            grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    out = {
        "weights": net.state_dict(),
        "state": {str(k): v for k, v in steps.state_dict()["state"].items()},
        "losses": losses,
        "grads": grads,
        "modes": [m.training for m in net.modules()],
        "random": (torch.get_rng_state(), torch.rand(3), random.random(), np.random.rand()),
    }
    return (out, monitor) if monitored else out


@pytest.mark.parametrize(
    "options",
    [
        *({"optimizer": name} for name in OPTIMIZERS if "fused" not in name),
        *({"workers": 2}, {"bf16": True}, {"bf16": True, "optimizer": "AdamW"}, {"budget": 0.5}),
        {"budget": "20%", "steps": 12, "k": 2},
    ],
    ids=str,
)
def test_a_monitored_run_is_the_same_to_the_last_bit(options: dict[str, Any]) -> None:
    how = {name: value for name, value in options.items() if name in ("optimizer", "workers", "bf16")}
    alone = run(False, **how)
    watched, monitor = run(True, **options)
    assert {name: same(watched[name], alone[name]) for name in alone} == dict.fromkeys(alone, True)
    assert monitor.steps == 12
    if "budget" not in options:
        assert monitor.history.columns["step"] == [0, 3, 6, 9, 12]


def test_autocast_does_not_reach_the_measuring() -> None:
    x, y = cases.data()
    net = Net().eval()
    f = Objective(net, nn.functional.mse_loss, [(x.float(), y.float())])
    w = f.weights()
    plain = f.value(w), f.hvp(w, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x.float()).dtype == torch.bfloat16
        assert same((f.value(w), f.hvp(w, w)), plain)


def test_accumulated_gradients_count_as_one_step() -> None:
    f = cases.invariant()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1, weight_decay=1e-2)
    monitor = Monitor(f, sgd, every=2)
    x, y = next(iter(f.data))
    for micro in range(16):
        f.loss(f.model(x), y).div(4).backward()
        if micro % 4 == 3:
            sgd.step()
            sgd.zero_grad()
        monitor.step()
    assert (monitor.steps, monitor.history.columns["step"]) == (4, [0, 2, 4])
    assert monitor.tau == pytest.approx(4e-3, rel=1e-12)


def test_steps_that_a_scaler_skips_are_not_counted() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    monitor = Monitor(f, sgd, every=1)
    x, y = next(iter(f.data))
    for step in range(4):
        sgd.zero_grad()
        scaler.scale(f.loss(f.model(x), y) * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(sgd)
        scaler.update()
        monitor.step()
    assert monitor.history.columns["step"] == [0, 1, 2, 3]


def test_a_monitor_that_is_called_now_and_then_says_at_which_step() -> None:
    f = cases.invariant()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, every=5)
    x, y = next(iter(f.data))
    for _ in range(3):
        for _ in range(4):
            sgd.zero_grad()
            f.loss(f.model(x), y).backward()
            sgd.step()
        monitor.step()
    assert monitor.history.columns["step"] == [0, 8, 12]  # the first looks after the steps 5 and 10


def test_schedules_may_be_any_function_of_the_step() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, every=lambda step: step in (3, 4, 9))
    descend(f, sgd, monitor, 12)
    assert monitor.history.columns["step"] == [3, 4, 9]


def test_each_invariant_group_has_its_columns() -> None:
    """Radius, effective rate, turning and fraction of the eigenvector, against their definitions."""
    f = cases.affine()
    lr, wd = 0.1, 1e-2
    sgd = torch.optim.SGD(f.model.parameters(), lr=lr, weight_decay=wd)
    path = [f.weights()]
    monitor = Monitor(f, sgd, every=4, point=lambda before, after: after)
    for _ in range(4):
        descend(f, sgd, monitor, 1)
        path.append(f.weights())
    row = monitor.history.rows[-1]
    vector = torch.linalg.eigh(Iterate(f, path[-1]).hessian.dense()).eigenvectors[:, -1]
    assert set(monitor.groups.groups) == {"0.weight", "3.weight"}
    for name, i in monitor.groups.groups.items():
        before, w = path[-2][i], path[-1][i]
        assert row[f"radius/{name}"] == pytest.approx(w.norm().item(), rel=1e-14)
        assert row[f"rate/{name}"] == pytest.approx(lr / ((1 - lr * wd) * (w @ w).item()), rel=1e-14)
        cosine = (before @ w / (before.norm() * w.norm())).item()
        assert row[f"rotation/{name}"] == pytest.approx(float(np.arccos(cosine)), rel=1e-5)
        assert row[f"fraction/{name}"] == pytest.approx((vector[i] @ vector[i]).item(), rel=1e-3)
        assert abs(row[f"radial/{name}"]) < 1e-9  # eps = 0: no radial gradient


def test_sinks_get_the_numbers_of_every_measurement() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    got: list[tuple[int, dict[str, float]]] = []
    monitor = Monitor(f, sgd, every=2, sinks=[lambda step, values: got.append((step, dict(values)))])
    descend(f, sgd, monitor, 4)
    assert [step for step, _ in got] == [0, 2, 4]
    for (_, values), row in zip(got, monitor.history.rows, strict=True):
        assert values["sharpness"] == row["sharpness"]
        assert all(isinstance(value, float) for value in values.values())


def test_a_sink_that_fails_does_not_stop_the_run() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    got: list[int] = []

    def broken(step: int, values: Any) -> None:
        got.append(step)
        raise OSError("no space left")

    monitor = Monitor(f, sgd, every=2, sinks=[broken])
    with pytest.warns(UserWarning, match="a sink of the monitor failed, .*no space left"):
        descend(f, sgd, monitor, 4)
    assert got == [0] and monitor.history.columns["step"] == [0, 2, 4]


def test_a_measurement_that_fails_leaves_random_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, every=2)
    descend(f, sgd, monitor, 1)

    def drawing(*_: Any) -> None:
        torch.rand(3), np.random.rand(), random.random()
        raise RuntimeError("half-way")

    monkeypatch.setattr(monitor.measuring, "at", drawing)
    states = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    with pytest.warns(UserWarning, match="a measurement at step 2 failed: RuntimeError: half-way"):
        descend(f, sgd, monitor, 1)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert same(states[1], np.random.get_state(legacy=False))


def test_a_setting_without_a_rule_does_not_stop_the_run() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1, weight_decay=0.1)
    monitor = Monitor(f, sgd, every=1)
    descend(f, sgd, monitor, 1)
    sgd.param_groups[0]["momentum"] = 1.0
    with pytest.warns(UserWarning, match="what no rule describes: momentum is 1.0"):
        descend(f, sgd, monitor, 1)
    sgd.param_groups[0]["momentum"] = 0.5
    descend(f, sgd, monitor, 1)
    assert monitor.history.table(RUN, "step", "stability_ratio")[0].tolist() == [0, 1, 3]
    assert len(monitor.history.series(RUN, "sharpness")) == 4


def test_sparse_gradients_are_those_of_the_dense_layer() -> None:
    def objective(sparse: bool) -> Objective:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 1))
        return Objective(net, nn.functional.mse_loss, [(torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 1))])

    f, g = objective(sparse=True), objective(sparse=False)
    w = f.weights()
    assert torch.equal(f.hvp(w, w), g.hvp(w, w))


def resumable(steps: int, state: Any = None, **options: Any) -> tuple[Monitor, Any]:
    torch.manual_seed(0)
    f = cases.affine()
    adam = torch.optim.AdamW(f.model.parameters(), lr=1e-3, weight_decay=0.1)
    if state is not None:
        f.load(state["weights"])
        adam.load_state_dict(state["optimizer"])
    monitor = Monitor(f, adam, every=3, **options)
    if state is not None:
        monitor.load_state_dict(state["monitor"])
    descend(f, adam, monitor, steps)
    return monitor, {"weights": f.weights(), "optimizer": adam.state_dict(), "monitor": monitor.state_dict()}


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = resumable(12)
    _, state = resumable(5)
    torch.save(state, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed, _ = resumable(7, state)
    timed = ("overhead",)
    for a, b in zip(resumed.history.rows, whole.history.rows, strict=True):
        a, b = ({n: v for n, v in row.items() if n not in timed and v is not None} for row in (a, b))
        assert a == b
    assert resumed.tau == whole.tau


def test_a_resumed_run_describes_the_same_parameter_group() -> None:
    """The second one, which holds the scale-invariant weights; nothing has been measured since it was resumed."""
    f = cases.affine()
    params = dict(f.model.named_parameters())
    invariant = [params.pop("0.weight"), params.pop("3.weight")]
    groups: list[dict[str, Any]] = [{"params": list(params.values())}, {"params": invariant, "lr": 0.05}]
    sgd = torch.optim.SGD(groups, lr=0.1)
    monitor = Monitor(f, sgd, every=lambda step: step == 1)
    assert monitor.rule == GD(0.1)
    descend(f, sgd, monitor, 1)
    assert monitor.rule == GD(0.05)
    resumed = Monitor(f, sgd, every=lambda step: False)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.rule == GD(0.05)


def test_a_run_on_disk_is_the_run_in_memory(tmp_path: Path) -> None:
    with resumable(6, directory=tmp_path / "run")[0] as monitor:
        text = render_directory(tmp_path / "run")
        text += re.sub(r"<[^>]*>", "", text)  # words of the first sentence explain themselves
        found = [f.text for f in monitor.findings() if f.name != "cost"]  # which on disk is that of the last row
        assert found and [sentence for sentence in found if sentence not in text] == []
    log = RunLog(tmp_path / "run", RUN)
    assert log.finished and log.note == ""
    rows = [{n: v for n, v in row.items() if v is not None and v == v} for row in monitor.history.rows]
    assert [{n: v for n, v in row.items() if v is not None} for row in log.rows] == rows
    assert json.loads((tmp_path / "run/monitor.json").read_text())["kind"] == "monitor"
    resumable(3, directory=tmp_path / "run")  # another run into the same place: the old log is kept
    kept = list((tmp_path / "run").glob("training-*.1.jsonl"))
    assert len(kept) == 1 and kept[0].read_bytes().count(b"\n") == len(rows) + 1
    assert len(list((tmp_path / "run").glob("findings-*.1.jsonl"))) == 1


def test_a_failed_run_says_so_on_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), resumable(3, directory=tmp_path)[0]:
        raise ZeroDivisionError("of course")
    assert RunLog(tmp_path, RUN).note == "ZeroDivisionError: of course"


def test_a_folder_without_a_run_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no monitored run"):
        render_directory(tmp_path)


def test_a_closed_monitor_lets_go_of_the_optimizer() -> None:
    f = cases.plain()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    with Monitor(f, sgd, every=1) as monitor:
        descend(f, sgd, monitor, 2)
    f.model.zero_grad()
    sgd.step()
    assert monitor.steps == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 5, "budget": 0.1}, "either every= or budget="),
        ({"budget": "lots"}, "budget='lots': give the fraction"),
        ({"budget": 1.5}, "at most 1"),
        ({"budget": 0.0}, "give the fraction"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    f = cases.plain()
    with pytest.raises(ValueError, match=sentence):
        Monitor(f, torch.optim.SGD(f.model.parameters(), lr=0.1), **options)


def test_the_ratio_of_an_iterate_with_a_rule_of_adam() -> None:
    f = cases.plain()
    w = f.weights()
    rule = Adam(0.01, weight_decay=0.1)
    g = f.grad(w)
    _, state = rule.step(w, g, rule.init(w))
    it = Iterate(f, w, rule, state)
    root = ((1 - 0.9) * rule.bound * rule.preconditioner(state)).rsqrt()  # after one step
    hessian = it.hessian.dense() + 0.1 * torch.eye(f.size, dtype=w.dtype)
    assert measures.stability_ratio(it) == pytest.approx(cases.dense_top(root[:, None] * hessian * root), rel=1e-6)
    with pytest.raises(ValueError, match="Adam has averaged no gradient yet"):
        measures.stability_ratio(Iterate(f, w, rule, rule.init(w)))
    assert Stability(torch.tensor(4.0), torch.tensor(1.0)).threshold == 3.0


def test_a_midpoint_needs_the_step_before() -> None:
    """After steps of which it was not informed, it measures where the weights are."""
    f = cases.invariant()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1)
    monitor = Monitor(f, sgd, every=4)
    x, y = next(iter(f.data))
    for step in range(4):
        sgd.zero_grad()
        f.loss(f.model(x), y).backward()
        sgd.step()
        if step != 2:
            monitor.step()
    assert monitor.history.columns["loss"][-1] == f.value(f.weights()).item()
    losses = monitor.history.series(RUN, "loss")
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_findings_are_kept_with_their_steps_and_mark_the_curves(tmp_path: Path) -> None:
    with resumable(6, directory=tmp_path)[0] as monitor:
        kept = RunLog(tmp_path, FINDINGS).rows
        assert kept and [{n: v for n, v in row.items() if n != "run"} for row in kept] == monitor.recorder.found
        present = {finding.name for finding in monitor.findings()} - {"cost"}
        assert present <= {row["name"] for row in kept}
        monitor.recorder.report(Finding("edge", "At the edge.", severity="note"), 4)
        monitor.recorder.report(Finding("edge", "At the edge once more.", severity="note"), 5)
        marks = {chart.name: chart.marks for chart in charts_of(monitor.history, monitor.recorder.found)}
        assert marks["stability"] == ((4.0, "edge"),) == marks["loss"]
        assert '"marks":[[4.0,"edge"]]' in render_directory(tmp_path)
        state = monitor.state_dict()
    again, *_ = resumable(0, directory=tmp_path)
    again.load_state_dict(state)
    assert again.recorder.found == monitor.recorder.found
    assert [row["step"] for row in RunLog(tmp_path, FINDINGS).rows][-2:] == [4, 5]
