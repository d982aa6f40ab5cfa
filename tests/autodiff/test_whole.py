"""A loss as a plain function of its weights: whatever road these take, and whatever training has put around."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from problems import normal, relative
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from sharpscope import Objective, find_groups, sharpness
from sharpscope.autodiff import smooth
from sharpscope.errors import InvalidType, InvalidValue

EXACT = 1e-9  # rounding of double precision, through two derivatives
X, Y = normal(24, 4, seed=0), normal(24, 1, seed=1)
Closure = Callable[[], Tensor]


def small(width: int = 6) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)).double()


def dense(closure: Closure, params: list[Tensor]) -> Tensor:
    """The Hessian by plain autograd in the live parameters, without anything of ours."""
    grads = torch.autograd.grad(closure(), params, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = []
    for entry in flat:
        row = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows).detach()


def products(f: Objective) -> Tensor:
    at = f.at(f.weights())
    return torch.stack([at.hvp(unit) for unit in torch.eye(f.size, dtype=torch.float64)], dim=1)


def agrees(f: Objective, closure: Closure, params: list[Tensor]) -> None:
    """Value, gradient and Hessian are those of the training, here and at other weights that are loaded."""
    for scale in (1.0, 1.3):
        f.load(scale * f.weights())
        slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), params, materialize_grads=True)])
        assert relative(f.value(f.weights()), closure().detach()) < EXACT
        assert relative(f.grad(f.weights()), slope) < EXACT
        assert relative(products(f), dense(closure, params)) < EXACT


def agrees_elsewhere(f: Objective, closure: Closure) -> None:
    """At weights that are not the model's the loss is the one after loading them."""
    w = 1.7 * f.weights()
    found = f.value(w), f.grad(w)
    f.load(w)
    assert relative(found[0], closure().detach()) < EXACT
    assert relative(found[1], f.grad(w)) < EXACT


class Tied(nn.Module):
    """Uses one matrix twice, the second time by a road that no module knows."""

    def __init__(self, road: str) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 3, bias=False)
        weight = self.encode.weight
        self.kept = [weight] if road == "a list" else {"w": weight}
        self.decode = lambda h: h @ weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encode(x))
        weight = self.kept[0] if isinstance(self.kept, list) else self.kept["w"]
        return self.decode(h) + h @ weight


@pytest.mark.parametrize("road", ["a list", "a dict"])
def test_a_tied_weight_counts_by_whatever_road_it_is_reached(road: str) -> None:
    net = Tied(road).double()
    f = Objective(net, F.mse_loss, [(X, X)])
    agrees(f, lambda: F.mse_loss(net(X), X), list(net.parameters()))
    agrees_elsewhere(f, lambda: F.mse_loss(net(X), X))


def penalties(net: nn.Module) -> dict[str, Closure]:
    held = list(net.parameters())
    anchors = {name: p.detach().clone() + 0.1 for name, p in net.named_parameters()}
    weight = net.get_parameter("0.weight")
    return {
        "L2": lambda: sum((p.square().sum() for p in net.parameters()), torch.zeros(())),
        "L2 of parameters listed before": lambda: torch.cat([p.reshape(-1) for p in held]).square().sum(),
        "elastic": lambda: torch.stack([(p - anchors[n]).square().sum() for n, p in net.named_parameters()]).sum(),
        "orthogonality": lambda: (weight @ weight.T - torch.eye(len(weight))).square().sum(),
        "norm": lambda: torch.linalg.vector_norm(torch.nn.utils.parameters_to_vector(net.parameters())),
    }


@pytest.mark.parametrize("kind", sorted(penalties(small())))
def test_a_penalty_on_the_weights_is_part_of_the_loss(kind: str) -> None:
    net = small()
    penalty = penalties(net)[kind]
    f = Objective(net, lambda out, y: F.mse_loss(out, y) + 0.1 * penalty(), [(X, Y)])
    agrees(f, lambda: F.mse_loss(net(X), Y) + 0.1 * penalty(), list(net.parameters()))
    agrees_elsewhere(f, lambda: F.mse_loss(net(X), Y) + 0.1 * penalty())


