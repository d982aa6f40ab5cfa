"""The Monitor measures what an Iterate measures, and the run it watches does not notice."""

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from traces import same

from sharpscope.autodiff.objective import Objective
from sharpscope.measures import measures
from sharpscope.measures.iterate import Iterate, midpoint
from sharpscope.monitoring.finding import SEVERITIES, Finding
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.recorder import RUN
from sharpscope.optimizers.gd import GD

SOLVER = 1e-6  # rtol² over the relative gap, with the default rtol of 1e-4


def now(before: Tensor, after: Tensor) -> Tensor:
    return after


def descend(f: Objective, optimizer: torch.optim.Optimizer, monitor: Monitor | None, steps: int) -> list[Tensor]:
    """Full-batch training; the weights before the first step and after each."""
    path = [f.weights()]
    x, y = next(iter(f.data))
    for _ in range(steps):
        optimizer.zero_grad()
        f.loss(f.model(x), y).backward()
        optimizer.step()
        path.append(f.weights())
        if monitor is not None:
            monitor.step()
    return path


def watched(f: Objective, lr: float, steps: int, wd: float = 0.0, **options: Any) -> tuple[Monitor, list[Tensor]]:
    sgd = torch.optim.SGD(f.model.parameters(), lr=lr, weight_decay=wd)
    monitor = Monitor(f, sgd, **options)
    return monitor, descend(f, sgd, monitor, steps)


