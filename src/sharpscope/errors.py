"""Every error that sharpscope raises on purpose, each a kind of one base class."""


class NoSecondDerivative(RuntimeError):
    """An operation of the model or the loss can be differentiated once, but not twice."""


class CannotTrace(RuntimeError):
    """A function cannot be recorded as a fixed program, or its program gave other numbers."""


class WrongThirdDerivative(ArithmeticError):
    """Autograd's third derivative is not the second difference of the gradient."""


class FlowStuck(ArithmeticError):
    """The steps of an integrator became too short, or the path left the finite numbers."""


class NoMinimizer(ArithmeticError):
    """There is no manifold of minimizers near a point."""


class Unsolvable(ArithmeticError):
    """The problem has no solution, or none was found to the tolerance."""


class NotConverged(RuntimeError):
    """A solver used up its products before its residuals met the tolerance."""


class NotFinite(ValueError):
    """A product with the operator overflowed, or is not a number."""


class OutOfTime(NotConverged):
    """A reading has taken longer than the budget allows."""


class Unusable(Exception):
    """It cannot be done as asked; the message says what was seen and what to do."""
