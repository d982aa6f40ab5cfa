"""Runs whose regime is known from theory: the diagnosis is right or undecided, never wrong."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from sharpscope import monitoring
from sharpscope.autodiff.objective import Objective
from sharpscope.monitoring.finding import Finding
from sharpscope.monitoring.monitor import Monitor
from sharpscope.records.history import History

DTYPE = torch.float64
NOTHING = [(torch.zeros(1, 1, dtype=DTYPE), torch.zeros(1, 1, dtype=DTYPE))]


class Surface(nn.Module):
    """A loss of a few weights, in two parameters of half the weights each if `parts`."""

    def __init__(self, law: Callable[[Tensor], Tensor], start: list[float], parts: int = 1) -> None:
        super().__init__()
        pieces = torch.tensor(start, dtype=DTYPE).chunk(parts)
        self.pieces = nn.ParameterList([nn.Parameter(piece.clone()) for piece in pieces])
        self.law = law

    def forward(self, x: Tensor) -> Tensor:
        return self.law(torch.cat(list(self.pieces)))


def on(law: Callable[[Tensor], Tensor], start: list[float], parts: int = 1) -> Objective:
    return Objective(Surface(law, start, parts), lambda output, target: output, NOTHING)


def bowl(curvature: float, parts: int = 1) -> Objective:
    """``½ (λ w₁² + .3 λ w₂²)``: stable up to the threshold of the rule, for ever the same curvature."""
    h = torch.tensor([curvature, 0.3 * curvature], dtype=DTYPE)
    return on(lambda w: (h * w.square()).sum() / 2, [0.3, 1.0], parts)


TOYS = {"A1": (2.0, 0.0, 0.0, 0.0, 0.0), "A2": (6, 0, 0, 0, 0), "A3": (0, 2, 0.3, 1, 2), "A4": (0, 0.3, 0.3, 2, 6)}


def toy(name: str, ratio: float, lr: float, wd: float, height: float) -> Objective:
    """A scale-invariant loss of three weights whose minima form a curve on the sphere, from φ = 1 near the curve.

    ``L = e^g(φ) (s²/2 + κ s³/3 + μ s⁴/4)``, s = z/‖w‖ - a sin 2φ, g = c₁ φ + c₂ sin φ; `height` is s at the start.
    """
    c1, c2, a, kappa, mu = TOYS[name]

    def law(w: Tensor) -> Tensor:
        phi = torch.atan2(w[1], w[0])
        s = w[2] / w.norm() - a * torch.sin(2 * phi)
        return torch.exp(c1 * phi + c2 * torch.sin(phi)) * (s**2 / 2 + kappa * s**3 / 3 + mu * s**4 / 4)

    one = torch.tensor(1.0, dtype=DTYPE)
    f, slope = a * torch.sin(2 * one), 2 * a * torch.cos(2 * one)
    c = (1 - f**2).sqrt()
    sharpness = torch.exp(c1 * one + c2 * torch.sin(one)) * (c**2 + slope**2 / c**2)
    radius = (lr * sharpness / (2 * ratio * (1 - lr * wd))).sqrt()
    z = f + height
    start = torch.stack([(1 - z**2).sqrt() * torch.cos(one), (1 - z**2).sqrt() * torch.sin(one), z]) * radius
    return on(law, start.tolist())


def regression(eps: float, radius: float) -> Objective:
    """Linear regression behind batch normalization, eight examples in twelve dimensions."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 12, generator=g, dtype=DTYPE) * torch.linspace(1.5, 0.5, 12, dtype=DTYPE)
    y = torch.randn(8, generator=g, dtype=DTYPE)
    centred, scale = x - x.mean(0), y.std(unbiased=False)

    def law(w: Tensor) -> Tensor:
        z = centred @ w
        return (scale * z / (z.square().mean() + eps).sqrt() - (y - y.mean())).square().mean()

    start = torch.randn(12, generator=g, dtype=DTYPE)
    return on(law, (radius * start / start.norm()).tolist())


# Of the 71 runs below, written before the rules were changed for them, the rules of before had 47 regimes right,
# 8 wrong and 1 undecided, and could not watch 15; of the 36 new ones 12 right.


