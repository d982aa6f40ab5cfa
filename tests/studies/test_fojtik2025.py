"""Norm against sharpness: the closed forms of the toy, its two extremes, and a sweep against single runs."""

import numpy as np
import pytest
import torch

from sharpscope.autodiff.batched import BatchedRuns
from sharpscope.studies._shared.ode import descent
from sharpscope.studies.fojtik2025 import Config
from sharpscope.studies.fojtik2025.datum import (
    X,
    dense_sharpness,
    errors,
    field,
    flow_end,
    gain,
    losses,
    product,
    sharpness,
    summary,
    sweep,
)

RNG = np.random.default_rng(0)


def test_flow_and_sharpness_are_those_of_autograd() -> None:
    W = RNG.standard_normal((5, 12))
    assert np.allclose(field(W), -BatchedRuns(losses).grad(torch.as_tensor(W)).numpy(), rtol=1e-11, atol=1e-13)
    assert sharpness(W) == pytest.approx([dense_sharpness(w) for w in W], rel=1e-11)


def test_the_extremes_are_single_coordinates() -> None:
    """Where ⟨x, β⟩ = 1 and u = v: ½‖(u,v)‖² = Σβ and λ1 = 2 Σ x²β; all others lie between those of one coordinate."""
    ends = {}
    for i in (0, 5):
        u = np.sqrt(np.eye(6)[i] / X[i])
        ends[i] = float(u @ u), float(sharpness(np.concatenate([u, u])))
    assert ends[0] == pytest.approx((1 / 0.4, 2 * 0.4)) and ends[5] == pytest.approx((1 / 2, 2 * 2))
    for p in RNG.dirichlet(np.ones(6), 20):
        u = np.sqrt(p / X)
        assert ends[5][0] <= u @ u <= ends[0][0] + 1e-12
        assert ends[0][1] - 1e-12 <= sharpness(np.concatenate([u, u])) <= ends[5][1] + 1e-12


def test_a_sweep_is_many_single_runs() -> None:
    starts, fractions = 0.05 + 1e-3 * RNG.standard_normal((2, 12)), np.array([0.2, 0.8, 1.2, 1.5, 4.0])
    runs = sweep(starts, fractions, 3000)
    assert runs.converged.tolist() == [[True] * 4 + [False]] * 2
    end, critical = flow_end(starts[1])
    alone = descent(field, starts[1], 1.2 * critical, 3000)[-1]
    assert product(alone) == pytest.approx(product(runs.ends[1, 2]), abs=1e-7)
    assert product(alone) @ X == pytest.approx(1, abs=1e-8) and product(end) @ X == pytest.approx(1, abs=1e-8)
    assert runs.stability_ratio[1, 2] == pytest.approx(sharpness(alone) * 1.2 * critical / 2, rel=1e-6)
    assert runs.norm[1, 2] == pytest.approx(alone @ alone / (end @ end), rel=1e-6)
    found = summary(runs, 1, fractions, np.array([np.eye(6)[5] / X[5]]))
    assert found["least_norm"] == 1 and found["interior"] == 0 and found["at_edge"] == 1
    assert max(found["norm_apart"], found["sharp_apart"]) < 0.05
    assert found["norm_order"] == 1 and found["sharp_order"] == -1


def test_gain_is_one_where_an_end_is_best() -> None:
    assert gain(np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])).tolist() == [1, 0.5]
    assert errors(np.eye(2), np.array([1.0, 0.0])).tolist() == [0, 2]


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fractions is \(1.0, -1.0\); it must be positive"):
        Config(fractions=(1.0, -1.0))
