"""Functions run on several processes at once, with gloo: what each returns, by process."""

import os
import pickle
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from sharpscope.autodiff import messages


def together(size: int, folder: Path, *functions: Callable[[int], Any]) -> dict[str, list[Any]]:
    """Run functions of the rank one after the other; return what each gave, by its name, on all processes.

    An exception is what a function gave, as its type's name, its text and the seconds that it took.
    """
    start_processes(_main, args=(size, str(folder), functions), nprocs=size, start_method="spawn")
    found = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]
    return {f.__name__: [own[f.__name__] for own in found] for f in functions}


def _main(rank: int, size: int, folder: str, functions: tuple[Callable[[int], Any], ...]) -> None:
    torch.set_num_threads(1)
    messages.TIMEOUT = timedelta(seconds=20)  # a check that fails on one process only must not keep the other
    at = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for function in functions:
        began = time.perf_counter()
        try:
            found[function.__name__] = function(rank)
        except Exception as error:
            found[function.__name__] = (type(error).__name__, str(error), time.perf_counter() - began)
        if os.environ.get("VERBOSE"):
            print(
                rank,
                function.__name__,
                f"{time.perf_counter() - began:.2f} s",
                found[function.__name__],
                file=sys.stderr,
            )
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
