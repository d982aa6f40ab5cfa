"""Weights on disk: find a series of checkpoints, read them safely, and fit their names to a model.

Nothing that is read is executed: safetensors, or state dicts of torch by its weights-only reader.  A state dict may be
wrapped (``{"state_dict": ...}``, ``{"model": ...}``), and its names may carry a prefix (``module.`` of DDP, ``model.``
of Lightning, ``_orig_mod.`` of a compiled model), which is taken off where that makes them fit.

P parameters.
"""

import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..autodiff.objective import Objective
from ..errors import Unusable, needing

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of the files in a directory that count as checkpoints; a file given by name may have any."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Names under which a training script keeps a state dict beside other things."""

SAFE = (2, 6)
"""First version of torch whose weights-only reader cannot be made to run code (CVE-2025-32434)."""

DAMAGED = "it may have been cut short; write or copy it again, or leave it out"

WRAPPING = {"module", "model", "_orig_mod", "net"}
"""Parts of a prefix that mean just "the model"; any other, such as ``ema``, tells models from each other."""


def load_task(task: str) -> tuple[Any, Any, Any]:
    """Call the function ``module:function`` for its model, loss and data; modules of this folder are found.

    Raises:
        Unusable: there is no such function, or it returns something else.
    """
    module, _, function = task.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function or "task")
    except (ImportError, AttributeError, ValueError) as error:
        raise Unusable(f"there is no task '{task}' ({error}); give MODULE:FUNCTION, importable from here") from error
    finally:
        sys.path.pop(0)
    returned = found()
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise Unusable(f"{task}() returned a {type(returned).__name__}; it must return (model, loss, data)")
    return returned


def step_of(path: Path) -> int | None:
    """Read the step from the name of a checkpoint: the number after "step" or "iter", else the last, else its folder's.

    >>> [step_of(Path(p)) for p in ("epoch=2-step=1500.ckpt", "w0020.safetensors", "checkpoint-40/model.bin", "w.pt")]
    [1500, 20, 40, None]
    """
    stem = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name
    numbers = re.findall(r"(?:step|iter|iteration)s?[-_=]?(\d+)", stem, re.IGNORECASE) or re.findall(r"\d+", stem)
    folder = re.search(r"(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[-_=]?(\d+)$", path.parent.name, re.IGNORECASE)
    return int(numbers[-1]) if numbers else int(folder[1]) if folder else None


def series(places: Sequence[Path]) -> list[Path]:
    """List the checkpoints in files and directories, each once: by step, those without a step last, in natural order.

    Raises:
        Unusable: a place is not there, or a directory holds no checkpoint.
    """
    found: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            inside = [p for p in place.iterdir() if p.suffix in SUFFIXES and p.is_file() and p.name[0] != "."]
            if not inside:
                raise Unusable(f"there is no checkpoint in {place} (looked for {', '.join('*' + s for s in SUFFIXES)})")
            found |= dict.fromkeys(inside)
        elif place.exists():
            found[place] = None
        else:
            raise Unusable(f"there is no checkpoint {place}")
    return sorted(found, key=_natural)


def _natural(path: Path) -> tuple[float, list[tuple[int, str]], str]:
    step = step_of(path)
    parts = re.findall(r"\d+|\D+", path.name)
    return (
        float("inf") if step is None else float(step),
        [(int(p), "") if p.isdecimal() and p.isascii() else (-1, p) for p in parts],
        str(path),
    )


