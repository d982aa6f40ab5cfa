"""Normalizers in deep networks: Jacobians by other ways, the bound, and homogeneity."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sharpscope.autodiff.batched import jacobian
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared.data import flat_digits
from sharpscope.studies._shared.deep import Stack, log_norms
from sharpscope.studies.than2025 import Config, jobs

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STACK = Stack(6, 7, 4, norm="LN")


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("places", [(), (1,), (2, 4), (1, 2, 3, 4)])
def test_jacobians_carried_forward_are_automatic_ones(
    activation: str, residual: bool, outputs: int, places: tuple[int, ...]
) -> None:
    stack = replace(STACK, activation=activation, residual=residual, outputs=outputs, normalized=frozenset(places))
    W = stack.draw(2, [1])
    automatic = jacobian(lambda x: stack(W[1:], x)[0], X)
    assert torch.allclose(stack.jacobian(W, X)[1], automatic, rtol=1e-10, atol=1e-12)


def test_layer_normalization_has_a_jacobian_of_norm_one_over_its_deviation() -> None:
    one = Stack(6, 6, 1, norm="LN")
    z = X
    y = (z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True)
    J = jacobian(lambda z: (z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True), z)
    assert torch.allclose(torch.linalg.matrix_norm(J, 2), 1 / z.std(1, correction=0), rtol=1e-12)
    W = torch.eye(6, dtype=torch.float64).reshape(1, -1)
    assert torch.allclose(one.deviations(W, X)[0, 0], X.std(1, correction=0))
    assert torch.allclose(one(W, X)[0], y.clamp_min(0))


@pytest.mark.parametrize("places", [(), (1, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
def test_the_bound_holds_and_the_last_normalizer_erases_all_gains_before_it(
    gain: float, places: tuple[int, ...]
) -> None:
    """Bias-free ReLU networks are homogeneous: ‖J‖ goes as gain^(depth - place of the last normalizer), exactly."""
    stack = replace(STACK, normalized=frozenset(places))
    norms, bound = log_norms(stack, stack.draw(3, [2], gain), X)
    alone, _ = log_norms(stack, stack.draw(3, [2]), X)
    assert (norms <= bound + 1e-9).all()
    power = 4 - max(places, default=0)
    expected = alone + power * torch.tensor(gain, dtype=torch.float64).log()
    assert torch.allclose(norms, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["none", "LN"])
def test_without_normalizers_the_bound_is_the_product_of_norms_at_every_input(norm: str) -> None:
    stack = replace(STACK, norm=norm, normalized=frozenset())
    W = stack.draw(3, [4])
    product = sum(torch.linalg.matrix_norm(w, 2).log() for w in stack.matrices(W))
    _, bound = log_norms(stack, W, X)
    assert torch.allclose(bound.median(dim=1).values, torch.as_tensor(product))
    assert torch.allclose(bound.mean(1), torch.as_tensor(product))


def test_what_is_recorded_stays_below_its_bound_with_any_number_of_normalizers(tmp_path: Path) -> None:
    """Medians of both, as they are drawn: the bound holds at every input, so it holds for them."""
    config = Config(weights=3, width=16, depth=4, trained=False)
    for job in jobs(config)[:3]:
        log = RunLog(tmp_path, job.name)
        job.work(log, lambda share: None, **job.arguments)
        h = History(log.rows)
        for run in set(h.runs) - {"two ways"}:
            size, bound = h.table(run, "size", "bound")
            assert len(size) >= 5 and (size <= bound).all(), run


def test_batch_normalized_stacks_standardize_units_over_examples() -> None:
    stack = Stack(6, 7, 2, norm="BN")
    for _, y, _ in stack.layers(stack.draw(2, [3]), X):
        assert torch.allclose(y.mean(1), torch.zeros(2, 7, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(y.std(1, correction=0), torch.ones(2, 7, dtype=torch.float64))


def test_flat_digits_have_the_norm_that_is_asked_for() -> None:
    data = flat_digits(100, 50, 8.0, seed=3)
    assert data.x.shape == (100, 64) and data.test_x.shape == (50, 64)
    assert data.x.square().sum(1).mean().item() == pytest.approx(64) and data.x.mean(0).abs().max() < 1e-12
    assert torch.equal(data.y.argmax(1), data.labels) and torch.equal(data.y.sum(1), torch.ones(100).double())


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="width is -1; it must be positive"):
        Config(width=-1)
