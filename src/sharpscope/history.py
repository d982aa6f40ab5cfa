"""A run on disk: rows while it runs, columns when it is done.

While a run lasts, its rows go to an append-only log (one JSON object a line) and its state, now and then, to a
checkpoint that remembers how long the log was.  After a kill the log is cut back to the checkpoint and the run goes
on: the rows that come out are those of an uninterrupted run, to the last bit.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

Value = float | int | str | None


class History:
    """Columns of equal length, one row per measurement; the column "run" says which run a row belongs to.

    >>> h = History()
    >>> h.append(run="a", step=0, loss=1.0)
    >>> h.append(run="a", step=1, loss=0.5, radius=3.0)
    >>> h.series("a", "loss").tolist(), h.series("a", "radius").tolist()
    ([1.0, 0.5], [3.0])
    """

    def __init__(self, rows: Iterable[Mapping[str, Value]] = ()) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._length = 0
        for row in rows:
            self.append(**row)

    def __len__(self) -> int:
        return self._length

    def append(self, **row: Value) -> None:
        """Add one row; columns it does not name stay empty there."""
        for name in row:
            self.columns.setdefault(name, [None] * self._length)
        for name, column in self.columns.items():
            column.append(row.get(name))
        self._length += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per row, with None where a column is empty."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]

    @property
    def runs(self) -> list[str]:
        """Names of the runs, in order of appearance."""
        return list(dict.fromkeys(self.columns.get("run", [])))

    def table(self, run: str, *names: str) -> tuple[np.ndarray, ...]:
        """The named columns of one run as float arrays, over the rows that have all of them."""
        missing = [name for name in names if name not in self.columns]
        if missing or run not in self.runs:
            raise KeyError(f"no run '{run}' with columns {', '.join(names)}; runs: {', '.join(self.runs)}")
        picked = [i for i, r in enumerate(self.columns["run"]) if r == run]
        arrays = [np.array([self.columns[n][i] for i in picked], dtype=float) for n in names]
        whole = ~np.isnan(np.array(arrays)).any(axis=0)
        return tuple(a[whole] for a in arrays)

    def series(self, run: str, name: str) -> np.ndarray:
        """One column of one run as floats, without its empty rows."""
        return self.table(run, name)[0]

    def save(self, path: Path) -> None:
        """Write all columns as Parquet, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        temporary = path.with_suffix(".tmp")
        pq.write_table(pa.table(self.columns), temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read what `save` wrote."""
        import pyarrow.parquet as pq

        history = cls()
        history.columns = pq.read_table(path).to_pydict()
        history._length = len(next(iter(history.columns.values()), []))
        return history


class Track:
    """One run being written into `folder`: rows, checkpoints, and the note it ends with."""

    def __init__(self, folder: Path, run: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = run
        # Readable, but told apart by the digest: file systems differ in the letters and lengths they can tell apart.
        readable = "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in run[:60])
        stem = f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:16]}"
        self.log, self.state = folder / f"{stem}.jsonl", folder / f"{stem}.safetensors"

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
        """What `finish` was told: empty, or why the run stopped early."""
        lines = self._lines()
        return str(lines[-1]["finished"]) if lines and "finished" in lines[-1] else ""

    def resume(self) -> dict[str, Tensor]:
        """The last checkpoint's tensors, or an empty dict for a fresh start; cuts the log back to that moment."""
        from safetensors import safe_open

        self.log.touch()
        if self.state.exists():
            with safe_open(self.state, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                length = int(file.metadata()["log_bytes"])
            if self.log.stat().st_size >= length:
                os.truncate(self.log, length)
                return state
            self.state.unlink()  # its rows are lost
        self.log.write_bytes(b"")
        return {}

    def append(self, **row: Value) -> None:
        """Add a row to the log."""
        self._write({"run": self.run} | {k: _plain(v) for k, v in row.items()})

    def checkpoint(self, **state: Tensor) -> None:
        """Replace the checkpoint by these tensors, atomically."""
        from safetensors.torch import save

        temporary = self.state.with_suffix(".tmp")
        length = self.log.stat().st_size if self.log.exists() else 0
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}  # names may share memory
        temporary.write_bytes(save(tensors, metadata={"log_bytes": str(length)}))
        os.replace(temporary, self.state)

    def finish(self, note: str = "") -> None:
        """Mark the run as complete and drop its checkpoint."""
        self._write({"finished": note})
        self.state.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.log.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _plain(value: Value) -> Value:
    """Numbers that JSON has no word for become empty."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
