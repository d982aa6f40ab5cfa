"""The rows on disk of a monitor that takes up the state of another."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import sharpscope as ss
from sharpscope.monitoring.recorder import RUN
from sharpscope.records import RunLog


def watched(directory: Path) -> tuple[ss.Monitor, Any]:
    """A monitor that writes into `directory`, and a function that takes one step of its training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    f = ss.Objective(net, nn.functional.mse_loss, [(x, x[:, :1])])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ss.Monitor(f, optimizer, every=2, directory=directory)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), x[:, :1]).backward()
        optimizer.step()
        monitor.step()

    return monitor, step


def test_rows_on_disk_are_those_of_the_state_that_was_taken_up(tmp_path: Path) -> None:
    """Also where the log already holds rows: those of its own start, and later ones of the run that was cut off."""
    first, step = watched(tmp_path / "first")
    for _ in range(4):
        step()
    state = first.state_dict()
    for _ in range(4):
        step()
    first.load_state_dict(state)
    second, _ = watched(tmp_path / "second")
    assert len(second.history) == len(RunLog(tmp_path / "second", RUN).rows) == 1  # its own first measurement
    second.load_state_dict(state)
    expected = [{name: value for name, value in row.items() if value is not None} for row in state["rows"]]
    assert [row["step"] for row in expected] == [0, 2, 4]
    for name in ("first", "second"):
        assert RunLog(tmp_path / name, RUN).rows == expected
