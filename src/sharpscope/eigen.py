"""Top eigenpairs of a symmetric operator, with the residuals that say how good they are.

Block Lanczos: from a block Q₀ of b columns the basis grows by ``A Q_j``, orthogonalized against everything before
(twice), so that ``A V = V T + R Eᵀ`` with T the small projected matrix and R the last block's remainder.  A Ritz pair
``(θ, V s)`` of T then has the residual ``‖R s_last‖``, at no further product.  A block as wide as the number of wanted
pairs finds eigenvalues of that multiplicity.

The start is random: that is what bounds the largest eigenvalue from above (`bounds`), and the asymmetry of ``VᵀAV``,
which exact products would not have, shows the rounding of the products.

P parameters, k wanted pairs, m columns in the basis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .bounds import Comparison, RandomStart, compare
from .operators import SymmetricOperator


class NotConverged(RuntimeError):
    """A solver used up its products before its residuals met the tolerance."""


class NotFinite(ValueError):
    """A product with the operator overflowed, or is not a number."""


CONFIDENCE = 0.999
"""Probability with which `Eigenpairs.upper` holds."""


POOL = 5
"""Ritz pairs remembered beyond the wanted ones."""


@dataclass(frozen=True)
class Pool:
    """What is known of an operator: approximate eigenvectors, best first, and a Krylov space that is being built.

    An image is a product with the operator as it was some calls ago, or a combination of such.
    """

    vectors: Tensor = field(repr=False)  # (P, m), orthonormal
    images: Tensor = field(repr=False)  # (P, m)
    values: Tensor  # (m,)
    ages: Tensor  # (m,): calls since the images were taken
    rates: Tensor  # (m,): rise of a value in one call, when last seen
    scout: Tensor = field(repr=False)  # (P, 0 to 2), orthonormal: x, and the direction in which it moved
    scout_images: Tensor = field(repr=False)
    products: int = 0  # in the scout's space
    searches: int = 0  # one where it is the scout's turn

    @classmethod
    def of(cls, vectors: Tensor, images: Tensor, values: Tensor) -> "Pool":
        """Of images taken in this call, with no scout yet."""
        zeros = torch.zeros_like(values)
        vectors, images = vectors.contiguous(), images.contiguous()  # as from a checkpoint: layouts round differently
        return cls(vectors, images, values, zeros, zeros, vectors[:, :0], vectors[:, :0])


@dataclass(frozen=True)
class Memory:
    """What `track` carries from call to call."""

    last: Pool  # after the last call
    before: Pool  # after the one before
    lag: int = 0  # 1 or 2: which of them foretold the last answer better; 0 at first
    doubt: float = 0.0  # grows from call to call; at one it is time for a solve from a random start
    k: int = 1  # pairs found
    drift: float = 0.0  # ‖(A_t - A_{t-1}) v‖ for the remembered vectors, as seen lately

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        pools = {"last": self.last, "before": self.before}
        parts = {f"{name} {part}": torch.as_tensor(t) for name, pool in pools.items() for part, t in vars(pool).items()}
        counts = torch.tensor([self.lag, self.doubt, self.k, self.drift], dtype=torch.float64)
        return {**parts, "counts": counts}

    def to(self, like: Tensor) -> "Memory":
        """With its vectors on the device of `like`; what is counted stays on the processor."""
        parts = self.tensors()
        wide = {name for name in parts if name.endswith(("vectors", "images", "scout"))}
        return Memory.of({name: t.to(like.device) if name in wide else t for name, t in parts.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Memory":
        """From a checkpoint; copied, since products round by the alignment of what a file was mapped to."""

        def pool(name: str) -> Pool:
            parts: dict[str, Any] = {part.name: tensors[f"{name} {part.name}"].clone() for part in fields(Pool)}
            counts: dict[str, Any] = {part: int(t) for part, t in parts.items() if t.dim() == 0}
            return Pool(**parts | counts)

        lag, doubt, k, drift = tensors["counts"].tolist()
        return cls(pool("last"), pool("before"), int(lag), doubt, int(k), drift)


@dataclass(frozen=True)
class Eigenpairs:
    """The k algebraically largest eigenpairs, largest first, and how far to trust them.

    ``values[i]`` is the Rayleigh quotient of ``vectors[:, i]``, so that ``lower[i] = values[i] - floor`` is never above
    the true i-th eigenvalue.  *Some* eigenvalue lies within ``residuals[i]`` of ``values[i]``, which need not be the
    i-th.  The largest eigenvalue is at most `upper` with probability `confidence`, by the randomness of the start;
    `upper` is infinite after a solve that has no such start.  `floor` is the rounding seen in the products.
    """

    values: Tensor  # (k,)
    vectors: Tensor = field(repr=False)  # (P, k), orthonormal columns
    residuals: Tensor  # (k,)  ‖A v - λ v‖
    num_matvecs: int
    upper: float = math.inf
    floor: float = 0.0
    num_gradients: float = math.nan  # cost of the products in gradients, where the operator knows it
    memory: Memory | None = field(default=None, repr=False)
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        rows = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        lines = [f"λ{i} = {value:.6g}, residual {residual:.1e}" for i, (value, residual) in enumerate(rows, start=1)]
        if math.isfinite(self.upper):
            lines[0] += f"; at most {self.upper:.6g} with probability {self.confidence:.1%}"
        return "\n".join([*lines, f"{self.num_matvecs} products, rounding {self.floor:.0e}"])

    @property
    def lower(self) -> Tensor:
        """``(k,)``: the i-th largest eigenvalue is at least this (Courant-Fischer), up to the rounding `floor`."""
        return self.values - self.floor

    def against(self, threshold: float) -> Comparison:
        """Is the largest eigenvalue above `threshold`: proved, improbable, or undecided and at what price."""
        return compare(
            self.lower[0].item(), self.values[0].item(), self.upper, threshold, self.confidence, self.num_matvecs
        )

    def scaled(self, c: float) -> "Eigenpairs":
        """Those of ``c A``, c > 0."""
        return replace(
            self, values=c * self.values, residuals=c * self.residuals, upper=c * self.upper, floor=c * self.floor
        )


def lanczos(
    a: SymmetricOperator,
    k: int = 1,
    *,
    rtol: float = 1e-4,
    gap: float = math.inf,
    max_matvecs: int | None = None,
    basis: int = 96,
    seed: int = 0,
) -> Eigenpairs:
    """The k algebraically largest eigenpairs of `a` by block Lanczos with thick restarts [N4].

    Args:
        rtol: bound on every residual, relative to the largest eigenvalue in magnitude.  An isolated eigenvalue is
            then right to about rtol² relative to its gap.
        gap: bound on ``upper - values[0]``, relative to the same: go on until nothing larger is likely to exist.
        max_matvecs: products allowed; by default 40 per pair and at least 400.
        basis: columns kept in memory before a restart keeps only the best of them.
        seed: of the random start; torch's global generator is not used.

    Raises:
        NotConverged: with the residuals reached.
        NotFinite: a ValueError, for an operator whose products are not finite.
        ValueError: k outside 1..P.
    """
    return _block_lanczos(a, k, 0, rtol, gap, max_matvecs, basis, seed)[0]


def ends(
    a: SymmetricOperator, k: int = 1, low: int = 1, *, rtol: float = 1e-4, seed: int = 0
) -> tuple[Eigenpairs, Tensor]:
    """Both ends of the spectrum from one run: the k largest eigenpairs, and the `low` smallest eigenvalues ascending.

    The residuals of both meet `rtol`; arguments and errors otherwise as in `lanczos`.
    """
    return _block_lanczos(a, k, low, rtol, math.inf, None, 96, seed)


def _block_lanczos(
    a: SymmetricOperator,
    k: int,
    low: int,
    rtol: float,
    gap: float,
    max_matvecs: int | None,
    basis: int,
    seed: int,
) -> tuple[Eigenpairs, Tensor]:
    size = a.size
    if not 1 <= k <= size:
        raise ValueError(f"k={k} eigenpairs asked of an operator of size {size}; k lies between 1 and {size}")
    if not 0 <= low <= size:
        raise ValueError(f"{low} smallest eigenvalues asked of an operator of size {size}")
    budget = max(400, 40 * (k + low)) if max_matvecs is None else max_matvecs
    block, random = _start_block(a.like, k, seed)
    basis = min(size, max(basis, 3 * block.shape[1] + k + low))
    v = a.like.new_empty((basis + block.shape[1], size))  # rows are basis vectors
    t = torch.zeros((len(v), len(v)), dtype=torch.float64)
    v[: block.shape[1]] = block.T
    old, new, used = 0, block.shape[1], 0  # rows [0, old) were multiplied, rows [old, new) are the current block
    eps = torch.finfo(v.dtype).eps
    lost, noise = 0.0, 0.0  # ‖·‖² of the remainders left out so far; largest asymmetry seen
    while True:
        image = (a @ v[old:new].T).T
        used += new - old
        if not bool(image.isfinite().all()):
            raise NotFinite("a product with the operator is not finite: its curvature is not defined at these weights")
        foreseen = t[:old, old:new].clone()
        remainder = _project_out(v[:new], image, t, old, new)
        noise = max(noise, (t[:old, old:new] - foreseen).norm().item())
        ritz, s = torch.linalg.eigh(t[:new, :new])
        ritz, s = ritz.flip(0), s.flip(1)
        scale = ritz.abs().max().item()
        rows, coefficients, left_out = _orthonormal_rows(remainder, v[:new], 32 * eps * scale)
        coupling = coefficients @ s[old:new]
        residuals = (coupling.square().sum(dim=0) + lost).sqrt()
        lost += left_out
        bound = max(rtol, 8 * eps * new**0.5) * scale
        floor = max(noise + lost**0.5, 16 * eps * scale)
        done = bool((residuals[:k] <= bound).all() and (residuals[new - low :] <= bound).all())
        upper = math.inf
        if done or len(rows) == 0:
            p = 1 - CONFIDENCE
            upper = random.upper(ritz.numpy(), s.numpy(), coupling.numpy(), p, scale) + floor
        if len(rows) == 0 or (done and upper - ritz[0].item() <= max(gap * scale, 2 * floor)):
            m = min(k + POOL, new)
            vectors = (s[:, :m].T.to(v) @ v[:new]).T
            images = ritz[:m].to(v) * vectors + rows.T @ coupling[: len(rows), :m].to(v)
            pool, none = Pool.of(vectors, images, ritz[:m]), Pool.of(vectors[:, :0], vectors[:, :0], ritz[:0])
            top = Eigenpairs(
                ritz[:k].to(v),
                vectors[:, :k],
                residuals[:k].to(v),
                used,
                upper,
                floor,
                used * a.cost,
                Memory(pool, none, k=k),
            )
            return top, ritz[new - low :].flip(0).to(v)
        if used + len(rows) > budget:
            reached = f"top-{k} residuals {residuals[:k].tolist()} exceed rtol={rtol:g} times {scale:.4g}"
            if done:
                reached = f"λ1 = {ritz[0]:.6g} may be {upper:.6g}, which exceeds gap={gap:g} times {scale:.4g},"
            raise NotConverged(f"{reached} after {used} products; raise max_matvecs or {'gap' if done else 'rtol'}")
        old, new = new, new + len(rows)
        if new > basis:
            keep = min(old - 1, max(k + low + 2, basis // 2), basis - len(rows))
            order = torch.cat(
                [torch.arange(keep - low), torch.arange(old - low, old), torch.arange(keep - low, old - low)]
            )
            ritz, s, coupling = ritz[order], s[:, order], coupling[:, order]
            random.restart(ritz.numpy(), s.numpy(), coupling[: len(rows)].numpy(), keep)
            v[:keep] = s[:, :keep].T.to(v) @ v[:old]
            t.zero_()
            t[:keep, :keep] = torch.diag(ritz[:keep])
            t[:keep, keep : keep + len(rows)] = coupling[: len(rows), :keep].T
            old, new = keep, keep + len(rows)
        else:
            t[old - coefficients.shape[1] : old, old:new] = coefficients[: len(rows)].T
        v[old:new] = rows


def _start_block(like: Tensor, k: int, seed: int) -> tuple[Tensor, RandomStart]:
    """Orthonormal columns ``(P, k)`` spanning Gaussian ones, and those in terms of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn((like.numel(), k), generator=generator, dtype=torch.float64).to(like))
    return q, RandomStart(r.double().cpu().numpy())


