"""Smaller things happen <b>more</b> quickly.

A walk for each of a few runs, drawn from a seed.
"""

import os
import time
from dataclasses import dataclass

import numpy as np

from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.report.charts import Chart
from sharpscope.studies._framework.claims import WIDER, Claim, at_least, at_most, median, under, within
from sharpscope.studies._framework.study import Job, Progress

PAPER = 'Nobody & Someone, On "Smaller" Things'


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seed: int = 0
    walks: int = 3
    steps: int = 40
    raises: str = ""  # "job", "jobs" or "claim": where the study fails

    def __post_init__(self) -> None:
        if self.walks < 1:
            raise ValueError(f"walks is {self.walks}; it must be positive")


QUICK = Config(steps=20)


def jobs(config: Config) -> list[Job]:
    if config.raises == "jobs":
        raise RuntimeError("no jobs")
    return [Job(f"walk {i}", _walk, {"config": config, "i": i}, cost=1 + i) for i in range(config.walks)]


def _walk(log: RunLog, progress: Progress, config: Config, i: int) -> None:
    state = log.resume()
    rng = np.random.default_rng([config.seed, i])
    steps = rng.standard_normal(config.steps).cumsum()
    for step in range(int(state["step"]) + 1 if state else 0, config.steps):
        log.append(step=step, x=steps[step])
        if step == 10 and config.raises == "job" and i == 0:
            raise KeyError("no\nway")
        waits, mark = os.environ.get("TINY_WAITS"), log.path.with_suffix(".waits")
        if step == 10 and (waits in (f"small, {log.run}", "all") or (waits == "once" and not mark.exists())):
            mark.touch()
            for _ in range(20_000):  # it works on and on
                time.sleep(0.05)
                progress(0.5)
        progress((step + 1) / config.steps)


def _ends(h: History, config: Config) -> tuple[float, ...]:
    if config.raises == "claim":
        raise RuntimeError("no <i>claim</i>")
    return tuple(float(h.series(f"walk {i}", "x")[-1]) for i in range(config.walks))


RUNS = ("walk 0",)
CLAIMS = under(
    "Walks",
    Claim("Walks end <near> where they begin", _ends, within(-20, 20), "inequality", runs=RUNS),
    Claim("The middle one ends above", _ends, median(at_least(0)), "comparison", runs=RUNS, deciding=False),
    Claim("Steps are not longer than a mile", lambda h, c: 0.5, at_most(1), "negative control", runs=RUNS),
    Claim("All walks lead to Rome", lambda h, c: 3.0, at_most(2), WIDER, runs=RUNS),
)
CHARTS = (Chart("walks", "Walks", x="step", y="x", runs=("walk 0", "walk 1"), x_label="step", y_label="x"),)
