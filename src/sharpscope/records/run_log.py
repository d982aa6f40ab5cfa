"""Rows of a run on disk, written so that a kill loses nothing.

While a run lasts, its rows go to an append-only log (one JSON object a line) and its state, now and then, to a
checkpoint that records how long the log was.  After a kill the log is cut back to the checkpoint and the run goes
on: its rows are those of an uninterrupted run, to the last bit.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .history import Value


class RunLog:
    """One run being written into `folder`: rows, checkpoints, and the note it ends with."""

    def __init__(self, folder: Path, run: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = run
        # Readable, but unique by the digest: file systems differ in the letters and lengths that they distinguish.
        readable = "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in run[:60])
        stem = f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:16]}"
        self.path, self.state = folder / f"{stem}.jsonl", folder / f"{stem}.safetensors"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows written so far; a line cut short by a kill is left out."""
        return [row for row in self._lines() if "finished" not in row]

    @property
    def finished(self) -> bool:
        """True once `finish` was called."""
        lines = self._lines()
        return bool(lines) and "finished" in lines[-1]

    @property
    def note(self) -> str:
        """Note that `finish` was given: empty, or why the run stopped early."""
        lines = self._lines()
        return str(lines[-1]["finished"]) if lines and "finished" in lines[-1] else ""

    def resume(self) -> dict[str, Tensor]:
        """Load the last checkpoint's tensors, or none for a fresh start, and cut the log back to that moment."""
        from safetensors import safe_open

        self.path.touch()
        if self.state.exists():
            with safe_open(self.state, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                length = int(file.metadata()["log_bytes"])
            if self.path.stat().st_size >= length:
                os.truncate(self.path, length)
                return state
            self.state.unlink()  # its rows are lost
        self.path.write_bytes(b"")
        return {}

    def append(self, **row: Value) -> None:
        """Add a row to the log."""
        self._write({"run": self.run} | {k: _plain(v) for k, v in row.items()})

    def checkpoint(self, **state: Tensor) -> None:
        """Replace the checkpoint by these tensors, atomically."""
        from safetensors.torch import save

        temporary = self.state.with_suffix(".tmp")
        length = self.path.stat().st_size if self.path.exists() else 0
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}  # names may share memory
        temporary.write_bytes(save(tensors, metadata={"log_bytes": str(length)}))
        os.replace(temporary, self.state)

    def finish(self, note: str = "") -> None:
        """Mark the run as complete and drop its checkpoint."""
        self._write({"finished": note})
        self.state.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _plain(value: Value) -> Value:
    """Replace numbers that JSON cannot express by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