def _project_out(v: Tensor, image: Tensor, t: Tensor, old: int, new: int) -> Tensor:
    """Remove the span of the basis rows from `image` (twice, for orthogonality to rounding); record T's new columns."""
    h = v @ image.T
    rest = image - h.T @ v
    again = v @ rest.T
    rest = rest - again.T @ v
    columns = (h + again).double().cpu()
    t[:new, old:new] = columns
    t[old:new, :new] = columns.T
    t[old:new, old:new] = (columns[old:] + columns[old:].T) / 2
    return rest


def _orthonormal_rows(rest: Tensor, v: Tensor, small: float) -> tuple[Tensor, Tensor, float]:
    """Rows spanning `rest` but for directions of norm up to `small`, coefficients, and what was left out.

    The coefficients ``C (b, b)`` give ``‖C s‖ = ‖restᵀ s‖``; what was left out is the sum of its squared norms.
    """
    if len(rest) == 1:
        size = rest.norm().item()
        rows = rest / max(size, torch.finfo(rest.dtype).tiny)
        rows = rows - (rows @ v.T) @ v
        rows = rows / rows.norm().clamp_min(torch.finfo(rest.dtype).tiny)
        coefficients = torch.full((1, 1), size, dtype=torch.float64)
        return rows[: int(size > small)], coefficients, 0.0 if size > small else size**2
    q, r = torch.linalg.qr(rest.T)
    turn, norms, coefficients = torch.linalg.svd(r.double().cpu())
    keep = norms > max(small, torch.finfo(rest.dtype).tiny)
    rows = (q @ turn[:, keep].to(q)).T
    for _ in range(2):
        rows = rows - (rows @ v.T) @ v
        q, r = torch.linalg.qr(rows.T)
        rows = (q * r.diagonal().sign()).T  # Q R with R ≈ 1: the rows keep their signs, as the coefficients do
    return rows, norms[:, None] * coefficients, norms[~keep].square().sum().item()
