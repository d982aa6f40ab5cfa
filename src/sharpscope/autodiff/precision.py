"""An objective in double precision, where rounding in single precision would hide what a function does.

    f₆₄ = in_double(f),      f₆₄.value(w.double()) = L(w) but for the rounding of float32

P parameters.
"""

import copy

from torch import Tensor, nn

from .objective import Objective


def in_double(f: Objective) -> Objective:
    """Copy an objective to double precision, with copies of its model and of a loss that is a module.

    Batches are converted as they are read, so that the data are in memory once; integers stay integers.  The data keep
    their seed, and products are formed by the same method; `f` itself is left as it is.  A model that casts to single
    precision inside still does.

    Raises:
        RuntimeError, TypeError, ValueError: the model or the loss cannot be copied.
    """
    double = copy.copy(f)
    double.model = copy.deepcopy(f.model).double()
    double.loss = copy.deepcopy(f.loss).double() if isinstance(f.loss, nn.Module) else f.loss
    double.form = f.form.converted(_doubled)
    double.graph_bytes_per_example = 2 * f.graph_bytes_per_example
    return double


def _doubled(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
