"""The networks of the studies and their variants, each one change away from a base."""

from dataclasses import dataclass
from functools import partial

import torch

from ...autodiff.whole import Loss
from ...optimizers.base import UpdateRule
from ...optimizers.gd import GD
from ...optimizers.scalar import SphericalRMSprop
from ...records.run_log import RunLog
from .._framework.study import Job, Progress
from . import data as bundled
from . import nets
from .train import LearningProblem, TrainingPlan, judge, train

LOSSES: dict[str, Loss] = {
    "squares": nets.squares,
    "half squares": nets.half_squares,
    "soft labels": partial(nets.soft_cross_entropy, logit=3.0, smoothing=0.1),
    "hard labels": partial(nets.soft_cross_entropy, logit=2.0, smoothing=0.0),
    "cross-entropy": partial(nets.cross_entropy, smoothing=0.1),
}

DIGITS = {
    "mlp": nets.digits_mlp,
    "conv": nets.digits_conv,
    "transformer": nets.digits_transformer,
    "plain": nets.plain_mlp,
}

SECONDS_PER_STEP = {"regression": 0.6e-3, "mlp": 3.2e-3, "conv": 12e-3, "transformer": 30e-3, "plain": 1.2e-3}
"""Rough cost of a step by network, measurements included."""


@dataclass(frozen=True)
class Variant:
    """A network, its data, and how it is trained: for `steps`, or until `tau` = lr·wd·steps/(1 - momentum)."""

    net: str
    norm: str
    loss: str
    learning_rate: float
    weight_decay: float
    steps: int = 0
    tau: float = 0.0
    momentum: float = 0.0
    batch: int | None = None
    rmsprop: bool = False
    seed: int = 0
    every: int = 50
    train: int | None = None  # examples, where not 500 (digits) or 80 (regression)

    @property
    def num_steps(self) -> int:
        """Steps until `tau` where it is given."""
        if not self.tau:
            return self.steps
        return round(self.tau / (self.learning_rate * self.weight_decay) * (1 - self.momentum))

    def job(self, name: str) -> Job:
        """The run of this variant."""
        return Job(name, run_variant, {"variant": self}, SECONDS_PER_STEP[self.net] * self.num_steps)


def run_variant(log: RunLog, progress: Progress, variant: Variant) -> None:
    """Train one variant, from its start to its last step."""
    problem = problem_of(variant)
    rule: UpdateRule = GD(variant.learning_rate, variant.weight_decay, variant.momentum)
    if variant.rmsprop:
        norm = torch.cat([p.detach().flatten() for p in problem.net.parameters()]).norm().item()
        rule = SphericalRMSprop.like(GD(variant.learning_rate, variant.weight_decay), norm)
    plan = TrainingPlan(variant.num_steps, variant.every, batch=variant.batch, seed=variant.seed)
    train(log, progress, problem, rule, plan, unit_start=variant.rmsprop)


def problem_of(variant: Variant) -> LearningProblem:
    """The network of a variant, its data and how it is judged."""
    loss = LOSSES[variant.loss]
    if variant.net == "regression":
        data = bundled.smooth_function(variant.train or 80, seed=variant.seed)
        net = nets.regression_net(variant.norm, variant.seed)
    else:
        data = bundled.digits(variant.train or 500, variant.seed)
        net = DIGITS[variant.net](variant.norm, variant.seed)
    return LearningProblem(net, loss, data.x, data.y, judge(loss, data))
