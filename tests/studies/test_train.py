"""The training loop: what a row holds, and that a run interrupted anywhere goes on with all that it is made of."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import affine, data, invariant, plain
from torch import Tensor, nn

from sharpscope.autodiff.objective import Objective
from sharpscope.errors import NotConverged
from sharpscope.measures import measures
from sharpscope.measures.iterate import Iterate, midpoint
from sharpscope.optimizers.base import UpdateRule
from sharpscope.optimizers.gd import GD
from sharpscope.optimizers.scalar import SphericalRMSprop
from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared import train as training
from sharpscope.studies._shared.nets import squares
from sharpscope.studies._shared.norm_only import NormOnly
from sharpscope.studies._shared.train import LearningProblem, TrainingPlan, train
from sharpscope.symmetry.scale_groups import find_groups

X, Y = data()
STEPS = 16
PLAN = TrainingPlan(STEPS, every=4, k=2)
PLAIN = GD(0.05, 0.02)
BALL = replace(PLAIN, momentum=0.9)
RMSPROP = SphericalRMSprop.like(PLAIN, 5.0)
BATCHES = replace(PLAN, batch=6, seed=3)


class Interrupted(BaseException):
    """The process ends here."""


def descend(
    folder: Path,
    rule: UpdateRule = PLAIN,
    plan: TrainingPlan = PLAN,
    problem: Callable[[], Objective] = invariant,
    *,
    stop: int | None = None,
    **more: Any,
) -> RunLog:
    """A run under the name "a" into `folder`; `stop` interrupts it at the measurement after so many."""
    seen: list[int] = []

    def evaluate(net: nn.Module) -> dict[str, float]:
        if len(seen) == stop:
            raise Interrupted
        seen.append(1)
        return {"test_loss": squares(net(X), Y).item()}

    log = RunLog(folder, "a")
    learning = LearningProblem(problem().model, squares, X, Y, evaluate)
    train(log, lambda fraction: None, learning, rule, plan, **more)
    return log


def interrupted(folder: Path, *setting: Any, stop: int, **more: Any) -> RunLog:
    with pytest.raises(Interrupted):
        descend(folder, *setting, stop=stop, **more)
    log = RunLog(folder, "a")
    assert log.state.exists() and not log.finished
    return log


CASES: dict[str, tuple[UpdateRule, TrainingPlan, Callable[[], Objective], bool]] = {
    "gradient descent": (PLAIN, PLAN, invariant, False),
    "batches": (PLAIN, BATCHES, invariant, False),
    "heavy ball on batches": (BALL, BATCHES, invariant, False),
    "RMSprop": (RMSPROP, PLAN, invariant, True),
    "invariant in part": (BALL, PLAN, affine, False),
    "not invariant": (PLAIN, PLAN, plain, False),
    "slow": (GD(0.0005, 0.02), PLAN, invariant, False),  # the others are solved anew at every row
    "slow, in part": (replace(BALL, learning_rate=0.0002), PLAN, affine, False),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_goes_on_to_the_last_bit(case: str, tmp_path: Path) -> None:
    rule, plan, problem, unit = CASES[case]
    whole = descend(tmp_path / "whole", rule, plan, problem, unit_start=unit)
    for stop in (3, 1, 2):  # each in the run that goes on from where the last one ended
        interrupted(tmp_path / "parts", rule, plan, problem, stop=stop, unit_start=unit)
    parts = descend(tmp_path / "parts", rule, plan, problem, unit_start=unit)
    assert parts.finished and parts.note == whole.note == ""
    assert parts.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize(
    ("case", "name", "forget"),
    [
        ("heavy ball on batches", "r:momentum", torch.zeros_like),
        ("RMSprop", "r:v", lambda v: 1.1 * v),
        ("batches", "draw", lambda draw: torch.Generator().manual_seed(3).get_state()),
        ("slow", "m:top:last vectors", lambda v: torch.eye(*v.shape).to(v)),
        ("slow, in part", "m:spherical_top:last vectors", lambda v: torch.eye(*v.shape).to(v)),
    ],
)
def test_all_that_a_checkpoint_holds_is_needed(
    case: str, name: str, forget: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """Without one of its parts the run that goes on is another."""
    rule, plan, problem, unit = CASES[case]
    whole = descend(tmp_path / "whole", rule, plan, problem, unit_start=unit)
    log = interrupted(tmp_path / "parts", rule, plan, problem, stop=4, unit_start=unit)
    saved = log.resume()
    log.checkpoint(**saved | {name: forget(saved[name])})
    parts = descend(tmp_path / "parts", rule, plan, problem, unit_start=unit)
    assert len(parts.rows) == len(whole.rows)
    assert parts.path.read_bytes() != whole.path.read_bytes()


def test_rows_are_measured_at_midpoints(tmp_path: Path) -> None:
    rows = descend(tmp_path).rows
    assert [row["step"] for row in rows] == [0, 1, 2, 4, 5, 8, 10, 12, 16]
    f = invariant()
    w, middle, loss = f.weights(), f.weights(), f.value(f.weights())
    by_step = {row["step"]: row for row in rows}
    for step in range(STEPS + 1):
        if step:
            loss, g = f.value_and_grad(w)
            new, _ = PLAIN.step(w, g, {})
            middle, w = midpoint(w, new), new
        if step in by_step:
            row = by_step[step]
            it = Iterate(f, middle, PLAIN, groups=find_groups(f), k=2)
            assert row["loss"] == pytest.approx(loss.item(), rel=1e-12)
            assert row["midpoint_loss"] == pytest.approx(f.value(middle).item(), rel=1e-12)
            assert row["test_loss"] == pytest.approx(f.value(middle).item(), rel=1e-12)
            assert row["radius"] == pytest.approx(middle.norm().item(), rel=1e-12)
            assert row["tau"] == pytest.approx(step * 0.05 * 0.02, rel=1e-12)
            # eigenvalues are good to rtol² of the solver, here 1e-4
            assert row["spherical_sharpness"] == pytest.approx(measures.spherical_sharpness(it), rel=1e-3)
            assert row["eta_lambda"] == pytest.approx(measures.eta_lambda(it), rel=1e-3)
            assert row["sharpness"] * row["radius"] ** 2 == pytest.approx(row["spherical_sharpness"], rel=1e-12)
            assert row["spherical_sharpness"] >= row["spherical_sharpness2"]
            assert row["eta_lambda"] * row["spherical_threshold"] == pytest.approx(
                2 * row["spherical_sharpness"], rel=1e-12
            )
            assert row["relative_residual"] <= PLAN.rtol
            radii = [v for name, v in row.items() if name.startswith("radius/")]
            assert len(radii) == 2
            assert sum(r**2 for r in radii) == pytest.approx(row["radius"] ** 2, rel=1e-12)


def test_columns_follow_the_rule_and_the_network(tmp_path: Path) -> None:
    rows = {
        case: descend(tmp_path / case, rule, replace(plan, steps=2), problem, unit_start=unit).rows
        for case, (rule, plan, problem, unit) in CASES.items()
    }
    balanced = {case for case, r in rows.items() if any(name.startswith("balance/") for name in r[-1])}
    assert balanced == {"gradient descent", "batches", "not invariant", "slow"}  # elsewhere it has another form
    assert "spherical_sharpness" not in rows["not invariant"][-1]
    last = rows["not invariant"][-1]
    assert last["eta_lambda"] == pytest.approx(0.05 * last["sharpness"], rel=1e-2)
    assert rows["RMSprop"][0]["radius"] == pytest.approx(1, abs=1e-12)
    assert rows["heavy ball on batches"][-1]["tau"] == pytest.approx(2 * 0.05 * 0.02 / 0.1)
    assert all("loss" in row and "angle" in row for r in rows.values() for row in r[1:])


def test_balance_is_the_ratio_of_growth_to_decay(tmp_path: Path) -> None:
    rows = descend(tmp_path, plan=replace(PLAN, steps=8)).rows
    f, il = invariant(), 0.05 * 0.02
    w, sums = f.weights(), torch.zeros(2, dtype=torch.float64)
    first = f.slices["0.weight"]
    for step in range(1, 9):
        g = f.grad(w)
        if step > 5:  # since the last row
            sums += torch.stack([g[first].square().sum(), w[first].square().sum()])
        w = PLAIN.step(w, g, {})[0]
    expected = 0.05**2 * sums[0] / ((2 * il - il**2) * sums[1])
    assert rows[-1]["balance/0.weight"] == pytest.approx(expected.item(), rel=1e-10)


def test_batches_are_drawn_without_replacement_by_the_seed(tmp_path: Path) -> None:
    losses = [
        [row["loss"] for row in descend(tmp_path / str(i), plan=replace(BATCHES, seed=seed, batch=batch)).rows]
        for i, (seed, batch) in enumerate([(3, 6), (3, 6), (4, 6), (3, 16)])
    ]
    assert losses[0] == losses[1] != losses[2]
    full = [row["loss"] for row in descend(tmp_path / "full").rows]
    assert losses[3] == pytest.approx(full, rel=1e-12)  # a batch of all examples, in another order


def test_a_diverging_run_keeps_its_rows_and_says_where_it_stopped(tmp_path: Path) -> None:
    log = descend(tmp_path, GD(30.0), replace(PLAN, every=1), plain)
    assert log.finished and not log.state.exists()
    assert log.note.startswith(f"diverged at step {log.rows[-1]['step'] + 1}: loss ")
    assert len(log.rows) > 1
    at_once = descend(tmp_path / "at once", GD(1e8), problem=plain)
    assert [row["step"] for row in at_once.rows] == [0]
    assert at_once.note.startswith("diverged at step 1: loss ")


def test_divergence_is_judged_from_the_first_start_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that grow by a factor in all, a part of it before the interruption."""
    still = GD(3.0)
    norms = [row["radius"] for row in descend(tmp_path / "free", still, plan=PLAN).rows]
    grown = norms[-1] / norms[0]
    assert grown > norms[5] / norms[0] > 1  # it grows before and after
    monkeypatch.setattr(training, "DIVERGED", (grown + norms[-2] / norms[0]) / 2)
    whole = descend(tmp_path / "whole", still)
    assert whole.note.startswith("diverged at step")
    interrupted(tmp_path / "parts", still, stop=5)
    assert descend(tmp_path / "parts", still).path.read_bytes() == whole.path.read_bytes()


