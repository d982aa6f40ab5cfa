"""Inside `smooth`, the layers are what they were, and have right derivatives to third order."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPE, normal
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from sharpscope.autodiff import smooth

X, IMAGES = normal(7, 6, seed=0), normal(3, 4, 5, 5, seed=1)

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "layer": (lambda: nn.LayerNorm(6), X),
    "layer, two dimensions": (lambda: nn.LayerNorm((5, 5), bias=False), IMAGES),
    "batch": (lambda: nn.BatchNorm1d(6), X),
    "batch, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), IMAGES),
    "batch, eval": (lambda: nn.BatchNorm2d(4).eval(), IMAGES),
    "batch, no statistics": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), IMAGES),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGES),
    "instance, eval": (lambda: nn.InstanceNorm2d(4, track_running_stats=True).eval(), IMAGES),
    "instance, no statistics": (lambda: nn.InstanceNorm2d(4), IMAGES),
    "group": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "root mean square": (lambda: nn.RMSNorm(6), X),
    "weight": (lambda: weight_norm(nn.Linear(6, 3)), X),
    "weight, over all": (lambda: weight_norm(nn.Linear(6, 3), dim=-1), X),
    "weight, second dimension": (lambda: weight_norm(nn.Linear(6, 3), dim=1), X),
}


def scattered(build: Callable[[], nn.Module]) -> nn.Module:
    """The layer with parameters and statistics unlike their initial zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = build().to(DTYPE)
        with torch.no_grad():
            for t in [*layer.parameters(), *layer.buffers()]:
                if t.is_floating_point():
                    t.add_(0.3 * torch.rand(t.shape, dtype=DTYPE))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_their_output_and_their_running_statistics(name: str) -> None:
    build, x = LAYERS[name]
    native, inside = scattered(build), scattered(build)
    for repeat in (1, 2):
        with smooth():
            y = inside(repeat * x)
        assert torch.allclose(y, native(repeat * x), rtol=0, atol=1e-13)  # rounding of numbers of order one
    for now, then in zip(inside.buffers(), native.buffers(), strict=True):
        assert torch.allclose(now, then, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_each_derivative_is_the_slope_of_the_one_before(name: str, order: int) -> None:
    build, x = LAYERS[name]
    layer = scattered(build)
    params = dict(layer.named_parameters())
    point = torch.cat([x.flatten(), *(p.detach().flatten() for p in params.values())])
    weights, u = normal(*layer(x).shape, seed=2), normal(len(point), seed=3)
    u = u / u.norm()

    def value(at: Tensor) -> Tensor:
        x_now, *cut = at.split([x.numel(), *(p.numel() for p in params.values())])
        now = {name: part.view(p.shape) for (name, p), part in zip(params.items(), cut, strict=True)}
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        with smooth():
            return (functional_call(layer, {**now, **buffers}, x_now.view(x.shape)) * weights).sum()

    def derivative(at: Tensor, order: int) -> Tensor:
        """Of the value along u."""
        at = at.detach().requires_grad_()
        out = value(at)
        for _ in range(order):
            (g,) = torch.autograd.grad(out, at, create_graph=True, materialize_grads=True)
            out = g @ u if g.requires_grad else (g @ u).requires_grad_()  # linear in u already
        return out.detach()

    h = 1e-4
    slope = (derivative(point + h * u, order - 1) - derivative(point - h * u, order - 1)) / (2 * h)
    # Central difference: h² times a derivative two orders up, and rounding of 1e-16/h.
    assert derivative(point, order).item() == pytest.approx(slope.item(), rel=1e-5)


def test_attention_has_a_second_derivative() -> None:
    q, k, v = (normal(2, 5, 4, seed=i).requires_grad_() for i in range(3))
    with smooth():
        out = F.scaled_dot_product_attention(q, k, v).square().sum()
    (g,) = torch.autograd.grad(out, q, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), k)
    assert second.norm() > 0


def test_called_by_torch_names_too() -> None:
    """`torch.layer_norm` and its like are what compiled or hand-written modules call."""
    w, b, mean, var = (normal(4, seed=i).square() + 0.5 for i in range(4))
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.layer_norm(IMAGES, (5, 5)),
        lambda: torch.batch_norm(IMAGES, w, b, mean.clone(), var.clone(), True, 0.1, 1e-5, False),
        lambda: torch.batch_norm(IMAGES, w, b, mean, var, False, 0.1, 1e-5, False),
        lambda: torch.instance_norm(IMAGES, w, b, None, None, True, 0.1, 1e-5, False),
    ]
    for call in calls:
        with smooth():
            inside = call()
        assert torch.allclose(inside, call(), rtol=0, atol=1e-13)  # rounding of numbers of order one


