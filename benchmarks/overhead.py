"""What the monitor costs, and how right it is: budgets of 2, 5 and 20 % on a conv net and a transformer.

    python -m benchmarks.overhead        # or make overhead: six minutes, writes benchmarks/OVERHEAD.md

The overhead is measured from outside, by the clock around `step`, and by what the monitor says of itself.  The truth is
a solve to 1e-8 in double precision at the weights of every measurement, on the monitor's probe set.
"""

import argparse
import copy
import datetime
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

import sharpscope as ss
from sharpscope.measures import measures
from sharpscope.measures.iterate import midpoint

Batch = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Two pre-norm blocks on 16 tokens, with dropout."""

    def __init__(self, tokens: int = 32, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.readout = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.blocks(self.embed(x))).transpose(1, 2)


def conv() -> nn.Module:
    """Three convolutions with batch normalization."""
    blocks: list[nn.Module] = []
    for inside, outside in ((3, 16), (16, 32), (32, 64)):
        blocks += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.GELU()]
        blocks += [nn.AvgPool2d(2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def images(n: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=g)
    signal = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return signal[y] + 2 * torch.randn(n, 3, 32, 32, generator=g), y


def tokens(n: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(32, (n, 17), generator=g)
    x[:, 1::2] = (x[:, ::2][:, :8] * 5 + 3) % 32  # every other token follows from the one before
    return x[:, :-1], x[:, 1:]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch], Callable[..., torch.optim.Optimizer]]] = {
    "conv net, SGD": (conv, images, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4)),
    "transformer, AdamW": (Transformer, tokens, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)),
}


def truth(monitor: ss.Monitor, model: nn.Module, w: Tensor) -> float:
    """The ratio at w on the probe set of the monitor, by a cold solve in double precision."""
    twin = copy.deepcopy(model).double()
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in monitor.measured.data]
    f = ss.Objective(twin, nn.functional.cross_entropy, data, without_dropout=True)
    found = monitor.optimizer_state.stability()
    assert found is not None
    stability = ss.optimizers.Stability(found.metric.double(), found.decay.double())
    return measures.stability_ratio(ss.measures.Iterate(f, w.double(), rtol=1e-8, stability=stability))


def run(name: str, budget: str, steps: int, *, check: bool) -> str:
    make, data, optimize = CASES[name]
    torch.manual_seed(0)
    model = make()
    optimizer = optimize(model.parameters())
    f = ss.Objective(model, nn.functional.cross_entropy, [data(512, 1)], without_dropout=True)
    points: list[Tensor] = []

    def point(before: Tensor, after: Tensor) -> Tensor:
        points.append(midpoint(before, after))
        return points[-1]

    monitor = ss.Monitor(f, optimizer, budget=budget, steps=steps, point=point)
    inside = outside = 0.0
    errors: list[float] = []
    for step in range(steps):
        began = perf_counter()
        x, y = data(128, 1000 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        middle = perf_counter()
        rows = len(monitor.history)
        monitor.step()
        ended = perf_counter()
        outside, inside = outside + middle - began, inside + ended - middle
        if check and len(monitor.history) > rows:
            exact = truth(monitor, model, points[-1])
            errors.append(abs(monitor.history.columns["stability_ratio"][-1] / exact - 1))
            monitor.resumed = perf_counter()
    plan = monitor.measuring.plan
    probe = "none" if plan is None else f"{plan.examples}"
    right = f"{sum(e <= 0.02 for e in errors)} of {len(errors)}" if errors else ""
    worst = f"{max(errors):.1e}" if errors else ""
    shares = f"{budget} | {inside / outside:.2%} | {monitor.overhead:.2%}"
    return (
        f"| {name} | {1000 * outside / steps:.0f} | {shares} | {len(monitor.history)} | {probe} | {right} | {worst} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("OVERHEAD.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "sharpscope"))
    lines = [
        "# What the monitor costs",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}; {versions}."
        f" {args.steps} steps with 128 examples each: short runs of small networks are the hard case for a budget.",
        "",
        "| run | ms a step | budget | overhead | by its own account | measured | examples | within 2 % | worst error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name in CASES:
        for budget in ("2%", "5%", "20%"):
            lines.append(run(name, budget, args.steps, check=budget == "5%"))
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
