"""Find scale-invariant weights from the gradient, by Euler's identity.

A group g of weights is scale-invariant when ``L(.., c w_g, ..) = L(w)`` for every c > 0.  Then

    w_gᵀ ∇_g L(w) = 0             (Euler)
    ∇_g L(.., c w_g, ..) = ∇_g L(w) / c

Both are tested near the weights, in double precision, at perturbed weights that are raised to ordinary size where they
are small.  An eps in a normalization leaves an Euler cosine ``|w_gᵀ∇_g| / (‖w_g‖ ‖∇_g‖)`` that falls like 1/c² when
w_g is multiplied by c; a side branch leaves one that falls like 1/c, chance one that does not fall.  So the verdict
does not depend on the size of the weights.  The cosine that eps leaves at the weights as they are is the *defect*.

Weights without any effect (a bias right before batch normalization) are *null*: they would enter the norm, and are kept
out of it.  Where no tensor or module is invariant alone, `relations` finds parts of it, or several together.
All sizes have one `search`.

P parameters, n of them in a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..autodiff.objective import Objective, require_objective
from ..display import card, progress, text
from .candidates import Candidates
from .parts import Part, views, whole
from .parts import indices as places
from .search import Search
from .tally import largest_cosine

EULER = 2e-3
"""Largest Euler cosine at the weights themselves at which numbers on the sphere may be believed: eps is felt above."""


@dataclass(frozen=True)
class ScaleGroups:
    """The weights that may be rescaled without a change of the loss.

    ``groups``: name -> indices ``(n,)`` into the flat vector of weights that are invariant on their own, but for an
    eps.  Gain and shift of a normalization are such a group (``bn.*``) where a rectifier and another normalization
    follow; so are the tensors that write to a residual stream which is normalized wherever it is read.
    ``defects``: name -> Euler cosine at the weights of every tensor and every group (0 is exact invariance).  In a
    group it measures eps against the variance.
    ``null``: name -> indices of weights without any effect on the loss.
    ``joint``: indices of all weights that may be rescaled together, ``joint_defect`` their Euler cosine.
    ``pairs``: ``"a -> b"`` -> defect of weights that may be rescaled by c and 1/c (positive homogeneity);
    ``"a -> b + c"`` where several maps read one gain, as queries, keys and values do.
    ``num_gradients``: cost of the search, gradients of the first batch alone included.
    """

    groups: Mapping[str, Tensor]
    defects: Mapping[str, float]
    null: Mapping[str, Tensor]
    joint: Tensor
    joint_defect: float
    pairs: Mapping[str, float] = field(default_factory=dict)
    num_gradients: int = 0

    def covers(self, size: int) -> bool:
        """True when every one of `size` parameters is in the joint group, so that the loss lives on one sphere."""
        return self.joint.numel() == size

    @property
    def broken(self) -> list[str]:
        """Groups whose invariance eps breaks at these weights (defect above `EULER`); larger weights restore it."""
        return [name for name in self.groups if self.defects[name] > EULER]

    def __str__(self) -> str:
        cosine = f" (Euler cosine {self.joint_defect:.1e})" if self.joint.numel() else ""
        lines = [f"{self.joint.numel()} weights may be rescaled together{cosine}."]
        lines += [f"{name} ({i.numel()}) is invariant, to {self.defects[name]:.1e}." for name, i in self.groups.items()]
        lines += [
            f"{name} has met an eps: its Euler cosine is {self.defects[name]:.2g} here, and less at larger weights."
            for name in self.broken
        ]
        lines += [f"{name} ({i.numel()}) has no effect on the loss." for name, i in self.null.items()]
        lines += [f"{name} by c and 1/c changes nothing, to {defect:.1e}." for name, defect in self.pairs.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        names = ", ".join([*list(self.groups)[:3], *(["..."] if len(self.groups) > 3 else [])])
        return (
            f"ScaleGroups({len(self.groups)} groups: [{names}], joint={self.joint.numel()} weights,"
            f" null={len(self.null)} groups, pairs={len(self.pairs)}, num_gradients={self.num_gradients})"
        )

    def _repr_html_(self) -> str:
        return card("Scale-invariant weights", text(str(self)))


@progress("scale-invariant groups", "gradients")
def find_groups(f: Objective, w: Tensor | None = None, *, candidates: Candidates | None = None) -> ScaleGroups:
    """Find the scale-invariant groups of `f` near `w` (default: the model's weights).

    Tests each tensor, then (weight, bias) pairs of what is left, then blocks of rows or columns, then sums of tensors.
    With `candidates` (`rows`, `columns`) tests these, then pairs, then all that is left together with the groups.
    Costs three gradients where every tensor is invariant, else about fifteen, all in double precision; relations are
    sought on the first batch alone.  From `search.LARGE` parameters on, 15 to 40 gradients of one or eight examples in
    single precision look for candidates, and three to ten in double precision confirm them; one of all data confirms
    weights without effect.  That takes memory for about nine vectors ``(P,)``, plus the indices.

    Raises:
        ValueError: the gradient there is not finite.
    """
    require_objective(f)
    search = Search(f, f.weights() if w is None else w)
    tested = {name: (whole(f, name),) for name in f.slices} if candidates is None else candidates(f)
    search.find(None if candidates is None else tested)
    here = search.near_weights()
    tested = {name: part for name, part in tested.items() if name not in search.null}
    return ScaleGroups(
        {name: places(f, part) for name, part in search.groups.items()},
        {name: largest_cosine(here, part) for name, part in (tested | search.groups).items()},
        {name: places(f, part) for name, part in search.null.items()},
        _sorted(f, search.joint),
        largest_cosine(here, search.joint) if search.joint else 1.0,
        pairs={f"{a} -> {b}": pair.mismatch for (a, b), pair in search.pairs.items()},
        num_gradients=search.count,
    )


def _sorted(f: Objective, part: Part) -> Tensor:
    """List the places of the weights of a part in the order of the flat vector, each once."""
    inside = torch.zeros(f.size, dtype=torch.bool)
    for v in views(f, inside, part):
        v.fill_(value=True)
    return inside.nonzero().flatten()