def test_a_penalty_adds_its_own_curvature_to_gauss_newton() -> None:
    """The generalized Gauss-Newton matrix of (outputs, weights): ``Jᵀ ∇²ℓ J + ∇²(c ‖w‖²)``."""
    net, c = small(), 0.1
    plain = Objective(net, F.mse_loss, [(X, Y)])
    f = Objective(net, lambda z, y: F.mse_loss(z, y) + c * sum(p.square().sum() for p in net.parameters()), [(X, Y)])
    w, v = f.weights(), normal(f.size, seed=2)
    assert relative(f.gauss_newton(w, v), plain.gauss_newton(w, v) + 2 * c * v) < EXACT


def test_a_loss_may_call_the_model_itself() -> None:
    """The residual of a differential equation, with derivatives of the model in its inputs."""
    net = small()

    def residual(out: Tensor, y: Tensor) -> Tensor:
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (slope.sum(1) - out[:, 0]).square().mean()

    f = Objective(net, residual, [(X, Y)])
    agrees(f, lambda: residual(net(X), Y), list(net.parameters()))
    assert not X.requires_grad


class Energy(nn.Module):
    """Predicts forces: the gradient of an energy in the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_a_gradient_may_be_taken_inside_the_forward() -> None:
    net, x, target = Energy(), X.clone(), normal(24, 4, seed=3)
    f = Objective(net, F.mse_loss, [(x, target)])
    assert not x.requires_grad
    agrees(f, lambda: F.mse_loss(net(X.clone()), target), list(net.parameters()))
    f.check()


def test_transforms_of_functions_may_run_inside_the_forward() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(torch.func.grad(lambda row: self.net(row).sum()))(x)

    net, target = Slope(), normal(24, 4, seed=3)
    f = Objective(net, F.mse_loss, [(X, target)])
    agrees(f, lambda: F.mse_loss(net(X), target), list(net.parameters()))


def test_what_was_computed_of_the_weights_before_is_refused_by_name() -> None:
    net = small()
    before = net.get_parameter("0.weight").t() * 2
    with pytest.raises(InvalidValue, match=r"the loss depends on 0.weight by something that was computed before"):
        Objective(net, lambda out, y: F.mse_loss(out, y) + before.square().sum(), [(X, Y)])


def test_a_cache_of_parametrizations_is_not_read() -> None:
    class Square(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * w

    net = small()
    parametrize.register_parametrization(net[0], "weight", Square())
    f = Objective(net, F.mse_loss, [(X, Y)])
    w = 2 * f.weights()
    expected = f.grad(w)
    with parametrize.cached():
        net(X)
        assert torch.equal(f.grad(w), expected)


class Checkpointed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "sequential":
            h = checkpoint_sequential(self.body, 2, h, use_reentrant=False)
        elif self.kind == "none":
            h = self.body(h)
        else:
            h = checkpoint(self.body, h, use_reentrant=self.kind == "reentrant")
        return self.last(h)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "sequential"])
def test_gradient_checkpoints_change_nothing(kind: str) -> None:
    net, plain = Checkpointed(kind).double(), Checkpointed("none").double()
    plain.load_state_dict(net.state_dict())
    f, g = (Objective(n, F.mse_loss, [(X, Y)]) for n in (net, plain))
    w, v = 1.3 * f.weights(), normal(f.size, seed=2)
    assert torch.equal(f.grad(w), g.grad(w))
    assert relative(f.hvp(w, v), g.hvp(w, v)) < EXACT
    assert relative(f.third(w, v, v), g.third(w, v, v)) < EXACT
    assert find_groups(f).groups.keys() == find_groups(g).groups.keys() > set()


class TwoOutputs(nn.Module):
    """Hidden states beside logits that are computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "logits": self.head(hidden)}


