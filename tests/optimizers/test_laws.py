"""Laws of stability against torch's own steps: the spectral radius of the map that the optimizer is near a minimum."""

import copy
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

from sharpscope.optimizers import ASGD, Adafactor, Adagrad, AMSGrad, CenteredRMSprop, NAdam, RAdam
from sharpscope.optimizers.base import Stability
from sharpscope.optimizers.from_torch import rule_of, stability_of

SLOW = {"betas": (0.9, 0.99999)}
CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "SGD, maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.3, **SLOW}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 2.0, **SLOW}),
    "AdamW, maximize": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 2.0, "maximize": True, **SLOW}),
    "AMSGrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.3, **SLOW}),
    "AMSGrad, decoupled": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True, "weight_decay": 2.0, **SLOW}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9999, "momentum": 0.5, "weight_decay": 0.3}),
    "RMSprop, centered": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9999, "momentum": 0.8, "centered": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.3, **SLOW}),
    "NAdam, decoupled": (torch.optim.NAdam, {"lr": 0.05, "weight_decay": 2.0, "decoupled_weight_decay": True, **SLOW}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.999)}),
    "RAdam, decoupled": (torch.optim.RAdam, {"lr": 0.05, "weight_decay": 2.0, "decoupled_weight_decay": True}),
    "RAdam, its first steps": (torch.optim.RAdam, {"lr": 0.01, "betas": (0.0, 0.999)}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 1e-3, "weight_decay": 0.3}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5, "rho": 0.9999, "weight_decay": 0.3}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01, "weight_decay": 0.3, **SLOW}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.1, "weight_decay": 2.0}),
    "Adafactor, large weights": (torch.optim.Adafactor, {"lr": 0.1}),
    "Adam, its first steps": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.3, **SLOW}),
    "AMSGrad, its first steps": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, **SLOW}),
    "Adamax, its first steps": (torch.optim.Adamax, {"lr": 0.01, **SLOW}),
    "RAdam, its very first steps": (torch.optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.999)}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.2, "weight_decay": 0.3}),
}
SLOT = {"momentum_buffer", "exp_avg"}
"""Names of what moves with the weights; everything else in an optimizer's state hardly does."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aged(name: str) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer at a minimum with an empty momentum that has seen many gradients, of different sizes."""
    steps = (3 if "very" in name or "RAdam" in name else 5) if "first steps" in name else 3000
    kind, options = CASES[name]
    p = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = kind([p], **options)
    sizes = normal(3, 2, seed=1).exp()
    for t in range(5):
        p.grad = sizes * normal(3, 2, seed=2 + t)
        optimizer.step()
    state = optimizer.state[p]
    for key in SLOT & state.keys():
        state[key].zero_()
    if "step" in state:
        state["step"].fill_(steps)
    if "mu_product" in state:
        state["mu_product"].fill_(1e-12)
    if "eta" in state:
        state["eta"].fill_(0.1 / (1 + 0.2 * 0.1 * steps) ** 0.75)
    with torch.no_grad():
        p.copy_(normal(3, 2, seed=8) if "large weights" in name else torch.zeros(3, 2))
    return optimizer, p


