"""Norm against sharpness: the closed forms of the toy, its two extremes, and a sweep against single runs."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sharpscope.autodiff.batched import BatchedRuns
from sharpscope.studies._shared.data import flat_digits
from sharpscope.studies._shared.deep import Stack
from sharpscope.studies._shared.ode import descent
from sharpscope.studies.fojtik2025 import Config, Rates, _at_all_rates
from sharpscope.studies.fojtik2025.datum import (
    X,
    dense_sharpness,
    errors,
    field,
    flow_end,
    from_shared,
    gain,
    losses,
    product,
    shared_losses,
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


def test_shared_weights_take_the_same_steps_at_half_of_the_rate() -> None:
    w = np.abs(RNG.standard_normal((3, 6)))
    both = np.concatenate([w, w], 1)
    shared = BatchedRuns(shared_losses).grad(torch.as_tensor(w)).numpy()
    assert shared / 2 == pytest.approx(-field(both)[:, :6], rel=1e-12)
    on_minimizer = w[:1] / np.sqrt(np.square(w[:1]) @ X)
    dense = torch.linalg.eigvalsh(BatchedRuns(shared_losses).hessian(torch.as_tensor(on_minimizer))[0])[-1].item()
    assert dense / 2 == pytest.approx(float(sharpness(np.concatenate([on_minimizer, on_minimizer], 1))[0]), rel=1e-12)
    off, by_noise = from_shared(0.05 + 1e-3 * RNG.standard_normal(12), np.array([0.5, 1.2]), 3000)
    assert off <= 1e-9 and by_noise <= 1e-2  # at the edge the noise of the start has shrunk by 1e-3 and more


def test_a_network_is_compared_at_all_rates_with_its_slow_run() -> None:
    class Log:
        rows: ClassVar[list[dict[str, Any]]] = []

        def append(self, **row: Any) -> None:
            self.rows.append(row)

    log: Any = Log()
    data, stack = flat_digits(20, 50, 4.0, 0), Stack(64, 6, 2, 10, activation="tanh")
    setting = Rates("net", stack, data, 0.05, 0.2, (0.9, 1.5, 1e4))
    _at_all_rates(log, lambda fraction: None, setting, 0, 2000)
    assert [row["run"] for row in log.rows] == ["net, flow", "net", "net"]  # and the last diverges
    for row in log.rows:
        assert 0 <= row["accuracy"] <= 1 and row["l1"] > row["norm"] > 0
    assert log.rows[1]["l1"] == pytest.approx(log.rows[0]["l1"], rel=0.05)


def test_gain_is_one_where_an_end_is_best() -> None:
    assert gain(np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])).tolist() == [1, 0.5]
    assert errors(np.eye(2), np.array([1.0, 0.0])).tolist() == [0, 2]


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fractions is \(1.0, -1.0\); it must be positive"):
        Config(fractions=(1.0, -1.0))
