"""Every backend against the kept graph: the same numbers, nothing left behind, and what each refuses."""

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import CLASSES, DTYPE, NORMS, normal, relative
from test_objective import DATA, EXACT, assert_same, state
from torch import Tensor, fx, nn

from sharpscope import Objective, hessian
from sharpscope.autodiff.differences import CentralDifferences
from sharpscope.autodiff.expansion import kept
from sharpscope.autodiff.hvp import compiled, differences, forward_over_reverse, linearized, rebuilt
from sharpscope.autodiff.objective import Expand
from sharpscope.autodiff.tracing import compiler
from sharpscope.errors import CannotTrace, NoSecondDerivative
from sharpscope.linalg import SymmetricOperator, lanczos, largest_eigenpair, preconditioned, restricted
from sharpscope.linalg.operators import projected, scaled, shifted

BACKENDS: dict[str, Callable[[], Expand]] = {
    "kept": lambda: kept,
    "rebuilt": lambda: rebuilt,
    "forward over reverse": lambda: forward_over_reverse,
    "linearized": linearized,
    "differences": lambda: differences,
}
ROUNDING = {"differences": 1e-6}  # h⁴ and eps/h at a step near eps^(1/5); the others are exact


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_product_of_the_kept_graph(backend: str, norm: str) -> None:
    f = problems.objective(norm, "cross-entropy")
    if backend == "linearized":
        f = f.on(problems.batches(norm, "cross-entropy", sizes=(7,)))  # a second of tracing for each size
    w, v = f.weights(), normal(f.size, seed=1)
    if backend == "linearized" and norm == "BatchNorm2d":
        with pytest.raises(CannotTrace, match="no fixed program"):  # momentum=None: its average counts in Python
            f.using(linearized()).at(w)
        return
    expand = BACKENDS[backend]()
    expected, at = f.at(w), f.using(expand).at(w)
    if isinstance(expand, linearized):  # torch's interpreter knows all operations of all of these
        (program,) = expand.programs.values()
        assert not any(isinstance(part, fx.GraphModule) for part in (program.once, program.each))
    allowed = ROUNDING.get(backend, EXACT)
    assert relative(at.value, expected.value) < EXACT
    assert relative(at.grad, expected.grad) < EXACT
    assert relative(at.hvp(v), expected.hvp(v)) < allowed
    assert not at.hvp(v).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_third_derivatives_and_gauss_newton_work_beside_every_backend(backend: str) -> None:
    f = problems.objective("BatchNorm1d", "cross-entropy")
    w, u, v = f.weights(), normal(f.size, seed=1), normal(f.size, seed=2)
    at = f.using(BACKENDS[backend]()).at(w)
    assert relative(at.third(u, v), f.third(w, u, v)) < EXACT
    assert relative(at.gauss_newton(v), f.gauss_newton(w, v)) < EXACT


@pytest.mark.parametrize("source", DATA)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_changes_anything(backend: str, source: str) -> None:
    net, data = problems.model("BatchNorm1d"), DATA[source]()
    net.get_submodule("3").requires_grad_(False)
    net.get_parameter("0.weight").grad = normal(6, 5, seed=4)
    before = state(net, data)
    f = Objective(net, F.mse_loss, data)
    w, v = f.weights(), normal(f.size, seed=1)
    at = f.using(BACKENDS[backend]()).at(w)
    assert relative(at.hvp(v), f.hvp(w, v)) < ROUNDING.get(backend, EXACT)
    assert_same(before, state(net, data))


@pytest.mark.parametrize("backend", ["linearized", "forward over reverse", "rebuilt"])
@pytest.mark.parametrize("budget", [0, 3000, 1 << 30])
def test_what_does_not_fit_in_memory_runs_again(backend: str, budget: int) -> None:
    f = problems.objective("BatchNorm1d", memory_budget=budget)
    w, v = f.weights(), normal(f.size, seed=1)
    at = f.using(BACKENDS[backend]()).at(w)
    assert relative(at.hvp(v), problems.objective("BatchNorm1d").hvp(w, v)) < EXACT
    assert at.hvp(v).equal(at.hvp(v))


