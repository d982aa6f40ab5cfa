"""The networks of the studies and their variants, each one change away from a base."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ...autodiff.whole import Loss
from ...errors import Unusable
from ...optimizers.base import UpdateRule
from ...optimizers.gd import GD
from ...optimizers.scalar import SphericalRMSprop
from ...records.run_log import RunLog
from .._framework.study import Job, Progress
from . import data as known_data
from . import deep_nets, nets
from .norm_only import NormOnly
from .train import LearningProblem, TrainingPlan, judge, train

LOSSES: dict[str, Loss] = {
    "squares": nets.squares,
    "half squares": nets.half_squares,
    "soft labels": partial(nets.soft_cross_entropy, logit=3.0, smoothing=0.1),
    "hard labels": partial(nets.soft_cross_entropy, logit=2.0, smoothing=0.0),
    "cross-entropy": partial(nets.cross_entropy, smoothing=0.1),
    "next token": nets.next_token,
}

SMALL = {"mlp": nets.mlp, "conv": nets.conv, "transformer": nets.transformer, "plain": nets.plain}

DEEP: dict[str, Callable[..., nn.Module]] = {
    "vgg11": deep_nets.vgg11,
    "resnet20": deep_nets.resnet20,
    "language": deep_nets.language,
}
"""Networks with a width of their own to choose, scale-invariant or as commonly trained."""

WIDTHS = {"vgg11": 64, "resnet20": 16, "language": 64}

SECONDS_PER_STEP = {
    "regression": 0.6e-3,
    "mlp": 3.2e-3,
    "conv": 12e-3,
    "transformer": 30e-3,
    "plain": 1.2e-3,
    "vgg11": 10.0,
    "resnet20": 3.0,
    "language": 1.0,
}
"""Rough cost of a step by network, measurements included, on a few hundred examples."""


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
    cooling: int = 0  # steps more at a tenth of the learning rate, without weight decay
    rmsprop: bool = False
    norm_only: bool = False  # weight decay at the effective learning rates of a run without it
    seed: int = 0
    every: int = 50
    train: int | None = None  # examples, where not 500 (digits) or 80 (regression)
    test: int = 0  # examples to test on; of digits all others
    data: str = "digits"
    width: int = 0  # of a deep network; 0: its own
    invariant: bool = True  # a deep network is scale-invariant in all weights, not as commonly trained
    chunk: int | None = None  # examples of a batch of the full-batch gradient; None: all
    device: str = "cpu"
    dtype: str = "float64"

    @property
    def num_steps(self) -> int:
        """Steps until `tau` where it is given."""
        if not self.tau:
            return self.steps
        return round(self.tau / (self.learning_rate * self.weight_decay) * (1 - self.momentum))

    def job(self, name: str) -> Job:
        """The run of this variant."""
        cost = SECONDS_PER_STEP[self.net] * (self.num_steps + self.cooling)
        return Job(name, run_variant, {"variant": self}, cost, self.describe_data)

    def describe_data(self) -> dict[str, str]:
        """The data by name, each with a sentence on what they are."""
        if self.net == "regression":
            return {}
        return known_data.describe(self.data, self.train or 500, self.test)


def run_variant(log: RunLog, progress: Progress, variant: Variant) -> None:
    """Train one variant, from its start to its last step."""
    problem = problem_of(variant)
    rule: UpdateRule = GD(variant.learning_rate, variant.weight_decay, variant.momentum)
    if variant.rmsprop:
        norm = torch.cat([p.detach().flatten() for p in problem.net.parameters()]).norm().item()
        rule = SphericalRMSprop.like(GD(variant.learning_rate, variant.weight_decay), norm)
    if variant.norm_only:
        rule = NormOnly(variant.learning_rate, variant.weight_decay)
    steps = variant.num_steps + variant.cooling
    plan = TrainingPlan(steps, variant.every, batch=variant.batch, seed=variant.seed, cooling=variant.cooling)
    train(log, progress, problem, rule, plan, unit_start=variant.rmsprop)


def problem_of(variant: Variant) -> LearningProblem:
    """The network of a variant, its data and how it is judged."""
    loss = LOSSES[variant.loss]
    if variant.net == "regression":
        data = known_data.smooth_function(variant.train or 80, seed=variant.seed)
        net = nets.regression_net(variant.norm, variant.seed)
        return LearningProblem(net, loss, data.x, data.y, judge(loss, data))
    known = known_data.examples(variant.data)
    train = variant.train or 500
    data = known.draw(train, variant.test or len(known.labels) - train, variant.seed)
    dtype = getattr(torch, variant.dtype)
    net = network_of(variant, data.shape, known.classes).to(variant.device, dtype)
    data = data.to(variant.device, dtype)
    return LearningProblem(net, loss, data.x, data.y, judge(loss, data), variant.chunk)


def network_of(variant: Variant, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network of a variant for inputs of a shape.

    Raises:
        Unusable: it is not made for inputs of this shape.
    """
    dims = {"mlp": (1, 3), "plain": (1, 3), "language": (1,)}.get(variant.net, (3,))
    if len(shape) not in dims or (variant.net == "language") != (variant.loss == "next token"):
        raise Unusable(f"the network {variant.net} is not made for inputs {shape} of {variant.data}; choose another")
    if variant.net in SMALL:
        return SMALL[variant.net](variant.norm, variant.seed, shape, classes)
    width = variant.width or WIDTHS[variant.net]
    return DEEP[variant.net](variant.norm, variant.seed, shape, classes, width, variant.invariant)
