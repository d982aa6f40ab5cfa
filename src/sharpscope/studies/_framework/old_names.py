"""Names that stood in run directories of earlier versions, so that old runs can still be reported on.

What was renamed everywhere stands here; what one study renamed stands in that study, as its ``OLD_COLUMNS`` (column ->
name of today) and ``OLD_FIELDS`` (of its Config).
"""

import re
from collections.abc import Mapping
from typing import Any

from ...records.history import History

COLUMNS = (
    (r"edge", r"eta_lambda"),
    (r"lambda1", r"spherical_sharpness"),
    (r"lambda(\d+)", r"spherical_sharpness\1"),
    (r"(radius|balance):(.*)", r"\1/\2"),
    (r"share/(.*)", r"fraction/\1"),
    (r"clock", r"intrinsic_time_per_step"),
)


def columns_of_today(study: Any, history: History) -> History:
    """The history of a run of `study`, with its columns under their names of today.

    Where several columns have become one, each row has the value of the first that is not empty there.
    """
    own: Mapping[str, str] = getattr(study, "OLD_COLUMNS", {})
    columns: dict[str, list[Any]] = {}
    for name, values in history.columns.items():
        today = own.get(name) or _renamed(name)
        known = columns.get(today, [None] * len(values))
        columns[today] = [new if value is None else value for value, new in zip(known, values, strict=True)]
    history.columns = columns
    return history


def fields_of_today(study: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The stored configuration of a run of `study`, with its fields under their names of today."""
    own: Mapping[str, str] = getattr(study, "OLD_FIELDS", {})
    return {own.get(name, name): value for name, value in values.items()}


def _renamed(name: str) -> str:
    for old, new in COLUMNS:
        if found := re.fullmatch(old, name):
            return found.expand(new)
    return name
