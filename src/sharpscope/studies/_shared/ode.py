"""Gradient flows as ordinary differential equations, to solver precision (scipy), and their explicit Euler steps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import FlowStuck

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The states of a flow at some times."""

    times: Array  # (T,)
    states: Array  # (T, P)
    settled: bool  # the residual at which to stop was reached

    @property
    def end(self) -> Array:
        """The last state ``(P,)``."""
        return self.states[-1]


def flow(
    field: Callable[[Array], Array],
    start: Array,
    until: float,
    *,
    at: Array | None = None,
    residual: Callable[[Array], float] | None = None,
    small: float = 1e-9,
    method: str = "DOP853",
    rtol: float = 1e-9,
    atol: float = 1e-14,
) -> Curve:
    """Solve ``ẏ = field(y)`` from `start` ``(P,)`` to time `until`, or until ``residual(y) <= small``.

    States are those at the times `at` (sorted, from 0; by default those of the solver), and the one at which the
    residual was reached.  "DOP853" is explicit of order 8; "LSODA" also follows stiff stretches.

    Raises:
        ArithmeticError: the solver gives up; the message says where.
    """
    from scipy.integrate import solve_ivp

    def reached(t: float, y: Array) -> float:
        assert residual is not None
        return residual(y) - small

    events = None
    if residual is not None:
        reached.terminal = True  # type: ignore[attr-defined]  # how scipy is told
        events = reached
    found = solve_ivp(
        lambda t, y: field(y), (0.0, until), start, method, t_eval=at, events=events, rtol=rtol, atol=atol
    )
    if found.status < 0 or not np.isfinite(found.y).all():
        raise FlowStuck(f"the flow stopped at t = {found.t[-1] if len(found.t) else 0:g}: {found.message}")
    times, states = found.t, found.y.T
    if found.status == 1 and (not len(times) or found.t_events[0][-1] > times[-1]):
        times = np.append(times, found.t_events[0][-1])
        states = np.vstack([states.reshape(-1, len(start)), found.y_events[0][-1:]])
    return Curve(times, states, found.status == 1)


def descent(field: Callable[[Array], Array], start: Array, rate: float, steps: int) -> Array:
    """Take explicit Euler steps, ``y ← y + rate·field(y)``; with minus a gradient as field, gradient descent.

    The result is all states ``(steps + 1, P)``.

    >>> descent(lambda y: -y, np.array([8.0]), 0.5, 3).ravel().tolist()
    [8.0, 4.0, 2.0, 1.0]
    """
    states = np.empty((steps + 1, len(start)))
    states[0] = start
    for t in range(steps):
        states[t + 1] = states[t] + rate * field(states[t])
    return states
