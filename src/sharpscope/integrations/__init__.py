"""Loggers and training frameworks, one thin file each, imported only by who uses it.

A logger becomes a sink, a function ``(step, values)`` for ``Monitor(sinks=[...])``.  A framework gets a callback, which
makes the Monitor and calls it.
"""

import re
from collections.abc import Mapping


def named(values: Mapping[str, float]) -> dict[str, float]:
    """Give the values of a measurement names that every logger takes as they are: one slash, and letters or ``_.-``.

    >>> named({"sharpness": 2.0, "radius/0.weight + 0.bias": 3.0})
    {'sharpscope/sharpness': 2.0, 'sharpscope/radius.0.weight_0.bias': 3.0}
    """
    return {"sharpscope/" + re.sub(r"[^A-Za-z0-9_.-]+", "_", n.replace("/", ".")): v for n, v in values.items()}
