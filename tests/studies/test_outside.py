"""A study in a package of its own: the one of docs/adding.md, installed and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/adding.md").read_text(encoding="utf-8")
COMMAND = "import sys; from sharpscope.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages into which pip has installed the files of the guide, without their dependencies."""
    source = tmp_path_factory.mktemp("source")
    files = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["pyproject.toml", "parabola_study.py"]
    for name, text in files:
        (source / name).write_text(text, encoding="utf-8")
    packages = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(packages), str(source)], check=True)
    return packages


def sharpscope(packages: Path, *arguments: str) -> str:
    """The command line where these packages are installed; what it prints."""
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", COMMAND, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_it_is_listed_beside_the_others(installed: Path) -> None:
    names = [line.split()[0] for line in sharpscope(installed, "list").splitlines()]
    assert names == sorted(names) and {"lyu2022", "parabola"} <= set(names)
    assert "Above 2/lr they grow: at least 10" in sharpscope(installed, "list", "parabola")


def test_it_runs_in_worker_processes_and_is_reported_on(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = sharpscope(installed, "run", "parabola", "--quick", "--workers", "2", "--out", str(out))
    assert "2 of 2 deciding claims hold" in printed
    assert json.loads((out / "environment.json").read_text())["parabola-study"] == "1.0"
    (out / "report.html").unlink()
    assert "2 of 2 deciding claims hold" in sharpscope(installed, "report", str(out))
    assert "Gradient descent on a parabola is stable up to 2/lr" in (out / "report.html").read_text()
