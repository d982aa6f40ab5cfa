"""Problems that were measured to the end, on disk: a run that was stopped goes on with the next one.

A file is named by its problem and by everything that its numbers depend on: the code of sharpscope and of the
benchmark, the versions of the packages, and how much was measured.  What other code measured is never used.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sharpscope

from . import contenders
from .measure import Row
from .problems import Problem
from .tables import PACKAGES, Section

FOLDER = Path("runs/bench")


def place(p: Problem, extent: object) -> Path:
    """Return the file of a problem."""
    code = sorted((*Path(sharpscope.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")))
    digest = hashlib.sha256(repr((extent, [version(name) for name in PACKAGES])).encode())
    for path in code:
        digest.update(path.read_bytes())
    return FOLDER / f"{p.name.replace(' ', '-')}-{digest.hexdigest()[:16]}.json"


def save(path: Path, sections: Iterable[Section]) -> None:
    """Write the sections of a problem, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps([_as_json(s) for s in sections], indent=1))
    part.replace(path)


def load(path: Path, p: Problem) -> list[Section]:
    """Read the sections of a problem."""
    return [
        Section(p, s["stage"], s["mode"], [_row(r) for r in s["rows"]], s["gradient"], s["edge"], s["took"])
        for s in json.loads(path.read_text())
    ]


def _as_json(s: Section) -> dict[str, Any]:
    rows = [{**asdict(r), "make": r.make.__name__} for r in s.rows]
    return {"stage": s.stage, "mode": s.mode, "rows": rows, "gradient": s.gradient, "edge": s.edge, "took": s.took}


def _row(saved: dict[str, Any]) -> Row:
    return Row(**{f.name: saved[f.name] for f in fields(Row)} | {"make": getattr(contenders, saved["make"])})
