"""Rows of a run on disk, written so that a kill or a power cut loses little, and what is damaged is noticed.

While a run lasts, its rows go to an append-only log (one JSON object a line, with its checksum) and its state, now and
then, to a checkpoint that records how long the log was.  Rows are on the disk before the checkpoint that counts them,
and the end of a run before its checkpoint is dropped.  After a kill the log is cut back to the checkpoint and the run
goes on: its rows are those of an uninterrupted run, to the last bit.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Unusable, needing
from .files import SEAL, replacing, sealed, sync, unsealed, write_whole
from .history import Value

LENGTH = "log_bytes"
"""Key under which a checkpoint carries the length of the log."""


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
        """The rows written so far; a line cut short by a kill is left out.

        Raises:
            Unusable: a line is damaged.
        """
        lines, damaged = self._read()
        if damaged:
            raise Unusable(f"line {damaged} of {self.path} is damaged: repeat the run, or delete that line")
        return [row for row in lines if "finished" not in row]

    @property
    def finished(self) -> bool:
        """True once `finish` was called, while all rows are there."""
        return self._ending() is not None

    @property
    def note(self) -> str:
        """Note that `finish` was given: empty, or why the run stopped early."""
        return str((self._ending() or {"finished": ""})["finished"])

    def resume(self) -> dict[str, Tensor]:
        """Load the last checkpoint's tensors, or none for a fresh start, and cut the log back to that moment."""
        if state := self.last_checkpoint():
            return state
        self.clear()
        return {}

    def last_checkpoint(self) -> dict[str, Tensor]:
        """Load the last checkpoint's tensors and cut the log back to that moment.

        There are none, and the log stays, where there is no checkpoint or it is damaged, or the log before it is.
        """
        found = self._checkpoint()
        if found is None:
            return {}
        state, length = found
        content = self._content()
        _, damaged = _parsed(content[:length])
        if len(content) < length or damaged or content[:length][-1:] not in (b"", b"\n"):
            return {}
        self.path.touch()
        os.truncate(self.path, length)
        return state

    def clear(self) -> None:
        """Drop the checkpoint and all rows."""
        self.state.unlink(missing_ok=True)
        self.path.write_bytes(b"")

    def drop_damaged(self) -> None:
        """Take away the lines that are damaged or cut short."""
        lines, damaged = self._read()
        if damaged or self._content()[-1:] not in (b"", b"\n"):
            write_whole(self.path, b"".join(map(_line, lines)))

    def replace_rows(self, rows: Iterable[Mapping[str, Value]]) -> None:
        """Put other rows in place of all that is in the log."""
        write_whole(self.path, b"".join(_line(self._row(row)) for row in rows))

    def append(self, **row: Value) -> None:
        """Add a row to the log."""
        self._write(self._row(row))

    def checkpoint(self, **state: Tensor) -> None:
        """Replace the checkpoint by these tensors, atomically; the rows are brought to the disk before.

        Raises:
            MissingExtra: safetensors is not installed.
        """
        with needing("safetensors", "a checkpoint"):
            from safetensors.torch import save

        if self.path.exists():
            sync(self.path)
        length = self.path.stat().st_size if self.path.exists() else 0
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}  # names may share memory
        metadata = {LENGTH: str(length), SEAL: _checksum(tensors, length)}
        with replacing(self.state) as draft:
            draft.write_bytes(save(tensors, metadata=metadata))

    def finish(self, note: str = "") -> None:
        """Mark the run as complete and drop its checkpoint."""
        self._write({"finished": note, "lines": self._content().count(b"\n")})
        sync(self.path)
        sync(self.path.parent)
        self.state.unlink(missing_ok=True)

    def _row(self, row: Mapping[str, Value]) -> dict[str, Any]:
        return {"run": self.run} | {k: _plain(v) for k, v in row.items()}

    def _write(self, line: Mapping[str, Any]) -> None:
        content = _line(line)
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                with suppress(OSError):  # the next line, if there is room again, begins on a line of its own
                    os.truncate(self.path, before)
                raise

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        return _parsed(self._content())

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""

    def _ending(self) -> dict[str, Any] | None:
        """The last line of a run that is complete."""
        lines, damaged = self._read()
        if damaged or not lines or "finished" not in lines[-1]:
            return None
        return lines[-1] if lines[-1].get("lines", len(lines) - 1) == len(lines) - 1 else None

    def _checkpoint(self) -> tuple[dict[str, Tensor], int] | None:
        """The tensors of the checkpoint and the length of the log; None where there is none that is whole."""
        if not self.state.exists():
            return None
        with needing("safetensors", "a checkpoint"):
            from safetensors import safe_open
        try:
            with safe_open(self.state, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                metadata = file.metadata()
            length = int(metadata[LENGTH])
        except Exception:  # a damaged file may raise anything
            return None
        whole = metadata.get(SEAL, checksum := _checksum(state, length)) == checksum
        return (state, length) if whole and length >= 0 else None


def _line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(sealed(line)).encode() + b"\n"


def _parsed(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and the number of the first that is damaged: 0 where none is."""
    found, damaged = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                found.append(unsealed(json.loads(line)))
            except ValueError:
                damaged = damaged or number
    return found, damaged


def _checksum(tensors: Mapping[str, Tensor], length: int) -> str:
    """The checksum of tensors and of the length of the log."""
    total = zlib.crc32(str(length).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        total = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), total)
        total = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _plain(value: Value) -> Value:
    """Replace numbers that JSON cannot express by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