def noisy_run(monitored: bool, loader: bool) -> dict[str, Any]:
    """Mini-batches, torch's batch normalization in training mode, momentum and a schedule: everything it leaves."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 1)).double()
    x, y = cases.data(count=32)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 50)
    fixed: Any = [(x[:16], y[:16]), (x[16:], y[16:])]
    if loader:
        fixed = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    loss = nn.functional.mse_loss
    monitor = Monitor(Objective(net, loss, fixed), sgd, every=3) if monitored else None
    losses, grads = [], []
    for step in range(20):
        picked = torch.randperm(len(x))[:8]
        if step == 10:
            net[1].eval()  # frozen statistics from here on
        value = loss(net(x[picked] + 0.1 * random.random() * np.random.rand()), y[picked])
        sgd.zero_grad()
        value.backward()
        sgd.step()
        if monitor is not None:
            monitor.step()
        schedule.step()
        losses.append(value.item())
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    return {
        "state": net.state_dict(),
        "momentum": [s["momentum_buffer"] for s in sgd.state.values()],
        "losses": losses,
        "grads": grads,
        "modes": [m.training for m in net.modules()],
        "hyper": [{k: v for k, v in g.items() if k != "params"} for g in sgd.param_groups],
        "random": (torch.get_rng_state(), torch.rand(3), random.random(), np.random.rand()),
    }


@pytest.mark.parametrize("loader", [False, True], ids=["list", "loader"])
def test_a_watched_run_is_the_unwatched_run_to_the_last_bit(loader: bool) -> None:
    watched, alone = noisy_run(True, loader), noisy_run(False, loader)
    assert {name: same(watched[name], alone[name]) for name in alone} == dict.fromkeys(alone, True)


@pytest.mark.parametrize("make", [cases.invariant, cases.affine, cases.plain], ids=["all", "some", "none"])
@pytest.mark.parametrize("point", [now, midpoint])
def test_measurements_are_those_of_iterates(
    make: Callable[[], Objective], point: Callable[[Tensor, Tensor], Tensor]
) -> None:
    f, every, lr, wd = make(), 4, 0.05, 0.01
    monitor, path = watched(f, lr, 12, wd, every=every, point=point)
    assert monitor.history.columns["step"] == [0, 4, 8, 12]
    for i, step in enumerate(monitor.history.columns["step"]):
        it = Iterate(f, point(path[step - 1], path[step]) if step else path[0], GD(lr, wd), groups=monitor.groups)
        row = {name: column[i] for name, column in monitor.history.columns.items()}
        assert row["loss"] == measures.loss(it)
        assert row["tau"] == pytest.approx(step * lr * wd, rel=1e-14)
        assert row["sharpness"] == pytest.approx(measures.sharpness(it), rel=SOLVER)
        assert row["stability_ratio"] == pytest.approx(measures.stability_ratio(it), rel=SOLVER)
        if monitor.groups.joint.numel():
            assert row["spherical_sharpness"] == pytest.approx(measures.spherical_sharpness(it), rel=SOLVER)
            assert row["eta_lambda"] == pytest.approx(measures.eta_lambda(it), rel=SOLVER)
            assert row["radius"] == pytest.approx(measures.radius(it), rel=1e-15)
        else:
            hyper = {
                "learning_rate",
                "intrinsic_time_per_step",
                "equilibrium",
                "applied_gradient",
                "alignment",
                "overhead",
            }
            assert row.keys() == {"run", "step", "tau", "loss", "sharpness", "stability_ratio", "residual", *hyper}


def test_every_step_can_be_measured() -> None:
    f = cases.invariant()
    monitor, path = watched(f, 0.1, 4, every=1)
    assert monitor.history.series(RUN, "step").tolist() == [0, 1, 2, 3, 4]
    expected = [f.value(midpoint(a, b)).item() for a, b in itertools.pairwise(path)]
    assert monitor.history.columns["loss"][1:] == pytest.approx(expected, rel=1e-15)


def test_measuring_never_is_refused() -> None:
    f = cases.plain()
    with pytest.raises(ValueError, match="every=0: the number of steps"):
        Monitor(f, torch.optim.SGD(f.model.parameters(), lr=0.1), every=0)


def test_an_optimizer_of_other_weights_is_refused() -> None:
    f = cases.invariant()
    part = torch.optim.SGD(list(f.model.parameters())[:1], lr=0.1)
    with pytest.raises(ValueError, match=r"does not train 3\.weight: pass the optimizer of this model"):
        Monitor(f, part)
    part.add_param_group({"params": list(f.model.parameters())[1:]})
    assert Monitor(f, part, every=20).history.columns["step"] == [0]


def test_more_eigenvalues_are_written_down_when_asked_for() -> None:
    f = cases.invariant()
    monitor, path = watched(f, 0.05, 4, every=2, k=3, point=now)
    expected = torch.linalg.eigvalsh(Iterate(f, path[-1]).hessian.dense()).flip(0)[:3]
    found = [monitor.history.columns[name][-1] for name in ("sharpness", "sharpness2", "sharpness3")]
    assert found == pytest.approx(expected.tolist(), rel=SOLVER)
    assert "sharpness2" not in watched(cases.invariant(), 0.05, 1)[0].history.columns


def test_schedules_are_followed() -> None:
    f = cases.invariant()
    sgd = torch.optim.SGD(f.model.parameters(), lr=0.1, weight_decay=0.02)
    monitor = Monitor(f, sgd, every=1, point=now)
    path = descend(f, sgd, monitor, 2)
    sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"] = 0.05, 0.75
    path += descend(f, sgd, monitor, 1)[1:]
    assert monitor.rule == GD(0.05, 0.02, 0.75)
    assert monitor.tau == pytest.approx(2 * 0.1 * 0.02 + 0.05 * 0.02 / 0.25, rel=1e-14)
    ratios, sharp = monitor.history.table(RUN, "stability_ratio", "sharpness")
    thresholds = [2 / 0.1 - 0.02] * 3 + [3.5 / 0.05 - 0.02]
    assert (sharp / ratios).tolist() == pytest.approx(thresholds, rel=1e-14)


def test_a_rule_may_be_given_for_any_optimizer() -> None:
    f = cases.invariant()
    rprop = torch.optim.Rprop(f.model.parameters(), lr=1e-3)
    monitor = Monitor(f, rprop, rule=GD(0.5), every=1)
    assert monitor.facts.observed == ()
    descend(f, rprop, monitor, 1)
    ratios, sharp = monitor.history.table(RUN, "stability_ratio", "sharpness")
    assert (sharp / ratios).tolist() == pytest.approx([4.0, 4.0], rel=1e-15)


def test_warm_starts_save_products() -> None:
    f = cases.invariant()
    sgd = torch.optim.SGD(f.model.parameters(), lr=1e-4)
    monitor = Monitor(f, sgd, every=1)
    descend(f, sgd, monitor, 2)
    warm = monitor.measure(f.weights())
    assert warm.top.num_matvecs < Iterate(f, f.weights()).top.num_matvecs


@pytest.mark.parametrize(
    ("make", "lr", "wd", "present", "absent"),
    [
        (cases.invariant, 0.3, 0.01, ("At the edge", "60 weights", "τ = 0.6 "), ("no weight decay", "Below", "Above")),
        (cases.affine, 1e-3, 0.0, ("60 weights", "There is no weight decay"), ("has acted", "At the edge")),
        (cases.plain, 0.6, 0.01, ("At the edge", "No weights"), ("penalizes nothing", "60 weights")),
        (cases.plain, 0.3, 0.0, ("Progressive sharpening", "up from 0.54"), ("At the edge", "Below", "diverged")),
        (cases.plain, 1e-3, 0.0, ("Below the edge",), ("At the edge", "Progressive", "Above")),
    ],
    ids=["edge, invariant", "partly invariant", "edge", "sharpening", "below"],
)
def test_diagnosis_fits_the_run(
    make: Callable[[], Objective], lr: float, wd: float, present: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    said = watched(make(), lr, 200, wd, every=20)[0].diagnosis()
    assert [p for p in present if p not in said] == []
    assert [a for a in absent if a in said] == []


def test_a_run_that_diverges_is_not_stopped() -> None:
    f = cases.plain()
    monitor, path = watched(f, 1e3, 120, every=10)
    assert not path[-1].isfinite().all()
    assert monitor.history.columns["step"] == list(range(0, 130, 10))
    assert not math.isfinite(monitor.history.columns["loss"][-1])
    assert monitor.history.columns["sharpness"][-1] is None
    assert monitor.diagnosis().startswith("The run diverged: at step ")


def test_the_report_says_what_the_diagnosis_says(tmp_path: Path) -> None:
    monitor, _ = watched(cases.invariant(), 0.1, 10, 0.01, every=5)
    page = monitor.report(tmp_path / "new" / "run.html")
    text = page.read_text(encoding="utf-8")
    text += re.sub(r"<[^>]*>", "", text)  # words of the first sentence explain themselves
    for finding in monitor.findings():
        assert escape(finding.text) in text and escape(finding.remedy) in text
    for words in ("Spherical sharpness", "Distance to the edge", "GD(learning_rate=0.1", "Sequential, 60 parameters"):
        assert words in text


def test_reports_show_only_what_was_measured(tmp_path: Path) -> None:
    monitor, _ = watched(cases.plain(), 1e3, 120, every=10)
    text = monitor.report(str(tmp_path / "run.html")).read_text(encoding="utf-8")
    assert "Spherical sharpness" not in text
    assert "The run diverged" in text


def test_a_schedule_may_begin_and_end_at_zero() -> None:
    """A learning rate of zero has no threshold; the run goes on, and measurements at positive rates have one."""
    net = nn.Linear(3, 1, dtype=torch.float64)
    batch = (torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64))
    f = Objective(net, nn.functional.mse_loss, [batch])
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.0 if step in (0, 4) else 1.0)
    monitor = Monitor(f, sgd, every=1)
    assert "no measurement of the curvature at a positive learning rate" in monitor.diagnosis()
    for _ in range(4):
        sgd.zero_grad()
        f.loss(net(batch[0]), batch[1]).backward()
        sgd.step()
        schedule.step()
        monitor.step()
    assert len(monitor.history.series("training", "sharpness")) == 5
    rates = monitor.history.series("training", "learning_rate").tolist()
    assert rates == [0.0, 0.0, 0.1, 0.1, 0.1]  # of the step that was taken, not of the next one
    assert monitor.history.table("training", "step", "stability_ratio")[0].tolist() == [2, 3, 4]
    assert "edge of stability" in monitor.diagnosis()


def test_a_finite_loss_of_infinite_curvature_does_not_stop_the_run() -> None:
    """√ of an error that has become zero: the loss is finite, its derivatives are not."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    f = Objective(net, lambda output, target: nn.functional.mse_loss(output, target).sqrt(), [(one, 3 * one)])
    monitor = Monitor(f, torch.optim.SGD(net.parameters(), lr=0.1), every=20)
    monitor.measure(torch.tensor([3.0], dtype=torch.float64))
    assert monitor.history.columns["loss"][-1] == 0
    assert monitor.history.columns["sharpness"][-1] is None
    assert "At 1 of 2 measurements, first at step 0, no curvature was found" in monitor.diagnosis()


