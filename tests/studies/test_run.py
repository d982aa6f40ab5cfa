"""Runs on disk: what a directory holds, and that a run that was ended in any way goes on to the last bit."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sharpscope.cli import main
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies._framework import run as study_run
from sharpscope.studies._framework.claims import KINDS
from sharpscope.studies._framework.study import Job, Progress, find

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds; a worker process imports torch first


def run(out: Path, *arguments: str) -> int:
    """The tiny study into `out`, in this process."""
    return main(["run", "tiny", "--workers", "1", "--out", str(out), *arguments])


def run_apart(out: Path, *, workers: int, waits: str = "") -> "subprocess.Popen[str]":
    """The same in a process group of its own; the job `waits` stops half-way until it is ended."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests/run_tiny.py")]
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TINY_WAITS": waits}
    return subprocess.Popen(
        [*command, "run", "tiny", "--workers", str(workers), "--out", str(out)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in table.splitlines()]
    return [int(pid) for pid, pgid, state in lines if int(pgid) == group and not state.startswith("Z")]


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status and standard error of a process that ends and leaves none of its workers behind."""
    _, said = process.communicate(timeout=PATIENCE)
    until(lambda: not members(process.pid))
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        import sharpscope.studies

        patch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, str(ROOT / "tests/tiny_studies")])
        assert run(out) == 0
    yield out


def same_history(out: Path, whole: Path) -> bool:
    return (out / "history.parquet").read_bytes() == (whole / "history.parquet").read_bytes()


def test_a_run_directory_holds_what_it_promises(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["study"] == "tiny"
    assert config["config"]["walks"] == [0.01, 0.001]
    history = History.load(whole / "history.parquet")
    assert set(history.runs) == {
        "descent",
        "heavy ball on batches",
        "spare",
        "plain walk",
        *(f"{toy}, il {il}" for toy in ("A1", "A3") for il in ("0.01", "0.001")),
    }
    assert history.series("descent", "step").tolist() == [0, 1, 2, 3, 5, 6, 9, 10, 12]
    verdicts = json.loads((whole / "verdicts.json").read_text())
    assert [v["claim"].partition(" (")[0] for v in verdicts] == [
        "The run goes to its end",
        "Nothing is in the way",
        "The spare run fits",
        "Batches fit as well",
    ]
    for v in verdicts:
        assert {"study", "claim", "observed", "criterion", "kind", "passed"} <= v.keys()
        assert v["study"] == "tiny" and v["kind"] in KINDS and isinstance(v["passed"], bool)
    assert (whole / "figures/fit.png").read_bytes().startswith(b"\x89PNG")
    page = (whole / "report.html").read_text()
    assert "Small things happen quickly" in page and "Nobody, On Small Things" in page
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["stopped"] == {}
    assert environment["torch"] and environment["python"]


def test_a_finished_run_is_not_computed_again(
    whole: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(study_run, "_work", never)
    before = (whole / "history.parquet").stat().st_mtime_ns
    (whole / "report.html").unlink()
    (whole / "verdicts.json").unlink()
    assert run(whole) == 0
    assert (whole / "report.html").exists() and (whole / "verdicts.json").exists()
    assert (whole / "history.parquet").stat().st_mtime_ns == before
    first = capsys.readouterr().out
    assert main(["report", str(whole)]) == 0
    assert capsys.readouterr().out == first
    assert "3 of 3 deciding claims hold" in first


def waiting(out: Path) -> set[str]:
    """Names of the log files of jobs that have stopped half-way."""
    return {path.stem for path in out.glob("log/*.waits")}


STOPPED = "sharpscope: stopped; the same command goes on from the last checkpoint"


def test_a_killed_run_goes_on_to_the_last_bit(whole: Path, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = run_apart(out, workers=1, waits="plain walk")
    until(lambda: waiting(out))
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert list(out.glob("log/*.safetensors"))
    assert not (out / "history.parquet").exists()
    assert run(out) == 0
    assert same_history(out, whole)


def test_a_run_on_two_workers_survives_a_kill_and_then_ctrl_c(whole: Path, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = run_apart(out, workers=2, waits="all")
    until(lambda: len(waiting(out)) == 2)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL  # its workers end with it, or they would write on beside the next run
    first = waiting(out)
    assert len(list(out.glob("log/*.safetensors"))) == 2
    process = run_apart(out, workers=2, waits="plain walk")
    until(lambda: waiting(out) - first)
    until(lambda: sum(b'"finished"' in path.read_bytes() for path in out.glob("log/*.jsonl")) == 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    status, said = end(process)
    assert (status, said.strip()) == (130, STOPPED)
    assert run(out) == 0
    assert same_history(out, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_soon_after_the_start_is_answered_with_a_sentence(workers: int, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = run_apart(out, workers=workers, waits="all")
    if workers == 1:
        until(lambda: waiting(out))
    else:
        until(lambda: len(members(process.pid)) >= 1 + workers)
        time.sleep(0.1)  # the workers are busy with their imports
    os.killpg(process.pid, signal.SIGINT)
    status, said = end(process)
    assert (status, said.strip()) == (130, STOPPED)


def killed(log: RunLog, progress: Progress) -> None:
    log.append(step=0)
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_space(log: RunLog, progress: Progress) -> None:
    log.append(step=0)
    raise OSError(errno.ENOSPC, "No space left on device", str(log.path))


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (killed, "a worker process was killed (out of memory? --workers 1 needs the least); what is in {out} is kept"),
        (out_of_space, "cannot write the run in {out}: No space left on device: '{out}/log"),
    ],
)
def test_a_worker_that_fails_is_reported(
    work: Callable[..., None],
    sentence: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(find(tiny), "jobs", lambda config: [Job("one", work)])
    assert main(["run", "tiny", "--workers", "2", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert sentence.format(out=tmp_path) in said
    assert RunLog(tmp_path / "log", "one").rows == [{"run": "one", "step": 0}]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after(lines: int) -> Callable[[RunLog, dict[str, Any]], None]:
    """A log that takes so many lines and half of the next."""
    write, left = RunLog._write, [lines]

    def limited(self: RunLog, line: dict[str, Any]) -> None:
        if not left[0]:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode()[:20])
            full()
        left[0] -= 1
        write(self, line)

    return limited


def half(self: Path, content: bytes) -> int:
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])
    full()
    return 0


FULL = {
    "at once": (Path, "write_bytes", half),
    "at the first row": (RunLog, "_write", full_after(0)),
    "at some row": (RunLog, "_write", full_after(7)),
    "at a checkpoint": (RunLog, "checkpoint", full),
    "at the end of a job": (RunLog, "finish", full),
    "at the table": (History, "save", full),
    "at the figures": (study_run, "save_figures", full),
    "at the report": (study_run, "write_report", full),
}


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_keeps_what_is_there(
    when: str, whole: Path, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FULL[when])
        assert run(out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot write the run in {out}: No space left on device" in said
    assert "the same command goes on from it" in said
    logged = {path: path.read_bytes() for path in out.glob("log/*.jsonl")}
    assert run(out) == 0
    assert same_history(out, whole)
    finished = [content for content in logged.values() if b'"finished"' in content]
    assert all(content in [path.read_bytes() for path in out.glob("log/*.jsonl")] for content in finished)


def test_a_diverging_run_says_where_and_why(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    wild = ("--norm", "none", "--learning-rate", "1000", "--weight-decay", "0")
    assert run(out, *wild) == 1
    said = capsys.readouterr().out
    note = json.loads((out / "environment.json").read_text())["stopped"]["descent"]
    assert note.startswith("diverged at step 2: loss ")
    assert f"stop descent: {note}" in said
    assert note in (out / "report.html").read_text()
    assert RunLog(out / "log", "descent").note == note
    steps = History.load(out / "history.parquet").series("descent", "step")
    assert steps.tolist() == [0, 1]  # what was measured before is kept
    passed = {v["claim"]: v["passed"] for v in json.loads((out / "verdicts.json").read_text())}
    assert not passed["The run goes to its end (last step, over those asked for)"]
    assert not passed["The spare run fits (loss)"]
    assert run(out, *wild) == 1  # a run that broke off is finished: it would break off again
    assert f"stop descent: {note}" in capsys.readouterr().out


def test_claims_on_runs_that_are_left_out_are_named(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(out, "--quick") == 0
    assert "2 of 2 deciding claims hold" in capsys.readouterr().out
    assert "spare" not in History.load(out / "history.parquet").runs
    assert "The spare run fits" not in (out / "verdicts.json").read_text()
    page = (out / "report.html").read_text()
    assert page.index("claims that need other sizes") < page.index("The spare run fits (loss)")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "silent", "--quick") == 0
    assert capsys.readouterr().err == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert run(tmp_path / "shown", "--quick") == 0
    assert "100%" in screen.getvalue()


def test_a_directory_in_use_is_refused(tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out") == 0
    (tmp_path / "out" / "history.parquet").unlink()
    with (tmp_path / "out" / "log" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(tmp_path / "out") == 2
    assert "another process is running" in capsys.readouterr().err
    assert run(tmp_path / "out") == 0
