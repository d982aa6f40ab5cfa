"""ReLU networks on digits with some random labels: their accuracies, and spectral norms over margin.

    s(x) = W_3 relu(W_2 relu(W_1 x))                    64→w→w→10, no biases
    margin = s_y - max_{c≠y} s_c                        positive where x is classified as y
    complexity = ‖W_1‖₂‖W_2‖₂‖W_3‖₂ / median margin     the same at any scale of the matrices

Networks of one width, each with its own fraction of random labels, train side by side, from one start and on the same
batches; an example with a random label keeps it in all networks of a higher fraction.

R networks of w neurons a layer, n examples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...autodiff.batched import BatchedRuns
from ...optimizers.descend import descend
from ...optimizers.gd import GD
from .._shared.data import flat_digits

TRAIN, TEST, BATCH = 200, 1000, 32


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    """Shapes of the three matrices."""
    return (width, 64), (width, width), (10, width)


def matrices(W: Tensor, width: int) -> list[Tensor]:
    """The three matrices of all runs, each ``(R, out, in)``."""
    parts = W.split([a * b for a, b in shapes(width)], dim=1)
    return [part.view(-1, *shape) for part, shape in zip(parts, shapes(width), strict=True)]


def scores(W: Tensor, x: Tensor, width: int) -> Tensor:
    """Scores of the classes, ``W_3 relu(W_2 relu(W_1 x))`` ``(R, n, 10)``."""
    first, second, last = matrices(W, width)
    return torch.relu(torch.relu(x @ first.mT) @ second.mT) @ last.mT


def margins(s: Tensor, labels: Tensor) -> Tensor:
    """Margins ``s_y - max_{c≠y} s_c`` of scores ``(R, n, 10)`` and labels ``(R, n)``."""
    own = s.gather(2, labels[:, :, None])
    others = s.scatter(2, labels[:, :, None], -torch.inf)
    return own[:, :, 0] - others.amax(2)


@dataclass(frozen=True)
class RelabelledDigits:
    """Digits ``(n, 64)`` to train on and to test, and labels ``(R, n)`` of both, some of them random."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def draw(cls, fractions: tuple[float, ...], seed: int, generator: torch.Generator) -> "RelabelledDigits":
        """Replace each of R fractions of all labels by random ones."""
        data = flat_digits(TRAIN, TEST, 8, seed)
        chosen = torch.rand(TRAIN + TEST, generator=generator)
        others = torch.randint(10, (TRAIN + TEST,), generator=generator)
        true = torch.cat([data.labels, data.test_labels])
        labels = torch.stack([torch.where(chosen < fraction, others, true) for fraction in fractions])
        return cls(data.x.float(), labels[:, :TRAIN], data.test_x.float(), labels[:, TRAIN:])

    def losses(self, W: Tensor, pick: Tensor, width: int) -> Tensor:
        """Mean cross-entropy ``(R,)`` of the examples `pick`."""
        s = scores(W, self.x[pick], width)
        each = cross_entropy(s.flatten(0, 1), self.y[:, pick].flatten(), reduction="none")
        return each.view(len(W), -1).mean(1)

    def train(self, width: int, steps: int, generator: torch.Generator, progress: Callable[[float], None]) -> Tensor:
        """Weights ``(R, P)`` after SGD at rate 0.02 with momentum 0.9, from N(0, 2/fan-in)."""
        w = torch.cat([torch.randn(a * b, generator=generator) * (2 / b) ** 0.5 for a, b in shapes(width)])

        def picks() -> Iterator[Tensor]:
            while True:
                yield from torch.randperm(TRAIN, generator=generator)[: TRAIN // BATCH * BATCH].split(BATCH)

        batches = picks()

        def slope(W: Tensor, step: int) -> tuple[Tensor, Tensor]:
            pick = next(batches)
            return BatchedRuns(lambda W: self.losses(W, pick, width)).value_and_grad(W)

        def watch(step: int, W: Tensor, losses: Tensor, g: Tensor) -> None:
            if step % 50 == 0:
                progress(step / steps)

        return descend(slope, w.repeat(len(self.y), 1), GD(0.02, momentum=0.9), steps, watch=watch).weights

    def measure(self, W: Tensor, width: int) -> Iterator[dict[str, float]]:
        """For each network its losses, accuracies, product of spectral norms, gap and complexity."""
        train_scores, test_scores = scores(W, self.x, width), scores(W, self.test_x, width)
        train_accuracy = (train_scores.argmax(2) == self.y).double().mean(1)
        test_accuracy = (test_scores.argmax(2) == self.test_y).double().mean(1)
        norms = torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices(W, width)]).prod(0)
        columns = {
            "train_loss": BatchedRuns(lambda W: self.losses(W, torch.arange(TRAIN), width)).value(W),
            "train_accuracy": train_accuracy,
            "test_accuracy": test_accuracy,
            "norms": norms,
            "gap": train_accuracy - test_accuracy,
            "complexity": norms / margins(train_scores, self.y).median(1).values,
        }
        for r in range(len(W)):
            yield {name: values[r].item() for name, values in columns.items()}
