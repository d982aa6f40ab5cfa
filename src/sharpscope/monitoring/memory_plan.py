"""Plan the memory of measurements before anything is allocated.

A measurement of P weights holds some `VECTORS` vectors of length P, and the graph of the gradient of a batch at least.

P parameters.
"""

import math
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from ..autodiff.data import head
from ..autodiff.objective import Objective
from ..linalg.largest import FEWEST

VECTORS = FEWEST + 8
"""Vectors that the least measurement holds: its basis, and those of a point and of a product there."""

MORE_PAIRS = 120
"""Vectors that following several eigenpairs holds."""

PART = 0.8
"""Part of the free memory that is planned with."""

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """The objective to measure, None where nothing fits, with k eigenpairs; and what had to be reduced."""

    objective: Objective | None
    k: int
    note: str


def free_bytes(device: torch.device) -> float:
    """Return the bytes of memory that may still be taken on a device; infinite where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    return min(_free_of_machine(), _free_of_group())


def plan_memory(f: Objective, k: int, free: float) -> MemoryPlan:
    """Fit a measurement of k eigenpairs into so many bytes: fewer pairs first, then fewer examples at once.

    Of several processes all have to find room.
    """
    room = PART * min(f.processes.each(lambda: free))
    vector = f.size * torch.empty(0, dtype=f.dtype).element_size()
    notes = []
    if k > 1 and (MORE_PAIRS + 8 * k) * vector > room:
        notes.append(f"one eigenvalue is followed in place of {k}")
        k = 1
    left = room - (VECTORS if k == 1 else MORE_PAIRS + 8 * k) * vector
    size = f"{f.size / 1e6:.3g} million weights need {VECTORS * vector / 2**30:.2g} GiB and {room / 2**30:.2g} are left"
    if left <= 0:
        return MemoryPlan(None, k, f"{size}: nothing is measured but the loss")
    per_example = max(1.0, *f.processes.each(lambda: f.graph_bytes_per_example))
    if f.memory_budget <= left / 2:
        return MemoryPlan(f, k, _sentence(size, notes))
    largest = left / per_example
    if max(f.processes.each(lambda: _first_size(f))) > largest:
        count = math.floor(largest)
        if count < 1:
            return MemoryPlan(None, k, f"{size}, less than the graph of one example: nothing is measured but the loss")
        f = f.on(head(f.source, count, f.form))
        notes.append(f"{count} examples are measured")
    f = f.using()
    f.memory_budget = int(left / 2)
    return MemoryPlan(f, k, _sentence(size, notes))


def _first_size(f: Objective) -> int:
    """Count the examples of the first batch."""
    with closing(f.batches()) as batches:
        return f.form.size(next(batches).raw)


def _sentence(size: str, notes: list[str]) -> str:
    return f"{size}: {', and '.join(notes)}" if notes else ""


def _free_of_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return 1024 * float(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return math.inf


def _free_of_group() -> float:
    """Bytes that the control group of the process leaves it, as in a container."""
    try:
        most, used = (float((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return math.inf
    return most - used