@pytest.mark.parametrize("reads", ["logits", "both"])
def test_gauss_newton_cuts_outputs_off_from_each_other(reads: str) -> None:
    net, labels = TwoOutputs().double(), torch.arange(24) % 3

    def loss(out: dict[str, Tensor], y: Tensor) -> Tensor:
        extra = out["hidden"].square().mean() if reads == "both" else 0.0
        return F.cross_entropy(out["logits"], y) + extra

    f = Objective(net, loss, [(X, labels)])
    w, v = f.weights(), normal(f.size, seed=2)

    def outputs(w: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.func.functional_call(net, f.unflatten(w), X)
        return out["hidden"], out["logits"]

    tangents = torch.func.jvp(outputs, (w,), (v,))[1]
    z = outputs(w)

    def of_outputs(z: tuple[Tensor, Tensor]) -> Tensor:
        return loss({"hidden": z[0], "logits": z[1]}, labels)

    curve = torch.func.jvp(torch.func.grad(of_outputs), (z,), (tangents,))[1]
    expected = torch.func.vjp(outputs, w)[1](curve)[0]
    assert relative(f.gauss_newton(w, v), expected) < EXACT


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TwoOutputs()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": F.cross_entropy(out["logits"], labels), **out}


def test_gauss_newton_of_a_loss_that_the_model_computes_is_that_of_the_last_output() -> None:
    net, labels = OwnLoss().double(), torch.arange(24) % 3
    f = Objective(net, lambda out, batch: out["loss"], [{"x": X, "labels": labels}])
    g = Objective(net.net, lambda out, y: F.cross_entropy(out["logits"], y), [(X, labels)])
    w, v = f.weights(), normal(f.size, seed=2)
    assert relative(f.gauss_newton(w, v), g.gauss_newton(w, v)) < EXACT


def test_weights_that_the_forward_would_write_are_not_written() -> None:
    net = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 1)).double()
    with torch.no_grad():
        net.get_parameter("0.weight").mul_(3)
    x, y = torch.arange(24).view(12, 2) % 7, normal(12, 1, seed=1)
    f = Objective(net, F.mse_loss, [(x, y)])
    w, before = f.weights(), f.weights()

    def written(w: Tensor) -> Tensor:
        """The same function, its rows shortened by a formula."""
        parts = f.unflatten(w)
        norms = parts["0.weight"].norm(dim=1, keepdim=True)
        rows = parts["0.weight"] * torch.where(norms > 1, 1 / (norms + 1e-7), 1.0)
        return F.mse_loss(F.linear(rows[x].flatten(1), parts["2.weight"], parts["2.bias"]), y)

    assert relative(f.value(w), written(w)) < EXACT
    assert relative(products(f), torch.func.hessian(written)(w)) < EXACT
    assert torch.equal(w, before) and torch.equal(f.weights(), before)


@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_clamping_in_the_forward_stays_inside(how: str) -> None:
    class Clamped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if how == "data":
                self.weight.data.clamp_(-0.2, 0.2)
            else:
                with torch.no_grad():
                    self.weight.clamp_(-0.2, 0.2)
            return super().forward(input)

    net = Clamped(4, 1).double()
    before = net.weight.detach().clone()
    f = Objective(net, F.mse_loss, [(X, Y)])
    w = f.weights()
    found = f.value(w), f.grad(w)
    assert torch.equal(net.weight, before) and torch.equal(f.weights(), w)
    loss = F.mse_loss(net(X), Y)  # clamps the weights themselves
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))])
    assert relative(found[0], loss.detach()) < EXACT and relative(found[1], expected) < EXACT


def test_inputs_that_the_forward_writes_stay_as_they_are() -> None:
    class Centred(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.sub_(input.mean(0)))

    net, x = Centred(4, 1).double(), X + 1
    f = Objective(net, F.mse_loss, [(x, Y)])
    first = f.value(f.weights())
    assert torch.equal(x, X + 1) and torch.equal(f.value(f.weights()), first)
    assert relative(first, F.mse_loss(F.linear(x - x.mean(0), net.weight, net.bias), Y)) < EXACT


