"""The tutorials run as they are, in an empty folder, without a network, and say something."""

import runpy
from pathlib import Path

import pytest
from traces import go_offline

TUTORIALS = sorted((Path(__file__).parents[1] / "docs/tutorials").glob("*.py"))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning, of what depends on the machine
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_offline(tmp_path, monkeypatch)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_tutorials() -> None:
    assert TUTORIALS
