"""Noise near a minimum: variances against their recursion and against runs, label noise against the Jacobian."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sharpscope.autodiff.batched import BatchedRuns, jacobian
from sharpscope.optimizers.descend import descend, noisy
from sharpscope.optimizers.gd import GD
from sharpscope.studies.imaizumi2022 import Config
from sharpscope.studies.imaizumi2022.margins import RelabelledDigits, margins, matrices, scores, shapes
from sharpscope.studies.imaizumi2022.stagnation import FittedNet, Minimum, expected_excess, fraction_within, variances

CURVATURES = torch.tensor([0.0, 1e-3, 0.1, 1.0, 3.9], dtype=torch.float64)
RATE, NOISE = 0.5, 0.1


@pytest.mark.parametrize("steps", [0, 1, 7, 400])
def test_variances_are_those_of_the_recursion(steps: int) -> None:
    v = torch.zeros(5, dtype=torch.float64)
    for _ in range(steps):
        v = (1 - RATE * CURVATURES).square() * v + (RATE * NOISE) ** 2
    torch.testing.assert_close(variances(CURVATURES, RATE, NOISE, steps), v, rtol=1e-9, atol=0)


def test_the_rise_of_the_loss_comes_to_its_limit_and_the_flat_direction_counts_nothing() -> None:
    curved = CURVATURES[2:]
    limit = RATE * NOISE**2 / 2 * (1 / (2 - RATE * curved)).sum().item()
    assert expected_excess(curved, RATE, NOISE, 10000) == pytest.approx(limit, rel=1e-12)
    padded = torch.cat([torch.zeros(50, dtype=torch.float64), curved])
    assert expected_excess(padded, RATE, NOISE, 10000) == pytest.approx(limit, rel=1e-12)


def test_noisy_descent_on_a_bowl_has_these_variances() -> None:
    bowl = BatchedRuns(lambda W: 0.5 * (CURVATURES * W.square()).sum(1))
    start = torch.zeros(4000, 5, dtype=torch.float64)
    end = descend(noisy(bowl.slope, NOISE, seed=0), start, GD(RATE), 60)
    ratio = end.weights.square().mean(0) / variances(CURVATURES, RATE, NOISE, 60)
    assert (ratio - 1).abs().max() < 4 * (2 / 4000) ** 0.5  # four standard errors
    assert end.losses.mean().item() == pytest.approx(expected_excess(CURVATURES, RATE, NOISE, 60), rel=0.06)


def test_the_network_is_its_formula() -> None:
    p = FittedNet.draw(width=3, examples=5, seed=0)
    W = torch.stack([p.start(0), p.start(1)])
    assert W.shape == (2, p.size) == (2, 30)
    V, b, a = W[1, :24].view(3, 8).numpy(), W[1, 24:27].numpy(), W[1, 27:].numpy()
    by_hand = [a @ np.tanh(V @ x + b) / 3**0.5 for x in p.x.numpy()]
    np.testing.assert_allclose(p.outputs(W)[1].numpy(), by_hand, rtol=1e-13)
    assert p.losses(W)[1].item() == pytest.approx(np.square(by_hand - p.y.numpy()).mean() / 2, rel=1e-13)
    BatchedRuns(p.losses).check(W)


def test_at_a_minimum_the_hessian_has_no_more_directions_than_examples_and_label_noise_stays_in_them() -> None:
    p = FittedNet.draw(width=5, examples=10, seed=1)
    found = Minimum.near(p, p.start(1), below=1e-20)
    assert found.loss <= 1e-20
    at, values, vectors = found.weights[None], found.curvatures, found.directions
    J = jacobian(p.outputs, at)[0]
    torch.testing.assert_close((vectors * values) @ vectors.T, J.T @ J / 10, rtol=0, atol=1e-8)
    assert found.hessian_error() < 1e-7 and found.rank <= 10 and found.curved.shape == (p.size, 10)
    W, top = at.expand(3000, -1), vectors[:, -10:]
    g = p.with_noisy_labels(0.05, seed=0)(W, 0)[1]
    assert fraction_within(g, top) > 1 - 1e-12
    assert g.square().sum(1).mean().item() == pytest.approx(0.05**2 * values.sum().item() / 10, rel=0.05)

    alike = noisy(BatchedRuns(p.losses).slope, found.isotropic_deviation(0.05), 0)
    size = alike(W, 0)[1].square().sum(1).mean().item()
    assert size == pytest.approx(g.square().sum(1).mean().item(), rel=0.1)
    labels, isotropic = (found.displacements(slope, steps=200)[-1] for slope in (p.with_noisy_labels(0.05, 0), alike))
    assert labels[0] == isotropic[0] == 200
    assert labels[1]["share"] > 0.8 and isotropic[1]["share"] < 10 / p.size


def test_what_leaves_the_curved_directions_is_of_second_order_in_the_noise_on_labels() -> None:
    p = FittedNet.draw(width=5, examples=10, seed=1)
    found = Minimum.near(p, p.start(1), below=1e-20)
    ends = [
        descend(p.with_noisy_labels(s, 0), found.weights.repeat(32, 1), GD(found.rate), 200).weights
        for s in (8e-3, 2e-3)
    ]
    inside, outside = [], []
    for moved in (end - found.weights for end in ends):
        along = moved @ found.curved
        inside.append(along.norm().item())
        outside.append((moved - along @ found.curved.T).norm().item())
    assert inside[0] / inside[1] == pytest.approx(4, rel=0.02)  # the same noise, four times as large
    assert outside[0] / outside[1] == pytest.approx(16, rel=0.05)


def test_little_noise_raises_the_loss_as_predicted_and_much_noise_drives_runs_out() -> None:
    p = FittedNet.draw(width=5, examples=10, seed=1)
    progress: list[float] = []
    little, much = Minimum.near(p, p.start(1)).noisy_descents(
        (1e-3, 0.3), runs=64, steps=200, basin=0.02, seed=0, progress=progress.append
    )
    assert little["ratio"] == little["excess"] / little["predicted"] == pytest.approx(1, abs=0.2)
    assert (little["stay"], much["stay"]) == (1, 0)
    assert progress == sorted(progress) and progress[-1] == 1


def test_share_is_that_of_a_projection() -> None:
    draw = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(12, 3, generator=draw, dtype=torch.float64)).Q
    inside = torch.randn(4, 3, generator=draw, dtype=torch.float64) @ U.T
    assert fraction_within(inside, U) == pytest.approx(1)
    spread = torch.randn(5000, 12, generator=draw, dtype=torch.float64)
    assert fraction_within(spread, U) == pytest.approx(3 / 12, rel=0.05)
    assert fraction_within(spread - spread @ U @ U.T, U) < 1e-25


def test_scores_are_those_of_the_modules_and_margins_those_of_sorting() -> None:
    width, draw = 6, torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, 10, bias=False),
    )
    W = torch.cat([p.detach().flatten() for p in net.parameters()])[None]
    assert W.shape[1] == sum(a * b for a, b in shapes(width))
    x = torch.randn(7, 64, generator=draw)
    torch.testing.assert_close(scores(W, x, width)[0], net(x).detach())
    torch.testing.assert_close(matrices(W, width)[1][0], list(net.parameters())[1].detach())
    s, labels = torch.randn(2, 7, 10, generator=draw), torch.randint(10, (2, 7), generator=draw)
    for r in range(2):
        for i in range(7):
            y = int(labels[r, i])
            others = sorted(v for c, v in enumerate(s[r, i].tolist()) if c != y)
            assert margins(s, labels)[r, i].item() == pytest.approx(s[r, i, y].item() - others[-1], abs=1e-6)


def test_labels_are_random_in_the_fractions_asked_for_and_complexity_does_not_depend_on_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    digits = RelabelledDigits.draw((0.0, 0.5, 1.0), 0, draw)
    kept = (digits.test_y == digits.test_y[0]).double().mean(1)
    torch.testing.assert_close(kept, torch.tensor([1, 0.55, 0.1], dtype=torch.float64), rtol=0, atol=0.05)
    W = digits.train(8, 20, draw, lambda done: None)
    first, scaled = list(digits.measure(W, 8)), list(digits.measure(2 * W, 8))
    for a, b in zip(first, scaled, strict=True):
        assert b["norms"] == pytest.approx(8 * a["norms"], rel=1e-5)
        assert b["complexity"] == pytest.approx(a["complexity"], rel=1e-4)
        assert a["gap"] == b["gap"] == a["train_accuracy"] - a["test_accuracy"]
    right = (scores(W, digits.x, 8)[0].argmax(1) == digits.y[0]).double().mean()
    assert first[0]["train_accuracy"] == right


def test_nonsense_is_refused() -> None:
    cases: dict[str, Any] = {"repeats": 0, "noises": (0.1, -1.0), "widths": (0,), "label_noise": float("nan")}
    for name, wrong in cases.items():
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            Config(**{name: wrong})
    with pytest.raises(ValueError, match="a fraction is between 0 and 1"):
        Config(fractions=(0.0, 1.5))