class Power(nn.Module):
    """Reads a buffer that the batch before has written: the order of batches matters."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = problems.model("LayerNorm")
        self.register_buffer("seen", torch.ones(5, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x * self.seen)
        self.seen.mul_(0.5).add_(x.detach().square().mean(0))
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_pass_from_batch_to_batch(backend: str) -> None:
    net = Power()
    f = Objective(net, F.mse_loss, problems.batches())
    w, v = f.weights(), normal(f.size, seed=1)
    assert relative(f.using(BACKENDS[backend]()).hvp(w, v), f.hvp(w, v)) < ROUNDING.get(backend, EXACT)
    assert net.seen.equal(torch.ones(5, dtype=DTYPE))


def test_programs_follow_shapes_modes_and_frozen_parameters() -> None:
    f = problems.objective("BatchNorm1d")
    tracer = linearized()
    g, w, v = f.using(tracer), f.weights(), normal(f.size, seed=1)
    assert relative(g.hvp(w, v), f.hvp(w, v)) < EXACT
    assert len(tracer.programs) == len(problems.CHUNKS)
    g.hvp(w + 0.1, v)
    assert len(tracer.programs) == len(problems.CHUNKS)  # other weights, the same programs
    other = [(normal(9, 5, seed=1), normal(9, CLASSES, seed=2))]
    assert relative(g.on(other).hvp(w, v), f.on(other).hvp(w, v)) < EXACT
    f.model.eval()
    assert relative(g.hvp(w, v), f.hvp(w, v)) < EXACT
    f.model.get_parameter("0.weight").requires_grad_(False)
    part = Objective(f.model, F.mse_loss, problems.batches())
    w, v = part.weights(), normal(part.size, seed=1)
    assert relative(part.using(tracer).hvp(w, v), part.hvp(w, v)) < EXACT


def test_copies_trace_their_own_programs() -> None:
    f = problems.objective("LayerNorm").on(problems.batches("LayerNorm", sizes=(7,))).using(linearized())
    w, v = f.weights(), normal(f.size, seed=1)
    expected = f.hvp(w, v)
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert isinstance(other.expand, linearized) and not other.expand.programs
        assert other.hvp(w, v).equal(expected)


class Branching(nn.Module):
    """Takes another branch when a number says so."""

    def __init__(self, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.inner, self.decide = problems.model("LayerNorm"), decide

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out if self.decide(out) else out.square()


def test_a_branch_on_values_is_no_program() -> None:
    f = Objective(Branching(lambda z: bool(z.sum() > 0)), F.mse_loss, problems.batches())
    with pytest.raises(CannotTrace, match="no fixed program"):
        f.using(linearized()).at(f.weights())


def test_a_program_that_holds_at_one_point_only_is_found_out() -> None:
    class Captured(nn.Module):
        """Remembers a number of its first call as a constant of Python."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = problems.model("LayerNorm"), itertools.count(1)  # which nothing puts back

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (2.0 if next(self.calls) == 4 else 1.0)  # 1, 2: Objective, 3: kept, 4: the tracer

    f = Objective(Captured(), F.mse_loss, problems.batches(sizes=(4,)))
    f.value(f.weights())
    with pytest.raises(CannotTrace, match=r"its value is off by .* at other weights"):
        f.using(linearized()).at(f.weights())


def test_a_batch_of_unknown_things_is_no_program() -> None:
    f = Objective(
        problems.model("none"), lambda z, y: F.mse_loss(z, y[1]), [(x, [object(), y]) for x, y in problems.batches()]
    )
    with pytest.raises(CannotTrace, match="a batch holds a object"):
        f.using(linearized()).at(f.weights())


class Cube(torch.autograd.Function):
    """``x³``, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * g


class WrongCube(torch.autograd.Function):
    """``x³`` whose backward forgets that it depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach().square() * g


