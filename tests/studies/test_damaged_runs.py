"""Run directories after a kill or a power cut between any two writes, and with any file damaged in any way."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated_disk
from simulated_disk import DAMAGES, Disk, Stopped, damage

import sharpscope.studies
from sharpscope.cli import _watch, main
from sharpscope.errors import SharpscopeError
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies._framework import batch, study

FOLDER = str(Path(__file__).parents[1] / "brief_studies")
OTHERS = str(Path(__file__).parents[1] / "tiny_studies")


def run(out: Path) -> int:
    return main(["run", "brief", "--quick", "--workers", "1", "--out", str(out)])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study is found, the disk is not waited for, and all runs take the same time."""
    monkeypatch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, FOLDER, OTHERS])
    monkeypatch.setattr(study, "entry_points", lambda group: ())  # to look for them takes longer than a run
    simulated_disk.undisturbed(monkeypatch)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, FOLDER])
        patch.setattr(time, "process_time", lambda: 0.0)
        assert run(out) == 0
    yield out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run that was killed at its last row: one job is done, the other has a checkpoint."""
    out = tmp_path_factory.mktemp("begun") / "run"
    append = RunLog.append

    def killed(self: RunLog, **row: Any) -> None:
        append(self, **row)
        if self.run == "walk 0.25" and row["step"] == 2:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, FOLDER])
        patch.setattr(time, "process_time", lambda: 0.0)
        patch.setattr(RunLog, "append", killed)
        with pytest.raises(Stopped):
            run(out)
    assert len(list(out.glob("log/*.safetensors"))) == 1
    yield out


def contents(out: Path, *patterns: str) -> dict[str, bytes]:
    """Files by name; that of processor seconds is not written where a kill came before it."""
    paths = [path for pattern in patterns or ("**/*",) for path in out.glob(pattern)]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if p.is_file() and p.suffix != ".seconds"}


def same_results(out: Path, whole: Path) -> None:
    """Demand the columns of the other run, its verdicts, and its configuration."""
    columns = [History.load(directory / "history.parquet").columns for directory in (out, whole)]
    assert columns[0] == columns[1]  # not the bytes: some of a Parquet file say nothing
    assert contents(out, "verdicts.json", "config.json") == contents(whole, "verdicts.json", "config.json")


def names(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("loss", ["none", "what was not on the disk", "zeros in its place"])
def test_a_run_that_stops_between_any_two_writes_goes_on_to_the_same_files(
    loss: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost but the steps since the last checkpoint that was finished."""
    checkpoint, last_checkpoint = RunLog.checkpoint, RunLog.last_checkpoint
    finished: dict[str, int] = {}
    taken_up: dict[str, int] = {}

    def noted(self: RunLog, **state: Any) -> None:
        checkpoint(self, **state)
        finished[self.run] = int(state["step"])

    def seen(self: RunLog) -> Any:
        state = last_checkpoint(self)
        taken_up[self.run] = int(state["step"]) if state else -1
        return state

    stops = 0
    while True:
        out = tmp_path / f"after {stops}"
        finished.clear()
        disk = Disk(stops)
        with monkeypatch.context() as patch:
            disk.patch(patch)
            patch.setattr(RunLog, "checkpoint", noted)
            try:
                assert run(out) == 0
                break
            except Stopped:
                pass
        if loss != "none":
            disk.lose_power(out, zeros=loss.startswith("zeros"))
        taken_up.clear()
        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "last_checkpoint", seen)
            assert run(out) == 0, stops
        assert contents(out) == contents(whole), stops
        for job, step in taken_up.items():
            assert step >= finished.get(job, -1), (stops, job)
        stops += 1
    assert stops > 25  # writes of a run


def cases(of: str) -> list[tuple[str, str]]:
    """Each file of a run (by its ending, where the name has a digest) with each damage."""
    done = ["config.json", "environment.json", "history.parquet", "verdicts.json", "report.html"]
    done += ["log/walk_0.5-*.jsonl", "log/walk_0.25-*.jsonl", "log/walk_0.5-*.seconds", "log/lock"]
    begun = ["config.json", "log/walk_0.5-*.jsonl", "log/walk_0.25-*.jsonl", "log/walk_0.25-*.safetensors", "log/lock"]
    return [(file, kind) for file in (done if of == "done" else begun) for kind in DAMAGES]


def damaged(source: Path, out: Path, file: str, kind: str) -> Path:
    """A copy of a run with one of its files damaged; the path of that file."""
    shutil.copytree(source, out)
    (path,) = out.glob(file)
    if path.stat().st_size or kind in ("missing", "empty", "foreign"):
        damage(path, kind)
    return path


def answered(status: int, said: str, out: Path, whole: Path, file: str) -> None:
    """Demand the numbers of an uninterrupted run, or one sentence that names what is wrong."""
    if status == 2:
        assert said.startswith("sharpscope: ") and said.count("\n") == 1 and len(said) > 40
        assert str(out) in said
        assert "Error" not in said
    else:
        assert (status, said) == (0, "")
        same_results(out, whole)


