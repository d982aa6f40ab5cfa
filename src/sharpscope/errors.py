"""Every error that sharpscope raises on purpose, each a kind of `SharpscopeError`.

An error keeps the built-in kind that fits it (ValueError, RuntimeError, ...), so that either may be caught.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SharpscopeError(Exception):
    """Base of all errors of sharpscope; its message says what was seen and what to do."""


class InvalidValue(SharpscopeError, ValueError):
    """An argument, a model, a loss or data that cannot be used as given."""


class InvalidType(SharpscopeError, TypeError):
    """An object of a kind that is not known here, such as an optimizer without an update rule."""


class NotFound(SharpscopeError, LookupError):
    """There is no study of that name."""


class NoSuchColumn(NotFound, KeyError):
    """A history has no such run, or the run no such column."""

    __str__ = Exception.__str__  # KeyError would put the message into quotation marks


class MissingExtra(SharpscopeError, ImportError):
    """A package that only some uses need is not installed."""


class NotConverged(SharpscopeError, RuntimeError):
    """A solver used up its products before its residuals met the tolerance."""


class OutOfTime(NotConverged):
    """A measurement was given up, because it took longer than its budget allows."""


class NotFinite(SharpscopeError, ValueError):
    """A product with the operator overflowed, or is not a number."""


class NoSecondDerivative(SharpscopeError, RuntimeError):
    """An operation of the model or the loss can be differentiated once, but not twice."""


class NotSymmetric(SharpscopeError, ValueError):
    """A training with stopped gradients follows a field whose Jacobian is not symmetric: it is no Hessian."""


class Random(SharpscopeError, ValueError):
    """A model or a loss draws random numbers, so that its loss is no function of the weights."""


class WrongThirdDerivative(SharpscopeError, ArithmeticError):
    """The third derivative by automatic differentiation is not the second difference of the gradient."""


class CannotTrace(SharpscopeError, RuntimeError):
    """A function cannot be recorded as a fixed program, or its program gave other numbers."""


class OtherProcess(SharpscopeError, RuntimeError):
    """Another process of the group failed, or does not answer, so that there is no sum over all of them."""


class Diverged(SharpscopeError, RuntimeError):
    """The processes of a group have different weights, or multiply different vectors."""


class FlowStuck(SharpscopeError, ArithmeticError):
    """The steps of an integrator became too short, or its trajectory left the finite numbers."""


class NoMinimizer(SharpscopeError, ArithmeticError):
    """There is no manifold of minimizers near a point."""


class Unsolvable(SharpscopeError, ArithmeticError):
    """A complementarity problem has no solution, or none was found to the tolerance."""


class Unusable(SharpscopeError):
    """A file, a directory or a request that a command cannot work with."""


class Refused(SharpscopeError):
    """The command line cannot do what it was asked to; it ends with exit status 2."""


@contextmanager
def needing(package: str, user: str) -> Iterator[None]:
    """Name a package that an import inside does not find: "`user` needs it, and it is not installed".

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        yield
    except ImportError as missing:
        raise MissingExtra(f"{user} needs {package}, which is not installed: pip install {package}") from missing
