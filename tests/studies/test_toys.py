"""The toys on the sphere: closed forms against autograd and differences, and the laws of the flow at moderate il."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sharpscope.records.run_log import RunLog
from sharpscope.studies._shared import toys
from sharpscope.studies._shared import walk as walk_module

NAMES = ("A1", "A2", "A3", "A4")
FAMILY = toys.named(*NAMES)
PHI = np.array([1.0, -0.4, 0.7, 2.2])  # one point of Γ for each toy


def torch_loss(index: int, w: Tensor) -> Tensor:
    """The definition of the loss, for autograd."""
    c1, c2, a, kappa, mu = toys.NAMED[NAMES[index]]
    phi, s = torch.atan2(w[1], w[0]), w[2] / w.norm() - a * torch.sin(2 * torch.atan2(w[1], w[0]))
    return torch.exp(c1 * phi + c2 * torch.sin(phi)) * (s**2 / 2 + kappa * s**3 / 3 + mu * s**4 / 4)


def somewhere() -> toys.Array:
    return np.random.default_rng(0).standard_normal((4, 3)) * 1.7


def test_loss_and_gradient_are_those_of_autograd() -> None:
    w = somewhere()
    for i, (value, slope) in enumerate(zip(toys.loss(FAMILY, w), toys.gradient(FAMILY, w), strict=True)):
        point = torch.tensor(w[i], requires_grad=True)
        expected = torch_loss(i, point)
        (gradient,) = torch.autograd.grad(expected, point)
        # two orders of the same twenty roundings
        assert value == pytest.approx(expected.item(), rel=1e-13)
        assert slope == pytest.approx(gradient.numpy(), rel=1e-12, abs=1e-13 * float(np.linalg.norm(slope)))


def test_gradient_is_the_slope_of_the_loss() -> None:
    w, h = somewhere(), 1e-5
    for axis in np.eye(3):
        slope = (toys.loss(FAMILY, w + h * axis) - toys.loss(FAMILY, w - h * axis)) / (2 * h)
        # central difference: h² plus rounding/h, on the scale of the gradient
        scale = np.linalg.norm(toys.gradient(FAMILY, w), axis=-1)
        assert np.all(np.abs(toys.gradient(FAMILY, w) @ axis - slope) < 1e-8 * scale)


@pytest.mark.parametrize("c", [0.1, 3.7, 100.0])
def test_loss_is_scale_invariant(c: float) -> None:
    w = somewhere()
    g = toys.gradient(FAMILY, w)
    assert toys.loss(FAMILY, c * w) == pytest.approx(toys.loss(FAMILY, w), rel=1e-13)
    assert c * toys.gradient(FAMILY, c * w) == pytest.approx(g, rel=1e-12)
    cosine = np.sum(w * g, axis=-1) / np.linalg.norm(w, axis=-1) / np.linalg.norm(g, axis=-1)
    assert np.all(np.abs(cosine) < 1e-14)  # a sum of three products


def test_sharpness_and_top_direction_are_those_of_the_dense_hessian() -> None:
    points, sharpness = toys.minimizer(FAMILY, PHI), toys.top_eigenvalue(FAMILY, PHI)
    for i, v1 in enumerate(toys.top_direction(FAMILY, PHI)):
        hessian = torch.autograd.functional.hessian(partial(torch_loss, i), torch.tensor(points[i]))
        values, vectors = torch.linalg.eigh(hessian)
        assert values[-1].item() == pytest.approx(sharpness[i], rel=1e-12)
        assert values[:2].abs().max().item() < 1e-12 * sharpness[i]  # along Γ, and along the radius
        assert abs(vectors[:, -1].numpy() @ v1) == pytest.approx(1, abs=1e-12)


def test_slope_of_log_sharpness_is_a_difference_quotient_along_the_curve() -> None:
    h = 1e-5
    length = np.linalg.norm(toys.minimizer(FAMILY, PHI + h) - toys.minimizer(FAMILY, PHI - h), axis=-1)
    assert length / (2 * h) == pytest.approx(toys.arc_speed(FAMILY, PHI), rel=1e-9)  # h² times a curvature
    rise = np.log(toys.top_eigenvalue(FAMILY, PHI + h) / toys.top_eigenvalue(FAMILY, PHI - h))
    assert rise / length == pytest.approx(toys.log_slope(FAMILY, PHI), rel=1e-8, abs=1e-8)


def test_projection_finds_the_curve() -> None:
    n, h = toys.minimizer(FAMILY, PHI), 1e-3
    assert toys.project(FAMILY, 3 * n) == pytest.approx(PHI, abs=1e-14)
    # the foot of the Newton path differs from the point left along v1 by the curvature of Γ, O(h²)
    assert toys.project(FAMILY, n + h * toys.top_direction(FAMILY, PHI)) == pytest.approx(PHI, abs=5 * h**2)


def test_flow_of_the_circle_is_uniform_and_finer_steps_change_nothing() -> None:
    taus = np.linspace(0, 2, 21)
    coarse, fine = toys.flow(FAMILY, 1.0, taus), toys.flow(FAMILY, 1.0, taus, dtau=1e-3)
    assert coarse[:, 0] == pytest.approx(1 - 2 * 2 / (4 + 2**2) * taus, abs=1e-13)
    assert np.max(np.abs(coarse - fine)) < 1e-9  # order 4 at a step of .01
    assert np.all(np.diff(np.log(toys.top_eigenvalue(FAMILY, fine)), axis=0) < 0)


def test_edge_start_sits_at_the_edge() -> None:
    lr, il = 0.1, 1e-4
    w = toys.edge_start(FAMILY, PHI, lr, il)
    assert lr / ((1 - il) * np.sum(w**2, axis=-1)) * toys.top_eigenvalue(FAMILY, PHI) == pytest.approx(2, rel=1e-14)
    h = toys.rmsprop_rate(il) / np.sqrt(4 + toys.log_slope(FAMILY, PHI) ** 2)
    off = toys.unit(w) - toys.unit(toys.minimizer(FAMILY, PHI))
    # normalizing n + h v1 turns h into h/√(1+h²)
    assert np.sum(off * toys.top_direction(FAMILY, PHI), axis=-1) == pytest.approx(h, rel=h.max() ** 2)


def test_step_is_gradient_descent_on_the_sphere_with_the_effective_rate() -> None:
    lr, il = 0.1, 1e-3
    for one, start in zip(FAMILY.replicas(4), toys.edge_start(FAMILY, 1.0, lr, il), strict=True):
        w, theta = start, toys.unit(start)
        for _ in range(10):
            rate = lr / ((1 - il) * (w @ w))
            theta = toys.unit(theta - rate * toys.gradient(one, theta))
            w = np.array(toys.gd_step(one, tuple(w), lr, il / lr))
            assert toys.unit(w) == pytest.approx(theta, abs=1e-13)  # ten steps of rounding


def test_state_can_be_saved_anywhere(tmp_path: Path) -> None:
    run = toys.descent(FAMILY, 1.0, 0.1, 1e-3)
    for name, array in run.advance(run.start(), 300).items():
        np.save(tmp_path / f"{name}.npy", array)
    saved = {path.stem: np.load(path) for path in tmp_path.iterdir()}
    resumed = run.advance(saved, 200)
    straight = run.advance(run.start(), 500)
    assert resumed.keys() == straight.keys()
    assert all(np.array_equal(resumed[name], straight[name]) for name in straight)


def test_path_error_is_linear_in_il_and_only_for_the_right_constant() -> None:
    errors = {}
    for il in (1e-3, 1e-4):
        c = toys.columns_at(toys.descent(FAMILY, 1.0, 0.1, il), toys.measurement_steps(il))
        for constant in (3, 4, 5):
            errors[il, constant] = toys.path_error(FAMILY, 1.0, c["tau"][:, 0], c["phi"], constant) / il
    # a flow that misses the law has an error of order one: it falls with il only for the right constant
    assert np.all(errors[1e-4, 4] < 10)
    ratio = errors[1e-3, 4] / errors[1e-4, 4]
    assert np.all((ratio > 1 / 1.5) & (ratio < 1.5))
    for wrong in (3, 5):
        assert np.all(errors[1e-4, wrong] > 10)
        assert np.all(errors[1e-3, wrong] / errors[1e-4, wrong] < 1 / 1.5)


def test_speed_has_both_constants() -> None:
    K, tau, il = np.array([0.5, 1, 2, 4, 8]), 0.5, 1e-4
    c = toys.columns_at(toys.descent(toys.Toy(K), 1.0, 0.1, il), [0, round(tau / il)])
    A, B = toys.fit_speed(K, (1 - c["phi"][-1]) / tau)
    # errors of the speeds are O(il); the fit multiplies them by a few
    assert pytest.approx(2, rel=10 * il) == A
    assert pytest.approx(4, rel=10 * il) == B


def test_edge_is_entered_when_weight_decay_says() -> None:
    il = 1e-3
    c = toys.columns_at(toys.descent(toys.named("A3"), 1.0, 0.1, il, edge=1.0, h=1e-2), range(0, 400, 5))
    entry = toys.entry_time(c["tau"][:, 0], c["eta_lambda"][:, 0])
    assert entry == pytest.approx(math.log(2) / 2, rel=0.01)  # the first relaxation moves φ, hence λ1, by h²
    assert np.all(np.abs(c["phi"] - 1)[c["tau"] < entry] < 2e-4)
    with pytest.raises(ValueError, match="does not pass 2"):
        toys.entry_time(c["tau"][:10, 0], c["eta_lambda"][:10, 0])


@pytest.mark.parametrize("update_first", [False, True])
def test_scalar_rmsprop_moves_with_the_general_speed(update_first: bool) -> None:
    C, K, eta = np.array([0.5, 2, 8, 0.5, 2, 8]), np.array([2.0, 2, 2, 6, 6, 6]), 1e-2
    run = toys.scalar_rmsprop(toys.Toy(K), 1.0, eta, C, np.full(6, update_first))
    c = toys.columns_at(run, [0, 5000])
    # leading order in η: errors of a few η², times 8 for the fast C
    assert (1 - c["phi"][-1]) / (5000 * eta**2) == pytest.approx(C * K / (4 * C + 2 * K**2), rel=2e-3)


def test_without_weight_decay_nothing_moves_below_the_edge() -> None:
    toy = toys.named("A3", "A3")
    c = toys.columns_at(toys.descent(toy, 1.0, 0.1, 0.0, edge=np.array([1.5, 1.9]), h=1e-2), [1000, 20000])
    assert np.ptp(c["phi"], axis=0) == pytest.approx(0, abs=1e-12)
    assert np.all(c["eta_lambda"] < 2)


def test_without_weight_decay_a_catapult_drifts_once() -> None:
    K, d = np.array([0.5, 2, 6]), 0.003
    c = toys.columns_at(toys.descent(toys.Toy(K), 1.0, 0.1, 0.0, edge=2 + d, h=1e-6), [0, 10000, 12000])
    assert c["phi"][1] - c["phi"][0] == pytest.approx(-d * K / (4 + K**2), rel=0.01)  # leading order in d
    assert c["eta_lambda"][1] == pytest.approx(2 - d, rel=0.01 * d)
    assert c["phi"][2] == pytest.approx(c["phi"][1], abs=1e-12)


def test_portrait_shows_three_curves_on_the_sphere() -> None:
    curves = toys.portrait()
    assert curves.keys() == {"minimizers", "gd", "flow"}
    for columns in curves.values():
        assert len({len(column) for column in columns.values()}) == 1
        assert columns["x"] ** 2 + columns["y"] ** 2 + columns["z"] ** 2 == pytest.approx(1)
    assert curves["gd"]["eta_lambda"][0] < 2 < curves["gd"]["eta_lambda"].max()


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_walk_that_is_killed_goes_on_to_the_last_bit(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "INTERVAL", 0.0)
    process = toys.descent(toys.named("A1", "A3"), 1.0, 0.1, 1e-2)

    def walked(folder: str) -> RunLog:
        log = RunLog(tmp_path / folder, "toys")
        walk_module.walk(log, lambda fraction: None, process, ["A1", "A3"], range(0, 50, 10))
        return log

    append = RunLog.append

    def killed(self: RunLog, **row: Any) -> None:
        append(self, **row)
        if len(self.rows) == rows:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "append", killed)
        walked("killed")
    assert walked("killed").path.read_bytes() == walked("whole").path.read_bytes()
