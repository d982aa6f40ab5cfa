"""Recorded gradients: the same to the last bit along a run, on whole data and mini-batches, or not used."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharpscope.autodiff.objective import Objective
from sharpscope.optimizers.gd import GD
from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared import recorded as recorded_module
from sharpscope.studies._shared.networks import Variant, problem_of, run_variant
from sharpscope.studies._shared.recorded import Recorded, recorded

BASE = Variant("regression", "BN", "squares", 0.5, 1e-3)
CASES = [
    *(replace(BASE, norm=norm) for norm in ("BN", "LN", "RMSNorm", "GN", "WN", "none")),
    *(Variant("mlp", "BN", loss, 0.2, 5e-4, train=40) for loss in ("half squares", "cross-entropy")),
    Variant("conv", "GN", "half squares", 0.2, 5e-4, train=100),
]


def objective(variant: Variant) -> Objective:
    return problem_of(variant).objective


@pytest.mark.parametrize("variant", CASES, ids=lambda v: f"{v.net} {v.norm} {v.loss}")
def test_a_recorded_gradient_is_the_same_to_the_last_bit(variant: Variant) -> None:
    f = objective(variant)
    g = recorded(f, 10_000)
    assert isinstance(g.gradient, Recorded)
    x, y = g.gradient.x, g.gradient.y
    w, rule = f.weights(), GD(variant.learning_rate, variant.weight_decay)
    for step in range(12):
        pair = [(x, y)] if step % 2 else [(x[step : step + 15], y[step : step + 15])]
        (loss, slope), (value, again) = (h.on(pair).value_and_grad(w) for h in (f, g))
        assert torch.equal(loss, value) and torch.equal(slope, again)
        w, _ = rule.step(w, slope, {})
    programs = g.gradient.programs
    assert len(programs) == 2 and all(program is not None for program in programs.values())


def test_another_mode_runs_no_program() -> None:
    f = Objective(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        nn.functional.mse_loss,
        [(torch.randn(5, 3), torch.randn(5, 4))],
    )
    g = recorded(f, 10_000)
    w = f.weights()
    for training in (True, False, True):
        f.model.train(training)
        assert torch.equal(f.grad(w), g.grad(w))
    assert torch.equal(f.at(w).hvp(w), g.at(w).hvp(w))


class Fickle(nn.Module):
    """Its loss depends on a number that is not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)  # which nothing puts back
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w * max(1, next(self.calls) - 2)  # the same in the first looks, another one later


def test_what_gives_other_bits_is_not_used() -> None:
    f = Objective(Fickle(), nn.functional.mse_loss, [(torch.ones(4, 3), torch.zeros(4, 3))])
    g = recorded(f, 10_000)
    assert isinstance(g.gradient, Recorded)
    g.grad(f.weights())
    assert list(g.gradient.programs.values()) == [None]
    assert recorded(f, 10) is f  # too few to be worth it
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3), torch.zeros(4, 3)))
    other = recorded(f.on(loader), 10_000)
    assert other.data is loader and not isinstance(other.gradient, Recorded)


def test_a_recorded_run_writes_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for worthwhile in (1, 10_000):
        monkeypatch.setattr(recorded_module, "WORTHWHILE", worthwhile)
        for batch in (None, 20):
            log = RunLog(tmp_path, f"{worthwhile} {batch}")
            run_variant(log, lambda fraction: None, replace(BASE, steps=30, every=10, batch=batch))
            rows.append([{k: v for k, v in row.items() if k != "run"} for row in log.rows])
    assert rows[0] == rows[2] and rows[1] == rows[3] and rows[0] != rows[1]
