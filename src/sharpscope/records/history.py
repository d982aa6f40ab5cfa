"""Columns of runs in memory, and as a Parquet file once a run is done."""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..display import card, table, text
from ..errors import NoSuchColumn, Unusable, needing
from .files import SEAL, replacing

Value = float | int | str | None
SHOWN_ROWS, SHOWN_COLUMNS = 6, 10
"""Numbers of rows, the last ones, and of columns, the first ones, that a notebook shows."""

DAMAGED = "restore it from a copy, or delete it and repeat the command that writes it"


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

    def __repr__(self) -> str:
        return (
            f"History({len(self)} rows, {len(self.columns)} columns, runs: {', '.join(map(str, self.runs)) or 'none'})"
        )

    def _repr_html_(self) -> str:
        names = list(self.columns)[:SHOWN_COLUMNS]
        shown = [[_shown(self.columns[name][i]) for name in names] for i in range(len(self))[-SHOWN_ROWS:]]
        hidden = [name for name in self.columns if name not in names]
        more = f"further columns: {', '.join(hidden[:40])}{', ...' * (len(hidden) > 40)}" if hidden else ""
        return card(repr(self), table(names, shown), text(more) if more else "")

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
            raise NoSuchColumn(f"no run '{run}' with columns {', '.join(names)}; runs: {', '.join(self.runs)}")
        picked = [i for i, r in enumerate(self.columns["run"]) if r == run]
        arrays = [np.array([self.columns[n][i] for i in picked], dtype=float) for n in names]
        whole = ~np.isnan(np.array(arrays)).any(axis=0)
        return tuple(a[whole] for a in arrays)

    def series(self, run: str, name: str) -> np.ndarray:
        """One column of one run as floats, without its empty rows."""
        return self.table(run, name)[0]

    def to_pandas(self) -> Any:
        """Return the rows as a ``pandas.DataFrame``, with NaN or None where a column is empty.

        Raises:
            MissingExtra: pandas is not installed.
        """
        with needing("pandas", "to_pandas()"):
            from pandas import DataFrame
        return DataFrame(self.columns)

    def save(self, path: Path) -> None:
        """Write all columns as Parquet, atomically, with a checksum.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        with needing("pyarrow", "a history on disk"):
            import pyarrow as pa
            import pyarrow.parquet as pq

        table = pa.table(self.columns)
        with replacing(path) as draft:
            pq.write_table(table.replace_schema_metadata({SEAL: _checksum(table.to_pydict())}), draft)

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read a history that `save` wrote.

        Raises:
            Unusable: the file is missing or damaged.
            MissingExtra: pyarrow is not installed.
        """
        with needing("pyarrow", "a history on disk"):
            import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
            columns = table.to_pydict()
        except FileNotFoundError as error:
            raise Unusable(f"there is no {path}: repeat the command that writes it") from error
        except Exception as error:  # a damaged file may raise anything
            raise Unusable(f"{path} is damaged, or no Parquet file: {DAMAGED}") from error
        seal = (table.schema.metadata or {}).get(SEAL.encode())
        if seal is not None and seal.decode() != _checksum(columns):
            raise Unusable(f"{path} was changed after it was written (its checksum does not fit): {DAMAGED}")
        history = cls()
        history.columns = columns
        history._length = len(next(iter(columns.values()), []))
        return history


def _shown(value: Value) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _checksum(columns: Mapping[str, list[Any]]) -> str:
    return f"{zlib.crc32(repr(columns).encode()):08x}"
