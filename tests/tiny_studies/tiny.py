"""Small things happen quickly.

All that a study may do, in a second: a network with and without momentum and batches, a toy whose steps are known in
closed form, a job that keeps its own checkpoints, and a run that the quick configuration leaves out.
"""

import os
import time
from dataclasses import dataclass

import torch
from torch import nn

from sharpscope.optimizers.gd import GD
from sharpscope.records.run_log import RunLog
from sharpscope.report.charts import Chart
from sharpscope.studies._framework.claims import Claim, at_most, under, within
from sharpscope.studies._framework.observe import run
from sharpscope.studies._framework.study import Job, Progress
from sharpscope.studies._shared import toys
from sharpscope.studies._shared.nets import NORMS, Readout, Weights, squares
from sharpscope.studies._shared.train import LearningProblem, TrainingPlan, train
from sharpscope.studies._shared.walk import walk

PAPER = "Nobody, On Small Things (nowhere, never)"


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    learning_rate: float = 0.05
    weight_decay: float = 0.01
    momentum: float = 0.5  # of the mini-batch run
    norm: str = "BN"
    steps: int = 12
    walks: tuple[float, ...] = (1e-2, 1e-3)  # intrinsic rates of the toy
    spare: bool = True  # also the run that quick leaves out
    handicap: float = 0.0  # a claim fails when this is large

    def __post_init__(self) -> None:
        GD(self.learning_rate, self.weight_decay, self.momentum)  # says what is wrong


QUICK = Config(spare=False)


def jobs(config: Config) -> list[Job]:
    names = ["descent", "heavy ball on batches", *(["spare"] if config.spare else [])]
    return [
        *(
            Job(name, _descend, {"config": config, "on_batches": name == "heavy ball on batches"}, cost=3)
            for name in names
        ),
        *(Job(f"toy, il {il:g}", _walk, {"il": il}, cost=1) for il in config.walks),
        Job("plain walk", _plain_walk, {}, cost=2),
    ]


def _descend(log: RunLog, progress: Progress, config: Config, on_batches: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=g, dtype=torch.float64)
    y = torch.tanh(x[:, :1]) + 0.5 * torch.sin(x[:, 1:2])
    maps = [Weights(shape, g, unit_rows=config.norm == "WN") for shape in ((6, 4), (6, 6))]
    layers = [layer for weights in maps for layer in (weights, NORMS[config.norm](6), nn.GELU())]
    net = nn.Sequential(*layers, Readout(torch.randn(1, 6, generator=g, dtype=torch.float64)))

    def evaluate(net: nn.Module) -> dict[str, float]:
        _wait_in_the_middle(log, 4)
        return {"fit": squares(net(x), y).item()}

    rule = GD(config.learning_rate, config.weight_decay, config.momentum if on_batches else 0.0)
    plan = TrainingPlan(config.steps, every=3, k=1, batch=8 if on_batches else None)
    train(log, progress, LearningProblem(net, squares, x, y, evaluate), rule, plan)


def _walk(log: RunLog, progress: Progress, il: float) -> None:
    process = toys.descent(toys.named("A1", "A3"), 1.0, 0.1, il)
    walk(log, progress, process, [f"{toy}, il {il:g}" for toy in ("A1", "A3")], range(0, 50, 10))


def _plain_walk(log: RunLog, progress: Progress) -> None:
    """Write a row at each step and a checkpoint at every third."""
    state = log.resume()
    at = state.get("at", torch.zeros(2, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    if state:
        draw.set_state(state["draw"])
    for step in range(int(state["step"]) + 1 if state else 0, 12):
        at = at.cos() + torch.randn(2, generator=draw, dtype=torch.float64)
        log.append(step=step, x=at[0].item(), y=at[1].item())
        _wait_in_the_middle(log, 8)
        if step % 3 == 0:
            log.checkpoint(at=at, step=torch.tensor(step), draw=draw.get_state())
        progress((step + 1) / 12)


def _wait_in_the_middle(log: RunLog, rows: int) -> None:
    """For tests that end a run half-way: the job that the environment names says so and waits there for its end."""
    if os.environ.get("TINY_WAITS") in (log.run, "all") and len(log.rows) >= rows:
        log.path.with_suffix(".waits").touch()
        time.sleep(1000)


CLAIMS = under(
    "Small things",
    Claim(
        "The run goes to its end (last step, over those asked for)",
        lambda h, config: float(h.series("descent", "step")[-1]) / config.steps,
        within(1, 1),
        "identity",
        runs=("descent",),
    ),
    Claim(
        "Nothing is in the way (handicap)",
        lambda h, config: config.handicap,
        at_most(0.5),
        "negative control",
        runs=("descent",),
    ),
    Claim("The spare run fits (loss)", run("spare")["fit"].last(), at_most(10), "inequality"),
    Claim(
        "Batches fit as well (loss)",
        run("heavy ball on batches")["fit"].last(),
        at_most(0),
        "comparison",
        deciding=False,
    ),
)

CHARTS = (Chart("fit", "Fit", x="step", y="fit", runs=("descent", "spare"), x_label="step", y_label="loss"),)
