"""The command line: what it prints, and its exit status; whatever cannot be done is said in one sentence."""

import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from sharpscope import cli
from sharpscope.studies._framework.study import discover, headings


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and standard error, which must be one line when nothing could be run."""
    status = cli.main(arguments)
    said = capsys.readouterr().err
    if status == 2:
        assert said.startswith("sharpscope: ") and said.count("\n") == 1, said
    return status, said


def test_list_names_studies_papers_and_claims(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"tiny", "lyu2022"} <= discover().keys() and len(lines) == len(discover())
    for line, (name, study) in zip(lines, discover().items(), strict=True):
        assert re.fullmatch(f"{name} +{re.escape(f'{headings(study)[0]}: {study.PAPER}')}", line)
    assert cli.main(["list", "--claims"]) == 0
    listed = capsys.readouterr().out
    for study in discover().values():
        assert all(f"{claim.sentence}: {claim.criterion.text}" in listed for claim in study.CLAIMS)
    assert cli.main(["list", "tiny"]) == 0
    listed = capsys.readouterr().out
    assert "Batches fit as well (loss): at most 0 (reported, does not decide)" in listed and "lyu" not in listed


def test_a_study_that_cannot_be_imported_is_said(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text("x = 1 / 0")
    studies = sys.modules["sharpscope.studies"]
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
    assert cli.main(["list"]) == 2
    listed = capsys.readouterr().out
    assert re.search("^tiny .*On Small Things", listed, re.MULTILINE)
    assert re.search("^wrong +cannot be imported: ZeroDivisionError: division by zero$", listed, re.MULTILINE)
    status, said = say(capsys, "run", "wrong", "--out", str(tmp_path / "run"))
    assert (status, said) == (
        2,
        "sharpscope: the study wrong cannot be imported: ZeroDivisionError: division by zero\n",
    )
    assert cli.main(["run", "tiny", "--quick", "--workers", "1", "--out", str(tmp_path / "run")]) == 0


def test_the_exit_status_says_whether_the_claims_hold(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["run", "tiny", "--quick", "--workers", "1", "--out"]
    assert cli.main([*common, str(tmp_path / "holds"), "--walks", "1e-2", "--norm=LN"]) == 0
    assert "ok   Nothing is in the way (handicap): 0 (at most 0.5)" in capsys.readouterr().out
    assert cli.main([*common, str(tmp_path / "fails"), "--handicap", "1", "--walks", "1e-2"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL Nothing is in the way (handicap): 1 (at most 0.5)" in printed
    assert "no   Batches fit as well" in printed  # this one does not decide
    assert "1 of 2 deciding claims hold" in printed
    assert cli.main(["report", str(tmp_path / "fails")]) == 1
    config = json.loads((tmp_path / "holds/config.json").read_text())["config"]
    assert (config["walks"], config["norm"], config["spare"], config["steps"]) == ([0.01], "LN", False, 12)


def test_run_all_runs_every_study(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["sharpscope.studies"], "__path__", sys.modules["sharpscope.studies"].__path__[-1:])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "all", "--quick", "--workers", "1"]) == 0
    assert {p.name for p in (tmp_path / "runs/all-quick").iterdir()} == {"all.json", "index.html", "small", "tiny"}
    assert (tmp_path / "runs/all-quick/tiny/report.html").exists()
    status, said = say(capsys, "run", "all", "--steps", "3")
    assert status == 2 and "--steps is a field of one study" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run tyni", "there is no study 'tyni'; did you mean 'tiny'?"),
        ("run xyzzy", "there is no study 'xyzzy'; known: "),
        ("run tyni --help", "did you mean 'tiny'?"),
        ("run tiny --learning-rat 1", "tiny has no field 'learning_rat'; did you mean --learning-rate?"),
        ("run tiny --quik", "tiny has no field 'quik'; did you mean --quick?"),
        ("run tiny --xyzzy 1", "tiny has no field 'xyzzy'; fields: learning_rate, weight_decay,"),
        ("run tiny --learning-rate -1", "the learning rate is -1.0; it must be positive"),
        ("run tiny --learning_rate=-1e-3", "the learning rate is -0.001; it must be positive"),
        ("run tiny --learning-rate 0", "the learning rate is 0.0; it must be positive"),
        ("run tiny --learning-rate nan", "the learning rate is nan; it must be positive"),
        ("run lyu2022 --learning-rate -1", "learning_rate is -1.0; it must be positive"),
        ("run tiny --learning-rate fast", "--learning-rate: could not convert string to float: 'fast'"),
        ("run tiny --steps 1.5", "--steps: invalid literal for int() with base 10: '1.5'"),
        ("run tiny --walks 1e-3 x", "--walks: Could not find valid parse for arguments: ['1e-3', 'x']"),
        ("run tiny --spare maybe", "--spare maybe does not fit tiny: Unrecognized options: maybe"),
        ("run tiny --steps", "Missing value for argument '--steps'"),
        ("run tiny stray", "stray does not fit tiny"),
        ("run tiny --out", "argument --out: expected one argument"),
        ("run tiny --workers many", "argument --workers: invalid int value: 'many'"),
        ("run", "the following arguments are required: NAME"),
        ("rnu tiny", "invalid choice: 'rnu' (choose from"),
        ("", "the following arguments are required: command"),
        ("list tyni", "there is no study 'tyni'; did you mean 'tiny'?"),
        ("list tiny stray", "unknown argument stray"),
        ("run tiny --quick --full", "--quick and --full contradict each other; give one of them"),
        ("run tiny --seeds 3", "tiny has no field 'seed', so there is nothing to repeat; leave --seeds out"),
        ("run tiny --seeds 0", "--seeds is 0; it must be at least 1"),
        ("run all --seeds many", "argument --seeds: invalid int value: 'many'"),
        ("report", "the following arguments are required: DIRECTORY"),
        ("report runs --quick", "unknown argument --quick"),
        ("report runs other", "unknown argument other"),
        ("analyze", "the following arguments are required: CHECKPOINTS, --task"),
        ("analyze w.pt --task m:f --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("analyze w.pt --task m:f --kk 2", "unknown argument --kk"),
        ("analyze w.pt --task m:f", "there is no task 'm:f' (No module named 'm'); give MODULE:FUNCTION"),
        ("watch", "the following arguments are required: RUN_DIR"),
        ("watch runs", "there is no directory runs; give that of a `sharpscope run`, or of a Monitor"),
        ("watch . --port many", "argument --port: invalid int value: 'many'"),
    ],
)
def test_bad_usage_is_answered_with_a_sentence(
    arguments: str,
    sentence: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = say(capsys, *arguments.split())
    assert status == 2
    assert sentence in said
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_help_shows_the_fields_of_a_study(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", "--help"], ["run", "tiny", "--help"], ["run", "tiny", "--quick", "-h"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert "--workers" in shown
        assert ("--weight-decay FLOAT" in shown) == ("tiny" in arguments)


def test_a_different_run_is_not_overwritten(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    there = {"study": "tiny", "config": discover()["tiny"].QUICK.__dict__ | {"steps": 7}}
    (out / "config.json").write_text(json.dumps(there))
    status, said = say(capsys, "run", "tiny", "--quick", "--out", str(out))
    assert status == 2
    assert f"{out} holds a different run (steps 7, not 12); choose another --out" in said
    status, said = say(capsys, "run", "lyu2022", "--quick", "--out", str(out))
    assert status == 2
    assert "study tiny, not lyu2022" in said
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "not JSON", '["study", "config"]', "\ufffd"])
def test_a_foreign_configuration_is_left_alone(
    content: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "history.parquet").touch()
    for arguments in (["run", "tiny", "--out", str(tmp_path)], ["report", str(tmp_path)]):
        status, said = say(capsys, *arguments)
        assert status == 2
        assert "config.json is not that of a run of sharpscope" in said
    assert (tmp_path / "config.json").read_text() == content


def test_a_foreign_directory_is_left_alone(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    status, said = say(capsys, "run", "tiny", "--out", str(tmp_path))
    assert status == 2
    assert f"{tmp_path} is not empty and holds no run of sharpscope; choose another --out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


PROC = ["/proc/sharpscope"] if Path("/proc/self").exists() else []  # of Linux: not even root can write there


@pytest.mark.parametrize("where", ["file", "file/below", *PROC])
def test_a_directory_that_cannot_be_made_is_named(
    where: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / where
    status, said = say(capsys, "run", "tiny", "--workers", "1", "--out", str(out))
    assert status == 2
    assert f"cannot write the run in {out}: " in said


def test_there_is_nothing_to_report_without_a_finished_run(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for nowhere in (tmp_path, tmp_path / "none"):
        status, said = say(capsys, "report", str(nowhere))
        assert status == 2
        assert f"{nowhere} holds no run: there is no config.json" in said
    (tmp_path / "config.json").write_text(json.dumps({"study": "tiny", "config": {}}))
    status, said = say(capsys, "report", str(tmp_path))
    assert status == 2
    assert f"the run in {tmp_path} is not finished; repeat its `sharpscope run` command" in said


@pytest.mark.parametrize("name", cli.EXTRAS)
def test_missing_extras_are_named_before_anything_runs(
    name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, None)
    for arguments in (
        ["run", "tiny", "--out", str(tmp_path / "run")],
        ["report", str(tmp_path)],
        ["analyze", str(tmp_path), "--task", "m:f", "--out", str(tmp_path / "out")],
        ["watch", str(tmp_path)],
    ):
        status, said = say(capsys, *arguments)
        assert status == 2
        assert f"{name} is not installed" in said
        assert "pip install '.[studies]'" in said
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["list"]) == 0


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from sharpscope.cli import main; sys.exit(main(['list', '--claims']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


@pytest.mark.parametrize("command", ["report", "predict", "analyze", "watch"])
def test_help_says_what_a_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert re.search(r"\n\n(Write|Predict|Measure|Serve) [^\n]+", capsys.readouterr().out)


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "sharpscope", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("sharpscope ")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sharpscope {version('sharpscope')}\n"


def test_help_says_which_packages_the_commands_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "pip install '.[studies]'" in " ".join(capsys.readouterr().out.split())