def test_a_parameter_that_no_batch_uses_has_rows_of_zeros() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, self.experts[0](x), self.experts[2](x))

    net = Experts().double()
    f = Objective(net, F.mse_loss, [(X[:12], Y[:12]), (X[12:], Y[12:])])
    agrees(f, lambda: F.mse_loss(net(X), Y), list(net.parameters()))
    assert not products(f)[f.slices["experts.1.weight"]].any()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_matrices_may_be_multiplied_with(layout: torch.layout) -> None:
    full = (normal(24, 24, seed=4) > 1.2).double()
    sparse = full.to_sparse(layout=layout)

    class Graph(nn.Module):
        def __init__(self, adjacency: Tensor) -> None:
            super().__init__()
            self.net, self.adjacency = small(), adjacency

        def forward(self, x: Tensor) -> Tensor:
            return self.adjacency @ self.net(x)

    f, g = (Objective(Graph(a), F.mse_loss, [(X, Y)]) for a in (sparse, full))
    assert relative(products(f), products(g)) < EXACT


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    class Rotating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(normal(3, seed=3))
            self.mix = nn.Parameter(torch.complex(normal(4, 3, seed=1), normal(4, 3, seed=2)))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.mix).abs() + self.shift

    net, target = Rotating(), normal(24, 3, seed=5)
    f = Objective(net, F.mse_loss, [(X, target)])
    w = f.weights()
    assert f.size == 3 + 24 and torch.equal(w[3:].view(4, 3, 2)[..., 1], net.mix.imag)

    def real(w: Tensor) -> Tensor:
        a, b = w[3:].view(4, 3, 2).unbind(-1)
        return F.mse_loss(((X @ a).square() + (X @ b).square()).sqrt() + w[:3], target)

    assert relative(products(f), torch.func.hessian(real)(w)) < EXACT
    f.load(2 * w)
    assert torch.equal(f.weights(), 2 * w)


