"""Rows of a run in memory and on disk, files that are whole or not there, and checkpoints."""

from .history import History
from .run_log import RunLog

__all__ = [
    "History",
    "RunLog",
]
