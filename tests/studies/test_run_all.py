"""Several runs at once: all studies side by side, one study under several seeds, and the pages over them."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import Elements
from test_run import ROOT, STOPPED, end, members, until, waiting

import sharpscope.studies
from sharpscope.cli import _studies, main
from sharpscope.records.run_log import RunLog
from sharpscope.studies._framework import batch
from sharpscope.studies._framework.claims import WIDER, Claim, Verdict, at_most, median, within
from sharpscope.studies._framework.pages import duration
from sharpscope.studies._framework.run import ERROR
from sharpscope.studies._framework.seeds import fraction_interval, median_interval, repeated_claims, spread
from sharpscope.studies._framework.study import find


@pytest.fixture
def both(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run all` means the two tiny studies."""
    monkeypatch.setattr(batch, "known", lambda: ["small", "tiny"])
    monkeypatch.setattr(_studies, "WORKERS", 1)  # of `report`: worker processes would not find them


def run_all(out: Path, *arguments: str) -> int:
    return main(["run", "all", "--quick", "--workers", "1", "--out", str(out), *arguments])


def all_apart(out: Path, *arguments: str, waits: str = "") -> "subprocess.Popen[str]":
    """Both studies on two workers, in a process group of its own."""
    command = [
        sys.executable,
        "-W",
        "error",
        str(ROOT / "tests/run_tiny.py"),
        "run",
        "all",
        "--quick",
        "--workers",
        "2",
    ]
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TINY_WAITS": waits, "TINY_ALL": "small tiny"}
    return subprocess.Popen(
        [*command, "--out", str(out), *arguments],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both studies, one after the other."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, str(ROOT / "tests/tiny_studies")])
        for name in ("small", "tiny"):
            assert main(["run", name, "--quick", "--workers", "1", "--out", str(out / name)]) == 0
    yield out


def same(out: Path, alone: Path) -> bool:
    pairs = [((p / name / "history.parquet").read_bytes() for p in (out, alone)) for name in ("small", "tiny")]
    return all(a == b for a, b in pairs)


def test_side_by_side_gives_what_one_after_the_other_gives(
    alone: Path, both: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = all_apart(tmp_path / "out")
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert same(tmp_path / "out", alone)
    for name in ("small", "tiny"):
        assert {p.name for p in (tmp_path / "out" / name).iterdir()} == {p.name for p in (alone / name).iterdir()}
        assert (tmp_path / "out" / name / "verdicts.json").read_text() == (alone / name / "verdicts.json").read_text()
    assert printed.splitlines()[:2] == [
        "ok   small  2 of 2 deciding claims hold, 1 wider not supported here",
        "ok   tiny   2 of 2 deciding claims hold",
    ]
    assert printed.endswith(f"page: {tmp_path / 'out/index.html'}\n")
    (tmp_path / "out/index.html").unlink()
    (tmp_path / "out/tiny/report.html").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "out/index.html").read_text().count("<img ") == 2  # a picture of each
    assert (tmp_path / "out/tiny/report.html").exists()


def test_a_killed_run_of_all_goes_on_to_the_last_bit(alone: Path, both: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = all_apart(out, waits="all")
    until(lambda: sum(len(waiting(path)) for path in out.glob("*")) == 2)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert not list(out.glob("*/history.parquet"))
    process = all_apart(out, waits="small, walk 1")
    until(lambda: (out / "tiny/report.html").exists() and list(out.glob("small/log/walk_1*.waits")))
    until(lambda: "still running" in (out / "index.html").read_text() and "tiny/" in (out / "index.html").read_text())
    os.killpg(process.pid, signal.SIGINT)
    status, said = end(process)
    assert (status, said.strip()) == (130, STOPPED)
    before = (out / "tiny/history.parquet").stat().st_mtime_ns
    assert run_all(out) == 0
    assert same(out, alone)
    assert (out / "tiny/history.parquet").stat().st_mtime_ns == before
    assert "still running" not in (out / "index.html").read_text()


@pytest.mark.parametrize("where", ["job", "jobs", "claim", "import"])
def test_a_broken_study_does_not_take_the_others_down(
    where: str, both: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "import":
        (tmp_path / "more").mkdir()
        (tmp_path / "more/wrong.py").write_text("import <b>")
        monkeypatch.setattr(sharpscope.studies, "__path__", [*sharpscope.studies.__path__, str(tmp_path / "more")])
        monkeypatch.setattr(batch, "known", lambda: ["tiny", "wrong"])
        sentence, name = "wrong cannot be imported: SyntaxError: invalid syntax", "wrong"
    else:
        monkeypatch.setattr(find("small"), "QUICK", find("small").Config(raises=where))
        name = "small"
        sentence = {
            "job": "'walk 0' raised KeyError: 'no\\nway' (small.py, line ",
            "jobs": "the study small raised RuntimeError: no jobs (small.py, line ",
            "claim": "'verdicts and figures' raised RuntimeError: no <i>claim</i> (small.py, line ",
        }[where]
    out = tmp_path / "out"
    assert run_all(out) == 2
    printed, said = capsys.readouterr()
    assert said.startswith(f"sharpscope: {sentence}") and said.count("\n") == 1
    assert re.search(f"^none {name} +could not run$", printed, re.MULTILINE)
    assert "ok   tiny" in printed and (out / "tiny/report.html").exists()
    page = (out / "index.html").read_text()
    assert "Could not run" in page and "<i>claim" not in page and "import <b>" not in page
    if where != "import":
        assert "Traceback" in (out / "small" / ERROR).read_text() and f"(see {out / 'small' / ERROR})" in said
    if where == "job":
        assert not RunLog(out / "small/log", "walk 0").finished


def test_a_killed_worker_costs_one_study(both: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = all_apart(out, waits="small, walk 1")
    until(lambda: list(out.glob("small/log/walk_1*.waits")) and (out / "tiny/report.html").exists())
    commands = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in commands.splitlines()]
    workers = [int(pid) for pid, parent, args in rows if int(parent) == process.pid and "spawn_main" in args]
    assert len(workers) == 2 and set(workers) < set(members(process.pid))
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    status, said = end(process)
    assert status == 2
    assert said.startswith("sharpscope: a worker process was killed (out of memory?") and said.count("\n") == 1
    assert f"what is in {out / 'small'} is kept" in said


def test_the_page_over_all_studies(both: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = find("small")
    monkeypatch.setattr(small, "PAPER", "<script>alert(1)</script>")
    fails = Claim("Fails <img src=x>", lambda h, c: math.nan, at_most(1), "identity", "Walks", ("walk 0",))
    monkeypatch.setattr(small, "CLAIMS", (*small.CLAIMS, fails))
    assert run_all(tmp_path) == 1
    page = (tmp_path / "index.html").read_text()
    tags = Elements(page).tags
    assert [tag for tag, _ in tags if tag in ("script", "img")] == ["img", "img"]  # a picture of each study
    assert "Smaller things happen &lt;b&gt;more&lt;/b&gt; quickly" in page
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {"study-small", "study-tiny", "small-1"} <= set(ids)
    links = [str(attrs["href"]) for tag, attrs in tags if tag == "a"]
    assert {"small/report.html", "tiny/report.html"} <= set(links)
    assert all((tmp_path / link).exists() if link[0] != "#" else link[1:] in ids for link in links)
    assert "&lt;script&gt;alert(1)" in page and "Fails &lt;img src=x&gt;" in page
    assert "<b>Not supported here:</b> All walks lead to Rome: 3 (at most 2)" in page
    assert "2 of 3 deciding claims hold" in page and "2 of 2 negative controls behave" in page


def test_quick_and_full_are_told_apart(both: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["run", "small", "--full", "--workers", "1", "--out", out]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["config"]["steps"] == 40
    for name in ("small", "all"):
        assert main(["run", name, "--quick", "--full", "--out", out]) == 2
        assert "--quick and --full contradict each other; give one of them" in capsys.readouterr().err
    assert run_all(tmp_path / "all") == 0
    assert main(["run", "all", "--full", "--out", str(tmp_path / "all")]) == 2
    assert "holds the quick studies, not the full ones; choose another --out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    mine = ["--quick", "--workers", "1", "--out", str(tmp_path / "mine")]
    for arguments in (["all"], ["small", "--seeds", "2"]):
        assert main(["run", *arguments, *mine]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "is not empty and holds no run of sharpscope; choose another --out" in said
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_seeds_repeat_a_study(both: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    arguments = ["run", "small", "--quick", "--workers", "1", "--out", str(out)]
    assert main([*arguments, "--seeds", "2", "--seed", "3"]) == 0
    assert "2 of 2 deciding claims hold on 2 seeds" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "seed-3", "seed-4", "seeds.json"]
    assert json.loads((out / "seed-4/config.json").read_text())["config"]["seed"] == 4
    assert main([*arguments, "--seed", "3"]) == 0  # a single run beside them
    whole = (out / "history.parquet").read_bytes()
    assert whole == (out / "seed-3/history.parquet").read_bytes() != (out / "seed-4/history.parquet").read_bytes()
    told = json.loads((out / "seeds.json").read_text())
    assert told["seeds"] == [3, 4]
    ends, middle = told["claims"][:2]
    runs = [json.loads((out / f"seed-{seed}/verdicts.json").read_text())[0]["observed"] for seed in (3, 4)]
    assert [s["label"] for s in ends["spreads"]] == ["least", "greatest"]
    assert ends["spreads"][1]["high"] == max(map(max, runs)) and ends["spreads"][0]["interval"] is None
    assert (ends["passes"], ends["seeds"], ends["passed"]) == (2, 2, True)
    assert middle["spreads"][0]["low"] == min(sorted(run)[1] for run in runs)
    page = (out / "index.html").read_text()
    assert "With 2 seeds there is no 95 % interval of a median" in page and 'href="seed-4/report.html"' in page
    assert "Walks end &lt;near&gt; where they begin" in page
    for path in (out / "config.json", out / "index.html"):
        path.unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "index.html").read_text() == page
    (out / "seed-4/history.parquet").unlink()
    assert main(["report", str(out)]) == 2
    assert f"the run in {out / 'seed-4'} is not finished" in capsys.readouterr().err


def test_seeds_of_all(both: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all(tmp_path, "--seeds", "6") == 0
    printed = capsys.readouterr().out
    assert "ok   small  2 of 2 deciding claims hold on 6 seeds, 1 wider not supported here\n" in printed
    assert "ok   tiny   2 of 2 deciding claims hold (Has no seed: ran once.)\n" in printed
    page = (tmp_path / "index.html").read_text()
    assert "On 6 seeds." in page and "Has no seed: ran once." in page and 'href="small/index.html"' in page
    assert "(within [-20, 20], on 6 of 6 seeds)" in page or "within [-20, 20], on 6 of 6 seeds" in page
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds several runs (all.json): watch one" in capsys.readouterr().err


def test_seeds_that_cannot_be_are_refused(both: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["tiny", "--seeds", "2"], "tiny has no field 'seed', so there is nothing to repeat; leave --seeds out"),
        (["small", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
    ):
        assert main(["run", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def verdict(observed: Any, passed: bool, **more: Any) -> Verdict:
    return Verdict("s", "c", observed, "", more.pop("kind", "identity"), passed, **more)


def test_a_claim_holds_over_seeds_if_it_holds_on_nine_of_ten() -> None:
    claim = Claim("c", lambda h, c: 0, within(0, 1), "identity", runs=("a",))
    control = Claim("c", lambda h, c: 0, within(0, 1), "negative control", runs=("a",))
    for held, usual, strict in ((10, True, True), (9, True, False), (8, False, False)):
        runs = [[verdict(float(i), i < held)] for i in range(10)]
        assert [repeated_claims([c], runs)[0].verdict.passed for c in (claim, control)] == [usual, strict]
    (r,) = repeated_claims([claim], [[verdict((1.0, 3.0), True)], [verdict((2.0, math.nan), False)]])
    assert r.verdict.criterion == "within [0, 1], on 2 of 2 seeds"
    (one,) = repeated_claims(
        [Claim("c", lambda h, c: 0, median(at_most(1)), WIDER, runs=("a",))], [[verdict((3.0, 1, 2), True)]]
    )
    assert [s.median for s in one.spreads] == [2.0]
    assert repeated_claims([claim], [[verdict(1.0, True)], []]) == []  # left out where a run did not decide it
    assert spread("", [math.nan, 1.0]).missing == 1 and math.isnan(spread("", [math.nan]).median)


def test_intervals_are_those_of_the_textbooks() -> None:
    """Against the binomial distribution of scipy: coverage of order statistics, and Clopper and Pearson's beta form."""
    from scipy.stats import beta, binom

    for n in range(1, 40):
        ends = median_interval(list(range(1, n + 1)))
        k = 0 if ends is None else int(ends[0])
        assert ends is None or ends[1] == n + 1 - k
        assert 1 - 2 * binom.cdf(k - 1, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(k, n, 0.5)
        for held in {0, 1, n // 2, n}:
            low, high = fraction_interval(held, n)
            assert low == pytest.approx(beta.ppf(0.025, held, n - held + 1) if held else 0, abs=1e-12)
            assert high == pytest.approx(beta.ppf(0.975, held + 1, n - held) if held < n else 1, abs=1e-12)


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599, 7260)] == ["0 s", "1 min 0 s", "59 min 59 s", "2 h 1 min"]
