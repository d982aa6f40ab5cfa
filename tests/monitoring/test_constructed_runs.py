"""Runs whose regime is known from theory: the diagnosis is right or undecided, never wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

from sharpscope.autodiff.objective import Objective
from sharpscope.monitoring.monitor import Monitor

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


@dataclass(frozen=True)
class Run:
    """A run, its regime by theory, further findings that must and that must not appear."""

    objective: Callable[[], Objective]
    regime: str
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    steps: int = 200
    every: int = 10
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    clip: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


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


def watch(run: Run) -> dict[str, str]:
    """Sentences by name."""
    f = run.objective()
    optimizer = run.optimizer(list(f.model.parameters()))
    monitor = Monitor(f, optimizer, every=run.every, **run.options)
    x, y = next(iter(f.data))
    for _ in range(run.steps):
        optimizer.zero_grad()
        f.loss(f.model(x), y).backward()
        if run.clip:
            nn.utils.clip_grad_norm_(f.model.parameters(), run.clip)
        optimizer.step()
        monitor.step()
    return {found.name: found.text for found in monitor.findings()}


REGIMES = ("diverged", "edge", "above", "undecided", "below", "approaching", "sharpening")
UNDECIDED: set[str] = set()
"""Runs on which the monitor does not commit itself; at most two of thirty."""


@pytest.mark.parametrize("name", RUNS)
def test_the_regime_is_right(name: str) -> None:
    run, said = RUNS[name], watch(RUNS[name])
    regime = next(r for r in REGIMES if r in said)
    assert regime == ("undecided" if name in UNDECIDED else run.regime), said[regime]
    assert [p for p in run.present if p not in said] == []
    assert [a for a in run.absent if a in said] == []


def test_there_are_enough_of_them() -> None:
    assert len(RUNS) >= 30
    assert len(UNDECIDED) <= 2
    assert len({run.regime for run in RUNS.values()}) >= 6