def test_a_run_whose_curvature_cannot_be_found_stops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls = measures.sharpness, []

    def sharpness(it: Iterate) -> float:
        calls.append(1)
        if len(calls) > 3:
            raise NotConverged("top-2 residuals [1.0, 2.0] exceed rtol")
        return found(it)

    monkeypatch.setattr(measures, "sharpness", sharpness)
    log = descend(tmp_path)
    assert log.note == "stopped at step 4: top-2 residuals [1.0, 2.0] exceed rtol"
    assert [row["step"] for row in log.rows] == [0, 1, 2]


def test_progress_is_reported(tmp_path: Path) -> None:
    fractions: list[float] = []
    learning = LearningProblem(invariant().model, squares, X, Y, lambda net: {})
    train(RunLog(tmp_path, "a"), fractions.append, learning, PLAIN, PLAN)
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_a_run_cools_at_a_tenth_of_the_rate_and_without_weight_decay(tmp_path: Path) -> None:
    """The last weights are those of the steps by hand, and τ stands still, across an interruption too."""
    plan = TrainingPlan(6, every=2, k=1, cooling=3)
    rows = descend(tmp_path / "whole", PLAIN, plan).rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["tau"] for row in rows] == [PLAIN.intrinsic_time_per_step * min(n, 3) for n in range(7)]
    f = invariant()
    w = f.weights()
    for step in range(6):
        lr, wd = (0.05, 0.02) if step < 3 else (0.005, 0.0)
        w = w - lr * (f.grad(w) + wd * w)
    assert rows[-1]["radius"] == pytest.approx(w.norm().item(), rel=1e-3)  # at the midpoint of the last step
    assert rows[-1]["spherical_threshold"] == pytest.approx(2 / 0.005 * rows[-1]["radius"] ** 2, rel=1e-12)
    interrupted(tmp_path / "parts", PLAIN, plan, stop=5)
    parts = descend(tmp_path / "parts", PLAIN, plan)
    assert [{k: v for k, v in row.items() if k != "run"} for row in parts.rows] == [
        {k: v for k, v in row.items() if k != "run"} for row in rows
    ]


def test_weight_decay_of_the_norm_alone_leaves_the_direction() -> None:
    """Beside gradient descent without weight decay, on a loss that does not notice the scale."""
    f, plain, rule = invariant(), GD(0.05), NormOnly(0.05, 0.5)
    v = w = f.weights()
    state = rule.init(w)
    for _ in range(20):
        rate = rule.effective_learning_rate(w.norm().item(), state)
        assert rate == pytest.approx(plain.effective_learning_rate(v.norm().item(), {}), rel=1e-9)
        assert rule.threshold(state) * w.norm().item() ** 2 == pytest.approx(rule.edge / rate, rel=1e-12)
        w, state = rule.step(w, f.grad(w), state)
        v, _ = plain.step(v, f.grad(v), {})
        assert torch.allclose(w / w.norm(), v / v.norm(), rtol=0, atol=1e-9)  # rounding, as it grows on the path
    assert w.norm() / v.norm() == pytest.approx(state["scale"].item(), rel=1e-9)
    # c' = -lr wd c³ in continuous time; the steps are of size lr wd = 0.025
    assert state["scale"].item() == pytest.approx((1 + 2 * 20 * 0.025) ** -0.5, rel=0.02)
