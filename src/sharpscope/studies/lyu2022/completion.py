"""Matrix completion with batch normalization: at the edge the product U Vᵀ loses rank."""

from functools import partial

import torch
from torch import nn

from ...optimizers.gd import GD
from ...records.run_log import RunLog
from ...report.charts import Chart
from .._framework.claims import Claim, at_least, at_most, within
from .._framework.observe_runs import balance, over_seeds, ratio, span, value
from .._framework.study import Job, Progress
from .._shared.nets import Product, squares
from .._shared.train import Schedule, Task, train
from .config import Config

PART = "Matrix completion with batch normalization"
LR, WD, SIZE, KNOWN = 0.5, 1e-3, 20, 0.45


def jobs(config: Config) -> list[Job]:
    out = []
    steps = round(config.completion_tau / (LR * WD))
    for seed in range(config.completion_seeds):
        suffix = f", seed {seed}" if seed else ""
        for name, wd, n, every in (
            ("completion", WD, steps, 200),
            ("completion, no decay", 0.0, config.completion_control, 1000),
        ):
            arguments = {"weight_decay": wd, "steps": n, "every": every, "seed": config.first_seed + seed}
            out.append(Job(name + suffix, _complete, arguments, 5e-4 * n))
    return out


def _complete(log: RunLog, progress: Progress, weight_decay: float, steps: int, every: int, seed: int) -> None:
    """Complete a matrix of rank 2 from some of its entries by a normalized product U Vᵀ."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    truth = (draw(SIZE, 2) @ draw(2, SIZE)).flatten()
    known = torch.rand(SIZE * SIZE, generator=g) < KNOWN
    seen, hidden = known.nonzero().flatten(), (~known).nonzero().flatten()
    net = Product(SIZE, truth[seen].std(correction=0).item(), truth[seen].mean().item(), g)

    def evaluate(net: nn.Module) -> dict[str, float]:
        assert isinstance(net, Product)
        singular = torch.linalg.svdvals(net.matrix())
        rank = torch.special.entr(singular / singular.sum()).sum().exp()
        error = (net(seen, hidden) - truth[hidden]).square().mean().sqrt() / truth[hidden].std(correction=0)
        return {"test_rmse": error.item(), "effective_rank": rank.item()}

    task = Task(net, squares, seen, truth[seen], evaluate)
    train(log, progress, task, GD(LR, weight_decay), Schedule(steps, every, k=1))


def _gain(sentence: str, column: str, factor: float) -> Claim:
    reading = ratio(value("completion, no decay", column), value("completion", column))
    runs = ("completion", "completion, no decay")
    return Claim(sentence, over_seeds(reading, *runs), at_least(factor), "comparison", PART, runs)


CLAIMS = (
    _gain("Weight decay lowers the spherical sharpness (without it, over with it)", "spherical_sharpness", 2.5),
    _gain("Weight decay lowers the error on hidden entries (without it, over with it)", "test_rmse", 1.5),
    _gain("Weight decay lowers the effective rank (without it, over with it)", "effective_rank", 2),
    Claim(
        "η̃λ1 stays at the edge after τ = 5",
        span("completion", "eta_lambda", 5),
        within(1.9, 2.2),
        "inequality",
        PART,
        ("completion",),
    ),
    Claim(
        "Norms settle where growth and decay balance: lr²⟨‖∇_g‖²⟩ over (2il - il²)⟨‖w_g‖²⟩ after τ = 5",
        over_seeds(balance("completion", 5), "completion"),
        within(0.9, 1.1),
        "identity",
        PART,
        ("completion",),
    ),
    Claim(
        "Without weight decay the run stays off the edge (η̃λ1 at the end)",
        over_seeds(value("completion, no decay", "eta_lambda"), "completion, no decay"),
        at_most(1.9),
        "negative control",
        PART,
        ("completion, no decay",),
    ),
)

CHARTS = (
    Chart(
        "completion-sharpness",
        "Spherical sharpness",
        "tau",
        "spherical_sharpness",
        ("completion",),
        "τ = lr · wd · steps",
        "λ1",
        log_y=True,
        part=PART,
    ),
    Chart(
        "completion-test",
        "Error on hidden entries",
        "step",
        "test_rmse",
        ("completion", "completion, no decay"),
        "step",
        "RMSE / spread",
        caption="Against steps, since τ stands still without weight decay.",
        part=PART,
    ),
)