@pytest.mark.parametrize(("file", "kind"), cases("begun"))
def test_a_run_goes_on_from_damaged_files(
    file: str, kind: str, begun: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    damaged(begun, out, file, kind)
    try:
        page = _watch.page(out)
        assert page is None or "Brief things" in page
    except SharpscopeError as error:
        assert str(out) in str(error) and len(str(error)) > 40
    status = run(out)
    answered(status, capsys.readouterr().err, out, whole, file)
    if file != "config.json":
        assert status == 0
        assert contents(out, "log/*.jsonl", "log/*.safetensors") == contents(whole, "log/*.jsonl", "log/*.safetensors")


@pytest.mark.parametrize(("file", "kind"), cases("done"))
@pytest.mark.parametrize("command", ["run", "report"])
def test_damaged_files_of_a_finished_run_are_made_again_or_named(
    file: str, kind: str, command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    path = damaged(whole, out, file, kind)
    left = path.read_bytes() if path.exists() else None
    try:
        page = _watch.page(out)
        assert page is None or "Brief things" in page
    except SharpscopeError as error:
        assert str(out) in str(error) and len(str(error)) > 40
    status = run(out) if command == "run" else main(["report", str(out)])
    answered(status, capsys.readouterr().err, out, whole, file)
    may_fail = file == "config.json" or (command, file, kind) == ("report", "history.parquet", "missing")
    assert status == 0 or may_fail
    if status and left is not None:
        assert path.read_bytes() == left  # what is refused is not written over


@pytest.mark.parametrize("file", ["history.parquet", "environment.json"])
@pytest.mark.parametrize("kind", ["half", "flipped at 3/8"])
def test_without_its_rows_a_damaged_run_is_refused_by_report_and_computed_again_by_run(
    file: str, kind: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    damaged(whole, out, file, kind)
    shutil.rmtree(out / "log")
    before = names(out)
    assert main(["report", str(out)]) == 2
    said = capsys.readouterr().err
    assert str(out / file) in said and "its `sharpscope run` command goes on" in said and said.count("\n") == 1
    assert names(out) == before
    assert run(out) == 0
    same_results(out, whole)


EDITS: dict[str, tuple[Any, str]] = {
    "wrong type": ({"steps": "many"}, "steps is 'many'; it should be int"),
    "a fraction": ({"steps": 2.5}, "steps is 2.5; it should be int"),
    "a flag": ({"steps": True}, "steps is True; it should be int"),
    "a number for many": ({"rates": 0.5}, "rates is 0.5; it should be tuple[float, ...]"),
    "a wrong part": ({"rates": [0.5, None]}, "rates is [0.5, None]; it should be tuple[float, ...]"),
    "null": ({"title": None}, "title is None; it should be str"),
    "unknown": ({"stepps": 3}, "there is no field 'stepps'; did you mean 'steps'?"),
    "refused": ({"steps": -1}, "steps is -1; it must be positive"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("command", ["report", "watch"])
def test_an_edited_configuration_is_answered_with_a_sentence(
    edit: str, command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    request = json.loads((out / "config.json").read_text())
    del request["crc32"]  # as in a directory of an earlier version
    change, sentence = EDITS[edit]
    request["config"] |= change
    (out / "config.json").write_text(json.dumps(request))
    if command == "watch":
        with pytest.raises(SharpscopeError, match="does not fit the study brief") as caught:
            _watch.page(out)
        said = str(caught.value)
    else:
        assert main(["report", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
    assert f"{out / 'config.json'} does not fit the study brief: {sentence}" in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"study": "brief"}', "it has no 'config'"),
        ('{"study": 3, "config": {}}', "it names no study"),
        ('{"study": "brief", "config": [3]}', "its 'config' has no fields"),
        ('{"study": "brief", "config": {"steps": 5', "it is empty, cut short or no JSON"),
        ("[]", "it is no JSON object"),
    ],
)
def test_what_is_no_configuration_is_named(
    content: str, sentence: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "config.json").write_text(content)
    for command in (["report", str(out)], ["run", "brief", "--quick", "--out", str(out)], ["watch", str(out)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{out / 'config.json'} is not that of a run of sharpscope: {sentence}" in said
        assert said.count("\n") == 1


def test_a_directory_of_an_earlier_version_has_no_checksums_and_is_taken_as_it_is(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "config.json", out / "environment.json", *out.glob("log/*.jsonl")):
        stripped = [
            {name: value for name, value in json.loads(line).items() if name not in ("crc32", "lines")}
            for line in ([path.read_text()] if path.suffix == ".json" else path.read_text().splitlines())
        ]
        path.write_text("".join(json.dumps(part) + "\n" for part in stripped))
    assert main(["report", str(out)]) == 0
    assert not math.isnan(json.loads((out / "verdicts.json").read_text())[0]["observed"])
    (out / "history.parquet").unlink()
    assert run(out) == 0
    assert contents(out, "history.parquet", "verdicts.json") == contents(whole, "history.parquet", "verdicts.json")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["all.json", "seeds.json"])
def test_a_batch_with_a_damaged_description_goes_on_or_is_named(
    file: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "known", lambda: ["small"])
    monkeypatch.setattr(small := study.find("small"), "CHARTS", ())
    out = tmp_path / "out"
    monkeypatch.setattr(small, "QUICK", small.Config(steps=3, walks=1))
    command = ["run", "all", "--quick"] if file == "all.json" else ["run", "small", "--quick", "--seeds", "2"]
    command += ["--workers", "1", "--out", str(out)]
    assert main(command) == 0
    whole = contents(out, "**/history.parquet")
    damage(out / file, kind)
    capsys.readouterr()
    for again in (["report", str(out)], command):
        status = main(again)
        said = capsys.readouterr().err
        if status == 2:
            assert str(out) in said and said.count("\n") == 1 and len(said) > 40 and "Error" not in said
        else:
            assert (status, said) == (0, "")
    assert status == 0 or kind == "missing"
    assert contents(out, "**/history.parquet") == whole