def test_a_model_in_the_place_of_its_objective_is_a_sentence() -> None:
    net = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="a Monitor watches an Objective, not a Linear; make one of the model"):
        Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1))  # type: ignore[arg-type]


def test_findings_are_handed_on_when_they_first_hold() -> None:
    seen: list[tuple[str, int]] = []

    class Sink:
        def __call__(self, step: int, values: Mapping[str, float]) -> None:
            pass

        def finding(self, finding: Finding, step: int) -> None:
            seen.append((finding.name, step))

    handed: list[Finding] = []
    monitor, _ = watched(cases.plain(), 0.01, 20, every=5, sinks=[Sink()], on_finding=lambda f, step: handed.append(f))
    assert [name for name, _ in seen] == [f.name for f in handed]
    assert ("too few", 1) in seen and ("below", 15) in seen  # the start is measured after the first step
    assert len(seen) == len(set(seen)) and {f.name for f in monitor.findings()} <= {f.name for f in handed}
    assert all(f.severity in SEVERITIES for f in handed)


def test_a_function_for_findings_that_fails_is_called_no_more() -> None:
    def fails(finding: Finding, step: int) -> None:
        raise RuntimeError("no")

    with pytest.warns(UserWarning, match="on_finding failed, and is not called again"):
        monitor, _ = watched(cases.plain(), 0.01, 10, every=5, on_finding=fails)
    assert len(monitor.history) == 3


def test_steps_align_with_the_eigenvector_that_they_oscillate_along() -> None:
    """On a bowl above the edge the step is along the first axis in the end: cosine one; below, along the second."""
    h = torch.tensor([1.0, 0.2], dtype=torch.float64)

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (h * self.w.square()).sum() / 2

    for rate, expected in ((2.05, 1.0), (1.0, 0.0)):
        net = Bowl()
        f = Objective(net, lambda output, target: output, [(torch.zeros(1, 1), torch.zeros(1, 1))])
        sgd = torch.optim.SGD(net.parameters(), lr=rate)
        monitor = Monitor(f, sgd, every=20)
        for _ in range(40):
            sgd.zero_grad()
            net(torch.zeros(1)).backward()
            sgd.step()
            monitor.step()
        assert monitor.history.series("training", "alignment")[-1] == pytest.approx(expected, abs=1e-3)
    sgd.param_groups[0]["lr"] = 0.0
    assert monitor.optimizer_state.descriptions == ["SGD, at a learning rate of zero"]
