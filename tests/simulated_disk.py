"""A process that ends, or a machine whose power fails, between any two writes that reach the disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Stopped(BaseException):
    """The process ends here."""


class Disk:
    """Lets so many calls of fsync, replace and unlink through; then everything stops, and what follows is not done.

    It knows how much of each file has reached the disk.
    """

    def __init__(self, calls: float) -> None:
        self.left = calls
        self.kept: dict[int, int] = {}  # bytes of a file on the disk, by its inode

    def _called(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if self.left <= 0:
                raise Stopped
            self.left -= 1
            return call(*arguments, **named)

        return counted

    def _fsync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self.kept[found.st_ino] = found.st_size

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Put this disk in place of that of the system."""
        patch.setattr(os, "fsync", self._called(self._fsync))
        patch.setattr(os, "replace", self._called(os.replace))
        patch.setattr(os, "unlink", self._called(os.unlink))

    def lose_power(self, folder: Path, *, zeros: bool) -> None:
        """Take away what has not reached the disk, or leave zeros in its place, as file systems may."""
        for path in folder.rglob("*"):
            if path.is_file():
                size, kept = path.stat().st_size, self.kept.get(path.stat().st_ino, 0)
                os.truncate(path, min(kept, size))
                if zeros:
                    os.truncate(path, size)


def undisturbed(patch: pytest.MonkeyPatch) -> None:
    """Keep tests quick: nothing waits for the disk."""
    patch.setattr(os, "fsync", lambda descriptor: None)


def flipped(content: bytes, at: int) -> bytes:
    """The content with the lowest bit of one byte flipped."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _flip(eighths: int) -> Callable[[bytes], bytes]:
    return lambda content: flipped(content, len(content) * eighths // 8)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "end cut": lambda content: content[:-3],
    "zeros": lambda content: b"\0" * len(content),
    "foreign": lambda content: b"notes on this run\n",
    **{f"flipped at {part}/8": _flip(part) for part in (1, 3, 5, 7)},
    "flipped near the end": lambda content: flipped(content, max(len(content) - 4, 0)),
}
"""What may happen to a file; None where it is gone."""


def damage(path: Path, kind: str) -> None:
    """Damage a file."""
    content = DAMAGES[kind](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