@pytest.mark.parametrize("kind", ["bfloat16", "half", "mixed", "frozen base", "autocast inside", "casts inside"])
def test_low_precision_is_measured_in_single(kind: str) -> None:
    """The reference is the same numbers in float32: low ones are exact there."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "autocast inside":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return self.last(torch.tanh(self.norm(self.first(x)))).float()
            if kind == "casts inside":
                return self.last(torch.tanh(self.norm(self.first(x)).bfloat16().to(torch.float32)))
            h = self.norm(self.first(x).to(self.norm.weight.dtype))
            return self.last(torch.tanh(h).to(self.last.weight.dtype))

    net, data = Mixed(), [(X.float(), Y.float())]
    if kind in ("bfloat16", "half"):
        net, data = net.to(getattr(torch, kind)), [(x.to(getattr(torch, kind)), y) for x, y in data]
    if kind in ("mixed", "frozen base"):
        net.first.bfloat16()
        net.last.bfloat16()
        data = [(x.bfloat16(), y) for x, y in data]
    if kind == "frozen base":
        net.first.requires_grad_(False)
        net.last.float()
    plain = copy.deepcopy(net).float()
    f = Objective(net, F.mse_loss, data)
    w = f.weights()
    assert w.dtype == torch.float32

    def loss(w: Tensor) -> Tensor:
        own = {**{n: p.detach() for n, p in plain.named_parameters()}, **f.unflatten(w)}
        h = F.layer_norm(F.linear(data[0][0].float(), own["first.weight"], own["first.bias"]), (6,))
        h = h * own["norm.weight"] + own["norm.bias"]
        return F.mse_loss(F.linear(torch.tanh(h), own["last.weight"], own["last.bias"]), data[0][1].float())

    assert relative(f.grad(w), torch.func.grad(loss)(w)) < 1e-5  # rounding of single precision
    assert sharpness(f) == pytest.approx(torch.linalg.eigvalsh(torch.func.hessian(loss)(w))[-1].item(), rel=1e-3)
    assert {p.dtype for p in net.parameters()} == {p.dtype for p in copy.deepcopy(net).parameters()}


def compiled_part(net: nn.Module) -> nn.Module:
    first, middle, last = net.children()
    return nn.Sequential(first, cast(nn.Module, torch.compile(middle, backend="aot_eager")), last)


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda net: cast(nn.Module, torch.compile(net, backend="aot_eager")),
    "compiled in place": compiled_in_place,
    "a compiled part": compiled_part,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_are_looked_through(kind: str) -> None:
    net = small()
    expected = products(Objective(net, F.mse_loss, [(X, Y)]))
    assert relative(products(Objective(WRAPPERS[kind](net), F.mse_loss, [(X, Y)])), expected) < EXACT


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 1)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(small()), "scripted or traced by torch.jit"),
    "traced": (lambda: torch.jit.trace(small(), X), "scripted or traced by torch.jit"),
    "a scripted part": (lambda: nn.Sequential(torch.jit.script(small())), "scripted or traced by torch.jit"),
    "lazy": (lambda: nn.LazyLinear(1), "'weight' is lazy and has no shape yet; run the model once"),
    "meta": (meta, "'weight' is on the meta device and has no values"),
    "a function": (lambda: F.relu, "this function is no torch module"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_models_that_cannot_be_evaluated_are_refused_in_words(kind: str) -> None:
    make, sentence = REFUSED[kind]
    with pytest.raises((InvalidType, InvalidValue), match=sentence) as caught:
        Objective(make(), F.mse_loss, [(X, Y)])
    assert len(str(caught.value)) >= 40


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_inference_mode_is_left_while_measuring(where: str) -> None:
    net = small()
    f = Objective(net, F.mse_loss, [(X, Y)])
    expected = products(f)
    with torch.inference_mode():
        g = f if where == "outside" else Objective(net, F.mse_loss, [(X.clone(), Y.clone())])
        w, v = g.weights(), torch.ones(g.size, dtype=torch.float64)
        assert relative(g.hvp(w, v), expected.sum(1)) < EXACT
        assert relative(g.value(w), F.mse_loss(net(X), Y)) < EXACT
        assert g.third(w, v, v).isfinite().all()
        assert torch.is_inference_mode_enabled()


class Centres(nn.Module):
    """A loss with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(normal(3, 6, seed=7))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(z) @ F.normalize(self.centres).T, y)


def test_the_weights_of_a_loss_are_trained_too() -> None:
    net, loss, labels = nn.Linear(4, 6).double(), Centres(), torch.arange(24) % 3
    f = Objective(net, loss, [(X, labels)])
    assert list(f.slices) == ["weight", "bias", "loss.centres"]
    agrees(f, lambda: loss(net(X), labels), [*net.parameters(), *loss.parameters()])


def test_a_copy_that_was_pickled_or_copied_is_the_same_function() -> None:
    net = small()
    f = Objective(net, nn.MSELoss(), [(X, Y)])
    w, v = f.weights(), normal(f.size, seed=2)
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert torch.equal(other.hvp(w, v), f.hvp(w, v))
        other.load(2 * w)
        assert torch.equal(f.weights(), w)


WEIGHTS_BY_HOOKS: dict[str, Callable[[nn.Sequential], object]] = {
    "weight norm of old": lambda net: weight_norm(net[0]),
    "pruning": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "spectral norm of old": lambda net: spectral_norm(net[0]).eval(),
    "weight norm": lambda net: parametrizations.weight_norm(net[0]),
    "orthogonal": lambda net: parametrizations.orthogonal(net[2]),
}


@pytest.mark.parametrize("kind", WEIGHTS_BY_HOOKS)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm")
def test_hooks_that_form_weights_run(kind: str) -> None:
    net = small()
    WEIGHTS_BY_HOOKS[kind](net)
    f = Objective(net, F.mse_loss, [(X, Y)])

    def loss() -> Tensor:
        with smooth():  # torch's own second derivative of weight normalization is wrong
            return F.mse_loss(net(X), Y)

    agrees(f, loss, [p for p in net.parameters() if p.requires_grad])


