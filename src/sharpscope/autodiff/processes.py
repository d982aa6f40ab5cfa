"""The processes over which the batches of one loss are spread: sums and decisions that are the same on all of them.

Every process holds all weights and its own batches, and what it computes of them is summed:

    L(w) = Σ_r n_r L_r(w) / Σ_r n_r,        ∇²L(w) v = Σ_r (n_r / n) ∇²L_r(w) v

with one all-reduce for each value, gradient or product.  The vector that is reduced ends in three numbers more: how
many processes have failed, and the sum of an angle's cosine and sine that each has computed of the vectors that it
multiplies.  So an error on one process is an error on all, and processes with different weights or different random
vectors notice it in place of adding up numbers that mean nothing.  How messages travel is in `messages`.

P parameters, W processes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import errors
from ..errors import Diverged, InvalidType, InvalidValue, OtherProcess
from ..linalg.operators import Linear
from .expansion import STEPS, Expansion
from .messages import channel_of

T = TypeVar("T")

Part = tuple[float, Sequence[Tensor]]
"""The part of one process in a sum: a factor, and tensors that stand one after the other."""

UNDECIDED: Any = "undecided"
"""The `group` of an objective that nobody has chosen."""

MAX_LOSS_OF_LENGTH = 1e-4
"""Relative loss of length of a sum of unit vectors from which on their angles differ; less is rounding in float32."""


class Processes:
    """The processes of an objective: here this one alone, which has nobody to agree with."""

    rank = 0
    size = 1

    def each(self, compute: Callable[[], T]) -> list[T]:
        """Compute on every process, and return the results of all, in their order; an error on one is one on all."""
        return [compute()]

    def first(self, value: T) -> T:
        """Return the value of the first process, whose clock counts for all."""
        return value

    def mean(self, number: float | Tensor) -> float | Tensor:
        """Return the mean of the numbers of all processes, on the device of this one's."""
        return number


ALONE = Processes()


