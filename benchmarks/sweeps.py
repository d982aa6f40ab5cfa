"""What runs side by side save: ``python -m benchmarks.sweeps``, or ``make sweeps``.

A sweep of 32 full-batch runs (32 starts, 32 learning rates) as one computation, against the same runs one after
another: with torch's own module and optimizer, and with `Objective` and a rule.  The three take turns, in one process,
on one thread; ends are compared.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import sharpscope as ss

RUNS, ROUNDS = 32, 5
PLACE = Path(__file__).with_name("SWEEPS.md")
RULES = [ss.GD(0.002 * (r + 1)) for r in range(RUNS)]


def mlp(width: int, examples: int, norm: type[nn.Module] | None) -> ss.Objective:
    """10→width→width→1 with tanh on a smooth function, float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in in (10, width):
        layers += [nn.Linear(fan_in, width), *([norm(width)] if norm else []), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(width, 1)).double()
    x = torch.randn(examples, 10, dtype=torch.float64)
    return ss.Objective(net, nn.functional.mse_loss, [(x, x[:, :1].sin())])


class Diagonal(nn.Module):
    """``⟨u∘v, x⟩``: 2d weights."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.full((d,), 0.5, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u * self.v)


class Chain(nn.Module):
    """``∏ w_i``: one weight a layer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(depth, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.prod()


def toy(net: nn.Module, d: int) -> ss.Objective:
    """A toy on six numbers."""
    x = torch.linspace(0.4, 2, 6, dtype=torch.float64)
    x = x[:, None].expand(6, d) if d > 1 else x
    return ss.Objective(net, nn.functional.mse_loss, [(x, torch.ones(6, dtype=torch.float64))])


CASES: dict[str, tuple[Callable[[], ss.Objective], int]] = {
    "diagonal net, 12 weights": (lambda: toy(Diagonal(6), 6), 300),
    "chain of 16 weights": (lambda: toy(Chain(16), 1), 300),
    "MLP 10-16-16-1, 50 examples": (lambda: mlp(16, 50, None), 100),
    "MLP 10-16-16-1, BN, 50 examples": (lambda: mlp(16, 50, nn.BatchNorm1d), 100),
    "MLP 10-16-16-1, LN, 50 examples": (lambda: mlp(16, 50, nn.LayerNorm), 100),
    "MLP 10-32-32-1, 100 examples": (lambda: mlp(32, 100, None), 100),
    "MLP 10-32-32-1, 300 examples": (lambda: mlp(32, 300, None), 50),
}


def with_objective(f: ss.Objective, W: Tensor, steps: int) -> Tensor:
    ends = []
    for w, rule in zip(W, RULES, strict=True):
        state = rule.init(w)
        for _ in range(steps):
            w, state = rule.step(w, f.grad(w), state)
        ends.append(w)
    return torch.stack(ends)


def with_torch(f: ss.Objective, W: Tensor, steps: int) -> Tensor:
    (batch,) = f.data
    ends = []
    for w, rule in zip(W, RULES, strict=True):
        f.load(w)
        optimizer = torch.optim.SGD(f.model.parameters(), lr=rule.learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            f.loss(f.model(batch[0]), batch[1]).backward()
            optimizer.step()
        ends.append(f.weights())
    return torch.stack(ends)


def row(name: str, make: Callable[[], ss.Objective], steps: int) -> str:
    """One line of the table."""
    f = make()
    W = f.weights() + 0.1 * torch.randn(RUNS, f.size, dtype=torch.float64)
    began = time.thread_time()
    program = ss.autodiff.BatchedRuns.of(f).recorded(W)
    recording = time.thread_time() - began

    def side_by_side(f: ss.Objective, W: Tensor, steps: int) -> Tensor:
        return ss.optimizers.descend(program, W, RULES, steps).weights

    methods = (side_by_side, with_objective, with_torch)
    for method in methods:
        method(f, W, 3)
    times: dict[str, list[float]] = {method.__name__: [] for method in methods}
    ends = {}
    for _ in range(ROUNDS):
        for method in methods:
            began = time.thread_time()
            ends[method.__name__] = method(f, W, steps)
            times[method.__name__].append(time.thread_time() - began)
    ours, own, torchs = (median(times[method.__name__]) for method in methods)
    apart = max((ends["side_by_side"] - ends[n]).abs().max().item() for n in ("with_objective", "with_torch"))
    each = 1e6 * ours / steps / RUNS
    print(f"{name}: {own / ours:.1f} {torchs / ours:.1f} {apart:.1e}", flush=True)
    cells = (
        name,
        f.size,
        f"{each:.1f}",
        f"{own / ours:.1f}",
        f"{torchs / ours:.1f}",
        f"{recording:.2f}",
        f"{apart:.0e}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    torch.set_num_threads(1)
    rows = [row(name, make, steps) for name, (make, steps) in CASES.items()]
    head = (
        f"# Sweeps: {RUNS} runs side by side\n\n{datetime.date.today()}, {os.cpu_count()} cores, one thread, Python"
        f" {platform.python_version()}; torch {torch.__version__}, sharpscope {version('sharpscope')}. Medians of"
        f" {ROUNDS} rounds of processor time.\n\n"
    )
    head += (
        "What is saved is the start of operations: the larger the arrays of one run, the less there is to save.\n"
        "*Recording* a step as a program happens once and is not in the ratios; *difference* is the largest between\n"
        "final weights.\n\n"
    )
    names = ("sweep", "weights", "µs a step and run", "over `Objective`, one by one", "over torch's SGD, one by one")
    table = f"| {' | '.join((*names, 'recording, s', 'difference'))} |\n{'|---' * 7}|\n"
    PLACE.write_text(head + table + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