def test_eval_mode_without_statistics_is_refused() -> None:
    with smooth(), pytest.raises(ValueError, match="needs running statistics; this layer keeps none"):
        F.batch_norm(X, None, None, training=False)


def test_nothing_changes_after_the_context() -> None:
    with smooth():
        pass
    assert F.layer_norm(X, (6,)).equal(nn.LayerNorm(6, elementwise_affine=False)(X))


def test_products_of_experts_are_those_of_their_rows() -> None:
    """Rows of three experts one after the other, the second of which has none; what lies beyond is zero."""
    a, b = normal(9, 4, seed=0), normal(3, 4, 5, seed=1)
    with smooth():
        found = torch.nn.functional.grouped_mm(a, b, offs=torch.tensor([3, 3, 8], dtype=torch.int32))
        wide = torch.nn.functional.grouped_mm(normal(3, 2, 4, seed=2), b)
    assert torch.allclose(found, torch.cat([a[:3] @ b[0], a[3:8] @ b[2], torch.zeros(1, 5, dtype=DTYPE)]))
    assert torch.allclose(wide, normal(3, 2, 4, seed=2) @ b)


BAGS, ENDS = torch.tensor([1, 5, 2, 0, 2, 2, 6, 3]), torch.tensor([0, 3, 3, 8])  # the second bag is empty

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "distances": lambda x: torch.cdist(x, x[:3] + x[3:6]),
    "distances, some of them zero": lambda x: torch.cdist(x, x),
    "city block": lambda x: torch.cdist(x, 2 * x[:3], p=1),
    "cubic": lambda x: torch.cdist(x[None], 2 * x[None, :3], p=3.0),
    "largest coordinate": lambda x: torch.cdist(x, 2 * x[:3], p=torch.inf),
    "distances of pairs": lambda x: torch.pdist(x),
    "city block of pairs": lambda x: torch.pdist(x, p=1),
    "sigmoid of three pieces": lambda x: F.hardsigmoid(3 * x) * x,
    "sigmoid in place": lambda x: F.hardsigmoid(3 * x, inplace=True) * x,
    "means of bags": lambda x: F.embedding_bag(BAGS, x, ENDS[:-1]),
    "sums of bags": lambda x: F.embedding_bag(BAGS, x, ENDS, mode="sum", include_last_offset=True),
    "sums with weights": lambda x: F.embedding_bag(
        BAGS, x, ENDS[:2], mode="sum", per_sample_weights=x[0, :2].repeat(4)
    ),
    "largest of bags": lambda x: F.embedding_bag(BAGS.view(2, 4), x, mode="max"),
    "means without what fills up": lambda x: F.embedding_bag(BAGS.view(2, 4), x, padding_idx=2),
    "bounded rows": lambda x: F.embedding_bag(BAGS.view(2, 4), x.clone(), max_norm=1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_torchs_own_and_have_its_gradients_slope_as_second_derivative(name: str) -> None:
    function, v = FUNCTIONS[name], normal(*X.shape, seed=5)
    weights = normal(*function(X).shape, seed=6)

    def slope(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad((function(at).square() * weights).sum(), at)[0]

    x = X.clone().requires_grad_()
    with smooth():
        found = function(x)
    assert torch.allclose(found, function(X), rtol=0, atol=1e-13)  # rounding of numbers of order one
    (g,) = torch.autograd.grad((found.square() * weights).sum(), x, create_graph=True)
    (product,) = torch.autograd.grad(g, x, v)
    h = 1e-6  # error h² of the difference, and 1e-16 / h of rounding
    assert product.isfinite().all()
    if "bounded" not in name:  # there torch's own gradient takes the shortened rows for the weights
        assert torch.allclose(g, slope(X), atol=1e-12)
        assert torch.allclose(product, (slope(X + h * v) - slope(X - h * v)) / (2 * h), atol=1e-7)


def test_nothing_is_computed_in_a_precision_below_the_lowest() -> None:
    x = normal(3, 4, seed=0)
    with smooth(lowest=torch.float64):
        found = [x.softmax(-1, dtype=torch.float32), x.float(), x.to(torch.bfloat16), torch.zeros(2, dtype=torch.half)]
    assert {t.dtype for t in found} == {torch.float64}
    assert torch.equal(found[0], x.softmax(-1))
