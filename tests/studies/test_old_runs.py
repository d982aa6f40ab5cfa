"""Runs of version 0.1, kept as data: every verdict can still be reached from them, to the last digit.

The claims of a study are functions of its history and its configuration.  So these runs also hold the claims to the
numbers that they gave when the runs were made.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sharpscope.cli import main
from sharpscope.records.history import History
from sharpscope.studies._framework.old_names import columns_of_today
from sharpscope.studies._framework.run import run_in
from sharpscope.studies._framework.study import find

RUNS = sorted((Path(__file__).parents[1] / "data/old_runs").iterdir())


def numbers(observed: Any) -> list[float]:
    """What a verdict on disk has observed; null stands for what is not finite."""
    values = observed if isinstance(observed, list | tuple) else [observed]
    return [math.nan if v is None or not math.isfinite(v) else float(v) for v in values]


@pytest.mark.parametrize("old", RUNS, ids=lambda path: path.name)
def test_the_verdicts_are_what_they_were(old: Path) -> None:
    run, study = run_in(old), find(old.name)
    history = columns_of_today(study, History.load(old / "history.parquet"))
    ran = set(history.runs)
    now = [claim.decide(run.study, history, run.config) for claim in study.CLAIMS if set(claim.runs) <= ran]
    before = json.loads((old / "verdicts.json").read_text())
    assert [(v.claim, v.criterion, v.kind, v.passed, v.deciding, v.part, v.note) for v in now] == [
        tuple(v[name] for name in ("claim", "criterion", "kind", "passed", "deciding", "part", "note")) for v in before
    ]
    for verdict, was in zip(now, before, strict=True):
        assert numbers(verdict.observed) == pytest.approx(numbers(was["observed"]), rel=1e-9, nan_ok=True), was["claim"]


def test_columns_that_have_become_one_complete_each_other() -> None:
    history = History([{"run": "a", "excess": 1.0, "drawn": 3.0}, {"run": "b", "drawn": 2.0}])
    study = SimpleNamespace(OLD_COLUMNS={"drawn": "excess"})
    assert columns_of_today(study, history).columns == {"run": ["a", "b"], "excess": [1.0, 2.0]}


@pytest.mark.parametrize("name", ["cohen2025", "fojtik2025"])
def test_an_old_run_can_be_reported_on(name: str, tmp_path: Path) -> None:
    shutil.copytree(next(path for path in RUNS if path.name == name), tmp_path / name)
    before = json.loads((tmp_path / name / "verdicts.json").read_text())
    assert main(["report", str(tmp_path / name)]) == 0
    now = json.loads((tmp_path / name / "verdicts.json").read_text())
    assert [(v["claim"], v["passed"]) for v in now] == [(v["claim"], v["passed"]) for v in before]
    page = (tmp_path / name / "report.html").read_text()
    assert "data-chart=" in page and "The data have no column" not in page