class Activation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_activation(function: Callable[[Tensor], Tensor], **settings: Any) -> Objective:
    net = problems.model("LayerNorm")
    assert isinstance(net, nn.Sequential)
    net[2] = Activation(function)
    return Objective(net, F.mse_loss, problems.batches("LayerNorm"), **settings)


def test_what_has_no_second_derivative_is_named_and_differences_work() -> None:
    f, smooth = with_activation(Cube.apply), with_activation(lambda x: x**3)
    w, v = f.weights(), normal(f.size, seed=1)
    with pytest.raises(NoSecondDerivative, match=r"does not exist in '2' \(Activation\) .* f\.using\(.*differences\)"):
        f.hvp(w, v)
    for refused in (f.using(linearized()).at, f.using(forward_over_reverse).at(w).hvp, f.at(w).gauss_newton):
        with pytest.raises(NoSecondDerivative, match="differentiable once"):
            refused(v)
    found, bar = CentralDifferences(f, w)(v)
    off = relative(found, smooth.hvp(w, v))
    assert off < 1e-6
    assert off < 10 * bar < 1e-5
    assert f.using(differences).hvp(w, v).equal(found)


def test_modules_are_not_named_for_what_the_loss_lacks_and_finding_out_changes_nothing() -> None:
    """Differences that cross the kinks of rectifiers disagree with derivatives that exist."""
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    targets, lengths = torch.ones(8, 2, dtype=torch.long), torch.full((8,), 2)

    def loss(out: Tensor, _: Tensor) -> Tensor:
        return F.ctc_loss(out.log_softmax(-1), targets, torch.full((8,), 9), lengths)

    f = Objective(net, loss, [(normal(9, 8, 6, seed=0).float(), targets)], without_dropout=True)
    before = torch.get_rng_state()
    with pytest.raises(NoSecondDerivative, match=r"does not exist in the loss or between the modules .*ctc"):
        f.hvp(f.weights(), f.weights())
    assert torch.get_rng_state().equal(before)  # modules were run with their dropout to find those to name


def test_differences_of_a_model_in_single_precision_do_not_step_over_kinks() -> None:
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    f = Objective(net, F.mse_loss, [(normal(64, 6, seed=0).float(), normal(64, 5, seed=1).float())])
    v = normal(f.size, seed=2).float()
    assert relative(f.using(differences).hvp(f.weights(), v), f.hvp(f.weights(), v)) < 1e-5  # rounding of the latter


def test_differences_in_single_precision_know_their_error() -> None:
    data = [(x.float(), y.float()) for x, y in problems.batches("LayerNorm")]
    f = Objective(problems.model("LayerNorm").float(), F.mse_loss, data)
    v = normal(f.size, seed=1).float()
    product = CentralDifferences(f, f.weights())
    found, bar = product(v)
    assert relative(found, f.hvp(f.weights(), v)) < 10 * bar < 0.1
    assert product(torch.zeros_like(v))[0].equal(torch.zeros_like(v))


def test_a_linear_loss_has_no_curvature_with_any_backend() -> None:
    net = nn.Linear(4, 1, dtype=DTYPE)
    f = Objective(net, lambda out, y: (out * y).mean(), [(normal(3, 4, seed=0), normal(3, 1, seed=1))])
    w, v = f.weights(), normal(5, seed=2)
    for make in BACKENDS.values():
        assert f.using(make()).hvp(w, v).norm() <= 1e-10


