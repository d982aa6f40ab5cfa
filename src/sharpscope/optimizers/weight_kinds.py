"""Parameter groups for an optimizer, by what weight decay does to each kind of weights.

Weight decay pulls on the norm, as ``(wd/2)‖w‖²`` in the loss does.  What that means follows from what may be rescaled:

    L(c a) = L(a)            (scale-invariant)  no penalty; the norm sets the effective learning rate
    L(c a, b/c) = L(a, b)    (pair)             a penalty on the product: min_c ‖c a‖² + ‖b/c‖² = 2 ‖a‖‖b‖

so both sides of a pair are decayed or neither is: where one is left out, the other may shrink at no cost.  (b may be
several maps, the queries, keys and values that read a gain a.)  A pair with scale-invariant weights b is free of
penalty, too: b and what it is invariant with take up what a loses.

P parameters.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..autodiff.objective import Objective, require_objective
from ..symmetry.scale_groups import ScaleGroups, find_groups
from .base import demand


class DecayKind(NamedTuple):
    """A kind of weights: whether weight decay is to act on it, and why."""

    decays: bool
    reason: str


INVARIANT, THROUGH_PAIRS, IN_PAIRS = "scale-invariant", "rescaled against invariant", "rescaled in pairs"
NULL, VECTORS = "no effect", "gains and other vectors"

KINDS: Mapping[str, DecayKind] = {
    INVARIANT: DecayKind(True, "no penalty: decay sets the norm, and by it the effective learning rate"),
    THROUGH_PAIRS: DecayKind(True, "no penalty: scale-invariant weights take up their norm, decayed alike"),
    IN_PAIRS: DecayKind(True, "a penalty on the product of the two, if both are decayed alike"),
    "matrices": DecayKind(True, "a penalty on the function"),
    "tied": DecayKind(True, "a penalty on the function, read in several places"),
    "embeddings": DecayKind(False, "rows of rare inputs would shrink at every step, and see few gradients"),
    VECTORS: DecayKind(False, "a pull towards zero that nothing asks for"),
    "biases": DecayKind(False, "a pull of offsets towards zero that nothing asks for"),
    NULL: DecayKind(False, "the loss of these data does not see them: decay would only shrink them"),
}
"""All kinds, in the order in which they are listed."""

_MAPS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, ParametrizationList)


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for a torch optimizer, a list of dicts; printed as a table with reasons.

    Each has ``params``, ``param_names``, ``weight_decay``, the ``name`` of its kind (of `KINDS`), and ``lr`` if given.
    """

    def __str__(self) -> str:
        lines = [f"{'kind':{_WIDTH}} {'tensors':>8} {'weights':>12} {'decay':>8}  reason"]
        for group in self:
            name, decay, params = group["name"], group["weight_decay"], group["params"]
            reason = KINDS[name].reason
            if name == INVARIANT and decay and group.get("lr"):
                reason += f" (over about 1/(2·lr·wd) = {1 / (2 * group['lr'] * decay):.0f} steps)"
            weights = sum(p.numel() for p in params)
            lines.append(f"{name:{_WIDTH}} {len(params):8,d} {weights:12,d} {decay:8g}  {reason}")
        return "\n".join(lines)


_WIDTH = max(map(len, KINDS))


