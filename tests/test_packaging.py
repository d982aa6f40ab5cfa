"""What is published: wheel and source distribution, checked, and tried where only torch and numpy are installed."""

import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, where: Path) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel and the source distribution."""
    place = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", str(place), where=ROOT)
    return sorted(place.iterdir())


def test_they_are_what_an_index_accepts(built: list[Path]) -> None:
    wheel, source = built
    run(sys.executable, "-m", "twine", "check", "--strict", source, wheel, where=ROOT)
    run(sys.executable, "-m", "check_wheel_contents", wheel, where=ROOT)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*") if p.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names


def needed(name: str) -> set[str]:
    """A distribution and all that it needs without extras, by name, as far as it is installed."""
    found, todo = set[str](), [name]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            wanted = [r for r in distribution(one).requires or [] if ";" not in r]
            todo += [re.split(r"[^\w.-]", requirement)[0] for requirement in wanted]
    return found


@pytest.fixture(scope="module")
def clean(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and links to torch, numpy and what these need."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/*/site-packages")
    for name in needed("torch") | needed("numpy"):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            (packages / top).symlink_to(str(distribution(name).locate_file(top)))
    python = place / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-index", built[0], where=place)  # with its dependencies: they have to be there
    return place / "bin"


def test_the_first_example_runs_on_torch_and_numpy_alone(clean: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/start.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        printed = run(clean / "python", "-W", "error", "-c", code, where=tmp_path)
    assert "sharpness / threshold is" in printed  # whatever the numbers: it speaks of the edge
    assert "uPlot" in (tmp_path / "run.html").read_text(encoding="utf-8")  # the files that the package brings along


def test_the_command_says_what_it_needs(clean: Path, tmp_path: Path) -> None:
    assert "every study and its paper" in run(clean / "sharpscope", "--help", where=tmp_path)
    assert re.fullmatch(r"sharpscope \d+\.\d+\.\d+\n", run(clean / "sharpscope", "--version", where=tmp_path))
    done = subprocess.run(
        [clean / "sharpscope", "run", "lyu2022"], capture_output=True, text=True, cwd=tmp_path, env={}
    )
    assert done.returncode == 2
    assert "pip install '.[studies]'" in done.stderr
