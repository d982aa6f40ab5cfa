"""Writes docs/gallery.md and its figures from the directory of a finished `sharpscope run all`.

    python tools/gallery.py runs/all            # or runs/all-quick; a second argument is the folder to write to

Of each study: title, paper, argument, the first of its charts, and how many of its deciding claims hold.
"""

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sharpscope.records.history import History
from sharpscope.report.figures import figure
from sharpscope.studies._framework.claims import CONTROL, WIDER, Verdict
from sharpscope.studies._framework.pages import observed
from sharpscope.studies._framework.study import find, headings

MAX_BYTES = 60_000
"""Bytes of a figure."""

HEAD = """# Gallery

What `sharpscope run all{size}` gave with sharpscope {sharpscope}, torch {torch} ({date}). Every study decides claims of
a paper by numbers; negative controls are settings in which the effect has to be absent. Written by `make gallery`.
"""


def gallery(run: Path, docs: Path) -> Path:
    """The page, from the runs of all studies in `run`."""
    request = json.loads((run / "all.json").read_text())
    images = docs / "images/gallery"
    images.mkdir(parents=True, exist_ok=True)
    sections = []
    environment: dict[str, Any] = {}
    for name, seeds in request["studies"].items():
        study, single = find(name), seeds == [None]
        first = run / name if single else run / name / f"seed-{seeds[0]}"
        told = json.loads((first / "verdicts.json").read_text() if single else (run / name / "seeds.json").read_text())
        verdicts = [_verdict(v) for v in (told if single else told["claims"])]
        environment = json.loads((first / "environment.json").read_text())
        chart = study.CHARTS[0]
        picture = small_png(figure(chart, History.load(first / "history.parquet").columns))
        (images / f"{name}.png").write_bytes(picture)
        title, argument = headings(study)
        sections.append(
            f"## {text(title)}\n\n{text(study.PAPER)} · `sharpscope run {name}`\n\n{text(argument)}\n\n"
            f"![{text(chart.title)}](images/gallery/{name}.png)\n\n{tally(verdicts, 0 if single else len(seeds))}\n"
        )
    size = " --quick" if request["size"] == "quick" else ""
    path = docs / "gallery.md"
    draft = path.with_suffix(".tmp")
    draft.write_text("\n".join([HEAD.format(size=size, **environment), *sections]), encoding="utf-8")
    os.replace(draft, path)
    return path


def _verdict(fields: dict[str, Any]) -> Verdict:
    return Verdict.read({key: fields[key] for key in Verdict.__dataclass_fields__})


def tally(verdicts: Sequence[Verdict], seeds: int) -> str:
    """How many claims hold, and by name those that do not."""
    deciding = [v for v in verdicts if v.deciding]
    controls = [v for v in deciding if v.kind == CONTROL]
    said = f"{sum(v.passed for v in deciding)} of {len(deciding)} deciding claims hold"
    if controls:
        said += f", {len(controls)} of them negative controls"
    said += f"; over {seeds} seeds." if seeds else "."
    lines = [f"- Fails: {line(v)}" for v in deciding if not v.passed]
    lines += [f"- Not supported here: {line(v)}" for v in verdicts if v.kind == WIDER and not v.passed]
    return "\n".join([said, "", *lines]) if lines else said


def line(v: Verdict) -> str:
    return f"{text(v.claim)}: {observed(v.observed)} ({text(v.criterion)})"


def text(words: str) -> str:
    """Words for Markdown: what would be markup is escaped, ``code`` stays code."""
    parts = re.split(r"``(.+?)``", words)
    plain = [re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", part) for part in parts[::2]]
    code = [f"`{part}`" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def small_png(fig: Any) -> bytes:
    """A figure as PNG of few colours, in at most `MAX_BYTES` bytes."""
    for dpi in (110, 100, 90, 80, 70, 60):
        raw, out = io.BytesIO(), io.BytesIO()
        fig.savefig(raw, dpi=dpi, format="png")
        Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= MAX_BYTES:
            break
    return out.getvalue()


if __name__ == "__main__":
    print(gallery(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs")))