@dataclass(frozen=True)
class Run:
    """A run, its regime by theory, further findings that must and that must not appear."""

    objective: Callable[[], Objective]
    regime: str
    optimizer: Callable[[list[nn.Parameter]], Any]
    steps: int = 200
    every: int | Callable[[int], bool] = 10
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    clip: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    known: bool = True  # whether the monitor is given the schedule
    meters: tuple[str, ...] = ()
    bad_step: int = -1  # at which the batch is another one, with a loss of far more


def sgd(lr: float, wd: float = 0.0, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, lr=lr, weight_decay=wd, **options)


def of_threshold(fraction: float, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """On a bowl of curvature one, at this fraction of the largest stable rate."""
    mom, d = options.get("momentum", 0.0), options.get("dampening", 0.0)
    edge = 2 * (1 + mom) / (1 + 2 * mom) if options.get("nesterov") else 2 * (1 + mom) / (1 - d)
    return sgd(fraction * edge, **options)


def split(p: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups; the bowl's first direction at .6 of its threshold, its second at .6 · .3 · 2."""
    return torch.optim.SGD([{"params": p[:1], "lr": 1.2}, {"params": p[1:], "lr": 2.4}])


def on_toy(name: str, ratio: float, il: float, steps: int, regime: str, height: float, **more: Any) -> Run:
    lr = 0.1
    return Run(lambda: toy(name, ratio, lr, il / lr, height), regime, sgd(lr, il / lr), steps, steps // 40 + 1, **more)


OF_INVARIANT = ("top eigenvector", "intrinsic time", "steps to the edge")
"""Findings on scale-invariant weights."""

RUNS: dict[str, Run] = {
    "bowl at .1": Run(lambda: bowl(1.0), "below", of_threshold(0.1), absent=OF_INVARIANT),
    "bowl at .5": Run(lambda: bowl(1.0), "below", of_threshold(0.5)),
    "bowl at .8": Run(lambda: bowl(1.0), "below", of_threshold(0.8)),
    "bowl, heavy ball": Run(lambda: bowl(1.0), "below", of_threshold(0.6, momentum=0.9)),
    "bowl, Nesterov": Run(lambda: bowl(1.0), "below", of_threshold(0.7, momentum=0.9, nesterov=True)),
    "bowl, dampening": Run(lambda: bowl(1.0), "below", of_threshold(0.7, momentum=0.5, dampening=0.5)),
    "bowl, two groups": Run(lambda: bowl(1.0, 2), "below", split),
    "bowl above": Run(lambda: bowl(1.0), "above", of_threshold(1.05), 60, 5),
    "bowl, heavy ball above": Run(lambda: bowl(1.0), "above", of_threshold(1.1, momentum=0.9), 60, 6),
    "bowl far above": Run(lambda: bowl(1.0), "above", of_threshold(2.0), 20, 2),
    "bowl, clipped": Run(lambda: bowl(1.0), "below", of_threshold(0.5), 30, 3, present=("clipping",), clip=0.01),
    **{f"toy {n}, at the edge": on_toy(n, 1.0, 1e-3, 1500, "edge", 0.02, present=("intrinsic time",)) for n in TOYS},
    "toy, shrinking": on_toy(
        "A3", 0.5, 1e-3, 250, "approaching", 1e-2, present=("steps to the edge",), absent=("no time",)
    ),
    "toy, shrinking late": on_toy("A4", 0.3, 1e-3, 400, "approaching", 1e-2, present=("steps to the edge",)),
    "toy without decay": on_toy(
        "A3", 0.5, 0.0, 400, "below", 1e-2, present=("no decay",), absent=("steps to the edge",)
    ),
    "toy without decay, .75": on_toy("A1", 0.75, 0.0, 400, "below", 1e-2, present=("no decay",)),
    "toy, no time": on_toy(
        "A3", 0.5, 1e-5, 200, "below", 1e-2, present=("no time", "settling"), options={"steps": 200}
    ),
    "regression": Run(lambda: regression(0.0, 0.3), "edge", sgd(0.1, 1e-2), 3000, 75, absent=("eps",)),
    "regression held by eps": Run(lambda: regression(0.1, 20.0), "below", sgd(1e-2, 0.5), 2500, 100, ("eps",)),
    "regression without decay": Run(lambda: regression(0.0, 3.0), "below", sgd(0.1), 3000, 75, ("no decay",)),
    **{
        f"net, {norm}": Run(
            lambda norm=norm: cases.invariant(norm),  # type: ignore[misc]
            "edge",
            sgd(0.3, 0.01),
            300,
            10,
            ("intrinsic time",),
        )
        for norm in ("BN", "LN", "RMSNorm", "WN")
    },
    "net, slow": Run(
        lambda: cases.invariant("BN"), "below", sgd(1e-3, 1e-3), 100, 10, ("no time",), options={"steps": 100}
    ),
    "plain net at the edge": Run(cases.plain, "edge", sgd(0.6), absent=OF_INVARIANT),
    "plain net sharpening": Run(cases.plain, "sharpening", sgd(0.3), 200, 20),
    "plain net, slow": Run(cases.plain, "below", sgd(1e-3)),
    "plain net, heavy ball": Run(cases.plain, "edge", sgd(0.6, momentum=0.5), 600, 20),
    "plain net, Adam": Run(cases.plain, "edge", lambda p: torch.optim.Adam(p, 0.02, (0.9, 0.99)), 1200, 20),
    "plain net, AdamW, slow": Run(cases.plain, "below", lambda p: torch.optim.AdamW(p, 1e-5), 60, 5),
    "plain net diverges": Run(cases.plain, "diverged", sgd(1e3), 120, 10),
}  # fmt: skip


def scheduled(kind: type[LRScheduler], **options: Any) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    return lambda optimizer: kind(optimizer, **options)


def factors(law: Callable[[int], float]) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """A schedule by a factor of the rate at every step."""
    return scheduled(schedules.LambdaLR, lr_lambda=law)


def warm_up(steps: int, total: int = 0) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """Linear up over `steps`, then constant, or along a cosine to zero at `total`."""

    def law(t: int) -> float:
        if t < steps:
            return (t + 1) / steps
        return (1 + math.cos(math.pi * min((t - steps) / (total - steps), 1.0))) / 2 if total else 1.0

    return factors(law)


def at_steps(*steps: int) -> Callable[[int], bool]:
    return lambda step: step in steps


class Lion(torch.optim.Optimizer):
    """Sign of an average, as published by Chen et al. (2023)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.add_((0.9 * m + 0.1 * p.grad).sign(), alpha=-group["lr"])
                m.lerp_(p.grad, 0.01)


def hill() -> Objective:
    """The bowl upside down, for who climbs."""
    h = torch.tensor([-1.0, -0.3], dtype=DTYPE)
    return on(lambda w: (h * w.square()).sum() / 2, [0.3, 1.0])


def low_precision() -> Objective:
    """A bowl in bfloat16, most of whose weights are too large for steps of a small rate to change them."""
    f = bowl(1.0)
    return Objective(f.model.bfloat16(), f.loss, [(x.bfloat16(), y.bfloat16()) for x, y in f.data])


def two(p: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """An optimizer for each half of the bowl, at .6 and at .36 of its threshold."""
    return [torch.optim.SGD(p[:1], lr=1.2), torch.optim.SGD(p[1:], lr=2.4)]


def muon_and_adamw(p: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    matrices, others = [q for q in p if q.dim() == 2], [q for q in p if q.dim() != 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]


def torch_s(name: str, lr: float, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda p: getattr(torch.optim, name)(p, lr=lr, **options)


AHEAD = ("peak ahead",)
"""The finding that a rate still to come is past the edge."""

OF_THE_PRESENT = ("twice the rate", "steps to the edge")
"""Findings that speak of the present rate as that of the run."""

NEW_RUNS: dict[str, Run] = {
    # schedules on a surface of fixed curvature
    "cosine, near its end": Run(
        lambda: bowl(1.0), "below", of_threshold(0.8), 190, schedule=scheduled(schedules.CosineAnnealingLR, T_max=200),
        absent=(*OF_THE_PRESENT, *AHEAD),
    ),
    "warm-up and cosine, near its end": Run(
        lambda: bowl(1.0), "below", of_threshold(0.8), 180, schedule=warm_up(20, 200), absent=OF_THE_PRESENT
    ),
    "warm-up to past the edge": Run(
        lambda: bowl(1.0), "below", of_threshold(1.5), 20, 4, schedule=warm_up(40), present=AHEAD,
        options={"steps": 200},
    ),
    "warm-up to a half": Run(
        lambda: bowl(1.0), "below", of_threshold(0.5), 20, 4, schedule=warm_up(40), absent=AHEAD, options={"steps": 200}
    ),
    "warm-up nobody knows of": Run(
        lambda: bowl(1.0), "below", of_threshold(0.8), 30, 5, schedule=warm_up(40), known=False, present=("schedule",)
    ),
    "linear to zero, at its end": Run(
        lambda: bowl(1.0), "below", of_threshold(0.7, momentum=0.9), 200,
        schedule=factors(lambda t: max(1 - t / 200, 0.0)), absent=OF_THE_PRESENT,
    ),
    "restarts, before one": Run(
        lambda: bowl(1.0), "below", of_threshold(1.2), 145, 5, present=AHEAD, options={"steps": 200},
        schedule=scheduled(schedules.CosineAnnealingWarmRestarts, T_0=50),
    ),
    "steps down": Run(
        lambda: bowl(1.0), "below", of_threshold(0.9), 200, absent=(*OF_THE_PRESENT, *AHEAD),
        schedule=scheduled(schedules.MultiStepLR, milestones=[100], gamma=0.1),
    ),
    "a step up past the edge": Run(
        lambda: bowl(1.0), "above", of_threshold(1.5), 175, 5, schedule=factors(lambda t: 0.05 if t < 150 else 1.0)
    ),
    # schedules on nets
    "net, BN, cosine": Run(
        lambda: cases.invariant("BN"), "below", sgd(0.3, 0.01), 290,
        schedule=scheduled(schedules.CosineAnnealingLR, T_max=300),
        absent=OF_THE_PRESENT,
    ),
    "net, BN, warm-up": Run(lambda: cases.invariant("BN"), "edge", sgd(0.3, 0.01), 300, schedule=warm_up(50)),
    "plain net, warm-up": Run(cases.plain, "edge", sgd(0.6), 300, schedule=warm_up(50)),
    "plain net, cosine": Run(
        cases.plain, "below", sgd(0.6), 390, schedule=scheduled(schedules.CosineAnnealingLR, T_max=400)
    ),
    "plain net, AdamW, warm-up and cosine": Run(
        cases.plain, "below", torch_s("AdamW", 0.02), 390, schedule=warm_up(40, 400), absent=OF_THE_PRESENT
    ),
    # further optimizers
    "bowl, ASGD": Run(lambda: bowl(1.0), "below", torch_s("ASGD", 1.0, lambd=0.0)),
    "hill, maximized": Run(hill, "below", sgd(1.0, maximize=True)),
    "bowl, two optimizers": Run(lambda: bowl(1.0, 2), "below", two),
    "bowl, Adagrad": Run(lambda: bowl(1.0), "below", torch_s("Adagrad", 0.3)),
    "bowl, Adadelta": Run(lambda: bowl(1.0), "below", torch_s("Adadelta", 1.0), 100, 5),
    # thought to be at the edge, as the net under Adam is: but the largest squares stay in the metric for ever
    "plain net, amsgrad": Run(cases.plain, "below", torch_s("Adam", 0.02, betas=(0.9, 0.99), amsgrad=True), 1200, 20),
    "plain net, NAdam": Run(cases.plain, "edge", torch_s("NAdam", 0.02, betas=(0.9, 0.99)), 1200, 20),
    "plain net, RAdam, slow": Run(cases.plain, "below", torch_s("RAdam", 1e-5), 60, 5),
    "plain net, Adamax, slow": Run(cases.plain, "below", torch_s("Adamax", 1e-5), 60, 5),
    "plain net, RMSprop, centred": Run(cases.plain, "edge", torch_s("RMSprop", 0.01, centered=True), 600, 20),
    "plain net, Lion": Run(cases.plain, "observed", lambda p: Lion(p, 1e-3), 60, 5, absent=("largest rate",)),
    "plain net, Muon and AdamW": Run(cases.plain, "observed", muon_and_adamw, 60, 5, absent=("largest rate",)),
    "plain net, Rprop": Run(cases.plain, "observed", torch_s("Rprop", 1e-3), 60, 5),
    # few measurements
    "one measurement": Run(lambda: bowl(1.0), "too few", of_threshold(2.0), 12, at_steps(2)),
    "two measurements": Run(lambda: bowl(1.0), "too few", of_threshold(0.5), 60, at_steps(20, 40)),
    "before the first step": Run(lambda: bowl(1.0), "too few", of_threshold(1.0), 0),
    "three early ones": Run(
        lambda: bowl(1.0), "out of date", of_threshold(0.5), 200, at_steps(5, 10, 15), absent=OF_THE_PRESENT
    ),
    "three in the warm-up": Run(
        lambda: bowl(1.0), "out of date", of_threshold(0.9), 200, at_steps(2, 5, 10), schedule=warm_up(40)
    ),
    "three, spread": Run(lambda: bowl(1.0), "below", of_threshold(0.5), 170, at_steps(50, 100, 150)),
    # what lies between the rate and the step
    "bowl above, clipped": Run(lambda: bowl(1.0), "above", of_threshold(1.5), 60, 5, present=("clipping",), clip=0.01),
    "bowl in low precision": Run(
        low_precision, "below", sgd(1e-3), 60, 5, present=("absorbed",), meters=("TensorTable",)
    ),
    "plain net with a bad batch": Run(
        cases.plain, "below", sgd(1e-3), 150, 5, present=("loss spike",), meters=("LossWatch",), bad_step=120
    ),
}  # fmt: skip


ALL_RUNS = RUNS | NEW_RUNS


@dataclass(frozen=True)
class Watched:
    """A run that was watched as it says, and measured at every step besides: the record to which findings are held."""

    findings: dict[str, Finding]
    record: History
    last: int  # step at which it was diagnosed; the record goes on for a while

    def at(self, name: str, first: float, last: float) -> np.ndarray:
        """A column of the record over some steps."""
        steps, values = self.record.table("training", "step", name) if name in self.record.columns else ((), ())
        return np.array([v for step, v in zip(steps, values, strict=True) if first <= step <= last])

    def curvature(self, first: float, last: float) -> np.ndarray:
        """Ratio over learning rate, over some steps."""
        steps, ratios, rates = self.record.table("training", "step", "stability_ratio", "learning_rate")
        kept = (steps >= first) & (steps <= last) & (rates > 0)
        return ratios[kept] / rates[kept]


FURTHER = 40
"""Number of steps that the record goes on for, to see whether what was forecast happens."""


def watch(run: Run) -> Watched:
    """Train, diagnose, and train on for a while."""
    f = run.objective()
    made = run.optimizer(list(f.model.parameters()))
    optimizers = made if isinstance(made, list) else [made]
    scheduler = None if run.schedule is None else run.schedule(optimizers[0])
    options = run.options | ({"scheduler": scheduler} if run.known and scheduler else {})
    if run.meters:
        options["meters"] = [getattr(monitoring, name)() for name in run.meters]
    monitor = Monitor(f, made, every=run.every, **options)
    record = Monitor(f, made, every=1)
    x, y = next(iter(f.data))
    findings: dict[str, Finding] = {}
    for step in range(1, run.steps + FURTHER + 1):
        if step == run.steps + 1:
            findings = {found.name: found for found in monitor.findings()}
            monitor.close()
        target = y + 10 if step == run.bad_step else y
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = f.loss(f.model(x), target)
        loss.backward()
        if run.clip:
            nn.utils.clip_grad_norm_(f.model.parameters(), run.clip)
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step <= run.steps:
            monitor.step(loss, (x, target))
        record.step()
    return Watched(findings, record.history, run.steps)


def near(found: float, record: np.ndarray | float, rel: float = 0.2) -> bool:
    return bool(np.median(record) == pytest.approx(found, rel=rel, abs=1e-3))


def of_ratio(found: Finding, run: Watched) -> bool:
    """Its ratio is that of the record over the same steps, at the rate that it names."""
    n = found.numbers
    first = n.get("first step", n["step"])
    recorded = run.curvature(first, n.get("last step", n["step"]))
    return near(n["ratio"], recorded * n["learning rate"])


def at_edge(found: Finding, run: Watched) -> bool:
    own = np.median(run.at("stability_ratio", found.numbers["first step"], found.numbers["last step"]))
    return 0.9 <= own <= 1.4


def is_above(found: Finding, run: Watched) -> bool:
    late = run.at("stability_ratio", found.numbers["last step"], run.last)
    losses = run.at("loss", run.last, run.last + FURTHER)
    if "expect the loss to rise" in found.text and not np.nanmax(losses) > losses[0]:
        return False
    return of_ratio(found, run) and bool((late > 0.95).all())


def is_below(found: Finding, run: Watched) -> bool:
    return of_ratio(found, run) and bool(run.at("stability_ratio", run.last, run.last)[-1] < 1)


def rose(found: Finding, run: Watched) -> bool:
    """The curvature at one rate is larger now than at the start, and below the edge."""
    curvature = run.curvature(0, run.last)
    return is_below(found, run) and bool(curvature[-1] > 1.1 * curvature[0])


def largest_rate(found: Finding, run: Watched) -> bool:
    steps = [float(n) for n in re.findall(r"\d+", re.findall(r"steps? ([\d to]+)", found.text)[0])]
    return near(found.numbers["largest"], 1 / run.curvature(steps[0], steps[-1]))


def doubles(found: Finding, run: Watched) -> bool:
    """Its ratio is that of the late steps: at the edge single ones come in bursts."""
    return near(found.numbers["ratio"], run.at("stability_ratio", 0.75 * run.last, run.last), 0.4)


def of_vector(found: Finding, run: Watched) -> bool:
    names = [name for name in run.record.columns if name.startswith("fraction/")]
    late = sum(float(np.median(run.at(name, 0.75 * run.last, run.last))) for name in names)
    return bool(found.numbers["fraction"] == pytest.approx(min(late, 1), abs=0.25))


def comes(found: Finding, run: Watched) -> bool:
    """The rate is that of the record at the step, as far as this goes."""
    rates = run.at("learning_rate", found.numbers["step"] - 1, found.numbers["step"] + 1)
    return not len(rates) or bool(max(rates) == pytest.approx(found.numbers["peak"], rel=0.05))


def stays_below(found: Finding, run: Watched) -> bool:
    """The edge is not reached earlier than weight decay alone would bring it."""
    until = run.last + min(found.numbers["steps"], FURTHER)
    return bool((run.at("stability_ratio", run.last, until) < 1.02).all())


def intrinsic(found: Finding, run: Watched) -> bool:
    return near(found.numbers["tau"], run.at("tau", run.last, run.last), 1e-6)


CLAIMS: dict[str, Callable[[Finding, Watched], bool]] = {
    "edge": at_edge,
    "above": is_above,
    "below": is_below,
    "sharpening": rose,
    "approaching": rose,
    "undecided": of_ratio,
    "too few": of_ratio,
    "out of date": of_ratio,
    "twice the rate": doubles,
    "top eigenvector": of_vector,
    "observed": lambda found, run: "stability_ratio" not in run.record.columns,
    "largest rate": largest_rate,
    "peak ahead": comes,
    "schedule": lambda found, run: bool(np.ptp(run.at("learning_rate", 0, run.last)) > 0),
    "steps to the edge": stays_below,
    "intrinsic time": intrinsic,
    "no time": intrinsic,
    "no decay": lambda found, run: not run.at("tau", 0, run.last).any(),
    "diverged": lambda found, run: not np.isfinite(run.record.columns["loss"][int(found.numbers["step"])] or np.nan),
    "clipping": lambda found, run: near(found.numbers["norm"], run.at("applied_gradient", run.last, run.last), 1e-3),
}
"""Whether what a finding claims is what the record of every step shows, by its name."""


REGIMES = (
    *("diverged", "observed", "too few", "out of date"),
    *("edge", "above", "undecided", "below", "approaching", "sharpening"),
)


@pytest.mark.parametrize("name", ALL_RUNS)
def test_the_regime_is_right_and_no_sentence_is_contradicted(name: str) -> None:
    run, watched = ALL_RUNS[name], watch(ALL_RUNS[name])
    found = watched.findings
    regime = next(r for r in REGIMES if r in found)
    assert regime == run.regime, found[regime].text
    assert [p for p in run.present if p not in found] == []
    assert [a for a in run.absent if a in found] == []
    wrong = [f.text for f in found.values() if f.name in CLAIMS and not CLAIMS[f.name](f, watched)]
    assert wrong == []


def test_there_are_enough_of_them() -> None:
    assert len(ALL_RUNS) >= 70
    assert len({run.regime for run in ALL_RUNS.values()}) >= 9
