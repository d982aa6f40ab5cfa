"""Predictions from the command line, and as jobs of studies."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import invariant
from safetensors.torch import save_file

from sharpscope.cli import _predict, main
from sharpscope.errors import Unusable
from sharpscope.records.checkpoints import load_weights
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies import lyu2022
from sharpscope.studies._shared.forecast import Forecast, claims, end_error, late, run_forecast, runs
from sharpscope.studies._shared.networks import Variant

TASK = """
import torch
from torch import nn

def task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(16, 4).double()
    return net, nn.functional.mse_loss, [(x, x[:, :1].sin())]

def wrong():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task in it, as the working directory."""
    (tmp_path / "mytask.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mytask", raising=False)
    return tmp_path


def test_prediction_of_a_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "lyu2022", "BN", "--step", "200", "--steps", "20", "--points", "5"]) == 0
    printed = capsys.readouterr().out
    assert "after 20 steps the central flow is" in printed and "runs/prediction/report.html" in printed
    assert len([line for line in printed.splitlines() if line.strip().endswith("%")]) == 6
    page = (here / "runs/prediction/report.html").read_text()
    assert "central flow" in page and "Test loss" in page
    history = History.load(here / "runs/prediction/history.parquet")
    assert history.runs == ["optimizer", "central flow", "stable flow"]
    assert main(["predict", "lyu2022", "BN", "--step", "3", "--steps", "5", "--points", "5"]) == 0  # over the old one


def test_prediction_of_a_task_from_a_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (6, 4), "2.weight": (1, 6), "2.bias": (1,)}
    save_file({name: torch.randn(shape, generator=g) for name, shape in shapes.items()}, here / "w.safetensors")
    command = ["predict", "--task", "mytask:task", "--lr", "0.1", "--steps", "20", "--points", "4", "--out", "p"]
    assert main([*command, "--checkpoint", "w.safetensors"]) == 0
    assert "mytask:task: after 20 steps" in capsys.readouterr().out
    assert (here / "p/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a study and one of its network runs"),
        (["lyu2022", "digit BN"], "some it has: 'digits BN'"),
        (["lyu2022", "batches of 40"], "is not full-batch gradient descent"),
        (["lyu2022", "BN", "--task", "mytask:task"], "not both"),
        (["--task", "mytask:task"], "needs --lr"),
        (["--task", "mytask:none", "--lr", "1"], "no task 'mytask:none'"),
        (["--task", "mytask:wrong", "--lr", "1"], "must return (model, loss, data)"),
        (["--task", "mytask:task", "--lr", "-1"], "must be positive"),
        (["--task", "mytask:task", "--lr", "1", "--checkpoint", "mytask.py"], "not a safetensors file"),
        (["--task", "mytask:task", "--lr", "1", "--steps", "3"], "fewer points"),
        (["--task", "mytask:task", "--lr", "1", "--out", "."], "holds no prediction"),
    ],
)
def test_what_cannot_be_predicted(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["predict", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_help_lists_the_runs_of_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    for study, sentence in (
        ("lyu2022", "runs of this study: 'BN', "),
        ("lei2022", "this study has no run to predict"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", study, "--help"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(sentence)
        assert "batches of 40" not in last  # not gradient descent on all data, which is refused


def test_a_pipe_gets_lines_on_how_far_it_is(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_predict, "SECONDS_BETWEEN_LINES", 0.0)
    assert main(["predict", "--task", "mytask:task", "--lr", "0.1", "--steps", "40", "--points", "4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    done = [float(line.partition("%")[0]) for line in lines]
    assert done == sorted(done) and done[-1] == 100
    assert max(b - a for a, b in pairwise([0.0, *done])) <= 45 / 4 + 1  # a part of the way to the next measurement
    assert all(re.fullmatch(r" *\d+% done after \d+ s", line) for line in lines)


def test_a_checkpoint_that_lacks_a_parameter(tmp_path: Path) -> None:
    f = invariant("BN")
    name = next(iter(f.slices))
    save_file({name: torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(Unusable, match=r"has shape \(2,\)"):
        load_weights(f, tmp_path / "w.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(Unusable, match="is missing"):
        load_weights(f, tmp_path / "w.safetensors")


def test_a_forecast_as_a_job(tmp_path: Path) -> None:
    variant = Variant("regression", "BN", "squares", 0.5, 1e-3)
    log = RunLog(tmp_path, "a forecast")
    run_forecast(log, lambda fraction: None, "a forecast", Forecast(variant, 300, 30, points=5))
    h = History(log.rows)
    assert h.runs == list(runs("a forecast"))
    assert end_error("a forecast")(h, None) == h.series("a forecast: central flow", "error")[-1]
    ratios = (late("a forecast", "central flow", "radius") / late("a forecast", "optimizer", "radius"))(h, None)
    assert isinstance(ratios, tuple) and 0.99 < min(ratios) <= max(ratios) < 1.01
    assert {run for claim in claims("a forecast") for run in claim.runs} == set(runs("a forecast"))


def test_a_flow_that_gets_stuck_leaves_a_note(tmp_path: Path) -> None:
    variant = Variant("plain", "none", "half squares", 30.0, 0.0, train=50)
    log = RunLog(tmp_path, "wild")
    run_forecast(log, lambda fraction: None, "wild", Forecast(variant, 5, 30, points=5))
    assert "stopped after step 5" in log.note and not log.rows


def test_the_reference_run_is_predicted() -> None:
    jobs = {job.name: job for job in lyu2022.jobs(lyu2022.Config())}
    forecast = jobs["forecast of digits BN"].arguments["forecast"]
    assert (forecast.start, forecast.steps) == (1000, 1000)


def test_a_prediction_that_was_cut_short_starts_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", "lyu2022", "BN", "--step", "3", "--steps", "5", "--points", "5"]

    def interrupted(self: RunLog, **row: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "append", interrupted)
        assert main(command) == 130
    assert capsys.readouterr().err.strip() == "sharpscope: stopped; the same command starts again"
    assert list((here / "runs/prediction").iterdir())
    assert main(command) == 0
    assert {path.name for path in (here / "runs/prediction").iterdir()} == {"history.parquet", "report.html"}
