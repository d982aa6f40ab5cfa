"""Matrix completion with batch normalization: at the edge the product U Vᵀ loses rank."""

import math
from functools import partial

import torch
from torch import nn

from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import comparison, control, identity, inequality, labelled, under
from .._framework.observe import Quantity, joined, run
from .._framework.study import Job, Progress
from .._shared.nets import Product, squares
from .._shared.train import LearningProblem, TrainingPlan, train
from .config import Config
from .quantities import LABELS

PART = "Matrix completion with batch normalization"
LR, WD, SIZE, KNOWN = 0.5, 1e-3, 20, 0.45


def jobs(config: Config) -> list[Job]:
    steps = round(config.completion_tau / (LR * WD))
    settings = {
        "completion": {"weight_decay": WD, "steps": steps, "every": 200},
        "completion, no decay": {"weight_decay": 0.0, "steps": config.completion_control, "every": 1000},
    }
    return [
        Job(
            f"{name}, seed {seed}" if seed else name,
            _complete,
            setting | {"seed": config.first_seed + seed},
            cost=5e-4 * setting["steps"],
        )
        for seed in range(config.completion_seeds)
        for name, setting in settings.items()
    ]


def _complete(log: RunLog, progress: Progress, weight_decay: float, steps: int, every: int, seed: int) -> None:
    """Complete a matrix of rank 2 from some of its entries by a normalized product U Vᵀ."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    truth = (draw(SIZE, 2) @ draw(2, SIZE)).flatten()
    known = torch.rand(SIZE * SIZE, generator=g) < KNOWN
    seen, hidden = known.nonzero().flatten(), (~known).nonzero().flatten()
    net = Product(SIZE, scale=truth[seen].std(correction=0).item(), shift=truth[seen].mean().item(), generator=g)

    def evaluate(net: nn.Module) -> dict[str, float]:
        assert isinstance(net, Product)
        singular = torch.linalg.svdvals(net.matrix())
        rank = torch.special.entr(singular / singular.sum()).sum().exp()
        error = (net(seen, hidden) - truth[hidden]).square().mean().sqrt() / truth[hidden].std(correction=0)
        return {"test_rmse": error.item(), "effective_rank": rank.item()}

    problem = LearningProblem(net, squares, seen, truth[seen], evaluate)
    train(log, progress, problem, GD(LR, weight_decay), TrainingPlan(steps, every, k=1))


def without_over_with(column: str) -> Quantity:
    """Last value of a column without weight decay over that with it."""
    return run("completion, no decay")[column].last() / run("completion")[column].last()


SETTLED = run("completion").between(tau=(5, math.inf))

CLAIMS = under(
    PART,
    comparison(
        "Weight decay lowers the spherical sharpness (without it, over with it)",
        without_over_with("spherical_sharpness") >= 2.5,
    ),
    comparison(
        "Weight decay lowers the error on hidden entries (without it, over with it)",
        without_over_with("test_rmse") >= 1.5,
    ),
    comparison(
        "Weight decay lowers the effective rank (without it, over with it)", without_over_with("effective_rank") >= 2
    ),
    inequality("η̃λ1 stays at the edge after τ = 5", SETTLED["eta_lambda"].extent().within(1.9, 2.2)),
    identity(
        "Norms settle where growth and decay balance: lr²⟨‖∇_g‖²⟩ over (2il - il²)⟨‖w_g‖²⟩ after τ = 5",
        joined(SETTLED["balance/left"].mean(), SETTLED["balance/right"].mean()).farthest_from(1).within(0.9, 1.1),
    ),
    control(
        "Without weight decay the run stays off the edge (η̃λ1 at the end)",
        run("completion, no decay")["eta_lambda"].last() <= 1.9,
    ),
)

CHARTS = under(
    PART,
    *labelled(
        LABELS,
        Chart(
            "completion-sharpness",
            "Spherical sharpness",
            x="tau",
            y="spherical_sharpness",
            runs=("completion",),
            log="y",
        ),
        Chart(
            "completion-test",
            "Error on hidden entries",
            x="step",
            y="test_rmse",
            runs=("completion", "completion, no decay"),
            caption="Against steps, since τ stands still without weight decay.",
        ),
    ),
)
