"""Training and test sets, and how they are drawn from all examples there are."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from ....errors import InvalidValue


@dataclass(frozen=True)
class Split:
    """Training and test set: inputs ``(n, ...)``, regression targets ``(n, c)``, class labels ``(n,)``.

    Of text, inputs, targets and labels are token numbers ``(n, t)``, the latter those that come next.
    """

    x: Tensor
    y: Tensor
    labels: Tensor
    test_x: Tensor
    test_y: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: channels, height, width of an image; the length of a vector or a text."""
        return tuple(self.x.shape[1:])

    def to(self, device: str, dtype: torch.dtype) -> "Split":
        """Move everything to a device, with real numbers in `dtype`."""
        parts = {name: v.to(device, dtype if v.is_floating_point() else None) for name, v in vars(self).items()}
        return Split(**parts)


@dataclass(frozen=True)
class Examples:
    """All examples there are: inputs ``(n, ...)``, bytes of which stand for numbers from 0 to 1, and labels.

    Those of a source with a test set of its own, which follows them, are drawn from the first `fit` only.
    """

    source: str
    x: NDArray[Any]
    labels: NDArray[np.int64]
    classes: int
    fit: int = 0

    @cached_property
    def sha256(self) -> str:
        """Checksum over inputs and labels, in full."""
        return hashlib.sha256(self.x.tobytes() + self.labels.tobytes()).hexdigest()

    def draw(self, train: int, test: int, seed: int) -> Split:
        """Training and test set in an order drawn by `seed`.

        Inputs are centred by the training mean, targets one-hot and standardized by class; text stays as it is.

        Raises:
            ValueError: there are not so many examples, or a class is missing from those drawn for training.
        """
        first, second = self._indices(train, test, seed)
        labels, test_labels = (torch.tensor(self.labels[i]) for i in (first, second))
        if self.labels.ndim > 1:
            x, test_x = (torch.tensor(self.x[i]) for i in (first, second))
            return Split(x, labels, labels, test_x, test_labels, test_labels)
        x, test_x = (torch.tensor(self.x[i] / 255 if self.x.dtype == np.uint8 else self.x[i]) for i in (first, second))
        hot, test_hot = (one_hot(v, self.classes).double() for v in (labels, test_labels))
        mean, spread = hot.mean(0), hot.std(0, correction=0)
        if not spread.all():
            missing = (spread == 0).nonzero().flatten().tolist()
            raise InvalidValue(f"{train} examples of {self.source} leave classes {missing} out; draw more, or others")
        return Split(
            x - x.mean(0), (hot - mean) / spread, labels, test_x - x.mean(0), (test_hot - mean) / spread, test_labels
        )

    def _indices(self, train: int, test: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The examples to train and to test on."""
        n, draw = len(self.labels), np.random.default_rng(seed)
        fit = self.fit or n
        order = np.concatenate([draw.permutation(fit), fit + draw.permutation(n - fit)])
        begin = self.fit or train
        if train > fit or test > n - begin:
            raise InvalidValue(
                f"{self.source} has {n} examples{f', the first {fit} to train on' if self.fit else ''}:"
                f" not {train} to train and {test} to test on"
            )
        return order[:train], order[begin : begin + test]
