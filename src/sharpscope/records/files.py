"""Files that are there whole or not at all, also after a kill or a power cut, and JSON that knows if it was changed.

A file is written beside its place and brought to the disk before it takes the place of the old one.  An object that is
written as JSON carries a checksum of itself; one of an earlier version has none, and is taken as it is.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InvalidValue, Unusable

SEAL = "crc32"
"""Key under which an object on disk carries its checksum."""

DRAFT = re.compile(r"\..+\.\d+\.tmp")
"""Names of files that have not taken their place: ``.NAME.PROCESS.tmp``."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a draft to be written, which then takes the place of `path`.

    Whoever reads, and whenever the machine stops: there is the old file or the new one, and never a part of either.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def sync(path: Path) -> None:
    """Have the system bring a file to the disk, or the names in a folder, where it can."""
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif os.name != "nt":  # Windows opens no folders
        folder = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems cannot
                os.fsync(folder)
        finally:
            os.close(folder)


def remove_drafts(folder: Path) -> None:
    """Remove what a kill left behind in a folder that nobody else is writing into."""
    for path in folder.glob(".*.tmp"):
        if DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def is_draft(path: Path) -> bool:
    """Tell whether a file has not taken its place; those of earlier versions are named ``NAME.tmp``."""
    return path.suffix == ".tmp"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of an object.

    >>> unsealed(sealed({"step": 1}))
    {'step': 1}
    """
    return {**value, SEAL: _checksum(value)}


def unsealed(found: object) -> dict[str, Any]:
    """Take the checksum off an object that was read.

    Raises:
        ValueError: it does not fit, or this is no object.
    """
    if not isinstance(found, dict):
        raise InvalidValue("it is no JSON object")
    value = {name: part for name, part in found.items() if name != SEAL}
    if SEAL in found and found[SEAL] != _checksum(value):
        raise InvalidValue("it was changed after it was written: its checksum does not fit")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; an object is sealed, and what is not finite becomes null."""
    finite = json.loads(json.dumps(_finite(value)))
    content = sealed(finite) if isinstance(finite, dict) else finite
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, keys: set[str], what: str, advice: str) -> dict[str, Any]:
    """Read an object with these keys.

    Raises:
        Unusable: "PATH is not `what`", and why; `advice` says what to do.
    """
    try:
        found = unsealed(json.loads(path.read_bytes()))
    except InvalidValue as error:
        raise Unusable(f"{path} is not {what}: {error}; {advice}") from error
    except ValueError as error:
        raise Unusable(f"{path} is not {what}: it is empty, cut short or no JSON; {advice}") from error
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}; {advice}") from error
    if missing := keys - found.keys():
        raise Unusable(f"{path} is not {what}: it has no '{min(missing)}'; {advice}")
    return found


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
