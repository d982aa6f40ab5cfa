"""Norm against sharpness: the closed forms of the toy, and its two extremes."""

import numpy as np
import pytest
import torch

from sharpscope.replicas import Replicas
from sharpscope.studies._stats import spearman
from sharpscope.studies.fojtik2025 import Config, X, _errors, _gain, flow_field, losses, sharpness

RNG = np.random.default_rng(0)


def test_flow_and_sharpness_are_those_of_autograd() -> None:
    for w in RNG.standard_normal((5, 12)):
        W = torch.as_tensor(w)[None]
        f = Replicas(losses)
        assert np.allclose(flow_field(w), -f.grad(W)[0].numpy(), rtol=1e-11, atol=1e-13)
        assert sharpness(w) == pytest.approx(torch.linalg.eigvalsh(f.hessian(W)[0])[-1].item(), rel=1e-11)


def test_the_extremes_are_single_coordinates() -> None:
    """Where ⟨x, β⟩ = 1 and u = v: ½‖(u,v)‖² = Σβ and λ1 = 2 Σ x²β; all others lie between those of one coordinate."""
    ends = {}
    for i in (0, 5):
        u = np.sqrt(np.eye(6)[i] / X[i])
        ends[i] = float(u @ u), sharpness(np.concatenate([u, u]))
    assert ends[0] == pytest.approx((1 / 0.4, 2 * 0.4)) and ends[5] == pytest.approx((1 / 2, 2 * 2))
    for p in RNG.dirichlet(np.ones(6), 20):
        u = np.sqrt(p / X)
        assert ends[5][0] <= u @ u <= ends[0][0] + 1e-12
        assert ends[0][1] - 1e-12 <= sharpness(np.concatenate([u, u])) <= ends[5][1] + 1e-12


def test_gain_is_one_where_an_end_is_best() -> None:
    assert _gain(np.array([1.0, 2.0, 3.0])) == 1 and _gain(np.array([3.0, 1.0, 2.0])) == 0.5
    assert _errors(np.eye(2), np.array([1.0, 0.0])).tolist() == [0, 2]


def test_rank_correlation_is_scipys() -> None:
    from scipy.stats import spearmanr

    x, y = RNG.integers(0, 5, 30), RNG.integers(0, 5, 30)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares is \(1.0, -1.0\); it must be positive"):
        Config(shares=(1.0, -1.0))