def test_machine_code_gives_the_same_products(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    f = Objective(problems.model("BatchNorm1d"), F.mse_loss, problems.batches(sizes=(4, 4)))
    w, v = f.weights(), normal(f.size, seed=1)
    before, tracer = state(f.model, f.data), compiled()
    g = f.using(tracer)
    if compiler() is None:
        with pytest.raises(CannotTrace, match=r"no C\+\+ compiler"):
            g.at(w)
    else:
        assert relative(g.hvp(w, v), f.hvp(w, v)) < EXACT
        assert relative(g.hvp(w + 0.1, v), f.hvp(w + 0.1, v)) < EXACT
        assert len(tracer.programs) == 1 and tracer.seconds > 0
    assert_same(before, state(f.model, f.data))
    assert not list(tmp_path.iterdir())


def test_eigenvalues_do_not_depend_on_the_backend() -> None:
    f = problems.objective("LayerNorm", "cross-entropy")
    expected = lanczos(hessian(f), 2, rtol=1e-8).values
    for make in (linearized, lambda: forward_over_reverse, lambda: rebuilt):
        assert relative(lanczos(hessian(f.using(make())), 2, rtol=1e-8).values, expected) < 1e-9


DRAFTED = {
    "the Hessian": lambda a, p: a,
    "another metric": preconditioned,
    "a block": lambda a, p: restricted(a, torch.arange(3, 40)),
    "a projection": lambda a, p: projected(a, lambda v: v - p * (p @ v) / (p @ p)),
    "a multiple, shifted": lambda a, p: shifted(scaled(a, -2.0), p),
}


@pytest.mark.parametrize("name", DRAFTED)
@pytest.mark.parametrize("norm", ["BatchNorm1d", "LayerNorm", "MultiheadAttention"])
def test_drafts_are_nearly_the_product_wherever_the_operator_is_used(norm: str, name: str) -> None:
    f = problems.objective(norm, memory_budget=0)
    metric = normal(f.size, seed=3).abs() + 0.1
    a = DRAFTED[name](hessian(f), metric)
    v = normal(len(a.like), seed=1)
    assert [draft.cost for draft in a.drafts] == [1, 1] and a.cost == 3
    for draft in a.drafts:
        assert relative(draft @ v, a @ v) < 1e-5
        assert relative(draft @ (1e6 * v), 1e6 * (a @ v)) < 1e-5  # the step does not depend on the length
        assert (draft @ torch.zeros_like(v)).count_nonzero() == 0


def test_there_are_drafts_where_most_graphs_are_built_anew() -> None:
    f = problems.objective("LayerNorm")
    w = f.weights()
    assert not f.at(w).drafts
    assert not f.using(linearized()).at(w).drafts
    budgets = [int(n * f.graph_bytes_per_example) for n in (5, 11)]  # one batch of three, and two
    assert [len(problems.objective("LayerNorm", memory_budget=b).at(w).drafts) for b in budgets] == [2, 0]


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_a_smooth_model_needs_two_products_and_one_with_kinks_takes_no_draft(activation: type[nn.Module]) -> None:
    """In single precision and with many examples a step crosses kinks of some of them, however small it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 1))
    data = [(torch.randn(2000, 5), torch.randn(2000, 1)) for _ in range(2)]
    f = Objective(net, F.mse_loss, data, memory_budget=0)
    exact = lanczos(hessian(f), rtol=1e-4).values.item()
    for vectors in (True, False):
        a, counts = hessian(f), [0, 0]
        found = largest_eigenpair(counting(a, counts), a.drafts[0].like, vectors=vectors)
        assert found.values.item() == pytest.approx(exact, rel=1e-3)
        assert found.lower.item() <= exact * (1 + 1e-6) <= found.upper
        assert (counts[0] == 2) == (activation is nn.GELU)
        assert found.num_matvecs == sum(counts) and found.num_gradients == 3 * counts[0] + counts[1]


def counting(a: SymmetricOperator, counts: list[int]) -> SymmetricOperator:
    """Count products with an operator, and with its drafts."""

    def counted(a: SymmetricOperator, i: int) -> Callable[[Tensor], Tensor]:
        def product(v: Tensor) -> Tensor:
            counts[i] += 1
            return a @ v

        return product

    return replace(a, matvec=counted(a, 0), drafts=tuple(replace(d, matvec=counted(d, 1)) for d in a.drafts))
