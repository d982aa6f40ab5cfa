"""The registry of columns: whatever the library writes into a row is in it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharpscope.errors import NoSuchColumn
from sharpscope.flows import compare
from sharpscope.measures.columns import COLUMNS, column_of, label_of
from sharpscope.monitoring.checkpoint_series import analyze
from sharpscope.monitoring.monitor import Monitor
from sharpscope.optimizers.gd import GD
from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared.forecast import Forecast, run_forecast
from sharpscope.studies._shared.networks import Variant, problem_of
from sharpscope.studies._shared.train import TrainingPlan, train


def test_every_column_has_a_label_and_a_sentence() -> None:
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    for column in COLUMNS:
        assert column.label and column.meaning[0].isupper() and column.meaning.endswith("."), column
        assert ("{}" in column.name) == ("{}" in column.label), column


def test_a_member_of_a_family_has_a_label_of_its_own() -> None:
    assert label_of("radius/a.b/c.weight") == "‖w‖ of a.b/c.weight"  # names of groups may hold anything
    assert label_of("rotation/the group") == "rotation of the group per step (rad)"
    assert label_of("spherical_sharpness12") == "λ12 at unit norm"
    assert column_of("radius/a").name == "radius/a" and label_of("radius") == "‖w‖"


@pytest.mark.parametrize("name", ["speed", "speed/a", "radius/", "radius2", "sharpness_2", "", "2"])
def test_columns_that_nobody_writes_are_not_known(name: str) -> None:
    with pytest.raises(NoSuchColumn, match="no column"):
        column_of(name)


def assert_known(columns: Iterable[str], *expected: str) -> None:
    names = set(columns)
    assert set(expected) <= names
    for name in names:
        column_of(name)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=1e-2, momentum=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ],
    ids=["SGD", "AdamW"],
)
def test_a_monitored_run_writes_known_columns(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    f = cases.affine()
    optimizer = make(f.model.parameters())
    monitor = Monitor(f, optimizer, every=2, k=3)
    x, y = next(iter(f.data))
    for _ in range(4):
        optimizer.zero_grad()
        f.loss(f.model(x), y).backward()
        optimizer.step()
        monitor.step()
    sgd = isinstance(optimizer, torch.optim.SGD)
    assert_known(
        monitor.history.columns,
        *("intrinsic_time_per_step", "sharpness3", "radius/0.weight", "fraction/0.weight", "rotation/0.weight"),
        *(("rate/0.weight", "radial/0.weight", "eta_lambda") if sgd else ()),
    )


def test_training_in_studies_writes_known_columns(tmp_path: Path) -> None:
    for net, norm, found in (("regression", "BN", "spherical_sharpness2"), ("plain", "none", "eta_lambda")):
        variant = Variant(net, norm, "squares", 0.05, 1e-3, train=50)
        log = RunLog(tmp_path / net, "a run")
        train(log, lambda fraction: None, problem_of(variant), GD(0.05, 1e-3), TrainingPlan(3, every=2))
        assert_known((name for row in log.rows for name in row), "test_loss", "midpoint_loss", found)


def test_predictions_write_known_columns(tmp_path: Path) -> None:
    f = cases.invariant()
    assert_known(compare(f, GD(0.1, 1e-3), f.weights(), 6, points=3).history.columns, "distance", "variance", "modes")
    log = RunLog(tmp_path, "a forecast")
    run_forecast(log, lambda fraction: None, "a", Forecast(Variant("regression", "BN", "squares", 0.5, 1e-3), 20, 6, 3))
    assert_known((name for row in log.rows for name in row), "spherical_threshold", "test_loss", "spherical_sharpness")


def test_a_series_of_checkpoints_writes_known_columns(tmp_path: Path) -> None:
    f = cases.invariant()
    save_file(f.model.state_dict(), tmp_path / "w1.safetensors")
    loss: Any = nn.functional.mse_loss
    found = analyze(f.model, loss, f.data, [tmp_path / "w1.safetensors"], tmp_path / "out", rule=GD(0.1), k=2)
    assert_known(found.history.columns, "checkpoint", "threshold", "stability_ratio", "products", "sharpness2")
