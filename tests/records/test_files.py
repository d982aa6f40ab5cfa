"""Files that are whole or not there, JSON with a checksum, and dataclasses read from it."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from simulated_disk import Disk, Stopped, flipped

from sharpscope.errors import InvalidValue, Unusable
from sharpscope.records.fields import from_fields
from sharpscope.records.files import read_json, remove_drafts, write_json, write_whole
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog


@pytest.mark.parametrize("loss", ["none", "cut", "zeros"])
def test_there_is_the_old_file_or_the_new_one_whenever_the_machine_stops(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for calls in range(6):
        folder = tmp_path / str(calls)
        folder.mkdir()
        path, disk = folder / "file", Disk(99)
        with monkeypatch.context() as patch:
            disk.patch(patch)
            write_whole(path, b"old content")
            disk.left = calls
            with suppress(Stopped):
                write_whole(path, b"new")
        if loss != "none":
            disk.lose_power(folder, zeros=loss == "zeros")
        assert path.read_bytes() in (b"old content", b"new")
        seen.add(path.read_bytes())
        write_whole(path, b"third")
        remove_drafts(folder)
        assert os.listdir(folder) == ["file"] and path.read_bytes() == b"third"
    assert len(seen) == 2


def test_only_drafts_are_removed(tmp_path: Path) -> None:
    mine = [".hidden.tmp", "notes.tmp", ".file.1x.tmp", "file.12.tmp"]
    for name in [*mine, ".file.12.tmp"]:
        (tmp_path / name).touch()
    remove_drafts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(mine)


def test_every_changed_byte_of_a_sealed_object_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"study": "λ", "rates": [0.1, 1e-3, None], "deep": {"x": True}}
    write_json(path, value)
    content = path.read_bytes()
    assert read_json(path, set(), "that of a test", "try again") == value
    for at in range(len(content)):
        path.write_bytes(flipped(content, at))
        try:
            found = read_json(path, set(), "that of a test", "try again")
        except Unusable as error:
            assert str(error).startswith(f"{path} is not that of a test: ") and str(error).endswith("; try again")
        else:
            # white space, or the key of the checksum itself, which then counts as one of an earlier version
            assert {name: found[name] for name in value} == value


def test_every_changed_byte_of_a_log_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    for step in range(2):
        log.append(step=step, loss=0.1 / (1 + step))
    log.finish("done")
    content, rows = log.path.read_bytes(), log.rows
    for at in range(len(content)):
        log.path.write_bytes(flipped(content, at))
        try:
            found = log.rows
        except Unusable as error:
            assert "is damaged" in str(error) and not log.finished
        else:
            kept = [{name: row.get(name) for name in ("run", "step", "loss")} for row in found]
            assert kept == rows or (kept == rows[:-1] and not log.finished) or not log.finished


def test_a_table_with_a_changed_byte_is_refused_or_the_same(tmp_path: Path) -> None:
    path = tmp_path / "h.parquet"
    history = History([{"run": "a", "step": step, "loss": 1 / (1 + step), "note": None} for step in range(20)])
    history.save(path)
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 7):
        path.write_bytes(flipped(content, at))
        try:
            assert History.load(path).columns == history.columns, at
        except Unusable as error:
            assert str(path) in str(error) and "delete it and repeat the command" in str(error)
            refused += 1
    assert refused > 20


def test_a_log_that_has_lost_a_line_is_not_finished(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "a")
    for step in range(3):
        log.append(step=step)
    log.finish()
    assert log.finished
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:1] + lines[2:]))
    assert not log.finished and [row["step"] for row in log.rows] == [0, 2]


def test_a_line_for_which_there_was_no_room_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, "a")
    log.append(step=0)
    before = log.path.read_bytes()

    class Full:
        """A file that takes half of what is written, and then no more."""

        def __init__(self, path: Path) -> None:
            self.file, self.left = path.open("ab", buffering=0), 10

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def tell(self) -> int:
            return self.file.tell()

        def write(self, content: bytes) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            self.left, taken = 0, self.left
            return self.file.write(content[:taken])

    path = log.path
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        opened = Full(path)
        patch.setattr(type(path), "open", lambda *_, **__: opened)
        log.append(step=1)
    assert path.read_bytes() == before
    log.append(step=1)
    assert [row["step"] for row in log.rows] == [0, 1]


@dataclass(frozen=True)
class Kinds:
    """Fields of each kind that is told apart."""

    count: int = 0
    size: float = 1.0
    loud: bool = False
    name: str = ""
    rates: tuple[float, ...] = ()
    pair: tuple[int, str] = (0, "")
    ranges: tuple[tuple[int, int], ...] = ()
    steps: int | None = None
    groups: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}; it must not be negative")


def test_fields_come_back_from_json() -> None:
    kinds = Kinds(3, 2, True, "a", (1e-3, 2), (1, "b"), ((0, 3), (5, 9)), None, {"w": 4})
    assert from_fields(Kinds, json.loads(json.dumps(vars(kinds)))) == kinds
    assert from_fields(Kinds, {}) == Kinds()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 1.0}, "count is 1.0; it should be int"),
        ({"count": True}, "count is True; it should be int"),
        ({"size": "1"}, "size is '1'; it should be float"),
        ({"loud": 1}, "loud is 1; it should be bool"),
        ({"rates": [1, "a"]}, r"rates is \[1, 'a'\]; it should be tuple\[float, ...\]"),
        ({"pair": [1]}, "pair is"),
        ({"ranges": [[0, 1.5]]}, "ranges is"),
        ({"steps": "many"}, r"steps is 'many'; it should be int \| None"),
        ({"groups": {"w": "four"}}, "groups is"),
        ({"groups": [1]}, "groups is"),
        ({"counts": 1}, "there is no field 'counts'; did you mean 'count'?"),
        ({"count": -1}, "count is -1; it must not be negative"),
        ([1, 2], r"there should be values by name, but there is \[1, 2\]"),
    ],
)
def test_values_that_do_not_fit_are_named(values: object, sentence: str) -> None:
    with pytest.raises(InvalidValue, match=sentence):
        from_fields(Kinds, values)
