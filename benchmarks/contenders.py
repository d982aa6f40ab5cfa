"""The methods for the top eigenvalue that are compared: one function each, called as a user of it would.

A contender is ``make(problem, model, count, **settings) -> measure``, and ``measure(seed)`` gives the eigenvalue at the
present weights.  What `make` does is paid once: in a cold measurement as part of it, in a tracked run before its first
step.  `count(n)` is told of every product.  Those that can start from the last eigenvector have `warm`.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import curvlinops
import hessian_eigenthings as he
import numpy as np
import pyhessian
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import sharpscope as ss

from .problems import Problem

Count = Callable[[int], None]
Measure = Callable[[int], float]
Make = Callable[..., Measure]


def sharpscope(p: Problem, model: nn.Module, count: Count, **settings: Any) -> Measure:
    """Ours, with nothing known beforehand; with `settings`, its solver with these."""
    return _ours(ss.Objective(model, p.loss, [(p.x, p.y)]), count, settings)


def _ours(f: ss.Objective, count: Count, settings: dict[str, Any]) -> Measure:
    def measure(seed: int) -> float:
        if settings:
            pairs = ss.linalg.lanczos(ss.hessian(f, f.weights()), k=1, seed=seed, **settings)
        else:
            pairs = ss.top_eigenpairs(f)
        count(pairs.num_matvecs)
        return pairs.values[0].item()

    return measure


@functools.cache
def fastest(p: Problem) -> tuple[ss.Objective, float]:
    """The objective with the fastest product for this problem, searched once, and the seconds of the search."""
    start = time.process_time()
    f = ss.autodiff.tune(ss.Objective(p.model, p.loss, [(p.x, p.y)])).objective
    return f, time.process_time() - start


def sharpscope_tuned(p: Problem, model: nn.Module, count: Count, **settings: Any) -> Measure:
    """Ours with nothing known but the objective that ``tune`` found earlier."""
    return _ours(fastest(p)[0], count, settings)


def sharpscope_tracked(p: Problem, model: nn.Module, count: Count, *, tune: bool = False) -> Measure:
    """Ours along a run: every measurement starts from what the last two found."""
    f = fastest(p)[0] if tune else ss.Objective(model, p.loss, [(p.x, p.y)])
    last: ss.linalg.Eigenpairs | None = None

    def measure(seed: int) -> float:
        nonlocal last
        last = ss.linalg.warm_started(ss.hessian(f, f.weights()), last, k=1, seed=seed)
        count(last.num_matvecs)
        return last.values[0].item()

    return measure


def pyhessian_power(p: Problem, model: nn.Module, count: Count, *, tol: float = 1e-3, steps: int = 100) -> Measure:
    """PyHessian: power iteration on a kept graph of the gradient.  Its constructor sets eval mode."""
    module = sys.modules["pyhessian.hessian"]
    product = pyhessian.utils.hessian_vector_product

    def counted(*args: Any) -> Any:
        count(1)
        return product(*args)

    def measure(seed: int) -> float:
        torch.manual_seed(seed)
        module.hessian_vector_product = counted
        try:
            values, _ = pyhessian.hessian(model, p.loss, data=(p.x, p.y), cuda=False).eigenvalues(steps, tol)
        finally:
            module.hessian_vector_product = product
            model.train()
            for w in p.params:
                w.grad = None  # the gradient holds its own graph, which would never be freed
        return float(values[0])

    return measure


def _eigenthings(p: Problem, model: nn.Module, count: Count) -> Any:
    a = he.HessianOperator(model, [(p.x, p.y)], he.supervised_loss(p.loss))

    def counted(v: Tensor) -> Tensor:
        count(1)
        return a.matvec(v)

    return he.LambdaOperator(counted, a.size, dtype=a.dtype)


def eigenthings_lanczos(
    p: Problem, model: nn.Module, count: Count, *, k: int = 10, steps: int | None = None
) -> Measure:
    """hessian-eigenthings: a fixed number of Lanczos steps (by default 2k), the largest in magnitude."""
    a = _eigenthings(p, model, count)
    which = "LM" if steps is None else "LA"
    return lambda seed: he.lanczos(a, k=k, max_iter=steps, which=which, seed=seed).eigenvalues[0].item()


def eigenthings_power(
    p: Problem, model: nn.Module, count: Count, *, tol: float = 1e-4, steps: int = 100, warm: bool = False
) -> Measure:
    """hessian-eigenthings: power iteration; `warm` hands it the last eigenvector."""
    a = _eigenthings(p, model, count)
    last: Tensor | None = None

    def measure(seed: int) -> float:
        nonlocal last
        start = last if warm else None
        value, last, *_ = he.power_iteration_one(a, max_iter=steps, tol=tol, seed=seed, init=start)
        return value

    return measure


class _CountedHessian(curvlinops.HessianLinearOperator):
    """Counts also the products by which curvlinops checks that the model is deterministic."""

    count: Count

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        self.count(M[0].shape[-1])
        return super()._matmat(M)


def curvlinops_eigsh(p: Problem, model: nn.Module, count: Count, *, warm: bool = False, **settings: Any) -> Measure:
    """curvlinops' operator in SciPy's eigsh, as in its documentation; `warm` hands eigsh the last eigenvector."""
    kind = type("Hessian", (_CountedHessian,), {"count": staticmethod(count)})
    a = kind(model, p.loss, list(model.parameters()), [(p.x, p.y)]).to_scipy()
    return _arpack(lambda: a, p, warm, settings)


def arpack_rebuilt(p: Problem, model: nn.Module, count: Count, *, warm: bool = False, **settings: Any) -> Measure:
    """By hand: eigsh, with both derivatives computed afresh in every product."""
    params = list(model.parameters())

    def product(v: Tensor) -> Tensor:
        slope = torch.autograd.grad(p.loss(model(p.x), p.y), params, create_graph=True)
        return _vjp(slope, params, v)

    return _arpack(lambda: _linear(product, p, count), p, warm, settings)


def arpack_kept(p: Problem, model: nn.Module, count: Count, *, warm: bool = False, **settings: Any) -> Measure:
    """By hand: eigsh, with the graph of the gradient kept for all products at a point."""
    params = list(model.parameters())

    def operator() -> LinearOperator:
        slope = torch.autograd.grad(p.loss(model(p.x), p.y), params, create_graph=True)
        return _linear(lambda v: _vjp(slope, params, v), p, count)

    return _arpack(operator, p, warm, settings)


def limit(p: Problem, model: nn.Module, count: Count, *, products: int, start: int) -> Measure:
    """The least that is possible on a kept graph: Lanczos from the best `start`, with no product too many."""

    def measure(seed: int) -> float:
        value = next(itertools.islice(_ritz_values(p, model, start), products - 1, None))
        count(products)
        return value

    return measure


def fewest_products(p: Problem, model: nn.Module, exact: float, right: float, starts: int) -> dict[str, int]:
    """Settings of `limit`: the start, of some, from which Lanczos needs the fewest products to be `right`."""
    found = []
    for start in range(starts):
        least = min((n for n, _ in found), default=200)
        for n, value in enumerate(itertools.islice(_ritz_values(p, model, start), least), 1):
            if abs(value / exact - 1) <= right:
                found.append((n, start))
                break
    products, start = min(found, default=(200, 0))
    return {"products": products, "start": start}


def _ritz_values(p: Problem, model: nn.Module, start: int) -> Iterator[float]:
    """Yield the largest Ritz value after each product of Lanczos' three-term recurrence."""
    params = list(model.parameters())
    slope = torch.autograd.grad(p.loss(model(p.x), p.y), params, create_graph=True)
    q = torch.randn(p.size, generator=torch.Generator().manual_seed(start), dtype=p.dtype)
    q /= q.norm()
    last, diagonal, beside = torch.zeros_like(q), list[float](), list[float]()
    while True:
        image = _vjp(slope, params, q)
        diagonal.append((image @ q).item())
        yield float(eigh_tridiagonal(diagonal, beside, eigvals_only=True)[-1])
        image.sub_(q, alpha=diagonal[-1]).sub_(last, alpha=beside[-1] if beside else 0.0)
        beside.append(image.norm().item())
        last, q = q, image.div_(beside[-1])


def _vjp(slope: tuple[Tensor, ...], params: list[nn.Parameter], v: Tensor) -> Tensor:
    parts = [part.view_as(w) for part, w in zip(v.split([w.numel() for w in params]), params, strict=True)]
    return torch.cat([h.flatten() for h in torch.autograd.grad(slope, params, parts, retain_graph=True)])


def _linear(product: Callable[[Tensor], Tensor], p: Problem, count: Count) -> LinearOperator:
    kind = np.dtype(str(p.dtype).removeprefix("torch."))

    def counted(v: np.ndarray) -> np.ndarray:
        count(1)
        return product(torch.from_numpy(v.reshape(-1)).to(p.dtype)).numpy()

    return LinearOperator((p.size, p.size), matvec=counted, dtype=kind)


def _arpack(operator: Callable[[], LinearOperator], p: Problem, warm: bool, settings: dict[str, Any]) -> Measure:
    last: np.ndarray | None = None

    def measure(seed: int) -> float:
        nonlocal last
        start = last if warm and last is not None else np.random.default_rng(seed).standard_normal(p.size)
        values, vectors = eigsh(operator(), k=1, which="LA", v0=start, **settings)
        last = vectors[:, 0]
        return float(values[0])

    return measure
