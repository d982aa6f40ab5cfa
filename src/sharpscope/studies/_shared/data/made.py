"""Data that come with scikit-learn or are made from a seed, always the same."""

import numpy as np
import torch
from torch.nn.functional import one_hot

from .split import Examples, Split


def all_digits(argument: str = "") -> Examples:
    """All handwritten digits, 8×8 grey images in 10 classes, as shipped with scikit-learn; pixels over 16."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return Examples("digits", raw.data.reshape(-1, 1, 8, 8) / 16, raw.target, 10)


def digits(train: int = 500, seed: int = 0) -> Split:
    """Handwritten digits: `train` images drawn by `seed`, the test set being all others."""
    known = all_digits()
    return known.draw(train, len(known.labels) - train, seed)


def flat_digits(train: int, test: int, factor: float, seed: int = 0) -> Split:
    """Digits as centred vectors of 64 with root mean square norm `factor`, and plain one-hot targets.

    Mean and norm are those of the training images.
    """
    return flat(all_digits(), train, test, factor, seed)


def flat(known: Examples, train: int, test: int, factor: float, seed: int) -> Split:
    """Images of any kind drawn by `seed` as `flat_digits` has them."""
    order = np.random.default_rng(seed).permutation(len(known.labels))[: train + test]
    x, labels = torch.tensor(known.x[order]).flatten(1), torch.tensor(known.labels[order])
    x = x - x[:train].mean(0)
    x = factor * x / x[:train].square().sum(1).mean().sqrt()
    y = one_hot(labels, known.classes).double()
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