def param_groups(
    f: Objective, weight_decay: float, *, lr: float | None = None, groups: ScaleGroups | None = None
) -> ParamGroups:
    """Group the trainable parameters of `f` for an optimizer, by what weight decay does to them.

    Every parameter is in one group, in the order of the model; a tensor of several kinds is of the one that most of its
    weights are.  `groups` are those of ``find_groups(f)``, which costs some gradients, by default.

    Raises:
        TypeError: no objective: what is invariant is found from gradients of a loss on a few batches.
        ValueError: a weight decay or a learning rate that is negative or not finite.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    >>> x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> groups = param_groups(Objective(net, nn.functional.mse_loss, [(x, x[:, :1])]), weight_decay=0.1)
    >>> [(group["name"], group["weight_decay"]) for group in groups]
    [('scale-invariant', 0.1), ('matrices', 0.1), ('gains and other vectors', 0.0), ('biases', 0.0)]
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    require_objective(f)
    demand(0 <= weight_decay < math.inf, f"weight_decay={weight_decay} is to be a number from 0 on, such as 0.1")
    demand(lr is None or 0 < lr < math.inf, f"lr={lr} is to be a positive number, such as 1e-3")
    kinds = kinds_of(f, find_groups(f) if groups is None else groups)
    rate = {} if lr is None else {"lr": lr}
    parameters = f.parameters()
    found = ParamGroups()
    for kind, (decays, _) in KINDS.items():
        if names := [name for name, own in kinds.items() if own == kind]:
            params = [parameters[name] for name in names]
            decay = float(weight_decay) if decays else 0.0
            found.append({"params": params, "param_names": names, "weight_decay": decay, "name": kind, **rate})
    return found


def kinds_of(f: Objective, groups: ScaleGroups) -> dict[str, str]:
    """The kind of every parameter of `f`, one of `KINDS`, by its name."""
    places: dict[int, list[nn.Module]] = defaultdict(list)
    for module in f.modules():
        for p in module._parameters.values():
            places[id(p)].append(module)
    structure = {name: _structure(name, p, places[id(p)]) for name, p in f.parameters().items()}
    marks = _marks(f, groups, {name for name, kind in structure.items() if kind not in (VECTORS, "biases")})
    found = {}
    for name, kind in structure.items():
        counts = torch.bincount(marks[f.slices[name]], minlength=len(_MARKS))
        most = int(counts.argmax())
        found[name] = _MARKS[most] or kind
    return found


_MARKS = ("", INVARIANT, THROUGH_PAIRS, IN_PAIRS, NULL)
"""Kinds that the search for groups knows, by their mark; 0 marks what it does not."""


def weights_by_kind(f: Objective, kinds: Mapping[str, str], names: Collection[str]) -> dict[str, int]:
    """The number of weights of each kind among the parameters `names`, of those whose kind is known."""
    counts: Counter[str] = Counter()
    for name, kind in kinds.items():
        counts[kind] += f.shapes[name].numel() if name in names else 0
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def one_sided(f: Objective, groups: ScaleGroups, decayed: Collection[str]) -> list[str]:
    """The pairs of which one side has weight decay, by the names of `decayed` parameters, and the other has none."""
    acts = {p: [any(name in decayed for name in _side(f, side)) for side in p.split(" -> ")] for p in groups.pairs}
    return [pair for pair, sides in acts.items() if any(sides) and not all(sides)]


def _structure(name: str, p: Tensor, places: Sequence[nn.Module]) -> str:
    """The kind of a parameter by its shape and the modules that it is a parameter of."""
    is_map = p.dim() > 1 and any(isinstance(m, _MAPS) for m in places)
    is_norm = any(re.search(r"Norm(\dd)?$", type(m).__name__) for m in places)
    if not is_map and (is_norm or sum(n > 1 for n in p.shape) <= 1):
        return "biases" if "bias" in name.rpartition(".")[2] else VECTORS
    if len(places) > 1:
        return "tied"
    return "embeddings" if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in places) else "matrices"


def _marks(f: Objective, groups: ScaleGroups, matrices: set[str]) -> Tensor:
    """The mark of every weight ``(P,)`` that the search has found to be of one of `_MARKS`."""
    marks = torch.zeros(f.size, dtype=torch.int8)
    for indices in groups.null.values():
        marks[indices] = _MARKS.index(NULL)
    marks[groups.joint] = _MARKS.index(INVARIANT)
    pairs = [tuple(_side(f, side) for side in pair.split(" -> ")) for pair in groups.pairs]
    through = _MARKS.index(THROUGH_PAIRS)
    grown = True
    while grown:
        free = [(a, b) for one, other in pairs for a, b in ((one, other), (other, one)) if _is_free(marks, b)]
        grown = any([_mark(marks, a.values(), through) for a, _ in free])
    for side in (side for pair in pairs for side in pair):
        _mark(marks, [s for name, s in side.items() if name in matrices] or side.values(), _MARKS.index(IN_PAIRS))
    return marks


def _side(f: Objective, side: str) -> dict[str, slice]:
    """The weights that one side of a pair names, as ``a.weight + b.weight``, ``a.*``, ``a[0:4]`` or ``a (rest)``."""
    found = {}
    for name, start, stop in re.findall(r"(\S+?)(?:\[(\d+):(\d+)\]| \(rest\))?(?: \+ |$)", side):
        module, _, last = name.rpartition(".")
        for n in [n for n in f.slices if n.rpartition(".")[0] == module] if last == "*" else [name]:
            s, row = f.slices[n], f.shapes[n][1:].numel()
            found[n] = slice(s.start + int(start) * row, s.start + int(stop) * row) if stop else s
    return found


def _is_free(marks: Tensor, side: Mapping[str, slice]) -> bool:
    """Say whether all weights of a side that matter are free of penalty."""
    own = torch.cat([marks[s] for s in side.values()])
    own = own[own != _MARKS.index(NULL)]
    return bool(((own == _MARKS.index(INVARIANT)) | (own == _MARKS.index(THROUGH_PAIRS))).all()) and own.numel() > 0


def _mark(marks: Tensor, places: Iterable[slice], mark: int) -> bool:
    """Mark the weights that have no mark yet; say whether there were any."""
    changed = False
    for s in places:
        new = marks[s] == 0
        marks[s][new] = mark
        changed |= bool(new.any())
    return changed
