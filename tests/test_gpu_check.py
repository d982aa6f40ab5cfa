"""The checks for a GPU run on the processor at a tiny size, and record what fails."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/gpu_check.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="gpu_check")


TIMED = {"products and a solve", "steps between measurements do not wait", "resnet run"}


def test_all_checks_run_and_those_that_are_not_timed_pass(script: dict[str, Any], tmp_path: Path) -> None:
    found = script["check_all"]("cpu", script["TINY"], tmp_path)
    assert len(found) == len(script["CHECKS"]) >= 6
    assert [c.name for c in found if "error" in c.numbers] == []
    assert [c.name for c in found if not c.passed and c.name not in TIMED] == []
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [c["name"] for c in record["checks"]] == [c.name for c in found]
    assert (tmp_path / "gpu_check.md").read_text().count("\n| ") == len(found) + 1


def test_a_check_that_raises_is_recorded(script: dict[str, Any]) -> None:
    def broken(machine: Any) -> Any:
        raise RuntimeError("no kernel image")

    found = script["run"](broken, script["Machine"]("cpu", script["TINY"]))
    assert not found.passed and "no kernel image" in found.numbers["error"]
