"""Histories and tracks: what is written comes back, also after a kill, a torn line or a full disk."""

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

from sharpscope.records.history import History
from sharpscope.records.run_log import Track

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
    track = Track(tmp_path, "a")
    assert (track.rows, track.finished, track.note) == ([], False, "")
    assert track.resume() == {}
    track.append(step=0, loss=0.1 + 0.2)
    track.append(step=1, loss=1e-300, text="line\nbreak θ\u2028\x85")
    assert track.rows == [
        {"run": "a", "step": 0, "loss": 0.1 + 0.2},
        {"run": "a", "step": 1, "loss": 1e-300, "text": "line\nbreak θ\u2028\x85"},
    ]
    assert not track.finished
    track.finish("diverged at step 2")
    assert track.finished
    assert Track(tmp_path, "a").note == "diverged at step 2"
    assert len(track.rows) == 2


def test_numbers_that_json_has_no_word_for_become_empty(tmp_path: Path) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0, nan=math.nan, inf=math.inf, minus=-math.inf, fine=1.0)
    assert track.rows == [{"run": "a", "step": 0, "nan": None, "inf": None, "minus": None, "fine": 1.0}]
    json.loads(track.log.read_text(), parse_constant=pytest.fail)  # strict JSON
    assert History(track.rows).series("a", "nan").size == 0


def test_runs_never_share_a_file(tmp_path: Path) -> None:
    tracks = [Track(tmp_path, name) for name in ODD]
    # file systems may ignore case and normalize accents; none of that may bring two runs together
    assert len({track.log.name.casefold() for track in tracks}) == len(ODD)
    for i, track in enumerate(tracks):
        track.append(step=i)
        track.checkpoint(step=torch.tensor(i))
    for i, name in enumerate(ODD):
        again = Track(tmp_path, name)
        assert again.rows == [{"run": name, "step": i}]
        assert again.resume()["step"].item() == i
    assert all(path.parent == tmp_path and path.name.isascii() for path in tmp_path.iterdir())


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    track = Track(tmp_path, "a")
    for step in range(3):
        track.append(step=step)
    os.truncate(track.log, track.log.stat().st_size - 5)
    assert [row["step"] for row in track.rows] == [0, 1]


def test_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0)
    track.checkpoint(w=torch.tensor([0.1, 0.2], dtype=torch.float64), step=torch.tensor(0))
    kept = track.log.read_bytes()
    track.append(step=1)
    track.append(step=2)
    os.truncate(track.log, track.log.stat().st_size - 3)
    state = Track(tmp_path, "a").resume()
    assert torch.equal(state["w"], torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert state["step"].item() == 0
    assert track.log.read_bytes() == kept
    track.append(step=1)
    assert [row["step"] for row in track.rows] == [0, 1]


def test_without_a_checkpoint_a_run_starts_afresh(tmp_path: Path) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0)
    assert track.resume() == {}
    assert track.rows == []


@pytest.mark.parametrize("lost", ["all", "some"])
def test_a_log_shorter_than_its_checkpoint_means_a_fresh_start(tmp_path: Path, lost: str) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0)
    track.checkpoint(step=torch.tensor(0))
    if lost == "all":
        track.log.unlink()
    else:
        os.truncate(track.log, 4)
    assert track.resume() == {}
    assert track.rows == []


def test_checkpoints_take_every_kind_of_tensor(tmp_path: Path) -> None:
    track = Track(tmp_path, "a")
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
    track.checkpoint(**state)
    back = track.resume()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in state.items())


class Killed(BaseException):
    """The process ends here."""


def simulate(folder: Path, steps: int, killed_at: float = math.inf) -> Track:
    """A random walk of momentum: rows each step, a checkpoint every third; everything that it is made of is saved."""
    track, draw = Track(folder, "walk/1"), torch.Generator().manual_seed(0)
    state = track.resume()
    w = state.get("w", torch.ones(3, dtype=torch.float64) / 3)
    b = state.get("b", torch.zeros(3, dtype=torch.float64))
    first = int(state["step"]) + 1 if state else 0
    if state:
        draw.set_state(state["draw"])
    for step in range(first, steps):
        b = 0.9 * b + w.sin() + torch.randn(3, generator=draw, dtype=torch.float64)
        w = w - 0.1 * b
        track.append(step=step, loss=(w @ w).item(), odd=math.nan if step % 2 else 1 / 3)
        if step >= killed_at:
            with track.log.open("ab") as file:
                file.write(b'{"run": "walk/1", "st')
            raise Killed
        if step % 3 == 0:
            track.checkpoint(w=w, b=b, step=torch.tensor(step), draw=draw.get_state())
    track.finish()
    return track


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    whole = simulate(tmp_path / "whole", 20)
    for killed_at in (1, 7, 9, 19):  # before there is a checkpoint worth having, between two, at one, at the end
        with pytest.raises(Killed):
            simulate(tmp_path / "killed", 20, killed_at)
    resumed = simulate(tmp_path / "killed", 20)
    assert resumed.log.read_bytes() == whole.log.read_bytes()
    assert resumed.finished
    assert not resumed.state.exists()


def test_a_crash_before_the_replacement_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0)
    track.checkpoint(step=torch.tensor(0))
    track.append(step=1)

    def crash(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", crash)
        track.checkpoint(step=torch.tensor(1))
    assert Track(tmp_path, "a").resume()["step"].item() == 0
    assert [row["step"] for row in track.rows] == [0]
    track.checkpoint(step=torch.tensor(2))  # what the crash left behind is not in the way
    assert track.resume()["step"].item() == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0)
    track.checkpoint(step=torch.tensor(0))
    kept = track.log.rename(tmp_path / "kept")
    track.log.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        track.append(step=1)
    with pytest.raises(OSError, match="No space left"):
        track.finish()
    assert track.state.exists()  # a run that could not be marked as complete keeps its checkpoint
    track.log.unlink()
    kept.rename(track.log)
    assert track.resume()["step"].item() == 0
    assert [row["step"] for row in track.rows] == [0]


def test_a_disk_that_fills_up_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = Track(tmp_path, "a")
    track.append(step=0)
    track.checkpoint(step=torch.tensor(0))
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        track.checkpoint(step=torch.tensor(1))
    assert track.resume()["step"].item() == 0
    assert [row["step"] for row in track.rows] == [0]