def read(content: bytes, name: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint under their names, from its bytes; `name` is for error messages.

    Raises:
        Unusable: it is neither safetensors nor a state dict, or would run code when loaded.
    """
    state = _safetensors(content, name) if content[8:9] == b"{" else _state_dict(content, name)
    while not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            some = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(state.items())[:4])
            raise Unusable(f"{name} is not a state dict: it holds {some or 'nothing'}; save model.state_dict()")
        state = inner
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _safetensors(content: bytes, name: str) -> Mapping[str, Any]:
    with needing("safetensors", "a checkpoint in its format"):
        from safetensors import SafetensorError
        from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:  # of a kind of numbers that torch does not have
        raise Unusable(f"{name} is not a safetensors file that can be read ({error}): {DAMAGED}") from error


def _state_dict(content: bytes, name: str) -> Mapping[str, Any]:
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE:
        raise Unusable(f"{name} is no safetensors file, and torch {torch.__version__} reads others unsafely: take 2.6")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages of old
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        if kind:
            raise Unusable(
                f"{name} holds a pickled {kind[1]}, which only running code could load; save model.state_dict() alone"
            ) from error
        raise Unusable(
            f"{name} is not a safetensors file, nor a state dict of torch that can be read: {DAMAGED}"
        ) from error
    if not isinstance(state, Mapping):
        raise Unusable(f"{name} is not a state dict but a {type(state).__name__}; save model.state_dict()")
    return state


def fit(f: Objective, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Fit tensors to the trainable parameters of `f` ``(P,)``, and to buffers and frozen parameters of its model.

    Names that the model does not have are left alone.

    Raises:
        Unusable: a parameter is missing, or of another shape or kind.
    """
    state, twins = constituents(f.model), _twins(f.model)
    prefix = _prefix(f, twins, tensors, name)
    found = {own: tensors[prefix + twin] for own, twin in twins.items() if prefix + twin in tensors}
    found |= {own: tensors[prefix + own] for own in state if prefix + own in tensors}
    for own in {**f.slices, **found}:
        what = f"in {name} the {'parameter' if isinstance(state[own], nn.Parameter) else 'buffer'} {own}"
        if own not in found:
            present = f"{', '.join(list(tensors)[:3])}{', ...' if len(tensors) > 3 else ''}"
            raise Unusable(f"{what} of shape {tuple(state[own].shape)} is missing; it holds {present}")
        _check(state[own], found[own], what)
    like = f.weights()
    flat = torch.cat([found[own].to(like).reshape(-1) for own in f.slices])
    return flat, {own: value for own, value in found.items() if not state[own].requires_grad}


def constituents(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the model, under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write these tensors into the model's parameters and buffers of the same names."""
    state = constituents(model)
    with torch.no_grad():
        for own, value in tensors.items():
            state[own].copy_(value)


def load_weights(f: Objective, path: Path) -> Tensor:
    """Load the trainable parameters of `f` ``(P,)`` from a file; its buffers are written into the model of `f`.

    Raises:
        Unusable: the file cannot be read, or does not fit the model.
    """
    w, others = fit(f, read(read_bytes(path), str(path)), str(path))
    write(f.model, others)
    return w


def read_bytes(path: Path) -> bytes:
    """Read the content of a file.

    Raises:
        Unusable: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}") from error


def _twins(model: nn.Module) -> dict[str, str]:
    """Map the name of a parameter to another name of the same one: a file may keep tied weights under either."""
    first: dict[int, str] = {}
    twins = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            twins[first[id(p)]] = name
    return twins


def _prefix(f: Objective, twins: Mapping[str, str], tensors: Mapping[str, Tensor], name: str) -> str:
    """Find the prefix of the model's names in the file; where none fits, the one that lacks the fewest."""
    probe = next(iter(f.slices))
    ends = (probe, twins.get(probe, probe))
    possible = {key.removesuffix(end) for key in tensors for end in ends if key.endswith("." + end)} | {""}
    lacking = {
        prefix: sum(prefix + p not in tensors and prefix + twins.get(p, p) not in tensors for p in f.slices)
        for prefix in sorted(possible, key=lambda p: (len(p), p))
    }
    fits = [prefix for prefix, missing in lacking.items() if not missing]
    if "" in fits or not fits:
        return min(lacking, key=lambda prefix: lacking[prefix])  # of equals the shortest
    plain = [prefix for prefix in fits if set(prefix.rstrip(".").split(".")) <= WRAPPING]
    if len(fits) > 1 and len(plain) != 1:
        raise Unusable(f"{name} holds several models that fit ({', '.join(fits)}); save the one to measure by itself")
    return (plain or fits)[0]


def _check(own: Tensor, value: Tensor, what: str) -> None:
    if value.shape != own.shape:
        raise Unusable(f"{what} of shape {tuple(own.shape)} has shape {tuple(value.shape)}")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise Unusable(f"{what} is not a plain tensor (quantized, sparse, or without data)")
    if value.is_complex() > own.is_complex() or (own.is_floating_point() and not value.is_floating_point()):
        raise Unusable(f"{what} has numbers of another kind: {value.dtype}, not {own.dtype}")
