"""Brief things are over soon.

Two walks that keep checkpoints, for tests that end or damage a run in many ways.
"""

from dataclasses import dataclass

import torch

from sharpscope.records.run_log import RunLog
from sharpscope.studies._framework.claims import Claim, within
from sharpscope.studies._framework.observe import run
from sharpscope.studies._framework.study import Job, Progress

PAPER = "Nobody, On Brief Things"


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    steps: int = 5
    rates: tuple[float, ...] = (0.5, 0.25)
    loud: bool = False
    title: str = "brief"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be positive")


QUICK = Config(steps=4)


def jobs(config: Config) -> list[Job]:
    return [Job(f"walk {rate:g}", _walk, {"steps": config.steps, "rate": rate}) for rate in config.rates]


def _walk(log: RunLog, progress: Progress, steps: int, rate: float) -> None:
    """Write a row at each step and a checkpoint at every other."""
    state = log.resume()
    at = state.get("at", torch.zeros(2, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    if state:
        draw.set_state(state["draw"])
    for step in range(int(state["step"]) + 1 if state else 0, steps):
        at = at.cos() + rate * torch.randn(2, generator=draw, dtype=torch.float64)
        log.append(step=step, x=at[0].item(), y=at[1].item())
        if step % 2 == 1:
            log.checkpoint(at=at, step=torch.tensor(step), draw=draw.get_state())


CLAIMS = (Claim("The walk ends near", run("walk 0.5")["x"].last(), within(-20, 20), "inequality"),)
CHARTS = ()
