"""Histories and logs: what is written comes back, also after a kill, a torn line or a full disk."""

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharpscope.errors import MissingExtra
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog

ODD = ["a", "A", "a/b", "a_b", "a b", "a.b", "a\\b", "a:b", "..", "", "GD+WD, il=1e-4", "λ", "Λ", "é", "e\u0301"]
ODD += ["x" * 300, "x" * 299]


def sample() -> History:
    rows: list[dict[str, Any]] = [
        {"run": "a", "step": 0, "loss": 1.0},
        {"run": "b", "step": 0, "loss": math.nan, "radius": 3},
        {"run": "a", "step": 5, "loss": 0.1, "radius": 2.5},
        {"run": "a", "step": 6, "loss": math.inf, "radius": None},
    ]
    return History(rows)


def test_columns_have_equal_length_and_empty_places() -> None:
    h = sample()
    assert len(h) == 4
    assert {len(column) for column in h.columns.values()} == {4}
    assert h.columns["radius"] == [None, 3, 2.5, None]
    assert h.runs == ["a", "b"]


def test_tables_leave_out_rows_with_gaps() -> None:
    h = sample()
    steps, radii = h.table("a", "step", "radius")
    assert (steps.tolist(), radii.tolist()) == ([5.0], [2.5])
    assert h.series("b", "loss").size == 0  # NaN is a gap
    assert h.series("a", "loss").tolist() == [1.0, 0.1, math.inf]  # a run that blew up is not
    assert h.series("a", "loss").dtype == np.float64


def test_unknown_runs_and_columns_are_named() -> None:
    with pytest.raises(KeyError, match="no run 'c' with columns loss; runs: a, b"):
        sample().series("c", "loss")
    with pytest.raises(KeyError, match="columns step, sharpness"):
        sample().table("a", "step", "sharpness")
    assert History().runs == []
    assert len(History()) == 0


def test_parquet_brings_everything_back(tmp_path: Path) -> None:
    h = sample()
    h.append(run="λ, il=1e-4", step=7, loss=0.1 + 0.2, empty=None, text="θ")
    h.save(tmp_path / "h.parquet")
    back = History.load(tmp_path / "h.parquet")
    assert len(back) == len(h) == 5
    assert back.runs == h.runs
    assert list(back.columns) == list(h.columns)
    for name, column in h.columns.items():
        # NaN is not equal to itself, and an integer among floats comes back as a float
        assert [repr(float(v)) if isinstance(v, int | float) else v for v in back.columns[name]] == [
            repr(float(v)) if isinstance(v, int | float) else v for v in column
        ]
    back.append(run="b", step=1)
    assert len(back) == 6
    assert os.listdir(tmp_path) == ["h.parquet"]


def test_an_empty_history_can_be_saved(tmp_path: Path) -> None:
    History().save(tmp_path / "h.parquet")
    assert len(History.load(tmp_path / "h.parquet")) == 0


def test_a_history_in_memory_needs_no_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert sample().series("b", "radius").tolist() == [3.0]


def test_saving_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h.parquet"
    sample().save(path)
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        History([{"run": "new"}]).save(path)
    assert path.read_bytes() == old


