"""The bound from above holds and is close, and the answers drawn from it are right."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import DTYPE, symmetric
from torch import Tensor

from sharpscope.linalg import SymmetricOperator, lanczos
from sharpscope.linalg.bounds import compare_to_threshold, least_norm
from sharpscope.linalg.eigenpairs import CONFIDENCE


def diagonal(values: Tensor) -> SymmetricOperator:
    """A random start makes a diagonal matrix as good as any of that spectrum."""
    return SymmetricOperator(lambda v: values * v, torch.zeros_like(values))


def network_like(n: int, generator: torch.Generator) -> Tensor:
    """A few outliers, some of them close together, over a bulk around zero whose positive side is longer."""
    bulk = torch.randn(n, generator=generator, dtype=DTYPE).abs() ** 3 * 0.05
    bulk[: n // 3] *= -0.3
    outliers = 3 + 2 * torch.rand(10, generator=generator, dtype=DTYPE)
    bulk[-10:] = outliers
    bulk[-12:-10] = outliers.max() * (1 - torch.tensor([1e-2, 1e-3], dtype=DTYPE))
    return bulk


@pytest.mark.parametrize("b", [1, 2, 5])
def test_least_norm_is_a_quantile_from_below(b: int) -> None:
    norms = np.linalg.norm(np.random.default_rng(0).standard_normal((200_000, b)), axis=1)
    for p in (0.05, 0.01):
        fraction = (norms < least_norm(b, p)).mean()
        assert fraction <= p + 4 * math.sqrt(p / len(norms))  # four standard errors
        assert fraction >= 0.6 * p  # and it is not wasteful


def test_upper_covers_a_thousand_matrices() -> None:
    """Stopped as early as a loose tolerance allows, where the answer is often wrong and the bound has work to do."""
    generator = torch.Generator().manual_seed(0)
    missed, wrong = 0, 0
    for seed in range(1000):
        n = int(100 * 50 ** torch.rand((), generator=generator).item())
        values = network_like(n, generator)
        found = lanczos(diagonal(values), rtol=0.03, seed=seed)
        top = values.max().item()
        missed += found.upper < top
        wrong += found.values[0].item() < 0.99 * top
        assert found.lower[0].item() <= top
    assert wrong >= 20  # the residual alone would mislead
    assert missed <= 6  # of 1000 at 99.9 %: more than 6 has probability 1e-4


@pytest.mark.parametrize("k", [1, 3])
def test_upper_covers_through_restarts(k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(60):
        values = network_like(400, generator)
        found = lanczos(diagonal(values), k, basis=10, rtol=0.01, gap=0.02, max_matvecs=4000, seed=seed)
        whole = lanczos(diagonal(values), k, basis=400, rtol=0.01, gap=0.02, max_matvecs=4000, seed=seed)
        top = values.max().item()
        assert found.values[0].item() <= top <= found.upper <= found.values[0].item() * 1.03
        assert whole.values[0].item() <= top <= whole.upper


def test_upper_closes_in() -> None:
    _, a = symmetric(torch.linspace(-1, 10, 200, dtype=DTYPE))
    gaps = [(p.upper - 10) / 10 for p in (lanczos(a, gap=g, rtol=0.1) for g in (1e-1, 1e-2, 1e-3))]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_answers(dtype: torch.dtype) -> None:
    _, a = symmetric(torch.cat([torch.linspace(0, 1, 200), torch.tensor([2.0])]).to(dtype))
    found = lanczos(a, rtol=1e-3, gap=0.05)
    above, below, near = found.against(1.9), found.against(2.2), found.against(2 + 1e-9)
    assert (above.answer, below.answer) == ("above", "below")
    assert str(above) == f"above 1.9: 2 ≤ λ1 ≤ {found.upper:.6g} (proved, up to rounding)"
    assert str(below).endswith(f"(with probability {CONFIDENCE:.1%})")
    assert near.answer == "undecided" and near.more_matvecs >= 1
    assert f"some {near.more_matvecs} more products may decide" in str(near)


def test_without_a_bound_nothing_is_below() -> None:
    seen: dict[str, Any] = {"lower": 1.0, "value": 1.0, "upper": math.inf, "confidence": 0.999, "num_matvecs": 7}
    assert compare_to_threshold(5.0, **seen).answer == "undecided"
    assert compare_to_threshold(0.5, **seen).answer == "above"


def test_the_guessed_price_of_a_decision() -> None:
    """Spending the guessed products decides, and a fourth of them does not, within a factor that a guess may have."""
    _, a = symmetric(torch.linspace(0, 1, 1000, dtype=DTYPE))
    first = lanczos(a, rtol=0.1)
    open_question = first.against(1.004)
    assert open_question.answer == "undecided"
    decided = lanczos(a, rtol=0.1, gap=0.003)
    assert decided.against(1.004).answer == "below"
    assert decided.num_matvecs / 4 < first.num_matvecs + open_question.more_matvecs < 4 * decided.num_matvecs
