"""Descent with noise around a minimum that fits all examples: the loss at which it stays, and where its weights go.

J the Jacobian of the outputs, λ_i curvatures of the minimum, η the step, q_i = 1 - ηλ_i.  After T steps with noise of
deviation σ in each entry of the gradient, to second order:

    H = JᵀJ/n                                    at most n of P directions are curved
    V_i ← q_i² V_i + η²σ²                        variance along direction i, at each step
    V_i(T) = η²σ² (1 - q_i^{2T})/(1 - q_i²)      η²σ²T where λ_i = 0
    E L - L* ≈ ½ Σ λ_i V_i(T)                    flat directions do not count

Noise ε of deviation s on the labels moves the gradient by -Jᵀε/n, which lies in the curved directions.  Noise alike in
all directions is as large in the mean square if

    Pσ² = E‖Jᵀε/n‖² = s² tr H/n

n examples of d numbers, w neurons, P weights, R runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...autodiff.batched import BatchedRuns, GradientFunction, jacobian
from ...optimizers.descend import descend, noisy
from ...optimizers.gd import GD
from .._shared.minimize import minimize


@dataclass(frozen=True)
class FittedNet:
    """A network and the examples that it is fitted to, inputs ``(n, d)`` and targets ``(n,)``.

    ``f(x) = aᵀ tanh(Vx + b)/√w``, weights W = (V, b, a) ``(R, w(d + 2))``.
    """

    x: Tensor
    y: Tensor
    width: int

    @classmethod
    def draw(cls, width: int, examples: int, seed: int) -> "FittedNet":
        """A network and random examples in 8 dimensions.

        ``x ~ 1.5 N(0, I/8)``, ``y = tanh 2x₁ + ½x₂x₃ + N(0, 0.2²)``.
        """
        rng = np.random.default_rng([101, seed])
        x = 1.5 * rng.standard_normal((examples, 8)) / np.sqrt(8)
        y = np.tanh(2 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.2 * rng.standard_normal(examples)
        return cls(torch.from_numpy(x), torch.from_numpy(y), width)

    @property
    def size(self) -> int:
        """The number of weights, P."""
        return self.width * (self.x.shape[1] + 2)

    def outputs(self, W: Tensor) -> Tensor:
        """Outputs ``f(x_i)`` ``(R, n)`` of all runs."""
        w, d = self.width, self.x.shape[1]
        V, b, a = W.split([w * d, w, w], dim=1)
        hidden = torch.tanh(self.x @ V.view(-1, w, d).mT + b[:, None])
        return (hidden @ a[:, :, None])[:, :, 0] / w**0.5

    def losses(self, W: Tensor) -> Tensor:
        """Losses of all runs, ``½ mean (f(x_i) - y_i)²`` ``(R,)``."""
        return 0.5 * (self.outputs(W) - self.y).square().mean(1)

    def start(self, seed: int) -> Tensor:
        """Random weights to start from, ``N(0, 1)`` ``(P,)``."""
        rng = np.random.default_rng([102, seed, self.width])
        return torch.from_numpy(rng.standard_normal(self.size))

    def with_noisy_labels(self, deviation: float, seed: int) -> GradientFunction:
        """Losses and gradients with new noise on all labels in each step."""
        generator = torch.Generator().manual_seed(seed)

        def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
            noise = deviation * torch.randn(len(W), len(self.y), generator=generator, dtype=W.dtype)
            f = BatchedRuns(lambda W: 0.5 * (self.outputs(W) - self.y - noise).square().mean(1))
            return f.value_and_grad(W)

        return slope


@dataclass(frozen=True)
class Minimum:
    """A minimum: weights ``(P,)``, loss L*, rising curvatures ``(P,)``, their directions ``(P, P)`` in columns."""

    net: FittedNet
    weights: Tensor
    loss: float
    curvatures: Tensor
    directions: Tensor

    @classmethod
    def near(cls, net: FittedNet, w: Tensor, below: float = 1e-15) -> "Minimum":
        """The minimum that L-BFGS finds from w ``(P,)``, once its loss is at most `below`."""
        f = BatchedRuns(net.losses)
        best = minimize(f.recorded(w[None]), w, below=below)
        curvatures, directions = torch.linalg.eigh(f.hessian(best.weights[None])[0])
        return cls(net, best.weights, best.loss, curvatures, directions)

    @property
    def rate(self) -> float:
        """The step of descent from here, ``1/λ_max``."""
        return 1 / self.curvatures[-1].item()

    @property
    def curved(self) -> Tensor:
        """The n directions of greatest curvature ``(P, n)``."""
        return self.directions[:, -len(self.net.y) :]

    @property
    def rank(self) -> int:
        """Number of curvatures above 1e-6 of the greatest."""
        return int((self.curvatures > 1e-6 * self.curvatures[-1]).sum())

    def hessian_error(self) -> float:
        """Relative distance of the Hessian from that of n squares, ``‖H - JᵀJ/n‖ / ‖JᵀJ/n‖``."""
        J = jacobian(self.net.outputs, self.weights[None])[0]
        gauss = J.T @ J / len(self.net.y)
        return ((self.directions * self.curvatures @ self.directions.T - gauss).norm() / gauss.norm()).item()

    def isotropic_deviation(self, deviation: float) -> float:
        """Deviation of noise alike in all directions that is as large as noise s on labels, ``σ = s (tr H/nP)^½``."""
        return deviation * (self.curvatures.sum().item() / (len(self.net.y) * self.net.size)) ** 0.5

    def noisy_descents(
        self,
        noises: tuple[float, ...],
        *,
        runs: int,
        steps: int,
        basin: float,
        seed: int,
        progress: Callable[[float], None],
    ) -> Iterator[dict[str, float]]:
        """For each σ the mean rise of the loss in so many runs, its prediction, and the fraction of runs that stay.

        A run stays if its loss never rises by `basin`; `single` is the median of variance over V_i, of n directions.
        """
        sigma = torch.tensor(noises, dtype=self.weights.dtype).repeat_interleave(runs)[:, None]
        W = self.weights.repeat(len(sigma), 1)
        highest = torch.zeros(len(sigma), dtype=W.dtype)

        def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            torch.maximum(highest, losses - self.loss, out=highest)
            if step % 50 == 0:
                progress(step / steps)

        slope = noisy(BatchedRuns(self.net.losses).recorded(W), sigma, seed)
        end = descend(slope, W, GD(self.rate), steps, watch=watch)
        rises, heights, displacements = (
            v.split(runs) for v in (end.losses - self.loss, highest, end.weights - self.weights)
        )
        for noise, rise, height, moved in zip(noises, rises, heights, displacements, strict=True):
            along = variances(self.curvatures[-len(self.net.y) :], self.rate, noise, steps)
            excess, predicted = rise.mean().item(), expected_excess(self.curvatures, self.rate, noise, steps)
            yield {
                "noise": noise,
                "single": ((moved @ self.curved).square().mean(0) / along).median().item(),
                "excess": excess,
                "predicted": predicted,
                "ratio": excess / predicted,
                "stay": (height < basin).double().mean().item(),
            }

    def displacements(
        self, slope: GradientFunction, runs: int = 32, steps: int = 500
    ) -> list[tuple[int, dict[str, float]]]:
        """Every 10 steps the `share` of displacements in the n directions, and `around` the mean of all runs."""
        seen: list[tuple[int, dict[str, float]]] = []

        def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            if step and step % 10 == 0:
                moved = W - self.weights
                around = fraction_within(moved - moved.mean(0), self.curved)
                seen.append((step, {"share": fraction_within(moved, self.curved), "around": around}))

        descend(slope, self.weights.repeat(runs, 1), GD(self.rate), steps, watch=watch)
        return seen


def variances(eigenvalues: Tensor, rate: float, noise: float, steps: int) -> Tensor:
    """Variances along the directions, ``V_i = η²σ² (1 - q_i^{2T})/(1 - q_i²)``, or ``η²σ²T`` where they are flat."""
    q2 = (1 - rate * eigenvalues).square()
    flat = (1 - q2).abs() < 1e-12
    total = torch.where(flat, float(steps), (1 - q2**steps) / torch.where(flat, 1.0, 1 - q2))
    return (rate * noise) ** 2 * total


def expected_excess(eigenvalues: Tensor, rate: float, noise: float, steps: int) -> float:
    """Mean loss above the minimum after T steps, ``½ Σ λ_i V_i``."""
    return 0.5 * (eigenvalues @ variances(eigenvalues, rate, noise, steps)).item()


def fraction_within(moved: Tensor, directions: Tensor) -> float:
    """Fraction of squared displacements ``(R, P)`` in orthonormal directions ``(P, n)``, ``Σ ‖UᵀΔ‖² / Σ ‖Δ‖²``."""
    return ((moved @ directions).square().sum() / moved.square().sum()).item()
