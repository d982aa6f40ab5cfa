"""Descents in other norms: norms and their duals by sampling, steps against formulas, a short run of each."""

import dataclasses
from typing import Any

import pytest
import torch
from problems import normal

from sharpscope.studies import islamov2026 as study
from sharpscope.studies._shared.networks import Variant, problem_of
from sharpscope.studies.islamov2026 import DESCENTS, QUICK, RULES, Config

NAMED = {"a": normal(4, 3, seed=0), "b": normal(2, 5, seed=1), "c": normal(3, 3, seed=2)}


@pytest.mark.parametrize("name", DESCENTS)
def test_the_dual_norm_is_the_slope_along_the_steepest_direction(name: str) -> None:
    """``‖d‖ = 1``, ``gᵀd = -‖g‖*``, and no other direction of norm one goes down faster."""
    norm, _ = DESCENTS[name]
    direction = norm.steepest(NAMED)
    assert norm.norm(direction).item() == pytest.approx(1, rel=1e-12)

    def slope(d: Any) -> float:
        return sum((NAMED[n] * d[n]).sum().item() for n in NAMED)

    assert slope(direction) == pytest.approx(-norm.dual(NAMED).item(), rel=1e-12)
    for seed in range(20):
        other = {n: direction[n] + 0.3 * normal(*g.shape, seed=100 + seed) for n, g in NAMED.items()}
        size = norm.norm(other).item()
        assert slope({n: d / size for n, d in other.items()}) > slope(direction)


def test_steps_of_orthogonal_factors() -> None:
    f = problem_of(Variant("plain", "none", "squares", 0.1, 0.0, train=50)).objective
    step, w = study._steps(f, study.MUON, 0.5), f.weights()
    first, second = normal(f.size, seed=0), normal(f.size, seed=1)
    step(w, first)
    delta, smoothness = step(w, second)
    assert smoothness is None
    for name, part in f.unflatten(delta).items():
        q, summed = part / (-0.5 * 0.03), f.unflatten(0.9 * first + second)[name]
        rows = q if len(q) <= q.shape[1] else q.T
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=q.dtype))
        stretch = rows @ (summed if len(q) <= q.shape[1] else summed.T).T  # the other factor of the polar decomposition
        torch.testing.assert_close(stretch, stretch.T)
        assert torch.linalg.eigvalsh(stretch).min() > 0


class Log:
    """The rows that a run writes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def resume(self) -> None: ...

    def append(self, **row: float) -> None:
        self.rows.append(row)


@pytest.mark.parametrize("name", [*DESCENTS, *RULES, study.MUON])
def test_a_short_run_writes_its_rows(name: str) -> None:
    log: Any = Log()
    study._descend(log, lambda fraction: None, name, 1.0, Config(steps=10, every=5, train=50))
    assert [row["step"] for row in log.rows] == [5, 10]
    for row in log.rows:
        assert row["loss"] > 0 and row["euclidean"] > 0 and -1 < row["edge_along_step"] < 2
        assert ("off" in row) == (name in DESCENTS) and row.get("off", 0.0) < 1e-9


def test_jobs_and_claims_name_the_same_runs() -> None:
    names = {job.name for job in study.jobs(QUICK)}
    assert {name for claim in study.CLAIMS for name in claim.runs} == names
    assert all(job.arguments["config"].seed == 3 for job in study.jobs(dataclasses.replace(QUICK, seed=3)))
