"""The set-up of the environment: its pins are complete, and where it cannot go on it says why in one sentence."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = "sys.version_info = (3, 9, 18)"
WITHOUT_VENV = "sys.modules['ensurepip'] = None"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with nothing but what the set-up reads before it installs the package."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "tools/no-deps.txt", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_up(project: Path, **environment: str) -> tuple[int, str]:
    """The exit status of the set-up and what it wrote to standard error, free of the settings pip and make had here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    command = ["sh", str(project / "tools/setup.sh")]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def fake_python(path: Path, pretence: str) -> None:
    """A Python that runs the given statements first, to look like another one."""
    path.parent.mkdir(exist_ok=True)
    prelude = shlex.quote(f"import sys; {pretence}; ")
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {prelude}"$2"\n')
    path.chmod(0o755)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [name for extra in project["project"]["optional-dependencies"].values() for name in extra]
    names = {re.split(r"[^\w.-]", name)[0] for name in wanted} - {"sharpscope"}
    pins = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names <= set(pins)


def first_in_path(project: Path) -> dict[str, str]:
    """The environment in which the project's own bin is searched first."""
    return {"PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "found"])
def test_old_python_is_named_with_what_is_needed(project: Path, chosen: bool) -> None:
    for name in ["python3", "python3.13", "python3.12", "python3.11"]:
        fake_python(project / "bin" / name, OLD)
    environment = {"PYTHON": str(project / "bin/python3")} if chosen else first_in_path(project)
    status, said = set_up(project, **environment)
    assert status == 1
    assert said.count("\n") == 1
    assert "Python 3.11 or newer is needed" in said
    assert "python3 is 3.9" in said
    assert "make test PYTHON=" in said
    assert not (project / ".venv").exists()


def test_newer_python_is_found_beside_an_old_one(project: Path) -> None:
    fake_python(project / "bin/python3", OLD)
    fake_python(project / "bin/python3.13", f"sys.version_info = (3, 13, 0); {WITHOUT_VENV}")
    _, said = set_up(project, **first_in_path(project))
    assert "python3.13 (3.13) lacks" in said  # it went on with this one


def test_missing_python_is_told_from_an_old_one(project: Path) -> None:
    status, said = set_up(project, PYTHON=str(project / "nowhere"))
    assert status == 1
    assert "nowhere could not be run" in said


def test_missing_venv_is_named(project: Path) -> None:
    fake_python(project / "bin/python3", WITHOUT_VENV)
    status, said = set_up(project, PYTHON=str(project / "bin/python3"))
    assert status == 1
    assert said.count("\n") == 1
    assert "lacks the modules venv and ensurepip" in said


def test_unreachable_index_is_named_and_a_half_made_environment_does_not_stand_in_the_way(project: Path) -> None:
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").write_text("the rest of this file was never written")
    status, said = set_up(
        project,
        PYTHON=sys.executable,
        PIP_INDEX_URL="http://127.0.0.1:9",
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES="0",
        PIP_TIMEOUT="2",
    )
    assert status == 1
    assert "pip could not download or install the packages" in said
    assert "PIP_INDEX_URL" in said and "PIP_PROXY" in said
    assert "ERROR: No matching distribution found" in said  # pip's own last lines follow
    assert not (project / ".venv/.ready").exists()
