"""A noisy function on the sphere, and training on it beside copies in which one example was replaced.

    y = sin 2x₁ + ½ x₂ + .3 ξ,   ‖x‖ = 1 in 5 dimensions

R data sets or runs side by side, n examples.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...autodiff.batched import GradientFunction
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from .shallow import MAX_BEND, hessian, output, slope, start

RATE, INPUTS, WIDTH, NOISE = 0.5, 5, 64, 0.3
TIMES = (10, 30, 100, 300, 1000)
REPLACED, FRESH = 16, 4000


def draw(n: int, generator: torch.Generator, *runs: int) -> tuple[Tensor, Tensor]:
    """Inputs on the unit sphere ``(.., n, 5)``, and the teacher's values plus noise ``(.., n)``."""
    x = torch.randn(*runs, n, INPUTS, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True)
    return x, teacher(x) + NOISE * torch.randn(*runs, n, generator=generator, dtype=torch.float64)


def teacher(x: Tensor) -> Tensor:
    """Targets without noise, ``sin 2x₁ + ½ x₂``."""
    return torch.sin(2 * x[..., 0]) + 0.5 * x[..., 1]


def on_single_examples(x: Tensor, y: Tensor, generator: torch.Generator) -> GradientFunction:
    """Losses and gradients of R runs on one example a step, drawn for each run by itself.

    Inputs ``(R, n, d)``, targets ``(R, n)``.
    """
    own = torch.arange(len(x))

    def step(W: Tensor, t: int) -> tuple[Tensor, Tensor]:
        i = torch.randint(x.shape[1], own.shape, generator=generator)
        return slope(W, x[own, i, None], y[own, i, None])

    return step


def excess_risks(step: GradientFunction, first: Tensor, fresh: Tensor) -> Tensor:
    """Population risk above that of the noise, ``½ mean (f - teacher)²`` on fresh inputs, at each time ``(T, R)``."""
    seen: list[Tensor] = []

    def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if t in TIMES:
            seen.append(0.5 * (output(W, fresh) - teacher(fresh)).square().mean(1))

    descend(step, first, GD(RATE), max(TIMES), watch=watch)
    return torch.stack(seen)


def replace_examples(n: int, generator: torch.Generator) -> dict[int, dict[str, float]]:
    """Train on one draw beside 16 copies, in each of which one example is replaced, and compare them at each time.

    The example that replaces another is fresh to the first run as the other is to the copy, so that the gap is a mean
    of two.
    """
    x, y = draw(n, generator)
    other_x, other_y = draw(REPLACED, generator)
    own = torch.arange(REPLACED)
    X, Y = x.repeat(REPLACED + 1, 1, 1), y.repeat(REPLACED + 1, 1)
    X[own + 1, own], Y[own + 1, own] = other_x, other_y
    first = start(WIDTH, INPUTS, generator)
    begin = slope(first[None], x, y)[0].item()
    seen: dict[int, dict[str, float]] = {}

    def watch(t: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
        if t in TIMES:
            r, other = output(W, x) - y, output(W, other_x) - other_y
            gaps = r[own + 1, own].square() - r[0, own].square() + other[0].square() - other[own + 1, own].square()
            seen[t] = {
                "stability": (W[1:] - W[0]).square().sum(1).mean().item(),
                "gap": gaps.mean().item() / 4,
                "loss": losses[0].item(),
                "residual": max(r.abs().max().item(), other.abs().max().item()),
                "walked": ((W[0] - first).square().sum() / (2 * RATE * t * begin)).item(),
            }

    descend(lambda W, t: slope(W, X, Y), first.repeat(REPLACED + 1, 1), GD(RATE), max(TIMES), watch=watch)
    return seen


def hessians_along_training(W: Tensor, x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, float]]:
    """Step, Hessian, and the bound ``(B/√m) mean|r|`` of its least eigenvalue, along gradient descent."""
    bend = MAX_BEND / (W.shape[1] // INPUTS) ** 0.5
    done = 0
    for t in (0, 10, 30, 100):
        W = descend(lambda W, t: slope(W, x, y), W, GD(RATE), t - done).weights
        done = t
        yield t, hessian(W, x, y)[0], bend * (output(W, x) - y).abs().mean().item()