def radius(optimizer: torch.optim.Optimizer, p: nn.Parameter, h: Tensor) -> float:
    """Spectral radius of a step on ``½ (w-p)ᵀh(w-p)``, as a linear map of the weights and the momentum around there."""
    slots = sorted(SLOT & optimizer.state[p].keys())
    small, n = 1e-7, p.numel()
    columns = []
    for i in range(n * (1 + len(slots))):
        twin = copy.deepcopy(optimizer)
        q = twin.param_groups[0]["params"][0]
        parts = [q.data, *(twin.state[q][name] for name in slots)]
        parts[i // n].view(-1)[i % n] += small
        q.grad = (h @ (q - p).detach().flatten()).reshape(q.shape)
        twin.step()
        columns.append(torch.cat([part.flatten() for part in (q.data - p.detach(), *parts[1:])]))
    return float(torch.linalg.eigvals(torch.stack(columns, 1) / small).abs().max())


def stepped_on(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with the count of its next step, whose corrections differ from those of the last one when young."""
    for state in optimizer.state.values():
        state["step"] = state["step"].clone() + 1
    return optimizer


def ratio(found: Stability, h: Tensor) -> float:
    root = found.metric.rsqrt().expand(len(h))
    decay = torch.diag(found.decay.expand(len(h)))
    return cases.dense_top(root[:, None] * (found.sign * h + decay) * root)


@pytest.mark.parametrize("name", CASES)
def test_the_map_of_torch_leaves_the_unit_circle_at_the_ratio_one(name: str) -> None:
    """To one per cent: averages and counts, which the law has standing still, move by up to 1e-3 in a step."""
    optimizer, p = aged(name)
    a = normal(6, 6, seed=9)
    h = -a @ a.T if "maximize" in name else a @ a.T
    found = stability_of(stepped_on(optimizer) if "first steps" in name else optimizer, [p])
    assert found is not None
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ratio(found, middle * h) < 1 else (low, middle)
    if "first steps" in name:  # the map takes the next step itself
        for state in optimizer.state.values():
            state["step"] = state["step"] - 1
    assert radius(optimizer, p, 0.99 * low * h) < 1 < radius(optimizer, p, 1.01 * low * h)


def test_every_optimizer_of_torch_has_a_law_or_a_sentence() -> None:
    without = {torch.optim.LBFGS, torch.optim.Muon, torch.optim.Rprop, torch.optim.SparseAdam}
    kinds = {k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)}
    assert kinds - {torch.optim.Optimizer} == without | {kind for kind, _ in CASES.values()}
    for kind in without:
        with pytest.raises(TypeError, match=f"{kind.__name__}"):
            rule_of(kind([nn.Parameter(torch.ones(2, 2))]))


def test_laws_are_read_with_their_present_values() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.NAdam([p], lr=torch.tensor(0.25), betas=(0.8, 0.9), weight_decay=2, momentum_decay=0.1)
    assert rule_of(optimizer) == NAdam(0.25, 2.0, False, 0.8, 0.9, 1e-8, momentum_decay=0.1)
    assert rule_of(torch.optim.Adam([p], amsgrad=True)) == AMSGrad(1e-3, 0.0, False, 0.9, 0.999, 1e-8)
    assert rule_of(torch.optim.RMSprop([p], centered=True)) == CenteredRMSprop(0.01, beta2=0.99, eps=1e-8)
    assert rule_of(torch.optim.Adafactor([p])) == Adafactor(0.01, 0.0, True, least=1e-3)


def test_laws_say_what_they_are_not_for() -> None:
    rule, w = Adagrad(0.1), torch.ones(2)
    assert rule.stability(rule.init(w)) is None
    with pytest.raises(TypeError, match="Adagrad says how steps are stable, not how they are taken"):
        rule.step(w, w, rule.init(w))
    with pytest.raises(TypeError, match="Adagrad says no preconditioner, which a flow needs"):
        rule.preconditioner(rule.init(w))
    with pytest.raises(TypeError, match="no threshold on the eigenvalues"):
        rule.threshold({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adagrad(-0.1), "learning_rate is -0.1"),
        (lambda: Adagrad(0.1, -1.0), "weight_decay is -1.0"),
        (lambda: NAdam(0.1, beta1=1.0), "β1 is 1.0"),
        (lambda: RAdam(0.1, 10.0, True), "lr·wd = 1 of the weights"),
        (lambda: ASGD(0.0), "learning rate is 0.0"),
    ],
)
def test_constants_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_some_that_maximize_and_some_that_do_not_have_no_criterion() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [a], "maximize": True}, {"params": [b]}]
    sgd = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="some parameters are trained to maximize the loss and some to minimize it"):
        stability_of(sgd, [a, b])
    both = stability_of([torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.2, momentum=0.5)], [b, a])
    assert both is not None and both.metric.tolist() == pytest.approx([15.0, 15.0, 20.0, 20.0])
