"""Points of training and their measures: dense eigenvalues, the scales they do not see, and what they cost."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import cases
import problems
import pytest
import torch
from torch import Tensor

from sharpscope.autodiff.curvature import hessian
from sharpscope.autodiff.objective import Objective
from sharpscope.errors import InvalidType
from sharpscope.measures import measures
from sharpscope.measures.iterate import Iterate, midpoint
from sharpscope.optimizers.gd import GD
from sharpscope.symmetry.scale_groups import find_groups
from sharpscope.symmetry.sphere import direction

# The error of an eigenvalue is rtol² λ1 over the relative gap, with the solver's default rtol of 1e-4.
SOLVER = 1e-6


def dense(f: Objective, w: Tensor) -> Tensor:
    return hessian(f, w).dense()


def rescaled(f: Objective, factors: dict[str, float]) -> Tensor:
    """The weights, each tensor times its factor."""
    w = f.weights()
    for name, c in factors.items():
        w[f.slices[name]] *= c
    return w


@pytest.mark.parametrize("loss", cases.LOSSES)
@pytest.mark.parametrize("norm", cases.NORMS)
def test_spherical_sharpness_is_the_sharpness_at_unit_norm(norm: str, loss: str) -> None:
    f = cases.invariant(norm, loss)
    at_unit_norm = cases.dense_top(dense(f, direction(f.weights())))
    found = [measures.spherical_sharpness(Iterate(f, c * f.weights())) for c in (1.0, *cases.SCALES)]
    assert found == pytest.approx([at_unit_norm] * 4, rel=SOLVER)


@pytest.mark.parametrize("norm", ["BN", "LN", "WN"])
def test_product_sphere_sharpness_is_the_sharpness_where_every_group_has_unit_norm(norm: str) -> None:
    f = cases.invariant(norm)
    unit = rescaled(f, {name: 1 / f.weights()[s].norm().item() for name, s in f.slices.items()})
    assert measures.product_sphere_sharpness(f, error=1e-10) == pytest.approx(
        cases.dense_top(dense(f, unit)), rel=SOLVER
    )


def test_only_the_product_of_spheres_is_blind_to_the_balance_of_groups() -> None:
    f = cases.invariant()
    one, other = Iterate(f, f.weights()), Iterate(f, rescaled(f, {"0.weight": 0.2, "3.weight": 5.0}))
    product = measures.product_sphere_sharpness
    assert product(other) == pytest.approx(product(one), rel=SOLVER)
    assert abs(math.log(measures.spherical_sharpness(other) / measures.spherical_sharpness(one))) > 1


def test_partly_invariant_networks_are_read_in_their_invariant_weights_alone() -> None:
    f = cases.affine()
    slices = [f.slices[name] for name in ("0.weight", "3.weight")]
    maps = torch.cat([torch.arange(s.start, s.stop) for s in slices])
    w = f.weights()
    it = Iterate(f, w, GD(0.1))
    assert it.scale_groups.joint.tolist() == maps.tolist()

    on_sphere, on_product = w.clone(), w.clone()
    on_sphere[maps] = direction(w[maps])
    for s in slices:
        on_product[s] = direction(w[s])
    block = dense(f, on_sphere)[maps][:, maps]
    assert measures.spherical_sharpness(it) == pytest.approx(cases.dense_top(block), rel=SOLVER)
    assert measures.radius(it) == pytest.approx(w[maps].norm().item(), rel=1e-15)
    assert measures.effective_learning_rate(it) == pytest.approx(0.1 / w[maps].square().sum().item(), rel=1e-14)
    block = dense(f, on_product)[maps][:, maps]
    assert measures.product_sphere_sharpness(it) == pytest.approx(cases.dense_top(block), rel=SOLVER)

    grown = w.clone()
    grown[maps] *= 3.7
    found = [measures.spherical_sharpness(Iterate(f, z)) for z in (w, grown)]
    assert found[1] == pytest.approx(found[0], rel=SOLVER)


def test_networks_without_normalization_have_no_spherical_measures() -> None:
    f = cases.plain()
    it = Iterate(f, f.weights(), GD(0.1))
    for measure in (measures.spherical_sharpness, measures.radius, measures.eta_lambda):
        with pytest.raises(ValueError, match=r"no scale-invariant weights: .* cosine is 0\.\d+ \(\d\.(weight|bias)\)"):
            measure(it)
    with pytest.raises(ValueError, match="no group of weights"):
        measures.product_sphere_sharpness(it)
    assert measures.sharpness(it) == pytest.approx(cases.dense_top(dense(f, it.w)), rel=SOLVER)


@pytest.mark.parametrize("measure", [measures.stability_ratio, measures.eta_lambda, measures.effective_learning_rate])
def test_measures_of_stability_ask_for_a_rule(measure: Callable[[Iterate], float]) -> None:
    f = cases.invariant()
    with pytest.raises(ValueError, match="needs an update rule"):
        measure(Iterate(f, f.weights()))


def test_measures_are_their_equations() -> None:
    f, rule = cases.invariant(), GD(0.3, 0.01)
    it = Iterate(f, f.weights(), rule)
    assert measures.loss(it) == pytest.approx(f.value(it.w).item(), rel=1e-15)
    assert measures.radius(it) == pytest.approx(it.w.norm().item(), rel=1e-15)
    sharp = cases.dense_top(dense(f, it.w))
    assert measures.stability_ratio(it) == pytest.approx(sharp / (2 / 0.3 - 0.01), rel=SOLVER)
    assert measures.eta_lambda(it) == pytest.approx(0.3 / 0.997 * sharp, rel=SOLVER)  # radius² cancels


def test_edges_of_sphere_and_plane_agree() -> None:
    """Both measures of stability say the same of invariant weights, up to the factor of weight decay."""
    f, rule = cases.invariant("LN"), GD(0.3, 0.0, 0.5)
    it = Iterate(f, 2 * f.weights(), rule)
    assert measures.eta_lambda(it) / rule.edge == pytest.approx(measures.stability_ratio(it), rel=1e-12)


def test_measures_take_an_objective_at_its_present_weights() -> None:
    f = cases.invariant()
    before = measures.sharpness(f)
    assert before == measures.sharpness(Iterate(f, f.weights(), error=1e-3))
    assert before == pytest.approx(measures.sharpness(Iterate(f, f.weights())), rel=1e-3)
    f.load(2 * f.weights())
    assert measures.sharpness(f, error=1e-9) == pytest.approx(measures.sharpness(f), rel=1e-3)
    assert measures.sharpness(f) == pytest.approx(before / 4, rel=2e-3)
    it = Iterate(f, f.weights())
    assert Iterate.of(it) is it


def test_top_eigenpairs_carry_their_evidence() -> None:
    f = cases.invariant()
    it = Iterate(f, f.weights(), rtol=1e-7)
    pairs, h = measures.top_eigenpairs(it, 4), dense(f, f.weights())
    assert pairs.values.tolist() == pytest.approx(torch.linalg.eigvalsh(h).flip(0)[:4].tolist(), rel=1e-8)
    errors = (h @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert bool((errors <= 1e-7 * pairs.values[0] + 1e-12).all())
    assert pairs.residuals.tolist() == pytest.approx(errors.tolist(), abs=1e-10 * pairs.values[0].item())
    assert measures.top_eigenpairs(f).values.shape == (1,)


def test_midpoint_lies_in_the_middle() -> None:
    a, b = torch.tensor([1.0, -3.0]), torch.tensor([2.0, 5.0])
    assert torch.equal(midpoint(a, b), torch.tensor([1.5, 1.0]))


def test_an_iterate_computes_each_quantity_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    f = problems.observed(cases.affine(), lambda: calls.update(["hvp"]))

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[method.__name__] += 1
            return method(*args)

        return call

    monkeypatch.setattr(Objective, "at", counted(Objective.at))
    it = Iterate(f, f.weights(), GD(0.1), groups=find_groups(f))
    for _ in range(2):
        for measure in (measures.loss, measures.sharpness, measures.spherical_sharpness, measures.stability_ratio):
            measure(it)
    assert calls == {"at": 1, "hvp": it.top.num_matvecs + it.spherical_top.num_matvecs}


def test_fully_invariant_networks_need_one_solve() -> None:
    f = cases.invariant()
    it = Iterate(f, f.weights())
    assert it.spherical_top.num_matvecs == it.top.num_matvecs
    assert it.spherical_top.vectors is it.top.vectors
    relative = it.spherical_top.residuals / it.spherical_top.values
    assert relative.tolist() == pytest.approx((it.top.residuals / it.top.values).tolist(), rel=1e-12)


def test_memories_start_the_next_solve() -> None:
    f = cases.affine()
    cold = Iterate(f, f.weights(), k=2)
    measures.sharpness(cold), measures.spherical_sharpness(cold), measures.product_sphere_sharpness(cold)
    assert set(cold.memories) == {"top", "spherical_top", "product_sphere_top"}
    warm = Iterate(f, f.weights(), k=2, start=cold.memories)
    assert warm.top.num_matvecs < cold.top.num_matvecs
    assert warm.product_sphere_top.num_matvecs < cold.product_sphere_top.num_matvecs
    assert warm.top.values.tolist() == pytest.approx(cold.top.values.tolist(), rel=SOLVER)
    assert Iterate(f, f.weights()).memories == {}


def test_measuring_leaves_the_network_as_it_is() -> None:
    f = cases.invariant("torch BN")
    net = f.model
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    for measure in (measures.sharpness, measures.spherical_sharpness, measures.product_sphere_sharpness):
        measure(f)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_no_objective() -> None:
    with pytest.raises(TypeError, match="make an Objective"):
        measures.sharpness(torch.nn.Linear(2, 1))  # type: ignore[arg-type]


def test_groups_that_are_given_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    f = cases.affine()
    groups = find_groups(f)
    expected = measures.spherical_sharpness(f), measures.product_sphere_sharpness(f)
    monkeypatch.setattr("sharpscope.measures.iterate.find_groups", lambda *_: pytest.fail("searched"))
    assert measures.spherical_sharpness(f, groups=groups) == expected[0]
    assert measures.product_sphere_sharpness(f, groups=groups) == expected[1]
    it = Iterate(f, f.weights(), error=1e-3, vectors=False)
    assert measures.spherical_sharpness(it, groups=groups) == expected[0]
    with pytest.raises(InvalidType, match="find_groups"):
        measures.spherical_sharpness(f, groups=dict(groups.groups))  # type: ignore[arg-type]