class Together(Processes):
    """The processes of a group, each of which makes the same calls in the same order."""

    def __init__(self, group: Any) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._channel = channel_of(group)

    def __reduce__(self) -> str:
        raise InvalidType(
            "an objective of several processes cannot be pickled or copied deeply; save monitor.state_dict(), and make"
            " the objective anew"
        )

    def sum(self, compute: Callable[[], Part], length: int, *about: Tensor) -> Tensor:
        """Sum a vector of this `length` over the processes; `about` are the vectors ``(P,)`` that it is computed of.

        Raises:
            OtherProcess: another process failed while computing its part, or is lost.
            Diverged: others were about other vectors.
        """
        out = about[0].new_zeros(length + 3)  # before the computation, which may use up the memory
        error: Exception | None = None
        try:
            factor, parts = compute()
            start = 0
            for part in parts:
                torch.mul(part.reshape(-1), factor, out=out[start : (start := start + part.numel())])
            del parts
        except Exception as caught:
            error = caught
            out.zero_()
        angle = sum((i * _angle(v) for i, v in enumerate(about, 1)), torch.zeros_like(out[0]))
        out[length:] = torch.stack([torch.full_like(angle, error is not None), angle.cos(), angle.sin()])
        self._channel.reduce(out, error)
        failed, x, y = out[length:].tolist()
        if failed:
            _raise_first(error, self._channel.exchange(_described(error)))
        if self.size - math.hypot(x, y) > MAX_LOSS_OF_LENGTH * self.size:
            raise Diverged(
                f"the {self.size} processes compute with different vectors: their weights differ, or the seeds of their"
                " random vectors; give all of them the same, as DistributedDataParallel does with weights"
            )
        return out[:length]

    def each(self, compute: Callable[[], T]) -> list[T]:
        error: Exception | None = None
        value: T | None = None
        self._channel.depth += 1
        try:
            value = compute()
        except Exception as caught:
            error = caught
        finally:
            self._channel.depth -= 1
        found = self._channel.exchange((value, _described(error)), error)
        _raise_first(error, [failure for _, failure in found])
        return [value for value, _ in found]

    def first(self, value: T) -> T:
        return self._channel.exchange(value if self.rank == 0 else None)[0]

    def mean(self, number: float | Tensor) -> float | Tensor:
        total = torch.as_tensor(number, dtype=torch.float64).detach().clone()
        self._channel.reduce(total)
        return total / self.size

    def total(self, numbers: Tensor) -> Tensor:
        """Sum a small tensor over the processes."""
        out = numbers.double().cpu().clone()
        self._channel.reduce(out)
        return out.to(numbers)

    def concatenated(self, part: Tensor, size: int) -> Tensor:
        """Concatenate parts of a vector ``(size,)``: each process but the last ones has ``⌈size/W⌉`` entries."""
        padded = part.new_zeros(-(-size // self.size))
        padded[: len(part)] = part
        return self._channel.gather(padded)[:size]


def number_of_processes() -> int:
    """Count the processes that torch.distributed knows of."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def processes_of(group: Any) -> Processes:
    """Find the processes of a group; None is this one alone.

    Raises:
        ValueError: there are several processes, and no group was chosen; this one is not in it.
        TypeError: it is no process group.
    """
    if isinstance(group, str) and group == UNDECIDED:
        if number_of_processes() > 1:
            raise InvalidValue(
                f"this is one of {number_of_processes()} processes: say Objective(...,"
                " group=torch.distributed.group.WORLD) on all of them for the loss of the batches of all, or group=None"
                " for the loss of this one's alone"
            )
        return ALONE
    if group is None:
        return ALONE
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise InvalidType(f"group is a {kind}, not a process group such as torch.distributed.group.WORLD, nor None")
    if dist.get_rank(group) < 0:
        raise InvalidValue("this process is not in the group of the objective; only members measure together")
    return Together(group) if dist.get_world_size(group) > 1 else ALONE


def joined(processes: Together, w: Tensor, expand: Callable[[], Expansion | None]) -> Expansion:
    """Expand the loss of all processes around w ``(P,)``, from a function that expands the one of this process.

    That is None for a process without a batch.  It costs one all-reduce, and so does every product.
    """
    own: list[Expansion] = []

    def sums() -> Part:
        at = expand()
        if at is None:
            return 0.0, ()
        own.append(at)
        return at.examples, (at.grad, at.value, at.value.new_tensor([len(at.drafts), 1.0, at.cost]))

    out = processes.sum(sums, len(w) + 4, w)
    n = out[-2].item()
    at = own.pop() if own else None
    count = len(STEPS) if out[-3].item() > 0 else 0
    drafts: Sequence[Linear | None] = [None] * count if at is None else (at.drafts or [at.hvp] * count)
    fraction = at.examples / n if at else 0.0

    def product(multiply: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        def summed(*vectors: Tensor) -> Tensor:
            return processes.sum(lambda: (fraction, [multiply(*vectors)] if multiply else ()), len(w), *vectors)

        return summed

    return Expansion(
        value=out[-4] / n,
        grad=out[:-4].div_(n),
        hvp=product(None if at is None else at.hvp),
        third=product(None if at is None else at.third),
        gauss_newton=product(None if at is None else at.gauss_newton),
        examples=n,
        cost=out[-1].item() / n,
        drafts=tuple(map(product, drafts)),
        symmetric=at is None or at.symmetric,
    )


def fingerprint(w: Tensor) -> float:
    """Compute a number that differs where vectors ``(P,)`` do."""
    return _projection(w).item()


def _projection(v: Tensor) -> Tensor:
    """Project ``v/‖v‖`` onto a fixed vector, made of two of length √P, and add ``log(1 + ‖v‖)``."""
    m = math.isqrt(len(v))
    a, b = (torch.arange(m, dtype=v.dtype, device=v.device).add_(shift).cos_() for shift in (1, 2))
    rest = v[m * m :]
    along = a @ (v[: m * m].view(m, m) @ b) + rest.sum()
    size = v.norm()
    return torch.nan_to_num(along / size + size.log1p(), nan=0.0, posinf=0.0, neginf=0.0)


def _angle(v: Tensor) -> Tensor:
    """Compute an angle that turns by a radian where `v` changes by about 1e-3 (1e-6 in float64)."""
    return torch.finfo(v.dtype).eps ** -0.4 * _projection(v.detach())


def _described(error: Exception | None) -> tuple[str, str] | None:
    """Name the kind of an error, and its text, for other processes."""
    return None if error is None else (type(error).__name__, str(error))


def _raise_first(own: Exception | None, failures: list[tuple[str, str] | None]) -> None:
    """Raise the own error, or that of another process: as the same kind where it is one of sharpscope's."""
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
            raise kinds.get(failure[0], OtherProcess)(f"process {rank} failed: {failure[0]}: {failure[1]}")
