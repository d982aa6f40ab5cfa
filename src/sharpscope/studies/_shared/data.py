"""Data of the studies: bundled with a dependency or made from a seed, always the same."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Split:
    """Training and test set: inputs ``(n, ...)``, regression targets ``(n, c)``, class labels ``(n,)``."""

    x: Tensor
    y: Tensor
    labels: Tensor
    test_x: Tensor
    test_y: Tensor
    test_labels: Tensor


def _shuffled_digits(seed: int) -> tuple[Tensor, Tensor]:
    """Pixels ``(n, 64)`` between 0 and 1 and labels ``(n,)`` of all digits, in an order drawn by `seed`."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(seed).permutation(len(raw.target))
    return torch.tensor(raw.data[order] / 16), torch.tensor(raw.target[order])


def digits(train: int = 500, seed: int = 0) -> Split:
    """Handwritten digits, 8×8 grey images in 10 classes, as shipped with scikit-learn.

    Pixels over 16 minus the training mean, ``(n, 1, 8, 8)``; one-hot targets standardized per class.  A permutation
    by `seed` picks the training images; the test set is all others.
    """
    x, labels = _shuffled_digits(seed)
    x = x.view(-1, 1, 8, 8)
    hot = one_hot(labels, 10).double()
    y = (hot - hot[:train].mean(0)) / hot[:train].std(0, correction=0)
    x = x - x[:train].mean(0)
    return Split(x[:train], y[:train], labels[:train], x[train:], y[train:], labels[train:])


def flat_digits(train: int, test: int, factor: float, seed: int = 0) -> Split:
    """Digits as centred vectors of 64 with root mean square norm `factor`, and plain one-hot targets.

    Mean and norm are those of the training images.
    """
    x, labels = (v[: train + test] for v in _shuffled_digits(seed))
    x = x - x[:train].mean(0)
    x = factor * x / x[:train].square().sum(1).mean().sqrt()
    y = one_hot(labels, 10).double()
    return Split(x[:train], y[:train], labels[:train], x[train:], y[train:], labels[train:])


def smooth_function(train: int = 80, test: int = 2000, seed: int = 0) -> Split:
    """A smooth function of standard normal x in 20 dimensions, without noise; the label is its sign.

    ``tanh(1.5 x₁) + ½ sin x₂``
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(train + test, 20, generator=generator, dtype=torch.float64)
    y = (torch.tanh(1.5 * x[:, 0]) + 0.5 * torch.sin(x[:, 1]))[:, None]
    labels = (y[:, 0] > 0).long()
    return Split(x[:train], y[:train], labels[:train], x[train:], y[train:], labels[train:])