def test_a_track_is_read_back_in_order(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    assert (log.rows, log.finished, log.note) == ([], False, "")
    assert log.resume() == {}
    log.append(step=0, loss=0.1 + 0.2)
    log.append(step=1, loss=1e-300, text="line\nbreak θ\u2028\x85")
    assert log.rows == [
        {"run": "a", "step": 0, "loss": 0.1 + 0.2},
        {"run": "a", "step": 1, "loss": 1e-300, "text": "line\nbreak θ\u2028\x85"},
    ]
    assert not log.finished
    log.finish("diverged at step 2")
    assert log.finished
    assert RunLog(tmp_path, "a").note == "diverged at step 2"
    assert len(log.rows) == 2


def test_numbers_that_json_has_no_word_for_become_empty(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0, nan=math.nan, inf=math.inf, minus=-math.inf, fine=1.0)
    assert log.rows == [{"run": "a", "step": 0, "nan": None, "inf": None, "minus": None, "fine": 1.0}]
    json.loads(log.path.read_text(), parse_constant=pytest.fail)  # strict JSON
    assert History(log.rows).series("a", "nan").size == 0


def test_runs_never_share_a_file(tmp_path: Path) -> None:
    logs = [RunLog(tmp_path, name) for name in ODD]
    # file systems may ignore case and normalize accents; none of that may bring two runs together
    assert len({log.path.name.casefold() for log in logs}) == len(ODD)
    for i, log in enumerate(logs):
        log.append(step=i)
        log.checkpoint(step=torch.tensor(i))
    for i, name in enumerate(ODD):
        again = RunLog(tmp_path, name)
        assert again.rows == [{"run": name, "step": i}]
        assert again.resume()["step"].item() == i
    assert all(path.parent == tmp_path and path.name.isascii() for path in tmp_path.iterdir())


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    for step in range(3):
        log.append(step=step)
    os.truncate(log.path, log.path.stat().st_size - 5)
    assert [row["step"] for row in log.rows] == [0, 1]


def test_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    log.checkpoint(w=torch.tensor([0.1, 0.2], dtype=torch.float64), step=torch.tensor(0))
    kept = log.path.read_bytes()
    log.append(step=1)
    log.append(step=2)
    os.truncate(log.path, log.path.stat().st_size - 3)
    state = RunLog(tmp_path, "a").resume()
    assert torch.equal(state["w"], torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert state["step"].item() == 0
    assert log.path.read_bytes() == kept
    log.append(step=1)
    assert [row["step"] for row in log.rows] == [0, 1]


def test_without_a_checkpoint_a_run_starts_afresh(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    assert log.resume() == {}
    assert log.rows == []


@pytest.mark.parametrize("lost", ["all", "some"])
def test_a_log_shorter_than_its_checkpoint_means_a_fresh_start(tmp_path: Path, lost: str) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    log.checkpoint(step=torch.tensor(0))
    if lost == "all":
        log.path.unlink()
    else:
        os.truncate(log.path, 4)
    assert log.resume() == {}
    assert log.rows == []


def test_checkpoints_take_every_kind_of_tensor(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    w = torch.arange(6, dtype=torch.float64).view(2, 3)
    state = {
        "w": w,
        "same": w,
        "turned": w.T,
        "row": w[1],
        "random": torch.get_rng_state(),
        "flag": torch.tensor(True),
        "single": torch.ones(2, requires_grad=True),
    }
    log.checkpoint(**state)
    back = log.resume()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in state.items())


class Killed(BaseException):
    """The process ends here."""


def simulate(folder: Path, steps: int, killed_at: float = math.inf) -> RunLog:
    """A random walk of momentum: rows each step, a checkpoint every third; everything that it is made of is saved."""
    log, draw = RunLog(folder, "walk/1"), torch.Generator().manual_seed(0)
    state = log.resume()
    w = state.get("w", torch.ones(3, dtype=torch.float64) / 3)
    b = state.get("b", torch.zeros(3, dtype=torch.float64))
    first = int(state["step"]) + 1 if state else 0
    if state:
        draw.set_state(state["draw"])
    for step in range(first, steps):
        b = 0.9 * b + w.sin() + torch.randn(3, generator=draw, dtype=torch.float64)
        w = w - 0.1 * b
        log.append(step=step, loss=(w @ w).item(), ratio=math.nan if step % 2 else 1 / 3)
        if step >= killed_at:
            with log.path.open("ab") as file:
                file.write(b'{"run": "walk/1", "st')
            raise Killed
        if step % 3 == 0:
            log.checkpoint(w=w, b=b, step=torch.tensor(step), draw=draw.get_state())
    log.finish()
    return log


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    whole = simulate(tmp_path / "whole", 20)
    for killed_at in (1, 7, 9, 19):  # before there is a checkpoint worth having, between two, at one, at the end
        with pytest.raises(Killed):
            simulate(tmp_path / "killed", 20, killed_at)
    resumed = simulate(tmp_path / "killed", 20)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert resumed.finished
    assert not resumed.state.exists()


def test_a_crash_before_the_replacement_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    log.checkpoint(step=torch.tensor(0))
    log.append(step=1)

    def crash(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", crash)
        log.checkpoint(step=torch.tensor(1))
    assert RunLog(tmp_path, "a").resume()["step"].item() == 0
    assert [row["step"] for row in log.rows] == [0]
    log.checkpoint(step=torch.tensor(2))  # what the crash left behind is not in the way
    assert log.resume()["step"].item() == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    log.checkpoint(step=torch.tensor(0))
    kept = log.path.rename(tmp_path / "kept")
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        log.append(step=1)
    with pytest.raises(OSError, match="No space left"):
        log.finish()
    assert log.state.exists()  # a run that could not be marked as complete keeps its checkpoint
    log.path.unlink()
    kept.rename(log.path)
    assert log.resume()["step"].item() == 0
    assert [row["step"] for row in log.rows] == [0]


def test_a_disk_that_fills_up_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    log.checkpoint(step=torch.tensor(0))
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        log.checkpoint(step=torch.tensor(1))
    assert log.resume()["step"].item() == 0
    assert [row["step"] for row in log.rows] == [0]


def test_packages_that_only_files_need_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, "a run")
    log.append(step=1)
    log.checkpoint(w=torch.ones(2))
    with monkeypatch.context() as without:
        for name in ("pyarrow", "pyarrow.parquet", "safetensors", "safetensors.torch"):
            without.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtra, match=r"a history on disk needs pyarrow, .*: pip install pyarrow"):
            History([]).save(tmp_path / "history.parquet")
        with pytest.raises(MissingExtra, match=r"a checkpoint needs safetensors, .*: pip install safetensors"):
            log.checkpoint(w=torch.ones(2))
        with pytest.raises(MissingExtra, match="safetensors"):
            RunLog(tmp_path, "a run").resume()
    assert RunLog(tmp_path, "a run").resume()["w"].tolist() == [1.0, 1.0]
