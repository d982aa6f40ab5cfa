"""A small network that tells odd digits from even ones, trained along its minimizers with noise on the labels.

n examples, P weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns
from ...optimizers.base import UpdateRule
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from .._shared.data import flat_digits
from .._shared.deep import Stack
from .._shared.minimize import minimize
from .._shared.streams import stream
from .slow import Array, drift, root_trace


@dataclass(frozen=True)
class Network:
    """One hidden tanh layer and one output; pixels that are the same in all training images are left out."""

    stack: Stack
    x: Tensor
    y: Tensor  # ±1, (n,)
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def on_digits(cls, train: int, width: int, seed: int) -> "Network":
        data = flat_digits(train, 1000, 4.0, seed)
        seen = data.x.abs().amax(0) > 0
        y, test_y = (1.0 - 2 * (labels % 2).double() for labels in (data.labels, data.test_labels))
        stack = Stack(int(seen.sum()), width, 1, 1, activation="tanh")
        return cls(stack, data.x[:, seen], y, data.test_x[:, seen], test_y)

    def losses(self, W: Tensor, y: Tensor) -> Tensor:
        """Compute the losses ``½ mean_i (f_i - y_i)²`` ``(R,)``."""
        return 0.5 * (self.stack(W, self.x)[..., 0] - y).square().mean(1)

    def clean(self) -> BatchedRuns:
        """The loss without noise."""
        return BatchedRuns(self.losses, (self.y[None],))

    def start(self, *seeds: int) -> Tensor:
        """A minimizer ``(P,)``: gradient descent from random weights to a loss of 1e-3, and then exactly."""
        W, f = self.stack.draw(1, seeds, variance=1.0), self.clean()
        near = descend(f.recorded(W), W, GD(0.1), 20000, until=lambda losses: losses < 1e-3)
        return self.settle(near.weights[0])

    def settle(self, w: Tensor) -> Tensor:
        """Minimize the loss without noise from w ``(P,)`` on."""
        return minimize(self.clean().slope, w, below=1e-14).weights

    def outputs(self) -> BatchedRuns:
        """Output number i at row i of weights ``(n, P)``: its gradient holds the slopes J."""
        return BatchedRuns(lambda W: self.stack(W, self.x)[..., 0].diagonal())

    def curvature(self, w: Tensor) -> Array:
        """The diagonal of the Hessian at zero loss, ``D = mean_i J_i²`` ``(P,)``."""
        return self.outputs().grad(w.expand(len(self.x), -1)).square().mean(0).numpy()

    def field(self, w: Tensor, rule: UpdateRule, alpha: float) -> Tensor:
        """The velocity of the slow flow ``(P,)``; the gradient of tr(S H) is ``2 mean_i ∇²f_i S J_i``."""
        f, W = self.outputs(), w.expand(len(self.x), -1)
        J = f.grad(W)

        def pull(S: Array) -> Array:
            return 2 * f.hvp(W, torch.as_tensor(S) * J).mean(0).numpy()

        return torch.as_tensor(drift(J.numpy(), alpha, rule, pull))

    def flow(self, w: Tensor, rule: UpdateRule, alpha: float, until: float, steps: int) -> Tensor:
        """Follow the slow flow by midpoint steps: states ``(steps + 1, P)``."""
        states, h = [w], until / steps
        for _ in range(steps):
            half = w + h / 2 * self.field(w, rule, alpha)
            w = w + h * self.field(half, rule, alpha)
            states.append(w)
        return torch.stack(states)

    def train(
        self, w: Tensor, rule: UpdateRule, steps: int, deviation: float, seeds: tuple[int, ...], points: int
    ) -> Tensor:
        """Follow a rule with fresh noise on all labels at every step, settled at equal intervals ``(points+1, P)``."""
        draw, noisy, found = stream(*seeds), self.y[None].clone(), list[Tensor]()
        slope = BatchedRuns(self.losses, (noisy,)).recorded(w[None])

        def gradients(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
            noisy.copy_(self.y + deviation * torch.randn(noisy.shape, generator=draw, dtype=W.dtype))
            return slope(W, step)

        def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            if step % (steps // points) == 0:
                found.append(self.settle(W[0]))

        descend(gradients, w[None], rule, steps // points * points, watch=watch)
        return torch.stack(found)

    def on_test(self, W: Tensor) -> Tensor:
        """Outputs on the test images ``(R, tests)``."""
        return self.stack(W, self.test_x)[..., 0]

    def row(self, w: Tensor) -> dict[str, float]:
        """Measure what a row of the log holds at weights ``(P,)``."""
        D, out = self.curvature(w), self.on_test(w[None])[0]
        return {
            "trace": float(D.sum()),
            "root_trace": float(root_trace(D)),
            "test_loss": 0.5 * (out - self.test_y).square().mean().item(),
            "test_accuracy": (out * self.test_y > 0).double().mean().item(),
        }


def mismatch(end: Tensor, target: Tensor, start: Tensor) -> float:
    """Distance of outputs from their target, over that of the start from it."""
    return ((end - target).norm() / (start - target).norm()).item()