def hooked(kind: str) -> tuple[nn.Module, list[Any]]:
    net, log = small(), list[Any]()

    def record(module: nn.Module, args: Any, out: Any) -> None:
        log.append(out.detach().mean().item())

    if kind == "forward":
        net[1].register_forward_hook(record)
    elif kind == "backward":

        def note(module: nn.Module, before: Any, after: Any) -> None:
            log.append(after[0].mean().item())

        net[1].register_full_backward_hook(note)
    elif kind == "every module":
        for m in net.modules():
            m.register_forward_hook(record)
            m.register_forward_pre_hook(lambda module, args: log.append(len(args)))
    return net, log


class Capturing(nn.Module):
    """Collects what its layers put out by hooks, which the first forward installs, as large libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.collected = small(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "installed", False):
            self.installed = True
            self.net[0].register_forward_hook(lambda module, args, out: self.collected.append(out))
        self.collected.clear()
        return self.net(x) + 0.1 * self.collected[-1].square().mean()


def test_hooks_that_the_forward_installs_are_part_of_the_function_and_leave_nothing() -> None:
    net = Capturing()
    f = Objective(net, F.mse_loss, [(X, Y)])
    products(f)
    assert not net.net[0]._forward_hooks and not net.collected
    for _ in range(2):  # the first forward of the training installs a hook that the objective has not seen
        agrees(f, lambda: F.mse_loss(net(X), Y), list(net.parameters()))
    assert len(net.net[0]._forward_hooks) == 1


def test_a_hook_that_comes_later_is_looked_at_anew() -> None:
    net = small()
    f = Objective(net, F.mse_loss, [(X, Y)])
    handle = net[0].register_forward_hook(lambda module, args, out: 2 * out)
    agrees(f, lambda: F.mse_loss(net(X), Y), list(net.parameters()))
    handle.remove()
    agrees(f, lambda: F.mse_loss(net(X), Y), list(net.parameters()))


@pytest.mark.parametrize("kind", ["forward", "backward", "every module"])
def test_hooks_that_record_do_not_fire(kind: str) -> None:
    net, log = hooked(kind)
    F.mse_loss(net(X), Y).backward()
    before = list(log)
    f = Objective(net, F.mse_loss, [(X, Y)])
    found = products(f)
    assert log == before
    assert relative(found, products(Objective(small(), F.mse_loss, [(X, Y)]))) < EXACT
    F.mse_loss(net(X), Y).backward()
    assert len(log) == 2 * len(before) > 0


def test_hooks_that_change_the_output_are_part_of_the_function() -> None:
    net = small()
    net[0].register_forward_hook(lambda module, args, out: 2 * out)
    f = Objective(net, F.mse_loss, [(X, Y)])
    agrees(f, lambda: F.mse_loss(net(X), Y), list(net.parameters()))


def test_hooks_that_change_gradients_are_said() -> None:
    net = small()

    def halve(module: nn.Module, before: Any, after: Any) -> tuple[Tensor, ...]:
        return (0.5 * before[0],)

    net[1].register_full_backward_hook(halve)
    with pytest.warns(UserWarning, match="a backward hook of the model changes its gradients"):
        Objective(net, F.mse_loss, [(X, Y)])


def test_hooks_of_weights_that_change_gradients_are_said() -> None:
    net, log = small(), list[Tensor]()
    net.get_parameter("0.bias").register_hook(log.append)
    Objective(net, F.mse_loss, [(X, Y)])  # one that records is no news, and records nothing
    assert not log
    net.get_parameter("0.weight").register_hook(lambda g: g * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.warns(UserWarning, match="a hook changes the gradient of 0.weight: what is measured"):
        Objective(net, F.mse_loss, [(X, Y)])


@pytest.fixture(autouse=True)
def _no_compiled_code_left() -> Iterator[None]:
    yield
    torch.compiler.reset()
