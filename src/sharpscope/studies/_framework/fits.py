"""Straight lines, power laws and rank correlations through the numbers of a study."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InvalidValue


@dataclass(frozen=True)
class Line:
    """A line fitted by least squares, ``y ≈ intercept + slope·x``.

    `error` is the standard error of the slope.
    """

    slope: float
    intercept: float
    error: float
    r2: float


def line(x: ArrayLike, y: ArrayLike) -> Line:
    """Fit a line by least squares through at least two points with different x.

    >>> line([0, 1, 2], [1, 3, 5])
    Line(slope=2.0, intercept=1.0, error=0.0, r2=1.0)
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) != len(b) or len(a) < 2 or not np.ptp(a) > 0:
        raise InvalidValue(f"a line needs two points with different x; got x = {a.tolist()}, y = {b.tolist()}")
    u, v = a - a.mean(), b - b.mean()
    slope = float(u @ v / (u @ u))
    rest = float(np.square(v - slope * u).sum())
    error = (rest / max(len(a) - 2, 1) / float(u @ u)) ** 0.5
    return Line(slope, float(b.mean() - slope * a.mean()), error, 1 - rest / float(v @ v) if v.any() else 1.0)


def power(x: ArrayLike, y: ArrayLike) -> Line:
    """Fit a power law by least squares of log y on log x; its slope is the exponent.

    >>> round(power([1, 2, 4], [3, 12, 48]).slope, 12)
    2.0
    """
    return line(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)))


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of Student's t for the mean of at least two numbers that are spread about normally.

    >>> [round(end, 4) for end in mean_interval([1, 2, 3])]
    [-0.4841, 4.4841]
    """
    from scipy.stats import t

    v = np.asarray(values, float)
    if len(v) < 2:
        raise InvalidValue(f"an interval of a mean needs two numbers; got {v.tolist()}")
    reach = float(t.ppf((1 + confidence) / 2, len(v) - 1)) * v.std(ddof=1) / len(v) ** 0.5
    return float(v.mean() - reach), float(v.mean() + reach)


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Slope of the line that fits y over x best."""
    return line(x, y).slope


def exponent(x: ArrayLike, y: ArrayLike) -> float:
    """Exponent of the power of x that fits y best."""
    return power(x, y).slope


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Give the rank correlation of Spearman, with ties at their mean rank.

    >>> spearman([1, 2, 3, 4], [10, 20, 30, 25])
    0.8
    """
    if np.size(x) < 2:
        raise InvalidValue(f"a rank correlation needs two points; got {np.size(x)}")
    ranks = [_ranks(np.asarray(v, float)) for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _ranks(v: np.ndarray) -> np.ndarray:
    """Give the mean rank of each value among all."""
    _, place, counts = np.unique(v, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
